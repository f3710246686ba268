//! rope.cu, attention_decode.cu and attention_tile.cuh: rotation, cache, and attention of single tokens, against the CPU's cache and attention.

use bulkhead_worker::engine::kv_cache::KvCache;
use bulkhead_worker::engine::pager::{BLOCK_TOKENS, Blocks, KvShape, Span};
use bulkhead_worker::model::attention::{Attention, Heads, LayerAttention, Vectors};
use bulkhead_worker::model::batch::{Batch, Role, Row};
use bulkhead_worker::quant::cpu::{Cpu, CpuPath};

use crate::emulator::{Arg, Buffer, Factors, Fault, Order, Program, Results, Session};
use crate::support::{Random, check_file, compare, same_bits};

const KERNELS: [&str; 4] = ["rope_write_bf16", "rope_write_int8", "attend_decode_bf16", "attend_decode_int8"];

const FAULTS: [Fault; 21] = [
    Fault { name: "a window one too wide", file: "kv.cuh", from: "position + 1 - window", to: "position - window" },
    Fault {
        name: "a window one too narrow",
        file: "kv.cuh",
        from: "position + 1 - window",
        to: "position + 2 - window",
    },
    Fault {
        name: "the sink left out of a single piece",
        file: "attention_decode.cu",
        from: "fmaf(powers.sum, share, expf(sink - most))",
        to: "powers.sum * share",
    },
    Fault {
        name: "the sink left out of many",
        file: "attention_decode.cu",
        from: "warp_sum(sum) + expf(sink - largest)",
        to: "warp_sum(sum)",
    },
    Fault { name: "the scores not scaled", file: "attention_decode.cu", from: "1.0f / sqrtf((float)dim)", to: "1.0f" },
    Fault {
        name: "no barrier before the powers",
        file: "attention_decode.cu",
        from: "            wait_for_copies<0>();\n            __syncthreads();",
        to: "            wait_for_copies<0>();",
    },
    Fault {
        name: "no barrier between powers and values",
        file: "attention_decode.cu",
        from: "            __syncthreads();\n            add_values",
        to: "            add_values",
    },
    Fault {
        name: "no barrier after the values",
        file: "attention_decode.cu",
        from: "add_values<Kv>(own, rows, count, dim, values);\n            __syncthreads();",
        to: "add_values<Kv>(own, rows, count, dim, values);",
    },
    Fault {
        name: "what a query's bf16 leaves over forgotten",
        file: "attention_tile.cuh",
        from: "float score = high[i] + low[i];",
        to: "float score = high[i];",
    },
    Fault {
        name: "values past the end not masked",
        file: "attention_tile.cuh",
        from: "b[i] = token >= count ? 0 : token + 1 >= count ? b[i] & 0xffffu : b[i];",
        to: "",
    },
    Fault {
        name: "keys not waited for",
        file: "attention_decode.cu",
        from: "            wait_for_copies<1>();\n            __syncthreads();\n            score_tile",
        to: "            wait_for_copies<2>();\n            __syncthreads();\n            score_tile",
    },
    Fault {
        name: "values not waited for",
        file: "attention_decode.cu",
        from: "wait_for_copies<0>();",
        to: "wait_for_copies<1>();",
    },
    Fault {
        name: "older tiles not scaled down",
        file: "attention_tile.cuh",
        from: "for (u32 i = 0; i < 4; i++) sum[i] *= factor;",
        to: "for (u32 i = 0; i < 4; i++) sum[i] *= 1.0f;",
    },
    Fault {
        name: "pieces added without their scale",
        file: "attention_decode.cu",
        from: "2 + element), shares[cut], total)",
        to: "2 + element), 1.0f, total)",
    },
    Fault {
        name: "combined by the last block but one",
        file: "common.cuh",
        from: "atomicAdd(counter, 1u) + 1 == blocks",
        to: "atomicAdd(counter, 1u) + 2 == blocks",
    },
    Fault {
        name: "the row's own key and value not in their tile",
        file: "attention_decode.cu",
        from: "write_head(Kv(), (warp == 0 ? keys : values) + token * bytes,",
        to: "write_head(Kv(), (warp == 0 ? keys : values) + (token + 1) % piece.tile * bytes,",
    },
    Fault {
        name: "the row's own key and value not in the cache",
        file: "attention_decode.cu",
        from: "write_head(Kv(), stored_row<Kv>(block, warp, at, layer.dim),",
        to: "write_head(Kv(), stored_row<Kv>(block, warp, (at + 1) % BLOCK_TOKENS, layer.dim),",
    },
    Fault {
        name: "a table's first block forgotten",
        file: "kv.cuh",
        from: "/ BLOCK_TOKENS - firsts[sequence]",
        to: "/ BLOCK_TOKENS",
    },
    Fault {
        name: "the sine's sign where a key is turned",
        file: "rope.cu",
        from: "second * cosine + first * sine",
        to: "second * cosine - first * sine",
    },
    Fault {
        name: "the sine's sign where a query is turned",
        file: "attention_decode.cu",
        from: "high * cosine + low * sine",
        to: "high * cosine - low * sine",
    },
    Fault {
        name: "8-bit values with the keys' scales",
        file: "kv.cuh",
        from: "+ is_value * BLOCK_TOKENS + token;",
        to: "+ token;",
    },
];

/// Layers of the pool, and the one that is used.
pub(crate) const POOL_LAYERS: usize = 2;
pub(crate) const POOL_LAYER: usize = 1;

#[derive(Clone, Copy)]
pub(crate) struct Case {
    pub(crate) heads: Heads,
    pub(crate) window: u32,
    pub(crate) is_int8: bool,
}

impl Case {
    pub(crate) fn row_heads(&self) -> usize {
        self.heads.query + 2 * self.heads.kv
    }

    pub(crate) fn row_len(&self) -> usize {
        self.row_heads() * self.heads.dim
    }

    pub(crate) fn block_bytes(&self) -> usize {
        let dim = self.heads.dim;
        POOL_LAYERS * self.heads.kv * 2 * BLOCK_TOKENS as usize * if self.is_int8 { dim + 4 } else { 2 * dim }
    }

    pub(crate) fn name(&self, kernel: &str) -> String {
        format!("{kernel}_{}", if self.is_int8 { "int8" } else { "bf16" })
    }
}

/// Two sequences with all their projections, and the rows that are asked for.
pub(crate) struct Inputs {
    /// Of each row: sequence and position.
    pub(crate) rows: Vec<(u32, u32)>,
    qkv: Vec<f32>,
    cosines: Vec<f32>,
    sines: Vec<f32>,
    pub(crate) sinks: Vec<f32>,
    pub(crate) asked: Vec<usize>,
}

pub(crate) const LENGTHS: [u32; 2] = [530, 70];

/// How a run is launched: whether rope_write goes before it for the asked rows, and the room for pieces.
#[derive(Clone, Copy, Debug)]
struct Way {
    is_written: bool,
    cuts: u32,
    order: Order,
}

pub(crate) fn inputs(case: &Case, random: &mut Random) -> Inputs {
    let rows: Vec<(u32, u32)> = (0..2).flat_map(|s| (0..LENGTHS[s as usize]).map(move |p| (s, p))).collect();
    let half = case.heads.dim / 2;
    let angles: Vec<f32> = rows
        .iter()
        .flat_map(|(_, position)| (0..half).map(move |i| *position as f32 * 0.7f32.powi(i as i32)))
        .collect();
    let asked = [0, 3, 39, 40, 41, 255, 256, 300, 511, 512, 529, 530, 599];
    Inputs {
        qkv: random.floats(rows.len() * case.row_len(), 1.0),
        cosines: angles.iter().map(|angle| angle.cos() * 1.3).collect(),
        sines: angles.iter().map(|angle| angle.sin() * 1.3).collect(),
        sinks: random.floats(case.heads.query, 1.0),
        asked: asked.to_vec(),
        rows,
    }
}

impl Inputs {
    fn pick<'a>(&self, all: &'a [f32], picked: &[usize]) -> Vec<f32> {
        let len = all.len() / self.rows.len();
        let row = |row: &usize| -> &'a [f32] { &all[row * len..(row + 1) * len] };
        picked.iter().flat_map(row).copied().collect()
    }

    /// Rotated queries, rotated keys, values of one row.
    pub(crate) fn rotated(&self, case: &Case, row: usize) -> [Vec<f32>; 3] {
        let (dim, half) = (case.heads.dim, case.heads.dim / 2);
        let own = &self.qkv[row * case.row_len()..(row + 1) * case.row_len()];
        let turn = |head: &[f32]| -> Vec<f32> {
            let angle = |i: usize| (self.cosines[row * half + i % half], self.sines[row * half + i % half]);
            let turned = |i: usize| {
                let (cosine, sine) = angle(i);
                if i < half {
                    head[i] * cosine - head[i + half] * sine
                } else {
                    head[i] * cosine + head[i - half] * sine
                }
            };
            (0..dim).map(turned).collect()
        };
        let (queries, rest) = own.split_at(case.heads.query * dim);
        let (keys, values) = rest.split_at(case.heads.kv * dim);
        [queries, keys]
            .map(|heads| heads.chunks_exact(dim).flat_map(turn).collect())
            .into_iter()
            .chain([values.to_vec()])
            .collect::<Vec<_>>()
            .try_into()
            .expect("three parts")
    }

    pub(crate) fn expected(&self, case: &Case) -> Vec<f32> {
        let span = if case.window == 0 { Span::Full } else { Span::Window(case.window) };
        let shape = KvShape { spans: vec![span], kv_heads: case.heads.kv, head_dim: case.heads.dim };
        let mut cache = KvCache::new(shape, 64, 2, 1024);
        let mut blocks = [Blocks::default(), Blocks::default()];
        for (blocks, length) in blocks.iter_mut().zip(LENGTHS) {
            cache.pager.reserve(blocks, length).expect("there is room for both");
        }
        for (row, (sequence, position)) in self.rows.iter().enumerate() {
            let [_, keys, values] = self.rotated(case, row);
            cache.write(0, &blocks[*sequence as usize], *position, &keys, &values);
        }
        let row = |row: &usize| {
            let (sequence, position) = self.rows[*row];
            Row { sequence: sequence as usize, position, token: 0, role: Role::Generated }
        };
        let batch =
            Batch { rows: self.asked.iter().map(row).collect(), blocks: blocks.iter().collect(), outputs: Vec::new() };
        let queries: Vec<f32> = self.asked.iter().flat_map(|row| self.rotated(case, *row)[0].clone()).collect();
        let mut out = vec![0.0; queries.len()];
        let cpu = Cpu::start_on(CpuPath::Scalar, 1).expect("a thread starts");
        let (attention, heads) = (Attention::new(Vectors::of(cpu.path())), case.heads);
        LayerAttention { cpu: &cpu, attention: &attention, heads, sinks: &self.sinks, cache: &cache, layer: 0 }
            .attend(&batch, &queries, &mut out);
        out
    }
}

/// A pool whose blocks stand in no order, and each sequence's table, which starts at the first block that is needed.
struct Paged {
    pool: Buffer,
    tables: Buffer,
    firsts: Buffer,
    stride: u32,
}

fn paged(session: &mut Session, case: &Case, firsts: [u32; 2]) -> Paged {
    let counts = LENGTHS.map(|length| length.div_ceil(BLOCK_TOKENS));
    let total = counts[0] + counts[1];
    let block = |sequence: usize, index: u32| (sequence as u32 * counts[0] + index) * 7 % total;
    let stride = counts[0];
    let mut tables = vec![u32::MAX; 2 * stride as usize];
    for sequence in 0..2 {
        for index in firsts[sequence]..counts[sequence] {
            tables[sequence * stride as usize + (index - firsts[sequence]) as usize] = block(sequence, index);
        }
    }
    assert_ne!(total % 7, 0, "the blocks are shuffled by a factor that does not divide their number");
    Paged {
        pool: session.output(total as usize * case.block_bytes()),
        tables: session.words(&tables),
        firsts: session.words(&firsts),
        stride,
    }
}

/// The arguments that say where the cache is.
fn cache(case: &Case, paged: &Paged, sequences: Buffer, positions: Buffer) -> Vec<Arg> {
    let numbers = [POOL_LAYERS, POOL_LAYER, case.heads.kv, case.heads.dim].map(|n| Arg::Word(n as u32));
    let mut arguments = vec![Arg::At(paged.pool)];
    arguments.extend(numbers);
    arguments.extend([Arg::At(paged.tables), Arg::At(paged.firsts), Arg::Word(paged.stride)]);
    arguments.extend([Arg::At(sequences), Arg::At(positions)]);
    arguments
}

/// Bytes of dynamic shared memory of attend_decode.
fn shared_bytes(case: &Case) -> u32 {
    let (dim, tile) = (case.heads.dim as u32, if case.heads.dim <= 64 { 128 } else { 64 });
    (2 * tile * if case.is_int8 { dim + 8 } else { 2 * dim + 16 }).max(256 * dim)
}

/// Writes keys and values of all rows but the asked ones, unless `is_written` asks for those too, and attends for these.
/// Gives the result and the cache.
fn run(
    program: &Program,
    case: &Case,
    inputs: &Inputs,
    asked: &[usize],
    way: Way,
) -> Result<(Results, [Buffer; 2]), String> {
    let mut session = Session::default();
    let paged = paged(&mut session, case, [0, 0]);
    let before: Vec<usize> = (0..inputs.rows.len()).filter(|row| way.is_written || !asked.contains(row)).collect();
    let query_heads = Arg::Word(case.heads.query as u32);
    let mut last = None;
    for (is_asked, rows) in [(false, &before[..]), (true, asked)] {
        let qkv = session.floats(&inputs.pick(&inputs.qkv, rows));
        let cosines = session.floats(&inputs.pick(&inputs.cosines, rows));
        let sines = session.floats(&inputs.pick(&inputs.sines, rows));
        let sequences = session.words(&rows.iter().map(|row| inputs.rows[*row].0).collect::<Vec<u32>>());
        let positions = session.words(&rows.iter().map(|row| inputs.rows[*row].1).collect::<Vec<u32>>());
        if way.is_written || !is_asked {
            let mut arguments = vec![Arg::At(qkv), Arg::At(cosines), Arg::At(sines), query_heads];
            arguments.extend(cache(case, &paged, sequences, positions));
            let grid = [rows.len() as u32, case.row_heads().div_ceil(4) as u32, 1];
            session.launch(&case.name("rope_write"), (grid, 128, 0), way.order, &arguments);
        }
        last = Some(([qkv, cosines, sines].map(Arg::At), sequences, positions));
    }
    let (floats, sequences, positions) = last.expect("there are asked rows");
    // A sliding layer's table starts later: here where no asked row of the first sequence needs what is before.
    let smallest =
        asked.iter().filter(|row| inputs.rows[**row].0 == 0).map(|row| inputs.rows[*row].1).min().unwrap_or(0);
    let first = if case.window == 0 { 0 } else { (smallest + 1).saturating_sub(case.window) / BLOCK_TOKENS };
    let later = Paged { pool: paged.pool, ..self::paged(&mut session, case, [first, 0]) };
    let rows = asked.len();
    let partial = session.output(rows * case.heads.query * way.cuts as usize * (case.heads.dim + 2) * 4);
    let counters = session.words(&vec![0; rows * case.heads.kv]);
    let out = session.output(rows * case.heads.query * case.heads.dim * 2);
    let sinks = session.floats(&inputs.sinks);
    let mut arguments = floats.to_vec();
    arguments.extend([query_heads, Arg::Word(case.window), Arg::Word(u32::from(way.is_written))]);
    arguments.extend(cache(case, &later, sequences, positions));
    arguments.extend([sinks, partial, counters, out].map(Arg::At));
    let grid = [way.cuts, case.heads.kv as u32, rows as u32];
    session.launch(&case.name("attend_decode"), (grid, 256, shared_bytes(case)), way.order, &arguments);
    let results = session.run(program)?;
    if results.words(counters).iter().any(|count| *count != 0) {
        return Err("counters are left that are not 0".into());
    }
    Ok((results, [out, paged.pool]))
}

/// Rows of one sequence may not be in one launch that writes the cache: some of them alone, and two of both sequences.
fn check_alone(program: &Program, case: &Case, inputs: &Inputs, all: &[f32], order: Order) -> Result<(), String> {
    let len = case.heads.query * case.heads.dim;
    for alone in [vec![7], vec![12], vec![10, 12]] {
        let rows: Vec<usize> = alone.iter().map(|index| inputs.asked[*index]).collect();
        let mut pools = Vec::new();
        for (is_written, cuts) in [(false, 6), (true, 5)] {
            let (results, [out, pool]) = run(program, case, inputs, &rows, Way { is_written, cuts, order })?;
            pools.push(results.bytes(pool).to_vec());
            for (found, index) in results.widened(out).chunks_exact(len).zip(&alone) {
                same_bits("alone and with others", found, &all[index * len..(index + 1) * len])?;
            }
        }
        if pools[0] != pools[1] {
            return Err("attention writes another cache than rope_write".into());
        }
    }
    Ok(())
}

fn check(program: &Program, order: Order) -> Result<(), String> {
    let mut random = Random::new(5);
    let heads = |query, kv, dim| Heads { query, kv, dim };
    for (heads, window, is_int8) in [
        (heads(16, 2, 64), 0, false),
        (heads(16, 2, 64), 40, false),
        (heads(3, 1, 32), 300, false),
        (heads(10, 1, 128), 0, false),
        (heads(4, 2, 40), 0, false),
        (heads(4, 2, 64), 40, true),
        (heads(2, 2, 72), 0, true),
        (heads(4, 2, 64), 0, true),
    ] {
        let case = Case { heads, window, is_int8 };
        let inputs = inputs(&case, &mut random);
        let expected = inputs.expected(&case);
        // The result is rounded to bf16; an 8-bit key or value is off by up to 1/254 of its head's largest.
        let tolerance = if is_int8 { 1.5e-2 } else { 2.5e-3 };
        let (results, [out, _]) =
            run(program, &case, &inputs, &inputs.asked, Way { is_written: true, cuts: 5, order })?;
        let all = results.widened(out);
        let len = heads.query * heads.dim;
        for ((found, expected), row) in all.chunks_exact(len).zip(expected.chunks_exact(len)).zip(&inputs.asked) {
            let what = format!("{heads:?} window {window} int8 {is_int8} row {:?}", inputs.rows[*row]);
            compare(&what, found, expected, tolerance)?;
        }
        check_alone(program, &case, &inputs, &all, order)?;
    }
    Ok(())
}

#[test]
fn attention_agrees_with_the_cpu_and_does_not_depend_on_the_batch() {
    check_file("decode", &KERNELS, &[Factors::Bf16, Factors::Half], check, &FAULTS);
}

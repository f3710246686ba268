//! attention_prefill.cu: attention of a prompt's tokens, against the CPU's cache and attention.

use bulkhead_worker::engine::pager::BLOCK_TOKENS;
use bulkhead_worker::model::attention::Heads;
use half::bf16;

use crate::attention::{Case, Inputs, LENGTHS, POOL_LAYER, POOL_LAYERS, inputs};
use crate::emulator::{Arg, Factors, Fault, Order, Program, Session};
use crate::support::{Random, check_file, compare, same_bits};

const KERNELS: [&str; 2] = ["attend_prefill_bf16", "attend_prefill_int8"];

const FAULTS: [Fault; 12] = [
    Fault { name: "a window one too wide", file: "kv.cuh", from: "position + 1 - window", to: "position - window" },
    Fault {
        name: "a row sees the token after it",
        file: "attention_prefill.cu",
        from: "key > seen.last",
        to: "key > seen.last + 1",
    },
    Fault {
        name: "tiles taken for whole that are not",
        file: "attention_prefill.cu",
        from: "(tile + 1) * KEYS - 1 <= rows.position",
        to: "tile * KEYS <= rows.position",
    },
    Fault {
        name: "the sink left out",
        file: "attention_prefill.cu",
        from: "sink != float_of_bits(0xff800000u) ? 1.0f",
        to: "sink != float_of_bits(0xff800000u) ? 0.0f",
    },
    Fault {
        name: "what stands past the end read",
        file: "attention_prefill.cu",
        from: "key <= rows.last_seen && chunk",
        to: "chunk",
    },
    Fault {
        name: "the sums not brought down",
        file: "attention_prefill.cu",
        from: "running.sums[tile][j][half] *= down;",
        to: "",
    },
    Fault {
        name: "copies not waited for",
        file: "attention_prefill.cu",
        from: "wait_for_copies<0>();",
        to: "wait_for_copies<1>();",
    },
    Fault {
        name: "no barrier before the scores",
        file: "attention_prefill.cu",
        from: "wait_for_copies<0>();\n        __syncthreads();",
        to: "wait_for_copies<0>();",
    },
    Fault {
        name: "a table's first block forgotten",
        file: "kv.cuh",
        from: "/ BLOCK_TOKENS - firsts[sequence]",
        to: "/ BLOCK_TOKENS",
    },
    Fault {
        name: "8-bit values with the keys' scales",
        file: "attention_prefill.cu",
        from: "= scales[1];",
        to: "= scales[0];",
    },
    Fault {
        name: "values not turned over",
        file: "attention_prefill.cu",
        from: "load_matrices_turned(b,",
        to: "load_matrices(b,",
    },
    Fault {
        name: "the heads of a group exchanged",
        file: "attention_prefill.cu",
        from: "rows.kv_head * rows.group + query % rows.group) * dim;\n#pragma unroll\n        for",
        to: "rows.kv_head * rows.group + (query + 1) % rows.group) * dim;\n#pragma unroll\n        for",
    },
];

/// Rows of one sequence, from a position to another.
type Stretch = (u32, u32, u32);

/// The pool with all rows' keys and values, its blocks in no order.
fn pool(case: &Case, inputs: &Inputs, block: impl Fn(u32, u32) -> u32) -> Vec<u8> {
    let dim = case.heads.dim;
    let total = LENGTHS.iter().map(|length| length.div_ceil(BLOCK_TOKENS)).sum::<u32>();
    let mut pool = vec![0xff; total as usize * case.block_bytes()];
    let head_bytes = case.block_bytes() / POOL_LAYERS / case.heads.kv;
    for (row, (sequence, position)) in inputs.rows.iter().enumerate() {
        let [_, keys, values] = inputs.rotated(case, row);
        let token = (position % BLOCK_TOKENS) as usize;
        let start = block(*sequence, position / BLOCK_TOKENS) as usize * POOL_LAYERS + POOL_LAYER;
        for (index, head) in keys.chunks_exact(dim).chain(values.chunks_exact(dim)).enumerate() {
            let (is_value, kv_head) = (index / case.heads.kv, index % case.heads.kv);
            let own = &mut pool[(start * case.heads.kv + kv_head) * head_bytes..][..head_bytes];
            let line = is_value * BLOCK_TOKENS as usize + token;
            if case.is_int8 {
                let scale = head.iter().fold(0.0f32, |largest, value| largest.max(value.abs())) / 127.0;
                let bytes = head.iter().map(|value| (value / scale).round() as i8 as u8);
                own[line * dim..][..dim].iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
                let at = 2 * BLOCK_TOKENS as usize * dim + line * 4;
                own[at..at + 4].copy_from_slice(&scale.to_le_bytes());
            } else {
                let bytes = head.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes());
                own[line * dim * 2..][..dim * 2].iter_mut().zip(bytes).for_each(|(to, byte)| *to = byte);
            }
        }
    }
    pool
}

/// Bytes of dynamic shared memory.
fn shared_bytes(dim: usize, factors: Factors) -> u32 {
    let wide = if dim <= 64 { 64 } else { 128 };
    let (stages, keys) = match factors {
        Factors::Half => (1, if wide == 128 { 16 } else { 32 }),
        Factors::Bf16 => (2, if wide == 128 { 16 } else { 64 }),
    };
    128 * wide * 2 + stages * keys * (wide * 4 + 8) + 512
}

/// Attends for stretches of rows, in tiles of at most so many.
fn run(
    program: &Program,
    case: &Case,
    inputs: &Inputs,
    stretches: &[Stretch],
    tile_rows: u32,
    order: Order,
) -> Result<Vec<f32>, String> {
    let counts = LENGTHS.map(|length| length.div_ceil(BLOCK_TOKENS));
    let total = counts[0] + counts[1];
    assert_ne!(total % 7, 0, "the blocks are shuffled by a factor that does not divide their number");
    let block = |sequence: u32, index: u32| (sequence * counts[0] + index) * 7 % total;
    // A sliding layer's table starts later: where no row of its sequence needs what is before.
    let first = |sequence: u32| {
        let start = stretches.iter().filter(|stretch| stretch.0 == sequence).map(|stretch| stretch.1).min();
        let seen = if case.window == 0 { 0 } else { (start.unwrap_or(0) + 1).saturating_sub(case.window) };
        seen / BLOCK_TOKENS
    };
    let stride = counts[0];
    let mut tables = vec![u32::MAX; 2 * stride as usize];
    for sequence in 0..2u32 {
        for index in first(sequence)..counts[sequence as usize] {
            tables[(sequence * stride + index - first(sequence)) as usize] = block(sequence, index);
        }
    }
    let (mut rows, mut tiles) = (Vec::new(), Vec::new());
    for (sequence, from, to) in stretches {
        for start in (*from..*to).step_by(tile_rows as usize) {
            tiles.extend([rows.len() as u32 + start - from, tile_rows.min(to - start)]);
        }
        rows.extend((*from..*to).map(|position| (*sequence, position)));
    }
    let mut qkv = Vec::new();
    for row in &rows {
        let index = inputs.rows.iter().position(|other| other == row).expect("it is one of the inputs");
        let [queries, ..] = inputs.rotated(case, index);
        qkv.extend(queries);
        qkv.resize(qkv.len() + 2 * case.heads.kv * case.heads.dim, f32::NAN);
    }
    let mut session = Session::default();
    let (qkv, sinks) = (session.floats(&qkv), session.floats(&inputs.sinks));
    let pool = session.bytes(pool(case, inputs, block));
    let (tables, firsts) = (session.words(&tables), session.words(&[first(0), first(1)]));
    let sequences = session.words(&rows.iter().map(|row| row.0).collect::<Vec<u32>>());
    let positions = session.words(&rows.iter().map(|row| row.1).collect::<Vec<u32>>());
    let list = session.words(&tiles);
    let out = session.output(rows.len() * case.heads.query * case.heads.dim * 2);
    let mut arguments = vec![Arg::At(qkv), Arg::Word(case.heads.query as u32), Arg::Word(case.window), Arg::At(pool)];
    arguments.extend([POOL_LAYERS, POOL_LAYER, case.heads.kv, case.heads.dim].map(|n| Arg::Word(n as u32)));
    arguments.extend([Arg::At(tables), Arg::At(firsts), Arg::Word(stride)]);
    arguments.extend([sequences, positions, sinks, list, out].map(Arg::At));
    let size =
        ([tiles.len() as u32 / 2, case.heads.kv as u32, 1], 128, shared_bytes(case.heads.dim, program.factors()));
    session.launch(&case.name("attend_prefill"), size, order, &arguments);
    Ok(session.run(program)?.widened(out))
}

fn check(program: &Program, order: Order) -> Result<(), String> {
    let mut random = Random::new(8);
    let heads = |query, kv, dim| Heads { query, kv, dim };
    for (heads, window, is_int8) in [
        (heads(16, 2, 64), 0, false),
        (heads(16, 2, 64), 40, false),
        (heads(3, 1, 32), 300, false),
        (heads(10, 1, 128), 90, false),
        (heads(4, 2, 64), 40, true),
        (heads(5, 1, 112), 0, true),
    ] {
        let case = Case { heads, window, is_int8 };
        let mut inputs = inputs(&case, &mut random);
        let stretches = [(0, 0, 37), (0, 300, 321), (0, 505, 530), (1, 0, 19)];
        let is_asked = |(sequence, position): &(u32, u32)| {
            stretches.iter().any(|(own, from, to)| own == sequence && (*from..*to).contains(position))
        };
        inputs.asked = (0..inputs.rows.len()).filter(|row| is_asked(&inputs.rows[*row])).collect();
        let expected = inputs.expected(&case);
        // Queries, powers and the result are each rounded to bf16; an 8-bit key or value is off by up to 1/254 of its
        // head's largest.
        let tolerance = if is_int8 { 3e-2 } else { 5e-3 };
        let most = 128 / (heads.query / heads.kv) as u32;
        let all = run(program, &case, &inputs, &stretches, most, order)?;
        let len = heads.query * heads.dim;
        for ((found, expected), row) in all.chunks_exact(len).zip(expected.chunks_exact(len)).zip(&inputs.asked) {
            let what = format!("{heads:?} window {window} int8 {is_int8} row {:?}", inputs.rows[*row]);
            compare(&what, found, expected, tolerance)?;
        }
        // Other chunks of the prompts, in other tiles: the rows from 305 on, and the last one alone.
        for (stretch, tile_rows, skipped) in [((0, 305, 321), 5, 42), ((0, 529, 530), 1, 82), ((1, 3, 19), 7, 86)] {
            let part = run(program, &case, &inputs, &[stretch], tile_rows.min(most), order)?;
            same_bits("in chunks and at once", &part, &all[skipped * len..][..part.len()])?;
        }
    }
    Ok(())
}

#[test]
fn attention_of_a_prompt_agrees_with_the_cpu_and_does_not_depend_on_its_chunks() {
    check_file("prefill", &KERNELS, &[Factors::Bf16, Factors::Half], check, &FAULTS);
}

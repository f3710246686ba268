//! matvec.cu: dense layers, some tokens at a time.

use bulkhead_worker::quant::cpu::{Cpu, CpuPath};

use crate::emulator::{Arg, Factors, Fault, Order, Program, Session};
use crate::support::{Format, Layer, Random, check_file, compare, descriptors, same_bits, scale_values};

const KERNELS: [&str; 12] = [
    "matvec_nf4_8",
    "matvec_nf4_16",
    "matvec_nf4_32",
    "matvec_nf4_nested_8",
    "matvec_nf4_nested_16",
    "matvec_nf4_nested_32",
    "matvec_mxfp4_8",
    "matvec_mxfp4_16",
    "matvec_mxfp4_32",
    "matvec_bf16_8",
    "matvec_bf16_16",
    "matvec_bf16_32",
];

const FAULTS: [Fault; 16] = [
    Fault {
        name: "NF4's nibbles swapped",
        file: "formats.cuh",
        from: "HIGH_FIRST ? factor_pair(high, low)",
        to: "!HIGH_FIRST ? factor_pair(high, low)",
    },
    Fault {
        name: "the scale of the wrong row",
        file: "pipe.cuh",
        from: "own = first + lane % 4 / 2 * 8,",
        to: "own = first,",
    },
    Fault {
        name: "the scale of the wrong block",
        file: "pipe.cuh",
        from: "__shfl_sync(ALL_LANES, word, half, 4)",
        to: "__shfl_sync(ALL_LANES, word, 1 - half, 4)",
    },
    Fault {
        name: "nested groups of twice the size",
        file: "formats.cuh",
        from: "load_if(is_wanted, nested + index / NESTED_GROUP,",
        to: "load_if(is_wanted, nested + index / (2 * NESTED_GROUP),",
    },
    Fault {
        name: "MXFP4's exponents of a block swapped",
        file: "formats.cuh",
        from: "(word >> (8 * group))",
        to: "(word >> (8 - 8 * group))",
    },
    Fault {
        name: "MXFP4's groups of a block exchanged",
        file: "formats.cuh",
        from: "held.codes[0][0] = near_word(own), held.codes[0][1] = near_word(own + 16);",
        to: "held.codes[0][1] = near_word(own), held.codes[0][0] = near_word(own + 16);",
    },
    Fault {
        name: "a unit multiplied before it has come",
        file: "pipe.cuh",
        from: "wait_for_copies<HELD - 1>();",
        to: "wait_for_copies<HELD>();",
    },
    Fault {
        name: "the second block of a last unit taken for real",
        file: "pipe.cuh",
        from: "if (blocks_left <= (int)(slot * STEP + half)) break;",
        to: "",
    },
    Fault {
        name: "no barrier before the sums are collected",
        file: "matvec.cuh",
        from: "        __syncthreads();\n        Item item = plan",
        to: "        Item item = plan",
    },
    Fault {
        name: "no barrier after the sums are collected",
        file: "matvec.cuh",
        from: "if (SUM_SETS<TILES> == 1) __syncthreads();",
        to: "",
    },
    Fault {
        name: "one set of sums where two are taken in turn",
        file: "matvec.cuh",
        from: "float* own = slots + turn % SUM_SETS<TILES> * (SUM_BYTES<TILES> / 4);",
        to: "float* own = slots;",
    },
    Fault {
        name: "no barrier after the tables are filled",
        file: "matvec.cuh",
        from: "        wait_for_previous();\n    }\n    __syncthreads();",
        to: "        wait_for_previous();\n    }",
    },
    Fault {
        name: "one warp's sum left out",
        file: "matvec.cuh",
        from: "for (u32 way = 0; way < WAYS; way++) total",
        to: "for (u32 way = 1; way < WAYS; way++) total",
    },
    Fault {
        name: "activations past a kernel's tiles forgotten",
        file: "matvec.cuh",
        from: "if (item.first_column < job.columns(item.group)) return item;",
        to: "",
    },
    Fault {
        name: "a block's share one short",
        file: "matvec.cuh",
        from: "return block * all + (block < more ? block : more);",
        to: "return block * all;",
    },
    Fault {
        name: "the bias of the first matrix for all",
        file: "matvec.cu",
        from: "? item.matrix->bias[row]",
        to: "? matrices->bias[row % matrices->rows]",
    },
];

/// Bytes of dynamic shared memory that matvec.cuh asks for, from compute capability 8.0 on.
pub(crate) fn shared_bytes(format: Format, tiles: u32, stage_columns: u32, columns: u32) -> u32 {
    let table_and_pipe = if format == Format::Bf16 { 0 } else { 32768 + 24576 };
    table_and_pipe + 1024 + if tiles == 4 { 16384 } else { 8192 } + stage_columns * (columns + 8) * 2
}

struct Case {
    format: Format,
    columns: usize,
    rows: [usize; 2],
}

/// How a product is launched: none of it may change a bit.
#[derive(Clone, Copy, Debug)]
struct Way {
    tiles: u32,
    grid: u32,
    stage_columns: u32,
    order: Order,
}

fn run(program: &Program, case: &Case, layers: &[Layer], x: &[f32], way: Way) -> Result<Vec<f32>, String> {
    let batch = (x.len() / case.columns) as u32;
    let width = case.rows.iter().sum::<usize>() as u32;
    let mut session = Session::default();
    let matrices = descriptors(&mut session, layers);
    let (x, map) = (session.narrow(x), scale_values(&mut session));
    let out = session.output((batch * width * 4) as usize);
    let shared = shared_bytes(case.format, way.tiles, way.stage_columns, case.columns as u32);
    let name = format!("matvec_{}_{}", case.format.name(), way.tiles * 8);
    let arguments = [
        Arg::At(matrices),
        Arg::Word(layers.len() as u32),
        Arg::At(x),
        Arg::Word(batch),
        Arg::Word(case.columns as u32),
        Arg::At(out),
        Arg::Word(width),
        Arg::At(map),
        Arg::Word(way.stage_columns),
    ];
    session.launch(&name, ([way.grid, 1, 1], 256, shared), way.order, &arguments);
    Ok(session.run(program)?.floats(out))
}

fn check_case(program: &Program, order: Order, case: &Case, random: &mut Random) -> Result<(), String> {
    let [first, second] = case.rows;
    let bias = |random: &mut Random, rows| Some(random.floats(rows, 0.5));
    let layers = [
        Layer { weight: case.format.random(random, first, case.columns), bias: bias(random, first), output: 0 },
        Layer {
            weight: case.format.random(random, second, case.columns),
            bias: bias(random, second),
            output: first as u32,
        },
    ];
    let width = first + second;
    let x = random.narrow(16 * case.columns, 3.0);
    let cpu = Cpu::start_on(CpuPath::Scalar, 1).expect("a thread starts");
    let mut expected = vec![0.0; 16 * width];
    for layer in &layers {
        let mut own = vec![0.0; 16 * layer.weight.rows()];
        cpu.matmul(&x, &layer.weight, layer.bias.as_deref(), &mut own);
        for (row, own) in expected.chunks_exact_mut(width).zip(own.chunks_exact(layer.weight.rows())) {
            row[layer.output as usize..layer.output as usize + own.len()].copy_from_slice(own);
        }
    }
    let all = run(program, case, &layers, &x, Way { tiles: 2, grid: 2, stage_columns: 16, order })?;
    for (row, (found, expected)) in all.chunks_exact(width).zip(expected.chunks_exact(width)).enumerate() {
        let what = format!("{:?} {:?}x{} row {row}", case.format, case.rows, case.columns);
        compare(&what, found, expected, case.format.tolerance())?;
    }
    // Grids with one piece, with unequal shares, and with blocks that have nothing to do; room for all activations, for
    // none, and for the last ones only.
    for (batch, tiles, grid, stage_columns) in
        [(1, 1, 7, 0), (1, 2, 1, 1), (5, 1, 3, 5), (11, 2, 4, 10), (16, 1, 1, 8), (11, 1, 2, 3), (16, 4, 2, 0)]
    {
        let part = run(program, case, &layers, &x[..batch * case.columns], Way { tiles, grid, stage_columns, order })?;
        same_bits(&format!("{:?} batch {batch} and 16", case.format), &part, &all[..batch * width])?;
    }
    if case.columns < 1000 {
        // More than 32: the kernel takes them a piece at a time.
        let many: Vec<f32> = x.iter().cycle().take(37 * case.columns).copied().collect();
        let found = run(program, case, &layers, &many, Way { tiles: 4, grid: 2, stage_columns: 32, order })?;
        for (row, found) in found.chunks_exact(width).enumerate() {
            same_bits(&format!("{:?} row {row} of 37", case.format), found, &all[row % 16 * width..][..width])?;
        }
    }
    Ok(())
}

fn check(program: &Program, order: Order) -> Result<(), String> {
    let mut random = Random::new(1);
    for format in Format::ALL {
        // Fewer blocks than warps; a count that is no multiple of anything; more than one round of prefetch.
        for (columns, rows) in [(64, [16, 5]), (11 * 64, [24, 17]), (53 * 64, [17, 3])] {
            check_case(program, order, &Case { format, columns, rows }, &mut random)?;
        }
    }
    Ok(())
}

#[test]
fn products_agree_with_the_cpu_and_do_not_depend_on_the_batch() {
    check_file("matvec", &KERNELS, &[Factors::Bf16, Factors::Half], check, &FAULTS);
}

//! matvec.cu: dense layers for 1 to 16 tokens.

use bulkhead_worker::quant::cpu::Cpu;

use crate::emulator::{Arg, Factors, Fault, Order, Program, Session};
use crate::support::{Format, Layer, Random, check_file, compare, descriptors, same_bits, scale_values};

const KERNELS: [&str; 8] = [
    "matvec_nf4_8",
    "matvec_nf4_16",
    "matvec_nf4_nested_8",
    "matvec_nf4_nested_16",
    "matvec_mxfp4_8",
    "matvec_mxfp4_16",
    "matvec_bf16_8",
    "matvec_bf16_16",
];

const FAULTS: [Fault; 9] = [
    Fault {
        name: "NF4's nibbles swapped",
        file: "formats.cuh",
        from: "HIGH_FIRST ? factor_pair(high, low)",
        to: "!HIGH_FIRST ? factor_pair(high, low)",
    },
    Fault {
        name: "the scale of the wrong row",
        file: "formats.cuh",
        from: "held.scale[which] = __ldcs((const float*)m.scales + index);",
        to: "held.scale[which] = __ldcs((const float*)m.scales + (index > blocks ? index - blocks : index));",
    },
    Fault {
        name: "nested groups of twice the size",
        file: "formats.cuh",
        from: "from.nested[index / NESTED_GROUP]",
        to: "from.nested[index / (2 * NESTED_GROUP)]",
    },
    Fault {
        name: "MXFP4's exponents of a block swapped",
        file: "formats.cuh",
        from: "held.exponents[which] >> (8 * group)",
        to: "held.exponents[which] >> (8 - 8 * group)",
    },
    Fault {
        name: "no barrier before the sums are collected",
        file: "matvec.cuh",
        from: "    __syncthreads();\n    float total = 0;",
        to: "    float total = 0;",
    },
    Fault {
        name: "no barrier after the sums are collected",
        file: "matvec.cuh",
        from: "        __syncthreads();\n        item = next;",
        to: "        item = next;",
    },
    Fault {
        name: "no barrier after the tables are filled",
        file: "matvec.cuh",
        from: "if (Job::KNOWN_BEFORE) wait_for_previous();\n    __syncthreads();",
        to: "if (Job::KNOWN_BEFORE) wait_for_previous();",
    },
    Fault {
        name: "one warp's sum left out",
        file: "matvec.cuh",
        from: "for (u32 warp = 0; warp < MATVEC_WARPS; warp++) total",
        to: "for (u32 warp = 1; warp < MATVEC_WARPS; warp++) total",
    },
    Fault {
        name: "the bias of the first matrix for all",
        file: "matvec.cu",
        from: "? item.matrix->bias[row]",
        to: "? matrices->bias[row % matrices->rows]",
    },
];

/// Bytes of dynamic shared memory that matvec.cuh asks for.
pub(crate) fn shared_bytes(format: Format, tiles: u32, staged_columns: u32, columns: u32) -> u32 {
    let table = if format == Format::Bf16 { 0 } else { 32768 };
    table + 1024 + tiles * 4096 + staged_columns * (columns + 8) * 2
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
    is_staged: bool,
    order: Order,
}

fn run(program: &Program, case: &Case, layers: &[Layer], x: &[f32], way: Way) -> Result<Vec<f32>, String> {
    let batch = (x.len() / case.columns) as u32;
    let width = case.rows.iter().sum::<usize>() as u32;
    let mut session = Session::default();
    let matrices = descriptors(&mut session, layers);
    let (x, map) = (session.narrow(x), scale_values(&mut session));
    let out = session.output((batch * width * 4) as usize);
    let staged_columns = if way.is_staged { batch } else { 0 };
    let shared = shared_bytes(case.format, way.tiles, staged_columns, case.columns as u32);
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
        Arg::Word(u32::from(way.is_staged)),
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
    let cpu = Cpu::start(1).expect("a thread starts");
    let mut expected = vec![0.0; 16 * width];
    for layer in &layers {
        let mut own = vec![0.0; 16 * layer.weight.rows()];
        cpu.matmul(&x, &layer.weight, layer.bias.as_deref(), &mut own);
        for (row, own) in expected.chunks_exact_mut(width).zip(own.chunks_exact(layer.weight.rows())) {
            row[layer.output as usize..layer.output as usize + own.len()].copy_from_slice(own);
        }
    }
    let all = run(program, case, &layers, &x, Way { tiles: 2, grid: 2, is_staged: true, order })?;
    for (row, (found, expected)) in all.chunks_exact(width).zip(expected.chunks_exact(width)).enumerate() {
        let what = format!("{:?} {:?}x{} row {row}", case.format, case.rows, case.columns);
        compare(&what, found, expected, case.format.tolerance())?;
    }
    for (batch, tiles, grid, is_staged) in [(1, 1, 7, false), (1, 2, 1, true), (5, 1, 3, true), (11, 2, 4, false)] {
        let part = run(program, case, &layers, &x[..batch * case.columns], Way { tiles, grid, is_staged, order })?;
        same_bits(&format!("{:?} batch {batch} and 16", case.format), &part, &all[..batch * width])?;
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

//! matmul.cu: dense layers for a prompt's tokens.

use bulkhead_worker::quant::cpu::{Cpu, CpuPath};

use crate::emulator::{Arg, Factors, Fault, Order, Program, Session};
use crate::support::{Format, Layer, Random, check_file, compare, descriptors, same_bits, scale_values};

const KERNELS: [&str; 4] = ["matmul_nf4", "matmul_nf4_nested", "matmul_mxfp4", "matmul_bf16"];

const FAULTS: [Fault; 11] = [
    Fault {
        name: "codes' upper half taken for the lower",
        file: "matmul.cuh",
        from: "index = own >> (16 * half)",
        to: "index = own >> (8 * half)",
    },
    Fault {
        name: "nibbles of a byte exchanged",
        file: "matmul.cuh",
        from: "0x4051u : 0x5140u",
        to: "0x5140u : 0x4051u",
    },
    Fault {
        name: "the scale of the block before",
        file: "matmul.cuh",
        from: "hands.first + block + 2, following);",
        to: "hands.first + block + 1, following);",
    },
    Fault {
        name: "MXFP4's exponents of a block exchanged",
        file: "matmul.cuh",
        from: "held.scale >> (8 * group)",
        to: "held.scale >> (8 - 8 * group)",
    },
    Fault {
        name: "nested groups of twice the size",
        file: "matmul.cuh",
        from: "m.nested[index / NESTED_GROUP]",
        to: "m.nested[index / (2 * NESTED_GROUP)]",
    },
    Fault {
        name: "copies not waited for",
        file: "matmul.cuh",
        from: "wait_for_copies<1>();",
        to: "wait_for_copies<2>();",
    },
    Fault {
        name: "no barrier between a block's products and the next copies",
        file: "matmul.cuh",
        from: "wait_for_copies<1>();\n        __syncthreads();",
        to: "wait_for_copies<1>();",
    },
    Fault {
        name: "no barrier before the next piece",
        file: "matmul.cuh",
        from: "is written.\n        __syncthreads();",
        to: "is written.",
    },
    Fault {
        name: "tiles of weights read without their exchange",
        file: "staging.cuh",
        from: "(chunk ^ (row & 7u))",
        to: "(chunk ^ (row & 3u & chunk))",
    },
    Fault {
        name: "rows handed to their neighbours",
        file: "matmul.cuh",
        from: "tile / 2 * 16 + member * 4 + tile % 2 * 2 + second",
        to: "tile * 8 + member * 2 + second",
    },
    Fault {
        name: "the bias of the first row for all",
        file: "matmul.cuh",
        from: "matrix.bias[row + j]",
        to: "matrix.bias[row]",
    },
];

/// Relative error of a row: NF4's scaled values are rounded to bf16, by 1.6e-3 on average, and the rows here are so short
/// that some are off by twice that. The others are exact.
pub(crate) fn tolerance(format: Format) -> f64 {
    match format {
        Format::Nf4 | Format::Nf4Nested => 4e-3,
        Format::Mxfp4 | Format::Bf16 => 2e-6,
    }
}

/// Bytes of dynamic shared memory for a tile of so many tokens; Turing has smaller ones.
pub(crate) fn shared_bytes(format: Format, tokens: u32, factors: Factors) -> u32 {
    match factors {
        Factors::Half => tokens.min(64) * 132 + 16384 + 1024 + 2080,
        Factors::Bf16 => 3 * tokens * 128 + if format == Format::Bf16 { 3 } else { 2 } * 16384 + 2080,
    }
}

struct Case {
    format: Format,
    columns: usize,
    rows: [usize; 2],
}

fn run(program: &Program, case: &Case, layers: &[Layer], x: &[f32], way: (u32, Order)) -> Result<Vec<f32>, String> {
    let tokens = (x.len() / case.columns) as u32;
    let width = case.rows.iter().sum::<usize>() as u32;
    let mut session = Session::default();
    let matrices = descriptors(&mut session, layers);
    let (x, map) = (session.narrow(x), scale_values(&mut session));
    let out = session.output((tokens * width * 4) as usize);
    let arguments = [
        Arg::At(matrices),
        Arg::Word(layers.len() as u32),
        Arg::At(x),
        Arg::Word(tokens),
        Arg::Word(case.columns as u32),
        Arg::At(out),
        Arg::Word(width),
        Arg::At(map),
    ];
    let (grid, order) = way;
    let size = ([grid, 1, 1], 128, shared_bytes(case.format, 128, program.factors()));
    session.launch(&format!("matmul_{}", case.format.name()), size, order, &arguments);
    Ok(session.run(program)?.floats(out))
}

fn check_case(program: &Program, order: Order, case: &Case, random: &mut Random) -> Result<(), String> {
    const TOKENS: usize = 150;
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
    let x = random.narrow(TOKENS * case.columns, 3.0);
    let cpu = Cpu::start_on(CpuPath::Scalar, 1).expect("a thread starts");
    let mut expected = vec![0.0; TOKENS * width];
    for layer in &layers {
        let mut own = vec![0.0; TOKENS * layer.weight.rows()];
        cpu.matmul(&x, &layer.weight, layer.bias.as_deref(), &mut own);
        for (row, own) in expected.chunks_exact_mut(width).zip(own.chunks_exact(layer.weight.rows())) {
            row[layer.output as usize..layer.output as usize + own.len()].copy_from_slice(own);
        }
    }
    let all = run(program, case, &layers, &x, (2, order))?;
    for (row, (found, expected)) in all.chunks_exact(width).zip(expected.chunks_exact(width)).enumerate() {
        let what = format!("{:?} {:?}x{} row {row}", case.format, case.rows, case.columns);
        compare(&what, found, expected, tolerance(case.format))?;
    }
    for (start, end, grid) in [(0, 1, 1), (1, 65, 3), (65, 150, 1)] {
        let part = run(program, case, &layers, &x[start * case.columns..end * case.columns], (grid, order))?;
        same_bits(
            &format!("{:?} tokens {start}..{end} and all", case.format),
            &part,
            &all[start * width..end * width],
        )?;
    }
    Ok(())
}

fn check(program: &Program, order: Order) -> Result<(), String> {
    let mut random = Random::new(6);
    for format in Format::ALL {
        // A single block; rows that are no multiple of anything; more blocks than stages.
        for (columns, rows) in [(64, [16, 5]), (5 * 64, [140, 17])] {
            check_case(program, order, &Case { format, columns, rows }, &mut random)?;
        }
    }
    Ok(())
}

#[test]
fn products_of_a_prompt_agree_with_the_cpu_and_do_not_depend_on_its_chunks() {
    check_file("matmul", &KERNELS, &[Factors::Bf16, Factors::Half], check, &FAULTS);
}

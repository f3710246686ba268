//! norm.cu: embedding, adding a layer's change, RMSNorm, the gate of a dense layer.

use bulkhead_worker::model::norm::rms_norm;

use crate::emulator::{Arg, Factors, Fault, Order, Program, Session};
use crate::support::{Random, check_file, compare, same_bits};

const FAULTS: [Fault; 7] = [
    Fault { name: "epsilon forgotten", file: "norm.cu", from: "(float)hidden + epsilon", to: "(float)hidden" },
    Fault {
        name: "weights of the first row for all",
        file: "norm.cu",
        from: "part_weights[row * part_count + part]",
        to: "part_weights[part]",
    },
    Fault {
        name: "the change not kept",
        file: "norm.cu",
        from: "if (part_count > 0) *(float4*)(own + at) = value;",
        to: "",
    },
    Fault { name: "the gate not squashed", file: "norm.cu", from: "up.z / (1.0f + expf(-gate.z))", to: "up.z" },
    Fault { name: "gates for ups", file: "norm.cu", from: "(row + inner + at)", to: "(row + at)" },
    Fault {
        name: "no barrier in the sum",
        file: "common.cuh",
        from: "slots[threadIdx.x / WARP] = value;\n    __syncthreads();",
        to: "slots[threadIdx.x / WARP] = value;",
    },
    Fault {
        name: "a warp's sum halved",
        file: "common.cuh",
        from: "distance = WARP / 2; distance > 0; distance /= 2) value +=",
        to: "distance = WARP / 4; distance > 0; distance /= 2) value +=",
    },
];

const EPSILON: f32 = 0.01;

struct Case {
    hidden: usize,
    parts: usize,
    has_weights: bool,
    threads: u32,
    rows: Option<Vec<u32>>,
}

fn check_case(program: &Program, order: Order, case: &Case, random: &mut Random) -> Result<(), String> {
    let (hidden, tokens) = (case.hidden, 5);
    let x = random.floats(tokens * hidden, 0.2);
    let parts = random.floats(tokens * case.parts * hidden, 0.2);
    let weights = random.floats(tokens * case.parts, 1.0);
    let norm_weight = random.floats(hidden, 1.0);
    let mut sums = x.clone();
    for (at, value) in sums.iter_mut().enumerate() {
        let (token, column) = (at / hidden, at % hidden);
        let part = |part: usize| {
            let weight = if case.has_weights { weights[token * case.parts + part] } else { 1.0 };
            weight * parts[(token * case.parts + part) * hidden + column]
        };
        *value += (0..case.parts).map(part).sum::<f32>();
    }
    let order_of_rows: Vec<u32> = case.rows.clone().unwrap_or_else(|| (0..tokens as u32).collect());
    let picked: Vec<f32> =
        order_of_rows.iter().flat_map(|row| &sums[*row as usize * hidden..][..hidden]).copied().collect();
    let mut expected = vec![0.0; picked.len()];
    rms_norm(&picked, &norm_weight, EPSILON, &mut expected);

    let mut session = Session::default();
    let (x, parts) = (session.floats(&x), session.floats(&parts));
    let weights = if case.has_weights { Arg::At(session.floats(&weights)) } else { Arg::Null };
    let rows = case.rows.as_ref().map_or(Arg::Null, |rows| Arg::At(session.words(rows)));
    let norm_weight = session.floats(&norm_weight);
    let (narrow, wide) = (session.output(picked.len() * 2), session.output(picked.len() * 4));
    let arguments = [
        Arg::At(x),
        Arg::At(parts),
        Arg::Word(case.parts as u32),
        weights,
        rows,
        Arg::At(norm_weight),
        Arg::Float(EPSILON),
        Arg::Word(hidden as u32),
        Arg::At(narrow),
        Arg::At(wide),
    ];
    let count = order_of_rows.len() as u32;
    session.launch("add_norm", ([count, 1, 1], case.threads, 0), order, &arguments);
    let results = session.run(program)?;
    let kept = results.floats(x);
    for row in order_of_rows.iter().map(|row| *row as usize * hidden) {
        compare("the sum in x", &kept[row..row + hidden], &sums[row..row + hidden], 1e-6)?;
    }
    compare("the norm in f32", &results.floats(wide), &expected, 1e-6)?;
    compare("the norm in bf16", &results.widened(narrow), &expected, 2e-3)
}

fn check(program: &Program, order: Order) -> Result<(), String> {
    let mut random = Random::new(3);
    for case in [
        Case { hidden: 64, parts: 0, has_weights: false, threads: 64, rows: None },
        Case { hidden: 2880, parts: 1, has_weights: false, threads: 736, rows: None },
        Case { hidden: 320, parts: 4, has_weights: true, threads: 32, rows: None },
        Case { hidden: 320, parts: 6, has_weights: true, threads: 256, rows: None },
        Case { hidden: 320, parts: 4, has_weights: true, threads: 256, rows: Some(vec![3, 1]) },
    ] {
        check_case(program, order, &case, &mut random)?;
    }
    let table = random.narrow(7 * 96, 1.0);
    let mut session = Session::default();
    let (rows, tokens) = (session.narrow(&table), session.words(&[6, 0, 7, 2]));
    let x = session.output(4 * 96 * 4);
    let arguments = [Arg::At(rows), Arg::At(tokens), Arg::Word(7), Arg::Word(96), Arg::At(x)];
    session.launch("embed", ([4, 1, 1], 64, 0), order, &arguments);
    let found = session.run(program)?.floats(x);
    for (row, token) in [(0, 6), (1, 0), (3, 2)] {
        same_bits("the embedding", &found[row * 96..(row + 1) * 96], &table[token * 96..(token + 1) * 96])?;
    }
    // A token outside the vocabulary must not pass for a number.
    if !found[2 * 96..3 * 96].iter().all(|value| value.is_nan()) {
        return Err("token 7 of 7".into());
    }
    [(3, 1100), (1, 64)].into_iter().try_for_each(|(rows, inner)| check_gate(program, order, rows, inner, &mut random))
}

fn check_gate(program: &Program, order: Order, rows: usize, inner: usize, random: &mut Random) -> Result<(), String> {
    let mut pairs = random.floats(rows * 2 * inner, 3.0);
    // Neither side of the sigmoid may overflow.
    (pairs[0], pairs[1]) = (-200.0, 200.0);
    let gated = |row: &[f32]| {
        let (gates, ups) = row.split_at(inner);
        gates.iter().zip(ups).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect::<Vec<_>>()
    };
    let expected: Vec<f32> = pairs.chunks_exact(2 * inner).flat_map(gated).collect();
    let mut session = Session::default();
    let (pairs, out) = (session.floats(&pairs), session.output(rows * inner * 2));
    let grid = [(inner as u32).div_ceil(1024), rows as u32, 1];
    session.launch("silu_gate", (grid, 256, 0), order, &[Arg::At(pairs), Arg::Word(inner as u32), Arg::At(out)]);
    compare("the gate", &session.run(program)?.widened(out), &expected, 2e-3)
}

#[test]
fn norms_agree_with_the_cpu() {
    check_file("norm", &["embed", "add_norm", "silu_gate"], &[Factors::Bf16], check, &FAULTS);
}

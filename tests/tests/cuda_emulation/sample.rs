//! sample.cu: the choice of a token without filters or penalties.

use bulkhead_shared::generate::Sampling;
use bulkhead_worker::engine::sampler::{History, Sampler, Scratch};
use bulkhead_worker::text::generation_config::Defaults;

use crate::emulator::{Arg, Factors, Fault, Order, Program, Session};
use crate::support::{Random, check_file};

const KERNELS: [&str; 2] = ["choose_scan", "choose_pick"];
const CHUNK: usize = 1024;
const PARTIAL_BYTES: usize = 24;

const FAULTS: [Fault; 9] = [
    Fault {
        name: "the higher id among equals",
        file: "sample.cu",
        from: "token < than_token",
        to: "token > than_token",
    },
    Fault { name: "the position not mixed in", file: "sample.cu", from: "((position + 1) * gamma)", to: "gamma" },
    Fault {
        name: "what threads before have not taken off",
        file: "sample.cu",
        from: "double left = draw - running.before;\n    u32 chunk",
        to: "double left = draw;\n    u32 chunk",
    },
    Fault {
        name: "the warps before left out",
        file: "sample.cu",
        from: "return Running{base + before, total};",
        to: "return Running{before, total};",
    },
    Fault {
        name: "the last thread taken where a draw falls",
        file: "sample.cu",
        from: "return first != NONE ? first : last;",
        to: "return last;",
    },
    Fault {
        name: "no barrier before the winner is read",
        file: "sample.cu",
        from: "    }\n    __syncthreads();\n    for (u32 warp = 0; warp < SAMPLE_WARPS; warp++) {\n        keep_better",
        to: "    }\n    for (u32 warp = 0; warp < SAMPLE_WARPS; warp++) {\n        keep_better",
    },
    Fault {
        name: "no barrier before the chunk is read",
        file: "sample.cu",
        from: "largest, inverse);\n    }\n    __syncthreads();",
        to: "largest, inverse);\n    }",
    },
    Fault {
        name: "broken logits overlooked",
        file: "sample.cu",
        from: "if (!is_finite(values[i])) broken",
        to: "if (false) broken",
    },
    Fault {
        name: "chunks added without their scale",
        file: "sample.cu",
        from: "return partials[i].sum * power(partials[i].largest, largest, inverse); };",
        to: "return partials[i].sum; };",
    },
];

/// One row: its logits and how to choose.
struct Row {
    logits: Vec<f32>,
    temperature: f32,
    seed: u64,
    position: u64,
}

/// Gives token and first broken token of each row.
fn run(program: &Program, rows: &[Row], order: Order) -> Result<Vec<(u32, u32)>, String> {
    let vocabulary = rows[0].logits.len();
    let chunks = vocabulary.div_ceil(CHUNK);
    let mut session = Session::default();
    let all: Vec<f32> = rows.iter().flat_map(|row| &row.logits).copied().collect();
    let logits = session.floats(&all);
    let temperatures = session.floats(&rows.iter().map(|row| row.temperature).collect::<Vec<f32>>());
    let seeds = session.bytes(rows.iter().flat_map(|row| row.seed.to_le_bytes()).collect());
    let positions = session.bytes(rows.iter().flat_map(|row| row.position.to_le_bytes()).collect());
    let partials = session.output(rows.len() * chunks * PARTIAL_BYTES);
    let chosen = session.output(rows.len() * 8);
    let count = rows.len() as u32;
    let vocabulary = Arg::Word(vocabulary as u32);
    let arguments = [Arg::At(logits), vocabulary, Arg::At(temperatures), Arg::At(partials)];
    session.launch("choose_scan", ([chunks as u32, count, 1], 256, 0), order, &arguments);
    let mut arguments = vec![Arg::At(logits), vocabulary];
    arguments.extend([temperatures, seeds, positions, partials].map(Arg::At));
    arguments.extend([Arg::Word(chunks as u32), Arg::At(chosen)]);
    session.launch("choose_pick", ([count, 1, 1], 256, 0), order, &arguments);
    let words = session.run(program)?.words(chosen);
    Ok(words.as_chunks::<2>().0.iter().map(|[token, broken]| (*token, *broken)).collect())
}

fn check(program: &Program, order: Order) -> Result<(), String> {
    let mut random = Random::new(4);
    let mut rows: Vec<Row> = (0..24)
        .map(|index| Row {
            logits: random.floats(3 * CHUNK + 77, 3.0),
            temperature: [0.0, 0.3, 1.0, 2.0][index % 4],
            seed: u64::from(random.word()) << 20,
            position: u64::from(random.below(100_000)),
        })
        .collect();
    // Equals in different threads and chunks; one token that has nearly all; an answer in the last chunk.
    (rows[0].logits[100], rows[0].logits[2500], rows[0].logits[101]) = (40.0, 40.0, 40.0);
    rows[1].logits[3000] = 80.0;
    rows[4].logits[3 * CHUNK + 76] = 50.0;
    for row in &mut rows[8..24] {
        row.logits.iter_mut().take(CHUNK).for_each(|logit| *logit -= 2.0);
    }
    for (index, (found, row)) in run(program, &rows, order)?.into_iter().zip(&rows).enumerate() {
        let sampling = Sampling { temperature: Some(row.temperature), seed: row.seed, ..Sampling::default() };
        let sampler = Sampler::new(&sampling, &Defaults::default());
        let mut logits = row.logits.clone();
        let expected = sampler
            .sample(&mut logits, &History::default(), row.position, &mut Scratch::default())
            .expect("the logits are finite");
        if found != (expected.token, u32::MAX) {
            return Err(format!("row {index}: {found:?} instead of {}", expected.token));
        }
    }
    rows.truncate(2);
    rows[0].logits[2047] = f32::NAN;
    rows[1].logits[3] = f32::INFINITY;
    rows[1].logits[1500] = f32::NEG_INFINITY;
    let broken: Vec<u32> = run(program, &rows, order)?.into_iter().map(|(_, broken)| broken).collect();
    if broken == [2047, 3] { Ok(()) } else { Err(format!("broken logits: {broken:?}")) }
}

#[test]
fn choices_are_the_samplers() {
    check_file("sample", &KERNELS, &[Factors::Bf16], check, &FAULTS);
}

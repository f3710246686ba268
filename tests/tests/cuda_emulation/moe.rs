//! moe.cu: router, choice and grouping, and the chosen experts' two products, against the whole mixture of the CPU.

use bulkhead_worker::model::moe::{Activation, Mixture};
use bulkhead_worker::model::weights::{ExpertWeights, Linear};
use bulkhead_worker::quant::cpu::Cpu;
use bulkhead_worker::quant::{Dense, Matrix};

use crate::emulator::{Arg, Buffer, Factors, Fault, Order, Program, Session, Size};
use crate::matvec::shared_bytes;
use crate::support::{Format, Layer, Random, check_file, compare, descriptors, same_bits, scale_values};

const KERNELS: [&str; 18] = [
    "moe_router",
    "moe_route",
    "moe_gate_up_nf4_8",
    "moe_gate_up_nf4_16",
    "moe_gate_up_nf4_nested_8",
    "moe_gate_up_nf4_nested_16",
    "moe_gate_up_mxfp4_8",
    "moe_gate_up_mxfp4_16",
    "moe_gate_up_bf16_8",
    "moe_gate_up_bf16_16",
    "moe_down_nf4_8",
    "moe_down_nf4_16",
    "moe_down_nf4_nested_8",
    "moe_down_nf4_nested_16",
    "moe_down_mxfp4_8",
    "moe_down_mxfp4_16",
    "moe_down_bf16_8",
    "moe_down_bf16_16",
];

const FAULTS: [Fault; 9] = [
    Fault { name: "the up projection's one forgotten", file: "moe.cu", from: "(up + 1.0f)", to: "up" },
    Fault { name: "the gate not clamped", file: "moe.cu", from: "gate > limit ? limit : gate", to: "gate" },
    Fault { name: "gate and up exchanged", file: "moe.cu", from: "row % 2 != 0 ||", to: "row % 2 == 0 ||" },
    Fault { name: "weights not normalised", file: "choice.cuh", from: "own_power / sum", to: "own_power" },
    Fault { name: "the lower expert last among equals", file: "choice.cuh", from: "(u32)~index", to: "(u32)index" },
    Fault {
        name: "slots of a group overwritten",
        file: "moe.cu",
        from: "done += __popc(found);",
        to: "done += __popc(found) / 2;",
    },
    Fault {
        name: "no barrier between counting and listing",
        file: "moe.cu",
        from: "        if (lane == 0) counts[expert] = count;\n    }\n    __syncthreads();",
        to: "        if (lane == 0) counts[expert] = count;\n    }",
    },
    Fault {
        name: "the slot's token taken from the slot",
        file: "moe.cu",
        from: "/ slots_per_row)",
        to: "% slots_per_row)",
    },
    Fault {
        name: "an old expert's activations kept",
        file: "matvec.cuh",
        from: "staged_group != item.group)",
        to: "staged_group == ~0u)",
    },
];

pub(crate) const HIDDEN: usize = 128;
pub(crate) const INNER: usize = 64;
pub(crate) const EXPERTS: usize = 37;
pub(crate) const USED: usize = 3;
pub(crate) const ACTIVATION: Activation = Activation { alpha: 1.702, limit: 2.0 };

pub(crate) struct Model {
    pub(crate) format: Format,
    pub(crate) router: Linear,
    pub(crate) experts: Vec<ExpertWeights>,
}

pub(crate) fn model(format: Format, random: &mut Random) -> Model {
    let mut linear =
        |rows, cols| Linear { weight: format.random(random, rows, cols), bias: Some(random.floats(rows, 0.3)) };
    let experts =
        (0..EXPERTS).map(|_| ExpertWeights { gate_up: linear(2 * INNER, HIDDEN), down: linear(HIDDEN, INNER) });
    let experts = experts.collect();
    // Two experts that are judged alike: the lower one comes first.
    let mut rows = random.narrow(EXPERTS * HIDDEN, 0.1);
    rows.copy_within(4 * HIDDEN..5 * HIDDEN, 9 * HIDDEN);
    let mut bias = random.floats(EXPERTS, 0.1);
    (bias[4], bias[9]) = (4.0, 4.0);
    let weight = Matrix::Dense(Dense::from_f32(EXPERTS, HIDDEN, &rows).expect("the lengths fit"));
    Model { format, router: Linear { weight, bias: Some(bias) }, experts }
}

/// The buffers that a launch of experts reads.
pub(crate) struct Groups {
    pub(crate) count: Buffer,
    pub(crate) experts: Buffer,
    pub(crate) firsts: Buffer,
    pub(crate) slots: Buffer,
}

impl Groups {
    pub(crate) fn arguments(&self, matrices: Buffer) -> Vec<Arg> {
        [matrices, self.count, self.experts, self.firsts, self.slots].map(Arg::At).to_vec()
    }
}

pub(crate) fn list(session: &mut Session, experts: &[ExpertWeights], which: impl Fn(&ExpertWeights) -> &Linear) -> Buffer {
    let layer = |linear: &Linear| Layer { weight: linear.weight.clone(), bias: linear.bias.clone(), output: 0 };
    let layers: Vec<Layer> = experts.iter().map(|expert| layer(which(expert))).collect();
    descriptors(session, &layers)
}

/// Runs the four kernels and adds up the slots by weight, as add_norm does.
fn run(program: &Program, model: &Model, x: &[f32], grid: u32, order: Order) -> Result<Vec<f32>, String> {
    let (tokens, tiles) = (x.len() / HIDDEN, if x.len() / HIDDEN <= 8 { 1 } else { 2 });
    let slots = tokens * USED;
    let mut session = Session::default();
    let wide = session.floats(x);
    let narrow = session.narrow(x);
    let router = session.narrow(&model.router.weight.decode_rows(0..EXPERTS));
    let bias = session.floats(model.router.bias.as_deref().expect("it was given one"));
    let logits = session.output(tokens * EXPERTS * 4);
    let (chosen, weights) = (session.output(slots * 4), session.output(slots * 4));
    let groups = Groups {
        count: session.output(4),
        experts: session.output(EXPERTS * 4),
        firsts: session.output((EXPERTS + 1) * 4),
        slots: session.output(slots * 4),
    };
    let gate_up = list(&mut session, &model.experts, |expert| &expert.gate_up);
    let down = list(&mut session, &model.experts, |expert| &expert.down);
    let map = scale_values(&mut session);
    let (inner, out) = (session.output(slots * INNER * 2), session.output(slots * HIDDEN * 4));
    let word = |value: usize| Arg::Word(value as u32);

    let router_size: Size = ([EXPERTS as u32, tokens as u32, 1], 128, 0);
    let arguments = [Arg::At(router), Arg::At(bias), Arg::At(wide), word(HIDDEN), Arg::At(logits)];
    session.launch("moe_router", router_size, order, &arguments);
    let mut arguments = vec![Arg::At(logits), word(tokens), word(EXPERTS), word(USED)];
    let outputs = [chosen, weights, groups.count, groups.experts, groups.firsts, groups.slots];
    arguments.extend(outputs.map(Arg::At));
    session.launch("moe_route", ([1, 1, 1], 256, 0), order, &arguments);
    let is_staged = tokens < 5;
    let name = |part| format!("moe_{part}_{}_{}", model.format.name(), tiles * 8);
    let staged = if is_staged { tokens as u32 } else { 0 };
    let size = |columns| ([grid, 1, 1], 256, shared_bytes(model.format, tiles, staged, columns as u32));
    let mut arguments = groups.arguments(gate_up);
    arguments.extend([Arg::At(narrow), word(USED), word(HIDDEN), word(2 * INNER)]);
    arguments.extend([Arg::Float(ACTIVATION.alpha), Arg::Float(ACTIVATION.limit), Arg::At(inner), Arg::At(map)]);
    arguments.push(Arg::Word(u32::from(is_staged)));
    session.launch(&name("gate_up"), size(HIDDEN), order, &arguments);
    let mut arguments = groups.arguments(down);
    arguments.extend([Arg::At(inner), word(INNER), word(HIDDEN), Arg::At(out), Arg::At(map)]);
    arguments.push(Arg::Word(u32::from(is_staged)));
    session.launch(&name("down"), size(INNER), order, &arguments);

    let results = session.run(program)?;
    let (weights, parts) = (results.floats(weights), results.floats(out));
    let mut sums = vec![0.0; x.len()];
    for (slot, (weight, part)) in weights.iter().zip(parts.chunks_exact(HIDDEN)).enumerate() {
        let token = slot / USED;
        let own = &mut sums[token * HIDDEN..(token + 1) * HIDDEN];
        own.iter_mut().zip(part).for_each(|(sum, value)| *sum += weight * value);
    }
    Ok(sums)
}

fn check(program: &Program, order: Order) -> Result<(), String> {
    let mut random = Random::new(2);
    let cpu = Cpu::start(1).expect("a thread starts");
    for format in Format::ALL {
        let model = model(format, &mut random);
        let x = random.narrow(14 * HIDDEN, 2.0);
        let mixture =
            Mixture { cpu: &cpu, router: &model.router, experts: &model.experts, used: USED, activation: ACTIVATION };
        let mut expected = vec![0.0; x.len()];
        mixture.run(&x, &mut expected);
        let all = run(program, &model, &x, 5, order)?;
        for (token, (found, expected)) in all.chunks_exact(HIDDEN).zip(expected.chunks_exact(HIDDEN)).enumerate() {
            // What lies between the products is rounded to bf16 once more, to 2^-9 of each value.
            compare(&format!("{format:?} token {token}"), found, expected, format.tolerance() + 3e-3)?;
        }
        for (tokens, grid) in [(1, 3), (4, 40), (8, 2)] {
            let part = run(program, &model, &x[..tokens * HIDDEN], grid, order)?;
            same_bits(&format!("{format:?} tokens {tokens} and 14"), &part, &all[..part.len()])?;
        }
    }
    Ok(())
}

#[test]
fn the_mixture_agrees_with_the_cpu_and_does_not_depend_on_the_batch() {
    check_file("moe", &KERNELS, &[Factors::Bf16, Factors::Half], check, &FAULTS);
}

//! moe.cu: the chosen experts' two products, against the whole mixture of the CPU.

use bulkhead_worker::model::moe::{Activation, Mixture};
use bulkhead_worker::model::rooms::Rooms;
use bulkhead_worker::model::weights::{ExpertWeights, Linear};
use bulkhead_worker::quant::cpu::{Cpu, CpuPath};
use bulkhead_worker::quant::{Dense, Matrix};

use crate::emulator::{Arg, Buffer, Factors, Fault, Order, Program, Session, Size};
use crate::matvec::shared_bytes;
use crate::support::{Format, Layer, Random, check_file, compare, descriptors, same_bits, scale_values};

const KERNELS: [&str; 16] = [
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

const FAULTS: [Fault; 10] = [
    Fault { name: "the up projection's one forgotten", file: "moe.cu", from: "(up + 1.0f)", to: "up" },
    Fault { name: "the gate not clamped", file: "moe.cu", from: "gate > limit ? limit : gate", to: "gate" },
    Fault { name: "gate and up exchanged", file: "moe.cu", from: "row % 2 != 0 ||", to: "row % 2 == 0 ||" },
    Fault {
        name: "the slot's token taken from the slot",
        file: "moe.cu",
        from: "/ slots_per_row;",
        to: "% slots_per_row;",
    },
    Fault {
        name: "no barrier after the lists are brought",
        file: "moe.cu",
        from: "lists->groups = read_through(group_count);\n        __syncthreads();",
        to: "lists->groups = read_through(group_count);",
    },
    Fault {
        name: "a warp's rows the other warps'",
        file: "pipe.cuh",
        from: "first = item.row + threadIdx.x / WARP / WAYS * TILE_ROWS + lane / 4,",
        to: "first = item.row + lane / 4,",
    },
    Fault {
        name: "the biases of the first rows for all",
        file: "matvec.cuh",
        from: "value[i] = job.bias(item, row(i));",
        to: "value[i] = job.bias(item, row(i) % TILE_ROWS);",
    },
    Fault {
        name: "the last expert's cost forgotten",
        file: "moe.cu",
        from: "total += cost<TILES>(group, room);",
        to: "total += group + 1 < groups ? cost<TILES>(group, room) : 0;",
    },
    Fault {
        name: "an old expert's activations kept",
        file: "matvec.cuh",
        from: "if (group == item.group) return true;",
        to: "if (group != ~0u) return true;",
    },
    Fault {
        name: "another single activation taken for the one that is there",
        file: "matvec.cuh",
        from: "if (count == 1 && alone == first) return true;",
        to: "if (count == 1 && alone != ~0u) return true;",
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
    /// The arguments with which the kernels for prompts begin.
    pub(crate) fn arguments(&self, matrices: Buffer) -> Vec<Arg> {
        [matrices, self.count, self.experts, self.firsts, self.slots].map(Arg::At).to_vec()
    }
}

pub(crate) fn list(
    session: &mut Session,
    experts: &[ExpertWeights],
    which: impl Fn(&ExpertWeights) -> &Linear,
) -> Buffer {
    let layer = |linear: &Linear| Layer { weight: linear.weight.clone(), bias: linear.bias.clone(), output: 0 };
    let layers: Vec<Layer> = experts.iter().map(|expert| layer(which(expert))).collect();
    descriptors(session, &layers)
}

/// Judges the experts as the CPU does: of each token, the chosen ones and their weights.
fn choose(model: &Model, x: &[f32]) -> Vec<Vec<(u32, f32)>> {
    let bias = model.router.bias.as_deref().expect("it was given one");
    let rows = model.router.weight.decode_rows(0..EXPERTS);
    let judge = |token: &[f32]| {
        let logit = |expert: usize| -> f32 {
            let row = &rows[expert * HIDDEN..(expert + 1) * HIDDEN];
            row.iter().zip(token).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32 + bias[expert]
        };
        let mut judged: Vec<(u32, f32)> = (0..EXPERTS).map(|expert| (expert as u32, logit(expert))).collect();
        judged.sort_by(|a, b| b.1.total_cmp(&a.1));
        judged.truncate(USED);
        let largest = judged[0].1;
        let total: f32 = judged.iter().map(|(_, logit)| (logit - largest).exp()).sum();
        judged.iter().map(|(expert, logit)| (*expert, (logit - largest).exp() / total)).collect()
    };
    x.chunks_exact(HIDDEN).map(judge).collect()
}

fn groups(session: &mut Session, chosen: &[Vec<(u32, f32)>]) -> Groups {
    let (mut experts, mut firsts, mut slots) = (Vec::new(), vec![0], Vec::new());
    let all: Vec<u32> = chosen.iter().flatten().map(|(expert, _)| *expert).collect();
    for expert in 0..EXPERTS as u32 {
        let own = (0u32..).zip(&all).filter(|(_, chosen)| **chosen == expert).map(|(slot, _)| slot);
        slots.extend(own);
        if slots.len() as u32 > firsts[experts.len()] {
            experts.push(expert);
            firsts.push(slots.len() as u32);
        }
    }
    let count = experts.len() as u32;
    // What stands behind the last group means nothing.
    experts.resize(EXPERTS, u32::MAX);
    firsts.resize(EXPERTS + 1, u32::MAX);
    Groups {
        count: session.words(&[count]),
        experts: session.words(&experts),
        firsts: session.words(&firsts),
        slots: session.words(&slots),
    }
}

/// How a run is launched.
#[derive(Clone, Copy, Debug)]
struct Way {
    tiles: u32,
    grid: u32,
    stage_columns: u32,
    order: Order,
}

/// Runs both products and adds up the slots by weight, as add_norm does.
fn run(program: &Program, model: &Model, x: &[f32], way: Way) -> Result<Vec<f32>, String> {
    let tokens = x.len() / HIDDEN;
    let slots = tokens * USED;
    let mut session = Session::default();
    let narrow = session.narrow(x);
    let chosen = choose(model, x);
    let groups = groups(&mut session, &chosen);
    let gate_up = list(&mut session, &model.experts, |expert| &expert.gate_up);
    let down = list(&mut session, &model.experts, |expert| &expert.down);
    let map = scale_values(&mut session);
    let (inner, out) = (session.output(slots * INNER * 2), session.output(slots * HIDDEN * 4));
    let word = |value: usize| Arg::Word(value as u32);
    let name = |part| format!("moe_{part}_{}_{}", model.format.name(), way.tiles * 8);
    let size = |columns| -> Size {
        ([way.grid, 1, 1], 256, shared_bytes(model.format, way.tiles, way.stage_columns, columns as u32))
    };
    let arguments = |matrices: Buffer| {
        let mut arguments = vec![Arg::At(matrices), word(EXPERTS)];
        arguments.extend(groups.arguments(matrices).drain(1..));
        arguments
    };
    let mut gate_up = arguments(gate_up);
    gate_up.extend([Arg::At(narrow), word(USED), word(HIDDEN), word(2 * INNER)]);
    gate_up.extend([Arg::Float(ACTIVATION.alpha), Arg::Float(ACTIVATION.limit), Arg::At(inner), Arg::At(map)]);
    gate_up.push(Arg::Word(way.stage_columns));
    session.launch(&name("gate_up"), size(HIDDEN), way.order, &gate_up);
    let mut down = arguments(down);
    down.extend([Arg::At(inner), word(INNER), word(HIDDEN), Arg::At(out), Arg::At(map)]);
    down.push(Arg::Word(way.stage_columns));
    session.launch(&name("down"), size(INNER), way.order, &down);

    let parts = session.run(program)?.floats(out);
    let mut sums = vec![0.0; x.len()];
    for ((_, weight), (slot, part)) in chosen.iter().flatten().zip(parts.chunks_exact(HIDDEN).enumerate()) {
        let token = slot / USED;
        let own = &mut sums[token * HIDDEN..(token + 1) * HIDDEN];
        own.iter_mut().zip(part).for_each(|(sum, value)| *sum += weight * value);
    }
    Ok(sums)
}

fn check(program: &Program, order: Order) -> Result<(), String> {
    let mut random = Random::new(2);
    let (cpu, rooms) = (Cpu::start_on(CpuPath::Scalar, 1).expect("a thread starts"), Rooms::default());
    for format in Format::ALL {
        let model = model(format, &mut random);
        let x = random.narrow(14 * HIDDEN, 2.0);
        let mixture = Mixture {
            cpu: &cpu,
            rooms: &rooms,
            router: &model.router,
            experts: &model.experts,
            used: USED,
            activation: ACTIVATION,
        };
        let mut expected = vec![0.0; x.len()];
        mixture.run(&x, &mut expected);
        let all = run(program, &model, &x, Way { tiles: 2, grid: 5, stage_columns: 0, order })?;
        for (token, (found, expected)) in all.chunks_exact(HIDDEN).zip(expected.chunks_exact(HIDDEN)).enumerate() {
            // What lies between the products is rounded to bf16 once more, to 2^-9 of each value.
            compare(&format!("{format:?} token {token}"), found, expected, format.tolerance() + 3e-3)?;
        }
        // A batch of more tokens than a kernel's tiles hold: one expert serves most of them.
        let prompt: Vec<f32> = x.iter().cycle().take(41 * HIDDEN).copied().collect();
        let batch = run(program, &model, &prompt, Way { tiles: 1, grid: 3, stage_columns: 7, order })?;
        for (token, found) in batch.chunks_exact(HIDDEN).enumerate() {
            same_bits(&format!("{format:?} token {token} of 41"), found, &all[token % 14 * HIDDEN..][..HIDDEN])?;
        }
        for (tokens, grid, stage_columns) in [(1, 3, 1), (4, 40, 4), (8, 2, 1), (8, 1, 8)] {
            let way = Way { tiles: 1, grid, stage_columns, order };
            let part = run(program, &model, &x[..tokens * HIDDEN], way)?;
            same_bits(&format!("{format:?} tokens {tokens} and 14"), &part, &all[..part.len()])?;
        }
    }
    Ok(())
}

#[test]
fn the_mixture_agrees_with_the_cpu_and_does_not_depend_on_the_batch() {
    check_file("moe", &KERNELS, &[Factors::Bf16, Factors::Half], check, &FAULTS);
}

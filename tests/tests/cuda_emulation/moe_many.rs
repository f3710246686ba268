//! moe_many.cu: router, choice and grouping of a prompt's tokens, and the chosen experts' two products.

use bulkhead_worker::model::moe::Mixture;
use bulkhead_worker::model::rooms::Rooms;
use bulkhead_worker::quant::cpu::{Cpu, CpuPath};

use crate::emulator::{Arg, Factors, Fault, Order, Program, Session};
use crate::matmul::{shared_bytes, tolerance};
use crate::moe::{ACTIVATION, EXPERTS, Groups, HIDDEN, INNER, Model, USED, list, model};
use crate::support::{Format, Random, check_file, compare, same_bits, scale_values};

const KERNELS: [&str; 19] = [
    "moe_router_many",
    "moe_choose_many",
    "moe_group_many",
    "moe_gate_up_nf4_many",
    "moe_gate_up_nf4_few",
    "moe_gate_up_nf4_nested_many",
    "moe_gate_up_nf4_nested_few",
    "moe_gate_up_mxfp4_many",
    "moe_gate_up_mxfp4_few",
    "moe_gate_up_bf16_many",
    "moe_gate_up_bf16_few",
    "moe_down_nf4_many",
    "moe_down_nf4_few",
    "moe_down_nf4_nested_many",
    "moe_down_nf4_nested_few",
    "moe_down_mxfp4_many",
    "moe_down_mxfp4_few",
    "moe_down_bf16_many",
    "moe_down_bf16_few",
];

const FAULTS: [Fault; 12] = [
    Fault {
        name: "the router's next columns the same",
        file: "moe_many.cu",
        from: "(from_x + start + ROUTER_COLUMNS)",
        to: "(from_x + start)",
    },
    Fault { name: "the up projection's one forgotten", file: "prompt_jobs.cuh", from: "(up + 1.0f)", to: "up" },
    Fault { name: "the gate not clamped", file: "prompt_jobs.cuh", from: "gate > limit ? limit : gate", to: "gate" },
    Fault {
        name: "gate and up exchanged",
        file: "moe_many.cu",
        from: "gated(sums[i] + four.x, sums[i + 1] + four.y,",
        to: "gated(sums[i + 1] + four.y, sums[i] + four.x,",
    },
    Fault {
        name: "rows handed to their neighbours",
        file: "matmul.cuh",
        from: "member * (WARP_ROWS / 4) + tile * 2 + second",
        to: "tile * 8 + member * 2 + second",
    },
    Fault {
        name: "the slot's token taken from the slot",
        file: "prompt_jobs.cuh",
        from: "/ slots_per_row;",
        to: "% slots_per_row;",
    },
    Fault {
        name: "slots of the warps before forgotten",
        file: "moe_many.cu",
        from: "places[i][expert] = sum;",
        to: "places[i][expert] = 0;",
    },
    Fault {
        name: "a slot's rank among its equals forgotten",
        file: "moe_many.cu",
        from: "group_slots[place + rank] = slot",
        to: "group_slots[place] = slot",
    },
    Fault {
        name: "no barrier between counting and listing",
        file: "moe_many.cu",
        from: "        counts[expert] = sum;\n    }\n    __syncthreads();",
        to: "        counts[expert] = sum;\n    }",
    },
    Fault {
        name: "a group's later pieces forgotten",
        file: "prompt_jobs.cuh",
        from: "(own - piece_firsts[group]) * TOKENS",
        to: "0 * TOKENS",
    },
    Fault {
        name: "no barrier before the router's next columns",
        file: "moe_many.cu",
        from: "        __syncthreads();\n        *(float4*)(own_x",
        to: "        *(float4*)(own_x",
    },
    Fault {
        name: "the last expert's groups forgotten",
        file: "moe_many.cu",
        from: "groups = group + (own > 0);",
        to: "groups = group;",
    },
];

/// How a prompt is run: tokens of the tiles, and blocks. Neither may change a bit.
#[derive(Clone, Copy)]
struct Way {
    tile: &'static str,
    grid: u32,
    order: Order,
}

/// Runs the five kernels and adds up the slots by weight, as add_norm does.
fn run(program: &Program, model: &Model, x: &[f32], way: Way) -> Result<Vec<f32>, String> {
    let Way { tile, grid, order } = way;
    let tokens = x.len() / HIDDEN;
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

    let router_grid = [tokens.div_ceil(32) as u32, EXPERTS.div_ceil(32) as u32, 1];
    let arguments =
        [Arg::At(router), Arg::At(bias), Arg::At(wide), word(tokens), word(EXPERTS), word(HIDDEN), Arg::At(logits)];
    session.launch("moe_router_many", (router_grid, 256, 0), order, &arguments);
    let arguments = [Arg::At(logits), word(tokens), word(EXPERTS), word(USED), Arg::At(chosen), Arg::At(weights)];
    session.launch("moe_choose_many", ([tokens.div_ceil(8) as u32, 1, 1], 256, 0), order, &arguments);
    let mut arguments = vec![Arg::At(chosen), word(tokens), word(EXPERTS), word(USED)];
    arguments.extend([groups.count, groups.experts, groups.firsts, groups.slots].map(Arg::At));
    session.launch("moe_group_many", ([1, 1, 1], 1024, 0), order, &arguments);
    let name = |part| format!("moe_{part}_{}_{tile}", model.format.name());
    let tile_tokens = if tile == "many" { 128 } else { 32 };
    let size = ([grid, 1, 1], 128, shared_bytes(model.format, tile_tokens, program.factors()));
    let mut arguments = groups.arguments(gate_up);
    arguments.extend([Arg::At(narrow), word(USED), word(HIDDEN), word(2 * INNER)]);
    arguments.extend([Arg::Float(ACTIVATION.alpha), Arg::Float(ACTIVATION.limit), Arg::At(inner), Arg::At(map)]);
    session.launch(&name("gate_up"), size, order, &arguments);
    let mut arguments = groups.arguments(down);
    arguments.extend([Arg::At(inner), word(INNER), word(HIDDEN), Arg::At(out), Arg::At(map)]);
    session.launch(&name("down"), size, order, &arguments);

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
    // Experts 4 and 9 serve every token: their groups have more than one piece, even of the larger tiles.
    const TOKENS: usize = 140;
    let mut random = Random::new(7);
    let (cpu, rooms) = (Cpu::start_on(CpuPath::Scalar, 1).expect("a thread starts"), Rooms::default());
    for format in Format::ALL {
        let model = model(format, &mut random);
        let x = random.narrow(TOKENS * HIDDEN, 2.0);
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
        let all = run(program, &model, &x, Way { tile: "many", grid: 5, order })?;
        for (token, (found, expected)) in all.chunks_exact(HIDDEN).zip(expected.chunks_exact(HIDDEN)).enumerate() {
            // What lies between the products is rounded to bf16 once more, to 2^-9 of each value.
            compare(&format!("{format:?} token {token}"), found, expected, tolerance(format) + 3e-3)?;
        }
        for (start, end, tile, grid) in [(0, TOKENS, "few", 3), (0, 33, "few", 7), (33, TOKENS, "many", 1)] {
            let part = run(program, &model, &x[start * HIDDEN..end * HIDDEN], Way { tile, grid, order })?;
            let what = format!("{format:?} tokens {start}..{end} in tiles for {tile}, and all");
            same_bits(&what, &part, &all[start * HIDDEN..end * HIDDEN])?;
        }
    }
    Ok(())
}

#[test]
fn the_mixture_of_a_prompt_agrees_with_the_cpu_and_does_not_depend_on_its_chunks() {
    check_file("moe_many", &KERNELS, &[Factors::Bf16, Factors::Half], check, &FAULTS);
}

//! route.cu: attention's result added, the norm, the router, the choice of experts and their groups.

use bulkhead_worker::model::norm::rms_norm;

use crate::emulator::{Arg, Buffer, Factors, Fault, Order, Program, Results, Session};
use crate::support::{Random, check_file, compare, same_bits};

const FAULTS: [Fault; 11] = [
    Fault {
        name: "epsilon forgotten",
        file: "route.cu",
        from: "(float)route.hidden + route.epsilon",
        to: "(float)route.hidden",
    },
    Fault { name: "the change left out", file: "route.cu", from: "own[round][i] += change[i];", to: "" },
    Fault {
        name: "the router's bias left out",
        file: "route.cu",
        from: "fmaf(sums[1 + i], scale, route.router_bias[expert])",
        to: "sums[1 + i] * scale",
    },
    Fault {
        name: "the norm's weight left out",
        file: "route.cu",
        from: "own[round][i] *= gains[round][i];",
        to: "own[round][i] *= 1.0f;",
    },
    Fault {
        name: "the sum scaled too",
        file: "route.cu",
        from: "to[0] = float4{own[round][0],",
        to: "to[0] = float4{own[round][0] * gains[round][0],",
    },
    Fault { name: "weights not normalised", file: "route.cu", from: "- largest) / sum", to: "- largest)" },
    Fault {
        name: "the lower expert last among equals",
        file: "route.cu",
        from: "&& other < own)",
        to: "&& other > own)",
    },
    Fault {
        name: "a token's last block but one chooses",
        file: "common.cuh",
        from: "atomicAdd(counter, 1u) + 1 == blocks",
        to: "atomicAdd(counter, 1u) + 2 == blocks",
    },
    Fault { name: "counters not put back", file: "common.cuh", from: "if (*flag) *counter = 0;", to: "" },
    Fault {
        name: "slots of a group overwritten",
        file: "route.cu",
        from: "done += __popc(found);",
        to: "done += __popc(found) / 2;",
    },
    Fault {
        name: "no barrier between counting and listing",
        file: "route.cu",
        from: "        if (lane == 0) shared.counts[expert] = count;\n    }\n    __syncthreads();",
        to: "        if (lane == 0) shared.counts[expert] = count;\n    }",
    },
];

const EPSILON: f32 = 0.01;

struct Case {
    hidden: usize,
    experts: usize,
    used: usize,
    tokens: usize,
}

struct Inputs {
    x: Vec<f32>,
    change: Vec<f32>,
    gain: Vec<f32>,
    router: Vec<f32>,
    bias: Vec<f32>,
}

/// What comes out, by name.
struct Found {
    results: Results,
    sum: Buffer,
    out: Buffer,
    logits: Buffer,
    chosen: Buffer,
    weights: Buffer,
    groups: [Buffer; 4],
    counters: Buffer,
}

fn inputs(case: &Case, random: &mut Random) -> Inputs {
    let mut router = random.narrow(case.experts * case.hidden, 0.1);
    // Two experts that are judged alike, and better than most.
    router.copy_within(4 * case.hidden..5 * case.hidden, 9 * case.hidden);
    let mut bias = random.floats(case.experts, 0.1);
    (bias[4], bias[9]) = (4.0, 4.0);
    Inputs {
        x: random.floats(case.tokens * case.hidden, 0.5),
        change: random.floats(case.tokens * case.hidden, 0.5),
        gain: random.floats(case.hidden, 1.0),
        router,
        bias,
    }
}

/// How a run is launched: a second launch over the same buffers finds the counters as the first one left them.
#[derive(Clone, Copy, Debug)]
struct Way {
    tokens: usize,
    pieces: u32,
    launches: u32,
    order: Order,
}

fn run(program: &Program, case: &Case, inputs: &Inputs, way: Way) -> Result<Found, String> {
    let tokens = way.tokens;
    let mut session = Session::default();
    let len = tokens * case.hidden;
    let (x, change) = (session.floats(&inputs.x[..len]), session.floats(&inputs.change[..len]));
    let (gain, router, bias) =
        (session.floats(&inputs.gain), session.narrow(&inputs.router), session.floats(&inputs.bias));
    let (sum, out) = (session.output(len * 4), session.output(len * 2));
    let (logits, slots) = (session.output(tokens * case.experts * 4), tokens * case.used * 4);
    let (chosen, weights) = (session.output(slots), session.output(slots));
    let groups = [4, case.experts * 4, (case.experts + 1) * 4, slots].map(|bytes| session.output(bytes));
    let counters = session.words(&vec![0; tokens + 1]);
    let word = |value: usize| Arg::Word(value as u32);
    let mut arguments = [x, change, gain].map(Arg::At).to_vec();
    arguments.extend([Arg::Float(EPSILON), word(case.hidden)]);
    arguments.extend([sum, out, router, bias].map(Arg::At));
    arguments.extend([word(case.experts), word(case.used)]);
    arguments.extend([logits, chosen, weights].map(Arg::At));
    arguments.extend(groups.map(Arg::At));
    arguments.push(Arg::At(counters));
    for _ in 0..way.launches {
        session.launch("norm_route", ([way.pieces, tokens as u32, 1], 256, 0), way.order, &arguments);
    }
    let results = session.run(program)?;
    Ok(Found { results, sum, out, logits, chosen, weights, groups, counters })
}

/// The choice that follows from the kernel's own logits, and the groups that follow from the choice.
fn check_choice(case: &Case, tokens: usize, found: &Found) -> Result<(), String> {
    let (logits, chosen) = (found.results.floats(found.logits), found.results.words(found.chosen));
    let mut weights = Vec::new();
    let mut expected = Vec::new();
    for logits in logits.chunks_exact(case.experts) {
        let mut judged: Vec<(u32, f32)> = (0..).zip(logits.iter().copied()).collect();
        judged.sort_by(|a, b| b.1.total_cmp(&a.1));
        let best = &judged[..case.used];
        let total: f32 = best.iter().map(|(_, logit)| (logit - best[0].1).exp()).sum();
        weights.extend(best.iter().map(|(_, logit)| (logit - best[0].1).exp() / total));
        expected.extend(best.iter().map(|(expert, _)| *expert));
    }
    if chosen != expected {
        return Err(format!("chosen {chosen:?} instead of {expected:?}"));
    }
    compare("the experts' weights", &found.results.floats(found.weights), &weights, 1e-6)?;
    let [count, experts, firsts, slots] = found.groups.map(|buffer| found.results.words(buffer));
    let mut at = 0;
    let mut groups = 0;
    for expert in 0..case.experts as u32 {
        let own: Vec<u32> =
            (0..).zip(&expected).filter(|(_, chosen)| **chosen == expert).map(|(slot, _)| slot).collect();
        if own.is_empty() {
            continue;
        }
        if (experts[groups], firsts[groups] as usize) != (expert, at) || slots[at..at + own.len()] != own[..] {
            return Err(format!("group {groups} of {tokens} tokens is not that of expert {expert}"));
        }
        at += own.len();
        groups += 1;
    }
    let is_right = count[0] as usize == groups && firsts[groups] as usize == tokens * case.used;
    let is_clean = found.results.words(found.counters).iter().all(|count| *count == 0);
    if is_right && is_clean { Ok(()) } else { Err("the groups' number, their end, or counters that are not 0".into()) }
}

fn check_case(program: &Program, order: Order, case: &Case, random: &mut Random) -> Result<(), String> {
    let inputs = inputs(case, random);
    let sums: Vec<f32> = inputs.x.iter().zip(&inputs.change).map(|(a, b)| a + b).collect();
    let mut normed = vec![0.0; sums.len()];
    rms_norm(&sums, &inputs.gain, EPSILON, &mut normed);
    let logit = |token: usize, expert: usize| -> f32 {
        let row = &inputs.router[expert * case.hidden..(expert + 1) * case.hidden];
        let x = &normed[token * case.hidden..(token + 1) * case.hidden];
        row.iter().zip(x).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>() as f32 + inputs.bias[expert]
    };
    let logits: Vec<f32> = (0..case.tokens)
        .flat_map(|token| (0..case.experts).map(move |e| (token, e)))
        .map(|(t, e)| logit(t, e))
        .collect();
    let all = run(program, case, &inputs, Way { tokens: case.tokens, pieces: 3, launches: 1, order })?;
    same_bits("the sum", &all.results.floats(all.sum), &sums)?;
    compare("the norm in bf16", &all.results.widened(all.out), &normed, 2e-3)?;
    compare("the logits", &all.results.floats(all.logits), &logits, 2e-6)?;
    check_choice(case, case.tokens, &all)?;
    for (tokens, pieces) in [(1, case.experts as u32), (2, 1)] {
        let part = run(program, case, &inputs, Way { tokens, pieces, launches: 2, order })?;
        check_choice(case, tokens, &part)?;
        let found = part.results.floats(part.logits);
        same_bits("some tokens and all", &found, &all.results.floats(all.logits)[..found.len()])?;
        let found = part.results.floats(part.weights);
        same_bits("their weights", &found, &all.results.floats(all.weights)[..found.len()])?;
    }
    Ok(())
}

fn check(program: &Program, order: Order) -> Result<(), String> {
    let mut random = Random::new(6);
    for case in [
        Case { hidden: 320, experts: 32, used: 4, tokens: 9 },
        Case { hidden: 2880, experts: 12, used: 2, tokens: 3 },
        Case { hidden: 4352, experts: 10, used: 10, tokens: 3 },
        // More slots than are grouped from shared memory, and more experts than a block judges at a time.
        Case { hidden: 64, experts: 130, used: 32, tokens: 34 },
    ] {
        check_case(program, order, &case, &mut random)?;
    }
    Ok(())
}

#[test]
fn the_way_to_the_experts_agrees_with_the_cpu() {
    check_file("route", &["norm_route"], &[Factors::Bf16], check, &FAULTS);
}

//! The distribution of the next token against transformers, and the draw against the distribution.

use std::collections::HashMap;

use bulkhead_shared::generate::Sampling;
use bulkhead_shared::limits::LOGPROB_MIN;
use bulkhead_worker::engine::sampler::{History, Sampler, Scratch, opinions};
use bulkhead_worker::text::generation_config::Defaults;
use serde_json::Value;

use crate::support::{fixture, ids, items, text};

/// The fixture's probabilities are rounded to 9 digits, and the logits here are f32 where it computed in f64.
const PROBABILITY_TOLERANCE: f64 = 1e-6;

fn number(value: &Value) -> Option<f32> {
    value.as_f64().map(|value| value as f32)
}

fn sampling(parameters: &Value) -> Sampling {
    Sampling {
        temperature: number(&parameters["temperature"]),
        top_k: parameters["top_k"].as_u64().map(|count| u32::try_from(count).expect("small")),
        top_p: number(&parameters["top_p"]),
        min_p: number(&parameters["min_p"]),
        repetition_penalty: number(&parameters["repetition_penalty"]),
        frequency_penalty: number(&parameters["frequency_penalty"]).unwrap_or(0.0),
        presence_penalty: number(&parameters["presence_penalty"]).unwrap_or(0.0),
        seed: 0,
    }
}

struct Case {
    name: String,
    logits: Vec<f32>,
    sampling: Sampling,
    history: History,
    kept: Vec<u32>,
    probabilities: Vec<f64>,
    argmax: u32,
}

fn cases() -> Vec<Case> {
    let case = |case: &Value| {
        let mut history = History::default();
        ids(case, "history").into_iter().for_each(|token| history.record_generated(token));
        Case {
            name: text(case, "name").to_owned(),
            logits: items(case, "logits").iter().map(|logit| number(logit).expect("a number")).collect(),
            sampling: sampling(&case["params"]),
            history,
            kept: ids(case, "kept"),
            probabilities: items(case, "probs").iter().map(|p| p.as_f64().expect("a number")).collect(),
            argmax: case["argmax"].as_u64().and_then(|id| u32::try_from(id).ok()).expect("an id"),
        }
    };
    items(&fixture("sampling/cases.json"), "cases").iter().map(case).collect()
}

#[test]
fn every_case_keeps_the_same_tokens_with_the_same_probabilities() {
    for case in cases() {
        let sampler = Sampler::new(&case.sampling, &Defaults::default());
        let mut logits = case.logits.clone();
        let mut found = sampler.distribution(&mut logits, &case.history).expect("finite");
        found.sort_unstable_by_key(|(token, _)| *token);
        let kept: Vec<u32> = found.iter().map(|(token, _)| *token).collect();
        assert_eq!(kept, case.kept, "{}", case.name);
        for (token, probability) in found {
            let expected = case.probabilities[token as usize];
            assert!((probability - expected).abs() < PROBABILITY_TOLERANCE, "{}: {token}", case.name);
        }
        let greedy = Sampling { temperature: Some(0.0), ..case.sampling };
        let sampler = Sampler::new(&greedy, &Defaults::default());
        let choice = sampler.sample(&mut case.logits.clone(), &case.history, 7, &mut Scratch::default());
        assert_eq!(choice.expect("finite").token, case.argmax, "{}", case.name);
    }
}

#[test]
fn draws_follow_the_distribution() {
    const DRAWS: u32 = 20_000;
    // So unlikely under the right distribution (below 1e-9 for up to 39 degrees of freedom) that chance is no excuse.
    let chi_square_max = |freedom: f64| freedom + 6.5 * (2.0 * freedom).sqrt() + 25.0;
    let mut scratch = Scratch::default();
    for case in cases() {
        let sampler = Sampler::new(&Sampling { seed: 99, ..case.sampling }, &Defaults::default());
        let expected = sampler.distribution(&mut case.logits.clone(), &case.history).expect("finite");
        let mut counts: HashMap<u32, u32> = HashMap::new();
        for position in 0..DRAWS {
            let choice = sampler.sample(&mut case.logits.clone(), &case.history, position.into(), &mut scratch);
            let choice = choice.expect("finite");
            *counts.entry(choice.token).or_default() += 1;
            let probability = expected.iter().find(|(token, _)| *token == choice.token).expect("was kept").1;
            assert!((choice.logprob - probability.ln()).abs() < 1e-9, "{}", case.name);
        }
        // Rare tokens are pooled, as the test demands; half an observation of slack keeps an empty pool harmless.
        let (mut chi_square, mut bins, mut rare) = (0.0, 0, (0.0, 0.0));
        for (token, probability) in expected {
            let (expected, observed) =
                (probability * f64::from(DRAWS), f64::from(counts.get(&token).copied().unwrap_or(0)));
            if expected < 8.0 {
                rare = (rare.0 + expected, rare.1 + observed);
            } else {
                chi_square += (observed - expected).powi(2) / expected;
                bins += 1;
            }
        }
        chi_square += (rare.1 - rare.0).powi(2) / (rare.0 + 0.5);
        assert!(chi_square < chi_square_max(f64::from(bins)), "{}: chi square {chi_square} in {bins} bins", case.name);
    }
}

#[test]
fn a_draw_is_a_function_of_seed_and_position() {
    let logits: Vec<f32> = (0..500u16).map(|id| f32::from(id % 17) / 4.0).collect();
    let draws = |seed, positions: &mut dyn Iterator<Item = u64>| -> Vec<u32> {
        let sampler = Sampler::new(&Sampling { seed, ..Sampling::default() }, &Defaults::default());
        let mut scratch = Scratch::default();
        let draw = |position| sampler.sample(&mut logits.clone(), &History::default(), position, &mut scratch);
        positions.map(draw).map(|choice| choice.expect("finite").token).collect()
    };
    let forward = draws(5, &mut (0..200));
    let mut backward = draws(5, &mut (0..200).rev());
    backward.reverse();
    assert_eq!(forward, backward);
    assert_eq!(draws(5, &mut (150..200)), forward[150..], "a resumed request goes on as it would have");
    for seed in [4, 6, 0, u64::MAX] {
        let other = draws(seed, &mut (0..200));
        let equal = other.iter().zip(&forward).filter(|(left, right)| left == right).count();
        assert!(equal < 20, "seeds 5 and {seed} agree {equal} times");
    }
    let shifted = forward[1..].iter().zip(&draws(6, &mut (0..199))).filter(|(left, right)| left == right).count();
    assert!(shifted < 20, "neighbouring seeds are shifted copies");
}

#[test]
fn a_large_vocabulary_is_filtered_as_by_sorting_it() {
    // Logits with many ties, and sets of every size up to all.
    let mut state = 3u64;
    let mut random = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let logits: Vec<f32> = (0..50_000).map(|_| (random() * 400.0).round() / 40.0).collect();
    for (top_k, top_p) in
        [(0, 0.0001), (0, 0.3), (0, 0.9), (0, 0.99999), (1, 1.0), (700, 0.5), (49_999, 0.95), (60_000, 1.0)]
    {
        let sampling = Sampling { top_k: Some(top_k), top_p: Some(top_p), ..Sampling::default() };
        let sampler = Sampler::new(&sampling, &Defaults::default());
        let mut found = sampler.distribution(&mut logits.clone(), &History::default()).expect("finite");
        found.sort_unstable_by_key(|(token, _)| *token);

        let mut ranked: Vec<u32> = (0..50_000).collect();
        ranked.sort_by(|left, right| logits[*right as usize].total_cmp(&logits[*left as usize]));
        if top_k > 0 && (top_k as usize) < ranked.len() {
            let least = logits[ranked[top_k as usize - 1] as usize];
            ranked.retain(|token| logits[*token as usize] >= least);
        }
        let weights: Vec<f64> = ranked.iter().map(|token| f64::from(logits[*token as usize]).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut reached = 0.0;
        let is_enough = |weight: &f64| {
            reached += weight;
            reached >= f64::from(top_p) * total
        };
        let last = weights.iter().position(is_enough).map_or(ranked.len(), |last| last + 1);
        ranked.truncate(if top_p < 1.0 { last } else { ranked.len() });
        ranked.sort_unstable();
        let kept: Vec<u32> = found.iter().map(|(token, _)| *token).collect();
        // Sums in another order may differ in the last token of a set, and only there.
        let differences = kept.len().abs_diff(ranked.len());
        assert!(differences <= 1, "top_k {top_k}, top_p {top_p}: {} against {}", kept.len(), ranked.len());
        if differences == 0 {
            assert_eq!(kept, ranked, "top_k {top_k}, top_p {top_p}");
        }
    }
}

#[test]
fn greedy_takes_the_lowest_of_equals_and_defaults_fill_gaps() {
    let mut scratch = Scratch::default();
    let mut sample = |sampler: &Sampler, logits: &[f32]| {
        sampler.sample(&mut logits.to_vec(), &History::default(), 0, &mut scratch).map(|choice| choice.token)
    };
    let defaults = Defaults { temperature: 0.0, ..Defaults::default() };
    let greedy = Sampler::new(&Sampling::default(), &defaults);
    assert_eq!(sample(&greedy, &[1.0, 3.0, 3.0, 2.0]), Ok(1));
    assert_eq!(sample(&greedy, &[-0.0, 0.0]), Ok(0), "zeros are equal");
    let chosen = Sampling { temperature: Some(1.0), ..Sampling::default() };
    assert_ne!(Sampler::new(&chosen, &defaults), greedy, "the request has the last word");
    let cold = Sampler::new(&Sampling { temperature: Some(f32::MIN_POSITIVE), ..chosen }, &defaults);
    assert_eq!(sample(&cold, &[1.0, 1.5, -3.0]), Ok(1), "the smallest temperature is no division by zero");
}

#[test]
fn logits_that_are_not_finite_are_an_error() {
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for temperature in [0.0, 1.0] {
            let sampling = Sampling { temperature: Some(temperature), ..Sampling::default() };
            let sampler = Sampler::new(&sampling, &Defaults::default());
            let error = sampler.sample(&mut [0.0, 1.0, value], &History::default(), 0, &mut Scratch::default());
            assert_eq!(error.expect_err("not finite").token, 2);
        }
    }
}

#[test]
fn the_prompt_counts_for_repetition_only() {
    let sampling = Sampling { frequency_penalty: 1.0, presence_penalty: 1.0, ..Sampling::default() };
    let mut history = History::default();
    history.record_prompt(&[0, 0, 2, 900]);
    let sampler = Sampler::new(&sampling, &Defaults::default());
    let mut logits = [1.0, 1.0, 1.0];
    sampler.distribution(&mut logits, &history).expect("finite");
    assert_eq!(logits, [1.0, 1.0, 1.0]);
    history.record_generated(0);
    history.record_generated(0);
    sampler.distribution(&mut logits, &history).expect("finite");
    assert_eq!(logits, [-2.0, 1.0, 1.0]);
    let repetition = Sampling { repetition_penalty: Some(2.0), ..Sampling::default() };
    let mut logits = [1.0, 1.0, -1.0];
    Sampler::new(&repetition, &Defaults::default()).distribution(&mut logits, &history).expect("finite");
    assert_eq!(logits, [0.5, 1.0, -2.0]);
    assert!(!Sampler::new(&Sampling::default(), &Defaults::default()).needs_history());
}

/// The definition, term by term.
fn log_softmax(logits: &[f32], token: usize) -> f64 {
    let most = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let total: f64 = logits.iter().map(|logit| (f64::from(*logit) - most).exp()).sum();
    f64::from(logits[token]) - most - total.ln()
}

#[test]
fn the_models_own_opinion_is_a_log_softmax() {
    let many: Vec<f32> = (0..5000_u16).map(|i| f32::from(i * 7 % 1000) / 40.0 - 10.0).collect();
    for logits in [&[300.0, 299.0, -5.0, 0.25][..], &[0.5], &many] {
        let (_, all) = opinions(logits, 0, logits.len(), &mut Scratch::default());
        assert_eq!(all.len(), logits.len());
        for opinion in &all {
            let expected = log_softmax(logits, opinion.token as usize);
            // What a single rounding to f32 costs.
            let error = (f64::from(opinion.logprob) - expected).abs();
            assert!(error <= expected.abs() * f64::from(f32::EPSILON) + 1e-12, "{opinion:?} instead of {expected}");
        }
        let total: f64 = all.iter().map(|opinion| f64::from(opinion.logprob).exp()).sum();
        assert!((total - 1.0).abs() < 1e-5, "{total}");
    }
}

#[test]
fn the_most_likely_come_first_and_the_lower_id_among_equals() {
    let logits = [1.0, 3.0, 2.0, 3.0, -1.0, 2.0];
    for (top, expected) in [(0, &[][..]), (1, &[1]), (2, &[1, 3]), (4, &[1, 3, 2, 5]), (9, &[1, 3, 2, 5, 0, 4])] {
        let (chosen, list) = opinions(&logits, 4, top, &mut Scratch::default());
        assert_eq!(chosen.token, 4);
        assert_eq!(list.iter().map(|opinion| opinion.token).collect::<Vec<_>>(), expected, "top {top}");
    }
}

#[test]
fn an_opinion_is_always_a_number_within_bounds() {
    let (worst, best) = opinions(&[f32::MAX, f32::MIN, 0.0], 1, 1, &mut Scratch::default());
    assert_eq!((worst.logprob, best[0].logprob), (LOGPROB_MIN, 0.0));
    assert!(best[0].logprob.is_sign_positive(), "JSON would show the sign");
    let (only, _) = opinions(&[-7.0], 0, 0, &mut Scratch::default());
    assert_eq!(only.logprob.to_bits(), 0.0_f32.to_bits());
}

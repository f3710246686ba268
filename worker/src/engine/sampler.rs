//! Chooses the next token from the logits.
//!
//! Owns: penalties, filters, and the random choice. Pure: the choice is a function of the logits, the history, the
//! parameters, the seed and the position, and of nothing else, so that a replayed request goes on as it would have.
//!
//! The order of the steps: frequency and presence penalties, repetition penalty, temperature, top_k, top_p, min_p. Each
//! filter works on the distribution that the one before left. top_k keeps all tokens as likely as the k-th; top_p keeps the
//! smallest set of the most likely tokens that reaches it, the lower id first among equals; min_p drops what is less
//! likely than its share of the most likely token. Probabilities are summed in f64, in the order of the candidates.
//!
//! Source: transformers 5 (`TopKLogitsWarper`, `TopPLogitsWarper`, `MinPLogitsWarper`, `RepetitionPenaltyLogitsProcessor`);
//! OpenAI's API reference for the frequency and presence penalties.

use std::collections::HashMap;

use bulkhead_shared::generate::Sampling;
use bulkhead_shared::limits::LOGPROB_MIN;

use super::candidates::{Candidates, Filters, largest, log_sum_exp};
use crate::text::generation_config::Defaults;

/// A logit that is not finite: the model or its device is broken.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
#[error("the logit of token {token} is {value}")]
pub struct NonFinite {
    /// The first such token.
    pub token: u32,
    /// Its logit.
    pub value: f32,
}

/// How often each token has occurred in a sequence.
#[derive(Clone, Debug, Default)]
pub struct History {
    /// Times generated; 0 for a token that only the prompt has.
    generated: HashMap<u32, u32>,
}

impl History {
    /// Notes the tokens of the prompt.
    pub fn record_prompt(&mut self, tokens: &[u32]) {
        for token in tokens {
            self.generated.entry(*token).or_default();
        }
    }

    /// Notes a token that was generated.
    pub fn record_generated(&mut self, token: u32) {
        *self.generated.entry(token).or_default() += 1;
    }
}

/// Memory that `sample` works in, kept from step to step.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    candidates: Candidates,
}

/// A token that was chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// The token.
    pub token: u32,
    /// Natural logarithm of the probability that the token had in this choice, after every filter: 0 where there was only
    /// one. For the model's own opinion see `opinions`.
    pub logprob: f64,
}

/// Chooses the tokens of one request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampler {
    temperature: f32,
    top_k: u32,
    top_p: f32,
    min_p: f32,
    repetition_penalty: f32,
    frequency_penalty: f32,
    presence_penalty: f32,
    seed: u64,
}

impl Sampler {
    /// Takes what the request asks for, and the model's defaults for the rest.
    #[must_use]
    pub fn new(sampling: &Sampling, defaults: &Defaults) -> Sampler {
        Sampler {
            temperature: sampling.temperature.unwrap_or(defaults.temperature),
            top_k: sampling.top_k.unwrap_or(defaults.top_k),
            top_p: sampling.top_p.unwrap_or(defaults.top_p),
            min_p: sampling.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: sampling.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            frequency_penalty: sampling.frequency_penalty,
            presence_penalty: sampling.presence_penalty,
            seed: sampling.seed,
        }
    }

    /// Says whether the choice depends on the tokens before; otherwise `History` may stay empty.
    #[must_use]
    pub fn needs_history(&self) -> bool {
        self.repetition_penalty != 1.0 || self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    /// Gives temperature and seed of a choice that follows from the logits alone, unfiltered: one that whoever computes the
    /// logits can make as well. `None` where penalties or filters apply.
    #[must_use]
    pub fn plain_choice(&self) -> Option<(f32, u64)> {
        let is_greedy = self.temperature <= 0.0;
        let is_unfiltered = self.top_k == 0 && self.top_p >= 1.0 && self.min_p <= 0.0;
        (!self.needs_history() && (is_greedy || is_unfiltered)).then_some((self.temperature.max(0.0), self.seed))
    }

    /// Chooses the token at `position`, which counts the tokens of the sequence from its start. The penalties are applied
    /// to `logits` in place.
    ///
    /// Shapes: `logits: [vocabulary] f32`.
    ///
    /// # Errors
    /// `NonFinite` for the first logit that is infinite or not a number.
    ///
    /// # Panics
    /// When there are no logits.
    pub fn sample(
        &self,
        logits: &mut [f32],
        history: &History,
        position: u64,
        scratch: &mut Scratch,
    ) -> Result<Choice, NonFinite> {
        check_finite(logits)?;
        self.penalize(logits, history);
        if self.temperature <= 0.0 {
            return Ok(Choice { token: most_likely(logits), logprob: 0.0 });
        }
        scratch.candidates.keep(logits, &self.filters());
        let (token, logprob) = scratch.candidates.draw(uniform(self.seed, position));
        Ok(Choice { token, logprob })
    }

    /// Gives the distribution that `sample` draws from: tokens with their probabilities, in no particular order. At
    /// temperature 0, the one token.
    ///
    /// # Errors
    /// As `sample`.
    pub fn distribution(&self, logits: &mut [f32], history: &History) -> Result<Vec<(u32, f64)>, NonFinite> {
        check_finite(logits)?;
        self.penalize(logits, history);
        if self.temperature <= 0.0 {
            return Ok(vec![(most_likely(logits), 1.0)]);
        }
        let mut candidates = Candidates::default();
        candidates.keep(logits, &self.filters());
        Ok(candidates.probabilities())
    }

    fn penalize(&self, logits: &mut [f32], history: &History) {
        if !self.needs_history() {
            return;
        }
        for (token, count) in &history.generated {
            // A prompt given as token ids may hold ids that the model has no row for.
            let Some(logit) = logits.get_mut(*token as usize) else { continue };
            let mut penalized = f64::from(*logit);
            if *count > 0 {
                penalized -= f64::from(self.frequency_penalty) * f64::from(*count) + f64::from(self.presence_penalty);
            }
            let repetition = f64::from(self.repetition_penalty);
            penalized = if penalized > 0.0 { penalized / repetition } else { penalized * repetition };
            *logit = penalized as f32;
        }
    }

    fn filters(&self) -> Filters {
        let Sampler { temperature, top_p, min_p, .. } = *self;
        Filters { temperature, top_k: self.top_k as usize, top_p, min_p }
    }
}

/// A token with the natural logarithm of the probability that the model itself gives to it, at temperature 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Opinion {
    /// The token.
    pub token: u32,
    /// Bounds: `LOGPROB_MIN` to 0, inclusive.
    pub logprob: f32,
}

/// Gives the model's opinion on a token, and on the `top` most likely ones, the likeliest first. The logits are those before
/// penalties.
///
/// # Panics
/// When the token has no logit.
#[must_use]
pub fn opinions(logits: &[f32], token: u32, top: usize, scratch: &mut Scratch) -> (Opinion, Vec<Opinion>) {
    let total = log_sum_exp(logits);
    let opinion = |(token, logit): (u32, f32)| {
        // Rounding must not make it a probability above 1, nor an infinite number, nor a zero with a sign.
        let logprob = (f64::from(logit) - total).clamp(f64::from(LOGPROB_MIN), 0.0);
        Opinion { token, logprob: logprob as f32 + 0.0 }
    };
    let most_likely = scratch.candidates.most_likely(logits, top);
    (opinion((token, logits[token as usize])), most_likely.into_iter().map(opinion).collect())
}

fn check_finite(logits: &[f32]) -> Result<(), NonFinite> {
    // Zero times what is not finite is no number, and stays none in a sum.
    let mut lanes = [0.0f32; 16];
    for chunk in logits.chunks(lanes.len()) {
        lanes.iter_mut().zip(chunk).for_each(|(lane, logit)| *lane += logit * 0.0);
    }
    if lanes.iter().all(|lane| *lane == 0.0) {
        return Ok(());
    }
    match (0..).zip(logits).find(|(_, logit)| !logit.is_finite()) {
        Some((token, value)) => Err(NonFinite { token, value: *value }),
        None => Ok(()),
    }
}

/// Finds the token with the highest logit; the lowest id among equals.
fn most_likely(logits: &[f32]) -> u32 {
    assert!(!logits.is_empty(), "a model has at least one token");
    let most = largest(logits);
    (0..).zip(logits).find(|(_, logit)| **logit == most).map_or(0, |(token, _)| token)
}

/// Gives the random number of a position: from 0 to below 1, in steps of 2^-53.
///
/// The state is a counter: seed and position go through the finalizer of SplitMix64, the position on top of the mixed seed,
/// so that neighbouring seeds and positions have nothing in common.
///
/// Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; constants of its variant 13.
fn uniform(seed: u64, position: u64) -> f64 {
    let bits = mix(mix(seed.wrapping_add(GOLDEN_GAMMA)) ^ position.wrapping_add(1).wrapping_mul(GOLDEN_GAMMA));
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// 2^64 divided by the golden ratio, made odd.
const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

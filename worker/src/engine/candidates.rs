//! The tokens that may be drawn, with their weights: how filters leave few of a large vocabulary without sorting it.
//!
//! Weights are powers of e relative to the most likely token's. Where no filter applies, all stay in the order of the
//! vocabulary, with sums of stretches of it, so that a draw skips most of them. Otherwise the few that pass are listed.
//! Memory is kept from draw to draw. Pure.

use std::f64::consts::{LN_2, LOG2_E};

/// Tokens that are sorted at first to find the set of top_p; eight times as many with each try.
const TOP_P_FIRST_TRY: usize = 256;

/// Tokens whose weights have a common sum.
const STRETCH: usize = 1024;

/// Logits that are passed over at once.
const LANES: usize = 16;

/// What a token needs to be drawn. See `sampler` for their order and meaning.
#[derive(Clone, Copy, Debug)]
pub(super) struct Filters {
    /// Above 0.
    pub(super) temperature: f32,
    /// 0 for all.
    pub(super) top_k: usize,
    pub(super) top_p: f32,
    pub(super) min_p: f32,
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: u32,
    logit: f32,
    /// The probability relative to the most likely token's. Bounds: 0 to 1.
    weight: f64,
}

/// The tokens that may be drawn.
#[derive(Clone, Debug, Default)]
pub(super) struct Candidates {
    /// Whether only those of `list` may be.
    is_filtered: bool,
    list: Vec<Candidate>,
    /// Of the whole vocabulary.
    weights: Vec<f64>,
    /// Of each `STRETCH` of it.
    sums: Vec<f64>,
    /// Room for the largest logits.
    largest: Vec<f32>,
}

impl Candidates {
    /// Keeps the tokens that pass. The logits are finite.
    pub(super) fn keep(&mut self, logits: &[f32], filters: &Filters) {
        self.list.clear();
        let inverse_temperature = 1.0 / f64::from(filters.temperature);
        let weight = |logit: f32, most: f32| exp((f64::from(logit) - f64::from(most)) * inverse_temperature);
        let most = largest(logits);
        let total = if filters.top_k > 0 && filters.top_k < logits.len() {
            let least = self.kth_largest(logits, filters.top_k);
            for_each_from(logits, least, |token, logit| {
                self.list.push(Candidate { token, logit, weight: weight(logit, most) });
            });
            self.is_filtered = true;
            self.list.iter().map(|candidate| candidate.weight).sum()
        } else {
            self.weights.resize(logits.len(), 0.0);
            for (place, logit) in self.weights.iter_mut().zip(logits) {
                *place = weight(*logit, most);
            }
            self.sums.clear();
            self.sums.extend(self.weights.chunks(STRETCH).map(sum));
            let total: f64 = self.sums.iter().sum();
            self.is_filtered = filters.top_p < 1.0 || filters.min_p > 0.0;
            if self.is_filtered {
                self.list_from(logits, least_weight(filters, total, logits.len()));
            }
            total
        };
        if filters.top_p < 1.0 {
            keep_top_p(&mut self.list, f64::from(filters.top_p) * total);
        }
        if filters.min_p > 0.0 {
            self.list.retain(|candidate| candidate.weight >= f64::from(filters.min_p));
        }
    }

    /// Draws one by a number from 0 to below 1. Gives it, and the natural logarithm of its probability.
    pub(super) fn draw(&self, uniform: f64) -> (u32, f64) {
        if self.is_filtered {
            let total: f64 = self.list.iter().map(|candidate| candidate.weight).sum();
            let each = self.list.iter().map(|candidate| (candidate.token, candidate.weight));
            return walk(each, uniform * total, total);
        }
        let total: f64 = self.sums.iter().sum();
        let mut left = uniform * total;
        let mut stretch = 0;
        for (index, sum) in self.sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
            stretch = index;
            if left < *sum {
                break;
            }
            left -= sum;
        }
        let each = (0..).zip(self.weights.iter().copied()).skip(stretch * STRETCH).take(STRETCH);
        walk(each, left, total)
    }

    /// Finds the tokens with the largest logits: the most likely first, the lower id first among equals.
    pub(super) fn most_likely(&mut self, logits: &[f32], count: usize) -> Vec<(u32, f32)> {
        let count = count.min(logits.len());
        if count == 0 {
            return Vec::new();
        }
        let least = self.kth_largest(logits, count);
        let mut most = Vec::with_capacity(count);
        for_each_from(logits, least, |token, logit| most.push((token, logit)));
        most.sort_unstable_by(|left, right| right.1.total_cmp(&left.1).then(left.0.cmp(&right.0)));
        most.truncate(count);
        most
    }

    /// Gives the tokens with their probabilities.
    pub(super) fn probabilities(&self) -> Vec<(u32, f64)> {
        let each: Vec<(u32, f64)> = match self.is_filtered {
            true => self.list.iter().map(|candidate| (candidate.token, candidate.weight)).collect(),
            false => (0..).zip(self.weights.iter().copied()).collect(),
        };
        let total: f64 = each.iter().map(|(_, weight)| weight).sum();
        each.into_iter().map(|(token, weight)| (token, weight / total)).collect()
    }

    fn list_from(&mut self, logits: &[f32], least: f64) {
        for (token, (weight, logit)) in (0..).zip(self.weights.iter().zip(logits)) {
            if *weight >= least {
                self.list.push(Candidate { token, logit: *logit, weight: *weight });
            }
        }
    }

    /// Finds the `count`th largest logit: passes over what is below the least of those that were kept, and thins these out
    /// when they are twice too many.
    fn kth_largest(&mut self, logits: &[f32], count: usize) -> f32 {
        let downwards = |a: &f32, b: &f32| b.total_cmp(a);
        let (kept, mut least) = (&mut self.largest, f32::NEG_INFINITY);
        kept.clear();
        for logits in logits.chunks(LANES * 4) {
            if largest(logits) <= least {
                continue;
            }
            kept.extend(logits.iter().filter(|logit| **logit > least));
            if kept.len() >= 2 * count {
                least = *kept.select_nth_unstable_by(count - 1, downwards).1;
                kept.truncate(count);
            }
        }
        *kept.select_nth_unstable_by(count - 1, downwards).1
    }
}

/// Finds a weight below which no token passes. Those that are left out by half the bound of top_p weigh too little together
/// to be of the smallest set, whatever the roundings.
fn least_weight(filters: &Filters, total: f64, tokens: usize) -> f64 {
    match filters.top_p < 1.0 {
        true => (1.0 - f64::from(filters.top_p)) * total / tokens as f64 / 2.0,
        false => f64::from(filters.min_p),
    }
}

/// Finds the largest of some logits.
pub(super) fn largest(logits: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let (chunks, rest) = logits.as_chunks::<LANES>();
    let mut lanes = [f32::NEG_INFINITY; LANES];
    for chunk in chunks {
        for (lane, logit) in lanes.iter_mut().zip(chunk) {
            *lane = larger(*lane, *logit);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}

/// Gives the natural logarithm of the sum of the powers of e of some logits, which are finite.
pub(super) fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = f64::from(largest(logits));
    let mut weights = [0.0; STRETCH];
    let sum_of = |logits: &[f32]| {
        let weights = &mut weights[..logits.len()];
        weights.iter_mut().zip(logits).for_each(|(weight, logit)| *weight = exp(f64::from(*logit) - most));
        sum(weights)
    };
    most + logits.chunks(STRETCH).map(sum_of).sum::<f64>().ln()
}

/// Calls `work` for each token whose logit is at least `least`, in their order.
fn for_each_from(logits: &[f32], least: f32, mut work: impl FnMut(u32, f32)) {
    for (index, chunk) in logits.chunks(LANES * 4).enumerate() {
        if largest(chunk) >= least {
            let first = (index * LANES * 4) as u32;
            (first..).zip(chunk).filter(|(_, logit)| **logit >= least).for_each(|(token, logit)| work(token, *logit));
        }
    }
}

/// Adds up in eight lanes by index, so that an addition need not wait for the one before.
fn sum(weights: &[f64]) -> f64 {
    let (chunks, rest) = weights.as_chunks::<8>();
    let mut lanes = [0.0; 8];
    for chunk in chunks {
        for (lane, weight) in lanes.iter_mut().zip(chunk) {
            *lane += weight;
        }
    }
    lanes.iter().chain(rest).sum()
}

/// Takes the token at which `left` is used up. Of rounding, the last one with a weight.
fn walk(candidates: impl Iterator<Item = (u32, f64)>, mut left: f64, total: f64) -> (u32, f64) {
    let mut chosen = None;
    for (token, weight) in candidates.filter(|(_, weight)| *weight > 0.0) {
        chosen = Some((token, weight));
        left -= weight;
        if left < 0.0 {
            break;
        }
    }
    let (token, weight) = chosen.expect("the most likely token passes every filter, with weight 1");
    (token, (weight / total).ln())
}

/// The most likely first, the lower id first among equals.
fn by_rank(left: &Candidate, right: &Candidate) -> std::cmp::Ordering {
    right.logit.total_cmp(&left.logit).then(left.token.cmp(&right.token))
}

/// Keeps the most likely candidates whose weights reach `enough` together, in the order of their rank.
fn keep_top_p(candidates: &mut Vec<Candidate>, enough: f64) {
    let mut sorted = 0;
    let mut next = TOP_P_FIRST_TRY;
    let mut reached = 0.0;
    while sorted < candidates.len() {
        let rest = &mut candidates[sorted..];
        let count = next.min(rest.len());
        if count < rest.len() {
            rest.select_nth_unstable_by(count - 1, by_rank);
        }
        rest[..count].sort_unstable_by(by_rank);
        for (index, candidate) in rest[..count].iter().enumerate() {
            reached += candidate.weight;
            if reached >= enough {
                candidates.truncate(sorted + index + 1);
                return;
            }
        }
        sorted += count;
        next *= 8;
    }
}

/// The natural logarithm of 2 in two parts, the first so short that its product with an exponent is exact. The number at
/// the end is what the nearest double leaves over.
const LN_2_HIGH: f64 = f64::from_bits(LN_2.to_bits() & !0xffff_ffff);
const LN_2_LOW: f64 = LN_2 - LN_2_HIGH + 2.319_046_813_846_3e-17;

/// What is added to round to a whole number, which then stands in the low bits: 1.5 * 2^52.
const ROUNDING: f64 = 6_755_399_441_055_744.0;

/// Below this, powers are taken for 0: about the least whose power is a normal number.
const EXP_LEAST: f64 = -708.0;

/// Computes `e^x` for x up to 0 without a branch, so that the compiler computes several at once.
///
/// `x = n ln 2 + r` with a whole n and |r| at most ln 2 / 2; `e^r` by the first 14 terms of its series, whose rest is below
/// 1e-17 there. With roundings the relative error is below 1e-15.
#[inline(always)]
fn exp(x: f64) -> f64 {
    let clamped = if x < EXP_LEAST { EXP_LEAST } else { x };
    let shifted = clamped * LOG2_E + ROUNDING;
    let n = shifted - ROUNDING;
    let r = clamped - n * LN_2_HIGH - n * LN_2_LOW;
    // By pairs, then pairs of those: a chain of thirteen would wait for itself.
    let (r2, r4) = (r * r, (r * r) * (r * r));
    let pair = |even: f64, odd: f64| 1.0 / even + r * (1.0 / odd);
    let low = pair(1.0, 1.0) + r2 * pair(2.0, 6.0) + r4 * (pair(24.0, 120.0) + r2 * pair(720.0, 5040.0));
    let high = pair(40_320.0, 362_880.0) + r2 * pair(3_628_800.0, 39_916_800.0);
    let power = low + r4 * r4 * (high + r4 * pair(479_001_600.0, 6_227_020_800.0));
    let scaled = f64::from_bits(power.to_bits().wrapping_add(shifted.to_bits() << 52));
    if x < EXP_LEAST { 0.0 } else { scaled }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_are_right_to_the_last_bits() {
        for i in 0..2_000_000 {
            let x = f64::from(i) / 2e6 * EXP_LEAST;
            let error = (exp(x) / x.exp() - 1.0).abs();
            assert!(error < 1e-15, "{x}: {error:e}");
        }
        assert_eq!((exp(0.0), exp(-0.0), exp(-1000.0), exp(f64::MIN)), (1.0, 1.0, 0.0, 0.0));
    }

    #[test]
    fn a_draw_that_skips_stretches_is_one_that_walks() {
        let logits: Vec<f32> = (0..5000u16).map(|i| f32::from(i * 7 % 1000) / 90.0).collect();
        let mut all = Candidates::default();
        all.keep(&logits, &Filters { temperature: 0.9, top_k: 0, top_p: 1.0, min_p: 0.0 });
        let mut listed = Candidates::default();
        // A filter that all pass.
        listed.keep(&logits, &Filters { temperature: 0.9, top_k: 0, top_p: 1.0, min_p: f32::MIN_POSITIVE });
        assert_eq!((all.list.len(), listed.list.len()), (0, 5000));
        for i in 0..4000 {
            let uniform = (f64::from(i) + 0.37) / 4000.0;
            assert_eq!(all.draw(uniform).0, listed.draw(uniform).0, "{uniform}");
        }
        assert_eq!(all.draw(1.0).0, 4999, "rounding up ends at the last token");
    }
}

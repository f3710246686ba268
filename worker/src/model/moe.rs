//! Mixture of experts: a router picks `k` experts for each token, and their results are added by weight.
//!
//! Router: the `k` largest of a linear layer's logits, and a softmax over those `k` alone. Expert: gate and up
//! projections in interleaved rows, `gate <- min(gate, limit)`, `up <- clamp(up, -limit, limit)`,
//! `(up + 1) * gate * sigmoid(alpha * gate)`, then the down projection with its bias. Source: gpt-oss,
//! `modeling_gpt_oss.py` of transformers.
//!
//! Tokens are grouped by expert, so that a weight is read once for all of them; a token's experts are added in the order
//! of their rank, so its result does not depend on the others.

use super::weights::{ExpertWeights, Linear};
use crate::quant::cpu::Cpu;

/// The scalars of the experts' activation.
#[derive(Clone, Copy, Debug)]
pub struct Activation {
    /// The slope inside the sigmoid.
    pub alpha: f32,
    /// The bound of gate and up.
    pub limit: f32,
}

/// One choice of the router.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Choice {
    expert: usize,
    weight: f32,
}

/// The mixture of one layer.
#[derive(Debug)]
pub struct Mixture<'a> {
    /// Where to compute.
    pub cpu: &'a Cpu,
    /// The linear layer that judges the experts.
    pub router: &'a Linear,
    /// The experts.
    pub experts: &'a [ExpertWeights],
    /// Experts for each token.
    pub used: usize,
    /// Their activation.
    pub activation: Activation,
}

impl Mixture<'_> {
    /// Runs the mixture for a batch.
    ///
    /// Shapes: x, out: [batch, hidden].
    pub fn run(&self, x: &[f32], out: &mut [f32]) {
        let hidden = self.router.weight.cols();
        let mut logits = vec![0.0; x.len() / hidden * self.experts.len()];
        self.router.apply(self.cpu, x, &mut logits);
        let choices: Vec<Choice> =
            logits.chunks_exact(self.experts.len()).flat_map(|logits| route(logits, self.used)).collect();

        // Each choice's result at its own place, so that adding them up has one order.
        let mut results = vec![0.0; choices.len() * hidden];
        for (index, expert) in self.experts.iter().enumerate() {
            let places: Vec<usize> = (0..choices.len()).filter(|place| choices[*place].expert == index).collect();
            if places.is_empty() {
                continue;
            }
            let row = |place: &usize| &x[place / self.used * hidden..(place / self.used + 1) * hidden];
            let gathered: Vec<f32> = places.iter().flat_map(row).copied().collect();
            let result = self.run_expert(expert, &gathered);
            for (place, result) in places.iter().zip(result.chunks_exact(hidden)) {
                results[place * hidden..(place + 1) * hidden].copy_from_slice(result);
            }
        }

        out.fill(0.0);
        for (place, (choice, result)) in choices.iter().zip(results.chunks_exact(hidden)).enumerate() {
            let row = place / self.used;
            for (sum, value) in out[row * hidden..(row + 1) * hidden].iter_mut().zip(result) {
                *sum += choice.weight * value;
            }
        }
    }

    /// Shapes: x: [tokens, hidden] -> [tokens, hidden].
    fn run_expert(&self, expert: &ExpertWeights, x: &[f32]) -> Vec<f32> {
        let tokens = x.len() / expert.gate_up.weight.cols();
        let mut gate_up = vec![0.0; tokens * expert.gate_up.weight.rows()];
        expert.gate_up.apply(self.cpu, x, &mut gate_up);
        let inner: Vec<f32> = gate_up.chunks_exact(2).map(|pair| swiglu(pair[0], pair[1], self.activation)).collect();
        let mut out = vec![0.0; tokens * expert.down.weight.rows()];
        expert.down.apply(self.cpu, &inner, &mut out);
        out
    }
}

/// Picks the `used` largest logits, the lower index first among equals, and weighs them by their softmax.
fn route(logits: &[f32], used: usize) -> Vec<Choice> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    order.truncate(used);
    let largest = logits[order[0]];
    let powers: Vec<f32> = order.iter().map(|expert| (logits[*expert] - largest).exp()).collect();
    let sum: f32 = powers.iter().sum();
    order.into_iter().zip(powers).map(|(expert, power)| Choice { expert, weight: power / sum }).collect()
}

fn swiglu(gate: f32, up: f32, Activation { alpha, limit }: Activation) -> f32 {
    // Not `f32::min`, which would hide a value that is not a number.
    let gate = if gate > limit { limit } else { gate };
    let up = up.clamp(-limit, limit);
    (up + 1.0) * gate / (1.0 + (-alpha * gate).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_router_weighs_only_what_it_picks() {
        let choices = route(&[0.0, 2.0, 1.0, 2.0], 2);
        assert_eq!(choices, [Choice { expert: 1, weight: 0.5 }, Choice { expert: 3, weight: 0.5 }]);
        let one = route(&[f32::MIN, -5.0], 1);
        assert_eq!(one, [Choice { expert: 1, weight: 1.0 }]);
    }

    #[test]
    fn the_activation_is_clamped_on_its_sides() {
        let activation = Activation { alpha: 1.702, limit: 7.0 };
        let at = |gate, up| swiglu(gate, up, activation);
        assert_eq!(at(100.0, 0.0), at(7.0, 0.0));
        assert_eq!(at(1.0, 100.0), at(1.0, 7.0));
        assert_eq!(at(1.0, -100.0), at(1.0, -7.0));
        assert_eq!(at(-1000.0, 1.0).abs(), 0.0);
        assert!((at(1.0, 1.0) - 2.0 / (1.0 + (-1.702f32).exp())).abs() < 1e-6);
    }
}

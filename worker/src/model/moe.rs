//! Mixture of experts: a router picks `k` experts for each token, and their results are added by weight.
//!
//! Router: the `k` largest of a linear layer's logits, and a softmax over those `k` alone. Expert: gate and up
//! projections in interleaved rows, `gate <- min(gate, limit)`, `up <- clamp(up, -limit, limit)`,
//! `(up + 1) * gate * sigmoid(alpha * gate)`, then the down projection with its bias. Source: gpt-oss,
//! `modeling_gpt_oss.py` of transformers.
//!
//! Tokens are grouped by expert, so that a weight is read once for all of them; a token's experts are added in the order
//! of their rank, so its result does not depend on the others.

use super::rooms::{Room, Rooms};
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
    /// Where what is between the matrices stands.
    pub rooms: &'a Rooms,
    /// The linear layer that judges the experts.
    pub router: &'a Linear,
    /// The experts.
    pub experts: &'a [ExpertWeights],
    /// Experts for each token.
    pub used: usize,
    /// Their activation.
    pub activation: Activation,
}

impl<'a> Mixture<'a> {
    /// Runs the mixture for a batch.
    ///
    /// Shapes: x, out: [batch, hidden].
    pub fn run(&self, x: &[f32], out: &mut [f32]) {
        let hidden = self.router.weight.cols();
        let mut logits = self.rooms.lend(x.len() / hidden * self.experts.len());
        self.router.apply(self.cpu, x, &mut logits);
        let choices: Vec<Choice> =
            logits.chunks_exact(self.experts.len()).flat_map(|logits| route(logits, self.used)).collect();

        // Places of choices, those of one expert together.
        let mut order: Vec<usize> = (0..choices.len()).collect();
        order.sort_by_key(|place| choices[*place].expert);
        let mut gathered = self.rooms.lend(order.len() * hidden);
        for (place, gathered) in order.iter().zip(gathered.chunks_exact_mut(hidden)) {
            gathered.copy_from_slice(&x[place / self.used * hidden..(place / self.used + 1) * hidden]);
        }
        let groups: Vec<(&ExpertWeights, usize)> = order
            .chunk_by(|a, b| choices[*a].expert == choices[*b].expert)
            .map(|places| (&self.experts[choices[places[0]].expert], places.len()))
            .collect();
        let results = self.run_experts(&groups, &gathered);

        let mut slots = vec![0; order.len()];
        order.iter().enumerate().for_each(|(slot, place)| slots[*place] = slot);
        out.fill(0.0);
        for (place, choice) in choices.iter().enumerate() {
            let (row, slot) = (place / self.used, slots[place]);
            let result = &results[slot * hidden..(slot + 1) * hidden];
            for (sum, value) in out[row * hidden..(row + 1) * hidden].iter_mut().zip(result) {
                *sum += choice.weight * value;
            }
        }
    }

    /// Computes each expert for the rows of its own, which follow each other.
    ///
    /// Shapes: x: [tokens, hidden] -> [tokens, hidden].
    fn run_experts(&self, groups: &[(&ExpertWeights, usize)], x: &[f32]) -> Room<'a> {
        let Some((first, _)) = groups.first() else { return self.rooms.lend(0) };
        let (hidden, inner) = (first.gate_up.weight.cols(), first.down.weight.cols());
        let tokens = x.len() / hidden;
        let mut gate_up = self.rooms.lend(tokens * 2 * inner);
        self.multiply(groups.iter().map(|(expert, count)| (&expert.gate_up, *count)), x, &mut gate_up);
        let mut activated = self.rooms.lend(tokens * inner);
        self.cpu.for_each_chunk(&mut activated, inner, |token, activated| {
            let (pairs, _) = gate_up[token * 2 * inner..(token + 1) * 2 * inner].as_chunks::<2>();
            for (value, [gate, up]) in activated.iter_mut().zip(pairs) {
                *value = swiglu(*gate, *up, self.activation);
            }
        });
        let mut out = self.rooms.lend(tokens * hidden);
        self.multiply(groups.iter().map(|(expert, count)| (&expert.down, *count)), &activated, &mut out);
        out
    }

    /// Applies each linear layer to so many rows.
    fn multiply<'b>(&self, linears: impl Iterator<Item = (&'b Linear, usize)>, mut x: &[f32], mut out: &mut [f32]) {
        let mut products = Vec::new();
        for (linear, rows) in linears {
            let (own_x, later_x) = x.split_at(rows * linear.weight.cols());
            let (own_out, later_out) = out.split_at_mut(rows * linear.weight.rows());
            products.push(linear.product(own_x, own_out));
            (x, out) = (later_x, later_out);
        }
        self.cpu.multiply(&mut products);
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

//! The network that follows the attention in a dense model: `down(silu(gate(x)) * up(x))`.
//!
//! silu(z) = z / (1 + exp(-z)). Source: Shazeer 2020, "GLU Variants Improve Transformer"; Llama, `modeling_llama.py` of
//! transformers.

use super::rooms::Rooms;
use super::weights::DenseWeights;
use crate::quant::cpu::Cpu;

/// The network of one layer.
#[derive(Debug)]
pub struct DenseMlp<'a> {
    /// Where to compute.
    pub cpu: &'a Cpu,
    /// Where what is between the matrices stands.
    pub rooms: &'a Rooms,
    /// The matrices.
    pub weights: &'a DenseWeights,
}

impl DenseMlp<'_> {
    /// Runs the network for a batch.
    ///
    /// Shapes: x, out: [batch, hidden].
    pub fn run(&self, x: &[f32], out: &mut [f32]) {
        let (gate, up) = (&self.weights.gate, &self.weights.up);
        let (tokens, width) = (x.len() / gate.weight.cols(), gate.weight.rows());
        let [mut inner, mut upper] = [(); 2].map(|()| self.rooms.lend(tokens * width));
        self.cpu.multiply(&mut [gate.product(x, &mut inner), up.product(x, &mut upper)]);
        self.cpu.for_each_chunk(&mut inner, width, |token, inner| {
            let upper = &upper[token * width..(token + 1) * width];
            inner.iter_mut().zip(upper).for_each(|(gate, up)| *gate = silu(*gate) * up);
        });
        self.weights.down.apply(self.cpu, &inner, out);
    }
}

fn silu(z: f32) -> f32 {
    z / (1.0 + (-z).exp())
}

#[cfg(test)]
mod tests {
    use super::silu;

    #[test]
    fn the_gate_closes_and_opens_without_overflow() {
        assert_eq!(silu(0.0), 0.0);
        assert_eq!(silu(-1000.0).abs(), 0.0);
        assert_eq!(silu(1000.0), 1000.0);
        assert!((silu(1.0) - 0.731_058_6).abs() < 1e-6);
        assert!(silu(f32::NAN).is_nan());
    }
}

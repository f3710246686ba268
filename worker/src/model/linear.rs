//! Applying a linear layer on the processor.

use super::weights::{Linear, Weights};
use crate::quant::cpu::Cpu;

impl Linear {
    /// Computes `out = x * weight^T + bias`.
    ///
    /// Shapes: x: [batch, columns], out: [batch, rows].
    pub fn apply(&self, cpu: &Cpu, x: &[f32], out: &mut [f32]) {
        cpu.matmul(x, &self.weight, self.bias.as_deref(), out);
    }
}

impl Weights {
    /// Gives the bytes of all matrices as they are held.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.matrices().map(|matrix| matrix.stored_bytes() as u64).sum()
    }
}

//! Applying a linear layer on the processor.

use super::weights::{Linear, Weights};
use crate::quant::cpu::{Cpu, Product};

impl Linear {
    /// Computes `out = x * weight^T + bias`.
    ///
    /// Shapes: x: [batch, columns], out: [batch, rows].
    pub fn apply(&self, cpu: &Cpu, x: &[f32], out: &mut [f32]) {
        cpu.multiply(&mut [self.product(x, out)]);
    }

    /// Gives `out = x * weight^T + bias`, to be computed beside other products.
    ///
    /// Shapes: x: [batch, columns], out: [batch, rows].
    pub fn product<'a>(&'a self, x: &'a [f32], out: &'a mut [f32]) -> Product<'a> {
        Product { x, weight: &self.weight, bias: self.bias.as_deref(), out }
    }
}

impl Weights {
    /// Gives the bytes of all matrices as they are held.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.matrices().map(|matrix| matrix.stored_bytes() as u64).sum()
    }
}

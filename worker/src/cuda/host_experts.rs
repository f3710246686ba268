//! Experts that stay on the host: activations travel to them and back, weights do not.

use super::transfer::HostBuffer;
use crate::model::config::ExpertsConfig;
use crate::model::moe::{Activation, Mixture};
use crate::model::weights::{LayerWeights, MixtureWeights, Weights};
use crate::quant::cpu::Cpu;

/// The mixtures that the host computes.
#[derive(Debug)]
pub(super) struct HostExperts {
    /// For each layer, its mixture if the host has it.
    mixtures: Vec<Option<MixtureWeights>>,
    used: usize,
    hidden: usize,
    activation: Activation,
}

impl HostExperts {
    /// Keeps the mixtures of the layers that are marked.
    pub(super) fn new(config: &ExpertsConfig, hidden: usize, weights: &Weights, marked: &[bool]) -> HostExperts {
        let keep = |(layer, is_kept): (&LayerWeights, &bool)| layer.mlp.experts().filter(|_| *is_kept).cloned();
        HostExperts {
            mixtures: weights.layers.iter().zip(marked).map(keep).collect(),
            used: config.per_token,
            hidden,
            activation: Activation { alpha: config.swiglu_alpha, limit: config.swiglu_limit },
        }
    }

    /// Counts the layers.
    pub(super) fn layers(&self) -> usize {
        self.mixtures.iter().flatten().count()
    }

    /// Computes a layer's mixture in place: normalised activations become the mixture's change.
    ///
    /// Shapes: buffer: [rows, hidden] f32.
    ///
    /// # Panics
    /// When the layer is none of the host's.
    pub(super) fn run(&self, cpu: &Cpu, layer: usize, buffer: &mut HostBuffer, rows: usize) {
        let MixtureWeights { router, experts } =
            self.mixtures[layer].as_ref().expect("the host has the experts of this layer");
        let mut x = vec![0.0f32; rows * self.hidden];
        buffer.read(0, &mut x);
        let mut out = vec![0.0; x.len()];
        let mixture = Mixture { cpu, router, experts, used: self.used, activation: self.activation };
        cpu.run(|| mixture.run(&x, &mut out));
        buffer.write(0, &out);
    }
}

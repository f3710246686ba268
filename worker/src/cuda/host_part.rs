//! What the host computes beside a card: what follows the attention in some layers, and the last layers altogether. Activations travel to
//! it and back, weights do not.

use super::transfer::HostBuffer;
use crate::engine::kv_cache::KvCache;
use crate::engine::pager::{KvShape, Pager};
use crate::memory::card::CardPlan;
use crate::model::batch::Batch;
use crate::model::config::Config;
use crate::model::decoder::Decoder;
use crate::model::weights::{LayerWeights, MlpWeights, Weights};
use crate::quant::cpu::Cpu;

/// The host's part of a model.
#[derive(Debug)]
pub(super) struct HostPart {
    /// For each layer of the card, what follows its attention if the host has it.
    mlps: Vec<Option<MlpWeights>>,
    hidden: usize,
    /// The last layers; often none.
    layers: Decoder,
    /// Their keys and values, in blocks of the numbers that the card's books hand out.
    cache: KvCache,
}

impl HostPart {
    /// Keeps what a plan leaves to the host.
    pub(super) fn new(config: &Config, weights: &Weights, cpu: Cpu, planned: &CardPlan) -> HostPart {
        let on_card = config.layers.len() - planned.whole_layers;
        let keep = |(layer, is_kept): (&LayerWeights, &bool)| is_kept.then(|| layer.mlp.clone());
        let rest = Config { layers: config.layers[on_card..].to_vec(), ..config.clone() };
        let shape = KvShape::of(&rest);
        let blocks = if planned.whole_layers > 0 { planned.full_blocks } else { 0 };
        let sequences = if planned.whole_layers > 0 { planned.sequences } else { 0 };
        let weights_rest = Weights { layers: weights.layers[on_card..].to_vec(), ..weights.clone() };
        HostPart {
            mlps: weights.layers[..on_card].iter().zip(&planned.host_layers).map(keep).collect(),
            hidden: config.hidden_size,
            layers: Decoder::new(rest, weights_rest, cpu),
            cache: KvCache::new(shape, blocks, sequences, planned.step().sum()),
        }
    }

    /// Gives the processor.
    pub(super) fn cpu(&self) -> &Cpu {
        self.layers.cpu()
    }

    /// Counts the layers of which a part is here, and the layers that are here altogether.
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.mlps.iter().flatten().count(), self.layers.config().layers.len())
    }

    /// Lists the places at which a pass stops for the host: layers of which a part is here, and behind the card's last layer
    /// where more layers follow here.
    pub(super) fn stops(&self) -> impl Iterator<Item = usize> {
        let has_layers = !self.layers.config().layers.is_empty();
        let parts = (0..self.mlps.len()).filter(|layer| self.mlps[*layer].is_some());
        parts.chain(has_layers.then_some(self.mlps.len()))
    }

    /// Computes what a pass has stopped for, in place: normalised activations become a layer's change, or the residual
    /// stream goes through the last layers.
    ///
    /// Shapes: buffer: [rows, hidden] f32.
    ///
    /// # Panics
    /// When the host has nothing to do at this stop.
    pub(super) fn run(&mut self, stop: usize, buffer: &mut HostBuffer, batch: &Batch<'_>) {
        let mut x = vec![0.0f32; batch.rows.len() * self.hidden];
        buffer.read(0, &mut x);
        let Some(mlp) = self.mlps.get(stop) else {
            self.layers.layers(batch, &mut self.cache, &mut x);
            return buffer.write(0, &x);
        };
        let mut out = vec![0.0; x.len()];
        self.layers.mlp(mlp.as_ref().expect("the host has this part of the layer"), &x, &mut out);
        buffer.write(0, &out);
    }

    /// Checks that the books of the whole model hand out numbers that the cache here has blocks for.
    pub(super) fn agrees_with(&self, pager: &Pager) -> bool {
        use crate::engine::pager::Kind;
        let here = &self.cache.pager;
        let has_all = |kind| here.shape().layers(kind) == 0 || here.pool_blocks(kind) == pager.pool_blocks(kind);
        has_all(Kind::Full) && has_all(Kind::Window)
    }
}

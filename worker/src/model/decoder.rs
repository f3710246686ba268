//! The decoder that is served: gpt-oss or Llama over a ragged batch with a paged KV cache.
//!
//! Owns the weights and nothing of any request. Activations are f32, weights as stored, keys and values bf16. Every
//! function below computes a token from its own row and its own sequence alone, in a fixed order, so equal tokens at equal
//! positions give equal bits whatever the batch, the chunks or the threads. The plain twin is `model::reference`.
//!
//! A layer: `x += o(attention(norm(x)))`, then `x += mlp(norm(x))`, where the mlp is a mixture of
//! experts or a dense network.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::attention::{self, Attention, Heads, LayerAttention, Vectors};
use super::batch::Batch;
use super::config::{Config, Mlp};
use super::mlp::DenseMlp;
use super::moe::{Activation, Mixture};
use super::norm::rms_norm;
use super::rooms::{Room, Rooms};
use super::rope::RopeTable;
use super::weights::{Linear, MixtureWeights, MlpWeights, Weights};
use crate::engine::kv_cache::KvCache;
use crate::quant::cpu::Cpu;

/// A model ready to compute.
#[derive(Debug)]
pub struct Decoder {
    config: Config,
    weights: Weights,
    cpu: Cpu,
    rope: RopeTable,
    attention: Attention,
    /// Where activations stand during a step.
    rooms: Rooms,
    /// Layers computed so far: a decoder whose count stands still while it has work is hung.
    progress: Arc<AtomicU64>,
}

/// What a step's layers share.
struct Step<'a> {
    batch: &'a Batch<'a>,
    cache: &'a mut KvCache,
    rotation: Rotation<'a>,
}

/// Cosines and sines of a batch's positions. Shapes: each [batch, half].
struct Rotation<'a> {
    /// Half a head's elements.
    half: usize,
    cos: Room<'a>,
    sin: Room<'a>,
}

impl Decoder {
    /// Takes what a model is made of.
    #[must_use]
    pub fn new(config: Config, weights: Weights, cpu: Cpu) -> Decoder {
        let rope = RopeTable::new(&config.rope);
        let attention = Attention::new(Vectors::of(cpu.path()));
        Decoder { config, weights, cpu, rope, attention, rooms: Rooms::default(), progress: Arc::default() }
    }

    /// Gives the model's configuration.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Gives the weights.
    #[must_use]
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Gives the place where the model computes.
    #[must_use]
    pub fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    /// Describes where the model computes, for people.
    #[must_use]
    pub fn describe_device(&self) -> String {
        self.cpu.describe()
    }

    /// Gives the bytes of the weights as they are held.
    #[must_use]
    pub fn weights_bytes(&self) -> u64 {
        self.weights.stored_bytes()
    }

    /// Gives the counter of layers computed so far.
    #[must_use]
    pub fn progress(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.progress)
    }

    /// Gives the bytes of activations that a step of `rows` tokens takes at most.
    #[must_use]
    pub fn scratch_bytes(config: &Config, rows: u64) -> u64 {
        let hidden = config.hidden_size as u64;
        let projected = ((config.heads + 2 * config.kv_heads) * config.head_dim) as u64;
        // With bytes for the largest product of a layer, twice where tiles want them packed, with scales.
        let rounded = |inner: usize| hidden.max(inner as u64) * 9 / 16;
        let mlp = match config.mlp {
            Mlp::Experts(experts) => {
                let inner = experts.intermediate_size;
                experts.per_token as u64 * (4 * hidden + 3 * inner as u64 + rounded(inner))
            }
            Mlp::Dense(dense) => 2 * dense.intermediate_size as u64 + rounded(dense.intermediate_size),
        };
        let per_row = 6 * hidden + 3 * projected + mlp + config.vocab_size as u64;
        per_row * rows * size_of::<f32>() as u64 + attention::scratch_bytes(config, rows)
    }

    /// Computes a batch, writes its keys and values into the cache and returns the logits of its output rows.
    ///
    /// Shapes: -> [outputs, vocabulary].
    ///
    /// # Panics
    /// When a token is outside the vocabulary or a sequence has no block for a row: the engine checks both before.
    pub fn forward(&self, batch: &Batch<'_>, cache: &mut KvCache) -> Vec<f32> {
        let hidden = self.config.hidden_size;
        let mut x = self.rooms.lend(batch.rows.len() * hidden);
        for (row, embedded) in batch.rows.iter().zip(x.chunks_exact_mut(hidden)) {
            self.weights.embedding.decode_row(row.token as usize, embedded);
        }
        self.layers(batch, cache, &mut x);
        self.logits(batch, &x)
    }

    /// Computes the layers alone, in place, also for the part of a model that begins somewhere in its middle.
    ///
    /// Shapes: x: [batch, hidden].
    ///
    /// # Panics
    /// When a sequence has no block for a row.
    pub fn layers(&self, batch: &Batch<'_>, cache: &mut KvCache, x: &mut [f32]) {
        let mut step = Step { batch, cache, rotation: self.rotation(batch) };
        let (mut normalised, mut change) = (self.rooms.lend(x.len()), self.rooms.lend(x.len()));
        for (index, layer) in self.weights.layers.iter().enumerate() {
            self.normalise(x, &layer.attention_norm, &mut normalised);
            self.attention(index, &mut step, &normalised, &mut change);
            self.add(x, &change);
            self.normalise(x, &layer.mlp_norm, &mut normalised);
            self.mlp(&layer.mlp, &normalised, &mut change);
            self.add(x, &change);
            self.progress.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Shapes: x, out: [batch, hidden].
    fn attention(&self, index: usize, step: &mut Step<'_>, x: &[f32], out: &mut [f32]) {
        let heads = Heads { query: self.config.heads, kv: self.config.kv_heads, dim: self.config.head_dim };
        let weights = &self.weights.layers[index].attention;
        let room = |linear: &Linear| self.rooms.lend(x.len() / linear.weight.cols() * linear.weight.rows());
        let [mut queries, mut keys, mut values] = [&weights.q, &weights.k, &weights.v].map(room);
        self.cpu.multiply(&mut [
            weights.q.product(x, &mut queries),
            weights.k.product(x, &mut keys),
            weights.v.product(x, &mut values),
        ]);
        self.rotate(&mut queries, heads.query, &step.rotation);
        self.rotate(&mut keys, heads.kv, &step.rotation);
        let width = heads.kv * heads.dim;
        let rows = step.batch.rows.iter().zip(keys.chunks_exact(width)).zip(values.chunks_exact(width));
        for ((row, key), value) in rows {
            step.cache.write(index, step.batch.blocks[row.sequence], row.position, key, value);
        }
        let mut attended = self.rooms.lend(queries.len());
        LayerAttention {
            cpu: &self.cpu,
            attention: &self.attention,
            heads,
            sinks: &weights.sinks,
            cache: step.cache,
            layer: index,
        }
        .attend(step.batch, &queries, &mut attended);
        weights.o.apply(&self.cpu, &attended, out);
    }

    /// Computes what follows the attention in a layer, be it one of this model or of the part of it that is elsewhere.
    ///
    /// Shapes: x: [batch, hidden], normalised; out: [batch, hidden].
    pub fn mlp(&self, weights: &MlpWeights, x: &[f32], out: &mut [f32]) {
        match weights {
            MlpWeights::Experts(mixture) => self.mixture(mixture, x, out),
            MlpWeights::Dense(weights) => DenseMlp { cpu: &self.cpu, rooms: &self.rooms, weights }.run(x, out),
        }
    }

    /// Shapes: x, out: [batch, hidden].
    fn mixture(&self, MixtureWeights { router, experts }: &MixtureWeights, x: &[f32], out: &mut [f32]) {
        let config = self.config.experts().expect("weights have the shape of their config");
        let activation = Activation { alpha: config.swiglu_alpha, limit: config.swiglu_limit };
        let (cpu, rooms) = (&self.cpu, &self.rooms);
        Mixture { cpu, rooms, router, experts, used: config.per_token, activation }.run(x, out);
    }

    /// Shapes: x, out: [batch, hidden].
    fn normalise(&self, x: &[f32], weight: &[f32], out: &mut [f32]) {
        let size = weight.len();
        self.cpu.for_each_chunk(out, size, |row, out| {
            rms_norm(&x[row * size..(row + 1) * size], weight, self.config.norm_eps, out);
        });
    }

    /// Shapes: x, change: [batch, hidden].
    fn add(&self, x: &mut [f32], change: &[f32]) {
        let size = self.config.hidden_size;
        self.cpu.for_each_chunk(x, size, |row, x| {
            x.iter_mut().zip(&change[row * size..(row + 1) * size]).for_each(|(x, change)| *x += change);
        });
    }

    /// Rotates every head by the angles of its row's position. Shapes: x: [batch, heads, head_dim].
    fn rotate(&self, x: &mut [f32], heads: usize, rotation: &Rotation<'_>) {
        let half = rotation.half;
        self.cpu.for_each_chunk(x, heads * 2 * half, |row, x| {
            let angles = row * half..(row + 1) * half;
            rotate_row(x, &rotation.cos[angles.clone()], &rotation.sin[angles]);
        });
    }

    fn rotation(&self, batch: &Batch<'_>) -> Rotation<'_> {
        let half = self.config.head_dim / 2;
        let [mut cos, mut sin] = [(); 2].map(|()| self.rooms.lend(batch.rows.len() * half));
        for ((row, cos), sin) in batch.rows.iter().zip(cos.chunks_exact_mut(half)).zip(sin.chunks_exact_mut(half)) {
            self.rope.write(row.position as usize, cos, sin);
        }
        Rotation { half, cos, sin }
    }

    fn logits(&self, batch: &Batch<'_>, x: &[f32]) -> Vec<f32> {
        let hidden = self.config.hidden_size;
        let [mut wanted, mut normalised] = [(); 2].map(|()| self.rooms.lend(batch.outputs.len() * hidden));
        for (row, wanted) in batch.outputs.iter().zip(wanted.chunks_exact_mut(hidden)) {
            wanted.copy_from_slice(&x[row * hidden..(row + 1) * hidden]);
        }
        self.normalise(&wanted, &self.weights.final_norm, &mut normalised);
        let mut logits = vec![0.0; batch.outputs.len() * self.config.vocab_size];
        if !logits.is_empty() {
            self.cpu.matmul(&normalised, &self.weights.lm_head, None, &mut logits);
        }
        logits
    }
}

/// Rotates the two halves of each head of a row. Source: Su et al. 2021, "RoFormer", in the half-split pairing of GPT-NeoX.
///
/// Shapes: x: [heads, head_dim], cos, sin: [half].
fn rotate_row(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    for head in x.chunks_exact_mut(2 * cos.len()) {
        let (first, second) = head.split_at_mut(cos.len());
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

//! The plan for a CUDA card: what is held on it, what stays in the host's memory, and what was given up to fit.
//!
//! Owns: the sizes of a model's parts, of the keys and values, and of a step's buffers on a card; the order in which wishes
//! are given up. Refuses: to ask a driver, and to make a context smaller that was asked for: parts of layers move to the host instead.
//! Invariants: weights, keys and values, buffers and reserve together are at most the budget; what stays on the host is at
//! most what the host has.
//!
//! The order, from what costs nothing to what costs most:
//!
//! 1. the embedding goes to the host, from where a step gathers its few rows;
//! 2. sequences share fewer blocks than all of them could fill: at least one whole context;
//! 3. prompts are taken in smaller steps, and fewer sequences than were asked for run at once, but not fewer than eight;
//! 4. a context that was left open becomes smaller, down to 8192 tokens;
//! 5. the experts, or the networks behind the attention, of as few layers as needed go to the host, the last layers first;
//! 6. with all of them there, fewer than eight sequences run at once;
//! 7. as few whole layers as needed go to the host too, with their keys and values, the last first.

mod planner;

use std::fmt;

pub use bulkhead_shared::message::KvType;
use bulkhead_shared::message::{Facts, LoadPlan, MemoryKind};
use bulkhead_shared::units::Bytes;

use self::planner::Planner;
use super::PlanError;
use super::scratch::{Scratch, StepSize};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::engine::backend::StepTokens;
use crate::engine::pager::{BLOCK_TOKENS, KvShape};
use crate::model::config::{Config, Mlp, Quantization};

/// Generated tokens of one step, at most.
pub const GENERATED_ROWS_MAX: u32 = 64;

/// Generated tokens that a step has room for, at least: a sequence that is replayed brings several at once.
const GENERATED_ROWS_MIN: u32 = 8;

/// What the driver takes for its context (measured: 518 MiB), the modules and the recorded graphs.
const RESERVE: Bytes = Bytes(600 << 20);

const F32: u64 = 4;
const BF16: u64 = 2;

/// Bytes of a model's weights by part, as they are stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightSizes {
    /// The embedding; 0 for a tied head, which is the embedding and counts as `lm_head`.
    pub embedding: u64,
    /// The output matrix and the norm in front of it.
    pub lm_head: u64,
    /// The layers, first to last.
    pub layers: Vec<LayerSizes>,
    /// Whether the output matrix is the embedding.
    pub is_tied: bool,
}

/// Bytes of one layer's weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerSizes {
    /// Projections of the attention, router or dense network, norms, sinks, and the biases of those.
    pub attention: u64,
    /// Both matrices of all experts, or the network of a dense model, and their biases.
    pub mlp: u64,
}

impl WeightSizes {
    /// Gives the bytes of all weights together.
    #[must_use]
    pub fn bytes(&self) -> Bytes {
        let layers: u64 = self.layers.iter().map(|layer| layer.attention + layer.mlp).sum();
        Bytes(layers + self.embedding + self.lm_head)
    }
}

/// What a plan must stay within.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CardLimits {
    /// What the worker may hold on the card.
    pub budget: Bytes,
    /// What the host could give without swapping.
    pub host_available: Bytes,
}

/// What a worker will hold on a card and beside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CardPlan {
    /// Tokens of one sequence.
    pub context_tokens: u32,
    /// The model's own context, where memory forced a smaller one.
    pub context_given_up: Option<u32>,
    /// Sequences in one batch.
    pub sequences: u32,
    /// Blocks of the KV cache for layers that see the whole context.
    pub full_blocks: u32,
    /// Prompt tokens of a step.
    pub step_tokens: u32,
    /// How keys and values are kept.
    pub kv_type: KvType,
    /// Whether the embedding is on the card. Always so for a tied head.
    pub is_embedding_on_card: bool,
    /// For each layer whether its experts, or its dense network, stay on the host.
    pub host_layers: Vec<bool>,
    /// The last so many layers are on the host altogether.
    pub whole_layers: usize,
    /// Weights on the card.
    pub weights_card: Bytes,
    /// Weights in the host's memory.
    pub weights_host: Bytes,
    /// Keys and values: `full_blocks`, and the blocks of sliding layers that `sequences` and the step call for.
    pub kv: Bytes,
    /// Keys and values of whole layers on the host: as many blocks.
    pub kv_host: Bytes,
    /// The buffers of a step.
    pub scratch: Bytes,
    /// For the driver's context, the modules and the graphs.
    pub reserve: Bytes,
    /// Pinned host memory for preempted sequences.
    pub swap: Bytes,
    /// What was given up to fit, in the order of this module's page.
    pub given_up: Vec<GivenUp>,
}

/// A wish that a plan gave up to fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GivenUp {
    /// Fewer sequences run at once.
    Sequences {
        /// As asked for.
        from: u32,
        /// As planned.
        to: u32,
    },
    /// The context is smaller.
    Context {
        /// The model's.
        from: u32,
        /// As planned.
        to: u32,
    },
    /// Prompts are taken in smaller steps.
    StepTokens {
        /// The usual.
        from: u32,
        /// As planned.
        to: u32,
    },
    /// The embedding stays on the host.
    EmbeddingOnHost,
    /// Experts, or dense networks, stay on the host.
    MlpsOnHost {
        /// What a layer has of them.
        what: &'static str,
        /// The layers whose those are.
        layers: u32,
        /// The model's layers.
        of: u32,
        /// What they take.
        bytes: Bytes,
    },
    /// Layers are on the host with their attention, keys and values.
    LayersOnHost {
        /// How many.
        layers: u32,
        /// The model's layers.
        of: u32,
    },
}

impl fmt::Display for GivenUp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            GivenUp::Sequences { from, to } => write!(f, "{to} sequences at once instead of {from}"),
            GivenUp::Context { from, to } => write!(f, "a context of {to} tokens instead of {from}"),
            GivenUp::StepTokens { from, to } => write!(f, "prompt steps of {to} tokens instead of {from}"),
            GivenUp::EmbeddingOnHost => write!(f, "the embedding on the host"),
            GivenUp::MlpsOnHost { what, layers, of, bytes: _ } => {
                write!(f, "the {what} of {layers} of {of} layers on the host")
            }
            GivenUp::LayersOnHost { layers, of } => write!(f, "{layers} of {of} layers on the host altogether"),
        }
    }
}

impl CardPlan {
    /// Gives what the worker will hold on the card in all.
    #[must_use]
    pub fn card_bytes(&self) -> Bytes {
        Bytes(self.weights_card.0 + self.kv.0 + self.scratch.0 + self.reserve.0)
    }

    /// Gives the largest step: its buffers, and the blocks of the windows, have room for no more.
    #[must_use]
    pub fn step(&self) -> StepTokens {
        step(self.sequences, self.step_tokens)
    }

    /// States the plan as facts for the supervisor.
    #[must_use]
    pub fn facts(&self, config: &Config, device: String, quantization: &str) -> Facts {
        Facts {
            context_tokens: self.context_tokens,
            block_tokens: BLOCK_TOKENS,
            blocks: self.full_blocks,
            vocabulary: u32::try_from(config.vocab_size).unwrap_or(u32::MAX),
            memory: vec![
                (MemoryKind::Weights, self.weights_card),
                (MemoryKind::HostWeights, self.weights_host),
                (MemoryKind::KvCache, self.kv),
                (MemoryKind::HostKvCache, self.kv_host),
                (MemoryKind::Scratch, self.scratch),
                (MemoryKind::Reserve, self.reserve),
                (MemoryKind::Swap, self.swap),
            ],
            device,
            quantization: quantization.to_owned(),
            given_up: self.given_up.iter().map(GivenUp::to_string).collect(),
        }
    }
}

/// Gives the largest step of so many sequences and prompt tokens.
fn step(sequences: u32, prompt: u32) -> StepTokens {
    StepTokens { generated: sequences.clamp(GENERATED_ROWS_MIN, GENERATED_ROWS_MAX), prompt }
}

/// Gives the bytes of one block of one layer on a card. Source: kernels/kv.cuh, `block_bytes`.
#[must_use]
pub fn layer_block_bytes(shape: &KvShape, kv_type: KvType) -> u64 {
    let dim = shape.head_dim as u64;
    let element_bytes = match kv_type {
        KvType::Bf16 => dim * BF16,
        KvType::Int8 => dim + F32,
    };
    2 * shape.kv_heads as u64 * u64::from(BLOCK_TOKENS) * element_bytes
}

/// Gives the bytes of the buffers of a step of so many rows of either role.
#[must_use]
pub fn scratch_bytes_card(config: &Config, generated_rows: u32, prompt_rows: u32, context_tokens: u32) -> u64 {
    Scratch::new(config, StepSize { generated_rows, prompt_rows, context_tokens }).bytes.0
}

/// Gives the sizes of a model's weights from its configuration alone. `None`: all in bf16.
///
/// Embedding, output matrix and router are bf16 in every format; the attention is 4-bit in NF4 files and bf16 in MXFP4
/// ones; biases, norms and sinks (or what stands in for them) count as f32, which the worker makes of them.
#[must_use]
pub fn sizes_of(config: &Config, quantization: Option<Quantization>) -> WeightSizes {
    let hidden = config.hidden_size as u64;
    let (query, kv) = (config.query_width() as u64, config.kv_width() as u64);
    let attention_form = quantization.filter(|form| *form == Quantization::Nf4);
    let projections = [(query, hidden), (kv, hidden), (kv, hidden), (hidden, query)];
    let matrices: u64 = projections.iter().map(|(rows, cols)| matrix_bytes(attention_form, *rows, *cols)).sum();
    let biases = if config.has_attention_bias { query + 2 * kv + hidden } else { 0 };
    let floats = biases + config.heads as u64 + 2 * hidden;
    let attention = matrices + F32 * floats;
    let layer = match config.mlp {
        Mlp::Experts(experts) => {
            let (count, inter) = (experts.count as u64, experts.intermediate_size as u64);
            let expert = matrix_bytes(quantization, 2 * inter, hidden) + matrix_bytes(quantization, hidden, inter);
            LayerSizes {
                attention: attention + BF16 * count * hidden + F32 * count,
                mlp: count * (expert + F32 * (2 * inter + hidden)),
            }
        }
        Mlp::Dense(dense) => {
            let inter = dense.intermediate_size as u64;
            let network = 2 * matrix_bytes(quantization, inter, hidden) + matrix_bytes(quantization, hidden, inter);
            let biases = if dense.has_bias { F32 * (2 * inter + hidden) } else { 0 };
            LayerSizes { attention, mlp: network + biases }
        }
    };
    let head = BF16 * config.vocab_size as u64 * hidden;
    WeightSizes {
        embedding: if config.has_tied_embeddings { 0 } else { head },
        lm_head: head + F32 * hidden,
        layers: vec![layer; config.layers.len()],
        is_tied: config.has_tied_embeddings,
    }
}

/// Gives the sizes of the weights of a checkpoint, from its headers.
///
/// # Errors
/// `MissingTensor` cannot be: only tensors that are there are asked for.
pub fn sizes_in(checkpoint: &Checkpoint, config: &Config) -> Result<WeightSizes, CheckpointError> {
    let layers = vec![LayerSizes::default(); config.layers.len()];
    let mut sizes = WeightSizes { embedding: 0, lm_head: 0, layers, is_tied: config.has_tied_embeddings };
    for name in checkpoint.names() {
        let tensor = checkpoint.tensor(name)?;
        let is_vector = ["bias", "norm.weight", "sinks"].iter().any(|end| name.ends_with(end));
        let elements = || tensor.shape().iter().map(|length| *length as u64).product::<u64>();
        let bytes = if is_vector { F32 * elements() } else { tensor.region().len() as u64 };
        let in_layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        match in_layer.and_then(|(layer, part)| Some((layer.parse::<usize>().ok()?, part))) {
            // A load refuses layers that the configuration does not count.
            Some((layer, part)) => match sizes.layers.get_mut(layer) {
                Some(sizes) if part.starts_with("mlp.") && !part.starts_with("mlp.router.") => sizes.mlp += bytes,
                Some(sizes) => sizes.attention += bytes,
                None => {}
            },
            None if name == "model.embed_tokens.weight" && config.has_tied_embeddings => sizes.lm_head += bytes,
            None if name == "model.embed_tokens.weight" => sizes.embedding += bytes,
            // A tied head that the file repeats is not loaded.
            None if name == "lm_head.weight" && config.has_tied_embeddings => {}
            None => sizes.lm_head += bytes,
        }
    }
    Ok(sizes)
}

/// The bytes of a matrix. NF4: codes, a byte for each 64, an f32 for each 256 of those, and a table of 256 f32.
fn matrix_bytes(form: Option<Quantization>, rows: u64, cols: u64) -> u64 {
    match form {
        None => BF16 * rows * cols,
        Some(Quantization::Mxfp4) => rows * cols.div_ceil(32) * (16 + 1),
        Some(Quantization::Nf4) => {
            let blocks = (rows * cols).div_ceil(64);
            (rows * cols).div_ceil(2) + blocks + F32 * blocks.div_ceil(256) + F32 * 256
        }
    }
}

/// Plans the memory of a model on a card.
///
/// # Errors
/// `ContextBeyondModel`; `ContextTooLarge` when `kv_bytes` of the load plan has no room for one context; `CardTooSmall` and
/// `HostTooSmall` when nothing that may be given up is left.
pub fn plan_card(
    config: &Config,
    sizes: &WeightSizes,
    asked: &LoadPlan,
    kv_type: KvType,
    limits: CardLimits,
) -> Result<CardPlan, PlanError> {
    let planner = Planner::new(config, sizes, asked, kv_type, limits)?;
    planner.finish(planner.search().ok_or_else(|| planner.too_small())?)
}

#[cfg(test)]
mod tests;

//! What config.json says about a model, checked.
//!
//! Owns: the architectures that are supported, and both styles of keys that transformers has written (`rope_theta` and
//! `rope_scaling`, or `rope_parameters`).
//! Refuses: other architectures, values that no model can have, and keys that contradict each other.
//! Invariant: the dimensions of a `Config` are at least 1 and within `limits`, so that their products do not overflow.
//!
//! Source: transformers 5, `configuration_gpt_oss.py` and `configuration_llama.py`; openai/gpt-oss, `torch/model.py`
//! (`ModelConfig`).

mod raw;

use std::path::Path;

use super::limits;
use super::rope::Rope;
use crate::checkpoint::limits::CONFIG_BYTES_MAX;
use crate::checkpoint::{CheckpointError, read_limited};
use raw::Checker;

/// The file in a model folder.
pub const CONFIG_FILE: &str = "config.json";

/// A model's dimensions and constants.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Whose formulas and tensor names these are.
    pub architecture: Architecture,
    /// Rows of embedding and output matrix; may exceed the tokenizer's entries.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// The kind of attention of each layer.
    pub layers: Vec<LayerKind>,
    /// Query heads. Bounds: a multiple of `kv_heads`.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head. Bounds: even.
    pub head_dim: usize,
    /// What follows the attention in each layer.
    pub mlp: Mlp,
    /// Positions that the model can have. Units: tokens.
    pub context_tokens: usize,
    /// Added to the mean square in every norm.
    pub norm_eps: f32,
    /// Whether the four attention projections have biases.
    pub has_attention_bias: bool,
    /// Whether each query head has a learned logit that takes part in the softmax.
    pub has_sinks: bool,
    /// Whether the output matrix is the embedding.
    pub has_tied_embeddings: bool,
    /// How positions are encoded.
    pub rope: Rope,
    /// Tokens that end a generation.
    pub eos_tokens: Vec<u32>,
    /// The token that a text starts with.
    pub bos_token: Option<u32>,
    /// The 4-bit format that the file claims for its weights.
    pub quantization: Option<Quantization>,
}

/// An architecture that is supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// OpenAI's gpt-oss: experts, sinks, sliding layers.
    GptOss,
    /// Llama 2 and 3, and what shares their form.
    Llama,
}

impl Architecture {
    /// Every architecture.
    pub const ALL: [Architecture; 2] = [Architecture::GptOss, Architecture::Llama];

    /// Gives the value of `model_type` in config.json.
    #[must_use]
    pub const fn model_type(self) -> &'static str {
        match self {
            Architecture::GptOss => "gpt_oss",
            Architecture::Llama => "llama",
        }
    }

    /// Gives the name of the class in transformers that computes logits.
    #[must_use]
    pub const fn class(self) -> &'static str {
        match self {
            Architecture::GptOss => "GptOssForCausalLM",
            Architecture::Llama => "LlamaForCausalLM",
        }
    }
}

/// What follows the attention in a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mlp {
    /// A router and experts.
    Experts(ExpertsConfig),
    /// One network for every token.
    Dense(DenseConfig),
}

/// The experts of each layer of a gpt-oss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertsConfig {
    /// Experts of each layer.
    pub count: usize,
    /// Experts that each token goes through. Bounds: 1 to `count`.
    pub per_token: usize,
    /// Width of an expert between its two matrices.
    pub intermediate_size: usize,
    /// Where gate and up of an expert are clamped.
    pub swiglu_limit: f32,
    /// The factor in the gate's sigmoid.
    pub swiglu_alpha: f32,
}

/// The network of each layer of a dense model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DenseConfig {
    /// Width between its matrices.
    pub intermediate_size: usize,
    /// Whether its three matrices have biases.
    pub has_bias: bool,
}

/// The kind of attention of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerKind {
    /// Only the last keys.
    Sliding {
        /// How many, the query's own included. Units: tokens.
        window: usize,
    },
    /// Every earlier key.
    Full,
}

/// A 4-bit format that config.json can name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantization {
    /// As gpt-oss is published.
    Mxfp4,
    /// bitsandbytes' NF4, one linear at a time or fused.
    Nf4,
}

impl Quantization {
    /// Gives the name, for people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Quantization::Mxfp4 => "mxfp4",
            Quantization::Nf4 => "nf4",
        }
    }
}

/// Why a config.json describes no model that can be served.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read, or is too large.
    #[error(transparent)]
    File(#[from] CheckpointError),
    /// The file is not the JSON that it must be.
    #[error("{file}: malformed: {source}")]
    Json {
        /// The file.
        file: String,
        /// What the JSON reader found.
        source: serde_json::Error,
    },
    /// A field is missing that has no default.
    #[error("{file}: {field} is missing")]
    Missing {
        /// The file.
        file: String,
        /// The field.
        field: &'static str,
    },
    /// A field asks for something that is not built.
    #[error("{file}: {field} {found:?} is not supported, only {supported}")]
    NotSupported {
        /// The file.
        file: String,
        /// The field.
        field: &'static str,
        /// What it says.
        found: String,
        /// What would be.
        supported: &'static str,
    },
    /// A field has a value that no model can have.
    #[error("{file}: {field} is {found}, expected {expected}")]
    Invalid {
        /// The file.
        file: String,
        /// The field.
        field: &'static str,
        /// What it says.
        found: String,
        /// What could be.
        expected: String,
    },
    /// Two fields contradict each other.
    #[error("{file}: {field} is {found} but {other} is {other_found}")]
    Contradiction {
        /// The file.
        file: String,
        /// One field.
        field: &'static str,
        /// What it says.
        found: String,
        /// The other.
        other: &'static str,
        /// What that says.
        other_found: String,
    },
}

impl Config {
    /// Reads the config.json of a model folder.
    ///
    /// # Errors
    /// Each variant of `ConfigError`.
    pub fn read(folder: &Path) -> Result<Config, ConfigError> {
        let path = folder.join(CONFIG_FILE);
        let bytes = read_limited(&path, CONFIG_BYTES_MAX)?;
        Config::parse(&bytes, &path.display().to_string())
    }

    /// Reads the bytes of a config.json; `file` is its name for errors.
    ///
    /// # Errors
    /// Each variant of `ConfigError` but `File`.
    pub fn parse(bytes: &[u8], file: &str) -> Result<Config, ConfigError> {
        let raw = serde_json::from_slice(bytes);
        let raw = raw.map_err(|source| ConfigError::Json { file: file.to_owned(), source })?;
        Checker { file, raw: &raw }.config()
    }

    /// Gives the number of keys that a layer's queries see; `None` for all.
    ///
    /// # Panics
    /// When there are not so many layers.
    #[must_use]
    pub fn window(&self, layer: usize) -> Option<usize> {
        match self.layers[layer] {
            LayerKind::Sliding { window } => Some(window),
            LayerKind::Full => None,
        }
    }

    /// Gives the experts of each layer; `None` for a dense model.
    #[must_use]
    pub fn experts(&self) -> Option<&ExpertsConfig> {
        match &self.mlp {
            Mlp::Experts(experts) => Some(experts),
            Mlp::Dense(_) => None,
        }
    }

    /// Gives the width of all query heads together.
    #[must_use]
    pub fn query_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Gives the width of all key heads, or of all value heads, together.
    #[must_use]
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

#[cfg(test)]
mod tests;

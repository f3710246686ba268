//! From the loose JSON of config.json to a `Config`: every check, one field at a time.

mod rope;

use std::collections::HashMap;
use std::fmt;

use bulkhead_shared::limits::CONTEXT_TOKENS_MAX;
use serde::Deserialize;

use super::limits::{EOS_TOKENS_MAX, EXPERTS_MAX, HEAD_DIM_MAX, HEADS_MAX, LAYERS_MAX, VOCABULARY_MAX, WIDTH_MAX};
use super::{Architecture, Config, ConfigError, DenseConfig, ExpertsConfig, LayerKind, Mlp, Quantization};

/// Constants of gpt-oss that config.json may leave out.
const SWIGLU_LIMIT: f64 = 7.0;
const SWIGLU_ALPHA: f64 = 1.702;
const SLIDING_WINDOW: u64 = 128;

/// The context of a Llama whose config.json leaves it out. Units: tokens.
const LLAMA_CONTEXT: u64 = 2048;

const CONTEXT_MAX: usize = CONTEXT_TOKENS_MAX as usize;

#[derive(Deserialize)]
pub(super) struct RawConfig {
    model_type: Option<String>,
    architectures: Option<Vec<String>>,
    vocab_size: Option<u64>,
    hidden_size: Option<u64>,
    intermediate_size: Option<u64>,
    num_hidden_layers: Option<u64>,
    layer_types: Option<Vec<String>>,
    num_attention_heads: Option<u64>,
    num_key_value_heads: Option<u64>,
    head_dim: Option<u64>,
    num_local_experts: Option<u64>,
    num_experts: Option<u64>,
    num_experts_per_tok: Option<u64>,
    experts_per_token: Option<u64>,
    sliding_window: Option<u64>,
    max_position_embeddings: Option<u64>,
    initial_context_length: Option<u64>,
    rms_norm_eps: Option<f64>,
    swiglu_limit: Option<f64>,
    swiglu_alpha: Option<f64>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    rope_theta: Option<f64>,
    /// Absent and null differ: absent would be transformers' default stretching, null is none.
    #[serde(default, deserialize_with = "present")]
    rope_scaling: Option<Option<RawRope>>,
    #[serde(default, deserialize_with = "present")]
    rope_parameters: Option<Option<RawRope>>,
    eos_token_id: Option<TokenIds>,
    bos_token_id: Option<u64>,
    quantization_config: Option<RawQuantization>,
}

#[derive(Default, Deserialize)]
struct RawRope {
    rope_type: Option<String>,
    /// The key before `rope_type`.
    #[serde(rename = "type")]
    old_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    beta_fast: Option<f64>,
    beta_slow: Option<f64>,
    original_max_position_embeddings: Option<u64>,
    truncate: Option<bool>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    attention_factor: Option<f64>,
    #[serde(flatten)]
    others: HashMap<String, serde_json::Value>,
}

#[derive(Deserialize)]
struct RawQuantization {
    quant_method: Option<String>,
    load_in_8bit: Option<bool>,
    bnb_4bit_quant_type: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum TokenIds {
    One(u64),
    Many(Vec<u64>),
}

fn present<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de>,
{
    T::deserialize(deserializer).map(Some)
}

/// Turns a raw config into a checked one; `file` is its name for errors.
pub(super) struct Checker<'c> {
    pub(super) file: &'c str,
    pub(super) raw: &'c RawConfig,
}

impl Checker<'_> {
    pub(super) fn config(&self) -> Result<Config, ConfigError> {
        let raw = self.raw;
        let architecture = self.architecture()?;
        let is_llama = architecture == Architecture::Llama;
        let hidden_size = self.count("hidden_size", raw.hidden_size, WIDTH_MAX)?;
        let (heads, kv_heads, head_dim) = self.heads(architecture, hidden_size)?;
        let vocab_size = self.count("vocab_size", raw.vocab_size, VOCABULARY_MAX)?;
        let context = raw.max_position_embeddings.or(is_llama.then_some(LLAMA_CONTEXT));
        let norm_eps = if is_llama { 1e-6 } else { 1e-5 };
        Ok(Config {
            architecture,
            vocab_size,
            hidden_size,
            mlp: self.mlp(architecture)?,
            layers: self.layers(architecture)?,
            heads,
            kv_heads,
            head_dim,
            context_tokens: self.count("max_position_embeddings", context, CONTEXT_MAX)?,
            norm_eps: self.positive("rms_norm_eps", raw.rms_norm_eps.unwrap_or(norm_eps))? as f32,
            has_attention_bias: raw.attention_bias.unwrap_or(!is_llama),
            has_sinks: !is_llama,
            has_tied_embeddings: raw.tie_word_embeddings.unwrap_or(false),
            rope: self.rope(architecture, head_dim)?,
            eos_tokens: self.eos_tokens(vocab_size)?,
            bos_token: raw.bos_token_id.map(|id| self.token("bos_token_id", id, vocab_size)).transpose()?,
            quantization: self.quantization()?,
        })
    }

    fn architecture(&self) -> Result<Architecture, ConfigError> {
        let model_type = self.required("model_type", self.raw.model_type.as_deref())?;
        let known = Architecture::ALL.into_iter().find(|known| known.model_type() == model_type);
        let architecture = known.ok_or_else(|| self.not_supported("model_type", model_type, "gpt_oss and llama"))?;
        // Another head on the same body has other weights and gives no logits.
        if let Some(classes) = self.raw.architectures.as_ref().filter(|classes| !classes.is_empty())
            && !classes.iter().any(|class| class == architecture.class())
        {
            return Err(self.not_supported("architectures", &classes.join(", "), architecture.class()));
        }
        match self.raw.hidden_act.as_deref() {
            None | Some("silu") => Ok(architecture),
            Some(other) => Err(self.not_supported("hidden_act", other, "silu")),
        }
    }

    /// Reads the heads of queries, those of keys and values, and their width. A Llama may leave out the latter two.
    fn heads(&self, architecture: Architecture, hidden: usize) -> Result<(usize, usize, usize), ConfigError> {
        let (mut kv_heads, mut head_dim) = (self.raw.num_key_value_heads, self.raw.head_dim);
        let heads = self.count("num_attention_heads", self.raw.num_attention_heads, HEADS_MAX)?;
        if architecture == Architecture::Llama {
            if head_dim.is_none() && !hidden.is_multiple_of(heads) {
                let expected = format!("a divisor of hidden_size, which is {hidden}, since head_dim is left out");
                return Err(self.invalid("num_attention_heads", &heads, &expected));
            }
            kv_heads = kv_heads.or(Some(heads as u64));
            head_dim = head_dim.or(Some((hidden / heads) as u64));
        }
        let kv_heads = self.count("num_key_value_heads", kv_heads, HEADS_MAX)?;
        let head_dim = self.count("head_dim", head_dim, HEAD_DIM_MAX)?;
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of num_attention_heads, which is {heads}");
            return Err(self.invalid("num_key_value_heads", &kv_heads, &expected));
        }
        if !head_dim.is_multiple_of(2) {
            return Err(self.invalid("head_dim", &head_dim, "an even number, since positions turn pairs"));
        }
        Ok((heads, kv_heads, head_dim))
    }

    fn mlp(&self, architecture: Architecture) -> Result<Mlp, ConfigError> {
        let intermediate_size = self.count("intermediate_size", self.raw.intermediate_size, WIDTH_MAX)?;
        match architecture {
            Architecture::GptOss => Ok(Mlp::Experts(self.experts(intermediate_size)?)),
            Architecture::Llama => {
                Ok(Mlp::Dense(DenseConfig { intermediate_size, has_bias: self.raw.mlp_bias.unwrap_or(false) }))
            }
        }
    }

    fn experts(&self, intermediate_size: usize) -> Result<ExpertsConfig, ConfigError> {
        let raw = self.raw;
        let count = self.agreed(("num_local_experts", raw.num_local_experts), ("num_experts", raw.num_experts))?;
        let count = self.count("num_local_experts", count, EXPERTS_MAX)?;
        let used = self
            .agreed(("num_experts_per_tok", raw.num_experts_per_tok), ("experts_per_token", raw.experts_per_token))?;
        let used = self.count("num_experts_per_tok", used, EXPERTS_MAX)?;
        if used > count {
            let expected = format!("at most num_local_experts, which is {count}");
            return Err(self.invalid("num_experts_per_tok", &used, &expected));
        }
        Ok(ExpertsConfig {
            count,
            per_token: used,
            intermediate_size,
            swiglu_limit: self.positive("swiglu_limit", raw.swiglu_limit.unwrap_or(SWIGLU_LIMIT))? as f32,
            swiglu_alpha: self.positive("swiglu_alpha", raw.swiglu_alpha.unwrap_or(SWIGLU_ALPHA))? as f32,
        })
    }

    fn layers(&self, architecture: Architecture) -> Result<Vec<LayerKind>, ConfigError> {
        let count = self.count("num_hidden_layers", self.raw.num_hidden_layers, LAYERS_MAX)?;
        if architecture == Architecture::Llama {
            // What a Llama's config says of windows is ignored by transformers too.
            return Ok(vec![LayerKind::Full; count]);
        }
        let window = self.raw.sliding_window.or(Some(SLIDING_WINDOW));
        let sliding = LayerKind::Sliding { window: self.count("sliding_window", window, CONTEXT_MAX)? };
        let Some(kinds) = &self.raw.layer_types else {
            // Published gpt-oss alternates, sliding first; early configs leave the list out.
            return Ok((0..count).map(|i| [sliding, LayerKind::Full][i % 2]).collect());
        };
        if kinds.len() != count {
            let found = format!("a list of {}", kinds.len());
            return Err(self.contradiction(("layer_types", &found), ("num_hidden_layers", &count)));
        }
        let kind = |name: &String| match name.as_str() {
            "sliding_attention" => Ok(sliding),
            "full_attention" => Ok(LayerKind::Full),
            other => Err(self.not_supported("layer_types", other, "sliding_attention and full_attention")),
        };
        kinds.iter().map(kind).collect()
    }

    fn eos_tokens(&self, vocab_size: usize) -> Result<Vec<u32>, ConfigError> {
        const FIELD: &str = "eos_token_id";
        let ids: &[u64] = match &self.raw.eos_token_id {
            None => &[],
            Some(TokenIds::One(id)) => std::slice::from_ref(id),
            Some(TokenIds::Many(ids)) => ids,
        };
        if ids.len() > EOS_TOKENS_MAX {
            return Err(self.invalid(FIELD, &format!("a list of {}", ids.len()), &format!("at most {EOS_TOKENS_MAX}")));
        }
        ids.iter().map(|id| self.token(FIELD, *id, vocab_size)).collect()
    }

    fn token(&self, field: &'static str, id: u64, vocab_size: usize) -> Result<u32, ConfigError> {
        let token = u32::try_from(id).ok().filter(|token| (*token as usize) < vocab_size);
        token.ok_or_else(|| self.invalid(field, &id, &format!("below vocab_size, which is {vocab_size}")))
    }

    fn quantization(&self) -> Result<Option<Quantization>, ConfigError> {
        let Some(raw) = &self.raw.quantization_config else { return Ok(None) };
        match self.required("quantization_config.quant_method", raw.quant_method.as_deref())? {
            "mxfp4" => Ok(Some(Quantization::Mxfp4)),
            "bitsandbytes" => {
                if raw.load_in_8bit == Some(true) {
                    return Err(self.not_supported("quantization_config", "load_in_8bit", "load_in_4bit with nf4"));
                }
                match raw.bnb_4bit_quant_type.as_deref() {
                    None | Some("nf4") => Ok(Some(Quantization::Nf4)),
                    Some(other) => Err(self.not_supported("bnb_4bit_quant_type", other, "nf4")),
                }
            }
            other => Err(self.not_supported("quant_method", other, "mxfp4 and bitsandbytes")),
        }
    }

    fn required<T>(&self, field: &'static str, value: Option<T>) -> Result<T, ConfigError> {
        value.ok_or_else(|| self.missing(field))
    }

    /// Reads a dimension: present, at least 1, at most `max`.
    fn count(&self, field: &'static str, value: Option<u64>, max: usize) -> Result<usize, ConfigError> {
        let value = self.required(field, value)?;
        let count = usize::try_from(value).ok().filter(|count| (1..=max).contains(count));
        count.ok_or_else(|| self.invalid(field, &value, &format!("1 to {max}")))
    }

    /// Checks a constant that must survive as f32: finite there, and above zero.
    fn positive(&self, field: &'static str, value: f64) -> Result<f64, ConfigError> {
        if (value as f32).is_finite() && value as f32 > 0.0 {
            return Ok(value);
        }
        Err(self.invalid(field, &value, "a finite number above 0"))
    }

    /// Takes whichever of two names for one thing is there; both may be, if they agree.
    fn agreed<T: PartialEq + Copy + fmt::Display>(
        &self,
        (field, value): (&'static str, Option<T>),
        (other, other_value): (&'static str, Option<T>),
    ) -> Result<Option<T>, ConfigError> {
        match (value, other_value) {
            (Some(value), Some(other_value)) if value != other_value => {
                Err(self.contradiction((field, &value), (other, &other_value)))
            }
            _ => Ok(value.or(other_value)),
        }
    }

    fn missing(&self, field: &'static str) -> ConfigError {
        ConfigError::Missing { file: self.file.to_owned(), field }
    }

    fn not_supported(&self, field: &'static str, found: &str, supported: &'static str) -> ConfigError {
        ConfigError::NotSupported { file: self.file.to_owned(), field, found: found.to_owned(), supported }
    }

    fn invalid(&self, field: &'static str, found: &dyn fmt::Display, expected: &str) -> ConfigError {
        let (found, expected) = (found.to_string(), expected.to_owned());
        ConfigError::Invalid { file: self.file.to_owned(), field, found, expected }
    }

    fn contradiction(
        &self,
        (field, found): (&'static str, &dyn fmt::Display),
        (other, other_found): (&'static str, &dyn fmt::Display),
    ) -> ConfigError {
        let (found, other_found) = (found.to_string(), other_found.to_string());
        ConfigError::Contradiction { file: self.file.to_owned(), field, found, other, other_found }
    }
}

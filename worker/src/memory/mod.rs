//! The plan: what goes where in memory, decided before the first allocation. Pure but for the readers of /proc and /sys.
//!
//! Here is the plan for the processor; `card` makes the one for a CUDA card.

pub mod card;
pub mod pages;
pub mod scratch;

use bulkhead_shared::limits::{CONTEXT_TOKENS_MAX, WORKER_REQUESTS_MAX};
use bulkhead_shared::message::{Facts, KvType, LoadPlan, MemoryKind};
use bulkhead_shared::units::Bytes;

use crate::engine::backend::StepTokens;
use crate::engine::pager::{BLOCK_TOKENS, KvShape};
use crate::model::config::Config;
use crate::model::decoder::Decoder;

/// Sequences in a batch when the supervisor leaves it open.
const SEQUENCES_DEFAULT: u32 = 8;

/// The share of the free memory, weights taken off, that the KV cache gets when its size is left open: one half.
const KV_SHARE: u64 = 2;

/// The smallest context that is worth serving when memory does not allow the model's own.
const CONTEXT_TOKENS_MIN: u32 = 1024;

/// What a worker will hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Tokens of one sequence.
    pub context_tokens: u32,
    /// The model's own context, where memory forced a smaller one.
    pub context_given_up: Option<u32>,
    /// Sequences in one batch.
    pub sequences: u32,
    /// Blocks of the KV cache for layers that see the whole context.
    pub full_blocks: u32,
    /// Bytes of the weights.
    pub weights: Bytes,
    /// Bytes of the KV cache.
    pub kv: Bytes,
    /// Bytes of the activations of one step.
    pub scratch: Bytes,
}

/// Why a plan cannot be made.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// More context was asked for than the model has.
    #[error("context_tokens is {asked}, but the model's context is {model}: set it to at most {model}")]
    ContextBeyondModel {
        /// The setting.
        asked: u32,
        /// The model's.
        model: u32,
    },
    /// Nothing is left beside the weights.
    #[error(
        "{weights} of weights and {scratch} for a step leave nothing of the {available} of memory that can be had: \
         give more memory, or serve a smaller model"
    )]
    WeightsTooLarge {
        /// The weights.
        weights: Bytes,
        /// The activations of one step.
        scratch: Bytes,
        /// What there is.
        available: Bytes,
    },
    /// One whole context does not fit.
    #[error(
        "a context of {context} tokens needs {needed} of KV cache, and {granted} can be had: \
         set context_tokens to at most {fits}, or give more memory"
    )]
    ContextTooLarge {
        /// The context in tokens.
        context: u32,
        /// What it needs.
        needed: Bytes,
        /// What there is.
        granted: Bytes,
        /// The context that would fit.
        fits: u32,
    },
    /// Keys and values of this type are for a card alone.
    #[error("kv_cache_type {} is for a CUDA card: on the processor set it to {}", .0.as_str(), KvType::Bf16.as_str())]
    KvTypeOnProcessor(KvType),
    /// Even with all layers but one on the host, what must be on the card is more than may be held there.
    #[error("{}", card_too_small(*.context, *.needed, *.budget, *.fits))]
    CardTooSmall {
        /// The context in tokens that this was worked out for.
        context: u32,
        /// What that would need on the card at the least.
        needed: Bytes,
        /// What may be held there.
        budget: Bytes,
        /// The context that would fit; 0 for none.
        fits: u32,
    },
    /// What does not go on the card does not fit beside it either.
    #[error(
        "{needed} of the model have no place on a card of which {budget} may be used, and the host has {available} for them: \
         free host memory, or use a card with {needed} more"
    )]
    HostTooSmall {
        /// The weights that stay on the host, and one context of the layers there.
        needed: Bytes,
        /// What the host has.
        available: Bytes,
        /// What may be held on the card.
        budget: Bytes,
    },
}

fn card_too_small(context: u32, needed: Bytes, budget: Bytes, fits: u32) -> String {
    let fault = format!(
        "a context of {context} tokens needs at least {needed} on the card with all but one layer on the host, and {budget} may be used: "
    );
    match fits {
        0 => fault + "give the device more memory, or compute on the processor",
        _ => fault + &format!("set context_tokens to at most {fits}, or give the device more memory"),
    }
}

/// Plans the memory of a model on the processor.
///
/// # Errors
/// See `PlanError`. A context that the supervisor left open is made smaller to fit, and the plan says so.
pub fn plan(config: &Config, weights: Bytes, asked: &LoadPlan, available: Bytes) -> Result<MemoryPlan, PlanError> {
    if asked.kv_type != KvType::Bf16 {
        return Err(PlanError::KvTypeOnProcessor(asked.kv_type));
    }
    let context = context_asked(config, asked)?;
    let sequences = sequences_asked(asked);
    let shape = KvShape::of(config);
    let windows = shape.window_bytes(sequences, StepTokens::CPU.sum());
    let block = shape.full_block_bytes();
    let scratch = Bytes(Decoder::scratch_bytes(config, u64::from(StepTokens::CPU.sum())));
    let granted = match asked.kv_bytes.0 {
        0 => match available.0.saturating_sub(weights.0.saturating_add(scratch.0)) {
            0 => return Err(PlanError::WeightsTooLarge { weights, scratch, available }),
            left => Bytes(left / KV_SHARE),
        },
        bytes => Bytes(bytes),
    };
    let blocks_granted = granted.0.saturating_sub(windows).checked_div(block).unwrap_or(u64::MAX);
    let blocks_of = |tokens: u32| u64::from(tokens.div_ceil(BLOCK_TOKENS));
    let fits = u32::try_from(blocks_granted.saturating_mul(u64::from(BLOCK_TOKENS))).unwrap_or(u32::MAX);
    let (context, given_up) = match blocks_of(context) <= blocks_granted {
        true => (context, None),
        false if asked.context_tokens == 0 && fits >= CONTEXT_TOKENS_MIN => (fits, Some(context)),
        false => {
            let needed = Bytes(blocks_of(context) * block + windows);
            return Err(PlanError::ContextTooLarge { context, needed, granted, fits });
        }
    };
    let full_blocks = blocks_granted.min(blocks_of(context) * u64::from(sequences));
    Ok(MemoryPlan {
        context_tokens: context,
        context_given_up: given_up,
        sequences,
        full_blocks: u32::try_from(full_blocks).unwrap_or(u32::MAX),
        weights,
        kv: Bytes(full_blocks * block + windows),
        scratch,
    })
}

/// Gives the context that a plan starts from: what was asked for, or the model's own.
fn context_asked(config: &Config, asked: &LoadPlan) -> Result<u32, PlanError> {
    let model = u32::try_from(config.context_tokens).unwrap_or(u32::MAX).min(CONTEXT_TOKENS_MAX);
    match asked.context_tokens {
        0 => Ok(model),
        tokens if tokens > model => Err(PlanError::ContextBeyondModel { asked: tokens, model }),
        tokens => Ok(tokens),
    }
}

fn sequences_asked(asked: &LoadPlan) -> u32 {
    match asked.sequences_max {
        0 => SEQUENCES_DEFAULT,
        count => count.min(WORKER_REQUESTS_MAX as u32),
    }
}

impl MemoryPlan {
    /// States the plan as facts for the supervisor.
    #[must_use]
    pub fn facts(&self, config: &Config, device: String, quantization: &str) -> Facts {
        Facts {
            context_tokens: self.context_tokens,
            block_tokens: BLOCK_TOKENS,
            blocks: self.full_blocks,
            vocabulary: u32::try_from(config.vocab_size).unwrap_or(u32::MAX),
            memory: vec![
                (MemoryKind::Weights, self.weights),
                (MemoryKind::KvCache, self.kv),
                (MemoryKind::Scratch, self.scratch),
            ],
            device,
            quantization: quantization.to_owned(),
            given_up: self.given_up(),
        }
    }

    /// Says what was given up for want of memory, for people.
    #[must_use]
    pub fn given_up(&self) -> Vec<String> {
        let context = |from| card::GivenUp::Context { from, to: self.context_tokens }.to_string();
        self.context_given_up.map(context).into_iter().collect()
    }
}

/// Reads how much memory the system could give without swapping. `None` where /proc does not say.
#[must_use]
pub fn available_memory() -> Option<Bytes> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    field(&text, "MemAvailable:")
}

/// What this process has in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resident {
    /// The most that it ever had, touched pages of mapped files included.
    pub peak: Bytes,
    /// What is not backed by a file, now.
    pub anonymous: Bytes,
}

/// Reads what this process has in memory. `None` where /proc does not say.
#[must_use]
pub fn resident() -> Option<Resident> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    Some(Resident { peak: field(&text, "VmHWM:")?, anonymous: field(&text, "RssAnon:")? })
}

/// Reads the size of the processor's largest cache. `None` where /sys does not say.
#[must_use]
pub fn last_level_cache() -> Option<Bytes> {
    let levels = std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    let size = |level: std::fs::DirEntry| {
        let text = std::fs::read_to_string(level.path().join("size")).ok()?;
        let kib: u64 = text.trim().strip_suffix('K')?.parse().ok()?;
        Some(Bytes(kib.checked_mul(1024)?))
    };
    levels.filter_map(Result::ok).filter_map(size).max()
}

/// Finds a size of the form `Name:  123 kB`.
fn field(text: &str, name: &str) -> Option<Bytes> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(Bytes(kib.checked_mul(1024)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The dimensions of gpt-oss-20b, whose figures are published.
    fn config() -> Config {
        let layers: Vec<String> =
            (0..24).map(|i| if i % 2 == 0 { "\"sliding_attention\"" } else { "\"full_attention\"" }.into()).collect();
        let text = format!(
            r#"{{"model_type": "gpt_oss", "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
            "num_hidden_layers": 24, "layer_types": [{}], "num_attention_heads": 64, "num_key_value_heads": 8,
            "head_dim": 64, "num_local_experts": 32, "num_experts_per_tok": 4, "sliding_window": 128,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 150000.0,
            "attention_bias": true, "tie_word_embeddings": false, "eos_token_id": 200002,
            "rope_scaling": {{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 4096, "truncate": false}}}}"#,
            layers.join(",")
        );
        Config::parse(text.as_bytes(), "config.json").expect("a whole configuration")
    }

    fn asked(context_tokens: u32, sequences_max: u32, kv_bytes: u64) -> LoadPlan {
        LoadPlan {
            model_dir: "/models/20b".into(),
            device: bulkhead_shared::message::DeviceChoice::Cpu,
            may_use_processor: false,
            context_tokens,
            sequences_max,
            kv_bytes: Bytes(kv_bytes),
            device_budget: Bytes(0),
            kv_type: KvType::Bf16,
            faults: bulkhead_shared::message::Faults::default(),
        }
    }

    const GIB: u64 = 1 << 30;

    #[test]
    fn a_token_of_the_20b_takes_24576_bytes_in_its_whole_context_layers() {
        let plan = plan(&config(), Bytes(12 * GIB), &asked(131_072, 1, 0), Bytes(64 * GIB)).expect("fits");
        let windows = KvShape::of(&config()).window_bytes(1, StepTokens::CPU.sum());
        assert_eq!(plan.kv.0 - windows, 24_576 * 131_072);
        assert_eq!((plan.context_tokens, plan.full_blocks), (131_072, 4096));
    }

    #[test]
    fn a_context_that_was_left_open_shrinks_to_fit_and_says_so() {
        let plan = plan(&config(), Bytes(12 * GIB), &asked(0, 4, 0), Bytes(16 * GIB)).expect("a smaller context fits");
        assert_eq!(plan.context_given_up, Some(131_072));
        assert!((CONTEXT_TOKENS_MIN..131_072).contains(&plan.context_tokens));
        assert!(plan.kv.0 <= 2 * GIB, "{} is more than was granted", plan.kv);
    }

    #[test]
    fn a_context_that_was_asked_for_is_never_made_smaller() {
        let error = plan(&config(), Bytes(12 * GIB), &asked(131_072, 4, 0), Bytes(16 * GIB)).expect_err("no room");
        let PlanError::ContextTooLarge { context: 131_072, fits, .. } = error else { panic!("{error}") };
        let second = plan(&config(), Bytes(12 * GIB), &asked(fits, 4, 0), Bytes(16 * GIB));
        assert_eq!(second.expect("what the error says fits").context_tokens, fits);
    }

    #[test]
    fn weights_that_leave_nothing_are_named() {
        let error = plan(&config(), Bytes(64 * GIB), &asked(0, 1, 0), Bytes(64 * GIB)).expect_err("nothing is left");
        assert!(matches!(error, PlanError::WeightsTooLarge { weights: Bytes(bytes), .. } if bytes == 64 * GIB));
        // Whoever says how much the cache may take knows better.
        assert!(plan(&config(), Bytes(64 * GIB), &asked(0, 1, 8 * GIB), Bytes(64 * GIB)).is_ok());
    }

    #[test]
    fn bounds_of_the_context_are_the_models() {
        let at = |tokens| plan(&config(), Bytes(0), &asked(tokens, 1, 0), Bytes(64 * GIB));
        assert!(at(131_072).is_ok());
        assert_eq!(at(131_073), Err(PlanError::ContextBeyondModel { asked: 131_073, model: 131_072 }));
    }

    #[test]
    fn keys_and_values_in_8_bits_are_refused() {
        let asked = LoadPlan { kv_type: KvType::Int8, ..asked(0, 1, 0) };
        let error = plan(&config(), Bytes(0), &asked, Bytes(64 * GIB)).expect_err("for a card alone");
        assert_eq!(error, PlanError::KvTypeOnProcessor(KvType::Int8));
        assert_eq!(error.to_string(), "kv_cache_type int8 is for a CUDA card: on the processor set it to bf16");
    }

    #[test]
    fn a_cache_of_a_given_size_is_not_passed() {
        let kv = 3 * GIB + 12345;
        let plan = plan(&config(), Bytes(0), &asked(32_768, 64, kv), Bytes(1)).expect("fits");
        assert!(plan.kv.0 <= kv, "{} is more than {kv}", plan.kv);
    }
}

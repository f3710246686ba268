//! Checkpoints of random weights, of any shape: for measuring speed and memory without a download.
//!
//! Owns: which tensors a shape has (`layout`), what their bytes are (`content`), the files (`files`) and a small
//! tokenizer (`vocabulary`). Refuses: a folder that is not empty, a shape that the worker would refuse, and a disk
//! without room. Invariants: equal config, format and seed give equal bytes, whatever the number of threads; no more than
//! one slice per thread is in memory; config.json is written last, so a folder without it is an unfinished one.
//!
//! The weights mean nothing, but their scales are those of a model: every projection keeps the size of what goes through
//! it, so that activations neither vanish nor grow, routers choose evenly, and logits spread by about 1.

mod content;
mod files;
mod layout;
mod vocabulary;

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;

use anyhow::{Context, Result, ensure};
use bulkhead_worker::checkpoint::limits::CONFIG_BYTES_MAX;
use bulkhead_worker::checkpoint::read_limited;
use bulkhead_worker::model::config::{CONFIG_FILE, Config};
use serde_json::{Value, json};

use self::content::Generator;
use self::files::Shards;
use self::vocabulary::Vocabulary;

/// Bytes of a shard, unless a single tensor is larger.
pub const SHARD_BYTES_MAX: u64 = 4_000_000_000;

/// How the large matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Attention and experts, or the dense network, in NF4 with double quantisation, experts fused.
    Nf4,
    /// Experts in MXFP4, attention in bf16: as gpt-oss is published.
    Mxfp4,
    /// Everything in bf16.
    Bf16,
}

/// What to make.
#[derive(Clone, Debug)]
pub struct Order {
    /// The config.json that gives the shape.
    pub config: PathBuf,
    /// How the large matrices are stored.
    pub format: Format,
    /// What the weights are drawn from.
    pub seed: u64,
    /// Where to: a folder that is empty or does not exist.
    pub folder: PathBuf,
    /// Threads that draw and write; `None` for one per core.
    pub threads: Option<NonZeroUsize>,
    /// Bytes of a shard, unless a single tensor is larger.
    pub shard_bytes_max: u64,
}

/// What was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Made {
    /// Files of weights.
    pub shards: usize,
    /// Tensors in them.
    pub tensors: usize,
    /// Their bytes together.
    pub bytes: u64,
}

/// Makes a checkpoint.
///
/// # Errors
/// When the config describes no model, the folder holds something, the disk has no room, or a write fails.
pub fn synthesize(order: &Order) -> Result<Made> {
    let text = read_limited(&order.config, CONFIG_BYTES_MAX)?;
    let config = Config::parse(&text, &order.config.display().to_string())?;
    let vocabulary = Vocabulary::for_size(config.vocab_size, config.architecture)?;
    let tensors = layout::tensors(&config, order.format)?;
    let shards = Shards::divide(tensors, order.shard_bytes_max)?;

    let folder = &order.folder;
    claim(folder)?;
    let (bytes, available) = (shards.bytes(), files::available_bytes(folder)?);
    ensure!(
        bytes <= available,
        "{}: the weights take {bytes} bytes and the disk has {available}: make room, or take a smaller shape",
        folder.display()
    );
    let threads = order.threads.or_else(|| available_parallelism().ok()).unwrap_or(NonZeroUsize::MIN);
    shards
        .write(folder, &Generator::new(order.seed), threads)
        .with_context(|| format!("{} is left unfinished: remove it before the next try", folder.display()))?;

    write_json(&folder.join("tokenizer.json"), vocabulary.tokenizer())?;
    if let Some((config, template)) = vocabulary.template() {
        write_json(&folder.join("tokenizer_config.json"), &config)?;
        let path = folder.join("chat_template.jinja");
        std::fs::write(&path, template).with_context(|| path.display().to_string())?;
    }
    write_json(&folder.join("generation_config.json"), &vocabulary.generation_config())?;
    let config = described(serde_json::from_slice(&text)?, order.format, &vocabulary);
    write_json(&folder.join(CONFIG_FILE), &config)?;
    Ok(Made { shards: shards.count(), tensors: shards.tensors(), bytes })
}

/// Makes the folder, or sees that it is empty.
fn claim(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let mut entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    ensure!(entries.next().is_none(), "{} is not empty: name a new folder, or remove what is in it", folder.display());
    Ok(())
}

/// Adds to a config what was done: the format of the weights, and the special tokens of the tokenizer.
fn described(mut config: Value, format: Format, vocabulary: &Vocabulary) -> Value {
    config["bos_token_id"] = json!(vocabulary.start_of_text());
    config["eos_token_id"] = json!(vocabulary.end_of_turn());
    config["pad_token_id"] = json!(vocabulary.end_of_text());
    match format {
        Format::Nf4 => {
            config["quantization_config"] = json!({
                "quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": true, "bnb_4bit_compute_dtype": "bfloat16"
            });
        }
        Format::Mxfp4 => {
            let kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"];
            config["quantization_config"] = json!({"quant_method": "mxfp4", "modules_to_not_convert": kept});
        }
        Format::Bf16 => {
            if let Some(fields) = config.as_object_mut() {
                fields.remove("quantization_config");
            }
        }
    }
    config
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value)?;
    std::fs::write(path, text).with_context(|| path.display().to_string())
}

//! The files beside the weights, and how every file comes into being: under a temporary name, onto the disk, renamed.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use nix::fcntl::{AT_FDCWD, renameat};
use nix::sys::statvfs::statvfs;
use serde_json::{Value, json};

use super::error::ConvertError;
use super::plan::parts_head;
use super::{Head, Quant};
use crate::checkpoint::limits::CONFIG_BYTES_MAX;
use crate::checkpoint::read_limited;
use crate::model::config::{CONFIG_FILE, Config, ConfigError};

/// The manifest's name.
pub const MANIFEST_FILE: &str = "bulkhead-manifest.json";

/// What the name of an unfinished file ends with.
pub(super) const PART_SUFFIX: &str = ".part";

/// What a model folder may hold beside weights and config.json, and what is copied as it is.
pub(super) const COPIED: [&str; 9] = [
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
];

/// Bytes of such a file, at most.
const COPIED_BYTES_MAX: u64 = 256 << 20;

/// Writes a small file whole, or leaves the one that is there.
///
/// # Errors
/// `Write`.
pub(super) fn write_whole(folder: &Path, name: &str, bytes: &[u8]) -> Result<(), ConvertError> {
    let part = folder.join(format!("{name}{PART_SUFFIX}"));
    let mut file = File::create(&part).map_err(ConvertError::write(&part))?;
    file.write_all(bytes).map_err(ConvertError::write(&part))?;
    publish(&file, folder, name)
}

/// Gives a written file its name, once its bytes are on the disk; and waits until the name is, too.
///
/// # Errors
/// `Write`.
pub(super) fn publish(file: &File, folder: &Path, name: &str) -> Result<(), ConvertError> {
    let (part, whole) = (folder.join(format!("{name}{PART_SUFFIX}")), folder.join(name));
    file.sync_all().map_err(ConvertError::write(&part))?;
    renameat(AT_FDCWD, &part, AT_FDCWD, &whole).map_err(|error| ConvertError::write(&whole)(error.into()))?;
    let listing = File::open(folder).map_err(ConvertError::write(folder))?;
    listing.sync_all().map_err(ConvertError::write(folder))
}

/// Copies what is there of the files beside the weights.
///
/// # Errors
/// `Checkpoint`, `Write`.
pub(super) fn copy_others(from: &Path, to: &Path) -> Result<(), ConvertError> {
    for name in COPIED {
        let source = from.join(name);
        if source.is_file() {
            write_whole(to, name, &read_limited(&source, COPIED_BYTES_MAX)?)?;
        }
    }
    Ok(())
}

/// Writes config.json with what is now true of the weights.
///
/// # Errors
/// `Config`, `Checkpoint`, `Write`.
pub(super) fn write_config(from: &Path, to: &Path, (quant, head): (Quant, Head)) -> Result<(), ConvertError> {
    let file = from.join(CONFIG_FILE);
    let bytes = read_limited(&file, CONFIG_BYTES_MAX)?;
    if quant == Quant::Keep {
        return write_whole(to, CONFIG_FILE, &bytes);
    }
    let malformed = |source| ConfigError::Json { file: file.display().to_string(), source };
    let mut config: Value = serde_json::from_slice(&bytes).map_err(malformed)?;
    if quant == Quant::Mxfp4 {
        config["quantization_config"] = json!({
            "quant_method": "mxfp4",
            "modules_to_not_convert":
                ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
        });
        return write_checked(to, &config);
    }
    // transformers leaves the output matrix alone unless this list is there and does not name it.
    let mut skipped = vec!["embed_tokens", "router"];
    if head == Head::Wide {
        skipped.push("lm_head");
    }
    if parts_head(&Config::parse(&bytes, CONFIG_FILE)?, head) {
        config["tie_word_embeddings"] = json!(false);
    }
    config["quantization_config"] = json!({
        "quant_method": "bitsandbytes", "load_in_4bit": true, "load_in_8bit": false,
        "_load_in_4bit": true, "_load_in_8bit": false,
        "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": true, "llm_int8_skip_modules": skipped
    });
    write_checked(to, &config)
}

/// Writes a config that can be read.
fn write_checked(to: &Path, config: &Value) -> Result<(), ConvertError> {
    let mut text = serde_json::to_vec_pretty(config).expect("a value is JSON");
    text.push(b'\n');
    Config::parse(&text, CONFIG_FILE)?;
    write_whole(to, CONFIG_FILE, &text)
}

/// Sees that the disk has room.
///
/// # Errors
/// `NoRoom`, `Write` when the disk does not say.
pub(super) fn check_room(folder: &Path, needed: u64) -> Result<(), ConvertError> {
    let disk = statvfs(folder).map_err(|error| ConvertError::write(folder)(error.into()))?;
    let available = disk.blocks_available().saturating_mul(disk.fragment_size());
    if needed <= available {
        return Ok(());
    }
    Err(ConvertError::NoRoom { to: folder.to_owned(), needed, available })
}

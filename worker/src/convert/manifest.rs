//! bulkhead-manifest.json: what a folder was made from, by what, and what it cost; and, until all is done, how far it is.
//!
//! Owns: its fields, and deciding whether a folder may be gone on with. Invariant: a shard is listed once its file is on the
//! disk under its own name; the manifest holds no time and no path, so that equal conversions have equal manifests.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::ConvertError;
use super::files::{MANIFEST_FILE, PART_SUFFIX, write_whole};
use super::progress::Progress;
use crate::checkpoint::{CheckpointError, read_limited};

/// Bytes of a manifest, at most.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;

/// Bytes that are hashed at a time.
const HASHED_BYTES: usize = 1 << 20;

/// The manifest of a folder.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// What was asked for.
    pub order: Order,
    /// Whether every file is there.
    pub is_complete: bool,
    /// Bytes by what the weights are for.
    pub kinds: BTreeMap<String, KindBytes>,
    /// The finished files of weights, with what changed in them.
    pub shards: BTreeMap<String, Shard>,
}

/// What was asked for: equal orders give equal files.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Order {
    /// Version of the tool.
    pub tool: String,
    /// The form that weights were brought into.
    pub quant: String,
    /// The form of the output matrix.
    pub lm_head: String,
    /// Bytes of a shard, unless a single weight is larger.
    pub shard_bytes: u64,
    /// The files that were read, by name.
    pub sources: BTreeMap<String, SourceFile>,
}

/// A file of the source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SourceFile {
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256, in hexadecimal digits.
    pub sha256: String,
}

/// Bytes of the weights of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KindBytes {
    /// In the source, those that were quantised or rounded.
    pub changed_from: u64,
    /// What those became.
    pub changed_to: u64,
    /// Those that stayed as they were.
    pub kept: u64,
}

/// A finished file of weights.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Shard {
    /// Its length.
    pub bytes: u64,
    /// |new - old| / |old| of each weight that was changed.
    pub relative_error: BTreeMap<String, f32>,
}

impl Manifest {
    /// Reads the manifest of a folder; `None` where there is none.
    ///
    /// # Errors
    /// `Checkpoint` when it cannot be read, `Manifest` when it is malformed.
    pub fn read(folder: &Path) -> Result<Option<Manifest>, ConvertError> {
        let file = folder.join(MANIFEST_FILE);
        if !file.try_exists().map_err(|source| CheckpointError::Read { file: file.clone(), source })? {
            return Ok(None);
        }
        let bytes = read_limited(&file, MANIFEST_BYTES_MAX)?;
        serde_json::from_slice(&bytes).map(Some).map_err(|source| ConvertError::Manifest { file, source })
    }

    /// Writes the manifest into its folder.
    ///
    /// # Errors
    /// `Write`.
    pub(super) fn write(&self, folder: &Path) -> Result<(), ConvertError> {
        let mut text = serde_json::to_vec_pretty(self).expect("maps with names as keys are JSON");
        text.push(b'\n');
        write_whole(folder, MANIFEST_FILE, &text)
    }
}

impl Order {
    /// Names the first thing in which another order differs.
    fn difference(&self, other: &Order) -> Option<&'static str> {
        let fields = [
            (self.tool == other.tool, "version of bulkhead-worker"),
            (self.quant == other.quant, "--quant"),
            (self.lm_head == other.lm_head, "--lm-head"),
            (self.shard_bytes == other.shard_bytes, "--shard-bytes"),
            (self.sources == other.sources, "source"),
        ];
        fields.into_iter().find(|(is_same, _)| !is_same).map(|(_, field)| field)
    }
}

/// Gives what a folder already holds of an order; `None` for one that holds nothing.
///
/// # Errors
/// `Foreign`, `OtherConversion`, and those of `Manifest::read`.
pub(super) fn resume(folder: &Path, order: &Order) -> Result<Option<Manifest>, ConvertError> {
    let to = || folder.to_owned();
    let Some(mut manifest) = Manifest::read(folder)? else {
        // Whoever was killed while the first manifest was written has left the beginning of one.
        let begun = format!("{MANIFEST_FILE}{PART_SUFFIX}");
        let unreadable = |source| CheckpointError::Read { file: folder.to_owned(), source };
        for entry in std::fs::read_dir(folder).map_err(unreadable)? {
            let name = entry.map_err(unreadable)?.file_name();
            if name != begun.as_str() {
                return Err(ConvertError::Foreign { to: to(), entry: name.to_string_lossy().into_owned() });
            }
        }
        return Ok(None);
    };
    if let Some(field) = order.difference(&manifest.order) {
        return Err(ConvertError::OtherConversion { to: to(), field });
    }
    // A file that somebody removed or cut is made again.
    let count = manifest.shards.len();
    let is_whole = |name: &str, bytes: u64| std::fs::metadata(folder.join(name)).is_ok_and(|file| file.len() == bytes);
    manifest.shards.retain(|name, shard| is_whole(name, shard.bytes));
    manifest.is_complete &= manifest.shards.len() == count;
    Ok(Some(manifest))
}

/// Computes the SHA-256 of a file.
///
/// # Errors
/// `Checkpoint` when it cannot be read.
pub(super) fn hash(file: &Path, progress: &Progress) -> Result<SourceFile, ConvertError> {
    let unreadable = |source| CheckpointError::Read { file: file.to_owned(), source };
    let mut reader = File::open(file).map_err(unreadable)?;
    let (mut digest, mut bytes, mut buffer) = (Sha256::new(), 0, vec![0; HASHED_BYTES]);
    loop {
        let count = reader.read(&mut buffer).map_err(unreadable)?;
        if count == 0 {
            break;
        }
        digest.update(&buffer[..count]);
        bytes += count as u64;
        progress.add(count as u64);
    }
    let sha256 = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(SourceFile { bytes, sha256 })
}

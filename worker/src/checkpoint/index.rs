//! The index of a sharded checkpoint: which tensor lies in which file.
//!
//! Owns: the meaning of `model.safetensors.index.json`. Pure: bytes in, list out.
//! Refuses: shard names that are more than a plain file name, so that an index reaches nothing outside its folder.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::limits::{NAME_BYTES_MAX, SHARDS_MAX};

/// The tensors that each shard must hold, by the shard's file name.
pub type ShardTensors = BTreeMap<String, Vec<String>>;

/// Why an index is unusable.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// It is not the JSON that it must be.
    #[error("malformed: {0}")]
    Json(#[source] serde_json::Error),
    /// It names no shard, or more than the limit.
    #[error("names {shards} shards, expected 1 to {max}")]
    ShardCount {
        /// Shards named.
        shards: usize,
        /// The limit.
        max: usize,
    },
    /// A shard's name is no plain file name.
    #[error("shard {shard:?} is not a plain file name ending in .safetensors")]
    ShardName {
        /// The name.
        shard: String,
    },
}

#[derive(Deserialize)]
struct IndexFile {
    weight_map: BTreeMap<String, String>,
}

/// Reads an index and groups its tensors by shard.
///
/// # Errors
/// `Json` when it is malformed, `ShardName` for a name that could leave the folder, `ShardCount` outside the bounds.
pub fn parse_index(bytes: &[u8]) -> Result<ShardTensors, IndexError> {
    let file: IndexFile = serde_json::from_slice(bytes).map_err(IndexError::Json)?;
    let mut shards = ShardTensors::new();
    for (tensor, shard) in file.weight_map {
        if !is_plain_name(&shard) {
            return Err(IndexError::ShardName { shard });
        }
        shards.entry(shard).or_default().push(tensor);
    }
    match shards.len() {
        1..=SHARDS_MAX => Ok(shards),
        count => Err(IndexError::ShardCount { shards: count, max: SHARDS_MAX }),
    }
}

fn is_plain_name(name: &str) -> bool {
    let no_path = !name.contains(['/', '\\', '\0']) && !name.starts_with('.');
    no_path && name.len() <= NAME_BYTES_MAX && name.ends_with(".safetensors")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_are_grouped_by_shard() {
        let index = br#"{"metadata":{"total_size":1},"weight_map":{"c":"2.safetensors","a":"1.safetensors","b":"2.safetensors"}}"#;
        let shards = parse_index(index).expect("valid");
        assert_eq!(shards["1.safetensors"], ["a"]);
        assert_eq!(shards["2.safetensors"], ["b", "c"]);
    }

    #[test]
    fn names_that_could_leave_the_folder_are_refused() {
        for name in
            ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "", "x.bin", "a\\\\b.safetensors"]
        {
            let index = format!(r#"{{"weight_map":{{"a":"{name}"}}}}"#);
            assert!(matches!(parse_index(index.as_bytes()), Err(IndexError::ShardName { .. })), "{name}");
        }
        assert!(matches!(parse_index(br#"{"weight_map":{}}"#), Err(IndexError::ShardCount { shards: 0, .. })));
        assert!(matches!(parse_index(b"{}"), Err(IndexError::Json(_))));
    }

    #[test]
    fn shards_are_counted_at_the_limit() {
        let index = |count: usize| {
            let entries: Vec<_> = (0..count).map(|i| format!(r#""t{i}":"{i}.safetensors""#)).collect();
            format!(r#"{{"weight_map":{{{}}}}}"#, entries.join(","))
        };
        assert!(parse_index(index(SHARDS_MAX).as_bytes()).is_ok());
        let above = parse_index(index(SHARDS_MAX + 1).as_bytes());
        assert!(matches!(above, Err(IndexError::ShardCount { shards, .. }) if shards == SHARDS_MAX + 1));
    }
}

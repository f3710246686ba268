//! Why a conversion ends, with what to do about it.

use std::io;
use std::path::{Path, PathBuf};

use crate::checkpoint::CheckpointError;
use crate::model::config::ConfigError;

/// A conversion that cannot be done, or not finished. What was finished before stays, and the same command goes on with it.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The source.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The source's configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The output would lie in the source, or the source in the output.
    #[error("--to {} and --from {} lie in each other: name a folder beside the source", .to.display(), .from.display())]
    Nested {
        /// The output.
        to: PathBuf,
        /// The source.
        from: PathBuf,
    },
    /// The output's folder holds something that no conversion made.
    #[error("{}: holds {entry:?}, which is not of a conversion: name a new or empty folder", .to.display())]
    Foreign {
        /// The folder.
        to: PathBuf,
        /// What is there.
        entry: String,
    },
    /// The output's folder holds another conversion.
    #[error("{}: holds a conversion with another {field}: name a new folder, or remove this one", .to.display())]
    OtherConversion {
        /// The folder.
        to: PathBuf,
        /// What differs.
        field: &'static str,
    },
    /// The manifest is not the JSON that it must be.
    #[error("{}: malformed: {source}: remove the folder and convert anew", .file.display())]
    Manifest {
        /// The file.
        file: PathBuf,
        /// What the JSON reader found.
        source: serde_json::Error,
    },
    /// The disk is too small.
    #[error("{}: {needed} bytes are to be written and the disk has room for {available}: make room, or name another disk", .to.display())]
    NoRoom {
        /// The folder.
        to: PathBuf,
        /// Bytes to write.
        needed: u64,
        /// Bytes that are free.
        available: u64,
    },
    /// A file cannot be written.
    #[error("{}: cannot be written: {source}", .file.display())]
    Write {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A tensor is larger than the memory that a conversion may take.
    #[error(
        "tensor {tensor:?} has {weights} weights, more than the {max} that are converted within the bound on memory"
    )]
    TooLarge {
        /// The tensor.
        tensor: String,
        /// Its weights.
        weights: u64,
        /// The limit.
        max: u64,
    },
    /// A tensor is stored in a way that is not converted.
    #[error("tensor {tensor:?} is {found}, expected {expected}")]
    NotSupported {
        /// The tensor.
        tensor: String,
        /// What it is.
        found: String,
        /// What would be converted.
        expected: &'static str,
    },
    /// A choice for the output matrix that the model or the form does not leave.
    #[error("--lm-head {choice} cannot be: {reason}")]
    Head {
        /// What was chosen.
        choice: &'static str,
        /// Why not.
        reason: &'static str,
    },
    /// MXFP4 for a model that has none of what is stored in it.
    #[error("--quant mxfp4 is for experts, and the model has none: take nf4")]
    NoExperts,
    /// More shards than are read.
    #[error("{shards} shards are more than the {max} that are read: raise --shard-bytes")]
    Shards {
        /// How many it would be.
        shards: usize,
        /// The limit.
        max: usize,
    },
}

impl ConvertError {
    /// Wraps what the system said about writing a file.
    pub(super) fn write(file: &Path) -> impl FnOnce(io::Error) -> ConvertError {
        let file = file.to_owned();
        move |source| ConvertError::Write { file, source }
    }
}

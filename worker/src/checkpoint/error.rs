//! Why a model folder is not a checkpoint that can be served. Every variant names the file and, where there is one, the
//! tensor, with what was expected and what was found.

use std::io;
use std::path::PathBuf;

use safetensors::Dtype;

use super::bnb4bit::QuantStateError;
use super::header::HeaderError;
use crate::quant::FormatError;

/// A fault of a model folder. All are the model's fault, and none goes away by trying again.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The path is no folder.
    #[error("{}: not a model folder: {source}", .folder.display())]
    Folder {
        /// The path.
        folder: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The folder has no weights.
    #[error("{}: neither model.safetensors nor model.safetensors.index.json is there", .folder.display())]
    NoWeights {
        /// The folder.
        folder: PathBuf,
    },
    /// A file cannot be read or mapped.
    #[error("{}: cannot be read: {source}", .file.display())]
    Read {
        /// The file.
        file: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A JSON file is larger than any real one.
    #[error("{}: {bytes} bytes, more than the limit of {max}", .file.display())]
    TooLarge {
        /// The file.
        file: PathBuf,
        /// Its length.
        bytes: u64,
        /// The limit.
        max: u64,
    },
    /// A safetensors file is malformed.
    #[error("{}: {source}", .file.display())]
    Header {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        source: HeaderError,
    },
    /// The index is not the JSON that it must be.
    #[error("{}: malformed: {source}", .file.display())]
    Index {
        /// The index.
        file: PathBuf,
        /// What the JSON reader found.
        source: serde_json::Error,
    },
    /// The index names more shards than the limit, or none.
    #[error("{}: names {shards} shards, expected 1 to {max}", .file.display())]
    ShardCount {
        /// The index.
        file: PathBuf,
        /// Shards named.
        shards: usize,
        /// The limit.
        max: usize,
    },
    /// The index names a shard by something else than a plain file name.
    #[error("{}: shard {shard:?} is not a plain file name ending in .safetensors", .file.display())]
    ShardName {
        /// The index.
        file: PathBuf,
        /// The name.
        shard: String,
    },
    /// The index names a shard that is not in the folder.
    #[error("{}: missing, although the index names it: download it again", .file.display())]
    MissingShard {
        /// The shard.
        file: PathBuf,
    },
    /// The index puts a tensor into a shard that does not hold it.
    #[error("{}: lacks tensor {tensor:?}, which the index puts there", .file.display())]
    NotInShard {
        /// The shard.
        file: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// The shards up to this one hold more tensors together than the limit.
    #[error("{}: with it the checkpoint has more than {max} tensors", .file.display())]
    TooManyTensors {
        /// The shard.
        file: PathBuf,
        /// The limit.
        max: usize,
    },
    /// Two shards hold a tensor of one name.
    #[error("{}: holds tensor {tensor:?}, which {} holds too", .file.display(), .other.display())]
    DuplicateTensor {
        /// The later shard.
        file: PathBuf,
        /// The earlier shard.
        other: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor that the config calls for is in no file.
    #[error("{}: tensor {tensor:?} is missing", .folder.display())]
    MissingTensor {
        /// The folder.
        folder: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// A tensor has an element type that does not fit its role.
    #[error("{}: tensor {tensor:?} has element type {found}, expected {expected}", .file.display())]
    WrongDtype {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What fits, for people.
        expected: &'static str,
        /// What is there.
        found: Dtype,
    },
    /// A tensor has a shape that contradicts the config.
    #[error("{}: tensor {tensor:?} has shape {found:?}, expected {expected:?}", .file.display())]
    WrongShape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What the config calls for.
        expected: Vec<usize>,
        /// What is there.
        found: Vec<usize>,
    },
    /// A tensor holds a number that is not finite.
    #[error("{}: tensor {tensor:?} holds {value} at index {index}, expected finite numbers", .file.display())]
    NotFinite {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Which element, counted flat.
        index: usize,
        /// What it is.
        value: f32,
    },
    /// The bytes of a 4-bit matrix do not make one.
    #[error("{}: tensor {tensor:?}: {source}", .file.display())]
    Format {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with them.
        source: FormatError,
    },
    /// The quantisation state of a bitsandbytes matrix is malformed or not supported.
    #[error("{}: tensor {tensor:?}: {source}", .file.display())]
    QuantState {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        source: QuantStateError,
    },
    /// The config claims fewer layers or experts than the weights have.
    #[error("{}: tensor {tensor:?} is beyond the {count} {what} of config.json", .file.display())]
    BeyondConfig {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What there are too many of: `layers` or `experts`.
        what: &'static str,
        /// How many the config claims.
        count: usize,
    },
    /// The config claims that a matrix has no bias, but the file has one.
    #[error("{}: tensor {tensor:?} is there, but config.json says that there are no such biases", .file.display())]
    BiasBeyondConfig {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
    },
    /// The config names a quantisation that the weights do not have.
    #[error("{}: config.json says quantization {claimed:?}, but the weights are {found}", .folder.display())]
    QuantizationClaim {
        /// The folder.
        folder: PathBuf,
        /// What the config says.
        claimed: &'static str,
        /// What the weights are.
        found: &'static str,
    },
    /// The config ties the output matrix to the embedding, but the file has another one.
    #[error("{}: config.json says tie_word_embeddings, but tensor {tensor:?} differs from the embedding", .file.display())]
    TiedHeadDiffers {
        /// The file.
        file: PathBuf,
        /// The output matrix.
        tensor: String,
    },
}

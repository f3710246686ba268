//! Bounds of what a checkpoint folder may hold. Reaching one is a typed error, before anything is reserved.

/// Bytes of the JSON header of one safetensors file, at most: the largest known (one linear per expert of 128 experts
/// in 36 layers) takes a sixth of this.
pub const HEADER_BYTES_MAX: u64 = 64 << 20;

/// Tensors in one safetensors file, and in all of a checkpoint, at most.
pub const TENSORS_MAX: usize = 1 << 20;

/// Dimensions of one tensor, at most.
pub const RANK_MAX: usize = 8;

/// Bytes of a tensor's name, at most.
pub const NAME_BYTES_MAX: usize = 1024;

/// Shards of one checkpoint, at most.
pub const SHARDS_MAX: usize = 4096;

/// Bytes of model.safetensors.index.json, at most.
pub const INDEX_BYTES_MAX: u64 = 64 << 20;

/// Bytes of config.json and its like, at most.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Bytes of a bitsandbytes quantisation state, at most: a small JSON object.
pub const QUANT_STATE_BYTES_MAX: usize = 64 << 10;

const _: () = assert!(NAME_BYTES_MAX < HEADER_BYTES_MAX as usize);

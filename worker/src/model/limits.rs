//! Bounds of a model's dimensions: far above every known model, and low enough that no product of them overflows.

/// Entries of the vocabulary, at most.
pub const VOCABULARY_MAX: usize = 1 << 22;

/// Width of the residual stream, and of an expert, at most.
pub const WIDTH_MAX: usize = 1 << 17;

/// Layers, at most.
pub const LAYERS_MAX: usize = 1024;

/// Attention heads, at most.
pub const HEADS_MAX: usize = 1024;

/// Width of an attention head, at most.
pub const HEAD_DIM_MAX: usize = 1024;

/// Experts of one layer, at most.
pub const EXPERTS_MAX: usize = 4096;

/// Tokens that end a generation, at most.
pub const EOS_TOKENS_MAX: usize = 64;

const _: () = assert!(VOCABULARY_MAX.checked_mul(WIDTH_MAX).is_some());
const _: () = assert!(EXPERTS_MAX.checked_mul(2 * WIDTH_MAX * WIDTH_MAX).is_some());
const _: () = assert!(HEADS_MAX * HEAD_DIM_MAX <= 1 << 20);

//! The engine: what turns requests into tokens, step by step.

pub mod sampler;

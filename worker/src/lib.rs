//! The Bulkhead worker: one process that holds one model.

pub mod engine;
pub mod text;

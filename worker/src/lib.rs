//! The Bulkhead worker: one process that holds one model.

pub mod checkpoint;
pub mod engine;
pub mod eval;
pub mod model;
pub mod quant;
pub mod text;

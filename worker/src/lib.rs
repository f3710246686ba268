//! The Bulkhead worker: one process that holds one model.

pub mod checkpoint;
pub mod eval;
pub mod model;
pub mod quant;

//! The Bulkhead worker: one process that holds one model, computes its tokens and talks to nobody but its supervisor.
//!
//! From the top: `serve` is the life of an incarnation; `engine` decides what each step computes; `model` computes it with
//! the products of `quant` on weights that `checkpoint` maps; `text` turns conversations into tokens and tokens into text.
#![deny(unsafe_code)]

pub mod bench;
pub mod checkpoint;
pub mod cli;
pub mod convert;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
pub mod engine;
pub mod eval;
pub mod ipc;
pub mod loader;
pub mod memory;
pub mod model;
pub mod plan;
pub mod prepare;
pub mod quant;
pub mod sandbox;
pub mod serve;
pub mod text;
mod unforeseen;

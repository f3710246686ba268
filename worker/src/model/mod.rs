//! The model: what a config describes, its weights by role, and the arithmetic that turns tokens into logits.
//!
//! Owns: the meaning of config.json and of tensor names, and the forward pass, one file per idea. Refuses: to know of
//! requests, files beyond names in a checkpoint, or text.

pub mod attention;
pub mod batch;
pub mod config;
pub mod decoder;
pub mod limits;
pub mod linear;
pub mod mlp;
pub mod moe;
pub mod norm;
pub mod reference;
pub mod rooms;
pub mod rope;
pub mod weights;

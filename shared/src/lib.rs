//! The contract between the Bulkhead supervisor and its workers.
//!
//! Owns: the frame format, the messages, what a generation request is, the limits both sides check, the layers of a
//! worker's isolation, its exit codes and the units of numbers. Refuses to do: I/O, async, threads, `unsafe`. Both processes link this crate and
//! nothing else in common, so whatever stands here is the whole of what they know about each other.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod exit;
pub mod frame;
pub mod generate;
pub mod layers;
pub mod limits;
pub mod message;
pub mod units;

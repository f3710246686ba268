//! The Bulkhead supervisor: everything that clients touch, and the lives of its workers.
//!
//! Owns: the public HTTP door, the admission of requests, what running requests have produced, and the worker process
//! from outside. Refuses: model files, templates, tokens; those are a worker's. Dependencies point down:
//! `http -> request -> tickets -> queue -> child`, and `admin` beside `http`.
#![forbid(unsafe_code)]

pub mod admin;
pub mod blame;
pub mod child;
pub mod config;
pub mod device;
pub mod fleet;
pub mod http;
pub mod journal;
pub mod keys;
mod limits;
pub mod logging;
pub mod metrics;
pub mod nvml;
pub mod queue;
mod random;
pub mod request;
pub mod serve;
pub mod shutdown;
pub mod tickets;
mod unix;
pub mod walls;

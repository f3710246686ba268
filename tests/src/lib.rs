//! What the tests of several kinds share.

pub mod checkpoint;
pub mod http;
pub mod oracle;
pub mod service;
pub mod synth;

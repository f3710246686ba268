//! What the tests of several kinds share.

pub mod http;
pub mod service;

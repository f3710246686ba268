//! What the tests from outside share: a supervisor as a child process, HTTP clients, a look into `/proc`, fixtures, and a
//! small fuzzer.
//!
//! `server`, `client` and `talk` are for the whole system with the real worker; `service` and `http` for the supervisor alone
//! with a fake one. Invariant: whatever talks to a running server links nothing of the product for that, and sees what a
//! user sees. Failures are panics with the server's log, since every caller is a test.

pub mod checkpoint;
pub mod client;
pub mod fuzz;
pub mod http;
pub mod oracle;
pub mod process;
pub mod server;
pub mod service;
pub mod synth;
pub mod talk;
pub mod wait;

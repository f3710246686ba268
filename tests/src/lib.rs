//! What the tests from outside share: a supervisor as a child process, HTTP clients, a look into `/proc`, fixtures, and a
//! small fuzzer.
//!
//! `server` starts a supervisor, by itself with the real worker and through `fake` with one that plays a script; `client` and
//! `talk` speak to it, `process` looks at it from outside, `wait` waits for what they see. Invariant: whatever talks to a
//! running server links nothing of the product for that, and sees what a user sees. Failures are panics with the server's
//! log, since every caller is a test.

pub mod checkpoint;
pub mod client;
pub mod fake;
pub mod fuzz;
pub mod oracle;
pub mod process;
pub mod server;
pub mod synth;
pub mod talk;
pub mod wait;

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

use std::fs::OpenOptions;
use std::io::Write;

/// The variable that names the file to which tests add why they were skipped, for the summary of `make test`.
const SKIPPED: &str = "BULKHEAD_TESTS_SKIPPED";

/// Says that the running test ends here without having tested anything, and why.
///
/// # Panics
/// When the file for such reasons cannot be written.
pub fn skip(reason: &str) {
    println!("skipped: {reason}");
    let Some(path) = std::env::var_os(SKIPPED) else { return };
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    let file = OpenOptions::new().append(true).create(true).open(&path);
    let line = format!("{name}: {reason}\n");
    file.and_then(|mut file| file.write_all(line.as_bytes())).expect("the file for skipped tests can be written");
}

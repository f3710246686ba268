//! `bulkhead-worker`: the process that holds a model.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_worker::cli::main()
}

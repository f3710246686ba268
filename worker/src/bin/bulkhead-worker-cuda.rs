//! `bulkhead-worker-cuda`: the process that holds a model, built so that it can compute on NVIDIA cards too.
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    bulkhead_worker::cli::main()
}

//! `synth-model`: writes a checkpoint of random weights, of any gpt-oss or Llama shape.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use bulkhead_shared::units::Bytes;
use bulkhead_tests::synth::{Format, Order, SHARD_BYTES_MAX, synthesize};
use clap::{Parser, ValueEnum};

/// Write a checkpoint of random weights, of any gpt-oss or Llama shape, for measuring speed and memory.
#[derive(Debug, Parser)]
#[command(name = "synth-model")]
struct Cli {
    /// The config.json that gives the shape; tests/fixtures/configs has some
    #[arg(long, value_name = "CONFIG.json")]
    config: PathBuf,
    /// How the large matrices are stored
    #[arg(long, value_enum)]
    quant: Quant,
    /// What the weights are drawn from: equal seeds give equal bytes
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// The folder to write, empty or new
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Threads that write [default: one per core]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Bytes of a file, unless a single tensor is larger
    #[arg(long, value_name = "N", default_value_t = SHARD_BYTES_MAX)]
    shard_bytes: u64,
}

/// How the large matrices are stored.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Quant {
    /// Attention and experts, or the dense network, in NF4 with double quantisation
    Nf4,
    /// Experts in MXFP4, attention in bf16, as published
    Mxfp4,
    /// Everything in bf16
    Bf16,
}

fn main() -> ExitCode {
    let Cli { config, quant, seed, out, threads, shard_bytes } = Cli::parse();
    let format = match quant {
        Quant::Nf4 => Format::Nf4,
        Quant::Mxfp4 => Format::Mxfp4,
        Quant::Bf16 => Format::Bf16,
    };
    let started = Instant::now();
    let order = Order { config, format, seed, folder: out, threads, shard_bytes_max: shard_bytes };
    match synthesize(&order) {
        Ok(made) => {
            let (size, seconds) = (Bytes(made.bytes), started.elapsed().as_secs_f64());
            println!("{size} in {} tensors and {} files, {seconds:.1} s", made.tensors, made.shards);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("synth-model: {error:#}");
            ExitCode::from(2)
        }
    }
}

//! `bulkhead-worker bench`: how fast a model computes on this machine, and how near that comes to what memory allows.
//!
//! Owns: the command's arguments and the order of its measurements: load, prefill, decode, memory, bandwidth. Refuses: to
//! measure anything but what is served (the model is loaded as `serve` does, and steps are those of the engine), and to
//! guess: the bytes that a step reads are counted while it is measured.
//!
//! Every measurement is repeated after one unmeasured pass, which brings the weights into memory; the median is what to
//! compare, and the extremes say how quiet the machine was.

mod bandwidth;
mod measure;
pub mod products;
mod report;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use bulkhead_shared::layers::SandboxMode;
use bulkhead_shared::limits::WORKER_REQUESTS_MAX;
use bulkhead_shared::message::{CpuChoice, DeviceChoice, Facts, Faults, KvType, LoadPlan, MemoryKind};
use bulkhead_shared::units::Bytes;
use clap::{Args, value_parser};

use self::measure::Sequences;
use self::report::{Asked, Memory, Report, Spread};
use crate::device::{parse_cpu, parse_device, parse_memory};
use crate::engine::backend::Backend;
use crate::engine::pager::BLOCK_TOKENS;
use crate::loader::{LoadError, LoadedModel, load};
use crate::memory;
use crate::prepare::Prepared;
use crate::sandbox::{Grant, Sandboxed, Walls, of_model};

/// The arguments of the command.
#[derive(Args, Clone, Debug)]
pub struct BenchArgs {
    /// The model folder
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Tokens of the prompt that prefill is measured with
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = value_parser!(u32).range(1..))]
    pub prompt: u32,
    /// Tokens that each sequence generates in one repetition
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = value_parser!(u32).range(1..))]
    pub generate: u32,
    /// Tokens of context in front of those that are generated
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub depth: u32,
    /// Sequences that generate together
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..=WORKER_REQUESTS_MAX as i64))]
    pub batch: u32,
    /// Threads that compute; 0 is one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub threads: u32,
    /// Instructions to compute with on the processor: auto, scalar, avx2, avxvnni, avx512 or amx
    #[arg(long, value_name = "PATH", default_value = "auto", value_parser = parse_cpu)]
    pub cpu: CpuChoice,
    /// Where to compute: cpu or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "cpu", value_parser = parse_device)]
    pub device: DeviceChoice,
    /// Most that is held on a card, such as 16GiB; 0 takes the usual share
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = parse_memory)]
    pub device_memory: Bytes,
    /// Measured repetitions, after one that is not
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = value_parser!(u32).range(1..))]
    pub repetitions: u32,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    /// The path is no text, which the plan of a load needs.
    #[error("{}: the path of the model is not UTF-8", .0.display())]
    Path(PathBuf),
    /// More positions than there are numbers for.
    #[error("--depth {depth} and --generate {generate} make a context longer than any model's")]
    ContextTooLong {
        /// The context before.
        depth: u32,
        /// The tokens behind it.
        generate: u32,
    },
    /// The model.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The sequences do not fit in the cache together.
    #[error(
        "{batch} sequences of {tokens} tokens do not fit in {kv} of KV cache, {fits} do: \
         lower --batch or --depth, or free memory"
    )]
    CacheTooSmall {
        /// The sequences asked for.
        batch: u32,
        /// The tokens of each.
        tokens: u32,
        /// What the plan grants.
        kv: Bytes,
        /// The sequences that there is room for.
        fits: u32,
    },
    /// The tokens to generate do not fit beside the windows.
    #[error("the windows of all sequences have no room for so many tokens at once: lower --generate or --batch")]
    WindowsTooSmall,
    /// The model computes nonsense.
    #[error("a logit is not a finite number: the weights are damaged")]
    NotFinite,
    /// The system does not say what it should.
    #[error("/proc/self/status does not say how much memory was used")]
    NoMemoryStatus,
    /// Too little memory for a buffer beyond the caches.
    #[error("measuring the bandwidth needs a buffer of {needed} and {available} is available: free memory")]
    NoRoomForBuffer {
        /// The buffer.
        needed: Bytes,
        /// What there is.
        available: Bytes,
    },
    /// The result cannot be printed.
    #[error("the result cannot be printed: {0}")]
    Print(#[source] io::Error),
}

/// Says what the command's walls leave open: the model, and what the kernel says of this process's memory.
#[must_use]
pub fn walls(args: &BenchArgs, mode: SandboxMode) -> Walls {
    let mut grants = of_model(&args.model);
    grants.push(Grant::read_file(Path::new("/proc/self/status")));
    Walls::of_person(mode, args.device, grants)
}

/// Runs the command and writes what it measured to `out`.
///
/// # Errors
/// Each variant of `BenchError`.
pub fn run(
    proof: &Sandboxed,
    prepared: Prepared,
    args: &BenchArgs,
    out: &mut impl io::Write,
) -> Result<(), BenchError> {
    let report = measure(proof, prepared, args)?;
    if args.json { report.write_json(out) } else { report.write_table(out) }.map_err(BenchError::Print)
}

/// Loads the model and measures everything.
fn measure(proof: &Sandboxed, prepared: Prepared, args: &BenchArgs) -> Result<Report, BenchError> {
    let (depth, generate) = (args.depth, args.generate);
    let behind = depth.checked_add(generate).ok_or(BenchError::ContextTooLong { depth, generate })?;
    let tokens = behind.max(args.prompt);
    let started = Instant::now();
    let plan = plan(args, tokens)?;
    let LoadedModel { mut backend, tokenizer: _, chat: _, defaults: _, loaded } =
        load(proof, prepared, &plan, &mut |_, _, _| {})?;
    let load_seconds = started.elapsed().as_secs_f64();
    check_room(args.batch, tokens, &loaded.facts)?;

    let mut sequences = Sequences::new(&mut backend, args.batch);
    let prefill = sequences.measure_prefill(args.prompt, args.repetitions)?;
    let decode = sequences.measure_decode(depth, generate, args.repetitions)?;
    // Read before the buffer of the last measurement is taken.
    let resident = memory::resident().ok_or(BenchError::NoMemoryStatus)?;
    let bandwidth = match &mut backend {
        Backend::Cpu(cpu) => bandwidth::measure(cpu.decoder.cpu())?,
        #[cfg(feature = "cuda")]
        Backend::Cuda(card) => bandwidth::measure_card(card)?,
    };

    let steps = f64::from(generate) * f64::from(args.repetitions);
    let weights_per_step = decode.weight_bytes as f64 / steps;
    let kv_per_step = decode.kv_bytes as f64 / steps;
    let decode_rate = Spread::of(&decode.tokens_per_second);
    let read_rate = (weights_per_step + kv_per_step) * decode_rate.median / f64::from(args.batch);
    Ok(Report {
        model: args.model.display().to_string(),
        device: backend.describe_device(),
        format: loaded.facts.quantization,
        asked: Asked {
            prompt_tokens: args.prompt,
            generate_tokens: generate,
            depth_tokens: depth,
            batch: args.batch,
            repetitions: args.repetitions,
        },
        load_seconds,
        load_phases: loaded.phases,
        prefill_tokens_per_second: Spread::of(&prefill),
        decode_tokens_per_second: decode_rate,
        weight_bytes_per_step: weights_per_step,
        kv_bytes_per_step: kv_per_step,
        weight_bytes_per_token: weights_per_step / f64::from(args.batch),
        kv_bytes_per_token: kv_per_step / f64::from(args.batch),
        decode_bytes_per_second: read_rate,
        share_of_bandwidth: read_rate / bandwidth.bytes_per_second.max,
        bandwidth,
        memory: Memory {
            by_purpose: loaded.facts.memory.iter().map(|(kind, bytes)| (kind.as_str(), bytes.0)).collect(),
            given_up: loaded.given_up,
            peak_resident_bytes: resident.peak.0,
            anonymous_bytes: resident.anonymous.0,
        },
    })
}

/// Writes the plan that the supervisor would send.
fn plan(args: &BenchArgs, context_tokens: u32) -> Result<LoadPlan, BenchError> {
    let model_dir = args.model.to_str().ok_or_else(|| BenchError::Path(args.model.clone()))?;
    Ok(LoadPlan {
        model_dir: model_dir.to_owned(),
        device: args.device,
        may_use_processor: false,
        context_tokens,
        sequences_max: args.batch,
        kv_bytes: Bytes(0),
        device_budget: args.device_memory,
        kv_type: KvType::Bf16,
        faults: Faults::default(),
    })
}

fn check_room(batch: u32, tokens: u32, facts: &Facts) -> Result<(), BenchError> {
    let fits = facts.blocks / tokens.div_ceil(BLOCK_TOKENS);
    if fits < batch {
        let of_cache = |(kind, _): &&(MemoryKind, Bytes)| *kind == MemoryKind::KvCache;
        let kv = facts.memory.iter().find(of_cache).map_or(Bytes(0), |(_, bytes)| *bytes);
        return Err(BenchError::CacheTooSmall { batch, tokens, kv, fits });
    }
    Ok(())
}

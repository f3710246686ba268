//! `bench`: what it counts is what the shapes say, and what it cannot measure it refuses.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bulkhead_shared::message::{CpuChoice, DeviceChoice};
use bulkhead_shared::units::Bytes;
use bulkhead_tests::synth::{Format, Order, SHARD_BYTES_MAX, synthesize};
use bulkhead_worker::bench::{self, BenchArgs, BenchError};
use bulkhead_worker::checkpoint::Checkpoint;
use bulkhead_worker::loader::LoadError;
use bulkhead_worker::memory::PlanError;
use bulkhead_worker::model::config::Config;
use bulkhead_worker::model::weights::{Linear, Quantize, load};
use bulkhead_worker::prepare::Prepared;
use bulkhead_worker::sandbox::Sandboxed;
use serde_json::Value;

/// Runs the command in this process, which has no walls.
fn run(args: &BenchArgs, out: &mut Vec<u8>) -> Result<(), BenchError> {
    let prepared = Prepared::start(args.device, args.cpu, args.threads as usize)?;
    bench::run(&Sandboxed::without_walls(), prepared, args, out)
}

fn model(folder: &Path) -> Result<PathBuf> {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/configs/tiny.json");
    let target = folder.join("model");
    let (format, threads, shard_bytes_max) = (Format::Nf4, None, SHARD_BYTES_MAX);
    synthesize(&Order { config, format, seed: 5, folder: target.clone(), threads, shard_bytes_max })?;
    Ok(target)
}

fn args(model: &Path) -> BenchArgs {
    let (model, json) = (model.to_owned(), true);
    BenchArgs {
        model,
        prompt: 300,
        generate: 20,
        depth: 40,
        batch: 1,
        threads: 2,
        device: DeviceChoice::Cpu,
        cpu: CpuChoice::Auto,
        device_memory: Bytes(0),
        repetitions: 2,
        json,
    }
}

fn measured(args: &BenchArgs) -> Result<Value> {
    let mut out = Vec::new();
    run(args, &mut out)?;
    Ok(serde_json::from_slice(&out)?)
}

fn number(report: &Value, pointer: &str) -> Result<f64> {
    report.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("{pointer} in {report}"))
}

/// What a product with a linear reads.
fn bytes(linear: &Linear) -> f64 {
    (linear.weight.stored_bytes() + linear.bias.as_deref().map_or(0, size_of_val)) as f64
}

#[test]
fn the_bytes_of_a_step_are_those_of_its_shapes() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = model(folder.path())?;
    let config = Config::read(&model)?;
    let weights = load(&Checkpoint::open(&model)?, &config, Quantize::File, &mut |_, _, _| {})?;
    let (mut shared, mut routed) = (weights.lm_head.stored_bytes() as f64, 0.0);
    for layer in &weights.layers {
        let attention = &layer.attention;
        let mixture = layer.mlp.experts().context("a mixture of experts")?;
        shared +=
            [&attention.q, &attention.k, &attention.v, &attention.o, &mixture.router].map(bytes).iter().sum::<f64>();
        // The experts of a layer are all of one size.
        routed += bytes(&mixture.experts[0].gate_up) + bytes(&mixture.experts[0].down);
    }

    let experts = config.experts().context("experts")?;
    let one = measured(&args(&model))?;
    assert_eq!(number(&one, "/weight_bytes_per_step")?, shared + routed * experts.per_token as f64);
    // Two layers see the window of 16, two see everything; at positions 40 to 59 that is 50.5 keys on average.
    let keys = 2.0 * 16.0 + 2.0 * 50.5;
    assert_eq!(number(&one, "/kv_bytes_per_step")?, keys * 2.0 * config.kv_width() as f64 * 2.0);
    assert_eq!(one["format"], "nf4");
    for pointer in [
        "/prefill_tokens_per_second/min",
        "/decode_tokens_per_second/min",
        "/load_seconds",
        "/share_of_bandwidth",
        "/bandwidth/bytes_per_second/min",
        "/memory/anonymous_bytes",
    ] {
        assert!(number(&one, pointer)? > 0.0, "{pointer}");
    }
    assert!(number(&one, "/memory/peak_resident_bytes")? >= number(&one, "/memory/anonymous_bytes")?);

    let many = measured(&BenchArgs { batch: 6, ..args(&model) })?;
    let read = number(&many, "/weight_bytes_per_step")?;
    let (few, all) = (experts.per_token as f64, experts.count as f64);
    assert!(read > shared + routed * few && read <= shared + routed * all, "an expert is read once for all: {read}");
    assert_eq!(number(&many, "/kv_bytes_per_token")?, number(&one, "/kv_bytes_per_token")?);
    assert_eq!(number(&many, "/weight_bytes_per_token")? * 6.0, read);
    Ok(())
}

#[test]
fn edges_of_context_and_steps() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = model(folder.path())?;
    let small = BenchArgs { repetitions: 1, ..args(&model) };
    // No context at all; more generated than a step and a window hold; a prompt of exactly one step.
    for (prompt, depth, generate) in [(1, 0, 1), (256, 1, 300), (257, 256, 1)] {
        let report = measured(&BenchArgs { prompt, depth, generate, ..small.clone() })?;
        assert!(number(&report, "/decode_tokens_per_second/median")? > 0.0);
    }
    let mut table = Vec::new();
    run(&BenchArgs { json: false, ..small }, &mut table)?;
    let table = String::from_utf8(table)?;
    assert!(["prefill", "decode / bandwidth", "GB/s"].iter().all(|words| table.contains(words)), "{table}");
    Ok(())
}

#[test]
fn what_cannot_be_measured_is_refused() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let model = model(folder.path())?;
    let refused = |args: BenchArgs| run(&args, &mut Vec::new()).expect_err("refused");
    let error = refused(BenchArgs { depth: 131_072, ..args(&model) });
    assert!(matches!(error, BenchError::Load(LoadError::Plan(PlanError::ContextBeyondModel { asked: 131_092, .. }))));
    let error = refused(BenchArgs { depth: u32::MAX, ..args(&model) });
    assert!(matches!(error, BenchError::ContextTooLong { .. }), "{error}");
    let error = refused(args(Path::new("/nonexistent")));
    assert!(error.to_string().contains("/nonexistent"), "{error}");
    Ok(())
}

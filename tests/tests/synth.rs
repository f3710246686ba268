//! `synth-model`: what it writes loads and computes, is the same for equal seeds, and takes little memory to make.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use bulkhead_shared::message::CpuChoice;
use bulkhead_tests::oracle::{Ask, evaluate, json, relative_error};
use bulkhead_tests::synth::{Format, Made, Order, SHARD_BYTES_MAX, synthesize};
use bulkhead_worker::checkpoint::Checkpoint;
use bulkhead_worker::eval::{DecoderPath, WeightChoice};
use bulkhead_worker::model::config::Config;
use bulkhead_worker::model::weights::{Quantize, load};
use bulkhead_worker::text::generation_config::GenerationConfig;
use nix::sys::resource::{UsageWho, getrusage};
use serde_json::json;

const FORMATS: [(Format, &str); 3] = [(Format::Nf4, "nf4"), (Format::Mxfp4, "mxfp4"), (Format::Bf16, "bf16")];

fn preset(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/configs").join(format!("{name}.json"))
}

fn order(format: Format, folder: &Path) -> Order {
    let (config, folder) = (preset("tiny"), folder.to_owned());
    Order { config, format, seed: 1, folder, threads: NonZeroUsize::new(2), shard_bytes_max: SHARD_BYTES_MAX }
}

/// Gives every file of a folder by name.
fn contents(folder: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        files.push((entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path())?));
    }
    files.sort();
    Ok(files)
}

#[test]
fn every_format_computes_sensible_logits_on_both_paths() -> Result<()> {
    for (format, name) in FORMATS {
        let folder = tempfile::tempdir()?;
        synthesize(&order(format, folder.path()))?;
        let config = Config::read(folder.path())?;
        let weights = load(&Checkpoint::open(folder.path())?, &config, Quantize::File, &mut |_, _, _| {})?;
        assert_eq!(weights.format_name(), name);
        assert_eq!(GenerationConfig::open(folder.path())?.eos, [633, 632, 639]);
        let tokens: Vec<i64> = (0..40).map(|i| i * 37 % 600).collect();
        let plain = evaluate(folder.path(), &tokens, Ask::reference(WeightChoice::File))?;
        let fast =
            Ask { decoder_path: DecoderPath::Fast, cpu: CpuChoice::Scalar, ..Ask::reference(WeightChoice::File) };
        let fast = evaluate(folder.path(), &tokens, fast)?;
        // The served path rounds keys and values to bf16.
        let error = relative_error(&fast.logits, &plain.logits);
        assert!(error < 0.02, "{name}: {error}");
        for logits in &plain.logits {
            let count = logits.len() as f32;
            let mean = logits.iter().sum::<f32>() / count;
            let spread = (logits.iter().map(|logit| (logit - mean).powi(2)).sum::<f32>() / count).sqrt();
            assert!((0.5..2.0).contains(&spread), "{name}: {spread}");
        }
    }
    Ok(())
}

#[test]
fn weights_have_the_deviation_of_their_place_in_every_format() -> Result<()> {
    for (format, name) in FORMATS {
        let folder = tempfile::tempdir()?;
        synthesize(&order(format, folder.path()))?;
        let config = Config::read(folder.path())?;
        let weights = load(&Checkpoint::open(folder.path())?, &config, Quantize::File, &mut |_, _, _| {})?;
        let layer = &weights.layers[1];
        let experts = &layer.mlp.experts().context("a mixture of experts")?.experts;
        for linear in [&layer.attention.q, &layer.attention.o, &experts[7].gate_up, &experts[0].down] {
            let values = linear.weight.decode_rows(0..linear.weight.rows());
            let square = values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32;
            let gain = square * linear.weight.cols() as f32;
            assert!((0.9..1.1).contains(&gain), "{name}: {gain}");
        }
        assert!(layer.attention_norm.iter().all(|weight| *weight == 1.0));
    }
    Ok(())
}

#[test]
fn bytes_follow_from_the_seed_and_not_from_the_threads() -> Result<()> {
    for (format, name) in FORMATS {
        let make = |seed, threads| -> Result<Vec<(String, Vec<u8>)>> {
            let folder = tempfile::tempdir()?;
            let threads = NonZeroUsize::new(threads);
            synthesize(&Order { seed, threads, ..order(format, folder.path()) })?;
            contents(folder.path())
        };
        let expected = make(1, 1)?;
        assert!(make(1, 2)? == expected, "{name}");
        assert!(make(2, 2)? != expected, "{name}");
    }
    Ok(())
}

#[test]
fn shards_hold_the_same_tensors_as_one_file() -> Result<()> {
    let (whole, divided) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let one = synthesize(&order(Format::Nf4, whole.path()))?;
    let many = synthesize(&Order { shard_bytes_max: 300_000, ..order(Format::Nf4, divided.path()) })?;
    assert!(one.shards == 1 && many.shards > 2, "{one:?} {many:?}");
    assert_eq!(Made { shards: 1, ..many }, one);
    let (whole, divided) = (Checkpoint::open(whole.path())?, Checkpoint::open(divided.path())?);
    for name in whole.names() {
        let (expected, found) = (whole.tensor(name)?, divided.tensor(name)?);
        assert_eq!((found.shape(), found.dtype()), (expected.shape(), expected.dtype()), "{name}");
        assert!(found.region().bytes() == expected.region().bytes(), "{name}");
    }
    assert_eq!(divided.names().count(), many.tensors);
    Ok(())
}

#[test]
fn what_cannot_be_made_is_refused_before_anything_is_written() -> Result<()> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("notes.txt"), "mine")?;
    let config = |changes: &[(&str, serde_json::Value)]| -> Result<PathBuf> {
        let mut config = json(&preset("tiny"))?;
        for (key, value) in changes {
            config[*key] = value.clone();
        }
        let path = folder.path().join(format!("{}.json", changes[0].0));
        std::fs::write(&path, config.to_string())?;
        Ok(path)
    };
    let target = folder.path().join("model");
    let shape = |config| Order { config, ..order(Format::Mxfp4, &target) };
    let huge = [("num_local_experts", json!(4096)), ("hidden_size", json!(65536)), ("intermediate_size", json!(65536))];
    let cases = [
        (order(Format::Nf4, folder.path()), "is not empty"),
        (shape(PathBuf::from("/nonexistent.json")), "/nonexistent.json"),
        (shape(config(&[("num_attention_heads", json!(0))])?), "num_attention_heads is 0"),
        (shape(config(&[("vocab_size", json!(640)), ("hidden_size", json!(100))])?), "hidden_size is 100, and MXFP4"),
        (shape(config(&huge)?), "make room"),
    ];
    for (order, words) in cases {
        let error = format!("{:#}", synthesize(&order).expect_err(words));
        assert!(error.contains(words), "{words:?} is not in {error:?}");
    }
    assert!(std::fs::read_dir(&target)?.next().is_none(), "nothing was written");
    Ok(())
}

#[test]
fn the_presets_are_configs() -> Result<()> {
    for (name, layers, experts) in [("gpt-oss-20b", 24, 32), ("gpt-oss-20b-6-layers", 6, 32), ("gpt-oss-120b", 36, 128)]
    {
        let path = preset(name);
        let config = Config::parse(&std::fs::read(&path)?, name)?;
        let count = config.experts().context("experts")?.count;
        assert_eq!((config.layers.len(), count, config.hidden_size), (layers, experts, 2880));
        assert_eq!((config.heads, config.kv_heads, config.vocab_size), (64, 8, 201_088));
    }
    Ok(())
}

#[test]
fn a_llama_is_made_and_read_in_both_formats() -> Result<()> {
    for name in ["llama-3.2-1b", "llama-3.2-1b-32k"] {
        let config = Config::parse(&std::fs::read(preset(name))?, name)?;
        assert_eq!((config.layers.len(), config.hidden_size, config.has_tied_embeddings), (16, 2048, true), "{name}");
    }
    let source = tempfile::tempdir()?;
    let mut config = json(&preset("llama-3.2-1b-32k"))?;
    for (key, value) in [("hidden_size", 256), ("intermediate_size", 512), ("num_hidden_layers", 2)] {
        config[key] = json!(value);
    }
    for (key, value) in
        [("num_attention_heads", 4), ("num_key_value_heads", 2), ("vocab_size", 2048), ("eos_token_id", 1)]
    {
        config[key] = json!(value);
    }
    let path = source.path().join("config.json");
    config["bos_token_id"] = json!(0);
    std::fs::write(&path, config.to_string())?;
    for (format, name) in [(Format::Nf4, "nf4"), (Format::Bf16, "bf16")] {
        let folder = tempfile::tempdir()?;
        synthesize(&Order { config: path.clone(), ..order(format, folder.path()) })?;
        let config = Config::read(folder.path())?;
        let weights = load(&Checkpoint::open(folder.path())?, &config, Quantize::File, &mut |_, _, _| {})?;
        assert_eq!(weights.format_name(), name);
        for linear in weights.layers[1].mlp.linears() {
            let values = linear.weight.decode_rows(0..linear.weight.rows());
            let square = values.iter().map(|value| value * value).sum::<f32>() / values.len() as f32;
            assert!((0.9..1.1).contains(&(square * linear.weight.cols() as f32)), "{name}: {square}");
        }
        assert!(folder.path().join("chat_template.jinja").is_file());
    }
    let error = synthesize(&Order { config: path, ..order(Format::Mxfp4, source.path()) }).expect_err("has no experts");
    assert!(error.to_string().contains("MXFP4 is for experts, and LlamaForCausalLM has none"), "{error}");
    Ok(())
}

#[test]
fn making_a_model_takes_far_less_memory_than_the_model() -> Result<()> {
    /// Well above the buffers of two threads, well below the file.
    const PEAK_BYTES_MAX: i64 = 48 << 20;
    const MODEL_BYTES_MIN: u64 = 200 << 20;
    let folder = tempfile::tempdir()?;
    let mut config = json(&preset("tiny"))?;
    for (key, value) in [("hidden_size", 1024), ("intermediate_size", 1024), ("num_local_experts", 16)] {
        config[key] = json!(value);
    }
    config["vocab_size"] = json!(32768);
    let path = folder.path().join("config.json");
    std::fs::write(&path, config.to_string())?;
    let target = folder.path().join("model");
    let mut tool = Command::new(env!("CARGO_BIN_EXE_synth-model"));
    tool.arg("--config").arg(&path).args(["--quant", "nf4", "--threads", "2", "--out"]).arg(&target);
    let output = tool.output().context("the tool starts")?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let model = std::fs::metadata(target.join("model.safetensors"))?.len();
    assert!(model > MODEL_BYTES_MIN, "{model}");
    // Of all children of this process, the largest; Linux counts in KiB.
    let peak = getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss() * 1024;
    assert!(peak < PEAK_BYTES_MAX, "{peak} bytes for a model of {model}");
    Ok(())
}

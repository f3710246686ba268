//! `convert`: what it writes is what quantising here and by bitsandbytes gives, bit by bit, also after being killed; what it
//! refuses; and that it takes little memory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bulkhead_shared::layers::SandboxMode;
use bulkhead_tests::checkpoint::Tensors;
use bulkhead_tests::oracle;
use bulkhead_tests::process;
use bulkhead_tests::server::binary;
use bulkhead_tests::skip;
use bulkhead_tests::synth::{Format, Order, synthesize};
use bulkhead_worker::checkpoint::{Checkpoint, CheckpointError};
use bulkhead_worker::convert::{self, ConvertArgs, ConvertError, Head, MANIFEST_FILE, Manifest, Quant};
use bulkhead_worker::eval::WeightChoice;
use bulkhead_worker::model::config::Config;
use bulkhead_worker::model::weights::{Quantize, Weights, load};
use bulkhead_worker::quant::{Matrix, Scales, mxfp4, quantize_nf4};
use bulkhead_worker::sandbox::Sandboxed;
use nix::sys::signal::Signal;
use safetensors::Dtype;
use serde_json::{Value, json};

fn args(from: &Path, to: &Path, quant: Quant) -> ConvertArgs {
    let (from, to) = (from.to_owned(), to.to_owned());
    ConvertArgs { from, to, quant, lm_head: None, threads: 2, shard_bytes: 1 << 40 }
}

/// Runs the command in this process, which has no walls.
fn run(args: &ConvertArgs) -> Result<(), ConvertError> {
    let (_, begun) = convert::begin(args, SandboxMode::Off)?;
    convert::run(&Sandboxed::without_walls(), begun, args, &mut std::io::sink())
}

/// Gives every file of a folder by name.
fn contents(folder: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let mut files = BTreeMap::new();
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        files.insert(entry.file_name().to_string_lossy().into_owned(), std::fs::read(entry.path())?);
    }
    Ok(files)
}

fn loaded(folder: &Path, quantize: Quantize) -> Result<Weights> {
    Ok(load(&Checkpoint::open(folder)?, &Config::read(folder)?, quantize, &mut |_, _, _| {})?)
}

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../worker/demo-model/checkpoint")
}

/// Compares stored forms and every decoded weight.
fn assert_equal(found: &Matrix, expected: &Matrix, name: &str) {
    assert_eq!(found.format_name(), expected.format_name(), "{name}");
    assert_eq!((found.rows(), found.cols()), (expected.rows(), expected.cols()), "{name}");
    if let (Matrix::Nf4(found), Matrix::Nf4(expected)) = (found, expected) {
        assert!(found.packed().bytes() == expected.packed().bytes(), "{name}: codes");
        let is_nested = |scales: &Scales| matches!(scales, Scales::Nested(_));
        assert!(is_nested(found.scales()) && is_nested(expected.scales()), "{name}");
    }
    let bits = |matrix: &Matrix| matrix.decode_rows(0..matrix.rows()).into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert!(bits(found) == bits(expected), "{name}: weights");
}

#[test]
fn what_is_written_is_what_quantising_at_the_load_gives() -> Result<()> {
    let names = ["gptoss_basic", "gptoss_mxfp4", "gptoss_window_edges", "llama3_untied_sharded", "llama_tied"];
    for source in names.map(oracle::model).into_iter().chain([demo()]) {
        let folder = tempfile::tempdir()?;
        let target = folder.path().join("converted");
        let before = contents(&source)?;
        for shard_bytes in [1 << 40, 100_000] {
            let target = target.join(shard_bytes.to_string());
            run(&ConvertArgs { shard_bytes, ..args(&source, &target, Quant::Nf4) })?;
            let (found, expected) = (loaded(&target, Quantize::File)?, loaded(&source, Quantize::Nf4)?);
            let name = source.display().to_string();
            assert_eq!(found.matrices().count(), expected.matrices().count());
            for (found, expected) in found.matrices().zip(expected.matrices()) {
                assert_equal(found, expected, &name);
            }
            let norms =
                |weights: &Weights| weights.layers.iter().map(|layer| layer.mlp_norm.clone()).collect::<Vec<_>>();
            assert_eq!((norms(&found), &found.final_norm), (norms(&expected), &expected.final_norm), "{name}");
        }
        assert!(contents(&source)? == before, "the source is not touched");
    }
    Ok(())
}

/// Writes a folder whose attention holds the matrices that bitsandbytes quantised; their shapes fit no model.
fn write_vectors(folder: &Path) -> Result<Vec<String>> {
    let vectors = Tensors::read(&oracle::fixture("nf4").join("vectors.safetensors"))?;
    let cases = oracle::json(&oracle::fixture("nf4").join("vectors.json"))?;
    let mut tensors = Tensors::default();
    let mut names = Vec::new();
    for (layer, case) in cases["cases"].as_array().context("a list")?.iter().enumerate() {
        let name = case["name"].as_str().context("a name")?;
        let input = vectors.get(&format!("{name}.input"))?;
        let weight = format!("model.layers.{layer}.self_attn.q_proj.weight");
        tensors.insert(&weight, input.dtype, &input.shape, input.bytes.clone());
        names.push(name.to_owned());
    }
    tensors.write(&folder.join("model.safetensors"))?;
    std::fs::copy(oracle::model("llama_tied").join("config.json"), folder.join("config.json"))?;
    Ok(names)
}

#[test]
fn every_part_equals_that_of_bitsandbytes() -> Result<()> {
    let (source, target) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let names = write_vectors(source.path())?;
    run(&args(source.path(), target.path(), Quant::Nf4))?;
    let expected = Tensors::read(&oracle::fixture("nf4").join("vectors.safetensors"))?;
    let found = Tensors::read(&target.path().join("model.safetensors"))?;
    let manifest = Manifest::read(target.path())?.context("a manifest")?;
    for (layer, name) in names.iter().enumerate() {
        let weight = format!("model.layers.{layer}.self_attn.q_proj.weight");
        let part = |part: &str| Ok::<_, anyhow::Error>(&found.get(&format!("{weight}{part}"))?.bytes);
        let theirs = |part: &str| Ok::<_, anyhow::Error>(&expected.get(&format!("{name}.{part}"))?.bytes);
        let pairs = [
            ("", "packed"),
            (".absmax", "dq.absmax_u8"),
            (".nested_absmax", "dq.nested_absmax"),
            (".nested_quant_map", "dq.nested_code"),
        ];
        for (ours, other) in pairs {
            assert!(part(ours)? == theirs(other)?, "{name}: {other}");
        }
        let state: Value = serde_json::from_slice(part(".quant_state.bitsandbytes__nf4")?)?;
        let offset = state["nested_offset"].as_f64().context("an offset")? as f32;
        assert_eq!(&offset.to_le_bytes().to_vec(), theirs("dq.offset")?, "{name}");
        // The error that the manifest tells is that of the decoded weights, which are recorded in the input's type.
        if expected.get(&format!("{name}.input"))?.dtype != Dtype::F32 {
            continue;
        }
        let (input, ours) =
            (expected.floats(&format!("{name}.input"))?, expected.floats(&format!("{name}.dq.dequant"))?);
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|value| value * value).sum::<f64>();
        let error = square(&mut input.iter().zip(&ours).map(|(a, b)| f64::from(a - b)));
        let norm = square(&mut input.iter().map(|value| f64::from(*value)));
        let expected = if norm > 0.0 { (error / norm).sqrt() } else { 0.0 };
        let told = f64::from(manifest.shards["model.safetensors"].relative_error[&weight]);
        assert!((told - expected).abs() <= 1e-4 * expected + 1e-6, "{name}: {told} and {expected}");
    }
    Ok(())
}

#[test]
fn plain_scales_become_nested_ones_in_the_layout_of_bitsandbytes() -> Result<()> {
    let source = oracle::fixture("nf4").join("llama_bnb_nf4");
    let target = tempfile::tempdir()?;
    run(&args(&source, target.path(), Quant::Nf4))?;
    let found = Tensors::read(&target.path().join("model.safetensors"))?;
    let nested = Tensors::read(&oracle::fixture("nf4").join("llama_bnb_nf4_dq/model.safetensors"))?;
    let form = |tensors: &Tensors| {
        let is_state = |name: &str| name.contains("quant_state");
        let forms = tensors.0.iter().map(|(name, stored)| {
            (name.clone(), stored.dtype, if is_state(name) { Vec::new() } else { stored.shape.clone() })
        });
        forms.collect::<Vec<_>>()
    };
    assert_eq!(form(&found), form(&nested), "names, types and shapes are those that bitsandbytes saves");
    let (found, plain) = (loaded(target.path(), Quantize::File)?, loaded(&source, Quantize::File)?);
    for (found, plain) in found.matrices().zip(plain.matrices()) {
        let (Matrix::Nf4(found), Matrix::Nf4(plain)) = (found, plain) else { continue };
        assert!(found.packed().bytes() == plain.packed().bytes(), "codes stay");
        for block in 0..plain.blocks() {
            let (found, plain) = (found.absmax(block), plain.absmax(block));
            // The dynamic code's largest step is 1/70 of the largest distance from the mean, which the scales themselves bound.
            assert!((found - plain).abs() < 0.05 * plain.abs().max(0.1), "block {block}: {found} and {plain}");
        }
    }
    Ok(())
}

#[test]
fn mxfp4_is_kept_bit_by_bit() -> Result<()> {
    let (source, target) = (oracle::model("gptoss_mxfp4"), tempfile::tempdir()?);
    run(&args(&source, target.path(), Quant::Keep))?;
    let (found, expected) = (loaded(target.path(), Quantize::File)?, loaded(&source, Quantize::File)?);
    assert_eq!(found.format_name(), "mxfp4");
    for (found, expected) in found.matrices().zip(expected.matrices()) {
        assert_equal(found, expected, "kept");
    }
    assert_eq!(std::fs::read(source.join("config.json"))?, std::fs::read(target.path().join("config.json"))?);
    Ok(())
}

#[test]
fn the_output_matrix_is_quantised_where_that_is_asked_for() -> Result<()> {
    let target = tempfile::tempdir()?;
    let lm_head = Some(Head::Nf4);
    run(&ConvertArgs { lm_head, ..args(&oracle::model("gptoss_basic"), target.path(), Quant::Nf4) })?;
    let weights = loaded(target.path(), Quantize::File)?;
    assert_eq!((weights.lm_head.format_name(), weights.embedding.format_name()), ("nf4", "bf16"));
    let config = oracle::json(&target.path().join("config.json"))?;
    assert_eq!(config["quantization_config"]["llm_int8_skip_modules"], json!(["embed_tokens", "router"]));
    Ok(())
}

#[test]
fn a_tied_output_matrix_is_parted_from_the_embedding_where_it_is_quantised() -> Result<()> {
    let (source, target) = (oracle::model("llama_tied"), tempfile::tempdir()?);
    let lm_head = Some(Head::Nf4);
    run(&ConvertArgs { lm_head, ..args(&source, target.path(), Quant::Nf4) })?;
    let (found, tied) = (loaded(target.path(), Quantize::File)?, loaded(&source, Quantize::File)?);
    assert!(!found.is_tied() && tied.is_tied());
    let decoded = |matrix: &Matrix| matrix.decode_rows(0..matrix.rows());
    assert_eq!(decoded(&found.embedding), decoded(&tied.embedding), "the embedding stays");
    let expected = quantize_nf4(found.lm_head.rows(), found.lm_head.cols(), &decoded(&tied.embedding))?;
    assert_equal(&found.lm_head, &Matrix::Nf4(expected), "output matrix");
    assert_eq!(oracle::json(&target.path().join("config.json"))?["tie_word_embeddings"], json!(false));
    Ok(())
}

#[test]
fn experts_become_mxfp4_and_all_else_stays() -> Result<()> {
    for source in [oracle::model("gptoss_basic"), oracle::model("gptoss_window_edges")] {
        let target = tempfile::tempdir()?;
        run(&args(&source, target.path(), Quant::Mxfp4))?;
        let (found, expected) = (loaded(target.path(), Quantize::File)?, loaded(&source, Quantize::File)?);
        let mut experts = 0;
        for (found, expected) in found.matrices().zip(expected.matrices()) {
            let wanted = expected.decode_rows(0..expected.rows());
            let Matrix::Mxfp4(mxfp4) = found else {
                assert_eq!(found.decode_rows(0..found.rows()), wanted);
                continue;
            };
            experts += 1;
            let groups = wanted.as_chunks::<{ mxfp4::GROUP }>().0.iter().map(mxfp4::quantize_group);
            let (codes, scales): (Vec<_>, Vec<u8>) = groups.unzip();
            assert!(mxfp4.blocks().bytes() == codes.as_flattened() && mxfp4.scales().bytes() == scales);
        }
        let config = Config::read(target.path())?;
        let mixture = config.experts().context("a model of experts")?;
        assert_eq!(experts, 2 * mixture.count * config.layers.len());
        let manifest = Manifest::read(target.path())?.context("a manifest")?;
        let errors: Vec<f32> =
            manifest.shards.values().flat_map(|shard| shard.relative_error.values()).copied().collect();
        assert_eq!(errors.len(), 2 * config.layers.len());
        // Of weights that are spread as those of a normal distribution a tenth.
        assert!(errors.iter().all(|error| (0.05..0.2).contains(error)), "{errors:?}");
    }
    Ok(())
}

#[test]
fn single_precision_is_rounded_where_it_is_not_quantised() -> Result<()> {
    let (source, target) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let model = oracle::model("llama_tied");
    std::fs::copy(model.join("config.json"), source.path().join("config.json"))?;
    let mut tensors = Tensors::read(&model.join("model.safetensors"))?;
    let names: Vec<String> = tensors.0.keys().cloned().collect();
    for name in names {
        let (shape, values) = (tensors.get(&name)?.shape.clone(), tensors.floats(&name)?);
        tensors.insert_floats(&name, &shape, &values.iter().map(|value| value * 1.001).collect::<Vec<_>>());
    }
    tensors.write(&source.path().join("model.safetensors"))?;
    run(&args(source.path(), target.path(), Quant::Nf4))?;
    let found = Tensors::read(&target.path().join("model.safetensors"))?;
    let name = "model.embed_tokens.weight";
    assert_eq!((found.get(name)?.dtype, found.get("model.norm.weight")?.dtype), (Dtype::BF16, Dtype::F32));
    for (found, expected) in found.floats(name)?.into_iter().zip(tensors.floats(name)?) {
        // Half a step of eight bits.
        assert!((found - expected).abs() <= expected.abs() / 256.0, "{found} and {expected}");
    }
    loaded(target.path(), Quantize::File)?;
    Ok(())
}

#[track_caller]
fn refused(args: &ConvertArgs, words: &str) -> ConvertError {
    let error = run(args).expect_err("refused");
    assert!(error.to_string().contains(words), "{words:?} is not in {error}");
    error
}

#[test]
fn folders_that_cannot_be_written_to() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("source");
    std::fs::create_dir(&source)?;
    for (name, bytes) in contents(&oracle::model("llama_tied"))? {
        std::fs::write(source.join(name), bytes)?;
    }
    for to in [source.clone(), source.join("inside"), source.join("../source/inside"), folder.path().to_owned()] {
        assert!(matches!(refused(&args(&source, &to, Quant::Nf4), "beside the source"), ConvertError::Nested { .. }));
    }
    assert!(!source.join("inside").exists());
    let to = folder.path().join("foreign");
    std::fs::create_dir(&to)?;
    std::fs::write(to.join("thesis.txt"), "years of work")?;
    let error = refused(&args(&source, &to, Quant::Nf4), "thesis.txt");
    assert!(matches!(error, ConvertError::Foreign { .. }));
    assert_eq!(contents(&to)?.len(), 1);

    let to = folder.path().join("converted");
    run(&args(&source, &to, Quant::Nf4))?;
    let before = contents(&to)?;
    run(&args(&source, &to, Quant::Nf4))?;
    refused(&args(&source, &to, Quant::Keep), "another --quant");
    refused(&ConvertArgs { shard_bytes: 5, ..args(&source, &to, Quant::Nf4) }, "another --shard-bytes");
    refused(&args(&oracle::model("gptoss_basic"), &to, Quant::Nf4), "another source");
    assert!(contents(&to)? == before, "a finished conversion stays");
    std::fs::remove_file(to.join("model.safetensors"))?;
    run(&args(&source, &to, Quant::Nf4))?;
    assert!(contents(&to)? == before, "a file that was lost is made again");
    std::fs::write(to.join(MANIFEST_FILE), "{")?;
    assert!(matches!(refused(&args(&source, &to, Quant::Nf4), "malformed"), ConvertError::Manifest { .. }));
    let missing = folder.path().join("nowhere");
    let error = refused(&args(&missing, &folder.path().join("new"), Quant::Nf4), "not a model folder");
    assert!(matches!(error, ConvertError::Checkpoint(CheckpointError::Folder { .. })));
    assert!(!folder.path().join("new").exists());
    Ok(())
}

#[test]
fn choices_and_weights_that_cannot_be() -> Result<()> {
    let target = tempfile::tempdir()?;
    let with_head = |name: &str, quant, head| {
        let lm_head = Some(head);
        ConvertArgs { lm_head, ..args(&oracle::model(name), target.path(), quant) }
    };
    refused(&with_head("gptoss_mxfp4", Quant::Keep, Head::Wide), "changes no weight");
    refused(&with_head("gptoss_basic", Quant::Mxfp4, Head::Nf4), "changes experts alone");
    let mxfp4 = |source: PathBuf, words| refused(&args(&source, target.path(), Quant::Mxfp4), words);
    mxfp4(demo(), "bitsandbytes' 4 bits");
    assert!(matches!(mxfp4(oracle::model("llama_tied"), "has none: take nf4"), ConvertError::NoExperts));
    let source = tempfile::tempdir()?;
    let model = oracle::model("llama_tied");
    std::fs::copy(model.join("config.json"), source.path().join("config.json"))?;
    let mut tensors = Tensors::read(&model.join("model.safetensors"))?;
    let name = "model.layers.1.mlp.up_proj.weight";
    let stored = tensors.0.get_mut(name).context("it has one")?;
    stored.bytes[40..42].copy_from_slice(&[0x80, 0x7f]);
    tensors.write(&source.path().join("model.safetensors"))?;
    let error = refused(&args(source.path(), target.path(), Quant::Nf4), "weight 20 is inf");
    assert!(matches!(error, ConvertError::Checkpoint(CheckpointError::Format { ref tensor, .. }) if tensor == name));
    assert!(!target.path().join("config.json").exists(), "an unfinished folder is no model");
    Ok(())
}

/// How often the conversion is killed.
const KILLS: u32 = 10;

fn synthesized(folder: &Path, format: Format, config: &Value) -> Result<PathBuf> {
    let (path, folder) = (folder.join("shape.json"), folder.join("model"));
    std::fs::write(&path, config.to_string())?;
    synthesize(&Order {
        config: path,
        format,
        seed: 9,
        folder: folder.clone(),
        threads: None,
        shard_bytes_max: 20 << 20,
    })?;
    Ok(folder)
}

fn shape(name: &str) -> Result<Value> {
    oracle::json(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/configs").join(format!("{name}.json")))
}

/// Starts the command as a person does, behind its walls.
fn start(from: &Path, to: &Path, threads: usize) -> Result<Child> {
    let mut command = Command::new(binary("bulkhead-worker"));
    command.arg("convert").arg("--from").arg(from).arg("--to").arg(to).args(["--quant", "nf4"]);
    command.args(["--threads", &threads.to_string(), "--shard-bytes", "1000000"]);
    Ok(command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()?)
}

fn finish(child: Child) -> Result<()> {
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[test]
fn killed_at_any_moment_and_started_again_it_writes_the_same_files() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut config = shape("tiny")?;
    config["num_hidden_layers"] = json!(4);
    config["hidden_size"] = json!(256);
    config["intermediate_size"] = json!(512);
    config.as_object_mut().context("an object")?.remove("layer_types");
    let source = synthesized(folder.path(), Format::Mxfp4, &config)?;
    let (whole, killed) = (folder.path().join("whole"), folder.path().join("killed"));
    let started = Instant::now();
    finish(start(&source, &whole, 2)?)?;
    let duration = started.elapsed();
    let expected = contents(&whole)?;
    assert!(expected.len() > 8, "there are several shards: {:?}", expected.keys());
    let (mut state, mut kills, mut starts, mut shards) = (0x2545_f491_4f6c_dd1d_u64, 0, 0, Vec::new());
    while kills < KILLS {
        starts += 1;
        assert!(starts <= 10 * KILLS, "{kills} kills of {starts} starts within {duration:?}");
        let mut child = start(&source, &killed, 2)?;
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        std::thread::sleep(duration.mul_f64((state % 1000) as f64 / 1000.0));
        process::signal(child.id().try_into()?, Signal::SIGKILL);
        if child.wait()?.success() {
            assert_same(&contents(&killed)?, &expected);
            std::fs::remove_dir_all(&killed)?;
            continue;
        }
        kills += 1;
        shards.push(Manifest::read(&killed).ok().flatten().map_or(0, |manifest| manifest.shards.len()));
    }
    finish(start(&source, &killed, 2)?)?;
    println!("{kills} kills of {starts} starts within {duration:?} each; finished shards after each: {shards:?}");
    assert_same(&contents(&killed)?, &expected);
    let one = folder.path().join("one");
    finish(start(&source, &one, 1)?)?;
    assert_same(&contents(&one)?, &expected);
    Ok(())
}

fn assert_same(found: &BTreeMap<String, Vec<u8>>, expected: &BTreeMap<String, Vec<u8>>) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, bytes) in expected {
        assert!(found[name] == *bytes, "{name} differs");
    }
}

#[test]
fn memory_does_not_grow_with_the_model() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut config = shape("tiny")?;
    for (field, value) in [("num_hidden_layers", 2), ("hidden_size", 1024), ("intermediate_size", 2048)] {
        config[field] = json!(value);
    }
    config.as_object_mut().context("an object")?.remove("layer_types");
    let source = synthesized(folder.path(), Format::Bf16, &config)?;
    let bytes: usize = contents(&source)?.values().map(Vec::len).sum();
    let mut child = start(&source, &folder.path().join("converted"), 2)?;
    let (pid, mut peak_kib) = (i32::try_from(child.id())?, 0u64);
    while child.try_wait()?.is_none() {
        // A process that has just ended has no memory left to tell of.
        let line = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let peak = line.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse().ok());
        peak_kib = peak_kib.max(peak.unwrap_or(0));
        std::thread::sleep(Duration::from_millis(2));
    }
    finish(child)?;
    println!("{} MB of source, {} MB of memory at most", bytes >> 20, peak_kib >> 10);
    assert!(peak_kib > 0, "it was seen running");
    assert!(bytes as u64 > 100 << 20, "the source is large beside what a conversion holds: {bytes}");
    assert!(peak_kib << 10 < 90 << 20, "slices of two threads, and the program: {peak_kib} KiB");
    Ok(())
}

/// Prints the logits of a prompt by transformers with bitsandbytes, or why it cannot.
const TRANSFORMERS: &str = r#"
import json, sys
try:
    import bitsandbytes, torch, transformers
except ImportError as error:
    print(json.dumps({"skipped": str(error)}))
    sys.exit()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], device_map="cpu")
linear = model.model.layers[0].self_attn.q_proj
assert isinstance(linear, bitsandbytes.nn.Linear4bit), type(linear)
with torch.no_grad():
    logits = model(torch.tensor([json.loads(sys.argv[2])])).logits[0].float()
print(json.dumps({"logits": logits.tolist()}))
"#;

#[test]
fn transformers_loads_a_dense_model() -> Result<()> {
    let target = tempfile::tempdir()?;
    run(&args(&oracle::model("llama3_untied_sharded"), target.path(), Quant::Nf4))?;
    let tokens: Vec<i64> = (3..40).collect();
    let prompt = json!(tokens).to_string();
    let python = Command::new("python3").args(["-c", TRANSFORMERS]).arg(target.path()).arg(prompt).output();
    let output = match python {
        Ok(output) => output,
        Err(error) => {
            skip(&format!("no python3: {error}"));
            return Ok(());
        }
    };
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout)?;
    let answer: Value = serde_json::from_str(text.lines().last().context("an answer")?)?;
    if let Some(reason) = answer["skipped"].as_str() {
        skip(&format!("transformers with bitsandbytes is not there: {reason}"));
        return Ok(());
    }
    let expected: Vec<Vec<f32>> = serde_json::from_value(answer["logits"].clone())?;
    let found = oracle::evaluate(target.path(), &tokens, oracle::Ask::reference(WeightChoice::File))?;
    let error = oracle::relative_error(&found.logits, &expected);
    // They round to bf16, which has eight bits, after every operation.
    assert!(error < 0.03, "{error}");
    Ok(())
}

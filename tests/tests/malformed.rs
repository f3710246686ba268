//! Malformed checkpoints: a small valid folder, one fault at a time, and the error that names it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use bulkhead_tests::checkpoint::{Experts, Tensors, write_nf4};
use bulkhead_tests::oracle;
use bulkhead_worker::checkpoint::{Checkpoint, CheckpointError, HeaderError, QuantStateError};
use bulkhead_worker::model::config::{Config, ConfigError};
use bulkhead_worker::model::weights::{Quantize, Weights, load};
use bulkhead_worker::quant::{FormatError, Statistics};
use safetensors::Dtype;
use serde_json::{Value, json};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "model-00001-of-00002.safetensors";

/// A copy of a model that may be damaged.
struct Folder(tempfile::TempDir);

impl Folder {
    /// Copies a model of the oracle.
    fn of(model: &str) -> Result<Folder> {
        let folder = tempfile::tempdir()?;
        for entry in std::fs::read_dir(oracle::model(model))? {
            let path = entry?.path();
            let name = path.file_name().context("a name")?.to_string_lossy().into_owned();
            if name == "config.json" || name.starts_with("model") {
                std::fs::write(folder.path().join(&name), std::fs::read(&path)?)?;
            }
        }
        Ok(Folder(folder))
    }

    /// One file of floats: the smallest model.
    fn dense() -> Result<Folder> {
        Folder::of("gptoss_window_edges")
    }

    /// Shards, experts in MXFP4.
    fn mxfp4() -> Result<Folder> {
        Folder::of("gptoss_mxfp4")
    }

    /// One file in NF4.
    fn nf4(experts: Experts, statistics: Statistics) -> Result<Folder> {
        let folder = tempfile::tempdir()?;
        write_nf4(&oracle::model("gptoss_window_edges"), folder.path(), experts, statistics)?;
        Ok(Folder(folder))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn load(&self) -> Result<Weights, CheckpointError> {
        load_folder(self.0.path())
    }

    /// Edits the tensors of a file.
    fn edit(&self, file: &str, edit: impl FnOnce(&mut Tensors) -> Result<()>) -> Result<()> {
        let mut tensors = Tensors::read(&self.path(file))?;
        edit(&mut tensors)?;
        tensors.write(&self.path(file))
    }

    /// Removes a tensor of a file.
    fn remove(&self, file: &str, name: &str) -> Result<()> {
        self.edit(file, |tensors| {
            tensors.0.remove(name).with_context(|| name.to_owned())?;
            Ok(())
        })
    }

    /// Edits a JSON file.
    fn edit_json(&self, file: &str, edit: impl FnOnce(&mut Value)) -> Result<()> {
        let mut value = oracle::json(&self.path(file))?;
        edit(&mut value);
        Ok(std::fs::write(self.path(file), value.to_string())?)
    }

    /// Edits the bytes of a file.
    fn edit_bytes(&self, file: &str, edit: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let mut bytes = std::fs::read(self.path(file))?;
        edit(&mut bytes);
        Ok(std::fs::write(self.path(file), bytes)?)
    }

    /// Edits the header of a file as text; the data stays.
    fn edit_header(&self, file: &str, edit: impl FnOnce(&mut Value)) -> Result<()> {
        self.edit_bytes(file, |bytes| {
            let length = u64::from_le_bytes(*bytes.first_chunk().expect("a valid file")) as usize;
            let mut header = serde_json::from_slice(&bytes[8..8 + length]).expect("a valid header");
            edit(&mut header);
            let text = header.to_string();
            let data = bytes.split_off(8 + length);
            *bytes = [(text.len() as u64).to_le_bytes().to_vec(), text.into_bytes(), data].concat();
        })
    }
}

fn load_folder(path: &Path) -> Result<Weights, CheckpointError> {
    let config = Config::read(path).expect("the config is as it was");
    load(&Checkpoint::open(path)?, &config, Quantize::File, &mut |_, _, _| {})
}

/// Damages a folder, loads it, and checks that the error says `words`, the file and the tensor among them.
#[track_caller]
fn refused(folder: &Folder, damage: Result<()>, words: &[&str]) -> CheckpointError {
    damage.expect("the damage was done");
    let error = folder.load().expect_err("a damaged checkpoint is refused");
    let text = error.to_string();
    for words in words {
        assert!(text.contains(words), "{words:?} is not in {text:?}");
    }
    error
}

#[test]
fn the_undamaged_folders_load() -> Result<()> {
    Folder::dense()?.load()?;
    Folder::mxfp4()?.load()?;
    for experts in [Experts::Single, Experts::Fused] {
        for statistics in [Statistics::Plain, Statistics::Nested] {
            let folder = Folder::nf4(experts, statistics)?;
            folder.edit(SINGLE, |_| Ok(()))?;
            folder.edit_header(SINGLE, |_| {})?;
            folder.load()?;
        }
    }
    Ok(())
}

#[test]
fn folders_without_a_model() -> Result<()> {
    let folder = Folder::dense()?;
    let open = |path: &Path| Checkpoint::open(path).expect_err("refused");
    assert!(matches!(open(&folder.path("nowhere")), CheckpointError::Folder { .. }));
    assert!(matches!(open(&folder.path("config.json")), CheckpointError::Folder { .. }));
    std::fs::remove_file(folder.path(SINGLE))?;
    let error = refused(&folder, Ok(()), &["neither model.safetensors nor"]);
    assert!(matches!(error, CheckpointError::NoWeights { .. }));
    let error = refused(&folder, Ok(std::fs::create_dir(folder.path(SINGLE))?), &[SINGLE, "not a regular file"]);
    assert!(matches!(error, CheckpointError::Read { .. }));
    Ok(())
}

#[test]
fn damaged_headers() -> Result<()> {
    let check = |damage: &dyn Fn(&mut Vec<u8>), words: &str| -> Result<HeaderError> {
        let folder = Folder::dense()?;
        let damage = folder.edit_bytes(SINGLE, damage);
        let error = refused(&folder, damage, &[SINGLE, words]);
        let CheckpointError::Header { source, .. } = error else { return Err(error.into()) };
        Ok(source)
    };
    let set_length = |bytes: &mut Vec<u8>, length: u64| bytes[..8].copy_from_slice(&length.to_le_bytes());
    ensure!(matches!(check(&|bytes| bytes.clear(), "0 bytes")?, HeaderError::TooShort { .. }));
    ensure!(matches!(check(&|bytes| bytes.truncate(5), "5 bytes")?, HeaderError::TooShort { .. }));
    ensure!(matches!(check(&|bytes| bytes.truncate(100), "truncated")?, HeaderError::Truncated { .. }));
    let bomb = check(&|bytes| set_length(bytes, u64::MAX), "18446744073709551615")?;
    ensure!(matches!(bomb, HeaderError::TooLong { .. }));
    let long = check(&|bytes| set_length(bytes, 1 << 25), "truncated")?;
    ensure!(matches!(long, HeaderError::Truncated { .. }));
    ensure!(matches!(check(&|bytes| bytes[9] = b'\\', "malformed")?, HeaderError::Json { .. }));
    let cut = check(&|bytes| bytes.truncate(bytes.len() - 1), "truncated")?;
    ensure!(matches!(cut, HeaderError::OutOfRange { .. }));
    ensure!(matches!(check(&|bytes| bytes.push(0), "belong to no tensor")?, HeaderError::Unclaimed { .. }));
    Ok(())
}

#[test]
fn damaged_entries_name_their_tensor() -> Result<()> {
    const NAME: &str = "model.norm.weight";
    let check = |key: &str, value: Value, words: &str| -> Result<HeaderError> {
        let folder = Folder::dense()?;
        let damage = folder.edit_header(SINGLE, |header| header[NAME][key] = value);
        let error = refused(&folder, damage, &[SINGLE, words]);
        let CheckpointError::Header { source, .. } = error else { return Err(error.into()) };
        Ok(source)
    };
    let far = u64::MAX - 64;
    ensure!(matches!(check("dtype", json!("X9"), NAME)?, HeaderError::UnknownDtype { .. }));
    ensure!(matches!(check("shape", json!([u64::MAX, 2]), NAME)?, HeaderError::ShapeOverflow { .. }));
    ensure!(matches!(check("shape", json!([65]), "needs 130 bytes")?, HeaderError::SizeMismatch { .. }));
    ensure!(matches!(check("data_offsets", json!([far, u64::MAX]), NAME)?, HeaderError::OutOfRange { .. }));
    ensure!(matches!(check("data_offsets", json!([0, 128]), "inside tensor")?, HeaderError::Overlap { .. }));
    ensure!(matches!(check("data_offsets", json!([128]), NAME)?, HeaderError::Json { .. }));
    Ok(())
}

#[test]
fn damaged_shards() -> Result<()> {
    let folder = Folder::mxfp4()?;
    let error = refused(&folder, Ok(std::fs::remove_file(folder.path(SHARD))?), &[SHARD, "missing"]);
    assert!(matches!(error, CheckpointError::MissingShard { .. }));

    let folder = Folder::mxfp4()?;
    let moved = folder.edit_json(INDEX, |index| index["weight_map"]["model.norm.weight"] = json!(SHARD));
    let error = refused(&folder, moved, &[SHARD, "model.norm.weight"]);
    assert!(matches!(error, CheckpointError::NotInShard { .. }));

    let folder = Folder::mxfp4()?;
    let copied = folder.edit(SHARD, |tensors| {
        let other = Tensors::read(&folder.path("model-00000-of-00002.safetensors"))?;
        tensors.0.insert("lm_head.weight".to_owned(), other.get("lm_head.weight")?.clone());
        Ok(())
    });
    let error = refused(&folder, copied, &[SHARD, "model-00000-of-00002", "lm_head.weight"]);
    assert!(matches!(error, CheckpointError::DuplicateTensor { .. }));

    let folder = Folder::mxfp4()?;
    let outside = folder.edit_json(INDEX, |index| index["weight_map"]["model.norm.weight"] = json!("../x.safetensors"));
    assert!(matches!(refused(&folder, outside, &[INDEX, "../x"]), CheckpointError::ShardName { .. }));

    let folder = Folder::mxfp4()?;
    let emptied = folder.edit_json(INDEX, |index| index["weight_map"] = json!({}));
    assert!(matches!(refused(&folder, emptied, &[INDEX, "0 shards"]), CheckpointError::ShardCount { .. }));
    let broken = folder.edit_bytes(INDEX, |bytes| bytes.truncate(10));
    assert!(matches!(refused(&folder, broken, &[INDEX, "malformed"]), CheckpointError::Index { .. }));
    let huge = std::fs::File::options().write(true).open(folder.path(INDEX))?;
    let error = refused(&folder, Ok(huge.set_len((64 << 20) + 1)?), &[INDEX, "67108865 bytes"]);
    assert!(matches!(error, CheckpointError::TooLarge { .. }));
    Ok(())
}

#[test]
fn every_tensor_must_be_there() -> Result<()> {
    let all = [Folder::dense()?, Folder::nf4(Experts::Single, Statistics::Nested)?];
    for source in all.into_iter().chain([Folder::nf4(Experts::Fused, Statistics::Nested)?]) {
        let tensors = Tensors::read(&source.path(SINGLE))?;
        for name in tensors.0.keys() {
            let mut without = tensors.clone();
            without.0.remove(name);
            without.write(&source.path(SINGLE))?;
            assert!(source.load().is_err(), "{name} is missing unnoticed");
        }
    }
    let folder = Folder::dense()?;
    let name = "model.layers.1.self_attn.sinks";
    let removed = folder.remove(SINGLE, name);
    assert!(matches!(refused(&folder, removed, &[name, "missing"]), CheckpointError::MissingTensor { .. }));
    Ok(())
}

#[test]
fn every_tensor_must_have_its_shape_and_type() -> Result<()> {
    for source in [
        Folder::dense()?,
        Folder::nf4(Experts::Single, Statistics::Nested)?,
        Folder::nf4(Experts::Fused, Statistics::Plain)?,
    ] {
        let tensors = Tensors::read(&source.path(SINGLE))?;
        for name in tensors.0.keys().filter(|name| !name.contains("quant_state")) {
            let mut misshapen = tensors.clone();
            let stored = misshapen.0.get_mut(name).context("there")?;
            stored.shape.push(1);
            stored.shape.swap(0, 1);
            misshapen.write(&source.path(SINGLE))?;
            let error = source.load().expect_err(name);
            assert!(matches!(error, CheckpointError::WrongShape { .. }), "{name}: {error}");
            assert!(error.to_string().contains(name), "{error}");

            let mut mistyped = tensors.clone();
            let stored = mistyped.0.get_mut(name).context("there")?;
            let types = [(Dtype::U8, Dtype::I8), (Dtype::F32, Dtype::I32), (Dtype::BF16, Dtype::I16)];
            stored.dtype = types.iter().find(|(from, _)| *from == stored.dtype).context("a known type")?.1;
            mistyped.write(&source.path(SINGLE))?;
            let error = source.load().expect_err(name);
            assert!(matches!(error, CheckpointError::WrongDtype { .. }), "{name}: {error}");
            assert!(error.to_string().contains(name), "{error}");
        }
    }
    Ok(())
}

#[test]
fn numbers_that_are_none() -> Result<()> {
    let nan = |tensors: &mut Tensors, name: &str| -> Result<()> {
        let stored = tensors.0.get_mut(name).with_context(|| name.to_owned())?;
        let end = stored.bytes.len();
        let pattern: &[u8] = if stored.dtype == Dtype::F32 { &[0, 0, 0xc0, 0x7f] } else { &[0xc0, 0x7f] };
        stored.bytes[end - pattern.len()..].copy_from_slice(pattern);
        Ok(())
    };
    for name in [
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.sinks",
        "model.layers.1.self_attn.k_proj.bias",
        "model.layers.0.mlp.router.bias",
        "model.layers.0.mlp.experts.down_proj_bias",
    ] {
        let folder = Folder::dense()?;
        let error = refused(&folder, folder.edit(SINGLE, |tensors| nan(tensors, name)), &[SINGLE, name, "NaN"]);
        assert!(matches!(error, CheckpointError::NotFinite { .. }), "{error}");
    }
    let name = "model.layers.0.mlp.experts.down_proj";
    for (statistics, part) in [
        (Statistics::Plain, "absmax"),
        (Statistics::Nested, "nested_absmax"),
        (Statistics::Nested, "nested_offset"),
        (Statistics::Nested, "nested_quant_map"),
    ] {
        let folder = Folder::nf4(Experts::Fused, statistics)?;
        let part = format!("{name}.{part}");
        refused(&folder, folder.edit(SINGLE, |tensors| nan(tensors, &part)), &[SINGLE, &part, "NaN"]);
    }
    let folder = Folder::mxfp4()?;
    let scales = format!("{name}_scales");
    let shard = "model-00000-of-00002.safetensors";
    let damage = folder.edit(shard, |tensors| {
        let stored = tensors.0.get_mut(&scales).context("scales")?;
        stored.bytes[300] = 255;
        Ok(())
    });
    let error = refused(&folder, damage, &[shard, &scales, "scale 300 is 255"]);
    assert!(matches!(error, CheckpointError::Format { source: FormatError::ScaleNotFinite { .. }, .. }));
    Ok(())
}

#[test]
fn weights_that_cannot_be_quantised() -> Result<()> {
    let folder = Folder::dense()?;
    let name = "model.layers.0.self_attn.q_proj.weight";
    folder.edit(SINGLE, |tensors| {
        let stored = tensors.0.get_mut(name).context("there")?;
        stored.bytes[..2].copy_from_slice(&[0x80, 0x7f]);
        Ok(())
    })?;
    let config = Config::read(folder.0.path())?;
    let checkpoint = Checkpoint::open(folder.0.path())?;
    let error = load(&checkpoint, &config, Quantize::Nf4, &mut |_, _, _| {}).expect_err("an infinite weight");
    assert!(matches!(error, CheckpointError::Format { source: FormatError::WeightNotFinite { index: 0, .. }, .. }));
    assert!(error.to_string().contains(name), "{error}");
    Ok(())
}

#[test]
fn damaged_quantisation_states() -> Result<()> {
    let check = |experts: Experts, edit: &dyn Fn(&mut Value), words: &str| -> Result<QuantStateError> {
        let folder = Folder::nf4(experts, Statistics::Nested)?;
        let name = match experts {
            Experts::Single => "model.layers.0.mlp.experts.down_projs.1.weight",
            Experts::Fused => "model.layers.0.mlp.experts.down_proj",
        };
        let name = format!("{name}.quant_state.bitsandbytes__nf4");
        let damage = folder.edit(SINGLE, |tensors| {
            let mut state = serde_json::from_slice(&tensors.get(&name)?.bytes)?;
            edit(&mut state);
            let bytes = state.to_string().into_bytes();
            tensors.insert(&name, Dtype::U8, &[bytes.len()], bytes);
            Ok(())
        });
        let error = refused(&folder, damage, &[SINGLE, &name, words]);
        let CheckpointError::QuantState { source, .. } = error else { return Err(error.into()) };
        Ok(source)
    };
    for experts in [Experts::Single, Experts::Fused] {
        let set = |key: &'static str, value: Value| move |state: &mut Value| state[key] = value.clone();
        let found = check(experts, &set("quant_type", json!("fp4")), "\"fp4\" is not supported")?;
        ensure!(matches!(found, QuantStateError::QuantType { .. }));
        ensure!(matches!(check(experts, &|state| *state = json!([1]), "malformed")?, QuantStateError::Json(_)));
        let padded = set("more", json!("x".repeat(64 << 10)));
        ensure!(matches!(check(experts, &padded, "more than the limit")?, QuantStateError::TooLarge { .. }));
        for (key, value, words) in [
            ("shape", json!([64, 32]), "shape of the quantisation state is [64, 32]"),
            ("blocksize", json!(0), "blocksize of the quantisation state is 0"),
            ("blocksize", json!(63), "blocksize of the quantisation state is 63"),
            ("dtype", json!("int8"), "dtype of the quantisation state is int8"),
            ("nested_blocksize", json!(0), "nested_blocksize of the quantisation state is 0"),
            ("nested_dtype", json!("float16"), "nested_dtype of the quantisation state is float16"),
        ] {
            ensure!(matches!(check(experts, &set(key, value), words)?, QuantStateError::Field { .. }));
        }
    }
    let dropped = |state: &mut Value| state["nested_offset"] = Value::Null;
    ensure!(matches!(check(Experts::Single, &dropped, "nested_offset")?, QuantStateError::Field { .. }));
    Ok(())
}

#[test]
fn other_code_tables_are_refused() -> Result<()> {
    let weight = "model.layers.0.self_attn.q_proj.weight";
    let folder = Folder::nf4(Experts::Single, Statistics::Plain)?;
    let map = format!("{weight}.quant_map");
    let swapped = folder.edit(SINGLE, |tensors| {
        let mut values = tensors.floats(&map)?;
        values.swap(3, 4);
        tensors.insert_floats(&map, &[16], &values);
        Ok(())
    });
    let error = refused(&folder, swapped, &[SINGLE, &map, "code 3"]);
    assert!(matches!(error, CheckpointError::QuantState { source: QuantStateError::QuantMap { code: 3, .. }, .. }));

    let folder = Folder::nf4(Experts::Single, Statistics::Plain)?;
    let renamed = folder.edit(SINGLE, |tensors| {
        let state = tensors.0.remove(&format!("{weight}.quant_state.bitsandbytes__nf4")).context("there")?;
        tensors.0.insert(format!("{weight}.quant_state.bitsandbytes__fp4"), state);
        Ok(())
    });
    let error = refused(&folder, renamed, &[SINGLE, weight, "\"fp4\" is not supported"]);
    assert!(matches!(error, CheckpointError::QuantState { source: QuantStateError::QuantType { .. }, .. }));
    Ok(())
}

#[test]
fn a_config_that_contradicts_the_weights() -> Result<()> {
    let check = |folder: Folder, key: &str, value: Value, words: &[&str]| {
        let edit = folder.edit_json("config.json", |config| config[key] = value);
        refused(&folder, edit, words)
    };
    let error = check(Folder::dense()?, "vocab_size", json!(449), &["embed_tokens", "[448, 64]", "[449, 64]"]);
    assert!(matches!(error, CheckpointError::WrongShape { .. }));
    let error = check(Folder::dense()?, "num_local_experts", json!(4), &["router.weight", "[3, 64]", "[4, 64]"]);
    assert!(matches!(error, CheckpointError::WrongShape { .. }));
    let mxfp4 = json!({"quant_method": "mxfp4"});
    let error = check(Folder::dense()?, "quantization_config", mxfp4.clone(), &["\"mxfp4\"", "not quantised"]);
    assert!(matches!(error, CheckpointError::QuantizationClaim { .. }));
    let error = check(Folder::nf4(Experts::Fused, Statistics::Nested)?, "quantization_config", mxfp4, &["are nf4"]);
    assert!(matches!(error, CheckpointError::QuantizationClaim { .. }));
    let error = check(Folder::dense()?, "tie_word_embeddings", json!(true), &[SINGLE, "lm_head.weight"]);
    assert!(matches!(error, CheckpointError::TiedHeadDiffers { .. }));

    let folder = Folder::dense()?;
    folder.edit_json("config.json", |config| config["layer_types"] = json!(["full_attention"]))?;
    assert!(matches!(Config::read(folder.0.path()), Err(ConfigError::Contradiction { .. })));
    let error = check(folder, "num_hidden_layers", json!(1), &[SINGLE, "model.layers.1.", "1 layers"]);
    assert!(matches!(error, CheckpointError::BeyondConfig { what: "layers", .. }));

    let folder = Folder::nf4(Experts::Single, Statistics::Plain)?;
    let error = check(folder, "num_local_experts", json!(2), &["projs.2.", "2 experts"]);
    assert!(matches!(error, CheckpointError::BeyondConfig { what: "experts", .. }));
    Ok(())
}

#[test]
fn tied_embeddings_are_honoured() -> Result<()> {
    let folder = Folder::dense()?;
    folder.edit_json("config.json", |config| config["tie_word_embeddings"] = json!(true))?;
    folder.remove(SINGLE, "lm_head.weight")?;
    let weights = folder.load()?;
    assert_eq!(weights.lm_head.decode_rows(0..448), weights.embedding.decode_rows(0..448));
    folder.edit(SINGLE, |tensors| {
        let embedding = tensors.get("model.embed_tokens.weight")?.clone();
        tensors.0.insert("lm_head.weight".to_owned(), embedding);
        Ok(())
    })?;
    folder.load()?;
    Ok(())
}

#[test]
fn progress_rises_to_the_end() -> Result<()> {
    let folder = Folder::mxfp4()?;
    let (config, checkpoint) = (Config::read(folder.0.path())?, Checkpoint::open(folder.0.path())?);
    let mut steps = Vec::new();
    load(&checkpoint, &config, Quantize::File, &mut |done, total, what| steps.push((done, total, what.to_owned())))?;
    assert!(steps.windows(2).all(|pair| pair[0].0 < pair[1].0), "{steps:?}");
    assert!(steps.iter().all(|(done, total, _)| done <= total && *total == checkpoint.tensor_bytes()));
    assert_eq!(steps.len(), config.layers.len() + 2);
    Ok(())
}

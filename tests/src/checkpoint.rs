//! Making checkpoints: safetensors files as maps that can be edited, and models rewritten in other layouts.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bulkhead_worker::checkpoint::Checkpoint;
use bulkhead_worker::model::config::Config;
use bulkhead_worker::model::weights::{Linear, Quantize, load};
use bulkhead_worker::quant::{Nf4, Scales, Statistics, dynamic::dynamic_map, nf4::TABLE, quantize_nf4_with};
use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// Its element type.
    pub dtype: Dtype,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Its bytes, little endian.
    pub bytes: Vec<u8>,
}

/// The tensors of a file by name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tensors(pub BTreeMap<String, Stored>);

impl Tensors {
    /// Reads a file.
    ///
    /// # Errors
    /// When it is no safetensors file.
    pub fn read(path: &Path) -> Result<Tensors> {
        let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
        let file = SafeTensors::deserialize(&bytes)?;
        let stored = |view: TensorView<'_>| Stored {
            dtype: view.dtype(),
            shape: view.shape().to_vec(),
            bytes: view.data().to_vec(),
        };
        Ok(Tensors(file.iter().map(|(name, view)| (name.to_owned(), stored(view))).collect()))
    }

    /// Writes a file.
    ///
    /// # Errors
    /// When a tensor's bytes do not fit its shape, or the disk refuses.
    pub fn write(&self, path: &Path) -> Result<()> {
        let views = self
            .0
            .iter()
            .map(|(name, stored)| Ok((name, TensorView::new(stored.dtype, stored.shape.clone(), &stored.bytes)?)));
        let views: Vec<_> = views.collect::<Result<_>>()?;
        Ok(safetensors::serialize_to_file(views, None, path)?)
    }

    /// Adds or replaces a tensor.
    pub fn insert(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) {
        self.0.insert(name.to_owned(), Stored { dtype, shape: shape.to_vec(), bytes });
    }

    /// Adds or replaces a tensor of f32.
    pub fn insert_floats(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        self.insert(name, Dtype::F32, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect());
    }

    /// Gives a tensor.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn get(&self, name: &str) -> Result<&Stored> {
        self.0.get(name).with_context(|| format!("no tensor {name}"))
    }

    /// Gives a float tensor's elements.
    ///
    /// # Errors
    /// When there is none of this name, or it holds no floats.
    pub fn floats(&self, name: &str) -> Result<Vec<f32>> {
        let stored = self.get(name)?;
        let halves = || stored.bytes.as_chunks::<2>().0.iter();
        if stored.dtype == Dtype::BF16 {
            return Ok(halves().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect());
        }
        if stored.dtype == Dtype::F16 {
            return Ok(halves().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect());
        }
        ensure!(stored.dtype == Dtype::F32, "{name} holds {}", stored.dtype);
        Ok(stored.bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    /// Gives a float matrix's rows.
    ///
    /// # Errors
    /// As `floats`, and when it has not two dimensions.
    pub fn rows(&self, name: &str) -> Result<Vec<Vec<f32>>> {
        let [_, cols] = self.get(name)?.shape[..] else { anyhow::bail!("{name} is no matrix") };
        Ok(self.floats(name)?.chunks_exact(cols).map(<[f32]>::to_vec).collect())
    }

    /// Gives an i64 tensor's elements.
    ///
    /// # Errors
    /// When there is none of this name, or it holds something else.
    pub fn integers(&self, name: &str) -> Result<Vec<i64>> {
        let stored = self.get(name)?;
        ensure!(stored.dtype == Dtype::I64, "{name} holds {}", stored.dtype);
        Ok(stored.bytes.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect())
    }
}

/// How experts lie in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Experts {
    /// One linear per expert, as pre-quantised gpt-oss checkpoints have it; the router is wrapped too.
    Single,
    /// All experts of a matrix in one tensor: Bulkhead's own form.
    Fused,
}

/// Rewrites a model of unquantised experts with attention and experts in NF4.
///
/// # Errors
/// When the source is no valid checkpoint, or the disk refuses.
pub fn write_nf4(source: &Path, target: &Path, experts: Experts, statistics: Statistics) -> Result<()> {
    let config = Config::read(source)?;
    let checkpoint = Checkpoint::open(source)?;
    let weights = load(&checkpoint, &config, Quantize::None, &mut |_, _, _| {})?;
    let mut tensors = Tensors::default();
    let is_kept = |name: &&str| !name.contains("_proj") && !name.contains("router");
    let untouched: Vec<_> = checkpoint.names().filter(is_kept).map(str::to_owned).collect();
    for name in untouched {
        copy(&checkpoint, &name, &name, &mut tensors)?;
    }
    for (index, layer) in weights.layers.iter().enumerate() {
        let prefix = format!("model.layers.{index}");
        let attention = &layer.attention;
        for (name, linear) in [("q", &attention.q), ("k", &attention.k), ("v", &attention.v), ("o", &attention.o)] {
            insert_linear(&mut tensors, &format!("{prefix}.self_attn.{name}_proj"), linear, statistics)?;
        }
        let wrapped = if experts == Experts::Single { ".linear" } else { "" };
        for part in ["weight", "bias"] {
            let (from, to) = (format!("{prefix}.mlp.router.{part}"), format!("{prefix}.mlp.router{wrapped}.{part}"));
            copy(&checkpoint, &from, &to, &mut tensors)?;
        }
        let mixture = layer.mlp.experts().context("only models of experts are rewritten")?;
        let gate_up: Vec<_> = mixture.experts.iter().map(|expert| &expert.gate_up).collect();
        let down: Vec<_> = mixture.experts.iter().map(|expert| &expert.down).collect();
        for (name, linears) in [("gate_up_proj", gate_up), ("down_proj", down)] {
            let name = format!("{prefix}.mlp.experts.{name}");
            match experts {
                Experts::Fused => insert_fused(&mut tensors, &name, &linears, statistics)?,
                Experts::Single => {
                    for (e, linear) in linears.into_iter().enumerate() {
                        insert_linear(&mut tensors, &format!("{name}s.{e}"), linear, statistics)?;
                    }
                }
            }
        }
    }
    tensors.write(&target.join("model.safetensors"))?;
    let mut config: Value = serde_json::from_slice(&std::fs::read(source.join("config.json"))?)?;
    config["quantization_config"] =
        json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"});
    Ok(std::fs::write(target.join("config.json"), config.to_string())?)
}

fn copy(checkpoint: &Checkpoint, from: &str, to: &str, tensors: &mut Tensors) -> Result<()> {
    let tensor = checkpoint.tensor(from)?;
    tensors.insert(to, tensor.dtype(), tensor.shape(), tensor.region().bytes().to_vec());
    Ok(())
}

fn quantize(linear: &Linear, statistics: Statistics) -> Result<Nf4> {
    let matrix = &linear.weight;
    Ok(quantize_nf4_with(statistics, matrix.rows(), matrix.cols(), &matrix.decode_rows(0..matrix.rows()))?)
}

fn insert_linear(tensors: &mut Tensors, name: &str, linear: &Linear, statistics: Statistics) -> Result<()> {
    let nf4 = quantize(linear, statistics)?;
    let weight = format!("{name}.weight");
    let mut state = state(&[nf4.rows(), nf4.cols()]);
    tensors.insert(&weight, Dtype::U8, &[nf4.packed().len(), 1], nf4.packed().bytes().to_vec());
    tensors.insert_floats(&format!("{weight}.quant_map"), &[16], &TABLE);
    let absmax = format!("{weight}.absmax");
    match nf4.scales() {
        Scales::Plain(bytes) => tensors.insert(&absmax, Dtype::F32, &[nf4.blocks()], bytes.bytes().to_vec()),
        Scales::Nested(nested) => {
            tensors.insert(&absmax, Dtype::U8, &[nf4.blocks()], nested.codes.bytes().to_vec());
            tensors.insert_floats(&format!("{weight}.nested_absmax"), &[nested.absmax.len()], &nested.absmax);
            tensors.insert_floats(&format!("{weight}.nested_quant_map"), &[256], &nested.map[..]);
            nest(&mut state);
            state["nested_offset"] = json!(nested.offset);
        }
    }
    insert_state(tensors, &weight, &state);
    let bias = linear.bias.as_deref().context("gpt-oss has biases")?;
    tensors.insert_floats(&format!("{name}.bias"), &[bias.len()], bias);
    Ok(())
}

fn insert_fused(tensors: &mut Tensors, name: &str, linears: &[&Linear], statistics: Statistics) -> Result<()> {
    let all: Vec<Nf4> = linears.iter().map(|linear| quantize(linear, statistics)).collect::<Result<_>>()?;
    let (count, first) = (all.len(), &all[0]);
    let mut state = state(&[count, first.rows(), first.cols()]);
    let packed = all.iter().flat_map(|nf4| nf4.packed().bytes().to_vec()).collect();
    tensors.insert(name, Dtype::U8, &[count, first.packed().len()], packed);
    tensors.insert_floats(&format!("{name}.quant_map"), &[16], &TABLE);
    let (mut codes, mut absmax, mut offsets) = (Vec::new(), Vec::new(), Vec::new());
    for nf4 in &all {
        match nf4.scales() {
            Scales::Plain(bytes) => codes.extend_from_slice(bytes.bytes()),
            Scales::Nested(nested) => {
                codes.extend_from_slice(nested.codes.bytes());
                absmax.extend_from_slice(&nested.absmax);
                offsets.push(nested.offset);
            }
        }
    }
    let dtype = if statistics == Statistics::Nested { Dtype::U8 } else { Dtype::F32 };
    tensors.insert(&format!("{name}.absmax"), dtype, &[count, first.blocks()], codes);
    if statistics == Statistics::Nested {
        nest(&mut state);
        tensors.insert_floats(&format!("{name}.nested_absmax"), &[count, absmax.len() / count], &absmax);
        tensors.insert_floats(&format!("{name}.nested_offset"), &[count], &offsets);
        tensors.insert_floats(&format!("{name}.nested_quant_map"), &[256], &dynamic_map());
    }
    insert_state(tensors, name, &state);
    let biases: Vec<f32> = linears.iter().flat_map(|linear| linear.bias.clone().unwrap_or_default()).collect();
    tensors.insert_floats(&format!("{name}_bias"), &[count, first.rows()], &biases);
    Ok(())
}

fn state(shape: &[usize]) -> Value {
    json!({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": shape})
}

fn nest(state: &mut Value) {
    state["nested_blocksize"] = json!(256);
    state["nested_dtype"] = json!("float32");
}

fn insert_state(tensors: &mut Tensors, weight: &str, state: &Value) {
    let bytes = state.to_string().into_bytes();
    tensors.insert(&format!("{weight}.quant_state.bitsandbytes__nf4"), Dtype::U8, &[bytes.len()], bytes);
}

//! What becomes of each tensor: decided from names, types and shapes alone, before a weight is read.
//!
//! Owns: which weights are quantised, and the names, types and shapes of what that makes. Pure.
//! Invariant: equal sources and choices give equal plans, however the source is divided into files.

use std::cmp::Ordering;

use safetensors::Dtype;
use serde_json::{Value, json};

use super::error::ConvertError;
use super::{Head, Quant};
use crate::checkpoint::{Checkpoint, Tensor, bnb4bit};
use crate::model::config::Config;
use crate::quant::mxfp4::{GROUP, GROUP_BYTES};
use crate::quant::nf4::{BLOCK_SIZE, NESTED_GROUP};

/// Weights of one tensor, at most: what is kept of each block until a tensor is done bounds the memory that is taken.
pub const TENSOR_WEIGHTS_MAX: u64 = 1 << 32;

/// Bytes of a quantisation state: filled up with spaces, so that a file's layout is known before its weights are.
pub(super) const STATE_BYTES: usize = 256;

/// The names of the output matrix and of the embedding.
const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// Names of what stays 16-bit.
const WIDE: [&str; 4] = [EMBEDDING, HEAD, ".mlp.router.weight", ".mlp.router.linear.weight"];

/// Where weights come from, outputs first whatever the order of the bytes.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// Floats, `[rows, cols]`.
    Rows(Tensor),
    /// Floats, `[experts, cols, rows]`.
    Transposed(Tensor),
    /// MXFP4, `[experts, rows, cols / 32, 16]` and `[experts, rows, cols / 32]`.
    Mxfp4 { blocks: Tensor, scales: Tensor },
}

/// The dimensions of a weight that is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dimensions {
    /// Matrices that are quantised each by itself.
    pub(super) count: usize,
    /// Whether the matrices lie in one tensor.
    pub(super) is_fused: bool,
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl Dimensions {
    pub(super) fn weights(self) -> usize {
        self.rows * self.cols
    }
}

/// What is done with a tensor.
#[derive(Clone, Debug)]
pub(super) enum Work {
    /// Its bytes stay.
    Copy(Tensor),
    /// f32 becomes bf16.
    Round(Tensor),
    /// Weights become NF4 with nested scales.
    Quantize { source: Source, dimensions: Dimensions },
    /// Weights become MXFP4.
    Mxfp4 { source: Source, dimensions: Dimensions },
    /// Plain scales of NF4 become nested ones; the codes stay, which are needed to tell the error.
    Nest { codes: Tensor, absmax: Tensor, block_size: usize, dimensions: Dimensions },
}

/// A tensor of the output.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Output {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
}

impl Output {
    fn new(name: String, dtype: Dtype, shape: Vec<usize>) -> Output {
        Output { name, dtype, shape }
    }

    pub(super) fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }
}

/// One step of the conversion, and what it makes.
#[derive(Clone, Debug)]
pub(super) struct Item {
    /// The weight, for people and for the manifest.
    pub(super) name: String,
    /// What it is for, for the manifest.
    pub(super) kind: &'static str,
    pub(super) work: Work,
    pub(super) outputs: Vec<Output>,
    /// The quantisation state, but for an offset that the weights decide.
    pub(super) state: Value,
}

impl Item {
    pub(super) fn source_bytes(&self) -> u64 {
        let bytes = |tensor: &Tensor| tensor.region().len() as u64;
        match &self.work {
            Work::Copy(tensor) | Work::Round(tensor) => bytes(tensor),
            Work::Quantize { source, .. } | Work::Mxfp4 { source, .. } => match source {
                Source::Rows(tensor) | Source::Transposed(tensor) => bytes(tensor),
                Source::Mxfp4 { blocks, scales } => bytes(blocks) + bytes(scales),
            },
            Work::Nest { absmax, .. } => bytes(absmax),
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.outputs.iter().map(Output::bytes).sum()
    }
}

/// Decides for every tensor of a checkpoint.
///
/// # Errors
/// `NotSupported` and `TooLarge` with the tensor; `Checkpoint` for shapes that contradict the config.
pub(super) fn plan(
    checkpoint: &Checkpoint,
    config: &Config,
    quant: Quant,
    head: Head,
) -> Result<Vec<Item>, ConvertError> {
    let mut names: Vec<&str> = checkpoint.names().collect();
    names.sort_by(|a, b| natural(a, b));
    if quant == Quant::Mxfp4 && config.experts().is_none() {
        return Err(ConvertError::NoExperts);
    }
    let mut items = Vec::with_capacity(names.len());
    if parts_head(config, head) {
        items.push(parted_head(checkpoint)?);
        names.retain(|name| *name != HEAD);
    }
    for name in names {
        items.extend(decide(checkpoint, config, (quant, head), name)?);
    }
    Ok(items)
}

/// Says whether the output matrix, which is the embedding, gets bytes of its own.
pub(super) fn parts_head(config: &Config, head: Head) -> bool {
    config.has_tied_embeddings && head == Head::Nf4
}

/// Plans an output matrix out of the embedding.
fn parted_head(checkpoint: &Checkpoint) -> Result<Item, ConvertError> {
    let embedding = checkpoint.tensor(EMBEDDING)?;
    match (embedding.dtype(), embedding.shape()) {
        (Dtype::BF16 | Dtype::F16 | Dtype::F32, &[rows, cols]) => {
            let dimensions = Dimensions { count: 1, is_fused: false, rows, cols };
            quantized(HEAD, Source::Rows(embedding), dimensions)
        }
        _ => Err(not_supported(&embedding, "no matrix of floats", "bf16, f16 or f32, [rows, columns]")),
    }
}

/// Decides for one tensor; nothing for one that is taken in with another.
fn decide(
    checkpoint: &Checkpoint,
    config: &Config,
    (quant, head): (Quant, Head),
    name: &str,
) -> Result<Option<Item>, ConvertError> {
    let tensor = checkpoint.tensor(name)?;
    if quant == Quant::Keep {
        return Ok(Some(copied(tensor)));
    }
    if quant == Quant::Mxfp4 {
        return to_mxfp4(config, tensor).map(Some);
    }
    if let Some(weight) = name.strip_suffix(".quant_state.bitsandbytes__nf4") {
        let is_plain = checkpoint.tensor(&format!("{weight}.absmax"))?.dtype() == Dtype::F32;
        return Ok((!is_plain).then(|| copied(tensor)));
    }
    if let Some(weight) = name.strip_suffix(".absmax").filter(|_| tensor.dtype() == Dtype::F32) {
        return nested(checkpoint, weight, tensor).map(Some);
    }
    if name.contains(".quant_state.bitsandbytes__") {
        return Err(not_supported(&tensor, "another type of bitsandbytes'", "NF4"));
    }
    if let Some(weight) = name.strip_suffix("_blocks").filter(|name| is_fused(name)) {
        let scales = checkpoint.tensor(&format!("{weight}_scales"))?;
        return from_mxfp4(config, weight, tensor, scales).map(Some);
    }
    if name.strip_suffix("_scales").is_some_and(is_fused) {
        return Ok(None);
    }
    let is_float = matches!(tensor.dtype(), Dtype::BF16 | Dtype::F16 | Dtype::F32);
    if is_fused(name) && is_float {
        return from_fused(config, tensor).map(Some);
    }
    let is_head = name == HEAD && head == Head::Nf4;
    if is_float && (is_linear(name) || is_head) {
        let &[rows, cols] = tensor.shape() else { return Err(not_supported(&tensor, "no matrix", "[rows, columns]")) };
        let dimensions = Dimensions { count: 1, is_fused: false, rows, cols };
        return quantized(name, Source::Rows(tensor), dimensions).map(Some);
    }
    if tensor.dtype() == Dtype::F32 && WIDE.iter().any(|wide| name.ends_with(wide)) {
        let outputs = vec![Output::new(name.to_owned(), Dtype::BF16, tensor.shape().to_vec())];
        return Ok(Some(item(name, Work::Round(tensor), outputs, Value::Null)));
    }
    Ok(Some(copied(tensor)))
}

fn item(name: &str, work: Work, outputs: Vec<Output>, state: Value) -> Item {
    Item { name: name.to_owned(), kind: kind(name), work, outputs, state }
}

/// Names what a weight is for.
fn kind(name: &str) -> &'static str {
    let kinds = [
        (".self_attn.", "attention"),
        (".mlp.experts.", "experts"),
        (".mlp.router.", "router"),
        (".mlp.", "dense"),
        ("lm_head.", "lm_head"),
        ("embed_tokens.", "embedding"),
    ];
    kinds.into_iter().find(|(part, _)| name.contains(part)).map_or("other", |(_, kind)| kind)
}

fn copied(tensor: Tensor) -> Item {
    let name = tensor.name().to_owned();
    let outputs = vec![Output::new(name.clone(), tensor.dtype(), tensor.shape().to_vec())];
    item(&name, Work::Copy(tensor), outputs, Value::Null)
}

/// Says whether a name is that of a linear whose weight is quantised.
fn is_linear(name: &str) -> bool {
    let Some(linear) = name.strip_suffix(".weight").filter(|name| name.starts_with("model.layers.")) else {
        return false;
    };
    let attention = ["q", "k", "v", "o"].iter().any(|part| linear.ends_with(&format!(".self_attn.{part}_proj")));
    let dense = ["gate", "up", "down"].iter().any(|part| linear.ends_with(&format!(".mlp.{part}_proj")));
    let expert = ["gate_up_projs", "down_projs"].iter().any(|part| linear.contains(&format!(".mlp.experts.{part}.")));
    attention || dense || expert
}

/// Says whether a name is that of the experts of a layer in one tensor.
fn is_fused(name: &str) -> bool {
    name.ends_with(".mlp.experts.gate_up_proj") || name.ends_with(".mlp.experts.down_proj")
}

/// Gives the dimensions of fused experts by the config.
fn fused_dimensions(config: &Config, name: &str, tensor: &Tensor) -> Result<Dimensions, ConvertError> {
    let experts = config.experts().ok_or_else(|| not_supported(tensor, "of experts", "a model of experts"))?;
    let (hidden, intermediate) = (config.hidden_size, experts.intermediate_size);
    let (rows, cols) = if name.ends_with("gate_up_proj") { (2 * intermediate, hidden) } else { (hidden, intermediate) };
    Ok(Dimensions { count: experts.count, is_fused: true, rows, cols })
}

fn from_mxfp4(config: &Config, name: &str, blocks: Tensor, scales: Tensor) -> Result<Item, ConvertError> {
    let dimensions = fused_dimensions(config, name, &blocks)?;
    let Dimensions { count, rows, cols, .. } = dimensions;
    if !cols.is_multiple_of(GROUP) {
        return Err(not_supported(&blocks, "of columns that make no whole groups", "a multiple of 32 columns"));
    }
    blocks.expect_dtype(Dtype::U8, "U8")?;
    scales.expect_dtype(Dtype::U8, "U8")?;
    blocks.expect_shape(&[count, rows, cols / GROUP, GROUP / 2])?;
    scales.expect_shape(&[count, rows, cols / GROUP])?;
    quantized(name, Source::Mxfp4 { blocks, scales }, dimensions)
}

fn from_fused(config: &Config, tensor: Tensor) -> Result<Item, ConvertError> {
    let name = tensor.name().to_owned();
    let dimensions = fused_dimensions(config, &name, &tensor)?;
    tensor.expect_shape(&[dimensions.count, dimensions.cols, dimensions.rows])?;
    quantized(&name, Source::Transposed(tensor), dimensions)
}

/// Plans for one tensor of a model whose experts are to be MXFP4.
fn to_mxfp4(config: &Config, tensor: Tensor) -> Result<Item, ConvertError> {
    let name = tensor.name().to_owned();
    if name.contains(".quant_state.bitsandbytes__") || is_fused(&name) && tensor.dtype() == Dtype::U8 {
        return Err(not_supported(&tensor, "of a model in bitsandbytes' 4 bits", "bf16, f16 or f32"));
    }
    if !is_fused(&name) {
        return Ok(copied(tensor));
    }
    let dimensions = fused_dimensions(config, &name, &tensor)?;
    let Dimensions { count, rows, cols, .. } = dimensions;
    tensor.expect_shape(&[count, cols, rows])?;
    if !cols.is_multiple_of(GROUP) {
        return Err(not_supported(&tensor, "of columns that make no whole groups", "a multiple of 32 columns"));
    }
    check_size(&name, dimensions)?;
    let groups = vec![count, rows, cols / GROUP];
    let outputs = vec![
        Output::new(format!("{name}_blocks"), Dtype::U8, [&groups[..], &[GROUP_BYTES]].concat()),
        Output::new(format!("{name}_scales"), Dtype::U8, groups),
    ];
    Ok(item(&name, Work::Mxfp4 { source: Source::Transposed(tensor), dimensions }, outputs, Value::Null))
}

/// Refuses weights that are more than the bound on memory allows, or none.
fn check_size(name: &str, Dimensions { count, rows, cols, .. }: Dimensions) -> Result<(), ConvertError> {
    let all = [count, rows, cols].iter().try_fold(1u64, |all, dimension| all.checked_mul(*dimension as u64));
    match all {
        Some(1..=TENSOR_WEIGHTS_MAX) => Ok(()),
        other => {
            let weights = other.unwrap_or(u64::MAX);
            Err(ConvertError::TooLarge { tensor: name.to_owned(), weights, max: TENSOR_WEIGHTS_MAX })
        }
    }
}

/// Plans the quantising of a weight.
fn quantized(name: &str, source: Source, dimensions: Dimensions) -> Result<Item, ConvertError> {
    let Dimensions { count, is_fused, rows, cols } = dimensions;
    check_size(name, dimensions)?;
    let dtype = match &source {
        Source::Rows(tensor) | Source::Transposed(tensor) if tensor.dtype() == Dtype::F32 => "float32",
        Source::Rows(tensor) | Source::Transposed(tensor) if tensor.dtype() == Dtype::F16 => "float16",
        Source::Rows(_) | Source::Transposed(_) | Source::Mxfp4 { .. } => "bfloat16",
    };
    let shape = if is_fused { json!([count, rows, cols]) } else { json!([rows, cols]) };
    let state = json!({"quant_type": "nf4", "blocksize": BLOCK_SIZE, "dtype": dtype, "shape": shape});
    let codes = dimensions.weights().div_ceil(2);
    let shape = if is_fused { vec![count, codes] } else { vec![codes, 1] };
    let mut outputs = vec![Output::new(name.to_owned(), Dtype::U8, shape)];
    outputs.push(Output::new(format!("{name}.quant_map"), Dtype::F32, vec![16]));
    outputs.extend(scales(name, dimensions, BLOCK_SIZE));
    Ok(item(name, Work::Quantize { source, dimensions }, outputs, nest(state)))
}

/// Lists the tensors of nested scales, and the state.
fn scales(name: &str, dimensions: Dimensions, block_size: usize) -> Vec<Output> {
    let blocks = dimensions.weights().div_ceil(block_size);
    let each = |length: usize| dimensions.is_fused.then_some(dimensions.count).into_iter().chain([length]).collect();
    let mut outputs = vec![
        Output::new(format!("{name}.absmax"), Dtype::U8, each(blocks)),
        Output::new(format!("{name}.nested_absmax"), Dtype::F32, each(blocks.div_ceil(NESTED_GROUP))),
        Output::new(format!("{name}.nested_quant_map"), Dtype::F32, vec![256]),
        Output::new(format!("{name}.quant_state.bitsandbytes__nf4"), Dtype::U8, vec![STATE_BYTES]),
    ];
    if dimensions.is_fused {
        outputs.push(Output::new(format!("{name}.nested_offset"), Dtype::F32, vec![dimensions.count]));
    }
    outputs
}

fn nest(mut state: Value) -> Value {
    state["nested_blocksize"] = json!(NESTED_GROUP);
    state["nested_dtype"] = json!("float32");
    state
}

/// Plans the nesting of plain scales.
fn nested(checkpoint: &Checkpoint, weight: &str, absmax: Tensor) -> Result<Item, ConvertError> {
    let state = bnb4bit::state_json(checkpoint, weight)?;
    let codes = checkpoint.tensor(weight)?;
    codes.expect_dtype(Dtype::U8, "U8")?;
    let refused = || not_supported(&absmax, "of a state that does not fit", "blocksize and shape of the weight");
    let shape: Vec<usize> = serde_json::from_value(state["shape"].clone()).map_err(|_| refused())?;
    let block_size = state["blocksize"].as_u64().and_then(|size| usize::try_from(size).ok()).ok_or_else(refused)?;
    let (is_fused, count, rows, cols) = match shape[..] {
        [rows, cols] => (false, 1, rows, cols),
        [count, rows, cols] => (true, count, rows, cols),
        _ => return Err(refused()),
    };
    let dimensions = Dimensions { count, is_fused, rows, cols };
    let weights = rows.checked_mul(cols).filter(|weights| *weights > 0).ok_or_else(refused)?;
    let is_whole = block_size.is_power_of_two() && (32..=4096).contains(&block_size);
    let fits = is_whole
        && count.checked_mul(weights.div_ceil(block_size) * size_of::<f32>()) == Some(absmax.region().len())
        && count.checked_mul(weights.div_ceil(2)) == Some(codes.region().len());
    if !fits {
        return Err(refused());
    }
    let outputs = scales(weight, dimensions, block_size);
    Ok(item(weight, Work::Nest { codes, absmax, block_size, dimensions }, outputs, nest(state)))
}

fn not_supported(tensor: &Tensor, found: &str, expected: &'static str) -> ConvertError {
    ConvertError::NotSupported { tensor: tensor.name().to_owned(), found: found.to_owned(), expected }
}

/// Compares names with their numbers as numbers: layer 2 before layer 10.
fn natural(a: &str, b: &str) -> Ordering {
    let key = |name: &str| -> Vec<(String, u64)> {
        let parts = name.split('.');
        parts.map(|part| part.parse().map_or((part.to_owned(), 0), |number| (String::new(), number))).collect()
    };
    key(a).cmp(&key(b)).then_with(|| a.cmp(b))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_ordered_by_number() {
        let mut names = ["model.layers.10.a", "model.layers.2.b", "lm_head.weight", "model.layers.2.a"];
        names.sort_by(|a, b| natural(a, b));
        assert_eq!(names, ["lm_head.weight", "model.layers.2.a", "model.layers.2.b", "model.layers.10.a"]);
    }

    #[test]
    fn what_is_quantised_is_told_by_its_name() {
        for name in ["self_attn.o_proj", "mlp.up_proj", "mlp.experts.gate_up_projs.3"] {
            assert!(is_linear(&format!("model.layers.0.{name}.weight")), "{name}");
            assert!(!is_linear(&format!("model.layers.0.{name}.bias")), "{name}");
        }
        for name in ["model.layers.0.mlp.router.weight", "model.embed_tokens.weight", "lm_head.weight"] {
            assert!(!is_linear(name), "{name}");
        }
        assert!(is_fused("model.layers.0.mlp.experts.down_proj"));
        assert!(!is_fused("model.layers.0.mlp.experts.down_proj_bias"));
    }
}

//! The tensors that a model of some shape and format has: names, types, shapes, and what each holds.
//!
//! The layouts are those that the worker reads: Hugging Face's for bf16 and MXFP4, bitsandbytes' for attention in NF4, and
//! Bulkhead's fused one for experts in NF4 (`checkpoint::bnb4bit`).

use anyhow::{Result, bail, ensure};
use bulkhead_worker::model::config::{Config, DenseConfig, ExpertsConfig, Mlp};
use bulkhead_worker::quant::dynamic::dynamic_map;
use bulkhead_worker::quant::mxfp4::{GROUP, GROUP_BYTES};
use bulkhead_worker::quant::nf4::{BLOCK_SIZE, NESTED_GROUP, TABLE};
use safetensors::Dtype;
use serde_json::{Value, json};

use super::Format;
use super::content::{Content, Mxfp4Parts, Nf4Parts};

/// The deviation of biases: small against what they are added to.
const BIAS_DEVIATION: f32 = 0.02;

/// The deviation of the learned logits that take attention away from the keys.
const SINK_DEVIATION: f32 = 1.0;

/// One tensor.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) content: Content,
}

impl Tensor {
    /// Gives the bytes that type and shape need.
    pub(super) fn bytes(&self) -> u64 {
        let elements: u64 = self.shape.iter().map(|dimension| *dimension as u64).product();
        elements * self.dtype.bitsize() as u64 / 8
    }
}

/// Lists the tensors of a model.
///
/// # Errors
/// For a shape that the format cannot store.
pub(super) fn tensors(config: &Config, format: Format) -> Result<Vec<Tensor>> {
    let hidden = config.hidden_size;
    if format == Format::Mxfp4 {
        let Some(experts) = config.experts() else { bail!("MXFP4 is for experts, and {} has none", class(config)) };
        let intermediate = experts.intermediate_size;
        for (field, width) in [("hidden_size", hidden), ("intermediate_size", intermediate)] {
            ensure!(width.is_multiple_of(GROUP), "{field} is {width}, and MXFP4 needs a multiple of {GROUP}");
        }
    }
    let mut list = List { format, tensors: Vec::new() };
    // The embedding is what the first norm sees; one that is the output matrix as well has that one's scale.
    let embedding = if config.has_tied_embeddings { keeping(hidden) } else { 1.0 };
    list.normal("model.embed_tokens.weight", &[config.vocab_size, hidden], 0.0, embedding);
    for layer in 0..config.layers.len() {
        list.layer(config, &format!("model.layers.{layer}"));
    }
    list.norm("model.norm.weight", hidden);
    if !config.has_tied_embeddings {
        list.normal("lm_head.weight", &[config.vocab_size, hidden], 0.0, keeping(hidden));
    }
    Ok(list.tensors)
}

fn class(config: &Config) -> &'static str {
    config.architecture.class()
}

/// Gives the deviation with which a product over `inputs` keeps the size of its input.
fn keeping(inputs: usize) -> f32 {
    1.0 / (inputs as f32).sqrt()
}

struct List {
    format: Format,
    tensors: Vec<Tensor>,
}

impl List {
    fn layer(&mut self, config: &Config, prefix: &str) {
        let hidden = config.hidden_size;
        let (query, kv) = (config.query_width(), config.kv_width());
        self.norm(&format!("{prefix}.input_layernorm.weight"), hidden);
        for (name, rows, cols) in [("q", query, hidden), ("k", kv, hidden), ("v", kv, hidden), ("o", hidden, query)] {
            self.linear(&format!("{prefix}.self_attn.{name}_proj"), [rows, cols], config.has_attention_bias);
        }
        if config.has_sinks {
            self.normal(&format!("{prefix}.self_attn.sinks"), &[config.heads], 0.0, SINK_DEVIATION);
        }
        self.norm(&format!("{prefix}.post_attention_layernorm.weight"), hidden);
        match config.mlp {
            Mlp::Experts(experts) => self.experts(&format!("{prefix}.mlp"), hidden, experts),
            Mlp::Dense(dense) => self.dense(&format!("{prefix}.mlp"), hidden, dense),
        }
    }

    /// Adds a matrix that is stored in 4 bits where the format says so, and its bias.
    fn linear(&mut self, name: &str, [rows, cols]: [usize; 2], has_bias: bool) {
        match self.format {
            Format::Nf4 => self.nf4(&format!("{name}.weight"), None, rows, cols),
            Format::Mxfp4 | Format::Bf16 => {
                self.normal(&format!("{name}.weight"), &[rows, cols], 0.0, keeping(cols));
            }
        }
        if has_bias {
            self.normal(&format!("{name}.bias"), &[rows], 0.0, BIAS_DEVIATION);
        }
    }

    fn dense(&mut self, prefix: &str, hidden: usize, dense: DenseConfig) {
        let inner = dense.intermediate_size;
        for (name, shape) in [("gate", [inner, hidden]), ("up", [inner, hidden]), ("down", [hidden, inner])] {
            self.linear(&format!("{prefix}.{name}_proj"), shape, dense.has_bias);
        }
    }

    fn experts(&mut self, prefix: &str, hidden: usize, config: ExpertsConfig) {
        let (experts, intermediate) = (config.count, config.intermediate_size);
        self.normal(&format!("{prefix}.router.weight"), &[experts, hidden], 0.0, keeping(hidden));
        self.normal(&format!("{prefix}.router.bias"), &[experts], 0.0, BIAS_DEVIATION);
        for (name, rows, cols) in [("gate_up", 2 * intermediate, hidden), ("down", hidden, intermediate)] {
            let name = format!("{prefix}.experts.{name}_proj");
            match self.format {
                Format::Nf4 => self.nf4(&name, Some(experts), rows, cols),
                Format::Mxfp4 => self.mxfp4(&name, experts, rows, cols),
                Format::Bf16 => self.normal(&name, &[experts, cols, rows], 0.0, keeping(cols)),
            }
            self.normal(&format!("{name}_bias"), &[experts, rows], 0.0, BIAS_DEVIATION);
        }
    }

    fn push(&mut self, name: String, dtype: Dtype, shape: Vec<usize>, content: Content) {
        self.tensors.push(Tensor { name, dtype, shape, content });
    }

    fn normal(&mut self, name: &str, shape: &[usize], mean: f32, deviation: f32) {
        self.push(name.to_owned(), Dtype::BF16, shape.to_vec(), Content::Normal { mean, deviation });
    }

    fn norm(&mut self, name: &str, width: usize) {
        self.normal(name, &[width], 1.0, 0.0);
    }

    fn floats(&mut self, name: String, shape: Vec<usize>, values: &[f32]) {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.push(name, Dtype::F32, shape, Content::Stored(bytes));
    }

    /// Adds one linear's weight, or those of all experts in one tensor.
    fn nf4(&mut self, name: &str, experts: Option<usize>, rows: usize, cols: usize) {
        let parts = Nf4Parts::of_deviation(f64::from(keeping(cols)));
        let (codes, blocks) = ((rows * cols).div_ceil(2), (rows * cols).div_ceil(BLOCK_SIZE));
        let groups = blocks.div_ceil(NESTED_GROUP);
        let mut state = json!({
            "quant_type": "nf4", "blocksize": BLOCK_SIZE, "dtype": "bfloat16",
            "nested_blocksize": NESTED_GROUP, "nested_dtype": "float32"
        });
        match experts {
            None => {
                state["shape"] = json!([rows, cols]);
                state["nested_offset"] = json!(parts.nested_offset);
                self.push(name.to_owned(), Dtype::U8, vec![codes, 1], parts.codes);
            }
            Some(count) => {
                state["shape"] = json!([count, rows, cols]);
                self.push(name.to_owned(), Dtype::U8, vec![count, codes], parts.codes);
                self.floats(format!("{name}.nested_offset"), vec![count], &vec![parts.nested_offset; count]);
            }
        }
        let of_each = |length: usize| experts.into_iter().chain([length]).collect::<Vec<_>>();
        self.push(format!("{name}.absmax"), Dtype::U8, of_each(blocks), parts.absmax);
        self.floats(format!("{name}.quant_map"), vec![TABLE.len()], &TABLE);
        let nested = vec![parts.nested_absmax; experts.unwrap_or(1) * groups];
        self.floats(format!("{name}.nested_absmax"), of_each(groups), &nested);
        self.floats(format!("{name}.nested_quant_map"), vec![256], &dynamic_map());
        self.state(name, &state);
    }

    fn state(&mut self, name: &str, state: &Value) {
        let bytes = state.to_string().into_bytes();
        let (name, shape) = (format!("{name}.quant_state.bitsandbytes__nf4"), vec![bytes.len()]);
        self.push(name, Dtype::U8, shape, Content::Stored(bytes));
    }

    fn mxfp4(&mut self, name: &str, experts: usize, rows: usize, cols: usize) {
        let parts = Mxfp4Parts::of_deviation(f64::from(keeping(cols)));
        let groups = cols / GROUP;
        self.push(format!("{name}_blocks"), Dtype::U8, vec![experts, rows, groups, GROUP_BYTES], parts.codes);
        self.push(format!("{name}_scales"), Dtype::U8, vec![experts, rows, groups], parts.scales);
    }
}

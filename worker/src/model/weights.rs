//! A model's weights by role, each matrix in the form in which the file stores it.
//!
//! Owns: the names of gpt-oss's tensors in every layout, and checking them against the config. Refuses: tensors that are
//! missing, misshapen or not finite where that is cheap to see (norms, biases, sinks, scales), and weights of layers or
//! experts beyond the config.
//! Invariant: the shapes of `Weights` are those of the `Config` that it was loaded with. Nothing is expanded whole: a
//! matrix that is quantised on the way is expanded alone.
//!
//! | layout | experts of layer N, under `model.layers.N.mlp.` |
//! | --- | --- |
//! | floats | `experts.gate_up_proj` `[experts, hidden, 2 * intermediate]`, `experts.down_proj` `[experts, intermediate, hidden]`: inputs first |
//! | MXFP4 | `experts.{gate_up,down}_proj_{blocks,scales}`: outputs first, see `checkpoint::mxfp4` |
//! | NF4, fused | `experts.{gate_up,down}_proj` with `.absmax` and more: outputs first, see `checkpoint::bnb4bit` |
//! | one linear per expert | `experts.{gate_up,down}_projs.E.{weight,bias}`: floats or NF4, outputs first |
//!
//! Biases of the fused layouts are `experts.{gate_up,down}_proj_bias` `[experts, outputs]`. In all of them the outputs of
//! gate_up are interleaved: gate, up, gate, up.

use super::config::{Config, Quantization};
use crate::checkpoint::{Checkpoint, CheckpointError, Tensor, bnb4bit, mxfp4};
use crate::quant::{Dense, Matrix, quantize_nf4};

/// The weights of a model.
#[derive(Clone, Debug)]
pub struct Weights {
    /// `[vocabulary, hidden]`.
    pub embedding: Matrix,
    /// The layers, first to last.
    pub layers: Vec<LayerWeights>,
    /// `[hidden]`.
    pub final_norm: Vec<f32>,
    /// `[vocabulary, hidden]`; shares the embedding's bytes where the config ties them.
    pub lm_head: Matrix,
}

/// The weights of one layer.
#[derive(Clone, Debug)]
pub struct LayerWeights {
    /// `[hidden]`.
    pub attention_norm: Vec<f32>,
    /// The attention's.
    pub attention: AttentionWeights,
    /// `[hidden]`.
    pub mlp_norm: Vec<f32>,
    /// `[experts, hidden]`, with bias.
    pub router: Linear,
    /// One per expert.
    pub experts: Vec<ExpertWeights>,
}

/// The weights of one attention.
#[derive(Clone, Debug)]
pub struct AttentionWeights {
    /// `[heads * head_dim, hidden]`.
    pub q: Linear,
    /// `[kv_heads * head_dim, hidden]`.
    pub k: Linear,
    /// `[kv_heads * head_dim, hidden]`.
    pub v: Linear,
    /// `[hidden, heads * head_dim]`.
    pub o: Linear,
    /// One logit per query head.
    pub sinks: Vec<f32>,
}

/// The weights of one expert.
#[derive(Clone, Debug)]
pub struct ExpertWeights {
    /// `[2 * intermediate, hidden]`, with bias; rows are gate, up, gate, up.
    pub gate_up: Linear,
    /// `[hidden, intermediate]`, with bias.
    pub down: Linear,
}

/// A matrix and what is added to its product.
#[derive(Clone, Debug)]
pub struct Linear {
    /// `[outputs, inputs]`.
    pub weight: Matrix,
    /// `[outputs]`.
    pub bias: Option<Vec<f32>>,
}

/// What to do with the matrices of attention and experts while loading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantize {
    /// Compute from unquantised weights. A file in 4 bits has no others than those its codes stand for, and these are
    /// decoded row by row when used, so for such a file this is the same as `File`.
    None,
    /// Keep what the file stores.
    File,
    /// Quantise to NF4 with double quantisation, each matrix and each expert alone; MXFP4 is decoded and quantised anew.
    /// What is NF4 already stays as it is. Router, embedding and output matrix stay too.
    Nf4,
}

/// Reports how far a load is: bytes done, bytes in all, and what is being loaded.
pub type Progress<'p> = dyn FnMut(u64, u64, &str) + 'p;

/// Loads the weights of a model.
///
/// # Errors
/// Those of `CheckpointError` that concern tensors, `BeyondConfig`, `QuantizationClaim` and `TiedHeadDiffers` among them.
pub fn load(
    checkpoint: &Checkpoint,
    config: &Config,
    quantize: Quantize,
    progress: &mut Progress<'_>,
) -> Result<Weights, CheckpointError> {
    refuse_beyond_config(checkpoint, config)?;
    let total = checkpoint.tensor_bytes();
    let mut loader = Loader { checkpoint, config, quantize, progress, done: 0, total, found: Found::default() };
    let weights = loader.weights()?;
    loader.check_claim()?;
    Ok(weights)
}

impl Weights {
    /// Gives every matrix, in no particular order.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let layers = self.layers.iter().flat_map(|layer| {
            let attention = &layer.attention;
            let linears = [&attention.q, &attention.k, &attention.v, &attention.o, &layer.router];
            let experts = layer.experts.iter().flat_map(|expert| [&expert.gate_up, &expert.down]);
            linears.into_iter().chain(experts).map(|linear| &linear.weight)
        });
        [&self.embedding, &self.lm_head].into_iter().chain(layers)
    }

    /// Gives the form of most of the weights, for people: that of the experts.
    #[must_use]
    pub fn format_name(&self) -> &'static str {
        let expert = self.layers.first().and_then(|layer| layer.experts.first());
        expert.map_or(self.embedding.format_name(), |expert| expert.gate_up.weight.format_name())
    }
}

/// Which 4-bit forms the file was found to hold.
#[derive(Default)]
struct Found {
    nf4: bool,
    mxfp4: bool,
}

struct Loader<'l, 'p> {
    checkpoint: &'l Checkpoint,
    config: &'l Config,
    quantize: Quantize,
    progress: &'l mut Progress<'p>,
    done: u64,
    total: u64,
    found: Found,
}

impl Loader<'_, '_> {
    fn weights(&mut self) -> Result<Weights, CheckpointError> {
        let (vocabulary, hidden) = (self.config.vocab_size, self.config.hidden_size);
        let embedding_tensor = self.checkpoint.tensor("model.embed_tokens.weight")?;
        let embedding = Matrix::Dense(embedding_tensor.dense(vocabulary, hidden)?);
        self.step("embedding", embedding.stored_bytes());
        let layers = (0..self.config.layers.len()).map(|layer| self.layer(layer)).collect::<Result<_, _>>()?;
        let final_norm = self.vector("model.norm.weight", &[hidden])?;
        let lm_head = self.lm_head(&embedding_tensor, &embedding)?;
        self.step("output matrix", lm_head.stored_bytes());
        Ok(Weights { embedding, layers, final_norm, lm_head })
    }

    fn lm_head(&self, embedding_tensor: &Tensor, embedding: &Matrix) -> Result<Matrix, CheckpointError> {
        const NAME: &str = "lm_head.weight";
        let (vocabulary, hidden) = (self.config.vocab_size, self.config.hidden_size);
        if !self.config.has_tied_embeddings {
            return Ok(Matrix::Dense(self.checkpoint.tensor(NAME)?.dense(vocabulary, hidden)?));
        }
        if self.checkpoint.has(NAME) {
            let head = self.checkpoint.tensor(NAME)?;
            let is_same = head.dtype() == embedding_tensor.dtype() && head.shape() == embedding_tensor.shape();
            if !is_same || head.region().bytes() != embedding_tensor.region().bytes() {
                let (file, tensor) = (head.file().to_owned(), NAME.to_owned());
                return Err(CheckpointError::TiedHeadDiffers { file, tensor });
            }
        }
        Ok(embedding.clone())
    }

    fn layer(&mut self, layer: usize) -> Result<LayerWeights, CheckpointError> {
        let hidden = self.config.hidden_size;
        let prefix = format!("model.layers.{layer}");
        let attention_norm = self.vector(&format!("{prefix}.input_layernorm.weight"), &[hidden])?;
        let attention = self.attention(&format!("{prefix}.self_attn"))?;
        let mlp_norm = self.vector(&format!("{prefix}.post_attention_layernorm.weight"), &[hidden])?;
        let router = self.router(&format!("{prefix}.mlp.router"))?;
        let experts = self.experts(&format!("{prefix}.mlp.experts"))?;
        let weights = LayerWeights { attention_norm, attention, mlp_norm, router, experts };
        let attention = [&weights.attention.q, &weights.attention.k, &weights.attention.v, &weights.attention.o];
        let experts = weights.experts.iter().flat_map(|expert| [&expert.gate_up, &expert.down]);
        let bytes = attention.into_iter().chain(experts).map(|linear| linear.weight.stored_bytes()).sum();
        self.step(&format!("layer {} of {}", layer + 1, self.config.layers.len()), bytes);
        Ok(weights)
    }

    fn attention(&mut self, prefix: &str) -> Result<AttentionWeights, CheckpointError> {
        let (hidden, query, kv) = (self.config.hidden_size, self.config.query_width(), self.config.kv_width());
        Ok(AttentionWeights {
            q: self.projection(&format!("{prefix}.q_proj"), query, hidden)?,
            k: self.projection(&format!("{prefix}.k_proj"), kv, hidden)?,
            v: self.projection(&format!("{prefix}.v_proj"), kv, hidden)?,
            o: self.projection(&format!("{prefix}.o_proj"), hidden, query)?,
            sinks: self.vector(&format!("{prefix}.sinks"), &[self.config.heads])?,
        })
    }

    fn projection(&mut self, name: &str, rows: usize, cols: usize) -> Result<Linear, CheckpointError> {
        let stored = self.matrix(&format!("{name}.weight"), rows, cols)?;
        let weight = self.quantized(&format!("{name}.weight"), stored)?;
        let bias = self.config.has_attention_bias.then(|| self.vector(&format!("{name}.bias"), &[rows]));
        Ok(Linear { weight, bias: bias.transpose()? })
    }

    /// Reads the router, which transformers' quantised form wraps into one more module.
    fn router(&mut self, name: &str) -> Result<Linear, CheckpointError> {
        let (experts, hidden) = (self.config.experts, self.config.hidden_size);
        let wrapped = format!("{name}.linear");
        let name = if self.checkpoint.has(&format!("{wrapped}.weight")) { &wrapped } else { name };
        let weight = self.matrix(&format!("{name}.weight"), experts, hidden)?;
        let bias = self.vector(&format!("{name}.bias"), &[experts])?;
        Ok(Linear { weight, bias: Some(bias) })
    }

    fn experts(&mut self, prefix: &str) -> Result<Vec<ExpertWeights>, CheckpointError> {
        let (hidden, intermediate) = (self.config.hidden_size, self.config.intermediate_size);
        let gate_up = self.expert_linears(&format!("{prefix}.gate_up_proj"), 2 * intermediate, hidden)?;
        let down = self.expert_linears(&format!("{prefix}.down_proj"), hidden, intermediate)?;
        Ok(gate_up.into_iter().zip(down).map(|(gate_up, down)| ExpertWeights { gate_up, down }).collect())
    }

    /// Reads one of the two matrices of every expert, in whichever layout it is stored.
    fn expert_linears(&mut self, name: &str, rows: usize, cols: usize) -> Result<Vec<Linear>, CheckpointError> {
        let count = self.config.experts;
        if self.checkpoint.has(&format!("{name}s.0.weight")) {
            return (0..count).map(|e| self.expert_linear(&format!("{name}s.{e}"), rows, cols)).collect();
        }
        let shape = [count, rows, cols];
        let stored: Vec<Matrix> = if mxfp4::has(self.checkpoint, name) {
            self.found.mxfp4 = true;
            mxfp4::experts(self.checkpoint, name, shape)?.into_iter().map(Matrix::Mxfp4).collect()
        } else if bnb4bit::has(self.checkpoint, name) {
            self.found.nf4 = true;
            bnb4bit::experts(self.checkpoint, name, shape)?.into_iter().map(Matrix::Nf4).collect()
        } else {
            self.transposed_experts(name, shape)?
        };
        let biases = self.vector(&format!("{name}_bias"), &[count, rows])?;
        let linear = |(matrix, bias): (Matrix, &[f32])| {
            Ok(Linear { weight: self.quantized(name, matrix)?, bias: Some(bias.to_vec()) })
        };
        stored.into_iter().zip(biases.chunks_exact(rows)).map(linear).collect()
    }

    fn expert_linear(&mut self, name: &str, rows: usize, cols: usize) -> Result<Linear, CheckpointError> {
        let weight = format!("{name}.weight");
        let stored = self.matrix(&weight, rows, cols)?;
        let weight = self.quantized(&weight, stored)?;
        Ok(Linear { weight, bias: Some(self.vector(&format!("{name}.bias"), &[rows])?) })
    }

    /// Reads fused experts of floats, stored inputs first.
    fn transposed_experts(&self, name: &str, [count, rows, cols]: [usize; 3]) -> Result<Vec<Matrix>, CheckpointError> {
        let tensor = self.checkpoint.tensor(name)?;
        let float_type = tensor.float_type()?;
        tensor.expect_shape(&[count, cols, rows])?;
        let expert = |e| Dense::transposed(float_type, rows, cols, tensor.part(e, count)).map(Matrix::Dense);
        (0..count).map(|e| expert(e).map_err(|source| tensor.format_error(source))).collect()
    }

    /// Reads a matrix, outputs first, of floats or in NF4.
    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Matrix, CheckpointError> {
        if bnb4bit::has(self.checkpoint, name) {
            self.found.nf4 = true;
            return Ok(Matrix::Nf4(bnb4bit::linear(self.checkpoint, name, rows, cols)?));
        }
        Ok(Matrix::Dense(self.checkpoint.tensor(name)?.dense(rows, cols)?))
    }

    /// Quantises a matrix if that was asked for and it is not NF4 already.
    fn quantized(&self, name: &str, matrix: Matrix) -> Result<Matrix, CheckpointError> {
        match (self.quantize, &matrix) {
            (Quantize::None | Quantize::File, _) | (Quantize::Nf4, Matrix::Nf4(_)) => Ok(matrix),
            (Quantize::Nf4, Matrix::Dense(_) | Matrix::Mxfp4(_)) => {
                let (rows, cols) = (matrix.rows(), matrix.cols());
                match quantize_nf4(rows, cols, &matrix.decode_rows(0..rows)) {
                    Ok(nf4) => Ok(Matrix::Nf4(nf4)),
                    // Only floats can be faulty here: an MXFP4 matrix was checked to decode to finite weights.
                    Err(source) => Err(self.checkpoint.tensor(name)?.format_error(source)),
                }
            }
        }
    }

    fn vector(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CheckpointError> {
        self.checkpoint.tensor(name)?.finite_floats(shape)
    }

    fn step(&mut self, what: &str, bytes: usize) {
        self.done = (self.done + bytes as u64).min(self.total);
        (self.progress)(self.done, self.total, what);
    }

    /// Compares what config.json says of the format with what was found.
    fn check_claim(&self) -> Result<(), CheckpointError> {
        let Some(claimed) = self.config.quantization else { return Ok(()) };
        let found = match (self.found.nf4, self.found.mxfp4) {
            (false, false) => "not quantised",
            (true, false) => "nf4",
            (false, true) => "mxfp4",
            (true, true) => "nf4 and mxfp4",
        };
        let is_true = match claimed {
            Quantization::Nf4 => self.found.nf4 && !self.found.mxfp4,
            Quantization::Mxfp4 => self.found.mxfp4 && !self.found.nf4,
        };
        if is_true {
            return Ok(());
        }
        let folder = self.checkpoint.folder().to_owned();
        Err(CheckpointError::QuantizationClaim { folder, claimed: claimed.name(), found })
    }
}

/// Refuses weights of layers or experts that the config does not count: they would be left out in silence.
fn refuse_beyond_config(checkpoint: &Checkpoint, config: &Config) -> Result<(), CheckpointError> {
    for name in checkpoint.names() {
        let Some((layer, rest)) = name.strip_prefix("model.layers.").and_then(leading_number) else { continue };
        let parts = ["mlp.experts.gate_up_projs.", "mlp.experts.down_projs."];
        let expert = parts.iter().find_map(|part| rest.strip_prefix('.')?.strip_prefix(part)).and_then(leading_number);
        let (what, count) = match expert {
            _ if layer >= config.layers.len() => ("layers", config.layers.len()),
            Some((expert, _)) if expert >= config.experts => ("experts", config.experts),
            _ => continue,
        };
        let (file, tensor) = (checkpoint.tensor(name)?.file().to_owned(), name.to_owned());
        return Err(CheckpointError::BeyondConfig { file, tensor, what, count });
    }
    Ok(())
}

/// Splits a decimal number off the front of a name; one too large for a number counts as the largest.
fn leading_number(text: &str) -> Option<(usize, &str)> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, rest) = text.split_at(digits);
    (digits > 0).then(|| (number.parse().unwrap_or(usize::MAX), rest))
}

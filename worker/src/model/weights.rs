//! A model's weights by role, each matrix in the form in which the file stores it.
//!
//! Owns: the names of tensors in every layout, and checking them against the config. Refuses: tensors that are
//! missing, misshapen or not finite where that is cheap to see (norms, biases, sinks, scales), and weights of layers or
//! experts beyond the config.
//! Invariant: the shapes of `Weights` are those of the `Config` that it was loaded with. Nothing is expanded whole: a
//! matrix that is quantised on the way is expanded alone.
//!
//! Attention, norms, embedding and output matrix have the same names in every architecture. A Llama's layer N has
//! `model.layers.N.mlp.{gate,up,down}_proj.weight`, floats or NF4, outputs first; a gpt-oss has a router and experts:
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

use super::config::{Config, DenseConfig, ExpertsConfig, Mlp, Quantization};
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
    /// What follows the attention.
    pub mlp: MlpWeights,
}

/// The weights of what follows the attention.
#[derive(Clone, Debug)]
pub enum MlpWeights {
    /// A router and experts.
    Experts(MixtureWeights),
    /// One network for every token.
    Dense(Box<DenseWeights>),
}

/// The weights of a router and its experts.
#[derive(Clone, Debug)]
pub struct MixtureWeights {
    /// `[experts, hidden]`, with bias.
    pub router: Linear,
    /// One per expert.
    pub experts: Vec<ExpertWeights>,
}

/// The weights of a dense network.
#[derive(Clone, Debug)]
pub struct DenseWeights {
    /// `[intermediate, hidden]`.
    pub gate: Linear,
    /// `[intermediate, hidden]`.
    pub up: Linear,
    /// `[hidden, intermediate]`.
    pub down: Linear,
}

impl MlpWeights {
    /// Gives router and experts; `None` for a dense network.
    #[must_use]
    pub fn experts(&self) -> Option<&MixtureWeights> {
        match self {
            MlpWeights::Experts(mixture) => Some(mixture),
            MlpWeights::Dense(_) => None,
        }
    }

    /// Gives every linear, in no particular order.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        let (dense, mixture) = match self {
            MlpWeights::Dense(dense) => (Some([&dense.gate, &dense.up, &dense.down]), None),
            MlpWeights::Experts(mixture) => (None, Some(mixture)),
        };
        let experts = mixture.into_iter().flat_map(|mixture| {
            let experts = mixture.experts.iter().flat_map(|expert| [&expert.gate_up, &expert.down]);
            [&mixture.router].into_iter().chain(experts)
        });
        dense.into_iter().flatten().chain(experts)
    }
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
    /// One logit per query head; minus infinity, which takes no share of a softmax, where the architecture has none.
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
    /// Says whether the output matrix is the embedding, whose bytes are held once.
    #[must_use]
    pub fn is_tied(&self) -> bool {
        match (&self.embedding, &self.lm_head) {
            (Matrix::Dense(a), Matrix::Dense(b)) => std::ptr::eq(a.region().bytes(), b.region().bytes()),
            (Matrix::Dense(_) | Matrix::Nf4(_) | Matrix::Mxfp4(_), _) => false,
        }
    }

    /// Gives every matrix, in no particular order; one that is tied once.
    pub fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let layers = self.layers.iter().flat_map(|layer| {
            let attention = &layer.attention;
            let linears = [&attention.q, &attention.k, &attention.v, &attention.o];
            linears.into_iter().chain(layer.mlp.linears()).map(|linear| &linear.weight)
        });
        let lm_head = (!self.is_tied()).then_some(&self.lm_head);
        [&self.embedding].into_iter().chain(lm_head).chain(layers)
    }

    /// Gives the form of most of the weights, for people: that of what follows the attention.
    #[must_use]
    pub fn format_name(&self) -> &'static str {
        let last = self.layers.first().and_then(|layer| layer.mlp.linears().last());
        last.map_or(self.embedding.format_name(), |linear| linear.weight.format_name())
    }
}

/// Whether a linear has a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bias {
    Present,
    Absent,
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

    fn lm_head(&mut self, embedding_tensor: &Tensor, embedding: &Matrix) -> Result<Matrix, CheckpointError> {
        const NAME: &str = "lm_head.weight";
        let (vocabulary, hidden) = (self.config.vocab_size, self.config.hidden_size);
        if !self.config.has_tied_embeddings {
            return self.matrix(NAME, vocabulary, hidden);
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
        let mlp = match self.config.mlp {
            Mlp::Experts(experts) => MlpWeights::Experts(self.mixture(&format!("{prefix}.mlp"), experts)?),
            Mlp::Dense(dense) => MlpWeights::Dense(Box::new(self.dense(&format!("{prefix}.mlp"), dense)?)),
        };
        let weights = LayerWeights { attention_norm, attention, mlp_norm, mlp };
        let attention = [&weights.attention.q, &weights.attention.k, &weights.attention.v, &weights.attention.o];
        let linears = attention.into_iter().chain(weights.mlp.linears());
        let bytes = linears.map(|linear| linear.weight.stored_bytes()).sum();
        self.step(&format!("layer {} of {}", layer + 1, self.config.layers.len()), bytes);
        Ok(weights)
    }

    fn attention(&mut self, prefix: &str) -> Result<AttentionWeights, CheckpointError> {
        let (hidden, query, kv) = (self.config.hidden_size, self.config.query_width(), self.config.kv_width());
        let bias = if self.config.has_attention_bias { Bias::Present } else { Bias::Absent };
        let sinks = match self.config.has_sinks {
            true => self.vector(&format!("{prefix}.sinks"), &[self.config.heads])?,
            false => vec![f32::NEG_INFINITY; self.config.heads],
        };
        Ok(AttentionWeights {
            q: self.linear(&format!("{prefix}.q_proj"), [query, hidden], bias)?,
            k: self.linear(&format!("{prefix}.k_proj"), [kv, hidden], bias)?,
            v: self.linear(&format!("{prefix}.v_proj"), [kv, hidden], bias)?,
            o: self.linear(&format!("{prefix}.o_proj"), [hidden, query], bias)?,
            sinks,
        })
    }

    fn dense(&mut self, prefix: &str, dense: DenseConfig) -> Result<DenseWeights, CheckpointError> {
        let (hidden, intermediate) = (self.config.hidden_size, dense.intermediate_size);
        let bias = if dense.has_bias { Bias::Present } else { Bias::Absent };
        Ok(DenseWeights {
            gate: self.linear(&format!("{prefix}.gate_proj"), [intermediate, hidden], bias)?,
            up: self.linear(&format!("{prefix}.up_proj"), [intermediate, hidden], bias)?,
            down: self.linear(&format!("{prefix}.down_proj"), [hidden, intermediate], bias)?,
        })
    }

    /// Reads a matrix, quantised if that was asked for, and its bias.
    fn linear(&mut self, name: &str, [rows, cols]: [usize; 2], bias: Bias) -> Result<Linear, CheckpointError> {
        let stored = self.matrix(&format!("{name}.weight"), rows, cols)?;
        let weight = self.quantized(&format!("{name}.weight"), stored)?;
        let bias_name = format!("{name}.bias");
        let bias = match bias {
            Bias::Present => Some(self.vector(&bias_name, &[rows])?),
            // One that the config does not know would be left out in silence.
            Bias::Absent if self.checkpoint.has(&bias_name) => {
                let (file, tensor) = (self.checkpoint.tensor(&bias_name)?.file().to_owned(), bias_name);
                return Err(CheckpointError::BiasBeyondConfig { file, tensor });
            }
            Bias::Absent => None,
        };
        Ok(Linear { weight, bias })
    }

    /// Reads the router, which transformers' quantised form wraps into one more module.
    fn router(&mut self, name: &str, experts: usize) -> Result<Linear, CheckpointError> {
        let hidden = self.config.hidden_size;
        let wrapped = format!("{name}.linear");
        let name = if self.checkpoint.has(&format!("{wrapped}.weight")) { &wrapped } else { name };
        let weight = self.matrix(&format!("{name}.weight"), experts, hidden)?;
        let bias = self.vector(&format!("{name}.bias"), &[experts])?;
        Ok(Linear { weight, bias: Some(bias) })
    }

    fn mixture(&mut self, prefix: &str, experts: ExpertsConfig) -> Result<MixtureWeights, CheckpointError> {
        let (hidden, intermediate, count) = (self.config.hidden_size, experts.intermediate_size, experts.count);
        let router = self.router(&format!("{prefix}.router"), count)?;
        let prefix = format!("{prefix}.experts");
        let gate_up = self.expert_linears(&format!("{prefix}.gate_up_proj"), [count, 2 * intermediate, hidden])?;
        let down = self.expert_linears(&format!("{prefix}.down_proj"), [count, hidden, intermediate])?;
        let experts = gate_up.into_iter().zip(down).map(|(gate_up, down)| ExpertWeights { gate_up, down }).collect();
        Ok(MixtureWeights { router, experts })
    }

    /// Reads one of the two matrices of every expert, in whichever layout it is stored.
    fn expert_linears(&mut self, name: &str, shape: [usize; 3]) -> Result<Vec<Linear>, CheckpointError> {
        let [count, rows, cols] = shape;
        if self.checkpoint.has(&format!("{name}s.0.weight")) {
            return (0..count).map(|e| self.linear(&format!("{name}s.{e}"), [rows, cols], Bias::Present)).collect();
        }
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
    let experts = config.experts().map(|experts| experts.count);
    for name in checkpoint.names() {
        let Some((layer, rest)) = name.strip_prefix("model.layers.").and_then(leading_number) else { continue };
        let parts = ["mlp.experts.gate_up_projs.", "mlp.experts.down_projs."];
        let expert = parts.iter().find_map(|part| rest.strip_prefix('.')?.strip_prefix(part)).and_then(leading_number);
        let (what, count) = match expert {
            _ if layer >= config.layers.len() => ("layers", config.layers.len()),
            Some((expert, _)) if experts.is_some_and(|count| expert >= count) => ("experts", experts.unwrap_or(0)),
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

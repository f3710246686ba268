//! The plain forward pass of gpt-oss and Llama: one sequence, formula by formula, every key and value kept in f32.
//!
//! Owns: the arithmetic that faster paths are compared with. Refuses: to be fast, to batch, and to keep a decoded matrix:
//! each is decoded when it is multiplied with, a slice of rows at a time.
//! Invariant: what a call to `logits` returns depends on the tokens alone, not on how they were split over calls, up to
//! the rounding of sums.
//!
//! Shapes: T tokens of this call, S tokens so far, H hidden, D width of a head, V vocabulary.
//! Source: openai/gpt-oss, `torch/model.py`; transformers 5, `modeling_gpt_oss.py` and `modeling_llama.py` (attention and
//! experts "eager").

use candle_core::{D, DType, Device, Result, Tensor};

use super::config::{Config, ExpertsConfig};
use super::rope::RopeTable;
use super::weights::{
    AttentionWeights, DenseWeights, ExpertWeights, LayerWeights, Linear, MixtureWeights, MlpWeights, Weights,
};
use crate::quant::Matrix;

/// Rows of a matrix that are decoded at once: bounds the copy of a large output matrix.
const DECODED_ROWS: usize = 8192;

/// Queries that attend at once: bounds the scores to heads per group * this * S.
const QUERY_CHUNK: usize = 256;

/// How values between operations are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// As f32.
    F32,
    /// As f32, but keys and values rounded to bf16: what the served decoder keeps.
    F32WithBf16Cache,
    /// Rounded to bf16 after each operation, as a model in bf16 would be; sums inside an operation stay in f32.
    Bf16,
}

/// A model and what it has seen of one sequence.
#[derive(Debug)]
pub struct Reference<'m> {
    config: &'m Config,
    weights: &'m Weights,
    precision: Precision,
    rope: RopeTable,
    caches: Vec<Option<KeysValues>>,
    seen: usize,
}

/// The keys and values of one layer, each `[kv_heads, S, D]`.
#[derive(Clone, Debug)]
struct KeysValues {
    keys: Tensor,
    values: Tensor,
}

impl<'m> Reference<'m> {
    /// Starts an empty sequence.
    ///
    /// # Panics
    /// When the weights were loaded with another config.
    #[must_use]
    pub fn new(config: &'m Config, weights: &'m Weights, precision: Precision) -> Reference<'m> {
        assert_eq!(config.layers.len(), weights.layers.len());
        let caches = vec![None; config.layers.len()];
        Reference { config, weights, precision, rope: RopeTable::new(&config.rope), caches, seen: 0 }
    }

    /// Continues the sequence with tokens and gives the logits at each of them.
    ///
    /// Shapes: `tokens: [T] -> [T, V] f32`.
    ///
    /// # Errors
    /// What candle reports; none is expected for a model that was loaded.
    ///
    /// # Panics
    /// When there are no tokens or one is not in the vocabulary.
    pub fn logits(&mut self, tokens: &[u32]) -> Result<Tensor> {
        assert!(!tokens.is_empty());
        let mut x = self.embed(tokens)?;
        let turns = self.turns(tokens.len())?;
        for layer in 0..self.config.layers.len() {
            x = self.layer(layer, &x, &turns)?;
        }
        self.seen += tokens.len();
        let x = self.norm(&x, &self.weights.final_norm)?;
        self.product(&x, &self.weights.lm_head)
    }

    /// One layer: x + attention(norm(x)), then x + mlp(norm(x)).
    fn layer(&mut self, index: usize, x: &Tensor, turns: &Turns) -> Result<Tensor> {
        let weights: &LayerWeights = &self.weights.layers[index];
        let attended = self.attention(index, &self.norm(x, &weights.attention_norm)?, turns)?;
        let x = self.round(&(x + attended)?)?;
        let normal = self.norm(&x, &weights.mlp_norm)?;
        let change = match (&weights.mlp, self.config.experts()) {
            (MlpWeights::Experts(mixture), Some(experts)) => self.experts(mixture, experts, &normal)?,
            (MlpWeights::Experts(_), None) => unreachable!("weights have the shape of their config"),
            (MlpWeights::Dense(dense), _) => self.dense(dense, &normal)?,
        };
        self.round(&(x + change)?)
    }

    /// The SwiGLU of a dense model: down(silu(gate(x)) * up(x)), silu(z) = z * sigmoid(z). Shapes: `[T, H] -> [T, H]`.
    ///
    /// Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    fn dense(&self, weights: &DenseWeights, x: &Tensor) -> Result<Tensor> {
        let gate = self.linear(x, &weights.gate)?;
        let sigmoid = ((gate.neg()?.exp()? + 1.0)?).recip()?;
        let gated = self.round(&(gate * sigmoid)?)?;
        let inner = self.round(&(gated * self.linear(x, &weights.up)?)?)?;
        self.linear(&inner, &weights.down)
    }

    /// Gathers the rows of the embedding. Shapes: `[T] -> [T, H]`.
    fn embed(&self, tokens: &[u32]) -> Result<Tensor> {
        let hidden = self.config.hidden_size;
        let mut rows = vec![0.0f32; tokens.len() * hidden];
        for (token, row) in tokens.iter().zip(rows.chunks_exact_mut(hidden)) {
            self.weights.embedding.decode_row(*token as usize, row);
        }
        self.round(&Tensor::from_vec(rows, (tokens.len(), hidden), &Device::Cpu)?)
    }

    /// RMSNorm: weight * x / sqrt(mean(x^2) + eps), in f32 whatever the precision. Shapes: `[T, H] -> [T, H]`.
    ///
    /// Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    fn norm(&self, x: &Tensor, weight: &[f32]) -> Result<Tensor> {
        let mean_square = x.sqr()?.mean_keepdim(D::Minus1)?;
        let scale = (mean_square + f64::from(self.config.norm_eps))?.sqrt()?;
        let weight = Tensor::new(weight, &Device::Cpu)?;
        self.round(&x.broadcast_div(&scale)?.broadcast_mul(&weight)?)
    }

    /// x W^T + bias. Shapes: `x: [T, inputs] -> [T, outputs]`.
    fn linear(&self, x: &Tensor, linear: &Linear) -> Result<Tensor> {
        let product = self.product(x, &linear.weight)?;
        match &linear.bias {
            None => Ok(product),
            Some(bias) => self.round(&product.broadcast_add(&Tensor::new(bias.as_slice(), &Device::Cpu)?)?),
        }
    }

    /// x W^T, the matrix decoded a slice at a time. Shapes: `x: [T, inputs] -> [T, outputs]`.
    fn product(&self, x: &Tensor, matrix: &Matrix) -> Result<Tensor> {
        let mut slices = Vec::new();
        for start in (0..matrix.rows()).step_by(DECODED_ROWS) {
            let rows = start..(start + DECODED_ROWS).min(matrix.rows());
            let shape = (rows.len(), matrix.cols());
            let slice = self.round(&Tensor::from_vec(matrix.decode_rows(rows), shape, &Device::Cpu)?)?;
            slices.push(x.matmul(&slice.t()?)?);
        }
        self.round(&Tensor::cat(&slices, 1)?)
    }

    /// Grouped-query attention with a sink per query head, minus infinity for none. Shapes: `x: [T, H] -> [T, H]`.
    fn attention(&mut self, layer: usize, x: &Tensor, turns: &Turns) -> Result<Tensor> {
        let weights: &AttentionWeights = &self.weights.layers[layer].attention;
        let queries = self.turn(&self.heads(&self.linear(x, &weights.q)?)?, turns)?;
        let keys = self.turn(&self.heads(&self.linear(x, &weights.k)?)?, turns)?;
        let values = self.heads(&self.linear(x, &weights.v)?)?;
        let past = self.remember(layer, keys, values)?;
        let group = self.config.heads / self.config.kv_heads;
        let mut heads = Vec::new();
        for kv_head in 0..self.config.kv_heads {
            let first = kv_head * group;
            let queries = queries.narrow(0, first, group)?;
            let past = KeysValues { keys: past.keys.get(kv_head)?, values: past.values.get(kv_head)? };
            heads.push(self.attend(
                &queries,
                &past,
                &weights.sinks[first..first + group],
                self.config.window(layer),
            )?);
        }
        let tokens = x.dim(0)?;
        let joined = Tensor::cat(&heads, 0)?.transpose(0, 1)?.reshape((tokens, self.config.query_width()))?;
        self.linear(&joined, &weights.o)
    }

    /// Splits a projection into heads. Shapes: `[T, heads * D] -> [heads, T, D]`.
    fn heads(&self, x: &Tensor) -> Result<Tensor> {
        let (tokens, width) = x.dims2()?;
        x.reshape((tokens, width / self.config.head_dim, self.config.head_dim))?.transpose(0, 1)?.contiguous()
    }

    /// Adds keys and values to a layer's cache and gives all of them. Shapes: `[kv_heads, T, D] -> [kv_heads, S, D]`.
    fn remember(&mut self, layer: usize, keys: Tensor, values: Tensor) -> Result<KeysValues> {
        let (keys, values) = (self.round_cached(keys)?, self.round_cached(values)?);
        let all = match self.caches[layer].take() {
            None => KeysValues { keys, values },
            Some(past) => KeysValues {
                keys: Tensor::cat(&[past.keys, keys], 1)?,
                values: Tensor::cat(&[past.values, values], 1)?,
            },
        };
        self.caches[layer] = Some(all.clone());
        Ok(all)
    }

    /// The query heads of one key head, a chunk of queries at a time, over the keys that any of them sees.
    ///
    /// Shapes: `queries: [group, T, D], past: [S, D] -> [group, T, D]`.
    fn attend(&self, queries: &Tensor, past: &KeysValues, sinks: &[f32], window: Option<usize>) -> Result<Tensor> {
        let tokens = queries.dim(1)?;
        let mut chunks = Vec::new();
        for start in (0..tokens).step_by(QUERY_CHUNK) {
            let count = QUERY_CHUNK.min(tokens - start);
            let first = self.seen + start;
            let oldest = window.map_or(0, |window| (first + 1).saturating_sub(window));
            let keys = first + count - oldest;
            let seen = KeysValues {
                keys: past.keys.narrow(0, oldest, keys)?.contiguous()?,
                values: past.values.narrow(0, oldest, keys)?.contiguous()?,
            };
            let hidden = mask(first, count, oldest..oldest + keys, window)?;
            chunks.push(self.attend_chunk(&queries.narrow(1, start, count)?, &seen, sinks, &hidden)?);
        }
        Tensor::cat(&chunks, 1)
    }

    /// softmax over the scores and the sink, the sink's share dropped:
    /// p_ij = exp(q_i k_j / sqrt(D)) / (exp(sink) + sum_j' exp(q_i k_j' / sqrt(D))).
    ///
    /// Shapes: `queries: [group, C, D], past: [K, D], mask: [C, K] -> [group, C, D]`.
    fn attend_chunk(&self, queries: &Tensor, past: &KeysValues, sinks: &[f32], mask: &Tensor) -> Result<Tensor> {
        let (group, count, width) = queries.dims3()?;
        let keys = past.keys.dim(0)?;
        let flat = queries.reshape((group * count, width))?;
        let products = self.round(&flat.matmul(&past.keys.t()?)?)?;
        let scores = self.round(&(products / (width as f64).sqrt())?)?;
        let scores = scores.reshape((group, count, keys))?.broadcast_add(mask)?;
        let sinks = Tensor::new(sinks, &Device::Cpu)?.reshape((group, 1, 1))?;
        let sinks = self.round(&sinks)?.broadcast_as((group, count, 1))?;
        let scores = Tensor::cat(&[scores, sinks.contiguous()?], 2)?;
        let scores = self.round(&scores.broadcast_sub(&scores.max_keepdim(2)?)?)?;
        let exponentials = scores.exp()?;
        let shares = exponentials.broadcast_div(&exponentials.sum_keepdim(2)?)?;
        let shares = self.round(&shares)?.narrow(2, 0, keys)?.contiguous()?;
        let mixed = shares.reshape((group * count, keys))?.matmul(&past.values)?;
        self.round(&mixed)?.reshape((group, count, width))
    }

    /// Cos and sin of the next positions. Shapes: each `[T, D / 2]`.
    fn turns(&self, tokens: usize) -> Result<Turns> {
        let pairs = self.config.head_dim / 2;
        let (mut cos, mut sin) = (vec![0.0; tokens * pairs], vec![0.0; tokens * pairs]);
        for (token, (cos, sin)) in cos.chunks_exact_mut(pairs).zip(sin.chunks_exact_mut(pairs)).enumerate() {
            self.rope.write(self.seen + token, cos, sin);
        }
        let tensor = |values| self.round(&Tensor::from_vec(values, (tokens, pairs), &Device::Cpu)?);
        Ok(Turns { cos: tensor(cos)?, sin: tensor(sin)? })
    }

    /// Turns each pair (a, b) of the two halves: (a cos - b sin, b cos + a sin). Shapes: `[heads, T, D]`, unchanged.
    fn turn(&self, x: &Tensor, Turns { cos, sin }: &Turns) -> Result<Tensor> {
        let half = self.config.head_dim / 2;
        let (a, b) = (x.narrow(2, 0, half)?, x.narrow(2, half, half)?);
        let turned_a = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
        let turned_b = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
        self.round(&Tensor::cat(&[turned_a, turned_b], 2)?)
    }

    /// Sends each token through its experts and adds up what they say, by the router's shares. Shapes: `[T, H] -> [T, H]`.
    fn experts(&self, weights: &MixtureWeights, config: &ExpertsConfig, x: &Tensor) -> Result<Tensor> {
        let logits = self.linear(x, &weights.router)?.to_vec2::<f32>()?;
        let mut routed = vec![(Vec::new(), Vec::new()); weights.experts.len()];
        for (token, logits) in logits.iter().enumerate() {
            for (expert, share) in route(logits, config.per_token) {
                routed[expert].0.push(token as u32);
                routed[expert].1.push(share);
            }
        }
        let mut sum = x.zeros_like()?;
        for (expert, (tokens, shares)) in weights.experts.iter().zip(routed) {
            if tokens.is_empty() {
                continue;
            }
            let count = tokens.len();
            let tokens = Tensor::from_vec(tokens, count, &Device::Cpu)?;
            let shares = self.round(&Tensor::from_vec(shares, (count, 1), &Device::Cpu)?)?;
            let said = self.expert(expert, config, &x.index_select(&tokens, 0)?)?;
            let weighed = self.round(&said.broadcast_mul(&shares)?)?;
            sum = self.round(&sum.index_add(&tokens, &weighed, 0)?)?;
        }
        Ok(sum)
    }

    /// The clamped SwiGLU of gpt-oss between two linears; gate and up are interleaved in the first one's outputs:
    /// gate <- min(gate, limit), up <- clamp(up, -limit, limit), y = (up + 1) * gate * sigmoid(alpha * gate).
    ///
    /// Shapes: `[n, H] -> [n, H]`.
    fn expert(&self, weights: &ExpertWeights, config: &ExpertsConfig, x: &Tensor) -> Result<Tensor> {
        let (limit, alpha) = (f64::from(config.swiglu_limit), f64::from(config.swiglu_alpha));
        let (tokens, width) = (x.dim(0)?, config.intermediate_size);
        let both = self.linear(x, &weights.gate_up)?.reshape((tokens, width, 2))?;
        let half = |index| both.narrow(2, index, 1)?.contiguous()?.reshape((tokens, width));
        let (gate, up) = (half(0)?.minimum(limit)?, half(1)?.clamp(-limit, limit)?);
        let sigmoid = ((self.round(&(&gate * alpha)?)?.neg()?.exp()? + 1.0)?).recip()?;
        let gated = self.round(&(gate * self.round(&sigmoid)?)?)?;
        let y = self.round(&(self.round(&(up + 1.0)?)? * gated)?)?;
        self.linear(&y, &weights.down)
    }

    fn round_cached(&self, x: Tensor) -> Result<Tensor> {
        match self.precision {
            Precision::F32 => Ok(x),
            Precision::F32WithBf16Cache | Precision::Bf16 => x.to_dtype(DType::BF16)?.to_dtype(DType::F32),
        }
    }

    fn round(&self, x: &Tensor) -> Result<Tensor> {
        match self.precision {
            Precision::F32 | Precision::F32WithBf16Cache => Ok(x.clone()),
            Precision::Bf16 => x.to_dtype(DType::BF16)?.to_dtype(DType::F32),
        }
    }
}

/// Cos and sin of the positions of one call.
#[derive(Debug)]
struct Turns {
    cos: Tensor,
    sin: Tensor,
}

/// Zero where a query sees a key, minus infinity where it doesn't: a key is seen by the queries at its own position and
/// later, as long as fewer than `window` positions lie between. Shapes: `[count, keys.len()]`.
fn mask(first: usize, count: usize, keys: std::ops::Range<usize>, window: Option<usize>) -> Result<Tensor> {
    let is_seen = |query: usize, key: usize| key <= query && window.is_none_or(|window| query - key < window);
    let values: Vec<f32> = (first..first + count)
        .flat_map(|query| keys.clone().map(move |key| if is_seen(query, key) { 0.0 } else { f32::NEG_INFINITY }))
        .collect();
    Tensor::from_vec(values, (count, keys.len()), &Device::Cpu)
}

/// Picks the experts with the largest logits (the lower index on a tie) and shares out one by softmax over these alone.
fn route(logits: &[f32], count: usize) -> Vec<(usize, f32)> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
    order.truncate(count);
    let largest = logits[order[0]];
    let exponentials: Vec<f32> = order.iter().map(|expert| (logits[*expert] - largest).exp()).collect();
    let sum: f32 = exponentials.iter().sum();
    order.into_iter().zip(exponentials).map(|(expert, exponential)| (expert, exponential / sum)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_router_takes_the_largest_and_shares_out_one() {
        let routed = route(&[0.0, 2.0, -1.0, 2.0], 2);
        assert_eq!(routed, [(1, 0.5), (3, 0.5)]);
        let routed = route(&[3.0, f32::NEG_INFINITY, 1.0], 1);
        assert_eq!(routed, [(0, 1.0)]);
    }

    #[test]
    fn a_window_counts_the_query_itself() {
        let seen = |window| {
            let rows = mask(2, 2, 0..4, window).expect("a mask").to_vec2::<f32>().expect("two dimensions");
            rows.iter().map(|row| row.iter().map(|value| u8::from(*value == 0.0)).collect()).collect::<Vec<Vec<u8>>>()
        };
        assert_eq!(seen(None), [[1, 1, 1, 0], [1, 1, 1, 1]]);
        assert_eq!(seen(Some(2)), [[0, 1, 1, 0], [0, 0, 1, 1]]);
        assert_eq!(seen(Some(1)), [[0, 0, 1, 0], [0, 0, 0, 1]]);
    }
}

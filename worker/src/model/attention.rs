//! Attention over paged keys and values, with sinks and a sliding window.
//!
//! For each token and query head: `softmax([q.k_j / sqrt(head_dim) for visible j, sink])`, its last column dropped, times
//! the values. The sink is a learned logit that takes part in the normalisation only. Source: gpt-oss,
//! `modeling_gpt_oss.py` of transformers; Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks".
//!
//! A token's result depends on its sequence and position alone: visible positions are taken in ascending order whatever
//! else is in the batch.

use half::bf16;
use half::slice::HalfFloatSliceExt;

use super::batch::Batch;
use crate::engine::kv_cache::KvCache;
use crate::engine::pager::{BLOCK_TOKENS, Blocks};
use crate::quant::cpu::Cpu;

/// The shape of a model's attention.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    /// Heads of queries.
    pub query: usize,
    /// Heads of keys and values, a divisor of `query`.
    pub kv: usize,
    /// Elements of a head.
    pub dim: usize,
}

/// Attention in one layer: what stays the same for all tokens of a step.
#[derive(Debug)]
pub struct LayerAttention<'a> {
    /// Where to compute.
    pub cpu: &'a Cpu,
    /// The shape.
    pub heads: Heads,
    /// The sink of each query head.
    pub sinks: &'a [f32],
    /// The keys and values.
    pub cache: &'a KvCache,
    /// The index of the layer.
    pub layer: usize,
}

impl LayerAttention<'_> {
    /// Computes attention for every token of a batch whose keys and values are in the cache already.
    ///
    /// Shapes: queries, out: [batch, query heads, head_dim].
    pub fn attend(&self, batch: &Batch<'_>, queries: &[f32], out: &mut [f32]) {
        let group_len = self.heads.query / self.heads.kv * self.heads.dim;
        self.cpu.for_each_chunk(out, group_len, |chunk, out| {
            let token = &batch.rows[chunk / self.heads.kv];
            let queries = &queries[chunk * group_len..(chunk + 1) * group_len];
            self.attend_group(token.position, batch.blocks[token.sequence], chunk % self.heads.kv, queries, out);
        });
    }

    /// Attention of one token for the query heads that share one head of keys and values.
    ///
    /// Shapes: queries, out: [group, head_dim].
    fn attend_group(&self, position: u32, blocks: &Blocks, kv_head: usize, queries: &[f32], out: &mut [f32]) {
        let dim = self.heads.dim;
        let group = queries.len() / dim;
        let visible = Visible { first: self.cache.span(self.layer).first_visible(position), last: position };
        let count = visible.count();
        let scale = 1.0 / (dim as f32).sqrt();
        let mut weights = vec![0.0; group * count];
        let mut widened = vec![0.0; BLOCK_TOKENS as usize * dim];
        let mut done = 0;
        for (index, tokens) in visible.blocks() {
            let block = self.cache.block(self.layer, blocks, index, kv_head);
            let keys = widen(&block.keys[tokens.start * dim..tokens.end * dim], &mut widened);
            for (offset, key) in keys.chunks_exact(dim).enumerate() {
                for (head, query) in queries.chunks_exact(dim).enumerate() {
                    weights[head * count + done + offset] = self.cpu.dot(query, key) * scale;
                }
            }
            done += tokens.len();
        }
        for (weights, sink) in weights.chunks_exact_mut(count).zip(&self.sinks[kv_head * group..]) {
            softmax_with_sink(weights, *sink);
        }
        out.fill(0.0);
        done = 0;
        for (index, tokens) in visible.blocks() {
            let block = self.cache.block(self.layer, blocks, index, kv_head);
            let values = widen(&block.values[tokens.start * dim..tokens.end * dim], &mut widened);
            for (offset, value) in values.chunks_exact(dim).enumerate() {
                for (head, sum) in out.chunks_exact_mut(dim).enumerate() {
                    let weight = weights[head * count + done + offset];
                    sum.iter_mut().zip(value).for_each(|(sum, value)| *sum += weight * value);
                }
            }
            done += tokens.len();
        }
    }
}

/// The positions that a token sees, both ends inclusive.
#[derive(Clone, Copy)]
struct Visible {
    first: u32,
    last: u32,
}

impl Visible {
    fn count(self) -> usize {
        (self.last - self.first + 1) as usize
    }

    /// Each block that is seen, with the range of its tokens that are.
    fn blocks(self) -> impl Iterator<Item = (u32, std::ops::Range<usize>)> {
        (self.first / BLOCK_TOKENS..=self.last / BLOCK_TOKENS).map(move |index| {
            let start = index * BLOCK_TOKENS;
            let from = self.first.saturating_sub(start);
            let to = (self.last - start + 1).min(BLOCK_TOKENS);
            (index, from as usize..to as usize)
        })
    }
}

fn widen<'a>(narrow: &[bf16], buffer: &'a mut [f32]) -> &'a [f32] {
    let wide = &mut buffer[..narrow.len()];
    narrow.convert_to_f32_slice(wide);
    wide
}

/// Turns scores into weights: `exp(s_j) / (exp(sink) + sum exp(s))`, computed relative to the largest.
fn softmax_with_sink(scores: &mut [f32], sink: f32) {
    let largest = scores.iter().copied().fold(sink, f32::max);
    let mut sum = f64::from((sink - largest).exp());
    for score in scores.iter_mut() {
        *score = (*score - largest).exp();
        sum += f64::from(*score);
    }
    let scale = (1.0 / sum) as f32;
    scores.iter_mut().for_each(|weight| *weight *= scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sink_takes_its_share_and_large_scores_stay_finite() {
        let mut scores = [1000.0, 1000.0];
        softmax_with_sink(&mut scores, 1000.0);
        assert_eq!(scores, [1.0 / 3.0; 2]);
        let mut scores = [0.0];
        softmax_with_sink(&mut scores, f32::NEG_INFINITY);
        assert_eq!(scores, [1.0]);
    }

    #[test]
    fn visible_positions_are_cut_into_blocks() {
        let ranges = |first, last| Visible { first, last }.blocks().collect::<Vec<_>>();
        assert_eq!(ranges(0, 0), [(0, 0..1)]);
        assert_eq!(ranges(0, 31), [(0, 0..32)]);
        assert_eq!(ranges(5, 64), [(0, 5..32), (1, 0..32), (2, 0..1)]);
        assert_eq!(ranges(33, 40), [(1, 1..9)]);
    }
}

//! Attention over paged keys and values, with sinks and a sliding window.
//!
//! For each token and query head: `softmax([q.k_j / sqrt(head_dim) for visible j, sink])`, its last column dropped, times
//! the values. The sink is a learned logit that takes part in the normalisation only. Source: gpt-oss,
//! `modeling_gpt_oss.py` of transformers; Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks".
//!
//! Neighbouring tokens of a sequence make a tile, which reads each key and value once for all of its queries. Where there
//! are few tiles for many threads, the splits of their contexts are computed apart and merged afterwards. What a token
//! comes to follows from its sequence and position alone: see `tile`.

#[expect(unsafe_code, reason = "vector instructions are called once they were detected")]
mod lanes;
mod plan;
#[cfg(test)]
mod tests;
mod tile;

use std::sync::{Mutex, PoisonError};

pub use self::lanes::Vectors;
use self::lanes::on;
pub use self::plan::scratch_bytes;
use self::plan::{Pass, Plan};
use self::tile::{Attend, Merge, State, StateView, Tile, work_len};
use super::batch::Batch;
use crate::engine::kv_cache::KvCache;
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

/// What attention keeps from step to step: the instructions and the memory that it works in.
#[derive(Debug)]
pub struct Attention {
    vectors: Vectors,
    /// One buffer for each thread that computes; what they hold is of no account.
    buffers: Mutex<Vec<Vec<f32>>>,
    plans: Mutex<Vec<Plan>>,
}

impl Attention {
    /// Takes the instructions to compute with, those of the `Cpu` that will.
    #[must_use]
    pub fn new(vectors: Vectors) -> Attention {
        Attention { vectors, buffers: Mutex::default(), plans: Mutex::default() }
    }

    /// Lends a buffer of at least `len`.
    fn with_buffer(&self, len: usize, work: impl FnOnce(&mut [f32])) {
        let mut buffer = self.buffers.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        if buffer.len() < len {
            buffer.resize(len, 0.0);
        }
        work(&mut buffer[..len]);
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner).push(buffer);
    }
}

/// Attention in one layer: what stays the same for all tokens of a step.
#[derive(Debug)]
pub struct LayerAttention<'a> {
    /// Where to compute.
    pub cpu: &'a Cpu,
    /// With what.
    pub attention: &'a Attention,
    /// The shape.
    pub heads: Heads,
    /// The sink of each query head; empty for a model without.
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
        let mut plan = self.attention.plans.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_default();
        plan.lay_out(&batch.rows, self.heads, self.cache.span(self.layer), self.cpu.threads());
        for pass in plan.passes.iter_mut().filter(|pass| !pass.parts.is_empty()) {
            self.run_pass(batch, queries, pass);
        }
        let group = self.heads.query / self.heads.kv;
        self.cpu.for_each_chunk(out, group * self.heads.dim, |chunk, out| {
            let (row, kv_head) = (chunk / self.heads.kv, chunk % self.heads.kv);
            self.finish(&plan, row, kv_head, out);
        });
        self.attention.plans.lock().unwrap_or_else(PoisonError::into_inner).push(plan);
    }

    /// Computes the states of a pass.
    fn run_pass(&self, batch: &Batch<'_>, queries: &[f32], pass: &mut Pass) {
        let Heads { query, kv, dim } = self.heads;
        let group = query / kv;
        let (parts, state_len) = (&pass.parts, pass.state_len);
        self.cpu.for_each_chunk(&mut pass.states[..parts.len() * state_len], state_len, |index, state| {
            let part = &parts[index];
            let first = batch.rows[part.row];
            let tile = Tile {
                cache: self.cache,
                layer: self.layer,
                blocks: batch.blocks[first.sequence],
                kv_head: part.kv_head,
                position: first.position,
                tokens: part.tokens,
                group,
                dim,
            };
            let mut state = State::within(state, tile.queries(), dim);
            state.start(|query| if pass.is_split { f32::NEG_INFINITY } else { self.sink(part.kv_head, query % group) });
            let start = (part.row * query + part.kv_head * group) * dim;
            self.attention.with_buffer(work_len(tile.queries(), dim), |work| {
                let (splits, rows, stride) = (part.splits.clone(), &queries[start..], query * dim);
                on(self.attention.vectors, Attend { tile, splits, rows, stride, state, work });
            });
        });
    }

    /// Writes what the heads of one group of one token come to. Shapes: out: [group, dim].
    fn finish(&self, plan: &Plan, row: usize, kv_head: usize, out: &mut [f32]) {
        let dim = self.heads.dim;
        let group = out.len() / dim;
        let place = &plan.places[row];
        let pass = &plan.passes[place.pass];
        let parts = place.part + kv_head * place.parts..place.part + (kv_head + 1) * place.parts;
        let wanted = place.token * group..(place.token + 1) * group;
        let view = |part: usize| {
            let state = &pass.states[part * pass.state_len..(part + 1) * pass.state_len];
            StateView::of(state, pass.parts[part].tokens * group, wanted.clone(), dim)
        };
        if !pass.is_split {
            let StateView { sums, powers, .. } = view(parts.start);
            divide(sums, powers, out);
            return;
        }
        self.attention.with_buffer(State::len(group, dim), |buffer| {
            let mut state = State::within(buffer, group, dim);
            state.start(|query| self.sink(kv_head, query));
            for part in parts {
                on(self.attention.vectors, Merge { state: &mut state, next: view(part), dim });
            }
            divide(state.sums, state.powers, out);
        });
    }

    fn sink(&self, kv_head: usize, head: usize) -> f32 {
        let group = self.heads.query / self.heads.kv;
        if self.sinks.is_empty() { f32::NEG_INFINITY } else { self.sinks[kv_head * group + head] }
    }
}

/// Shapes: sums, out: [queries, dim], powers: [queries].
fn divide(sums: &[f32], powers: &[f32], out: &mut [f32]) {
    let dim = sums.len() / powers.len();
    for ((sums, power), out) in sums.chunks_exact(dim).zip(powers).zip(out.chunks_exact_mut(dim)) {
        let share = 1.0 / power;
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum * share);
    }
}

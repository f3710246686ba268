//! What a step works in on a card: one allocation, its parts laid out before it is taken.
//!
//! Owns: sizes and places of activations. The two roles of a step's tokens are computed one after the other and share the
//! parts. Pure.

use bulkhead_shared::units::Bytes;

use crate::model::config::{Config, Mlp};

/// Every part begins at a multiple of this. Units: bytes.
const ALIGNMENT: u64 = 256;

/// Attention of a generated token cuts what it sees into pieces of this many positions, or of twice as many and so on,
/// until there are at most `CUTS_MAX`.
const CUT_TOKENS: u32 = 128;
const CUTS_MAX: u32 = 64;

/// Tokens of the vocabulary that are judged at a time, and the bytes that come of it.
const CHOICE_CHUNK: u64 = 1024;
const CHOICE_BYTES: u64 = 24;

/// How large a step may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StepSize {
    /// Generated tokens, and rows of which a token or logits are wanted at once.
    pub generated_rows: u32,
    /// Tokens of prompts.
    pub prompt_rows: u32,
    /// Tokens that a sequence may have.
    pub context_tokens: u32,
}

/// Places of a step's parts, counted from the start of the allocation. Units: bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scratch {
    /// [rows, hidden] bf16: rows of the embedding that the host gathered.
    pub embedded: u64,
    /// [rows, hidden] f32, twice: the residual stream, which changes sides where routing adds to it.
    pub x: [u64; 2],
    /// [rows, hidden] bf16.
    pub normal: u64,
    /// [rows, hidden] f32.
    pub normal_wide: u64,
    /// [rows, query heads + 2 kv heads, dim] f32.
    pub qkv: u64,
    /// [rows, query heads, dim] bf16.
    pub attended: u64,
    /// [rows, hidden] f32: the change by attention, or by a mixture that the host computed.
    pub change: u64,
    /// [rows, experts] f32.
    pub router_logits: u64,
    /// [rows, used] u32.
    pub chosen_experts: u64,
    /// [rows, used] f32.
    pub expert_weights: u64,
    /// [rows, used] u32.
    pub slots: u64,
    /// [layers] u32.
    pub group_counts: u64,
    /// [experts] u32.
    pub group_experts: u64,
    /// [experts + 1] u32.
    pub group_firsts: u64,
    /// [rows, 2, intermediate] f32, of a dense network.
    pub gate_up: u64,
    /// [rows, used, intermediate] bf16; a dense network is used once.
    pub inner: u64,
    /// [rows, used, hidden] f32.
    pub results: u64,
    /// [generated, query heads, cuts, dim + 2] f32: attention's cuts.
    pub partial: u64,
    /// [generated, kv heads] u32, 0 between launches.
    pub attend_counters: u64,
    /// [generated + 1] u32, 0 between launches.
    pub route_counters: u64,
    /// [outputs, hidden] bf16.
    pub head_input: u64,
    /// [outputs, vocabulary] f32.
    pub logits: u64,
    /// Of the choice of tokens.
    pub choice_partials: u64,
    /// [outputs] of two u32.
    pub chosen: u64,
    /// The whole.
    pub bytes: Bytes,
}

impl Scratch {
    /// Lays out the parts of a step.
    #[must_use]
    pub fn new(config: &Config, size: StepSize) -> Scratch {
        let mut bytes = 0u64;
        let mut part = |elements: u64, element_bytes: u64| {
            let at = bytes;
            bytes = (at + elements * element_bytes).next_multiple_of(ALIGNMENT);
            at
        };
        let outputs = u64::from(size.generated_rows);
        let rows = outputs.max(u64::from(size.prompt_rows));
        let hidden = config.hidden_size as u64;
        // What is used of experts; and the width of a dense network.
        let (experts, used, intermediate, dense) = match config.mlp {
            Mlp::Experts(experts) => {
                (experts.count as u64, experts.per_token as u64, experts.intermediate_size as u64, 0)
            }
            Mlp::Dense(dense) => (0, 0, 0, dense.intermediate_size as u64),
        };
        let (heads, dim) = (config.heads as u64, config.head_dim as u64);
        let vocabulary = config.vocab_size as u64;
        let kv_heads = config.kv_heads as u64;
        let cuts = u64::from(cuts_of(size.context_tokens).next_power_of_two());
        Scratch {
            embedded: part(rows * hidden, 2),
            x: [part(rows * hidden, 4), part(rows * hidden, 4)],
            normal: part(rows * hidden, 2),
            normal_wide: part(rows * hidden, 4),
            qkv: part(rows * (heads + 2 * kv_heads) * dim, 4),
            attended: part(rows * heads * dim, 2),
            change: part(rows * hidden, 4),
            router_logits: part(rows * experts, 4),
            chosen_experts: part(rows * used, 4),
            expert_weights: part(rows * used, 4),
            slots: part(rows * used, 4),
            group_counts: part(config.layers.len() as u64, 4),
            group_experts: part(experts, 4),
            group_firsts: part(experts + 1, 4),
            gate_up: part(rows * 2 * dense, 4),
            inner: part(rows * (used * intermediate + dense), 2),
            results: part(rows * used * hidden, 4),
            partial: part(outputs * heads * cuts * (dim + 2), 4),
            attend_counters: part(outputs * kv_heads, 4),
            route_counters: part(outputs + 1, 4),
            head_input: part(outputs * hidden, 2),
            logits: part(outputs * vocabulary, 4),
            choice_partials: part(outputs * vocabulary.div_ceil(CHOICE_CHUNK), CHOICE_BYTES),
            chosen: part(outputs, 8),
            bytes: Bytes(bytes),
        }
    }
}

/// Gives the pieces that attention cuts so many visible positions into.
#[must_use]
pub fn cuts_of(seen: u32) -> u32 {
    let mut length = CUT_TOKENS;
    while u64::from(length) * u64::from(CUTS_MAX) < u64::from(seen) {
        length *= 2;
    }
    seen.div_ceil(length).max(1)
}

#[cfg(test)]
mod tests {
    use super::cuts_of;

    #[test]
    fn cuts_grow_longer_where_they_would_be_too_many() {
        for (seen, cuts) in [(0, 1), (1, 1), (128, 1), (129, 2), (8192, 64), (8193, 33), (16_384, 64), (131_072, 64)] {
            assert_eq!(cuts_of(seen), cuts, "{seen}");
        }
    }
}

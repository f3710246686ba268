//! A ragged batch: tokens of several sequences, each with its place, for one step.

use crate::engine::kv_cache::Blocks;

/// One token to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The index of its sequence in the batch.
    pub sequence: usize,
    /// Its position in the sequence, counted from 0.
    pub position: u32,
    /// Its id.
    pub token: u32,
}

/// What one step computes.
#[derive(Debug)]
pub struct Batch<'a> {
    /// The tokens. Those of one sequence stand together, in ascending order of position.
    pub rows: Vec<Row>,
    /// The blocks of each sequence; they reach past its last row.
    pub blocks: Vec<&'a Blocks>,
    /// The rows whose logits are wanted, ascending.
    pub outputs: Vec<usize>,
}

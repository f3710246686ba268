//! A ragged batch: tokens of several sequences, each with its place, for one step.

use crate::engine::pager::Blocks;

/// What a token is to its sequence. A device may compute the two differently, each always alike: what a token comes to
/// depends on its role, never on what is computed beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Part of the prompt.
    Prompt,
    /// Generated, also where it is computed again after a restart.
    Generated,
}

/// One token to compute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// The index of its sequence in the batch.
    pub sequence: usize,
    /// Its position in the sequence, counted from 0.
    pub position: u32,
    /// Its id.
    pub token: u32,
    /// Its role.
    pub role: Role,
}

/// What one step computes.
#[derive(Debug)]
pub struct Batch<'a> {
    /// The tokens. Those of one sequence stand together, in ascending order of position, and have one role.
    pub rows: Vec<Row>,
    /// The blocks of each sequence; they reach past its last row.
    pub blocks: Vec<&'a Blocks>,
    /// The rows of which something is wanted, ascending.
    pub outputs: Vec<usize>,
}

/// What is wanted of an output row.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Wanted {
    /// Its logits.
    Logits,
    /// The next token, drawn from `exp(logit / temperature)`, or the most likely one at temperature 0. Who computes may
    /// give the logits instead.
    Token {
        /// The temperature.
        temperature: f32,
        /// The seed of the request.
        seed: u64,
        /// The position of the token that is chosen.
        position: u64,
    },
}

/// What came of an output row.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Its logits. Shapes: [vocabulary].
    Logits(Vec<f32>),
    /// The token that was chosen.
    Token(u32),
    /// A token whose logit is not a finite number: the result cannot be used.
    Broken(u32),
}

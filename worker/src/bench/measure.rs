//! Prefill and decode under the clock.
//!
//! Tokens of prompts are made up, evenly over the vocabulary; generated ones are the most likely. Keys and values are
//! really computed. Every repetition of a measurement computes the same, so their spread is the machine's alone.

use std::time::Instant;

use super::BenchError;
use crate::engine::backend::Backend;
use crate::engine::pager::{Blocks, Exhausted};
use crate::eval::most_likely;
use crate::loader::LoadError;
use crate::model::batch::{Batch, Outcome, Role, Row, Wanted};

/// Sequences of equal length that have a backend for themselves.
#[derive(Debug)]
pub(super) struct Sequences<'a> {
    backend: &'a mut Backend,
    blocks: Vec<Blocks>,
}

/// What decode took.
#[derive(Debug)]
pub(super) struct Decoded {
    /// Of all sequences together, for each repetition.
    pub(super) tokens_per_second: Vec<f64>,
    /// Weights that all measured steps read.
    pub(super) weight_bytes: u64,
    /// Keys and values that all measured steps read.
    pub(super) kv_bytes: u64,
}

impl<'a> Sequences<'a> {
    /// Makes `batch` empty sequences.
    pub(super) fn new(backend: &'a mut Backend, batch: u32) -> Sequences<'a> {
        Sequences { backend, blocks: (0..batch).map(|_| Blocks::default()).collect() }
    }

    /// Measures how fast one sequence takes in a prompt. Units: tokens per second, for each repetition.
    pub(super) fn measure_prefill(&mut self, tokens: u32, repetitions: u32) -> Result<Vec<f64>, BenchError> {
        let mut rates = Vec::new();
        for repetition in 0..=repetitions {
            let started = Instant::now();
            self.prefill(0, tokens)?;
            if repetition > 0 {
                rates.push(f64::from(tokens) / started.elapsed().as_secs_f64());
            }
            self.backend.pager().release(&mut self.blocks[0]);
        }
        Ok(rates)
    }

    /// Measures how fast all sequences generate behind a context.
    pub(super) fn measure_decode(
        &mut self,
        depth: u32,
        generate: u32,
        repetitions: u32,
    ) -> Result<Decoded, BenchError> {
        for sequence in 0..self.blocks.len() {
            self.prefill(sequence, depth)?;
            // Blocks that a window has passed are kept from here on: each repetition starts over.
            self.reserve(sequence, depth + generate)?;
        }
        let mut decoded = Decoded { tokens_per_second: Vec::new(), weight_bytes: 0, kv_bytes: 0 };
        for repetition in 0..=repetitions {
            let (started, read_before) = (Instant::now(), self.backend.weight_bytes_read());
            self.generate(depth, generate)?;
            if repetition == 0 {
                continue;
            }
            let tokens = f64::from(generate) * self.blocks.len() as f64;
            decoded.tokens_per_second.push(tokens / started.elapsed().as_secs_f64());
            decoded.weight_bytes += self.backend.weight_bytes_read() - read_before;
            let shape = self.backend.pager().shape();
            let of_sequence: u64 = (depth..depth + generate).map(|position| shape.read_bytes(position)).sum();
            decoded.kv_bytes += of_sequence * self.blocks.len() as u64;
        }
        Ok(decoded)
    }

    /// Computes a made-up prompt for an empty sequence, in steps as large as served ones.
    fn prefill(&mut self, sequence: usize, tokens: u32) -> Result<(), BenchError> {
        let mut start = 0;
        while start < tokens {
            let end = tokens.min(start.saturating_add(self.backend.step_tokens().prompt));
            self.reserve(sequence, end)?;
            let rows: Vec<Row> = (start..end).map(|position| self.made_up(sequence, position, Role::Prompt)).collect();
            let outputs = if end == tokens { vec![rows.len() - 1] } else { Vec::new() };
            self.forward(rows, outputs)?;
            self.backend.pager().release_behind(&mut self.blocks[sequence], end);
            start = end;
        }
        Ok(())
    }

    /// Generates for all sequences at once.
    fn generate(&mut self, depth: u32, count: u32) -> Result<(), BenchError> {
        let first = |sequence| self.made_up(sequence, depth, Role::Generated);
        let mut rows: Vec<Row> = (0..self.blocks.len()).map(first).collect();
        for _ in 0..count {
            let tokens = self.forward(rows.clone(), (0..rows.len()).collect())?;
            for (row, token) in rows.iter_mut().zip(tokens) {
                (row.position, row.token) = (row.position + 1, token);
            }
        }
        Ok(())
    }

    /// Computes rows and chooses the most likely token behind each of the outputs.
    fn forward(&mut self, rows: Vec<Row>, outputs: Vec<usize>) -> Result<Vec<u32>, BenchError> {
        let most_likely_next = Wanted::Token { temperature: 0.0, seed: 0, position: 0 };
        let wanted = vec![most_likely_next; outputs.len()];
        let batch = Batch { rows, blocks: self.blocks.iter().collect(), outputs };
        let outcomes = self.backend.forward(&batch, &wanted).map_err(LoadError::Device)?;
        let token = |outcome| match outcome {
            Outcome::Token(token) => Ok(token),
            Outcome::Logits(logits) if logits.iter().all(|logit| logit.is_finite()) => Ok(most_likely(&logits)),
            Outcome::Logits(_) | Outcome::Broken(_) => Err(BenchError::NotFinite),
        };
        outcomes.into_iter().map(token).collect()
    }

    fn reserve(&mut self, sequence: usize, tokens: u32) -> Result<(), BenchError> {
        let blocks = &mut self.blocks[sequence];
        self.backend.pager().reserve(blocks, tokens).map_err(|Exhausted| BenchError::WindowsTooSmall)
    }

    /// Makes up a token that differs by place and sequence, by a multiplicative hash.
    fn made_up(&self, sequence: usize, position: u32, role: Role) -> Row {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        let mixed = ((sequence as u64) << 32 | u64::from(position)).wrapping_add(1).wrapping_mul(GOLDEN);
        let token = (mixed >> 32) % self.backend.config().vocab_size as u64;
        Row { sequence, position, token: token as u32, role }
    }
}

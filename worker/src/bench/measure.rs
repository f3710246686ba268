//! Prefill and decode under the clock.
//!
//! Tokens of prompts are made up, evenly over the vocabulary; generated ones are the most likely. Keys and values are
//! really computed. Every repetition of a measurement computes the same, so their spread is the machine's alone.

use std::time::Instant;

use super::BenchError;
use crate::engine::STEP_TOKENS_MAX;
use crate::engine::kv_cache::{Blocks, KvCache, KvShape};
use crate::eval::most_likely;
use crate::model::batch::{Batch, Row};
use crate::model::decoder::Decoder;

/// Sequences of equal length with their cache.
#[derive(Debug)]
pub(super) struct Sequences<'a> {
    decoder: &'a Decoder,
    shape: KvShape,
    cache: KvCache,
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
    /// Makes room for `batch` sequences of at most `tokens` tokens, of which at most `generate` are rewound.
    pub(super) fn new(decoder: &'a Decoder, batch: u32, tokens: u32, generate: u32) -> Sequences<'a> {
        let shape = KvShape::of(decoder.config());
        // Blocks that a window has passed are kept while tokens are generated: the next repetition starts over.
        let step_tokens = STEP_TOKENS_MAX.max(generate);
        let cache = KvCache::for_many(shape.clone(), batch, tokens, step_tokens);
        Sequences { decoder, shape, cache, blocks: (0..batch).map(|_| Blocks::default()).collect() }
    }

    /// Gives the bytes of the cache.
    pub(super) fn cache_bytes(&self) -> u64 {
        self.cache.bytes()
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
            self.cache.release(&mut self.blocks[0]);
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
            self.reserve(sequence, depth + generate);
        }
        let mut decoded = Decoded { tokens_per_second: Vec::new(), weight_bytes: 0, kv_bytes: 0 };
        for repetition in 0..=repetitions {
            let (started, read_before) = (Instant::now(), self.decoder.cpu().bytes_read());
            self.generate(depth, generate)?;
            if repetition == 0 {
                continue;
            }
            let tokens = f64::from(generate) * self.blocks.len() as f64;
            decoded.tokens_per_second.push(tokens / started.elapsed().as_secs_f64());
            decoded.weight_bytes += self.decoder.cpu().bytes_read() - read_before;
            let of_sequence: u64 = (depth..depth + generate).map(|position| self.shape.read_bytes(position)).sum();
            decoded.kv_bytes += of_sequence * self.blocks.len() as u64;
        }
        Ok(decoded)
    }

    /// Computes a made-up prompt for an empty sequence, in steps as large as served ones.
    fn prefill(&mut self, sequence: usize, tokens: u32) -> Result<(), BenchError> {
        let mut start = 0;
        while start < tokens {
            let end = tokens.min(start.saturating_add(STEP_TOKENS_MAX));
            self.reserve(sequence, end);
            let rows = (start..end).map(|position| self.made_up(sequence, position)).collect::<Vec<_>>();
            let outputs = if end == tokens { vec![rows.len() - 1] } else { Vec::new() };
            self.forward(rows, outputs)?;
            self.cache.release_behind(&mut self.blocks[sequence], end);
            start = end;
        }
        Ok(())
    }

    /// Generates for all sequences at once.
    fn generate(&mut self, depth: u32, count: u32) -> Result<(), BenchError> {
        let mut rows: Vec<Row> = (0..self.blocks.len()).map(|sequence| self.made_up(sequence, depth)).collect();
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
        let batch = Batch { rows, blocks: self.blocks.iter().collect(), outputs };
        let logits = self.decoder.forward(&batch, &mut self.cache);
        if !logits.iter().all(|logit| logit.is_finite()) {
            return Err(BenchError::NotFinite);
        }
        Ok(logits.chunks_exact(self.decoder.config().vocab_size).map(most_likely).collect())
    }

    fn reserve(&mut self, sequence: usize, tokens: u32) {
        self.cache.reserve(&mut self.blocks[sequence], tokens).expect("the cache was made for all sequences");
    }

    /// Makes up a token that differs by place and sequence, by a multiplicative hash.
    fn made_up(&self, sequence: usize, position: u32) -> Row {
        const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
        let mixed = ((sequence as u64) << 32 | u64::from(position)).wrapping_add(1).wrapping_mul(GOLDEN);
        let token = (mixed >> 32) % self.decoder.config().vocab_size as u64;
        Row { sequence, position, token: token as u32 }
    }
}

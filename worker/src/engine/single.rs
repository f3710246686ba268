//! One sequence through the served decoder, without an engine: for `eval` and for tests.

use super::STEP_TOKENS_MAX;
use super::kv_cache::{Blocks, KvCache, KvShape};
use crate::model::batch::{Batch, Row};
use crate::model::decoder::Decoder;

/// A sequence with a cache of its own.
#[derive(Debug)]
pub struct Single<'a> {
    decoder: &'a Decoder,
    cache: KvCache,
    blocks: Blocks,
    computed: u32,
}

impl<'a> Single<'a> {
    /// Makes an empty sequence with room for `tokens_max` tokens.
    #[must_use]
    pub fn new(decoder: &'a Decoder, tokens_max: u32) -> Single<'a> {
        let cache = KvCache::for_one(KvShape::of(decoder.config()), tokens_max, STEP_TOKENS_MAX);
        Single { decoder, cache, blocks: Blocks::default(), computed: 0 }
    }

    /// Computes tokens behind those that were fed before, as many in a step as are served in one, and gives the logits of
    /// each.
    ///
    /// Shapes: -> [tokens, vocabulary].
    ///
    /// # Panics
    /// When the tokens exceed the room or the vocabulary.
    pub fn feed(&mut self, tokens: &[u32]) -> Vec<f32> {
        let mut logits = Vec::with_capacity(tokens.len() * self.decoder.config().vocab_size);
        for chunk in tokens.chunks(STEP_TOKENS_MAX as usize) {
            let end = self.computed + chunk.len() as u32;
            self.cache.reserve(&mut self.blocks, end).expect("the room was made for all tokens");
            let rows = (self.computed..end).zip(chunk);
            let rows = rows.map(|(position, token)| Row { sequence: 0, position, token: *token }).collect();
            let batch = Batch { rows, blocks: vec![&self.blocks], outputs: (0..chunk.len()).collect() };
            logits.extend(self.decoder.forward(&batch, &mut self.cache));
            self.computed = end;
            self.cache.release_behind(&mut self.blocks, end);
        }
        logits
    }
}

//! Rounded activations of many tokens as tiles of AVX-512 meet them: a few tokens side by side.
//!
//! Invariant: a group's words are those of its blocks in ascending order; of each block first its quads (four bytes of each
//! token, those that meet high nibbles before those that meet low ones), then its scales, then its corrections.

use super::lines::{Coded, SEGMENT, Token};
use super::pool::Pool;

/// Tokens of a group, at most: with two tiles their sums fill the registers.
pub(super) const GROUP: usize = 6;

/// Where behind the quads of a block its scales and corrections stand.
pub(super) const SCALES: usize = 0;
pub(super) const CORRECTIONS: usize = 1;

/// Groups of one size, but for the last one.
#[derive(Debug, Default)]
pub(super) struct Groups {
    words: Vec<i32>,
    /// Words of a token.
    token_words: usize,
    /// Tokens of a group.
    tokens: usize,
}

/// Some tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct Group<'a> {
    /// The first of them.
    pub(super) first: usize,
    pub(super) tokens: usize,
    /// Shapes: [blocks, quads + 2, tokens].
    pub(super) words: &'a [i32],
}

impl Groups {
    /// Takes the activations of a product's tokens.
    pub(super) fn fill(&mut self, pool: &Pool, coded: &Coded<'_>, tokens: &[Token]) {
        let part = SEGMENT / 4 / coded.kind.blocks();
        self.token_words = coded.blocks() * (part + 2);
        self.tokens = tokens.len().div_ceil(tokens.len().div_ceil(GROUP));
        self.words.resize(tokens.len() * self.token_words, 0);
        let group = self.tokens;
        pool.for_each_chunk(&mut self.words, group * self.token_words, |index, words| {
            let tokens = &tokens[index * group..tokens.len().min((index + 1) * group)];
            let count = tokens.len();
            for (place, token) in tokens.iter().enumerate() {
                for (block, words) in words.chunks_exact_mut((part + 2) * count).enumerate() {
                    let (segment, half) = (block / coded.kind.blocks(), block % coded.kind.blocks());
                    let quads = token.lines[segment].0.as_chunks::<4>().0;
                    // Half of a block's quads meet high nibbles, and stand in the first half of the line.
                    let (high, low) = quads.split_at(quads.len() / 2);
                    let own = half * part / 2..(half + 1) * part / 2;
                    let quads = high[own.clone()].iter().chain(&low[own]);
                    let words = words[place..].iter_mut().step_by(count);
                    let rest = [token.scales[block].to_bits().cast_signed(), token.corrections[block]];
                    let values = quads.map(|four| i32::from_le_bytes(four.map(i8::cast_unsigned))).chain(rest);
                    words.zip(values).for_each(|(word, value)| *word = value);
                }
            }
        });
    }

    /// Gives the groups in ascending order.
    pub(super) fn iter(&self) -> impl Iterator<Item = Group<'_>> {
        let words = self.words.chunks(self.tokens * self.token_words);
        words.enumerate().map(|(index, words)| Group {
            first: index * self.tokens,
            tokens: words.len() / self.token_words,
            words,
        })
    }
}

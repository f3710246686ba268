//! `eval --perplexity`: how well a model foresees a text.
//!
//! Owns: windows, the surprise of each token, and its spread. A window is a sequence of its own that begins with the
//! tokenizer's first token where it has one; a token is counted where the window holds one before it. The surprise of a token
//! is the negative logarithm of its probability, in nats; perplexity is the exponential of the mean surprise.
//! The spread is the standard error of the mean as if tokens were independent, carried over to the perplexity.

use std::io::Write;
use std::path::Path;

use serde::Deserialize;

use super::{EvalArgs, EvalError, INPUT_BYTES_MAX, check_finite, check_vocabulary};
use crate::checkpoint::read_limited;
use crate::model::config::Config;
use crate::text::tokenizer::Tokenizer;

/// Tokens whose logits are held at once.
const STEP_TOKENS: usize = 128;

#[derive(Deserialize)]
struct Ids {
    input_ids: Vec<u32>,
}

/// Sums over tokens, in their order.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Surprise {
    /// Tokens that were foreseen.
    pub tokens: u64,
    sum: f64,
    squares: f64,
}

impl Surprise {
    fn add(&mut self, nats: f64) {
        self.tokens += 1;
        self.sum += nats;
        self.squares += nats * nats;
    }

    /// Gives the mean surprise. Units: nats for each token.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.sum / self.tokens as f64
    }

    /// Gives the standard error of the mean; 0 for a single token.
    #[must_use]
    pub fn standard_error(&self) -> f64 {
        let count = self.tokens as f64;
        let variance = (self.squares - self.sum * self.mean()).max(0.0) / (count - 1.0).max(1.0);
        (variance / count).sqrt()
    }

    /// Gives the perplexity and its standard error.
    #[must_use]
    pub fn perplexity(&self) -> (f64, f64) {
        let perplexity = self.mean().exp();
        (perplexity, perplexity * self.standard_error())
    }
}

/// A text as tokens, and what every window begins with.
#[derive(Clone, Debug)]
pub(super) struct Text {
    tokens: Vec<u32>,
    prefix: Vec<u32>,
}

impl Text {
    /// Reads `{"input_ids": [...]}` from a file whose name ends in .json, and text from any other. In a text the names of
    /// special tokens are those tokens, for the file is the measuring person's own.
    ///
    /// # Errors
    /// `Checkpoint` for a file that cannot be read; `Input`, `NotText`, `NoTokens`, `NotInVocabulary`; `Load` for a tokenizer
    /// that cannot be used.
    pub(super) fn read(file: &Path, model: &Path, config: &Config) -> Result<Text, EvalError> {
        let bytes = read_limited(file, INPUT_BYTES_MAX)?;
        let (tokens, prefix) = if file.extension().is_some_and(|extension| extension == "json") {
            let ids: Result<Ids, _> = serde_json::from_slice(&bytes);
            (ids.map_err(|source| EvalError::Input { file: file.to_owned(), source })?.input_ids, Vec::new())
        } else {
            let text = String::from_utf8(bytes).map_err(|_| EvalError::NotText { file: file.to_owned() })?;
            let tokenizer = Tokenizer::open(model).map_err(crate::loader::LoadError::from)?;
            (encode(&tokenizer, &text)?, tokenizer.prefix().to_vec())
        };
        if tokens.len() + prefix.len() < 2 {
            return Err(EvalError::TooFewTokens { file: file.to_owned(), tokens: tokens.len() });
        }
        check_vocabulary(file, &tokens, config.vocab_size)?;
        Ok(Text { tokens, prefix })
    }

    /// Cuts the text into windows of at most `window` tokens.
    fn windows(&self, window: usize) -> impl Iterator<Item = Vec<u32>> {
        let own = window.saturating_sub(self.prefix.len()).max(1);
        self.tokens.chunks(own).map(|chunk| [&self.prefix, chunk].concat())
    }
}

/// Encodes text with the names of special tokens as those tokens; the longest name counts where several begin.
fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, EvalError> {
    let (mut tokens, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let found = tokenizer.structural().iter().filter_map(|special| Some((rest.find(&special.content)?, special)));
        let first = found.min_by_key(|(at, special)| (*at, std::cmp::Reverse(special.content.len())));
        let ordinary = first.map_or(rest, |(at, _)| &rest[..at]);
        tokens.extend(tokenizer.encode_ordinary(ordinary).map_err(crate::loader::LoadError::from)?);
        rest = &rest[ordinary.len()..];
        if let Some((_, special)) = first {
            tokens.push(special.id);
            rest = &rest[special.content.len()..];
        }
    }
    Ok(tokens)
}

/// Measures a text with a decoder: `begin` starts a sequence, `feed` gives the logits behind each of some more tokens.
///
/// # Errors
/// Those of the decoder, and `NotFinite`.
pub(super) fn measure<D>(
    text: &Text,
    (window, vocab_size): (usize, usize),
    decoder: &mut D,
    begin: impl Fn(&mut D),
    feed: impl Fn(&mut D, &[u32]) -> Result<Vec<f32>, EvalError>,
) -> Result<Surprise, EvalError> {
    let mut surprise = Surprise::default();
    for tokens in text.windows(window) {
        begin(decoder);
        let mut behind = tokens.iter().skip(1);
        // Nothing is asked of the last token.
        for (index, step) in tokens[..tokens.len() - 1].chunks(STEP_TOKENS).enumerate() {
            let logits = feed(decoder, step)?;
            check_finite(&logits, vocab_size, index * STEP_TOKENS)?;
            for (logits, next) in logits.chunks_exact(vocab_size).zip(&mut behind) {
                surprise.add(nats(logits, *next));
            }
        }
    }
    Ok(surprise)
}

/// Computes the surprise at a token.
fn nats(logits: &[f32], token: u32) -> f64 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
    powers.ln() - f64::from(logits[token as usize] - largest)
}

/// Tells what was measured.
///
/// # Errors
/// What `out` says.
pub(super) fn report(surprise: &Surprise, args: &EvalArgs, out: &mut dyn Write) -> std::io::Result<()> {
    let (perplexity, spread) = surprise.perplexity();
    writeln!(out, "tokens      {}, in windows of {}", surprise.tokens, args.window)?;
    writeln!(out, "surprise    {:.5} ± {:.5} nats for each token", surprise.mean(), surprise.standard_error())?;
    writeln!(out, "perplexity  {perplexity:.4} ± {spread:.4}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decoder_that_knows_nothing_has_the_vocabulary_as_perplexity() {
        let text = Text { tokens: (0..10).collect(), prefix: vec![3] };
        let feed = |starts: &mut Vec<usize>, tokens: &[u32]| {
            *starts.last_mut().expect("a sequence was begun") += tokens.len();
            Ok(vec![0.5; 16 * tokens.len()])
        };
        let mut fed = Vec::new();
        let surprise = measure(&text, (5, 16), &mut fed, |fed: &mut Vec<usize>| fed.push(0), feed).expect("finite");
        // Windows of 1 + 4, 1 + 4 and 1 + 2 tokens.
        assert_eq!((surprise.tokens, fed), (10, vec![4, 4, 2]));
        let (perplexity, spread) = surprise.perplexity();
        assert!((perplexity - 16.0).abs() < 1e-9, "{perplexity}");
        assert!(spread < 1e-6, "{spread}");
    }

    #[test]
    fn the_spread_is_that_of_the_mean() {
        let mut surprise = Surprise::default();
        [1.0, 2.0, 3.0, 4.0].into_iter().for_each(|nats| surprise.add(nats));
        assert!((surprise.mean() - 2.5).abs() < 1e-12);
        // The variance of 1, 2, 3, 4 is 5 / 3.
        assert!((surprise.standard_error() - (5.0f64 / 12.0).sqrt()).abs() < 1e-12);
    }

    #[test]
    fn the_surprise_at_a_likely_token_is_small() {
        assert!(nats(&[20.0, 0.0, 0.0], 0) < 1e-8);
        assert!((nats(&[20.0, 0.0, 0.0], 1) - 20.0).abs() < 1e-6);
    }
}

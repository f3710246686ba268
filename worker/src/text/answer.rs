//! An answer while it grows: tokens in, pieces for the client out.
//!
//! Owns: how decoding, the conversation format and stop strings work together. Invariants: a stop string matches in content
//! only; behind it nothing more comes out; the pieces, and which tokens they list, are a function of the tokens, so that
//! pushing the same tokens to a new `Answer` restores its state.

use std::sync::Arc;

use bulkhead_shared::message::{Piece, TokenRun, TokenText};

use crate::text::chat::calls::CallReader;
use crate::text::detokenizer::Detokenizer;
use crate::text::error::TextError;
use crate::text::harmony::Markers;
use crate::text::harmony::parse::{Ending, Parser};
use crate::text::listing::Listing;
use crate::text::stop::StopMatcher;
use crate::text::tokenizer::Tokenizer;

/// The form of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnswerKind {
    /// Messages in the harmony format.
    Harmony,
    /// One message, behind a prompt by a template: everything is content, but for tool calls.
    Message(Calls),
    /// The continuation of a text: everything is content, and special tokens stand for no text.
    Plain,
}

/// How a message may call tools.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Calls {
    /// It may not.
    None,
    /// These, as Llama 3 does.
    Llama(Vec<String>),
}

/// Why no more tokens come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AnswerEnd {
    /// The last token was one of the model's end tokens.
    Eos,
    /// A stop string matched.
    StopString,
    /// The token limit or the end of the context: an unfinished tool call is dropped.
    Length,
}

/// What one token brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pushed {
    /// What the client gets now, in order; none of them is empty.
    pub pieces: Vec<Piece>,
    /// What becomes of the listable tokens so far, those of before included.
    pub runs: Vec<TokenRun>,
    /// The token is in the content, or may come to be.
    pub is_listable: bool,
    /// A stop string has matched: the answer is over.
    pub stopped: bool,
    /// The token counts as reasoning.
    pub is_reasoning: bool,
}

/// What the end of an answer brought.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Finished {
    /// What was held back, in order; none of them is empty.
    pub pieces: Vec<Piece>,
    /// What becomes of the listable tokens that waited for it.
    pub runs: Vec<TokenRun>,
}

/// One answer.
#[derive(Clone, Debug)]
pub struct Answer {
    tokenizer: Arc<Tokenizer>,
    stop: StopMatcher,
    form: Form,
    /// Bytes of content that have come out.
    content_bytes: usize,
}

#[derive(Clone, Debug)]
enum Form {
    Harmony(Box<Parser>),
    Plain(Plain),
}

impl Form {
    fn listing(&mut self) -> &mut Listing {
        match self {
            Form::Harmony(parser) => parser.listing(),
            Form::Plain(plain) => &mut plain.listing,
        }
    }
}

/// Text that is content, or perhaps a tool call.
#[derive(Clone, Debug, Default)]
struct Plain {
    text: Detokenizer,
    /// Whether the next text begins with a space that is the tokenizer's.
    skips_space: bool,
    calls: Option<CallReader>,
    listing: Listing,
}

impl Plain {
    fn push(&mut self, bytes: &[u8]) -> String {
        self.listing.push(bytes);
        let (mut text, mut own) = self.text.push_from(bytes);
        if self.skips_space && !text.is_empty() {
            self.skips_space = false;
            if text.starts_with(' ') {
                text.remove(0);
                own = own.saturating_sub(1);
                if text.is_empty() {
                    self.listing.discard();
                }
            }
        }
        if !text.is_empty() {
            self.listing.decoded(0, own);
            self.listing.place(text.len());
        }
        match &mut self.calls {
            Some(calls) => calls.push(text),
            None => text,
        }
    }

    fn finish(&mut self, is_whole: bool) -> Vec<Piece> {
        let rest = self.text.finish().map(String::from).unwrap_or_default();
        if !rest.is_empty() {
            self.listing.decoded(0, 0);
            self.listing.place(rest.len());
        }
        match &mut self.calls {
            Some(calls) => {
                let text = Piece::Content(calls.push(rest));
                [text].into_iter().chain(calls.finish(is_whole)).collect()
            }
            None => vec![Piece::Content(rest)],
        }
    }
}

impl Answer {
    /// Starts an answer behind its prompt.
    ///
    /// # Errors
    /// `NoHarmony` when the form is harmony and the tokenizer lacks its tokens.
    pub fn new(kind: AnswerKind, stop: Vec<String>, tokenizer: Arc<Tokenizer>) -> Result<Answer, TextError> {
        let form = match kind {
            AnswerKind::Harmony => Form::Harmony(Box::new(Parser::new(Markers::of(&tokenizer)?))),
            AnswerKind::Message(calls) => Form::Plain(Plain {
                text: Detokenizer::default(),
                skips_space: tokenizer.strips_first_space(),
                calls: match calls {
                    Calls::None => None,
                    Calls::Llama(names) => Some(CallReader::new(names)),
                },
                listing: Listing::default(),
            }),
            AnswerKind::Plain => Form::Plain(Plain::default()),
        };
        Ok(Answer { tokenizer, stop: StopMatcher::new(stop), form, content_bytes: 0 })
    }

    /// Takes the next token, the end token included. After a stop string has matched, nothing comes out any more.
    pub fn push(&mut self, token: u32) -> Pushed {
        if self.stop.has_stopped() {
            return Pushed { stopped: true, ..Pushed::default() };
        }
        let bytes = self.tokenizer.token_bytes(token);
        let before = self.form.listing().pushed();
        let (pieces, is_reasoning) = match &mut self.form {
            Form::Harmony(parser) => {
                let parsed = parser.push(token, bytes);
                (parsed.pieces, parsed.is_reasoning)
            }
            Form::Plain(text) => (vec![Piece::Content(text.push(bytes.unwrap_or_default()))], false),
        };
        let pieces = self.until_stop(pieces);
        Pushed {
            runs: self.release(&pieces),
            pieces,
            is_listable: self.form.listing().pushed() > before,
            stopped: self.stop.has_stopped(),
            is_reasoning,
        }
    }

    /// Ends the answer and gives what was held back. Called once, after the last token.
    pub fn finish(&mut self, end: AnswerEnd) -> Finished {
        let ending = match end {
            AnswerEnd::Eos => Ending::Complete,
            AnswerEnd::StopString | AnswerEnd::Length => Ending::Cut,
        };
        let pieces = match &mut self.form {
            Form::Harmony(parser) => parser.finish(ending),
            Form::Plain(plain) => plain.finish(ending == Ending::Complete),
        };
        let mut pieces = self.until_stop(pieces);
        if !self.stop.has_stopped() {
            let held = self.stop.finish();
            pieces.extend((!held.is_empty()).then_some(Piece::Content(held)));
        }
        Finished { runs: self.release(&pieces), pieces }
    }

    /// Gives what a token stands for, for people.
    #[must_use]
    pub fn token_text(&self, token: u32) -> TokenText {
        self.tokenizer.token_text(token)
    }

    /// Says whether the answer calls tools, by what has come out so far.
    #[must_use]
    pub fn has_tool_calls(&self) -> bool {
        match &self.form {
            Form::Harmony(parser) => parser.calls() > 0,
            Form::Plain(plain) => plain.calls.as_ref().is_some_and(|calls| calls.calls() > 0),
        }
    }

    /// Notes what has come out, and gives the tokens that are certain by that.
    fn release(&mut self, pieces: &[Piece]) -> Vec<TokenRun> {
        let content = pieces.iter().map(|piece| match piece {
            Piece::Content(text) => text.len(),
            Piece::Reasoning(_) | Piece::ToolCall { .. } => 0,
        });
        self.content_bytes += content.sum::<usize>();
        self.form.listing().release(self.content_bytes)
    }

    /// Passes content through the stop strings, and drops everything behind a match.
    fn until_stop(&mut self, pieces: Vec<Piece>) -> Vec<Piece> {
        let mut kept = Vec::with_capacity(pieces.len());
        for piece in pieces {
            if self.stop.has_stopped() {
                break;
            }
            match piece {
                Piece::Content(text) => {
                    let text = self.stop.push(&text);
                    kept.extend((!text.is_empty()).then_some(Piece::Content(text)));
                }
                Piece::Reasoning(_) | Piece::ToolCall { .. } => kept.push(piece),
            }
        }
        kept
    }
}

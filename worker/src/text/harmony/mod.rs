//! Harmony, the conversation format of gpt-oss: messages with a role, a channel and sometimes a recipient, between
//! structural tokens.
//!
//! Owns: which tokens are structural, rendering a conversation, reading an answer. Invariant: structural tokens are
//! written and recognised by id, never by how they are spelled.
//!
//! Source: openai-harmony 0.0.8.

mod header;
pub mod parse;
pub mod render;
mod schema;

use crate::text::error::TextError;
use crate::text::tokenizer::Tokenizer;

/// The ids of a tokenizer's structural tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Markers {
    /// `<|start|>` opens the header of a message.
    pub start: u32,
    /// `<|message|>` ends the header, the text follows.
    pub message: u32,
    /// `<|channel|>` stands before the channel's name in a header.
    pub channel: u32,
    /// `<|constrain|>` stands before the format of the text in a header.
    pub constrain: u32,
    /// `<|end|>` ends a message.
    pub end: u32,
    /// `<|return|>` ends a message and the turn.
    pub return_: u32,
    /// `<|call|>` ends a message that calls a tool, and the turn.
    pub call: u32,
    /// `<|endoftext|>` ends everything. Some tokenizers have none.
    pub end_of_text: Option<u32>,
}

/// What a structural token does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Marker {
    Start,
    Message,
    Channel,
    Constrain,
    /// Any of the tokens that end a message.
    End,
}

impl Markers {
    /// Finds the structural tokens of a tokenizer.
    ///
    /// # Errors
    /// `NoHarmony` with the first token that is missing.
    pub fn of(tokenizer: &Tokenizer) -> Result<Markers, TextError> {
        let id = |token: &'static str| tokenizer.special_id(token).ok_or(TextError::NoHarmony { token });
        Ok(Markers {
            start: id("<|start|>")?,
            message: id("<|message|>")?,
            channel: id("<|channel|>")?,
            constrain: id("<|constrain|>")?,
            end: id("<|end|>")?,
            return_: id("<|return|>")?,
            call: id("<|call|>")?,
            end_of_text: tokenizer.special_id("<|endoftext|>"),
        })
    }

    fn marker(&self, token: u32) -> Option<Marker> {
        match token {
            _ if token == self.start => Some(Marker::Start),
            _ if token == self.message => Some(Marker::Message),
            _ if token == self.channel => Some(Marker::Channel),
            _ if token == self.constrain => Some(Marker::Constrain),
            _ if [self.end, self.return_, self.call].contains(&token) || Some(token) == self.end_of_text => {
                Some(Marker::End)
            }
            _ => None,
        }
    }
}

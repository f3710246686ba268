//! The form of a model's conversations: harmony for gpt-oss, the model's own Jinja template for others.
//!
//! Owns: which of them a model has, and what a request is told where it has none. A model without a template, or with one
//! that cannot be compiled, still continues texts.
//!
//! `template` renders, `guard` keeps what clients write apart from structure, `values` makes a request into a template's
//! variables, `python` is what templates expect of their surroundings, `calls` reads tool calls out of an answer.

pub mod calls;
mod guard;
mod python;
pub mod template;
mod values;

use std::path::Path;

use bulkhead_shared::generate::Chat;

use self::template::ChatTemplate;
use crate::text::answer::{AnswerKind, Calls};
use crate::text::error::TextError;
use crate::text::harmony;
use crate::text::tokenizer::Tokenizer;

/// Where a model's way of writing conversations is laid down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChatSource {
    /// In the architecture: harmony.
    Harmony,
    /// In the model folder: a template, if it has one.
    Folder,
}

/// How a model's conversations are written.
#[derive(Debug)]
pub enum ChatFormat {
    /// In harmony.
    Harmony,
    /// By the template of the model folder.
    Template(Box<ChatTemplate>),
    /// By a template that cannot be used.
    Broken {
        /// Why, for people.
        reason: String,
    },
    /// Not at all: the folder has no template.
    None,
}

impl ChatFormat {
    /// Finds how the model of a folder writes conversations.
    ///
    /// # Errors
    /// `Read`, `FileTooLarge`, `ConfigSyntax` for a file that is there and cannot be read.
    pub fn open(source: ChatSource, dir: &Path, tokenizer: &Tokenizer) -> Result<ChatFormat, TextError> {
        match source {
            ChatSource::Harmony => Ok(ChatFormat::Harmony),
            ChatSource::Folder => match ChatTemplate::open(dir, tokenizer) {
                Ok(Some(template)) => Ok(ChatFormat::Template(Box::new(template))),
                Ok(None) => Ok(ChatFormat::None),
                Err(error @ TextError::TemplateUnusable { .. }) => Ok(ChatFormat::Broken { reason: error.to_string() }),
                Err(error) => Err(error),
            },
        }
    }

    /// Renders a conversation, and says in which form its answer comes.
    ///
    /// # Errors
    /// `NoTemplate` and `TemplateUnusable` for a model without one; those of `harmony::render` and `ChatTemplate::tokens`.
    pub fn tokens(&self, tokenizer: &Tokenizer, chat: &Chat) -> Result<(Vec<u32>, AnswerKind), TextError> {
        match self {
            ChatFormat::Harmony => Ok((harmony::render::render(tokenizer, chat)?, AnswerKind::Harmony)),
            ChatFormat::Template(template) => {
                let calls = match chat.tools.is_empty() {
                    true => Calls::None,
                    false => Calls::Llama(chat.tools.iter().map(|tool| tool.name.clone()).collect()),
                };
                Ok((template.tokens(tokenizer, chat)?, AnswerKind::Message(calls)))
            }
            ChatFormat::Broken { reason } => Err(TextError::TemplateUnusable { reason: reason.clone() }),
            ChatFormat::None => Err(TextError::NoTemplate),
        }
    }
}

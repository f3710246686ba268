//! OpenAI's answers as JSON: objects of a whole answer and chunks of a stream.

use bulkhead_shared::message::{FinishReason, Logprobs, Piece, Usage};
use serde::Serialize;
use serde_json::{Value, json};

use super::logprobs::{ChatTokens, Offset, TextTokens};
use crate::journal::Part;
use crate::random;

/// Which of the two kinds of answers is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Chat,
    Text,
}

/// What is told of the tokens of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Detail {
    /// Nothing.
    Text,
    /// Their log-probabilities.
    Tokens,
}

/// What every object of one answer repeats.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    form: Form,
    detail: Detail,
    id: String,
    created: u64,
    model: String,
}

/// An answer, or a chunk of one.
#[derive(Debug, Serialize)]
pub(crate) struct Object<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice>,
    /// The outer one says whether the key is there.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Value>>,
}

#[derive(Debug, Serialize)]
struct Choice {
    index: u32,
    #[serde(flatten)]
    body: Body,
    logprobs: Option<Told>,
    finish_reason: Option<&'static str>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "lowercase")]
enum Body {
    Message(Value),
    Delta(Value),
    Text(String),
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Told {
    Chat(ChatTokens),
    Text(TextTokens),
}

impl Object<'_> {
    /// Says that usage comes later.
    pub(crate) fn without_usage(self) -> Self {
        Object { usage: Some(None), ..self }
    }
}

impl Head {
    /// Names a new answer. Units: `created` in seconds since 1970.
    pub(crate) fn new((form, detail): (Form, Detail), created: u64, model: &str) -> Head {
        let prefix = match form {
            Form::Chat => "chatcmpl-",
            Form::Text => "cmpl-",
        };
        Head { form, detail, id: random::id(prefix), created, model: model.to_owned() }
    }

    /// Gives a whole answer.
    pub(crate) fn whole(&self, parts: Vec<Part>, reason: FinishReason, usage: Usage) -> Object<'_> {
        let (mut pieces, mut logprobs) = (Vec::with_capacity(parts.len()), Vec::new());
        for part in parts {
            pieces.push(part.piece);
            logprobs.extend(part.logprobs);
        }
        let (kind, body) = match self.form {
            Form::Chat => ("chat.completion", Body::Message(message(pieces))),
            Form::Text => ("text_completion", Body::Text(plain_text(pieces))),
        };
        let logprobs = self.told(logprobs, &mut Offset::default());
        let choice = Choice { index: 0, body, logprobs, finish_reason: Some(finish_word(reason)) };
        Object { usage: Some(Some(usage_object(usage))), ..self.object(kind, vec![choice]) }
    }

    /// Gives the chunk that opens a stream, where the form has one.
    pub(crate) fn opening(&self) -> Option<Object<'_>> {
        match self.form {
            Form::Chat => Some(self.chunk(Body::Delta(json!({"role": "assistant", "content": ""})), None, None)),
            Form::Text => None,
        }
    }

    /// Gives the chunk of one part, which begins behind the tokens that `offset` has passed.
    pub(crate) fn part(&self, part: Part, offset: &mut Offset) -> Object<'_> {
        let is_content = matches!(part.piece, Piece::Content(_));
        let logprobs = if is_content { self.told(part.logprobs, offset) } else { None };
        let body = match self.form {
            Form::Chat => Body::Delta(delta(part.piece)),
            Form::Text => Body::Text(plain_text(vec![part.piece])),
        };
        self.chunk(body, logprobs, None)
    }

    /// Gives the chunk that tells why a stream ends.
    pub(crate) fn closing(&self, reason: FinishReason) -> Object<'_> {
        let body = match self.form {
            Form::Chat => Body::Delta(json!({})),
            Form::Text => Body::Text(String::new()),
        };
        self.chunk(body, None, Some(reason))
    }

    /// Gives the chunk that tells what was used.
    pub(crate) fn usage(&self, usage: Usage) -> Object<'_> {
        Object { usage: Some(Some(usage_object(usage))), ..self.object(self.chunk_kind(), Vec::new()) }
    }

    fn told(&self, logprobs: Vec<Logprobs>, offset: &mut Offset) -> Option<Told> {
        match (self.detail, self.form) {
            (Detail::Text, _) => None,
            (Detail::Tokens, Form::Chat) => Some(Told::Chat(ChatTokens::new(logprobs))),
            (Detail::Tokens, Form::Text) => Some(Told::Text(TextTokens::new(logprobs, offset))),
        }
    }

    fn chunk(&self, body: Body, logprobs: Option<Told>, reason: Option<FinishReason>) -> Object<'_> {
        let choice = Choice { index: 0, body, logprobs, finish_reason: reason.map(finish_word) };
        self.object(self.chunk_kind(), vec![choice])
    }

    fn chunk_kind(&self) -> &'static str {
        match self.form {
            Form::Chat => "chat.completion.chunk",
            Form::Text => "text_completion",
        }
    }

    fn object(&self, object: &'static str, choices: Vec<Choice>) -> Object<'_> {
        Object { id: &self.id, object, created: self.created, model: &self.model, choices, usage: None }
    }
}

/// Gives the message of a whole answer. `content` is null when there is nothing but tool calls.
fn message(pieces: Vec<Piece>) -> Value {
    let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
    for piece in pieces {
        match piece {
            Piece::Content(text) => content.push_str(&text),
            Piece::Reasoning(text) => reasoning.push_str(&text),
            Piece::ToolCall { name, arguments, .. } => calls.push(tool_call(&name, &arguments)),
        }
    }
    let is_call_only = content.is_empty() && !calls.is_empty();
    let content = if is_call_only { Value::Null } else { content.into() };
    let mut message = json!({"role": "assistant", "content": content, "refusal": null});
    if !reasoning.is_empty() {
        message["reasoning"] = reasoning.as_str().into();
        message["reasoning_content"] = reasoning.into();
    }
    if !calls.is_empty() {
        message["tool_calls"] = calls.into();
    }
    message
}

/// Gives the change that one piece makes to a message.
fn delta(piece: Piece) -> Value {
    match piece {
        Piece::Content(text) => json!({"content": text}),
        Piece::Reasoning(text) => json!({"reasoning": text, "reasoning_content": text}),
        Piece::ToolCall { index, name, arguments } => {
            let mut call = tool_call(&name, &arguments);
            call["index"] = index.into();
            json!({"tool_calls": [call]})
        }
    }
}

fn tool_call(name: &str, arguments: &str) -> Value {
    json!({"id": random::id("call_"), "type": "function", "function": {"name": name, "arguments": arguments}})
}

/// Joins the text of an answer that is no conversation; the link lets no tool calls into one.
fn plain_text(pieces: Vec<Piece>) -> String {
    let text = |piece| match piece {
        Piece::Content(text) | Piece::Reasoning(text) => text,
        Piece::ToolCall { .. } => String::new(),
    };
    pieces.into_iter().map(text).collect()
}

fn finish_word(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::ToolCalls => "tool_calls",
    }
}

fn usage_object(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": u64::from(usage.prompt_tokens) + u64::from(usage.completion_tokens),
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    })
}

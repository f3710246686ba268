//! OpenAI's answers as JSON: objects of a whole answer and chunks of a stream.

use bulkhead_shared::message::{FinishReason, Piece, Usage};
use serde_json::{Map, Value, json};

use crate::random;

/// Which of the two kinds of answers is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    Chat,
    Text,
}

/// What every object of one answer repeats.
#[derive(Clone, Debug)]
pub(crate) struct Head {
    form: Form,
    id: String,
    created: u64,
    model: String,
}

impl Head {
    /// Names a new answer. Units: `created` in seconds since 1970.
    pub(crate) fn new(form: Form, created: u64, model: &str) -> Head {
        let prefix = match form {
            Form::Chat => "chatcmpl-",
            Form::Text => "cmpl-",
        };
        Head { form, id: random::id(prefix), created, model: model.to_owned() }
    }

    /// Gives a whole answer.
    pub(crate) fn whole(&self, pieces: Vec<Piece>, reason: FinishReason, usage: Usage) -> Value {
        let mut choice = match self.form {
            Form::Chat => json!({"index": 0, "message": message(pieces)}),
            Form::Text => json!({"index": 0, "text": plain_text(pieces)}),
        };
        choice["logprobs"] = Value::Null;
        choice["finish_reason"] = finish_word(reason).into();
        let mut answer = self.object(match self.form {
            Form::Chat => "chat.completion",
            Form::Text => "text_completion",
        });
        answer.insert("choices".into(), json!([choice]));
        answer.insert("usage".into(), usage_object(usage));
        Value::Object(answer)
    }

    /// Gives the chunk that opens a stream, where the form has one.
    pub(crate) fn opening(&self) -> Option<Value> {
        match self.form {
            Form::Chat => Some(self.chunk(json!({"delta": {"role": "assistant", "content": ""}}), None)),
            Form::Text => None,
        }
    }

    /// Gives the chunk of one piece.
    pub(crate) fn piece(&self, piece: Piece) -> Value {
        let body = match self.form {
            Form::Chat => json!({"delta": delta(piece)}),
            Form::Text => json!({"text": plain_text(vec![piece])}),
        };
        self.chunk(body, None)
    }

    /// Gives the chunk that tells why a stream ends.
    pub(crate) fn closing(&self, reason: FinishReason) -> Value {
        let body = match self.form {
            Form::Chat => json!({"delta": {}}),
            Form::Text => json!({"text": ""}),
        };
        self.chunk(body, Some(reason))
    }

    /// Gives the chunk that tells what was used.
    pub(crate) fn usage(&self, usage: Usage) -> Value {
        let mut chunk = self.object(self.chunk_kind());
        chunk.insert("choices".into(), json!([]));
        chunk.insert("usage".into(), usage_object(usage));
        Value::Object(chunk)
    }

    fn chunk(&self, mut choice: Value, reason: Option<FinishReason>) -> Value {
        choice["index"] = 0.into();
        choice["logprobs"] = Value::Null;
        choice["finish_reason"] = reason.map(finish_word).into();
        let mut chunk = self.object(self.chunk_kind());
        chunk.insert("choices".into(), json!([choice]));
        Value::Object(chunk)
    }

    fn chunk_kind(&self) -> &'static str {
        match self.form {
            Form::Chat => "chat.completion.chunk",
            Form::Text => "text_completion",
        }
    }

    fn object(&self, kind: &str) -> Map<String, Value> {
        let mut object = Map::new();
        object.insert("id".into(), self.id.as_str().into());
        object.insert("object".into(), kind.into());
        object.insert("created".into(), self.created.into());
        object.insert("model".into(), self.model.as_str().into());
        object
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

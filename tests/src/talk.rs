//! Conversations with a server: requests as JSON, answers as a test wants to see them.

use std::io;

use serde_json::{Value, json};

use crate::client::{Answer, Events, WholeAnswer};
use crate::server::Server;

/// The path of chat completions.
pub const CHAT: &str = "/v1/chat/completions";

/// The path of text completions.
pub const COMPLETIONS: &str = "/v1/completions";

/// A question to the built-in model that it answers with more than a word.
pub const QUESTION: &str = "How do I check the health of the server?";

/// Makes a request of one user message that is answered with the most likely tokens.
#[must_use]
pub fn greedy(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 400})
}

/// Sets fields of a request.
///
/// # Panics
/// When either is no object.
#[must_use]
pub fn with(mut request: Value, fields: Value) -> Value {
    let (Value::Object(request_fields), Value::Object(fields)) = (&mut request, fields) else {
        panic!("requests and their fields are objects");
    };
    request_fields.extend(fields);
    request
}

/// A whole answer, from one object or put together from a stream.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reply {
    /// What the model said.
    pub content: String,
    /// What the model thought.
    pub reasoning: String,
    /// Its calls: name and arguments as text.
    pub calls: Vec<(String, String)>,
    /// What is told of the tokens of the content; empty where nothing was asked.
    pub logprobs: Vec<Value>,
    /// Why it ended.
    pub finish_reason: String,
    /// What it used; null where a stream was not asked for it.
    pub usage: Value,
    /// The first fault in mid-stream.
    pub error: Option<Value>,
}

impl Reply {
    /// Gives a number of the usage.
    ///
    /// # Panics
    /// When it is not there.
    #[must_use]
    pub fn tokens(&self, name: &str) -> u64 {
        self.usage[name].as_u64().unwrap_or_else(|| panic!("usage {} has no {name}", self.usage))
    }
}

impl Server {
    /// Sends a user message that may be answered or refused.
    ///
    /// # Panics
    /// When there is no whole answer.
    #[must_use]
    pub fn chat(&self, text: &str) -> WholeAnswer {
        let answer = self.post(CHAT, &json!({"messages": [{"role": "user", "content": text}]}));
        answer.read_whole().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    /// Asks for a chat answer as one object.
    ///
    /// # Panics
    /// When the answer is not a success.
    #[must_use]
    pub fn ask(&self, request: &Value) -> Reply {
        let answer = self.post(CHAT, request);
        let status = answer.status;
        let body = answer.json().expect("answers are JSON");
        assert_eq!(status, 200, "{request} was answered with {body}");
        whole(&body)
    }

    /// Asks for a chat answer as a stream, with usage, and reads it to the end.
    ///
    /// # Panics
    /// When the answer is no stream, or ends without `[DONE]` or an error.
    #[must_use]
    pub fn ask_stream(&self, request: &Value) -> Reply {
        let request = with(request.clone(), json!({"stream": true, "stream_options": {"include_usage": true}}));
        read_stream(self.open_stream(&request)).unwrap_or_else(|error| panic!("{request}: {error}"))
    }

    /// Sends a chat request with `stream` and gives its events.
    ///
    /// # Panics
    /// When the answer is no stream.
    #[must_use]
    pub fn open_stream(&self, request: &Value) -> Events {
        open(self.post(CHAT, &with(request.clone(), json!({"stream": true}))))
    }

    /// Expects a request to be refused and gives the status and the error object.
    ///
    /// # Panics
    /// When it is answered, or the refusal is not in OpenAI's shape.
    #[must_use]
    pub fn refused(&self, path: &str, request: &Value) -> (u16, Value) {
        let answer = self.post(path, request);
        let status = answer.status;
        let body = answer.json().expect("refusals are JSON");
        assert!(status >= 400, "{request} was answered with {body}");
        check_error(&body);
        (status, body["error"].clone())
    }
}

/// Checks that a body is OpenAI's error object.
///
/// # Panics
/// When it is not.
pub fn check_error(body: &Value) {
    let error = &body["error"];
    let is_text = |key: &str| error[key].as_str().is_some_and(|text| !text.is_empty());
    assert!(is_text("message") && is_text("type"), "not OpenAI's error object: {body}");
    assert!(error.get("param").is_some() && error.get("code").is_some(), "an error has param and code: {body}");
}

fn open(answer: Answer) -> Events {
    let status = answer.status;
    if status != 200 {
        panic!("status {status}: {}", answer.text().unwrap_or_default());
    }
    let kind = answer.headers.get("content-type").cloned().unwrap_or_default();
    assert!(kind.starts_with("text/event-stream"), "content type {kind:?}");
    answer.events()
}

/// Takes apart a whole chat answer.
///
/// # Panics
/// When it does not have the shape of one.
#[must_use]
pub fn whole(body: &Value) -> Reply {
    assert_eq!(body["object"], "chat.completion", "{body}");
    let choice = &body["choices"][0];
    let message = &choice["message"];
    assert_eq!(message["role"], "assistant", "{body}");
    let mut reply = Reply { usage: body["usage"].clone(), ..Reply::default() };
    append(&mut reply, message);
    reply.logprobs = tokens(&choice["logprobs"]);
    reply.finish_reason = choice["finish_reason"].as_str().expect("a whole answer says why it ended").to_owned();
    reply
}

/// Reads a chat stream to its end.
///
/// # Errors
/// When it ends without `[DONE]` or an error, or an event is no JSON.
pub fn read_stream(mut events: Events) -> io::Result<Reply> {
    let mut reply = Reply::default();
    while let Some(data) = events.next_data()? {
        if data == "[DONE]" {
            return Ok(reply);
        }
        let chunk: Value = serde_json::from_str(&data)?;
        if chunk.get("error").is_some() {
            check_error(&chunk);
            reply.error = Some(chunk["error"].clone());
            return Ok(reply);
        }
        take_chunk(&mut reply, &chunk);
    }
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the stream ended without [DONE]"))
}

/// Reads the events that are left, and whether `[DONE]` was the last.
///
/// # Panics
/// When the stream breaks, or an event is no JSON.
#[must_use]
pub fn read_events(mut events: Events) -> (Vec<Value>, bool) {
    let mut read = Vec::new();
    while let Some(data) = events.next_data().expect("a stream ends in order") {
        if data == "[DONE]" {
            return (read, true);
        }
        read.push(serde_json::from_str(&data).unwrap_or_else(|error| panic!("{error}: {data}")));
    }
    (read, false)
}

fn take_chunk(reply: &mut Reply, chunk: &Value) {
    assert_eq!(chunk["object"], "chat.completion.chunk", "{chunk}");
    if let Some(usage) = chunk.get("usage").filter(|usage| !usage.is_null()) {
        assert_eq!(chunk["choices"], json!([]), "usage comes with no choices: {chunk}");
        reply.usage = usage.clone();
    }
    let Some(choice) = chunk["choices"].get(0) else { return };
    assert!(reply.finish_reason.is_empty(), "nothing comes behind finish_reason: {chunk}");
    append(reply, &choice["delta"]);
    let told = tokens(&choice["logprobs"]);
    let content = choice["delta"]["content"].as_str().unwrap_or_default();
    assert!(told.is_empty() || !content.is_empty(), "tokens come with their content: {chunk}");
    reply.logprobs.extend(told);
    if let Some(reason) = choice["finish_reason"].as_str() {
        reply.finish_reason = reason.to_owned();
    }
}

/// Takes the tokens of a conversation's `logprobs`.
fn tokens(logprobs: &Value) -> Vec<Value> {
    if logprobs.is_null() {
        return Vec::new();
    }
    logprobs["content"].as_array().unwrap_or_else(|| panic!("no list of tokens: {logprobs}")).clone()
}

/// Puts the bytes of listed tokens together.
///
/// # Panics
/// When they are no text, or a token has no bytes.
#[must_use]
pub fn listed_text(tokens: &[Value]) -> String {
    let bytes = |token: &Value| token["bytes"].as_array().unwrap_or_else(|| panic!("no bytes: {token}")).clone();
    let byte = |byte: Value| byte.as_u64().and_then(|byte| u8::try_from(byte).ok()).expect("bytes are small numbers");
    String::from_utf8(tokens.iter().flat_map(bytes).map(byte).collect()).expect("they are text together")
}

/// Adds a message, or a part of one. The two names of reasoning must always agree.
fn append(reply: &mut Reply, message: &Value) {
    let text = |key: &str| message.get(key).and_then(Value::as_str).unwrap_or_default();
    assert_eq!(text("reasoning"), text("reasoning_content"), "{message}");
    reply.content.push_str(text("content"));
    reply.reasoning.push_str(text("reasoning"));
    for call in message.get("tool_calls").and_then(Value::as_array).into_iter().flatten() {
        assert_eq!(call["type"], "function", "{call}");
        assert!(call["id"].as_str().is_some_and(|id| id.starts_with("call_")), "{call}");
        let part = |key: &str| call["function"][key].as_str().expect("a call has a name and arguments").to_owned();
        reply.calls.push((part("name"), part("arguments")));
    }
}

//! A request as the variables of a template: messages and tools in OpenAI's form, every text of the client guarded.
//!
//! Roles are ours and not guarded: templates make structural tokens of them. `developer` becomes `system`, since models with
//! templates know no other word for it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use bulkhead_shared::generate::{Chat, Message, Tool, ToolCall};
use bulkhead_shared::limits::TOOL_SCHEMA_BYTES_MAX;
use minijinja::Value;
use minijinja::value::{Enumerator, Object, ObjectRepr};

use super::guard::Guard;
use crate::text::error::TextError;
use crate::text::json::Json;

/// A mapping that keeps its order. A key that a client wrote is told guarded, and found by how it was written too.
#[derive(Debug)]
pub(super) struct Record {
    keys: Vec<Value>,
    values: HashMap<String, Value>,
}

impl Record {
    /// Makes a mapping of our own keys; of equal ones the first counts.
    pub(super) fn of<K: Into<String>>(entries: impl IntoIterator<Item = (K, Value)>) -> Value {
        let mut record = Record { keys: Vec::new(), values: HashMap::new() };
        for (key, value) in entries {
            let key = key.into();
            record.insert(&key, key.as_str().into(), value);
        }
        Value::from_object(record)
    }

    /// Makes a mapping of what a client wrote; of equal keys the first one counts.
    fn guarded(entries: &[(String, Json)], guard: &Guard<'_>) -> Value {
        let mut record = Record { keys: Vec::new(), values: HashMap::new() };
        for (key, value) in entries {
            record.insert(key, guard.text(key), json_value(value, guard));
        }
        Value::from_object(record)
    }

    fn insert(&mut self, key: &str, shown: Cow<'_, str>, value: Value) {
        if self.values.contains_key(key) {
            return;
        }
        if shown != key {
            self.values.insert(shown.clone().into_owned(), value.clone());
        }
        self.values.insert(key.to_owned(), value);
        self.keys.push(Value::from(shown));
    }
}

impl Object for Record {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Map
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.values.get(key.as_str()?).cloned()
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Values(self.keys.clone())
    }
}

/// Gives the messages.
pub(super) fn messages(chat: &Chat, guard: &Guard<'_>) -> Value {
    chat.messages.iter().map(|message| value(message, guard)).collect()
}

fn value(message: &Message, guard: &Guard<'_>) -> Value {
    let text = |text: &str| Value::from(guard.text(text));
    let plain =
        |role: &'static str, content: &str| Record::of([("role", Value::from(role)), ("content", text(content))]);
    match message {
        Message::System { text } | Message::Developer { text } => plain("system", text),
        Message::User { text } => plain("user", text),
        Message::Assistant { reasoning, content, calls } => {
            let content = content.as_deref().unwrap_or_default();
            let mut fields = vec![("role", Value::from("assistant")), ("content", text(content))];
            fields.extend(reasoning.as_deref().map(|reasoning| ("reasoning_content", text(reasoning))));
            if !calls.is_empty() {
                fields.push(("tool_calls", calls.iter().map(|call| call_value(call, guard)).collect()));
            }
            Record::of(fields)
        }
        Message::Tool { name, text: content } => {
            Record::of([("role", Value::from("tool")), ("name", text(name)), ("content", text(content))])
        }
    }
}

/// The arguments of a call are a mapping, as templates expect; what is no JSON stays the text that it is.
fn call_value(call: &ToolCall, guard: &Guard<'_>) -> Value {
    let arguments = match serde_json::from_str::<Json>(&call.arguments) {
        Ok(json @ Json::Object(_)) => json_value(&json, guard),
        Ok(_) | Err(_) => Value::from(guard.text(&call.arguments)),
    };
    let function = Record::of([("name", Value::from(guard.text(&call.name))), ("arguments", arguments)]);
    Record::of([("type", Value::from("function")), ("function", function)])
}

/// Gives the tools, none for an empty list.
///
/// # Errors
/// `ToolSchema`, `ToolSchemaSyntax` and `ToolSchemaTooLong`.
pub(super) fn tools(tools: &[Tool], guard: &Guard<'_>) -> Result<Option<Value>, TextError> {
    if tools.is_empty() {
        return Ok(None);
    }
    let tool = |tool: &Tool| {
        let mut function = vec![("name", Value::from(guard.text(&tool.name)))];
        function.extend(tool.description.as_deref().map(|text| ("description", Value::from(guard.text(text)))));
        if let Some(parameters) = &tool.parameters {
            function.push(("parameters", json_value(&schema(&tool.name, parameters)?, guard)));
        }
        Ok(Record::of([("type", Value::from("function")), ("function", Record::of(function))]))
    };
    tools.iter().map(tool).collect::<Result<Vec<Value>, TextError>>().map(|tools| Some(tools.into_iter().collect()))
}

fn schema(tool: &str, text: &str) -> Result<Json, TextError> {
    let tool = || tool.to_owned();
    if text.len() > TOOL_SCHEMA_BYTES_MAX {
        return Err(TextError::ToolSchemaTooLong { tool: tool(), bytes: text.len(), max: TOOL_SCHEMA_BYTES_MAX });
    }
    match serde_json::from_str(text) {
        Ok(json @ Json::Object(_)) => Ok(json),
        Ok(other) => Err(TextError::ToolSchema { tool: tool(), found: Json::type_name(&other) }),
        Err(source) => Err(TextError::ToolSchemaSyntax { tool: tool(), source }),
    }
}

/// Recursion is bounded by the JSON reader's own limit.
fn json_value(json: &Json, guard: &Guard<'_>) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(value), _) => Value::from(value),
            (None, Some(value)) => Value::from(value),
            (None, None) => Value::from(number.as_f64().unwrap_or_default()),
        },
        Json::String(text) => Value::from(guard.text(text)),
        Json::Array(items) => items.iter().map(|item| json_value(item, guard)).collect(),
        Json::Object(entries) => Record::guarded(entries, guard),
    }
}

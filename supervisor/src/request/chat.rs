//! The conversation: messages, tools, and how they belong together.

use std::collections::{BTreeMap, BTreeSet};

use bulkhead_shared::generate::{Chat, Message, Tool, ToolCall};
use bulkhead_shared::limits::{
    MESSAGES_MAX, TOOL_NAME_BYTES_MAX, TOOL_SCHEMA_BYTES_MAX, TOOL_SCHEMA_DEPTH_MAX, TOOLS_MAX,
};
use serde_json::value::RawValue;

use super::fields::{Fields, invalid, items, unsupported};
use super::{RequestError, params};

/// Stands between the text parts of one message, as in vLLM and llama.cpp.
const PART_SEPARATOR: &str = "\n";

/// The names of the tools that were called, by the ids of the calls.
type Calls = BTreeMap<String, String>;

/// Takes everything that the worker renders into the prompt.
pub(super) fn conversation(fields: &mut Fields<'_>, date: String) -> Result<Chat, RequestError> {
    let messages = messages(fields)?;
    let offered = tools(fields)?;
    let tools = if may_call(fields)? { offered } else { Vec::new() };
    let effort = params::effort(fields)?;
    params::response_format(fields)?;
    Ok(Chat { messages, tools, effort, date })
}

fn messages(fields: &mut Fields<'_>) -> Result<Vec<Message>, RequestError> {
    let list = fields.list("messages")?.ok_or_else(|| RequestError::Missing { param: "messages".into() })?;
    match list.len() {
        0 => return Err(invalid("messages", "must hold at least one message")),
        count if count > MESSAGES_MAX => {
            return Err(invalid("messages", format!("holds {count} messages, at most {MESSAGES_MAX} are allowed")));
        }
        _ => {}
    }
    let mut calls = Calls::new();
    list.iter().enumerate().map(|(index, value)| message(&format!("messages[{index}]"), value, &mut calls)).collect()
}

fn message(path: &str, value: &RawValue, calls: &mut Calls) -> Result<Message, RequestError> {
    let mut fields = Fields::object(path, value)?;
    let role: String = fields.require("role", "must be a string")?;
    match role.as_str() {
        "system" => Ok(Message::System { text: required_text(&mut fields)? }),
        "developer" => Ok(Message::Developer { text: required_text(&mut fields)? }),
        "user" => Ok(Message::User { text: required_text(&mut fields)? }),
        "assistant" => assistant(&mut fields, calls),
        "tool" => {
            let id: String = fields.require("tool_call_id", "must be a string")?;
            let Some(name) = calls.get(&id) else {
                let reason = format!("names the call {id:?}, which no assistant message before it made");
                return Err(invalid(&fields.param("tool_call_id"), reason));
            };
            Ok(Message::Tool { name: name.clone(), text: required_text(&mut fields)? })
        }
        "function" => Err(unsupported(&fields.param("role"), "\"function\" is the old form; use \"tool\"")),
        other => {
            let reason = format!("must be system, developer, user, assistant or tool, not {other:?}");
            Err(invalid(&fields.param("role"), reason))
        }
    }
}

fn assistant(fields: &mut Fields<'_>, calls: &mut Calls) -> Result<Message, RequestError> {
    let reasoning = match fields.take::<String>("reasoning", "must be a string")? {
        Some(text) => Some(text),
        None => fields.take("reasoning_content", "must be a string")?,
    };
    let refusal = fields.take::<String>("refusal", "must be a string")?;
    let content = text(fields)?.or(refusal);
    for key in ["function_call", "audio"] {
        if fields.raw(key).is_some() {
            return Err(unsupported(&fields.param(key), "use content and tool_calls"));
        }
    }
    let called = tool_calls(fields, calls)?;
    if content.is_none() && called.is_empty() && reasoning.is_none() {
        return Err(RequestError::Missing { param: fields.param("content") });
    }
    Ok(Message::Assistant { reasoning: reasoning.filter(|text| !text.is_empty()), content, calls: called })
}

fn tool_calls(fields: &mut Fields<'_>, calls: &mut Calls) -> Result<Vec<ToolCall>, RequestError> {
    let list_path = fields.param("tool_calls");
    let mut called = Vec::new();
    for (index, value) in fields.list("tool_calls")?.unwrap_or_default().into_iter().enumerate() {
        let mut call = Fields::object(&format!("{list_path}[{index}]"), value)?;
        check_type(&mut call)?;
        let id: String = call.require("id", "must be a string")?;
        let mut function =
            call.inner("function")?.ok_or_else(|| RequestError::Missing { param: call.param("function") })?;
        let name = tool_name(&mut function)?;
        let arguments = function.require("arguments", "must be a string that holds JSON")?;
        calls.insert(id, name.clone());
        called.push(ToolCall { name, arguments });
    }
    Ok(called)
}

fn required_text(fields: &mut Fields<'_>) -> Result<String, RequestError> {
    text(fields)?.ok_or_else(|| RequestError::Missing { param: fields.param("content") })
}

/// Takes `content`: a string, or a list of text parts, which are joined by newlines.
fn text(fields: &mut Fields<'_>) -> Result<Option<String>, RequestError> {
    let param = fields.param("content");
    let Some(value) = fields.raw("content") else { return Ok(None) };
    if let Ok(text) = serde_json::from_str::<String>(value.get()) {
        return Ok(Some(text));
    }
    let parts = items(&param, value).map_err(|_| invalid(&param, "must be a string or a list of parts"))?;
    if parts.is_empty() {
        return Err(invalid(&param, "is an empty list"));
    }
    let mut texts = Vec::with_capacity(parts.len());
    for (index, part) in parts.into_iter().enumerate() {
        let mut part = Fields::object(&format!("{param}[{index}]"), part)?;
        let key = match part.require::<String>("type", "must be a string")?.as_str() {
            "text" => "text",
            "refusal" => "refusal",
            other => return Err(unsupported(&part.param("type"), format!("{other:?}; only \"text\" parts are read"))),
        };
        texts.push(part.require::<String>(key, "must be a string")?);
    }
    Ok(Some(texts.join(PART_SEPARATOR)))
}

fn tools(fields: &mut Fields<'_>) -> Result<Vec<Tool>, RequestError> {
    let list = fields.list("tools")?.unwrap_or_default();
    if list.len() > TOOLS_MAX {
        return Err(invalid("tools", format!("holds {} tools, at most {TOOLS_MAX} are allowed", list.len())));
    }
    let mut names = BTreeSet::new();
    let mut tools = Vec::with_capacity(list.len());
    for (index, value) in list.into_iter().enumerate() {
        let path = format!("tools[{index}]");
        let tool = tool(&path, value)?;
        if !names.insert(tool.name.clone()) {
            return Err(invalid(&format!("{path}.function.name"), format!("{:?} is there twice", tool.name)));
        }
        tools.push(tool);
    }
    Ok(tools)
}

fn tool(path: &str, value: &RawValue) -> Result<Tool, RequestError> {
    let mut fields = Fields::object(path, value)?;
    check_type(&mut fields)?;
    let mut function =
        fields.inner("function")?.ok_or_else(|| RequestError::Missing { param: fields.param("function") })?;
    let name = tool_name(&mut function)?;
    let description = function.take("description", "must be a string")?;
    if function.take("strict", "must be true or false")?.unwrap_or(false) {
        return Err(unsupported(&function.param("strict"), "the schema is told to the model and not enforced"));
    }
    let param = function.param("parameters");
    let parameters = function.raw("parameters").map(|schema| check_schema(&param, schema)).transpose()?;
    Ok(Tool { name, description, parameters })
}

fn check_type(fields: &mut Fields<'_>) -> Result<(), RequestError> {
    match fields.take::<String>("type", "must be a string")?.as_deref() {
        None | Some("function") => Ok(()),
        Some(other) => Err(unsupported(&fields.param("type"), format!("{other:?}; use \"function\""))),
    }
}

fn tool_name(function: &mut Fields<'_>) -> Result<String, RequestError> {
    let name: String = function.require("name", "must be a string")?;
    let is_legal = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    if name.is_empty() || name.len() > TOOL_NAME_BYTES_MAX || !name.bytes().all(is_legal) {
        let reason = format!("must be 1 to {TOOL_NAME_BYTES_MAX} letters, digits, '_', '-' or '.', not {name:?}");
        return Err(invalid(&function.param("name"), reason));
    }
    Ok(name)
}

fn check_schema(param: &str, schema: &RawValue) -> Result<String, RequestError> {
    let text = schema.get();
    if !text.starts_with('{') {
        return Err(invalid(param, "must be an object that holds a JSON schema"));
    }
    if text.len() > TOOL_SCHEMA_BYTES_MAX {
        let reason = format!("takes {} bytes, at most {TOOL_SCHEMA_BYTES_MAX} are allowed", text.len());
        return Err(invalid(param, reason));
    }
    match depth(text) {
        depth if depth > TOOL_SCHEMA_DEPTH_MAX => {
            Err(invalid(param, format!("is nested {depth} deep, at most {TOOL_SCHEMA_DEPTH_MAX} are allowed")))
        }
        _ => Ok(text.to_owned()),
    }
}

/// Gives the nesting of objects and lists in JSON text, without recursion.
fn depth(json: &str) -> usize {
    let (mut depth, mut deepest) = (0_usize, 0);
    let (mut is_string, mut is_escaped) = (false, false);
    for byte in json.bytes() {
        match (is_string, byte) {
            (true, _) if is_escaped => is_escaped = false,
            (true, b'\\') => is_escaped = true,
            (_, b'"') => is_string = !is_string,
            (false, b'{' | b'[') => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            (false, b'}' | b']') => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    deepest
}

/// Takes `tool_choice` and says whether the model may call tools.
fn may_call(fields: &mut Fields<'_>) -> Result<bool, RequestError> {
    let Some(choice) = fields.raw("tool_choice") else { return Ok(true) };
    match serde_json::from_str::<String>(choice.get()).as_deref() {
        Ok("auto") => Ok(true),
        Ok("none") => Ok(false),
        Ok("required") => Err(unsupported("tool_choice", "\"required\" is not enforced; use \"auto\" or \"none\"")),
        Ok(other) => Err(invalid("tool_choice", format!("must be \"auto\" or \"none\", not {other:?}"))),
        Err(_) => Err(unsupported("tool_choice", "a named tool is not enforced; use \"auto\" or \"none\"")),
    }
}

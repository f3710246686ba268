//! Writes a conversation as the token ids of a prompt.
//!
//! Owns: which messages a prompt has and how each is laid out. Invariant: structural tokens are written by id; every text,
//! a client's or our own, is ordinary text.
//!
//! Source: openai-harmony 0.0.8, `render_conversation_for_completion`. How the turns of an OpenAI conversation become
//! harmony messages:
//! - The system message is ours. Instructions of the operator, `system` and `developer` alike, become one developer message
//!   behind it, joined by blank lines, together with the tools; later ones stay in their place.
//! - While the model is still calling tools its thoughts are kept; once its last turn is an answer, those up to the first
//!   answer are dropped.
//! - An empty text is left out where it would be a message without meaning (instructions, thoughts, an answer beside calls).

use bulkhead_shared::generate::{Chat, Message, Tool, ToolCall};
use bulkhead_shared::limits::TOOL_NAME_BYTES_MAX;

use crate::text::error::TextError;
use crate::text::harmony::{Markers, schema};
use crate::text::tokenizer::Tokenizer;

const IDENTITY: &str = "You are ChatGPT, a large language model trained by OpenAI.";
const KNOWLEDGE_CUTOFF: &str = "2024-06";
const CHANNELS: &str = "# Valid channels: analysis, commentary, final. Channel must be included for every message.";
const TOOL_CHANNEL: &str = "\nCalls to these tools must go to the commentary channel: 'functions'.";

/// Renders a conversation up to and including `<|start|>assistant`.
///
/// # Errors
/// `NoHarmony` when the tokenizer lacks structural tokens; `ToolName`, `ToolSchema`, `ToolSchemaSyntax` and
/// `ToolSchemaTooLong` for a tool that cannot be written; those of `Tokenizer::encode_ordinary`.
pub fn render(tokenizer: &Tokenizer, chat: &Chat) -> Result<Vec<u32>, TextError> {
    let mut prompt = Prompt { tokenizer, markers: Markers::of(tokenizer)?, ids: Vec::new() };
    prompt.message("system", None, &system_text(chat))?;
    let (instructions, turns) = split_instructions(&chat.messages);
    let developer = developer_text(&instructions, &chat.tools)?;
    if !developer.is_empty() {
        prompt.message("developer", None, &developer)?;
    }
    let thoughts_from = first_kept_thought(&turns);
    for (index, turn) in turns.iter().enumerate() {
        prompt.turn(turn, index >= thoughts_from)?;
    }
    prompt.ids.push(prompt.markers.start);
    prompt.text("assistant")?;
    Ok(prompt.ids)
}

/// A prompt while it is written.
struct Prompt<'a> {
    tokenizer: &'a Tokenizer,
    markers: Markers,
    ids: Vec<u32>,
}

impl Prompt<'_> {
    fn text(&mut self, text: &str) -> Result<(), TextError> {
        self.ids.extend(self.tokenizer.encode_ordinary(text)?);
        Ok(())
    }

    fn header(&mut self, author: &str, channel: Option<&str>) -> Result<(), TextError> {
        self.ids.push(self.markers.start);
        self.text(author)?;
        if let Some(channel) = channel {
            self.ids.push(self.markers.channel);
            self.text(channel)?;
        }
        Ok(())
    }

    fn message(&mut self, author: &str, channel: Option<&str>, text: &str) -> Result<(), TextError> {
        self.header(author, channel)?;
        self.ids.push(self.markers.message);
        self.text(text)?;
        self.ids.push(self.markers.end);
        Ok(())
    }

    fn call(&mut self, call: &ToolCall) -> Result<(), TextError> {
        check_name(&call.name)?;
        self.header(&format!("assistant to=functions.{}", call.name), Some("commentary"))?;
        self.text(" ")?;
        self.ids.push(self.markers.constrain);
        self.text("json")?;
        self.ids.push(self.markers.message);
        self.text(&call.arguments)?;
        self.ids.push(self.markers.call);
        Ok(())
    }

    fn turn(&mut self, turn: &Message, keeps_thoughts: bool) -> Result<(), TextError> {
        match turn {
            Message::System { text } | Message::Developer { text } => {
                let text = developer_text(&[text], &[])?;
                if text.is_empty() { Ok(()) } else { self.message("developer", None, &text) }
            }
            Message::User { text } => self.message("user", None, text),
            Message::Assistant { reasoning, content, calls } => {
                if let Some(reasoning) = non_empty(reasoning).filter(|_| keeps_thoughts) {
                    self.message("assistant", Some("analysis"), reasoning)?;
                }
                match content {
                    Some(content) if calls.is_empty() => self.message("assistant", Some("final"), content)?,
                    // What is said before a call is a preamble.
                    Some(content) if !content.is_empty() => self.message("assistant", Some("commentary"), content)?,
                    Some(_) | None => {}
                }
                calls.iter().try_for_each(|call| self.call(call))
            }
            Message::Tool { name, text } => {
                check_name(name)?;
                self.message(&format!("functions.{name} to=assistant"), Some("commentary"), text)
            }
        }
    }
}

fn system_text(chat: &Chat) -> String {
    let effort = chat.effort.as_str();
    let tool_channel = if chat.tools.is_empty() { "" } else { TOOL_CHANNEL };
    format!(
        "{IDENTITY}\nKnowledge cutoff: {KNOWLEDGE_CUTOFF}\nCurrent date: {}\n\nReasoning: {effort}\n\n{CHANNELS}{tool_channel}",
        chat.date
    )
}

/// Separates the instructions that stand before the first question from the turns.
fn split_instructions(messages: &[Message]) -> (Vec<&str>, Vec<&Message>) {
    let first_question = messages.iter().position(|message| matches!(message, Message::User { .. }));
    let (before, from) = messages.split_at(first_question.unwrap_or(messages.len()));
    let mut instructions = Vec::new();
    let mut turns = Vec::new();
    for message in before {
        match message {
            Message::System { text } | Message::Developer { text } => instructions.push(text.as_str()),
            Message::User { .. } | Message::Assistant { .. } | Message::Tool { .. } => turns.push(message),
        }
    }
    turns.extend(from);
    (instructions, turns)
}

/// Lays out instructions and tools; empty when there is neither.
fn developer_text(instructions: &[&str], tools: &[Tool]) -> Result<String, TextError> {
    let mut sections: Vec<&str> = instructions.iter().copied().filter(|text| !text.is_empty()).collect();
    if !sections.is_empty() {
        sections.insert(0, "# Instructions");
    }
    let tools = if tools.is_empty() { String::new() } else { tools_text(tools)? };
    sections.extend((!tools.is_empty()).then_some(tools.as_str()));
    Ok(sections.join("\n\n"))
}

fn tools_text(tools: &[Tool]) -> Result<String, TextError> {
    let mut text = "# Tools\n\n## functions\n\nnamespace functions {\n\n".to_owned();
    for tool in tools {
        check_name(&tool.name)?;
        for line in tool.description.as_deref().unwrap_or_default().lines() {
            text.push_str(&format!("// {line}\n"));
        }
        let arguments = match &tool.parameters {
            Some(parameters) => format!("_: {}", schema::typescript(&tool.name, parameters)?),
            None => String::new(),
        };
        text.push_str(&format!("type {} = ({arguments}) => any;\n\n", tool.name));
    }
    text.push_str("} // namespace functions");
    Ok(text)
}

/// Finds the first turn whose thoughts are kept.
///
/// As in openai-harmony: once the last turn of the model is an answer, what it thought up to its first answer is dropped;
/// while it is still calling tools, nothing is.
fn first_kept_thought(turns: &[&Message]) -> usize {
    let is_answer = |turn: &&Message| match turn {
        Message::Assistant { content, calls, .. } => Some(content.is_some() && calls.is_empty()),
        Message::System { .. } | Message::Developer { .. } | Message::User { .. } | Message::Tool { .. } => None,
    };
    if turns.iter().rev().find_map(is_answer) != Some(true) {
        return 0;
    }
    turns.iter().position(|turn| is_answer(turn) == Some(true)).map_or(0, |first| first + 1)
}

fn non_empty<T: AsRef<str>>(text: &Option<T>) -> Option<&str> {
    text.as_ref().map(AsRef::as_ref).filter(|text| !text.is_empty())
}

/// Refuses a name that would read as something else than a name in a header or a type.
fn check_name(name: &str) -> Result<(), TextError> {
    let is_sound = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    if !name.is_empty() && name.len() <= TOOL_NAME_BYTES_MAX && name.bytes().all(is_sound) {
        return Ok(());
    }
    let name = name.chars().take(TOOL_NAME_BYTES_MAX).collect();
    Err(TextError::ToolName { name, max: TOOL_NAME_BYTES_MAX })
}

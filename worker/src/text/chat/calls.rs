//! Reads tool calls as Llama 3 writes them: an answer that is nothing but JSON, `{"name": .., "parameters": {..}}`.
//!
//! Several calls stand behind each other, with or without `;` between them. `arguments` is taken for `parameters`. An answer
//! that begins like a call is held back until it ends; what turns out to be none, names a tool that was not on offer, or was
//! cut off, comes out as the text that it is. The marker `<|python_tag|>` in front is a special token and has no text.
//!
//! Source: the chat template of Llama 3.1 and 3.2, and Meta's page on their prompt format.

use bulkhead_shared::message::Piece;

use crate::text::json::Json;

/// Bytes of an answer that is held back, at most: a call travels as one piece. A longer one comes out as content.
const HELD_BYTES_MAX: usize = bulkhead_shared::limits::DELTA_TEXT_BYTES_MAX / 2;

/// Reads one answer.
#[derive(Clone, Debug)]
pub struct CallReader {
    /// The tools on offer.
    names: Vec<String>,
    state: State,
    calls: u32,
}

#[derive(Clone, Debug)]
enum State {
    /// Nothing but white space has come, or what began like a call.
    Held(String),
    /// The answer is text.
    Text,
}

impl CallReader {
    /// Starts an answer that may call these tools.
    #[must_use]
    pub fn new(names: Vec<String>) -> CallReader {
        CallReader { names, state: State::Held(String::new()), calls: 0 }
    }

    /// Counts the calls that have come out.
    #[must_use]
    pub fn calls(&self) -> u32 {
        self.calls
    }

    /// Takes more text and gives what is certain to be no call.
    pub fn push(&mut self, text: String) -> String {
        let State::Held(held) = &mut self.state else { return text };
        held.push_str(&text);
        let start = held.trim_start();
        if (start.is_empty() || start.starts_with('{')) && held.len() <= HELD_BYTES_MAX {
            return String::new();
        }
        let text = std::mem::take(held);
        self.state = State::Text;
        text
    }

    /// Ends the answer. `is_whole` says that the model ended it.
    pub fn finish(&mut self, is_whole: bool) -> Vec<Piece> {
        let State::Held(held) = std::mem::replace(&mut self.state, State::Text) else { return Vec::new() };
        let calls = if is_whole { read(&held, &self.names) } else { None };
        match calls {
            Some(calls) => {
                let first = self.calls;
                self.calls += calls.len() as u32;
                let piece = |(index, (name, arguments))| Piece::ToolCall { index, name, arguments };
                (first..).zip(calls).map(piece).collect()
            }
            None if held.is_empty() => Vec::new(),
            None => vec![Piece::Content(held)],
        }
    }
}

/// Reads names and arguments; `None` unless all of the text is calls of tools on offer.
fn read(text: &str, names: &[String]) -> Option<Vec<(String, String)>> {
    let mut calls = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Json>();
        let value = values.next()?.ok()?;
        let end = values.byte_offset();
        let name = value.get_str("name").filter(|name| names.iter().any(|known| known == name))?;
        let arguments = value.get("parameters").or_else(|| value.get("arguments"))?;
        let Json::Object(_) = arguments else { return None };
        calls.push((name.to_owned(), arguments.to_string()));
        rest = rest[end..].trim_start();
        rest = rest.strip_prefix(';').unwrap_or(rest).trim_start();
    }
    (!calls.is_empty()).then_some(calls)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes out of a whole answer, cut into single characters and not at all.
    fn check(text: &str, expected: &[Piece]) {
        for pieces in [vec![text.to_owned()], text.chars().map(String::from).collect::<Vec<_>>()] {
            let mut reader = CallReader::new(vec!["add".into(), "get_weather".into()]);
            let early: String = pieces.into_iter().map(|piece| reader.push(piece)).collect();
            let mut found: Vec<Piece> = (!early.is_empty()).then_some(Piece::Content(early)).into_iter().collect();
            found.extend(reader.finish(true));
            assert_eq!(found, expected, "{text}");
            let calls = expected.iter().filter(|piece| matches!(piece, Piece::ToolCall { .. })).count();
            assert_eq!(reader.calls() as usize, calls);
        }
    }

    fn call(index: u32, name: &str, arguments: &str) -> Piece {
        Piece::ToolCall { index, name: name.into(), arguments: arguments.into() }
    }

    #[test]
    fn calls_are_read_and_everything_else_is_text() {
        check(r#"{"name": "add", "parameters": {"b": 1, "a": [2]}}"#, &[call(0, "add", r#"{"b":1,"a":[2]}"#)]);
        check(" \n{\"arguments\": {}, \"name\": \"add\"}\n", &[call(0, "add", "{}")]);
        let two = r#"{"name": "add", "parameters": {}}; {"name": "get_weather", "parameters": {"c": "Rom;e}"}}"#;
        check(two, &[call(0, "add", "{}"), call(1, "get_weather", r#"{"c":"Rom;e}"}"#)]);
        for text in [
            "hello",
            "  ",
            "{",
            r#"{"name": "add"}"#,
            r#"{"name": "sub", "parameters": {}}"#,
            r#"{"name": "add", "parameters": 3}"#,
            r#"{"name": "add", "parameters": {}} and more"#,
            r#"I call {"name": "add", "parameters": {}}"#,
            "{\"a\": 1}",
        ] {
            check(text, &[Piece::Content(text.into())]);
        }
        check("", &[]);
    }

    #[test]
    fn a_call_that_was_cut_off_is_text() {
        let text = r#"{"name": "add", "parameters": {}}"#;
        let mut reader = CallReader::new(vec!["add".into()]);
        assert_eq!(reader.push(text.to_owned()), "");
        assert_eq!(reader.finish(false), [Piece::Content(text.into())]);
    }

    #[test]
    fn text_that_only_begins_like_a_call_is_held_back_up_to_a_limit() {
        let mut reader = CallReader::new(vec!["add".into()]);
        let long = format!("{{{}", "x".repeat(HELD_BYTES_MAX - 1));
        assert_eq!(reader.push(long.clone()), "");
        assert_eq!(reader.push("y".into()), format!("{long}y"));
        assert_eq!(reader.push("z".into()), "z");
        assert_eq!(reader.finish(true), []);
    }
}

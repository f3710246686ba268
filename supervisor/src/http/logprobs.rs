//! What is told of the tokens of an answer, in OpenAI's two shapes.
//!
//! Invariants: the tokens are those of the content, in their order, so their bytes put together are the content, where no
//! stop string cut into the last one; numbers are those of the worker, written as briefly as they can be read back.

use std::borrow::Cow;

use bulkhead_shared::message::{Logprobs, TokenLogprob, TokenText};
use serde::{Serialize, Serializer};

/// The tokens of a conversation's answer: `choices[].logprobs`.
#[derive(Debug, Serialize)]
pub(super) struct ChatTokens {
    content: Content,
    refusal: (),
}

/// The tokens of a text completion: `choices[].logprobs`, in the older shape.
#[derive(Debug, Default, Serialize)]
pub(super) struct TextTokens {
    tokens: Vec<String>,
    token_logprobs: Vec<f32>,
    top_logprobs: Vec<Alternatives>,
    text_offset: Vec<usize>,
}

/// Where in a text its next token begins. Units: characters.
#[derive(Debug, Default)]
pub(super) struct Offset {
    characters: usize,
    /// Bytes of a character that the tokens so far have begun.
    unfinished: Vec<u8>,
}

impl ChatTokens {
    pub(super) fn new(logprobs: Vec<Logprobs>) -> ChatTokens {
        ChatTokens { content: Content(logprobs), refusal: () }
    }
}

impl TextTokens {
    /// Takes the tokens of a text that follow those which `offset` has passed.
    pub(super) fn new(logprobs: Vec<Logprobs>, offset: &mut Offset) -> TextTokens {
        let mut list = TextTokens::default();
        for Logprobs { chosen, top } in logprobs {
            list.text_offset.push(offset.pass(&chosen.token));
            list.tokens.push(text_name(&chosen.token));
            list.token_logprobs.push(chosen.logprob);
            list.top_logprobs.push(Alternatives::new(top.iter().chain([&chosen])));
        }
        list
    }
}

impl Offset {
    /// Gives the place of a token and moves behind it.
    fn pass(&mut self, token: &TokenText) -> usize {
        let start = self.characters;
        let TokenText::Bytes(bytes) = token else { return start };
        let mut all = std::mem::take(&mut self.unfinished);
        all.extend_from_slice(bytes);
        let mut left = all.len();
        for chunk in all.utf8_chunks() {
            let invalid = chunk.invalid();
            self.characters += chunk.valid().chars().count();
            left -= chunk.valid().len() + invalid.len();
            let is_unfinished = std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
            if left == 0 && is_unfinished {
                self.unfinished = invalid.to_vec();
            } else {
                self.characters += usize::from(!invalid.is_empty());
            }
        }
        start
    }
}

#[derive(Debug)]
struct Content(Vec<Logprobs>);

impl Serialize for Content {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(|token| ChosenToken {
            token: ChatToken::new(&token.chosen),
            top_logprobs: token.top.iter().map(ChatToken::new).collect(),
        }))
    }
}

#[derive(Serialize)]
struct ChosenToken<'a> {
    #[serde(flatten)]
    token: ChatToken<'a>,
    top_logprobs: Vec<ChatToken<'a>>,
}

#[derive(Serialize)]
struct ChatToken<'a> {
    token: Cow<'a, str>,
    logprob: f32,
    /// Null where the token stands for no text.
    bytes: Option<&'a [u8]>,
}

impl ChatToken<'_> {
    fn new(told: &TokenLogprob) -> ChatToken<'_> {
        let (token, bytes) = match &told.token {
            TokenText::Bytes(bytes) => (name(bytes), Some(bytes.as_slice())),
            TokenText::Special(name) => (Cow::Borrowed(name.as_str()), None),
        };
        ChatToken { token, logprob: told.logprob, bytes }
    }
}

/// Tokens by their names, the likeliest first. Of two with one name only the likelier has a place.
#[derive(Debug)]
struct Alternatives(Vec<(String, f32)>);

impl Alternatives {
    fn new<'a>(told: impl Iterator<Item = &'a TokenLogprob>) -> Alternatives {
        let mut list: Vec<(String, f32)> = Vec::new();
        for told in told {
            let name = text_name(&told.token);
            if list.iter().all(|(known, _)| *known != name) {
                list.push((name, told.logprob));
            }
        }
        Alternatives(list)
    }
}

impl Serialize for Alternatives {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, logprob)| (name, logprob)))
    }
}

/// Names a token of a text completion. OpenAI marks those that are no whole characters.
fn text_name(token: &TokenText) -> String {
    match token {
        TokenText::Bytes(bytes) => match name(bytes) {
            Cow::Borrowed(text) => text.to_owned(),
            Cow::Owned(escaped) => format!("bytes:{escaped}"),
        },
        TokenText::Special(name) => name.clone(),
    }
}

/// Names a token by its text, with the bytes that are no whole characters as `\xe2`.
fn name(bytes: &[u8]) -> Cow<'_, str> {
    if let Ok(text) = std::str::from_utf8(bytes) {
        return Cow::Borrowed(text);
    }
    let mut name = String::new();
    for chunk in bytes.utf8_chunks() {
        name.push_str(chunk.valid());
        chunk.invalid().iter().for_each(|byte| name.push_str(&format!("\\x{byte:02x}")));
    }
    Cow::Owned(name)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn told(token: TokenText, logprob: f32) -> TokenLogprob {
        TokenLogprob { token, logprob }
    }

    fn bytes(bytes: &[u8], logprob: f32) -> TokenLogprob {
        told(TokenText::Bytes(bytes.to_vec()), logprob)
    }

    /// A word, and the two parts of a character, the first with a letter in front.
    fn tokens() -> Vec<Logprobs> {
        let end = || told(TokenText::Special("<|return|>".into()), -9999.0);
        vec![
            Logprobs { chosen: bytes("grüß".as_bytes(), -0.1), top: vec![bytes("grüß".as_bytes(), -0.1), end()] },
            Logprobs { chosen: bytes(b"x\xe2\x82", 0.0), top: Vec::new() },
            Logprobs { chosen: bytes(b"\xac", -1.5), top: vec![bytes(b"\xad", -0.5), end()] },
        ]
    }

    fn as_json(value: impl Serialize) -> Value {
        serde_json::from_str(&serde_json::to_string(&value).expect("is JSON")).expect("is JSON")
    }

    #[test]
    fn tokens_of_a_conversation_have_their_bytes() {
        let end = json!({"token": "<|return|>", "logprob": -9999.0, "bytes": null});
        let word = json!({"token": "grüß", "logprob": -0.1, "bytes": [103, 114, 195, 188, 195, 159]});
        let mut chosen = word.clone();
        chosen["top_logprobs"] = json!([word, end]);
        let expected = json!({"refusal": null, "content": [
            chosen,
            {"token": "x\\xe2\\x82", "logprob": 0.0, "bytes": [120, 226, 130], "top_logprobs": []},
            {"token": "\\xac", "logprob": -1.5, "bytes": [172], "top_logprobs": [
                {"token": "\\xad", "logprob": -0.5, "bytes": [173]}, end,
            ]},
        ]});
        assert_eq!(as_json(ChatTokens::new(tokens())), expected);
        assert_eq!(as_json(ChatTokens::new(Vec::new())), json!({"content": [], "refusal": null}));
    }

    #[test]
    fn tokens_of_a_text_have_their_places_and_names_of_their_own() {
        let expected = json!({
            "tokens": ["grüß", "bytes:x\\xe2\\x82", "bytes:\\xac"],
            "token_logprobs": [-0.1, 0.0, -1.5],
            "top_logprobs": [
                {"grüß": -0.1, "<|return|>": -9999.0},
                {"bytes:x\\xe2\\x82": 0.0},
                {"bytes:\\xad": -0.5, "<|return|>": -9999.0, "bytes:\\xac": -1.5},
            ],
            "text_offset": [0, 4, 5],
        });
        let mut offset = Offset::default();
        assert_eq!(as_json(TextTokens::new(tokens(), &mut offset)), expected);
        // The next part of a stream goes on behind the character that is whole now.
        assert_eq!(as_json(TextTokens::new(tokens(), &mut offset))["text_offset"], json!([6, 10, 11]));
    }

    #[test]
    fn offsets_count_what_bytes_that_are_no_text_become() {
        let cases: [&[&[u8]]; 5] = [
            &[b"\xff", b"a"],
            &[b"\xe2", b"\x82", b"a"],
            &[b"\xe2", b"\xe2\x82\xac"],
            &[b"\xf0\x9f", b""],
            &[b"a\xffb"],
        ];
        for tokens in cases {
            let mut offset = Offset::default();
            tokens.iter().for_each(|token| _ = offset.pass(&TokenText::Bytes(token.to_vec())));
            let text = String::from_utf8_lossy(&tokens.concat()).into_owned();
            let characters = text.chars().count();
            assert_eq!(offset.characters + usize::from(!offset.unfinished.is_empty()), characters, "{tokens:x?}");
        }
    }

    #[test]
    fn numbers_are_written_briefly() {
        let text = serde_json::to_string(&ChatTokens::new(tokens())).expect("is JSON");
        assert!(text.contains("\"logprob\":-0.1,"), "{text}");
    }
}

//! Fixtures, and text with structural tokens spelled out.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bulkhead_worker::text::tokenizer::Tokenizer;
use serde_json::Value;

/// Every marker that a fixture may spell out.
pub(crate) const MARKERS: [&str; 8] =
    ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>", "<|endoftext|>"];

/// A special token of the fixtures that our tokenizers lack: it stands for an id that no token has.
const RESERVED: &str = "<|reserved_200000|>";

pub(crate) fn fixture_path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/oracle").join(name)
}

pub(crate) fn fixture(name: &str) -> Value {
    let text = std::fs::read_to_string(fixture_path(name)).expect("the fixture is there");
    serde_json::from_str(&text).expect("fixtures are JSON")
}

pub(crate) fn model_tokenizer(model: &str) -> Arc<Tokenizer> {
    Arc::new(Tokenizer::open(&fixture_path(&format!("models/{model}"))).expect("the fixture's tokenizer opens"))
}

/// Writes tokens as text, special ones by their names.
pub(crate) fn spell(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let name = |id: u32| MARKERS.into_iter().find(|marker| tokenizer.special_id(marker) == Some(id));
    let mut bytes = Vec::new();
    for id in ids {
        match (tokenizer.token_bytes(*id), name(*id)) {
            (Some(text), _) => bytes.extend_from_slice(text),
            (None, Some(marker)) => bytes.extend_from_slice(marker.as_bytes()),
            (None, None) => panic!("token {id} has no text"),
        }
    }
    String::from_utf8(bytes).expect("the tokens of a text are text")
}

/// Reads text in which markers are spelled out, as the model writes it: a marker becomes its one token.
pub(crate) fn tokenize(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    let mut ids = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let next =
            MARKERS.iter().chain([&RESERVED]).filter_map(|marker| rest.find(marker).map(|at| (at, *marker))).min();
        let (at, marker) = next.unwrap_or((rest.len(), ""));
        ids.extend(tokenizer.encode_ordinary(&rest[..at]).expect("fixtures can be encoded"));
        ids.extend(if marker == RESERVED { Some(u32::MAX) } else { tokenizer.special_id(marker) });
        rest = &rest[at + marker.len()..];
    }
    ids
}

/// Gives the text of a field.
pub(crate) fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_else(|| panic!("`{key}` is a text in {value}"))
}

/// Gives the items of a field.
pub(crate) fn items<'a>(value: &'a Value, key: &str) -> &'a [Value] {
    value[key].as_array().unwrap_or_else(|| panic!("`{key}` is a list in {value}"))
}

/// Gives the token ids of a field.
pub(crate) fn ids(value: &Value, key: &str) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).expect("ids are small numbers");
    items(value, key).iter().map(id).collect()
}

//! A small tokenizer for a large vocabulary: the built-in model's words, with harmony's markers where the model's shape has
//! room for them.
//!
//! A vocabulary that reaches the published ids of o200k_harmony gets them; a smaller one has its markers at its end. Ids
//! between words and markers have no text, as in every model whose matrices are larger than its tokenizer.

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

/// The built-in model's tokenizer, byte-level.
const BUILT_IN: &str = include_str!("../../../worker/demo-model/checkpoint/tokenizer.json");

/// Harmony's markers with their published ids. Source: openai/gpt-oss, `tokenizer.py`.
const MARKERS: [(&str, u32); 9] = [
    ("<|startoftext|>", 199_998),
    ("<|endoftext|>", 199_999),
    ("<|return|>", 200_002),
    ("<|constrain|>", 200_003),
    ("<|channel|>", 200_005),
    ("<|start|>", 200_006),
    ("<|end|>", 200_007),
    ("<|message|>", 200_008),
    ("<|call|>", 200_012),
];

/// Tokens that stand for one byte each.
const BYTES: usize = 256;

/// A tokenizer and its markers.
#[derive(Debug)]
pub(super) struct Vocabulary {
    tokenizer: Value,
    /// In the order of `MARKERS`.
    ids: [u32; MARKERS.len()],
}

impl Vocabulary {
    /// Makes a tokenizer whose ids are below `size`.
    ///
    /// # Errors
    /// When single bytes and markers alone are more.
    pub(super) fn for_size(size: usize) -> Result<Vocabulary> {
        let needed = BYTES + MARKERS.len();
        ensure!(size >= needed, "vocab_size is {size}, and a tokenizer needs {needed}");
        let first = u32::try_from(size - MARKERS.len())?;
        let highest = MARKERS.into_iter().map(|(_, id)| id).max().expect("there are markers");
        let has_published = size > highest as usize;
        let ids = std::array::from_fn(|i| if has_published { MARKERS[i].1 } else { first + i as u32 });
        let lowest = ids.into_iter().min().expect("there are markers");

        let mut tokenizer: Value = serde_json::from_str(BUILT_IN)?;
        let model = &mut tokenizer["model"];
        let words = model["vocab"].as_object_mut().context("a vocabulary")?;
        let mut words: Map<String, Value> = std::mem::take(words);
        if words.len() > lowest as usize {
            words.retain(|word, _| word.chars().count() == 1);
            model["merges"] = json!([]);
        }
        ensure!(words.values().all(|id| id.as_u64().is_some_and(|id| id < u64::from(lowest))), "words before markers");
        // A marker's id is that of the model's entry; without one, the tokenizers crate would count on from the words.
        words.extend(MARKERS.into_iter().zip(ids).map(|((marker, _), id)| (marker.to_owned(), json!(id))));
        model["vocab"] = Value::Object(words);
        let added = |((marker, _), id): ((&str, u32), u32)| {
            json!({"id": id, "content": marker, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        tokenizer["added_tokens"] = MARKERS.into_iter().zip(ids).map(added).collect();
        Ok(Vocabulary { tokenizer, ids })
    }

    pub(super) fn tokenizer(&self) -> &Value {
        &self.tokenizer
    }

    pub(super) fn start_of_text(&self) -> u32 {
        self.id("<|startoftext|>")
    }

    pub(super) fn end_of_text(&self) -> u32 {
        self.id("<|endoftext|>")
    }

    pub(super) fn end_of_turn(&self) -> u32 {
        self.id("<|return|>")
    }

    /// Gives the content of a generation_config.json.
    pub(super) fn generation_config(&self) -> Value {
        json!({
            "bos_token_id": self.start_of_text(), "pad_token_id": self.end_of_text(), "do_sample": true,
            "eos_token_id": [self.end_of_turn(), self.end_of_text(), self.id("<|call|>")]
        })
    }

    fn id(&self, marker: &str) -> u32 {
        let index = MARKERS.iter().position(|(name, _)| *name == marker).expect("a marker of the table");
        self.ids[index]
    }
}

#[cfg(test)]
mod tests {
    use bulkhead_worker::text::harmony::Markers;
    use bulkhead_worker::text::tokenizer::Tokenizer;

    use super::*;

    #[test]
    fn the_worker_reads_it_at_every_size() {
        assert!(Vocabulary::for_size(264).expect_err("too small").to_string().contains("needs 265"));
        for (size, end_of_turn) in [(265, 258), (1535, 1528), (1536, 1529), (200_012, 200_005), (200_013, 200_002)] {
            let vocabulary = Vocabulary::for_size(size).expect("large enough");
            let folder = tempfile::tempdir().expect("a temporary folder");
            std::fs::write(folder.path().join("tokenizer.json"), vocabulary.tokenizer().to_string()).expect("written");
            let tokenizer = Tokenizer::open(folder.path()).expect("a tokenizer");
            let markers = Markers::of(&tokenizer).expect("markers");
            assert_eq!((markers.return_, vocabulary.end_of_turn()), (end_of_turn, end_of_turn), "{size}");
            assert!(tokenizer.len() <= size);
            let text = "what is 2 + 3? <|return|>\u{1f600}";
            let ids = tokenizer.encode_ordinary(text).expect("ordinary text");
            let bytes: Vec<u8> =
                ids.iter().flat_map(|id| tokenizer.token_bytes(*id).expect("ordinary")).copied().collect();
            assert_eq!(String::from_utf8(bytes).expect("text"), text, "{size}");
        }
    }
}

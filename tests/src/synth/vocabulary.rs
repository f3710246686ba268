//! A small tokenizer for a large vocabulary: the built-in model's words, with the markers of the architecture's conversations
//! where the model's shape has room for them.
//!
//! A vocabulary that reaches the published ids of its markers gets them; a smaller one has its markers at its end. Ids
//! between words and markers have no text, as in every model whose matrices are larger than its tokenizer.

use anyhow::{Context, Result, ensure};
use bulkhead_worker::model::config::Architecture;
use serde_json::{Map, Value, json};

/// The built-in model's tokenizer, byte-level.
const BUILT_IN: &str = include_str!("../../../worker/demo-model/checkpoint/tokenizer.json");

/// Harmony's markers with their published ids. Source: openai/gpt-oss, `tokenizer.py`.
const HARMONY: [(&str, u32); 9] = [
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

/// Llama 3's markers with their published ids. Source: Meta, "Llama 3.1 model card and prompt formats".
const LLAMA3: [(&str, u32); 7] = [
    ("<|begin_of_text|>", 128_000),
    ("<|end_of_text|>", 128_001),
    ("<|start_header_id|>", 128_006),
    ("<|end_header_id|>", 128_007),
    ("<|eom_id|>", 128_008),
    ("<|eot_id|>", 128_009),
    ("<|python_tag|>", 128_010),
];

/// A template that writes conversations with those. Ours, in their form.
const LLAMA3_TEMPLATE: &str = "\
    {{- bos_token }}\n\
    {%- for message in messages %}\n\
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message.content | trim + '<|eot_id|>' }}\n\
    {%- endfor %}\n\
    {%- if add_generation_prompt %}\n\
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n\
    {%- endif %}\n";

/// Tokens that stand for one byte each.
const BYTES: usize = 256;

/// A tokenizer and its markers.
#[derive(Debug)]
pub(super) struct Vocabulary {
    architecture: Architecture,
    tokenizer: Value,
    /// In the order of the architecture's markers.
    ids: Vec<u32>,
}

fn markers(architecture: Architecture) -> &'static [(&'static str, u32)] {
    match architecture {
        Architecture::GptOss => &HARMONY,
        Architecture::Llama => &LLAMA3,
    }
}

impl Vocabulary {
    /// Makes a tokenizer whose ids are below `size`.
    ///
    /// # Errors
    /// When single bytes and markers alone are more.
    pub(super) fn for_size(size: usize, architecture: Architecture) -> Result<Vocabulary> {
        let markers = markers(architecture);
        let needed = BYTES + markers.len();
        ensure!(size >= needed, "vocab_size is {size}, and a tokenizer needs {needed}");
        let first = u32::try_from(size - markers.len())?;
        let highest = markers.iter().map(|(_, id)| *id).max().expect("there are markers");
        let has_published = size > highest as usize;
        let id = |(i, (_, published)): (usize, &(&str, u32))| if has_published { *published } else { first + i as u32 };
        let ids: Vec<u32> = markers.iter().enumerate().map(id).collect();
        let lowest = ids.iter().copied().min().expect("there are markers");

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
        words.extend(markers.iter().zip(&ids).map(|((marker, _), id)| ((*marker).to_owned(), json!(id))));
        model["vocab"] = Value::Object(words);
        let added = |((marker, _), id): (&(&str, u32), &u32)| {
            json!({"id": id, "content": marker, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        };
        tokenizer["added_tokens"] = markers.iter().zip(&ids).map(added).collect();
        let mut vocabulary = Vocabulary { architecture, tokenizer, ids };
        if architecture == Architecture::Llama {
            vocabulary.begin_with(LLAMA3[0].0);
        }
        Ok(vocabulary)
    }

    /// Has every text begin with a marker, as the tokenizers of Llama do.
    fn begin_with(&mut self, marker: &str) {
        let first = json!({"SpecialToken": {"id": marker, "type_id": 0}});
        let text = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
        self.tokenizer["post_processor"] = json!({
            "type": "TemplateProcessing", "single": [first, text("A")], "pair": [first, text("A"), first, text("B")],
            "special_tokens": {marker: {"id": marker, "ids": [self.id(marker)], "tokens": [marker]}},
        });
    }

    /// Gives tokenizer_config.json and chat_template.jinja, where the architecture's conversations need them.
    pub(super) fn template(&self) -> Option<(Value, &'static str)> {
        match self.architecture {
            Architecture::GptOss => None,
            Architecture::Llama => {
                let config = json!({"bos_token": LLAMA3[0].0, "eos_token": "<|eot_id|>", "pad_token": LLAMA3[1].0});
                Some((config, LLAMA3_TEMPLATE))
            }
        }
    }

    pub(super) fn tokenizer(&self) -> &Value {
        &self.tokenizer
    }

    pub(super) fn start_of_text(&self) -> u32 {
        self.of("<|startoftext|>", "<|begin_of_text|>")
    }

    pub(super) fn end_of_text(&self) -> u32 {
        self.of("<|endoftext|>", "<|end_of_text|>")
    }

    pub(super) fn end_of_turn(&self) -> u32 {
        self.of("<|return|>", "<|eot_id|>")
    }

    /// Gives the content of a generation_config.json.
    pub(super) fn generation_config(&self) -> Value {
        json!({
            "bos_token_id": self.start_of_text(), "pad_token_id": self.end_of_text(), "do_sample": true,
            "eos_token_id": [self.end_of_turn(), self.end_of_text(), self.of("<|call|>", "<|eom_id|>")]
        })
    }

    fn of(&self, harmony: &str, llama: &str) -> u32 {
        match self.architecture {
            Architecture::GptOss => self.id(harmony),
            Architecture::Llama => self.id(llama),
        }
    }

    fn id(&self, marker: &str) -> u32 {
        let index =
            markers(self.architecture).iter().position(|(name, _)| *name == marker).expect("a marker of the table");
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
        let for_size = |size| Vocabulary::for_size(size, Architecture::GptOss);
        assert!(for_size(264).expect_err("too small").to_string().contains("needs 265"));
        for (size, end_of_turn) in [(265, 258), (1535, 1528), (1536, 1529), (200_012, 200_005), (200_013, 200_002)] {
            let vocabulary = for_size(size).expect("large enough");
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

    #[test]
    fn a_llama_has_its_markers_and_its_template() {
        for (size, start, end_of_turn) in [(1535, 1528, 1533), (32_000, 31_993, 31_998), (128_256, 128_000, 128_009)] {
            let vocabulary = Vocabulary::for_size(size, Architecture::Llama).expect("large enough");
            let folder = tempfile::tempdir().expect("a temporary folder");
            std::fs::write(folder.path().join("tokenizer.json"), vocabulary.tokenizer().to_string()).expect("written");
            let tokenizer = Tokenizer::open(folder.path()).expect("a tokenizer");
            assert_eq!((tokenizer.prefix(), vocabulary.end_of_turn()), (&[start][..], end_of_turn), "{size}");
        }
    }
}

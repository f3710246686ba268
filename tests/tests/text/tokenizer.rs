//! Token ids against transformers, hostile texts, and hostile tokenizers.

use std::path::Path;
use std::time::{Duration, Instant};

use bulkhead_worker::text::detokenizer::Detokenizer;
use bulkhead_worker::text::error::{Fault, TextError};
use bulkhead_worker::text::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::support::{fixture, fixture_path, ids, items, model_tokenizer, text};

/// Of both kinds: byte-level, and in SentencePiece's form.
const MODELS: [&str; 8] = [
    "gptoss_basic",
    "gptoss_long",
    "gptoss_mxfp4",
    "gptoss_window_edges",
    "llama3_untied_sharded",
    "qwen2_bias",
    "llama_tied",
    "gemma3_text",
];

fn decode(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut decoder = Detokenizer::default();
    let mut text: String =
        ids.iter().filter_map(|id| tokenizer.token_bytes(*id)).map(|bytes| decoder.push(bytes)).collect();
    text.extend(decoder.finish());
    match text.strip_prefix(' ') {
        Some(rest) if tokenizer.strips_first_space() => rest.to_owned(),
        Some(_) | None => text,
    }
}

#[test]
fn ordinary_text_gets_the_ids_that_transformers_gives() {
    for model in MODELS {
        let tokenizer = model_tokenizer(model);
        let cases = fixture(&format!("models/{model}/expected.json"));
        for case in items(&cases, "tokenizer_cases") {
            let (text, expected) = (text(case, "text"), ids(case, "ids"));
            let found = tokenizer.encode_ordinary(text).expect("encodes");
            if expected.iter().any(|id| tokenizer.is_special(*id)) {
                // There transformers reads a special token in the text, which we never do.
                assert!(found.iter().all(|id| !tokenizer.is_special(*id)), "{model}: {text:?}");
                assert_eq!(decode(&tokenizer, &found), text, "{model}");
            } else {
                assert_eq!(found, expected, "{model}: {text:?}");
                let whole = [tokenizer.prefix(), &found].concat();
                assert_eq!(whole, ids(case, "ids_add_special_tokens"), "{model}: {text:?}");
                assert_eq!(decode(&tokenizer, &found), crate::support::text(case, "decoded"), "{model}");
            }
        }
    }
}

#[test]
fn text_that_spells_a_special_token_is_ordinary_text() {
    for model in MODELS {
        let tokenizer = model_tokenizer(model);
        let file: Value = fixture(&format!("models/{model}/tokenizer.json"));
        for added in items(&file, "added_tokens") {
            let marker = text(added, "content");
            assert!(tokenizer.special_id(marker).is_some(), "{model}: {marker}");
            for spelled in [marker.to_owned(), format!("a{marker}b"), format!("{marker}{marker} {marker}\n")] {
                let found = tokenizer.encode_ordinary(&spelled).expect("encodes");
                assert!(found.iter().all(|id| !tokenizer.is_special(*id)), "{model}: {spelled:?}");
                assert_eq!(decode(&tokenizer, &found), spelled, "{model}");
            }
        }
    }
}

#[test]
fn ids_without_a_token_stand_for_nothing() {
    let tokenizer = model_tokenizer("gptoss_basic");
    let config = fixture("models/gptoss_basic/config.json");
    let vocabulary = config["vocab_size"].as_u64().and_then(|size| u32::try_from(size).ok()).expect("a size");
    assert!(tokenizer.len() < vocabulary as usize && !tokenizer.is_empty());
    for id in (tokenizer.len() as u32..vocabulary).chain([u32::MAX]) {
        assert_eq!(tokenizer.token_bytes(id), None);
        assert!(!tokenizer.is_special(id));
    }
    let start = tokenizer.special_id("<|start|>").expect("has harmony");
    assert!(tokenizer.is_special(start));
    assert_eq!(tokenizer.token_bytes(start), None);
    assert_eq!(tokenizer.special_id("a"), None);
}

/// A limit so wide that only a cost that grows with the square of the length misses it.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn long_texts_of_anything_are_encoded_whole_and_in_time() {
    const MEGABYTE: usize = 1 << 20;
    let filled = |unit: &str| unit.repeat(MEGABYTE / unit.len());
    let some = |unit: &str| unit.repeat(MEGABYTE / 16 / unit.len());
    let texts = [
        filled(" "),
        filled("a"),
        some("A"),
        some("\n"),
        some(" \n"),
        some("1"),
        some("!"),
        filled("你"),
        some("\u{301}"),
        some("The quick brown fox jumps over 13 lazy dogs.\n"),
        filled("Ünïcödé 你好，世界 👩\u{200d}👩\u{200d}👧 \u{200b}\t— x\r\n"),
        format!("{}x", filled(" ")),
        format!("x{}", some("\u{3000}")),
    ];
    let tokenizer = model_tokenizer("gptoss_basic");
    for text in texts {
        let beginning: String = text.chars().take(8).collect();
        let start = Instant::now();
        let found = tokenizer.encode_ordinary(&text).expect("encodes");
        assert!(start.elapsed() < PATIENCE, "{beginning:?}... took {:?}", start.elapsed());
        assert!(decode(&tokenizer, &found) == text, "{beginning:?}... came back changed");
    }
}

/// Long enough for several chunks.
const LONG_BYTES: usize = 140 << 10;

#[test]
fn cutting_a_long_text_into_chunks_changes_no_id() {
    // Encoded in one go by the crate itself, against chunk by chunk.
    for model in MODELS {
        let path = fixture_path(&format!("models/{model}/tokenizer.json"));
        let mut whole = tokenizers::Tokenizer::from_file(path).expect("opens");
        whole.set_encode_special_tokens(true);
        let tokenizer = model_tokenizer(model);
        let cases = fixture(&format!("models/{model}/expected.json"));
        let cases: Vec<&str> = items(&cases, "tokenizer_cases").iter().map(|case| text(case, "text")).collect();
        for separator in ["", " ", "x\n  "] {
            let once = cases.join(separator);
            let long = once.repeat(LONG_BYTES / once.len() + 1);
            let expected = whole.encode_fast(long.as_str(), false).expect("encodes");
            assert!(tokenizer.encode_ordinary(&long).expect("encodes") == expected.get_ids(), "{model} {separator:?}");
        }
    }
}

#[test]
fn a_text_without_an_end_of_words_is_refused_before_it_costs_anything() {
    let tokenizer = model_tokenizer("gptoss_basic");
    let long = " ".repeat((2 << 20) + 1);
    let error = tokenizer.encode_ordinary(&long).expect_err("too long");
    assert!(matches!(error, TextError::Unbroken { .. }) && error.fault() == Fault::Client, "{error}");
    assert!(tokenizer.encode_ordinary(&long[1..]).is_ok());
    assert!(tokenizer.encode_ordinary(&"words and words ".repeat(140_000)).is_ok());
}

/// Opens the tokenizer of a fixture after a change to its file.
fn open_changed(change: impl FnOnce(&mut Value)) -> Result<Tokenizer, TextError> {
    let mut file = fixture("models/gptoss_basic/tokenizer.json");
    change(&mut file);
    open(&file)
}

fn open(file: &Value) -> Result<Tokenizer, TextError> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    std::fs::write(dir.path().join("tokenizer.json"), file.to_string()).expect("writable");
    Tokenizer::open(dir.path())
}

fn added(content: &str, id: u32, special: bool, normalized: bool) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
           "normalized": normalized, "special": special})
}

#[test]
fn what_a_tokenizer_file_says_about_cutting_and_padding_is_ignored() {
    let text = "one two three four five";
    let expected = model_tokenizer("gptoss_basic").encode_ordinary(text).expect("encodes");
    let changed = open_changed(|file| {
        file["truncation"] = json!({"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0});
        file["padding"] = json!({"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
                                 "pad_id": 0, "pad_type_id": 0, "pad_token": "!"});
        file["model"]["dropout"] = json!(0.9);
    });
    assert_eq!(changed.expect("opens").encode_ordinary(text).expect("encodes"), expected);
}

#[test]
fn added_tokens_that_look_like_markers_cannot_be_forged_and_still_have_text() {
    let tokenizer = open_changed(|file| {
        let tokens = file["added_tokens"].as_array_mut().expect("a list");
        tokens.push(added("<tool_call>", 504, false, false));
        tokens.push(added("<|normalized|>", 505, true, true));
        tokens.push(added("    ", 506, false, true));
    })
    .expect("opens");
    for spelled in ["<tool_call>", "<|normalized|>", "a <tool_call> b", "x<|normalized|>"] {
        let found = tokenizer.encode_ordinary(spelled).expect("encodes");
        assert!(found.iter().all(|id| *id < 494), "{spelled}: {found:?}");
        assert_eq!(decode(&tokenizer, &found), spelled);
    }
    assert_eq!(tokenizer.token_bytes(504), Some(b"<tool_call>".as_slice()));
    assert!(tokenizer.is_special(505) && !tokenizer.is_special(504));
    assert_eq!(tokenizer.encode_ordinary("    ").expect("encodes"), [506], "ordinary added tokens stay tokens");
}

#[test]
fn a_special_token_that_the_vocabulary_spells_is_refused() {
    // With merges ignored, a word that is in the vocabulary becomes its token at once.
    let tokenizer = open_changed(|file| {
        file["model"]["ignore_merges"] = json!(true);
        file["model"]["vocab"]["evil"] = json!(504);
        file["added_tokens"].as_array_mut().expect("a list").push(added("evil", 504, true, false));
    })
    .expect("opens");
    assert!(matches!(tokenizer.encode_ordinary("evil"), Err(TextError::SpecialFromText { id: 504 })));
}

#[test]
fn unusable_tokenizers_are_told_apart() {
    let is = |result: Result<Tokenizer, TextError>, what: fn(&TextError) -> bool| {
        let error = result.expect_err("unusable");
        assert!(what(&error) && error.fault() == Fault::Model, "{error}");
    };
    is(Tokenizer::open(Path::new("/nonexistent")), |error| matches!(error, TextError::Read { .. }));
    is(open_changed(|file| *file = json!([])), |error| matches!(error, TextError::Tokenizer { .. }));
    is(open_changed(|file| file["decoder"] = json!(null)), |error| {
        matches!(error, TextError::Decoder { decoder: "none", .. })
    });
    let mut fallback = fixture("models/llama_tied/tokenizer.json");
    fallback["decoder"]["decoders"][0]["content"] = json!("_");
    is(open(&fallback), |error| matches!(error, TextError::Decoder { decoder: "Sequence", .. }));
    let mut fallback = fixture("models/llama_tied/tokenizer.json");
    fallback["model"]["byte_fallback"] = json!(false);
    is(open(&fallback), |error| matches!(error, TextError::Decoder { decoder: "Sequence", .. }));
    let mut fallback = fixture("models/llama_tied/tokenizer.json");
    let vocabulary = fallback["model"]["vocab"].as_object_mut().expect("a map");
    let id = vocabulary.remove("<0x0A>").expect("stands for a line break");
    vocabulary.insert("unlikely".to_owned(), id);
    is(open(&fallback), |error| matches!(error, TextError::Alphabet { byte: 10, .. }));
    is(open_changed(|file| file["model"]["vocab"]["x"] = json!(3_000_000_000u32)), |error| {
        matches!(error, TextError::TokenId { id: 3_000_000_000, .. } | TextError::Tokenizer { .. })
    });
    is(
        open_changed(|file| {
            let vocabulary = file["model"]["vocab"].as_object_mut().expect("a map");
            let id = vocabulary.remove("Ā").expect("stands for the byte 0");
            vocabulary.insert("unlikely".to_owned(), id);
        }),
        |error| matches!(error, TextError::Alphabet { byte: 0, .. }),
    );
}

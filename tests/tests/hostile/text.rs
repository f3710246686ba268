//! tokenizer.json and the settings of generation: what is no tokenizer, and what would be an endless one.

use std::path::Path;

use bulkhead_tests::oracle;
use serde_json::{Value, json};

use crate::damage::{bytes, json as edit_json, write};
use crate::stage::Stage;

const TOKENIZER: &str = "tokenizer.json";

fn stage() -> Stage {
    Stage::new(oracle::model("gptoss_window_edges"))
}

fn edit(folder: &Path, edit: impl FnOnce(&mut Value)) {
    edit_json(folder, TOKENIZER, edit);
}

/// Makes a normalizer that is nested so deep.
fn nested(depth: usize) -> Value {
    let inner = json!({"type": "NFC"});
    (0..depth).fold(inner, |inner, _| json!({"type": "Sequence", "normalizers": [inner]}))
}

/// What is done to a folder, and words that the reason must hold.
type Case = (&'static str, fn(&Path), &'static [&'static str]);

#[test]
fn what_is_no_tokenizer() {
    let cases: [Case; 16] = [
        ("none", |folder| std::fs::remove_file(folder.join(TOKENIZER)).expect("ours"), &[]),
        ("nothing", |folder| write(folder, TOKENIZER, ""), &[]),
        ("another value", |folder| write(folder, TOKENIZER, "[]"), &[]),
        ("no field", |folder| write(folder, TOKENIZER, "{}"), &[]),
        ("half of it", |folder| bytes(folder, TOKENIZER, |bytes| bytes.truncate(bytes.len() / 2)), &[]),
        ("bytes that are no text", |f| bytes(f, TOKENIZER, |bytes| bytes[500..520].fill(0xff)), &[]),
        ("depth", |f| write(f, TOKENIZER, format!("{{\"model\":{}", "[".repeat(1 << 20))), &[]),
        ("depth in its place", |f| edit(f, |t| t["normalizer"] = nested(120)), &[]),
        ("an id beyond any", |f| edit(f, |t| t["model"]["vocab"]["zz"] = json!(u32::MAX)), &["4294967295"]),
        ("a negative id", |f| edit(f, |t| t["model"]["vocab"]["zz"] = json!(-1)), &[]),
        ("no bytes", |f| edit(f, |t| t["model"]["vocab"] = json!({"a": 0})), &[]),
        (
            "another decoder",
            |f| edit(f, |t| t["decoder"] = json!({"type": "WordPiece", "prefix": "", "cleanup": true})),
            &[],
        ),
        ("no decoder", |f| edit(f, |t| t["decoder"] = Value::Null), &["none"]),
        (
            "merges of tokens that are not there",
            |f| edit(f, |t| t["model"]["merges"] = json!([["nowhere", "else"]])),
            &[],
        ),
        ("a wrong pattern", |f| pattern(f, "(((["), &[]),
        ("a pattern of a million brackets", |f| pattern(f, &"(".repeat(1_000_000)), &[]),
    ];
    let stage = stage();
    for (what, change, words) in cases {
        let words: Vec<&str> = [TOKENIZER].iter().chain(words).copied().collect();
        stage.refuses(what, change, &words);
    }
    stage.goes_on();
}

/// Sets the expression that splits texts into words.
fn pattern(folder: &Path, pattern: &str) {
    edit(folder, |tokenizer| tokenizer["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = json!(pattern));
}

/// What is done to a tokenizer.
type Edit<'a> = &'a dyn Fn(&mut Value);

/// What is strange, and no reason to refuse a model: it is served, or refused by name at the first try.
#[test]
fn strange_tokenizers_are_served_or_refused() {
    let chain = |count: usize| -> Value {
        let names: Vec<String> = (0..=count).map(|length| "a".repeat(length + 1)).collect();
        names.windows(2).map(|pair| json!([pair[0], "a"])).collect()
    };
    let added = |number: usize| json!({"id": 500 + number, "content": format!("<{number}>"), "special": true, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false});
    let cases: [(&str, Edit); 11] = [
        ("depth that can be read", &|t| t["normalizer"] = nested(20)),
        ("a hundred thousand merges into each other", &|t| {
            let merges = chain(400);
            for (index, pair) in merges.as_array().expect("a list").iter().enumerate() {
                let merged = format!("{}a", pair[0].as_str().expect("text"));
                t["model"]["vocab"][merged] = json!(1000 + index);
            }
            let all: Vec<Value> =
                std::iter::repeat_n(merges, 250).flat_map(|m| m.as_array().cloned().expect("a list")).collect();
            t["model"]["merges"] = all.into();
        }),
        ("a hundred thousand added tokens", &|t| {
            let list = t["added_tokens"].as_array_mut().expect("a list");
            list.extend((0..100_000).map(added));
        }),
        ("an added id beyond any", &|t| t["added_tokens"][0]["id"] = json!(u32::MAX)),
        ("a pattern that counts far", &|t| {
            let pattern = json!("(((a{1,9999}){1,9999}){1,9999}){1,9999}");
            t["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = pattern;
        }),
        ("an added token of no characters", &|t| t["added_tokens"][0]["content"] = json!("")),
        ("added tokens of one name", &|t| t["added_tokens"][1]["content"] = t["added_tokens"][0]["content"].clone()),
        ("a token of a megabyte", &|t| t["model"]["vocab"]["b".repeat(1 << 20)] = json!(9999)),
        ("dropout beyond certainty", &|t| t["model"]["dropout"] = json!(7.5)),
        ("a post-processor of tokens that are not there", &|t| {
            t["post_processor"] = json!({"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<no>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [], "special_tokens": {}});
        }),
        ("a normalizer of a damaged table", &|t| {
            t["normalizer"] = json!({"type": "Precompiled", "precompiled_charsmap": "////fwAAAAA="});
        }),
    ];
    let stage = stage();
    for (what, change) in cases {
        let came = stage.load(|folder| edit(folder, change));
        assert!(came.is_running() || came.is_named(), "{what}: {came:?}\n{}", stage.server.log());
        println!("{what}: {came:?}");
        if came.is_running() {
            // A token that the model has no row for is the tokenizer's fault, and the request's loss.
            let answer = stage.complete("aaaaaaaa bbbbbbbb");
            let is_set_aside = answer.status == 500 && answer.text.contains("request_quarantined");
            assert!([200, 400].contains(&answer.status) || is_set_aside, "{what}: {answer:?}");
        } else {
            assert!(came.reason.contains(TOKENIZER), "{what}: {came:?}");
        }
    }
    stage.goes_on();
}

#[test]
fn settings_that_no_sampling_has() {
    const SETTINGS: &str = "generation_config.json";
    let stage = stage();
    for (content, word) in [
        ("", "malformed"),
        ("[]", "malformed"),
        ("{\"temperature\": NaN}", "malformed"),
        ("{\"temperature\": -1}", "temperature"),
        ("{\"top_p\": 1e300}", "top_p"),
        ("{\"top_k\": 0.5}", "top_k"),
        ("{\"repetition_penalty\": 0}", "repetition_penalty"),
        ("{\"eos_token_id\": -1}", "malformed"),
        ("{\"eos_token_id\": \"x\"}", "malformed"),
    ] {
        stage.refuses(content, |folder| write(folder, SETTINGS, content), &[SETTINGS, word]);
    }
    stage.goes_on();
}

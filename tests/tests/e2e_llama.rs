//! A Llama through supervisor and worker: the oracle's continuation over HTTP, conversations by its template, refusals.

use std::path::Path;

use bulkhead_tests::oracle::{self, Ask, evaluate};
use bulkhead_tests::server::Server;
use bulkhead_tests::talk::{CHAT, COMPLETIONS, greedy, with};
use bulkhead_worker::eval::{DecoderPath, WeightChoice};
use bulkhead_worker::text::detokenizer::Detokenizer;
use bulkhead_worker::text::tokenizer::Tokenizer;
use serde_json::{Value, json};

const MODEL: &str = "llama3_untied_sharded";

fn serve(folder: &Path) -> Server {
    Server::start(&["--model", folder.to_str().expect("is text")])
}

/// Gives the text of tokens as an answer shows them.
fn decoded(tokenizer: &Tokenizer, ids: &[Value]) -> String {
    let mut text = Detokenizer::default();
    let id = |id: &Value| u32::try_from(id.as_u64().expect("a number")).expect("an id");
    let mut answer: String =
        ids.iter().filter_map(|value| tokenizer.token_bytes(id(value))).map(|bytes| text.push(bytes)).collect();
    answer.extend(text.finish());
    answer
}

#[test]
fn continuations_over_http_are_those_of_transformers() {
    for folder in [oracle::model(MODEL), oracle::model("llama_tied")] {
        let expected = oracle::json(&folder.join("expected.json")).expect("the fixture's values");
        let prompt = &expected["prompts"][0];
        check_continuation(&folder, &prompt["input_ids"], &prompt["greedy_f32"]["ids"]);
    }
}

#[test]
fn a_model_in_four_bits_continues_as_eval_does() {
    let folder = oracle::fixture("nf4/llama_bnb_nf4_dq");
    let expected = oracle::json(&folder.join("expected.json")).expect("the fixture's values");
    let prompt: Vec<i64> = serde_json::from_value(expected["input_ids"].clone()).expect("a list of ids");
    // Keys and values in bf16 move logits by more than lies between the oracle's first choice and its second.
    let ask = Ask { greedy: 24, decoder_path: DecoderPath::Fast, ..Ask::reference(WeightChoice::File) };
    let found = evaluate(&folder, &prompt, ask).expect("it computes");
    check_continuation(&folder, &expected["input_ids"], &json!(found.greedy));
}

fn check_continuation(folder: &Path, prompt: &Value, ids: &Value) {
    let tokenizer = Tokenizer::open(folder).expect("the fixture's tokenizer");
    let ids = ids.as_array().expect("a list");
    let server = serve(folder);
    let request = json!({"prompt": prompt, "max_tokens": ids.len(), "temperature": 0});
    let body = server.post(COMPLETIONS, &request).json().expect("answers are JSON");
    assert_eq!(body["choices"][0]["text"], json!(decoded(&tokenizer, ids)), "{}", folder.display());
    assert_eq!(body["usage"]["prompt_tokens"], json!(prompt.as_array().map(Vec::len)));
}

#[test]
fn conversations_are_written_by_the_template() {
    let folder = oracle::model(MODEL);
    let expected = oracle::json(&folder.join("expected.json")).expect("the fixture's values");
    let server = serve(&folder);
    for case in expected["chat_cases"].as_array().expect("a list") {
        let request = json!({"messages": case["messages"], "max_tokens": 12, "temperature": 0, "logit_bias": null});
        let body = server.post(CHAT, &request).json().expect("answers are JSON");
        assert_eq!(body["usage"]["prompt_tokens"], json!(case["ids"].as_array().map(Vec::len)), "{body}");
        let continued = json!({"prompt": case["ids"], "max_tokens": 12, "temperature": 0});
        let continued = server.post(COMPLETIONS, &continued).json().expect("answers are JSON");
        assert_eq!(body["choices"][0]["message"]["content"], continued["choices"][0]["text"]);
    }
    let whole = server.ask(&with(greedy("Hello there"), json!({"max_tokens": 20})));
    assert_eq!(whole, server.ask_stream(&with(greedy("Hello there"), json!({"max_tokens": 20}))));
    assert!(whole.reasoning.is_empty() && whole.calls.is_empty() && !whole.content.is_empty(), "{whole:?}");

    let tool = json!({"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}});
    let answer = server.post(CHAT, &with(greedy("Hello there"), json!({"tools": [tool]})));
    assert_eq!(answer.status, 400);
    let body = answer.json().expect("errors are JSON");
    assert_eq!(body["error"]["param"], json!("tools"));
    assert!(body["error"]["message"].as_str().is_some_and(|text| text.contains("has no place for tools")), "{body}");
}

#[test]
fn a_model_without_a_template_refuses_conversations_and_continues_texts() {
    let (source, target) = (oracle::model(MODEL), tempfile::tempdir().expect("a temporary folder"));
    for entry in std::fs::read_dir(&source).expect("is read") {
        let path = entry.expect("is read").path();
        let name = path.file_name().expect("a name");
        if name != "chat_template.jinja" {
            std::fs::copy(&path, target.path().join(name)).expect("is copied");
        }
    }
    let server = serve(target.path());
    let answer = server.post(CHAT, &greedy("Hello there"));
    assert_eq!(answer.status, 400);
    let body = answer.json().expect("errors are JSON");
    assert!(body["error"]["message"].as_str().is_some_and(|text| text.contains("no chat template")), "{body}");
    let answer = server.post(COMPLETIONS, &json!({"prompt": "Hello there", "max_tokens": 4, "temperature": 0}));
    assert_eq!(answer.status, 200);
    let body = answer.json().expect("answers are JSON");
    let tokenizer = Tokenizer::open(&source).expect("the fixture's tokenizer");
    let text = tokenizer.encode_ordinary("Hello there").expect("encodes");
    // The token that every text of a Llama begins with stands in front.
    assert_eq!(body["usage"]["prompt_tokens"], json!(text.len() + 1), "{body}");
}

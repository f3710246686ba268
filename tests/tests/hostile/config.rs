//! config.json: dimensions that no model has, numbers that are none, and JSON that is none.

use bulkhead_tests::oracle;
use serde_json::{Value, json};

use crate::damage::{bytes, json as edit_json, write};
use crate::stage::Stage;

const CONFIG: &str = "config.json";

fn stage() -> Stage {
    Stage::new(oracle::model("gptoss_window_edges"))
}

#[test]
fn dimensions_that_no_model_has() {
    let stage = stage();
    let huge = json!(1_000_000_000_000_000_000_u64);
    for key in [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "num_local_experts",
        "num_experts_per_tok",
        "sliding_window",
        "max_position_embeddings",
    ] {
        for value in [huge.clone(), json!(0)] {
            stage.refuses(&format!("{key} of {value}"), |f| set(f, &[key], &value), &[CONFIG, key, &value.to_string()]);
        }
    }
    stage.goes_on();
}

fn set(folder: &std::path::Path, path: &[&str], value: &Value) {
    edit_json(folder, CONFIG, |config| {
        *path.iter().fold(config, |place, key| &mut place[*key]) = value.clone();
    });
}

#[test]
fn numbers_that_are_none() {
    let stage = stage();
    let beyond_f64 = "1e999".to_owned();
    for (path, value, words) in [
        (&["hidden_size"][..], json!(-1), &["invalid"][..]),
        (&["hidden_size"], json!(64.5), &["invalid"]),
        (&["hidden_size"], json!("64"), &["invalid"]),
        (&["vocab_size"], json!([448]), &["invalid"]),
        (&["num_hidden_layers"], json!({"a": 2}), &["invalid"]),
        (&["rms_norm_eps"], json!(0.0), &["rms_norm_eps"]),
        (&["rms_norm_eps"], json!(-1e-5), &["rms_norm_eps"]),
        (&["rms_norm_eps"], json!(1e300), &["rms_norm_eps"]),
        (&["rms_norm_eps"], json!("NaN"), &["invalid"]),
        (&["rope_theta"], json!(0), &["rope_theta"]),
        (&["rope_theta"], json!(-150_000.0), &["rope_theta"]),
        (&["rope_scaling", "factor"], json!(0), &["factor"]),
        (&["rope_scaling", "factor"], json!(-8.0), &["factor"]),
        (&["rope_scaling", "factor"], json!(1e300), &["factor"]),
        (&["rope_scaling", "factor"], json!("nan"), &["invalid"]),
        (&["rope_scaling", "beta_fast"], json!(0.0), &["beta_fast"]),
        (&["rope_scaling", "beta_slow"], json!(64.0), &["beta_slow"]),
        (&["rope_scaling", "original_max_position_embeddings"], json!(0), &["original_max_position_embeddings"]),
        (&["rope_scaling", "rope_type"], json!("mystery"), &["rope_type", "mystery"]),
        (&["num_experts_per_tok"], json!(99), &["num_experts_per_tok", "99"]),
        (&["num_key_value_heads"], json!(3), &["num_key_value_heads"]),
        (&["head_dim"], json!(15), &["head_dim"]),
        (&["eos_token_id"], json!(1_000_000_000), &["eos_token_id", "1000000000"]),
        (&["eos_token_id"], json!(vec![1; 100_000]), &["eos_token_id", "100000"]),
        (&["layer_types"], json!(vec!["full_attention"; 10_000]), &["layer_types", "10000"]),
        (&["layer_types"], json!(["full_attention", "\u{202e}wild\u{0}"]), &["layer_types"]),
        (&["model_type"], json!("x".repeat(900_000)), &["model_type"]),
        (&["quantization_config"], json!({"quant_method": "magic"}), &["quant_method", "magic"]),
    ] {
        let words: Vec<&str> = [CONFIG].iter().chain(words).copied().collect();
        stage.refuses(&format!("{path:?}"), |folder| set(folder, path, &value), &words);
    }
    for number in ["NaN", "Infinity", "-1e999", &beyond_f64, "0x10", "01"] {
        let change = |folder: &std::path::Path| {
            bytes(folder, CONFIG, |text| {
                let old = String::from_utf8_lossy(text).replacen('{', &format!("{{\"rope_theta\": {number},"), 1);
                *text = old.into_bytes();
            });
        };
        stage.refuses(number, change, &[CONFIG, "malformed"]);
    }
    stage.goes_on();
}

#[test]
fn what_is_no_configuration() {
    let stage = stage();
    let deep = format!("{{\"x\":{}", "[".repeat(500_000));
    let wide = format!("[{}]", vec!["0"; 500_000].join(","));
    for (what, content, words) in [
        ("nothing", Vec::new(), "malformed"),
        ("another value", b"null".to_vec(), "malformed"),
        ("no field", b"{}".to_vec(), "model_type"),
        ("depth", deep.into_bytes(), "malformed"),
        ("width", wide.into_bytes(), "malformed"),
        ("bytes that are no text", b"{\"model_type\": \"\xff\xfe\xc0\x80\"}".to_vec(), "malformed"),
        ("a zero", b"{\"model_type\": \"gpt_oss\"}\0".to_vec(), "malformed"),
        ("a mark of the byte order", b"\xef\xbb\xbf{}".to_vec(), "malformed"),
        ("two megabytes", vec![b' '; 2 << 20], "2097152"),
    ] {
        stage.refuses(what, |folder| write(folder, CONFIG, &content), &[CONFIG, words]);
    }
    stage.goes_on();
}

/// The largest context that a config may claim is served with what memory allows, or refused by name.
#[test]
fn an_enormous_context_is_cut_to_memory() {
    let stage = stage();
    let most = bulkhead_shared::limits::CONTEXT_TOKENS_MAX;
    let came = stage.load(|folder| set(folder, &["max_position_embeddings"], &json!(most)));
    assert!(came.is_running() || came.is_named(), "{came:?}");
    println!("a context of {most}: {came:?}");
    stage.goes_on();
}

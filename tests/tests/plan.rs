//! `bulkhead plan`: the worker's plan through the supervisor's command line.

use std::path::Path;
use std::process::Command;

use bulkhead_tests::server::{binary, demo_model};
use serde_json::{Value, json};

#[test]
fn plans_are_the_workers() {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/configs/gpt-oss-20b.json");
    let plan = |arguments: &[&str]| {
        let mut command = Command::new(binary("bulkhead"));
        let output = command.arg("plan").args(arguments).env_clear().output().expect("it runs");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("is text");
        (output.status.code(), text(output.stdout), text(output.stderr))
    };
    let config = config.to_str().expect("is text");
    let arguments = ["--config", config, "--format", "nf4", "--vram", "12", "80", "--context", "8192", "--host", "64"];
    let (code, table, _) = plan(&arguments);
    assert_eq!((code, table.lines().count()), (Some(0), 4), "{table}");
    assert!(table.contains("the embedding on the host"), "{table}");
    let (code, json, _) = plan(&[&arguments[..], &["--json"]].concat());
    let json: Value = serde_json::from_str(&json).expect("is JSON");
    assert_eq!((code, &json["plans"][1]["context_tokens"]), (Some(0), &json!(8192)));
    assert!(json["plans"][0]["total_card"].as_u64() <= json["plans"][0]["budget"].as_u64(), "{json}");

    let (code, demo, _) = plan(&[demo_model().to_str().expect("is text"), "--vram", "2"]);
    assert_eq!((code, demo.lines().count()), (Some(0), 3), "{demo}");

    let (code, _, complaint) = plan(&["--config", config, "--vram", "0.5", "--host", "64"]);
    assert_eq!(code, Some(2));
    assert!(
        complaint.contains("the model fits in none of these: a context of 8192 tokens needs at least"),
        "{complaint}"
    );
    let (code, help, _) = plan(&["--help"]);
    assert_eq!(code, Some(0));
    assert!(help.contains("Usage: bulkhead plan") && help.contains("--vram <GIB>"), "{help}");
    assert_eq!(plan(&[]).0, Some(2));
}

#[test]
fn a_llama_is_planned_for_cards_too() {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/configs/llama-3.2-1b.json");
    let config = config.to_str().expect("is text");
    let plan = |arguments: &[&str]| {
        let mut command = Command::new(binary("bulkhead"));
        let common = ["plan", "--config", config, "--format", "nf4", "--host", "16", "--json", "--sequences", "1"];
        let output = command.args(common).args(arguments).env_clear().output().expect("it runs");
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        let json: Value = serde_json::from_slice(&output.stdout).expect("is JSON");
        json["plans"][0].clone()
    };
    let row = plan(&["--vram", "8", "--context", "8192"]);
    // 16 layers of 8 heads of 64, keys and values in two bytes.
    assert_eq!(row["kv"], json!(8192u64 * 16 * 8 * 64 * 2 * 2), "{row}");
    // Tied: one matrix of 128256 rows in bf16, and 973 million weights in 4.127 bits.
    let weights = row["weights_card"].as_f64().expect("a number");
    assert!((weights / (128_256.0 * 2048.0 * 2.0 + 973_078_528.0 * 4.127 / 8.0) - 1.0).abs() < 0.01, "{weights}");
    let row = plan(&["--vram", "1.4", "--context", "8192"]);
    assert!(row["given_up"].to_string().contains("the dense networks of"), "{row}");
}

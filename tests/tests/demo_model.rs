//! The built-in model: what the decoder chooses is what the model's own training program chose in float32.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bulkhead_shared::message::CpuChoice;
use bulkhead_tests::oracle::{self, Ask, evaluate};
use bulkhead_worker::eval::{DecoderPath, WeightChoice};
use serde_json::Value;

/// Bytes of the checkpoint's folder, at most: it is in every clone.
const CHECKPOINT_BYTES_MAX: u64 = 8_000_000;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../worker/demo-model")
}

fn ids(value: &Value) -> Result<Vec<i64>> {
    value.as_array().context("a list of ids")?.iter().map(|id| id.as_i64().context("an id")).collect()
}

#[test]
fn both_decoders_continue_as_the_training_program_does() -> Result<()> {
    let reference = oracle::json(&folder().join("reference.json"))?;
    let cases = reference["cases"].as_array().context("a list of cases")?;
    assert!(!cases.is_empty());
    for case in cases {
        let expected = ids(&case["greedy_ids"])?;
        for decoder_path in [DecoderPath::Reference, DecoderPath::Fast] {
            let ask = Ask {
                decoder_path,
                cpu: CpuChoice::Scalar,
                greedy: expected.len(),
                ..Ask::reference(WeightChoice::File)
            };
            let found = evaluate(&folder().join("checkpoint"), &ids(&case["prompt_ids"])?, ask)?;
            assert_eq!(found.greedy, expected, "{decoder_path:?}: {}", case["text"]);
        }
    }
    Ok(())
}

/// Tokens of the held-out text that are seen together.
const WINDOW: u32 = 512;

fn foreseen(model: &Path, cpu: CpuChoice) -> Result<(f64, f64)> {
    let ask = Ask { decoder_path: DecoderPath::Fast, cpu, ..Ask::reference(WeightChoice::File) };
    let surprise = oracle::foreseen(model, &folder().join("held-out.txt"), WINDOW, ask)?;
    assert!(surprise.tokens > 10_000, "{surprise:?}");
    Ok(surprise.perplexity())
}

#[test]
fn rounding_activations_to_bytes_leaves_the_perplexity_where_it_is() -> Result<()> {
    let model = folder().join("checkpoint");
    let (exact, spread) = foreseen(&model, CpuChoice::Scalar)?;
    let (fast, _) = foreseen(&model, CpuChoice::Auto)?;
    println!(
        "perplexity {exact:.4} ± {spread:.4} by exact products, {fast:.4} by the best path, {:+.3} %",
        100.0 * (fast / exact - 1.0)
    );
    assert!(exact > 1.0 && exact < 10.0, "the model foresees its own kind of text: {exact}");
    assert!((fast / exact - 1.0).abs() < 0.005, "{exact} became {fast}");
    Ok(())
}

#[test]
fn the_checkpoint_is_small() -> Result<()> {
    let mut bytes = 0;
    for file in std::fs::read_dir(folder().join("checkpoint"))? {
        bytes += file?.metadata()?.len();
    }
    assert!(bytes <= CHECKPOINT_BYTES_MAX, "{bytes} bytes");
    Ok(())
}

//! Frequencies against transformers' own.

use anyhow::{Context, Result};
use bulkhead_tests::oracle;
use bulkhead_worker::model::rope::{Llama3, Rope, RopeTable, Scaling, Yarn};
use serde_json::Value;

fn rope(case: &Value) -> Option<Rope> {
    let parameters = &case["rope_parameters"];
    let number = |key: &str| parameters[key].as_f64();
    let original = || usize::try_from(parameters["original_max_position_embeddings"].as_u64()?).ok();
    let scaling = match parameters["rope_type"].as_str()? {
        "default" => Scaling::None,
        "yarn" => Scaling::Yarn(Yarn {
            factor: number("factor")?,
            beta_fast: number("beta_fast").unwrap_or(32.0),
            beta_slow: number("beta_slow").unwrap_or(1.0),
            original_context: original()?,
            is_truncated: parameters["truncate"].as_bool().unwrap_or(true),
            concentration: None,
        }),
        "llama3" => Scaling::Llama3(Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_context: original()?,
        }),
        _ => return None,
    };
    let head_dim = usize::try_from(case["head_dim"].as_u64()?).ok()?;
    Some(Rope { theta: number("rope_theta")?, head_dim, scaling })
}

#[test]
fn frequencies_and_concentration_are_those_of_transformers() -> Result<()> {
    let cases = oracle::json(&oracle::model("rope_tables.json"))?;
    let mut checked = Vec::new();
    for case in cases.as_array().context("a list")? {
        let name = case["name"].as_str().context("a name")?;
        let Some(rope) = rope(case) else { continue };
        let table = RopeTable::new(&rope);
        let expected = case["inv_freq"].as_array().context("frequencies")?;
        assert_eq!(table.inverse_frequencies().len(), expected.len(), "{name}");
        for (found, expected) in table.inverse_frequencies().iter().zip(expected) {
            let expected = expected.as_f64().context("a number")?;
            // transformers rounds the power and the blend to f32 each: a few units in the last place.
            assert!((f64::from(*found) / expected - 1.0).abs() < 1e-6, "{name}: {found} {expected}");
        }
        let expected = case["attention_scaling"].as_f64().context("a number")?;
        assert!((f64::from(table.concentration()) - expected).abs() < 1e-7, "{name}");
        checked.push(name);
    }
    assert_eq!(checked, ["gpt_oss_20b_120b", "llama_3_1", "llama_3_2_1b", "qwen2_yarn4_truncated", "default_10000"]);
    Ok(())
}

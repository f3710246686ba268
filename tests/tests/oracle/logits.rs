//! Logits and greedy continuations of every gpt-oss model of the oracle.

use anyhow::{Context, Result};
use bulkhead_tests::checkpoint::Tensors;
use bulkhead_tests::oracle::{self, Ask, evaluate, relative_error};
use bulkhead_worker::eval::{ValueType, WeightChoice};
use serde_json::Value;

/// The oracle and we both compute in f32; what is left is the order of sums.
const F32_ERROR_MAX: f64 = 1e-4;

/// A quantised weight can fall to the other side of a rounding only if a byte differed; this leaves room for none.
const QUANTISED_ERROR_MAX: f64 = 1e-4;

/// bf16 depends on the order of sums of the machine; the oracle's own error against f32 is up to a few per cent.
const BF16_ERROR_MAX: f64 = 0.05;

/// A prompt of the oracle with what it expects.
pub(crate) struct Case {
    /// The token ids.
    pub(crate) tokens: Vec<i64>,
    /// The positions with expected logits.
    pub(crate) positions: Vec<usize>,
    /// Which prompt it is.
    pub(crate) index: usize,
    expected: Value,
}

/// Reads the prompts of a model with the tensors that it expects.
pub(crate) fn cases(model: &str) -> Result<(Vec<Case>, Tensors)> {
    let folder = oracle::model(model);
    let tensors = Tensors::read(&folder.join("expected.safetensors"))?;
    let expected = oracle::json(&folder.join("expected.json"))?;
    let mut cases = Vec::new();
    for (index, expected) in expected["prompts"].as_array().context("a list of prompts")?.iter().enumerate() {
        let positions = tensors.integers(&format!("p{index}.positions"))?;
        let positions = positions.into_iter().map(usize::try_from).collect::<Result<_, _>>()?;
        let tokens = tensors.integers(&format!("p{index}.input_ids"))?;
        cases.push(Case { tokens, positions, index, expected: expected.clone() });
    }
    assert!(!cases.is_empty());
    Ok((cases, tensors))
}

impl Case {
    /// Gives the logits at the positions that the oracle kept, or at the last ones if it kept fewer of a kind.
    pub(crate) fn kept(&self, logits: &[Vec<f32>], count: usize) -> Vec<Vec<f32>> {
        self.positions[self.positions.len() - count..].iter().map(|position| logits[*position].clone()).collect()
    }

    /// Gives the continuation that the oracle expects under a pointer.
    pub(crate) fn greedy(&self, pointer: &str) -> Result<Vec<i64>> {
        let ids = self.expected.pointer(pointer).and_then(Value::as_array).context("a continuation")?;
        ids.iter().map(|id| id.as_i64().context("an id")).collect()
    }
}

fn check(model: &str) -> Result<()> {
    let (cases, tensors) = cases(model)?;
    for case in cases {
        let label = format!("{model}, prompt {}", case.index);
        let expected = tensors.rows(&format!("p{}.logits_f32", case.index))?;
        let greedy = case.greedy("/greedy_f32/ids")?;
        for quant in [WeightChoice::None, WeightChoice::File] {
            let ask = Ask { greedy: greedy.len(), ..Ask::reference(quant) };
            let found = evaluate(&oracle::model(model), &case.tokens, ask)?;
            assert_eq!(found.logits.len(), case.tokens.len(), "{label}");
            let error = relative_error(&case.kept(&found.logits, expected.len()), &expected);
            assert!(error <= F32_ERROR_MAX, "{label}: {error}");
            assert_eq!(found.greedy, greedy, "{label}");
        }
        check_bf16(model, &case, &tensors)?;
        check_nf4(model, &case, &tensors)?;
    }
    Ok(())
}

fn check_bf16(model: &str, case: &Case, tensors: &Tensors) -> Result<()> {
    let expected = tensors.rows(&format!("p{}.logits_bf16", case.index))?;
    let exact = tensors.rows(&format!("p{}.logits_f32", case.index))?;
    let ask = Ask { dtype: ValueType::Bf16, ..Ask::reference(WeightChoice::File) };
    let found = evaluate(&oracle::model(model), &case.tokens, ask)?;
    let kept = case.kept(&found.logits, expected.len());
    let (to_bf16, to_f32) = (relative_error(&kept, &expected), relative_error(&kept, &exact));
    assert!(to_bf16 <= BF16_ERROR_MAX, "{model}, prompt {}: {to_bf16}", case.index);
    assert!(to_f32 > F32_ERROR_MAX, "{model}, prompt {}: {to_f32}, values were not rounded", case.index);
    Ok(())
}

fn check_nf4(model: &str, case: &Case, tensors: &Tensors) -> Result<()> {
    let label = format!("{model}, prompt {}, nf4", case.index);
    let Ok(expected) = tensors.rows(&format!("p{}.logits_nf4_dq_experts", case.index)) else {
        assert_eq!(case.tokens.len(), 1, "{label}: the oracle leaves out only the shortest prompt");
        return Ok(());
    };
    let greedy = case.greedy("/greedy_nf4/nf4_dq_experts/ids")?;
    let ask = Ask { greedy: greedy.len(), ..Ask::reference(WeightChoice::Nf4) };
    let found = evaluate(&oracle::model(model), &case.tokens, ask)?;
    let error = relative_error(&case.kept(&found.logits, expected.len()), &expected);
    assert!(error <= QUANTISED_ERROR_MAX, "{label}: {error}");
    assert_eq!(found.greedy, greedy, "{label}");
    Ok(())
}

#[test]
fn gptoss_basic() -> Result<()> {
    check("gptoss_basic")
}

#[test]
fn gptoss_long() -> Result<()> {
    check("gptoss_long")
}

#[test]
fn gptoss_mxfp4() -> Result<()> {
    check("gptoss_mxfp4")
}

#[test]
fn gptoss_window_edges() -> Result<()> {
    check("gptoss_window_edges")
}

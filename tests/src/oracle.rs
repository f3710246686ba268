//! The oracle's fixtures, and `eval` on them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bulkhead_shared::message::{CpuChoice, DeviceChoice};
use bulkhead_worker::eval::perplexity::Surprise;
use bulkhead_worker::eval::{DecoderPath, EvalArgs, Task, ValueType, WeightChoice, foresee, run};
use bulkhead_worker::prepare::Prepared;
use bulkhead_worker::sandbox::Sandboxed;
use serde_json::Value;

use crate::checkpoint::Tensors;

/// Gives the path of a fixture.
#[must_use]
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/oracle").join(name)
}

/// Gives the folder of one of the oracle's models.
#[must_use]
pub fn model(name: &str) -> PathBuf {
    fixture("models").join(name)
}

/// Reads a JSON fixture.
///
/// # Errors
/// When it cannot be read.
pub fn json(path: &Path) -> Result<Value> {
    let text = std::fs::read(path).with_context(|| path.display().to_string())?;
    Ok(serde_json::from_slice(&text)?)
}

/// What `eval` wrote.
#[derive(Debug)]
pub struct Evaluated {
    /// One row of logits per token.
    pub logits: Vec<Vec<f32>>,
    /// The continuation.
    pub greedy: Vec<i64>,
}

/// What to ask of `eval` beside model and prompt.
#[derive(Clone, Copy, Debug)]
pub struct Ask {
    /// Which weights.
    pub quant: WeightChoice,
    /// Which precision.
    pub dtype: ValueType,
    /// Who computes.
    pub decoder_path: DecoderPath,
    /// By which instructions what is served computes.
    pub cpu: CpuChoice,
    /// How long a continuation.
    pub greedy: usize,
}

impl Ask {
    /// Asks for the plain decoder in f32 without continuation.
    #[must_use]
    pub fn reference(quant: WeightChoice) -> Ask {
        Ask { quant, dtype: ValueType::F32, decoder_path: DecoderPath::Reference, cpu: CpuChoice::Auto, greedy: 0 }
    }
}

/// Runs `eval` on a prompt through its files.
///
/// # Errors
/// What `eval` reports.
pub fn evaluate(model: &Path, tokens: &[i64], ask: Ask) -> Result<Evaluated> {
    let folder = tempfile::tempdir()?;
    let (input, output) = (folder.path().join("in.json"), folder.path().join("out.safetensors"));
    std::fs::write(&input, serde_json::json!({ "input_ids": tokens }).to_string())?;
    let Ask { quant, dtype, decoder_path, cpu, greedy } = ask;
    let (model, device) = (model.to_owned(), DeviceChoice::Cpu);
    let task = Task { input: Some(input), output: Some(output.clone()), perplexity: None };
    let args = EvalArgs { model, task, window: 2048, quant, dtype, decoder_path, device, cpu, greedy };
    run(&Sandboxed::without_walls(), Prepared::start(device, cpu, 0)?, &args, &mut std::io::sink())?;
    let tensors = Tensors::read(&output)?;
    let greedy = if greedy == 0 { Vec::new() } else { tensors.integers("greedy")? };
    Ok(Evaluated { logits: tensors.rows("logits")?, greedy })
}

/// Measures how a model foresees a text.
///
/// # Errors
/// What `eval` reports.
pub fn foreseen(model: &Path, text: &Path, window: u32, ask: Ask) -> Result<Surprise> {
    let Ask { quant, dtype, decoder_path, cpu, greedy } = ask;
    let (model, device) = (model.to_owned(), DeviceChoice::Cpu);
    let task = Task { perplexity: Some(text.to_owned()), ..Task::default() };
    let args = EvalArgs { model, task, window, quant, dtype, decoder_path, device, cpu, greedy };
    Ok(foresee(Prepared::start(device, cpu, 0)?, &args, text)?)
}

/// Gives |found - expected| / |expected| over all rows.
#[must_use]
pub fn relative_error(found: &[Vec<f32>], expected: &[Vec<f32>]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let (mut difference, mut norm) = (0.0, 0.0);
    for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
        difference += (f64::from(*found) - f64::from(*expected)).powi(2);
        norm += f64::from(*expected).powi(2);
    }
    (difference / norm).sqrt()
}

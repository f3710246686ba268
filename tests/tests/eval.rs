//! `eval` as a command: what it refuses, and with which words; and that a long prompt stays quick.

use std::path::{Path, PathBuf};

use anyhow::Result;
use bulkhead_shared::message::{CpuChoice, DeviceChoice};
use bulkhead_tests::oracle::{self, Ask, evaluate};
use bulkhead_worker::eval::{self, DecoderPath, EvalArgs, EvalError, Task, ValueType, WeightChoice};
use bulkhead_worker::prepare::Prepared;
use bulkhead_worker::sandbox::Sandboxed;

/// Runs the command in this process, which has no walls.
#[expect(clippy::result_large_err, reason = "it is the command's own error")]
fn run(args: &EvalArgs) -> Result<(), EvalError> {
    eval::run(&Sandboxed::without_walls(), Prepared::start(args.device, args.cpu, 0)?, args, &mut std::io::sink())
}

struct Case {
    folder: tempfile::TempDir,
    args: EvalArgs,
}

impl Case {
    fn new(input: &str) -> Result<Case> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("in.json");
        std::fs::write(&path, input)?;
        let args = EvalArgs {
            model: oracle::model("gptoss_window_edges"),
            task: Task { input: Some(path), output: Some(folder.path().join("out.safetensors")), perplexity: None },
            window: 2048,
            quant: WeightChoice::File,
            dtype: ValueType::F32,
            decoder_path: DecoderPath::Reference,
            device: DeviceChoice::Cpu,
            cpu: CpuChoice::Auto,
            greedy: 0,
        };
        Ok(Case { folder, args })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

#[track_caller]
fn refused(args: &EvalArgs, words: &[&str]) -> EvalError {
    let error = run(args).expect_err("refused");
    let text = error.to_string();
    for words in words {
        assert!(text.contains(words), "{words:?} is not in {text:?}");
    }
    let output = args.task.output.as_deref();
    assert!(!output.is_some_and(Path::is_file), "nothing is written on an error");
    error
}

#[test]
fn inputs_that_are_none() -> Result<()> {
    for input in ["", "[1]", "{}", r#"{"input_ids":[-1]}"#, r#"{"input_ids":[1.5]}"#, r#"{"input_ids":[4294967296]}"#] {
        let case = Case::new(input)?;
        assert!(matches!(refused(&case.args, &["in.json", "input_ids"]), EvalError::Input { .. }), "{input}");
    }
    let case = Case::new(r#"{"input_ids":[]}"#)?;
    assert!(matches!(refused(&case.args, &["in.json", "empty"]), EvalError::NoTokens { .. }));
    let mut case = Case::new(r#"{"input_ids":[447]}"#)?;
    run(&case.args)?;
    std::fs::remove_file(case.path("out.safetensors"))?;
    case.args.task.input = Some(case.path("nowhere.json"));
    assert!(matches!(refused(&case.args, &["nowhere.json"]), EvalError::Checkpoint(_)));
    let case = Case::new(r#"{"input_ids":[1,448]}"#)?;
    let error = refused(&case.args, &["in.json", "token id 448 at index 1", "448"]);
    assert!(matches!(error, EvalError::NotInVocabulary { token: 448, index: 1, vocab_size: 448, .. }));
    Ok(())
}

#[test]
fn more_tokens_than_the_limit() -> Result<()> {
    let mut case = Case::new(r#"{"input_ids":[1]}"#)?;
    case.args.greedy = usize::MAX;
    assert!(matches!(refused(&case.args, &["exceed the limit"]), EvalError::TooManyTokens { .. }));
    case.args.greedy = 1 << 20;
    let error = refused(&case.args, &["1048577 tokens"]);
    assert!(matches!(error, EvalError::TooManyTokens { tokens: 1_048_577, max: 1_048_576 }));
    Ok(())
}

#[test]
fn outputs_that_cannot_be_written() -> Result<()> {
    let mut case = Case::new(r#"{"input_ids":[1]}"#)?;
    for output in [case.path("nowhere").join("out.safetensors"), case.folder.path().to_owned()] {
        case.args.task.output = Some(output);
        assert!(matches!(refused(&case.args, &["cannot be written"]), EvalError::Output { .. }));
    }
    Ok(())
}

#[test]
fn models_that_are_none() -> Result<()> {
    let mut case = Case::new(r#"{"input_ids":[1]}"#)?;
    case.args.model = Path::new("/nonexistent").to_owned();
    assert!(matches!(refused(&case.args, &["/nonexistent/config.json"]), EvalError::Config(_)));
    Ok(())
}

#[test]
fn a_damaged_weight_is_noticed_in_the_logits() -> Result<()> {
    let mut case = Case::new(r#"{"input_ids":[5]}"#)?;
    let model = case.path("model");
    std::fs::create_dir(&model)?;
    let source = oracle::model("gptoss_window_edges");
    std::fs::copy(source.join("config.json"), model.join("config.json"))?;
    let mut tensors = bulkhead_tests::checkpoint::Tensors::read(&source.join("model.safetensors"))?;
    let head = tensors.0.get_mut("lm_head.weight").ok_or_else(|| anyhow::anyhow!("no output matrix"))?;
    let row_bytes = head.bytes.len() / 448;
    head.bytes[3 * row_bytes..3 * row_bytes + 2].copy_from_slice(&[0xc0, 0x7f]);
    tensors.write(&model.join("model.safetensors"))?;
    case.args.model = model;
    let error = refused(&case.args, &["logit 3 at position 0 is NaN"]);
    assert!(matches!(error, EvalError::NotFinite { token: 3, position: 0, .. }));
    Ok(())
}

#[test]
fn a_prompt_of_thousands_of_tokens() -> Result<()> {
    let tokens: Vec<i64> = (0..2500).map(|i| i * 7 % 440).collect();
    let found = evaluate(&oracle::model("gptoss_long"), &tokens, Ask::reference(WeightChoice::File))?;
    assert_eq!(found.logits.len(), tokens.len());
    // What comes later cannot change what came before: the first tokens alone give the same logits, up to the order of
    // sums in matrix products of another size.
    let start = evaluate(&oracle::model("gptoss_long"), &tokens[..300], Ask::reference(WeightChoice::File))?;
    let error = oracle::relative_error(&found.logits[..300], &start.logits);
    assert!(error < 1e-5, "{error}");
    Ok(())
}

#[test]
fn texts_that_cannot_be_foreseen() -> Result<()> {
    let mut case = Case::new(r#"{"input_ids":[1]}"#)?;
    let input = case.args.task.input.take();
    case.args.task = Task { perplexity: input, ..Task::default() };
    assert!(matches!(refused(&case.args, &["in.json", "at least two"]), EvalError::TooFewTokens { tokens: 1, .. }));
    std::fs::write(case.path("in.json"), r#"{"input_ids":[1,448]}"#)?;
    assert!(matches!(refused(&case.args, &["token id 448"]), EvalError::NotInVocabulary { .. }));
    std::fs::write(case.path("text.txt"), [0xff, 0xfe, 0x41])?;
    case.args.task.perplexity = Some(case.path("text.txt"));
    assert!(matches!(refused(&case.args, &["text.txt", "UTF-8"]), EvalError::NotText { .. }));
    case.args.greedy = 3;
    assert!(matches!(refused(&case.args, &["--greedy"]), EvalError::GreedyWithoutPrompt));
    case.args.task = Task::default();
    assert!(matches!(refused(&case.args, &["--perplexity"]), EvalError::NoTask));
    Ok(())
}

#[test]
fn perplexity_follows_from_the_logits() -> Result<()> {
    let tokens: Vec<i64> = (0..300).map(|i| i * 7 % 440).collect();
    let (model, ask) = (oracle::model("gptoss_window_edges"), Ask::reference(WeightChoice::File));
    let (mut sum, mut count) = (0.0, 0);
    for window in tokens.chunks(200) {
        let found = evaluate(&model, window, ask)?;
        for (logits, next) in found.logits.iter().zip(&window[1..]) {
            let powers: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
            sum += powers.ln() - f64::from(logits[usize::try_from(*next)?]);
            count += 1;
        }
    }
    let case = Case::new(&serde_json::json!({ "input_ids": tokens }).to_string())?;
    for decoder_path in [DecoderPath::Reference, DecoderPath::Fast] {
        let ask = Ask { decoder_path, cpu: CpuChoice::Scalar, ..ask };
        let found = oracle::foreseen(&model, &case.path("in.json"), 200, ask)?;
        assert_eq!(found.tokens, count);
        // The served decoder keeps keys and values in bf16, which has eight bits.
        let expected = sum / count as f64;
        assert!((found.mean() / expected - 1.0).abs() < 2e-3, "{decoder_path:?}: {} and {expected}", found.mean());
    }
    Ok(())
}

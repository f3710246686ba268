//! Logits and greedy continuations of every Llama of the oracle: tied and untied, sharded, stretched as Llama 3 is, and
//! saved by bitsandbytes in 4 bits.

use anyhow::{Context, Result};
use bulkhead_shared::message::CpuChoice;
use bulkhead_tests::checkpoint::Tensors;
use bulkhead_tests::oracle::{self, Ask, evaluate, relative_error};
use bulkhead_worker::checkpoint::Checkpoint;
use bulkhead_worker::eval::{DecoderPath, ValueType, WeightChoice};
use bulkhead_worker::model::config::Config;
use bulkhead_worker::model::reference::{Precision, Reference};
use bulkhead_worker::model::weights::{Quantize, load};
use bulkhead_worker::quant::Matrix;

use crate::logits::{Case, cases};
use crate::served::ALIKE_ERROR_MAX;

/// The oracle and we both compute in f32; what is left is the order of sums.
const F32_ERROR_MAX: f64 = 1e-4;

/// bf16 depends on the order of sums of the machine; the oracle's own error against f32 is up to a few per cent.
const BF16_ERROR_MAX: f64 = 0.05;

const MODELS: [&str; 2] = ["llama_tied", "llama3_untied_sharded"];

/// Saved by bitsandbytes, with one level of scales and with two.
const IN_FOUR_BITS: [&str; 2] = ["llama_bnb_nf4", "llama_bnb_nf4_dq"];

fn check(model: &str, case: &Case, tensors: &Tensors, quant: WeightChoice, variant: &str) -> Result<()> {
    let label = format!("{model}, prompt {}, {variant}", case.index);
    let expected = tensors.rows(&format!("p{}.logits_{variant}", case.index))?;
    let pointer = if variant == "f32" { "/greedy_f32/ids".to_owned() } else { format!("/greedy_nf4/{variant}/ids") };
    let greedy = case.greedy(&pointer)?;
    let ask = Ask { greedy: greedy.len(), ..Ask::reference(quant) };
    let found = evaluate(&oracle::model(model), &case.tokens, ask)?;
    let error = relative_error(&case.kept(&found.logits, expected.len()), &expected);
    println!("{label}: {error:.1e}");
    assert!(error <= F32_ERROR_MAX, "{label}: {error}");
    assert_eq!(found.greedy, greedy, "{label}");
    Ok(())
}

#[test]
fn logits_and_continuations_are_those_of_transformers() -> Result<()> {
    for model in MODELS {
        let (cases, tensors) = cases(model)?;
        for case in cases {
            check(model, &case, &tensors, WeightChoice::File, "f32")?;
            check(model, &case, &tensors, WeightChoice::Nf4, "nf4_dq")?;

            let expected = tensors.rows(&format!("p{}.logits_bf16", case.index))?;
            let ask = Ask { dtype: ValueType::Bf16, ..Ask::reference(WeightChoice::File) };
            let found = evaluate(&oracle::model(model), &case.tokens, ask)?;
            let error = relative_error(&case.kept(&found.logits, expected.len()), &expected);
            assert!(error <= BF16_ERROR_MAX, "{model}, prompt {}, bf16: {error}", case.index);
        }
    }
    Ok(())
}

#[test]
fn the_config_of_transformers_5_gives_the_same_logits() -> Result<()> {
    let (source, target) = (oracle::model("llama3_untied_sharded"), tempfile::tempdir()?);
    for entry in std::fs::read_dir(&source)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("model")) {
            std::os::unix::fs::symlink(&path, target.path().join(path.file_name().context("a name")?))?;
        }
    }
    std::fs::copy(source.join("config.transformers5.json"), target.path().join("config.json"))?;
    let (cases, _) = cases("llama3_untied_sharded")?;
    let ask = Ask::reference(WeightChoice::File);
    let expected = evaluate(&source, &cases[0].tokens, ask)?;
    assert_eq!(evaluate(target.path(), &cases[0].tokens, ask)?.logits, expected.logits);
    Ok(())
}

#[test]
fn four_bits_of_bitsandbytes_give_its_logits() -> Result<()> {
    for name in IN_FOUR_BITS {
        let folder = oracle::fixture("nf4").join(name);
        let expected = oracle::json(&folder.join("expected.json"))?;
        let integers = |value: &serde_json::Value| -> Result<Vec<i64>> {
            value.as_array().context("a list")?.iter().map(|id| id.as_i64().context("an id")).collect()
        };
        let (tokens, greedy) = (integers(&expected["input_ids"])?, integers(&expected["greedy_nf4_f32"]["ids"])?);
        let logits = Tensors::read(&folder.join("expected.safetensors"))?.rows("logits_nf4_f32")?;
        let ask = Ask { greedy: greedy.len(), ..Ask::reference(WeightChoice::File) };
        let found = evaluate(&folder, &tokens, ask)?;
        let error = relative_error(&found.logits, &logits);
        println!("{name}: {error:.1e}");
        assert!(error <= F32_ERROR_MAX, "{name}: {error}");
        assert_eq!(found.greedy, greedy, "{name}");

        let config = Config::read(&folder)?;
        let weights = load(&Checkpoint::open(&folder)?, &config, Quantize::File, &mut |_, _, _| {})?;
        for layer in &weights.layers {
            let attention = [&layer.attention.q, &layer.attention.o].into_iter();
            for linear in attention.chain(layer.mlp.linears()) {
                assert!(matches!(linear.weight, Matrix::Nf4(_)), "{name}: a matrix is kept in 4 bits");
            }
        }
        assert_eq!(weights.format_name(), "nf4");
    }
    Ok(())
}

#[test]
fn the_served_decoder_computes_what_the_plain_one_does() -> Result<()> {
    let four_bits = IN_FOUR_BITS.map(|name| oracle::fixture("nf4").join(name));
    for folder in MODELS.map(oracle::model).into_iter().chain(four_bits) {
        let config = Config::read(&folder)?;
        let weights = load(&Checkpoint::open(&folder)?, &config, Quantize::File, &mut |_, _, _| {})?;
        let tokens: Vec<i64> = (3..90).map(|token| token * 7 % 300).collect();
        let ids: Vec<u32> = tokens.iter().map(|token| *token as u32).collect();
        let expected = Reference::new(&config, &weights, Precision::F32WithBf16Cache).logits(&ids)?.to_vec2::<f32>()?;
        let ask = Ask { decoder_path: DecoderPath::Fast, cpu: CpuChoice::Scalar, ..Ask::reference(WeightChoice::File) };
        let error = relative_error(&evaluate(&folder, &tokens, ask)?.logits, &expected);
        println!("{}: {error:.1e} from the plain decoder", folder.display());
        assert!(error <= ALIKE_ERROR_MAX, "{}: {error}", folder.display());
    }
    Ok(())
}

#[test]
fn a_tied_output_matrix_is_the_embedding_itself() -> Result<()> {
    for (name, is_tied) in [("llama_tied", true), ("llama3_untied_sharded", false)] {
        let folder = oracle::model(name);
        let config = Config::read(&folder)?;
        let checkpoint = Checkpoint::open(&folder)?;
        let weights = load(&checkpoint, &config, Quantize::File, &mut |_, _, _| {})?;
        assert_eq!(weights.is_tied(), is_tied, "{name}");
        // All but the norms, each a vector of the width of the stream.
        let norms = (2 * config.layers.len() + 1) * config.hidden_size * 2;
        assert_eq!(weights.stored_bytes(), checkpoint.tensor_bytes() - norms as u64, "{name}: each matrix counts once");
    }
    Ok(())
}

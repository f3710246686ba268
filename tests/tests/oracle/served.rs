//! The decoder that is served against the plain one, and against the oracle.

use anyhow::Result;
use bulkhead_shared::message::CpuChoice;
use bulkhead_tests::oracle::{self, Ask, evaluate, relative_error};
use bulkhead_worker::checkpoint::Checkpoint;
use bulkhead_worker::eval::{DecoderPath, WeightChoice};
use bulkhead_worker::model::config::Config;
use bulkhead_worker::model::reference::{Precision, Reference};
use bulkhead_worker::model::weights::{Quantize, load};

use crate::logits::cases;

/// With keys and values rounded alike and exact products only the order of sums differs; where that moves a key or value to the other side
/// of a rounding, it is off by 2^-8 of itself.
pub(crate) const ALIKE_ERROR_MAX: f64 = 5e-4;

const MODELS: [&str; 4] = ["gptoss_basic", "gptoss_long", "gptoss_mxfp4", "gptoss_window_edges"];

#[test]
fn the_served_decoder_computes_what_the_plain_one_does() -> Result<()> {
    for model in MODELS {
        let folder = oracle::model(model);
        let config = Config::read(&folder)?;
        let weights = load(&Checkpoint::open(&folder)?, &config, Quantize::File, &mut |_, _, _| {})?;
        for case in cases(model)?.0 {
            let tokens: Vec<u32> = case.tokens.iter().map(|token| *token as u32).collect();
            let mut plain = Reference::new(&config, &weights, Precision::F32WithBf16Cache);
            let expected = plain.logits(&tokens)?.to_vec2::<f32>()?;
            let ask =
                Ask { decoder_path: DecoderPath::Fast, cpu: CpuChoice::Scalar, ..Ask::reference(WeightChoice::File) };
            let served = evaluate(&folder, &case.tokens, ask)?;
            let error = relative_error(&served.logits, &expected);
            println!("{model}, prompt {}: {error:.1e} from the plain decoder", case.index);
            assert!(error <= ALIKE_ERROR_MAX, "{model}, prompt {}: {error}", case.index);
        }
    }
    Ok(())
}

/// A product of bytes is off by half a step of 1/127 of each block's largest factors at most, and by less than a hundredth of
/// itself as a rule, for errors have either sign; a few layers add theirs up. Where two experts are nearly equal to the router
/// a row may go to the other one, so this is for the row in the middle.
const BYTES_ERROR_MAX: f64 = 0.08;

#[test]
fn the_best_path_stays_close_to_exact_products() -> Result<()> {
    for model in MODELS {
        let folder = oracle::model(model);
        let mut errors = Vec::new();
        for case in cases(model)?.0 {
            let ask = Ask { decoder_path: DecoderPath::Fast, ..Ask::reference(WeightChoice::Nf4) };
            let exact = evaluate(&folder, &case.tokens, Ask { cpu: CpuChoice::Scalar, ..ask })?;
            let fast = evaluate(&folder, &case.tokens, Ask { cpu: CpuChoice::Auto, ..ask })?;
            let rows = fast.logits.chunks(1).zip(exact.logits.chunks(1));
            errors.extend(rows.map(|(fast, exact)| relative_error(fast, exact)));
        }
        errors.sort_by(f64::total_cmp);
        let (middle, most) = (errors[errors.len() / 2], errors[errors.len() - 1]);
        println!("{model}: {middle:.1e} from exact products in the middle, {most:.1e} at most");
        assert!(middle <= BYTES_ERROR_MAX, "{model}: {middle}");
    }
    Ok(())
}

#[test]
fn the_served_decoder_stays_close_to_the_oracle() -> Result<()> {
    for model in MODELS {
        let (cases, tensors) = cases(model)?;
        for case in cases {
            let ask =
                Ask { decoder_path: DecoderPath::Fast, cpu: CpuChoice::Scalar, ..Ask::reference(WeightChoice::None) };
            let served = evaluate(&oracle::model(model), &case.tokens, ask)?;
            let expected = tensors.rows(&format!("p{}.logits_f32", case.index))?;
            let error = relative_error(&case.kept(&served.logits, expected.len()), &expected);
            println!("{model}, prompt {}: {error:.1e} from the oracle", case.index);
            // No more than the size of what the reference implementation itself loses in bf16.
            let allowed = relative_error(&tensors.rows(&format!("p{}.logits_bf16", case.index))?, &expected);
            assert!(error <= 2.0 * allowed, "{model}, prompt {}: {error}, in bf16 {allowed}", case.index);
        }
    }
    Ok(())
}

//! The same model in every layout of NF4, and with either style of config, gives the same logits.

use std::path::Path;

use anyhow::Result;
use bulkhead_tests::checkpoint::{Experts, write_nf4};
use bulkhead_tests::oracle::{self, Ask, evaluate, relative_error};
use bulkhead_worker::eval::WeightChoice;
use bulkhead_worker::quant::Statistics;

use crate::logits::cases;

fn check(model: &str, experts: Experts, statistics: Statistics) -> Result<()> {
    let folder = tempfile::tempdir()?;
    write_nf4(&oracle::model(model), folder.path(), experts, statistics)?;
    let (cases, tensors) = cases(model)?;
    for case in cases {
        let variant = if statistics == Statistics::Nested { "logits_nf4_dq_experts" } else { "logits_nf4_experts" };
        let Ok(expected) = tensors.rows(&format!("p{}.{variant}", case.index)) else { continue };
        let label = format!("{model}, prompt {}, {experts:?}, {statistics:?}", case.index);
        let found = evaluate(folder.path(), &case.tokens, Ask::reference(WeightChoice::File))?;
        let error = relative_error(&case.kept(&found.logits, expected.len()), &expected);
        assert!(error <= 1e-4, "{label}: {error}, although the weights are the same to the bit");
        if statistics == Statistics::Nested {
            let on_the_way = evaluate(&oracle::model(model), &case.tokens, Ask::reference(WeightChoice::Nf4))?;
            assert_eq!(found.logits, on_the_way.logits, "{label}");
        }
        for choice in [WeightChoice::None, WeightChoice::Nf4] {
            let again = evaluate(folder.path(), &case.tokens, Ask::reference(choice))?;
            assert_eq!(found.logits, again.logits, "{label}, {choice:?}");
        }
    }
    Ok(())
}

#[test]
fn one_linear_per_expert_nested() -> Result<()> {
    check("gptoss_basic", Experts::Single, Statistics::Nested)
}

#[test]
fn one_linear_per_expert_plain() -> Result<()> {
    check("gptoss_basic", Experts::Single, Statistics::Plain)
}

#[test]
fn fused_experts_nested() -> Result<()> {
    check("gptoss_basic", Experts::Fused, Statistics::Nested)
}

#[test]
fn fused_experts_plain() -> Result<()> {
    check("gptoss_basic", Experts::Fused, Statistics::Plain)
}

#[test]
fn unequal_widths() -> Result<()> {
    check("gptoss_mxfp4", Experts::Single, Statistics::Nested)?;
    check("gptoss_mxfp4", Experts::Fused, Statistics::Nested)
}

#[test]
fn the_config_of_transformers_5_gives_the_same_logits() -> Result<()> {
    for model in ["gptoss_basic", "gptoss_mxfp4", "gptoss_window_edges"] {
        let (source, target) = (oracle::model(model), tempfile::tempdir()?);
        for entry in std::fs::read_dir(&source)? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("model")) {
                link(&path, target.path())?;
            }
        }
        std::fs::copy(source.join("config.transformers5.json"), target.path().join("config.json"))?;
        let (cases, _) = cases(model)?;
        let ask = Ask::reference(WeightChoice::File);
        let expected = evaluate(&source, &cases[0].tokens, ask)?;
        assert_eq!(evaluate(target.path(), &cases[0].tokens, ask)?.logits, expected.logits, "{model}");
    }
    Ok(())
}

/// Links as a hub cache does, so that following links is tested as well.
fn link(file: &Path, folder: &Path) -> Result<()> {
    let name = file.file_name().ok_or_else(|| anyhow::anyhow!("{} has no name", file.display()))?;
    Ok(std::os::unix::fs::symlink(file, folder.join(name))?)
}

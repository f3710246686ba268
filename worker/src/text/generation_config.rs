//! What a model says about its own generation: which tokens end it, and how it likes to be sampled.
//!
//! Owns: generation_config.json, and the `eos_token_id` of config.json where the former has none. Refuses values out of
//! their bounds, with the file and key.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::text::error::TextError;
use crate::text::files::read_capped;

/// Bytes of a configuration file, at most.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// A model's settings for generation.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationConfig {
    /// The tokens that end an answer. May be empty: then only limits and stop strings end it.
    pub eos: Vec<u32>,
    /// The sampling of a request that does not choose its own.
    pub defaults: Defaults,
}

/// The sampling that a model has where a request does not choose.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Defaults {
    /// 0 picks the most likely token.
    pub temperature: f32,
    /// 0 keeps all.
    pub top_k: u32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// 1 changes nothing.
    pub repetition_penalty: f32,
}

impl Default for Defaults {
    /// Samples from the model's distribution as it is.
    fn default() -> Defaults {
        Defaults { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

#[derive(Debug, Default, Deserialize)]
struct File {
    eos_token_id: Option<Ids>,
    do_sample: Option<bool>,
    temperature: Option<f64>,
    top_k: Option<f64>,
    top_p: Option<f64>,
    min_p: Option<f64>,
    repetition_penalty: Option<f64>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl GenerationConfig {
    /// Reads the settings of a model folder; a missing file sets nothing.
    ///
    /// # Errors
    /// `Read`, `FileTooLarge`, `ConfigSyntax` for a file that is no configuration; `ConfigValue` for a value out of bounds.
    pub fn open(dir: &Path) -> Result<GenerationConfig, TextError> {
        let (path, file) = read(dir.join("generation_config.json"))?;
        let defaults = defaults(&file, &path)?;
        let eos = match file.eos_token_id {
            Some(eos) => Some(eos),
            None => read(dir.join("config.json"))?.1.eos_token_id,
        };
        let eos = match eos {
            Some(Ids::One(id)) => vec![id],
            Some(Ids::Many(ids)) => ids,
            None => Vec::new(),
        };
        Ok(GenerationConfig { eos, defaults })
    }
}

fn read(path: PathBuf) -> Result<(PathBuf, File), TextError> {
    match read_capped(&path, FILE_BYTES_MAX)? {
        Some(content) => match serde_json::from_slice(&content) {
            Ok(file) => Ok((path, file)),
            Err(source) => Err(TextError::ConfigSyntax { path, source }),
        },
        None => Ok((path, File::default())),
    }
}

/// Takes the sampling defaults. A model that says not to sample is greedy by default.
fn defaults(file: &File, path: &Path) -> Result<Defaults, TextError> {
    let neutral = Defaults::default();
    let checked = |name, value: Option<f64>, is_sound: fn(f64) -> bool, bounds| match value {
        Some(value) if !is_sound(value) => Err(TextError::ConfigValue { path: path.to_owned(), name, value, bounds }),
        other => Ok(other),
    };
    let temperature = checked("temperature", file.temperature, |v| (0.0..=100.0).contains(&v), "from 0 to 100")?;
    let is_count = |v: f64| v.fract() == 0.0 && (0.0..=f64::from(u32::MAX)).contains(&v);
    let top_k = checked("top_k", file.top_k, is_count, "a number of tokens")?;
    let top_p = checked("top_p", file.top_p, |v| v > 0.0 && v <= 1.0, "above 0 and at most 1")?;
    let min_p = checked("min_p", file.min_p, |v| (0.0..=1.0).contains(&v), "from 0 to 1")?;
    let is_penalty = |v: f64| v > 0.0 && v <= 100.0;
    let penalty = checked("repetition_penalty", file.repetition_penalty, is_penalty, "above 0 and at most 100")?;
    let number = |value: Option<f64>, neutral: f32| value.map_or(neutral, |value| value as f32);
    Ok(Defaults {
        temperature: if file.do_sample == Some(false) { 0.0 } else { number(temperature, neutral.temperature) },
        top_k: top_k.map_or(neutral.top_k, |count| count as u32),
        top_p: number(top_p, neutral.top_p),
        min_p: number(min_p, neutral.min_p),
        repetition_penalty: number(penalty, neutral.repetition_penalty),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(generation: Option<&str>, config: Option<&str>) -> Result<GenerationConfig, TextError> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        for (name, content) in [("generation_config.json", generation), ("config.json", config)] {
            if let Some(content) = content {
                std::fs::write(dir.path().join(name), content).expect("writable");
            }
        }
        GenerationConfig::open(dir.path())
    }

    #[test]
    fn the_end_tokens_are_found_where_they_stand() {
        let cases: [(Option<&str>, Option<&str>, &[u32]); 8] = [
            (None, None, &[]),
            (Some(r#"{"eos_token_id": 7}"#), None, &[7]),
            (Some(r#"{"eos_token_id": [200002, 199999]}"#), Some(r#"{"eos_token_id": 1}"#), &[200_002, 199_999]),
            (Some(r#"{"eos_token_id": null}"#), Some(r#"{"eos_token_id": 1}"#), &[1]),
            (Some("{}"), Some(r#"{"eos_token_id": [1, 2]}"#), &[1, 2]),
            (None, Some(r#"{"eos_token_id": 3, "hidden_size": 64}"#), &[3]),
            (None, Some("{}"), &[]),
            (Some(r#"{"eos_token_id": []}"#), Some(r#"{"eos_token_id": 3}"#), &[]),
        ];
        for (generation, config, eos) in cases {
            assert_eq!(open(generation, config).expect("sound").eos, eos, "{generation:?} {config:?}");
        }
    }

    #[test]
    fn the_defaults_are_the_models_or_neutral() {
        let of = |json: &str| open(Some(json), None).expect("sound").defaults;
        let neutral = Defaults::default();
        assert_eq!(of("{}"), neutral);
        assert_eq!(of(r#"{"do_sample": true, "pad_token_id": 3}"#), neutral);
        assert_eq!(of(r#"{"do_sample": false, "temperature": 0.6}"#), Defaults { temperature: 0.0, ..neutral });
        assert_eq!(
            of(r#"{"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.1}"#),
            Defaults { temperature: 0.6, top_k: 20, top_p: 0.95, min_p: 0.05, repetition_penalty: 1.1 }
        );
        assert_eq!(of(r#"{"temperature": 1, "top_p": 1, "top_k": 0}"#), neutral);
    }

    #[test]
    fn nonsense_names_its_file_and_key() {
        for json in ["", "[]", "{", r#"{"eos_token_id": "x"}"#, r#"{"eos_token_id": -1}"#, r#"{"top_p": "1"}"#] {
            let error = open(Some(json), None).expect_err(json);
            assert!(matches!(&error, TextError::ConfigSyntax { path, .. } if path.ends_with("generation_config.json")));
        }
        let cases = [
            ("temperature", "-0.1"),
            ("temperature", "1e9"),
            ("top_k", "-1"),
            ("top_k", "1.5"),
            ("top_p", "0"),
            ("top_p", "1.1"),
            ("min_p", "-1"),
            ("min_p", "2"),
            ("repetition_penalty", "0"),
        ];
        for (key, value) in cases {
            let error = open(Some(&format!(r#"{{"{key}": {value}}}"#)), None).expect_err(key);
            assert!(matches!(&error, TextError::ConfigValue { name, .. } if *name == key), "{error}");
        }
        assert!(matches!(open(None, Some("{")), Err(TextError::ConfigSyntax { .. })));
    }
}

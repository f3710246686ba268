//! How positions are encoded: the keys around `rope_theta`, in the styles that transformers has written.

use super::{CONTEXT_MAX, Checker, ConfigError, RawRope};
use crate::model::config::Architecture;
use crate::model::rope::{Llama3, Rope, Scaling, Yarn};

/// Bounds of YaRN's blend that config.json may leave out.
const BETA_FAST: f64 = 32.0;
const BETA_SLOW: f64 = 1.0;

/// Parameters that would change the frequencies of some other model.
const UNKNOWN: [&str; 3] = ["mscale", "mscale_all_dim", "partial_rotary_factor"];

/// Gives the base that transformers takes where config.json has none.
const fn theta(architecture: Architecture) -> f64 {
    match architecture {
        Architecture::GptOss => 150_000.0,
        Architecture::Llama => 10_000.0,
    }
}

impl Checker<'_> {
    pub(super) fn rope(&self, architecture: Architecture, head_dim: usize) -> Result<Rope, ConfigError> {
        let raw = self.raw;
        let parameters = match (&raw.rope_parameters, &raw.rope_scaling) {
            (Some(parameters), None) => parameters,
            (None, Some(scaling)) => scaling,
            // A Llama's positions are plain then; a gpt-oss's would be stretched by a default of transformers.
            (None, None) if architecture == Architecture::Llama => &None,
            (None, None) => return Err(self.missing("rope_scaling")),
            // Null beside the other says nothing.
            (Some(parameters), Some(None)) => parameters,
            (Some(_), Some(Some(_))) => {
                return Err(self.contradiction(("rope_parameters", &"present"), ("rope_scaling", &"present")));
            }
        };
        let inner_theta = parameters.as_ref().and_then(|rope| rope.rope_theta);
        let base = self.agreed(("rope_theta", raw.rope_theta), ("rope_parameters.rope_theta", inner_theta))?;
        let base = base.unwrap_or(theta(architecture));
        if !(base.is_finite() && base > 1.0) {
            return Err(self.invalid("rope_theta", &base, "a number above 1"));
        }
        let scaling = match parameters {
            None => Scaling::None,
            Some(rope) => self.scaling(rope)?,
        };
        Ok(Rope { theta: base, head_dim, scaling })
    }

    fn scaling(&self, rope: &RawRope) -> Result<Scaling, ConfigError> {
        let kind = rope.rope_type.as_deref().or(rope.old_type.as_deref());
        let kind = self.required("rope_type", kind)?;
        let is_set = |key: &&str| {
            let neutral = if *key == "partial_rotary_factor" { Some(1.0) } else { None };
            rope.others
                .get(*key)
                .is_some_and(|value| !value.is_null() && (neutral.is_none() || value.as_f64() != neutral))
        };
        if let Some(key) = UNKNOWN.into_iter().find(is_set) {
            return Err(self.not_supported("the rope parameter", key, "those of gpt-oss and Llama"));
        }
        match kind {
            "default" => Ok(Scaling::None),
            "yarn" => Ok(Scaling::Yarn(self.yarn(rope)?)),
            "llama3" => Ok(Scaling::Llama3(self.llama3(rope)?)),
            other => Err(self.not_supported("rope_type", other, "default, yarn and llama3")),
        }
    }

    fn yarn(&self, rope: &RawRope) -> Result<Yarn, ConfigError> {
        let factor = self.rope_factor(rope)?;
        let beta_fast = self.positive("beta_fast", rope.beta_fast.unwrap_or(BETA_FAST))?;
        let beta_slow = self.positive("beta_slow", rope.beta_slow.unwrap_or(BETA_SLOW))?;
        if beta_slow > beta_fast {
            return Err(self.invalid("beta_slow", &beta_slow, &format!("at most beta_fast, which is {beta_fast}")));
        }
        let concentration = rope.attention_factor.map(|factor| self.positive("attention_factor", factor));
        Ok(Yarn {
            factor,
            beta_fast,
            beta_slow,
            original_context: self.original_context(rope)?,
            is_truncated: rope.truncate.unwrap_or(true),
            concentration: concentration.transpose()?,
        })
    }

    fn llama3(&self, rope: &RawRope) -> Result<Llama3, ConfigError> {
        let factor = self.rope_factor(rope)?;
        let low = self.required("low_freq_factor", rope.low_freq_factor)?;
        let low_freq_factor = self.positive("low_freq_factor", low)?;
        let high = self.required("high_freq_factor", rope.high_freq_factor)?;
        let high_freq_factor = self.positive("high_freq_factor", high)?;
        if high_freq_factor <= low_freq_factor {
            let expected = format!("above low_freq_factor, which is {low_freq_factor}");
            return Err(self.invalid("high_freq_factor", &high_freq_factor, &expected));
        }
        Ok(Llama3 { factor, low_freq_factor, high_freq_factor, original_context: self.original_context(rope)? })
    }

    fn rope_factor(&self, rope: &RawRope) -> Result<f64, ConfigError> {
        let factor = self.required("rope factor", rope.factor)?;
        if (factor as f32).is_finite() && factor >= 1.0 {
            return Ok(factor);
        }
        Err(self.invalid("rope factor", &factor, "a finite number of at least 1"))
    }

    fn original_context(&self, rope: &RawRope) -> Result<usize, ConfigError> {
        let original = self.agreed(
            ("original_max_position_embeddings", rope.original_max_position_embeddings),
            ("initial_context_length", self.raw.initial_context_length),
        )?;
        self.count("original_max_position_embeddings", original, CONTEXT_MAX)
    }
}

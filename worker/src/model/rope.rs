//! Rotary position embedding, plain, stretched by YaRN, and stretched as Llama 3.1 does.
//!
//! Element `i` of the first half of a head is paired with element `i` of the second (half-split, as in GPT-NeoX), and the
//! pair is turned by `position * frequency[i]`: (a, b) -> (a cos - b sin, b cos + a sin).
//!
//! YaRN keeps the frequencies that turn often within the original context, divides those that turn seldom by the factor,
//! and blends in between; cos and sin are both multiplied by a concentration, which sharpens the attention:
//!
//! ```text
//! f_i           = theta^(-2i / D)                                  i = 0 .. D/2 - 1
//! d(r)          = D ln(original / (2 pi r)) / (2 ln theta)         the index that turns r times in the original context
//! low, high     = d(beta_fast), d(beta_slow)                       to whole numbers if `truncate`; kept in 0 ..= D - 1
//! ramp_i        = clamp((i - low) / (high - low), 0, 1)
//! inverse_i     = f_i (1 - ramp_i) + f_i / factor * ramp_i
//! concentration = 0.1 ln(factor) + 1
//! ```
//!
//! Llama 3 blends by the turns themselves and changes nothing else:
//!
//! ```text
//! turns_i   = original * f_i / (2 pi)                              within the original context
//! kept_i    = clamp((turns_i - low_freq_factor) / (high_freq_factor - low_freq_factor), 0, 1)
//! inverse_i = f_i kept_i + f_i / factor * (1 - kept_i)
//! ```
//!
//! Source: Su et al., "RoFormer" (2021); Peng et al., "YaRN" (2023), sections 3.2 to 3.4; transformers 5,
//! `modeling_rope_utils` (`_compute_yarn_parameters`, `_compute_llama3_parameters`), which computes in f32 where we compute
//! in f64 and round once.

use std::f64::consts::PI;

/// What a config says about positions. The fields hold no absurd value: `config` checks them.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base of the frequencies. Bounds: above 1.
    pub theta: f64,
    /// Width of a head. Bounds: even, at least 2.
    pub head_dim: usize,
    /// How positions beyond the original context are reached.
    pub scaling: Scaling,
}

/// How positions beyond the original context are reached.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    /// They are not.
    None,
    /// By YaRN.
    Yarn(Yarn),
    /// As Llama 3.1 does.
    Llama3(Llama3),
}

/// The stretching of a context by YaRN.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// How many times the original context. Bounds: at least 1.
    pub factor: f64,
    /// Turns in the original context above which a frequency is kept.
    pub beta_fast: f64,
    /// Turns below which it is divided by the factor. Bounds: above 0, at most `beta_fast`.
    pub beta_slow: f64,
    /// The context that the model was trained with. Units: tokens.
    pub original_context: usize,
    /// Whether the bounds of the blend are rounded outwards.
    pub is_truncated: bool,
    /// The concentration, where the config sets it.
    pub concentration: Option<f64>,
}

/// The stretching of a context as Llama 3.1 does it.
#[derive(Clone, Debug, PartialEq)]
pub struct Llama3 {
    /// What the frequencies that turn seldom are divided by. Bounds: at least 1.
    pub factor: f64,
    /// Turns in the original context up to which a frequency is divided by the factor. Bounds: above 0.
    pub low_freq_factor: f64,
    /// Turns from which it is kept. Bounds: above `low_freq_factor`.
    pub high_freq_factor: f64,
    /// The context that the model was trained with. Units: tokens.
    pub original_context: usize,
}

/// Frequencies, ready to turn any position.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeTable {
    inverse_frequencies: Vec<f32>,
    concentration: f32,
}

impl RopeTable {
    /// Computes the frequencies of a model.
    #[must_use]
    pub fn new(rope: &Rope) -> RopeTable {
        let (frequencies, concentration) = match &rope.scaling {
            Scaling::None => (plain_frequencies(rope), 1.0),
            Scaling::Yarn(yarn) => (yarn_frequencies(rope, yarn), concentration(yarn)),
            Scaling::Llama3(llama3) => (llama3_frequencies(rope, llama3), 1.0),
        };
        let inverse_frequencies = frequencies.into_iter().map(|frequency| frequency as f32).collect();
        RopeTable { inverse_frequencies, concentration: concentration as f32 }
    }

    /// Gives the angle that each pair turns by per position. Shapes: `[head_dim / 2] f32`. Units: radians.
    #[must_use]
    pub fn inverse_frequencies(&self) -> &[f32] {
        &self.inverse_frequencies
    }

    /// Gives the factor of both cos and sin.
    #[must_use]
    pub fn concentration(&self) -> f32 {
        self.concentration
    }

    /// Writes cos and sin of one position, times the concentration.
    ///
    /// The angle is a product in f32, as in the implementations that the models were trained with.
    ///
    /// Shapes: `cos, sin: [head_dim / 2] f32`.
    ///
    /// # Panics
    /// When `cos` or `sin` has another length.
    pub fn write(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        assert_eq!(cos.len(), self.inverse_frequencies.len());
        assert_eq!(sin.len(), self.inverse_frequencies.len());
        for ((frequency, cos), sin) in self.inverse_frequencies.iter().zip(cos).zip(sin) {
            let angle = position as f32 * frequency;
            *cos = angle.cos() * self.concentration;
            *sin = angle.sin() * self.concentration;
        }
    }
}

fn plain_frequencies(rope: &Rope) -> Vec<f64> {
    let width = rope.head_dim as f64;
    (0..rope.head_dim / 2).map(|i| rope.theta.powf(-2.0 * i as f64 / width)).collect()
}

fn yarn_frequencies(rope: &Rope, yarn: &Yarn) -> Vec<f64> {
    let (low, high) = blend_bounds(rope, yarn);
    // Equal bounds would divide by zero; transformers widens them by the same amount.
    let width = if high == low { 0.001 } else { high - low };
    let blend = |(i, kept): (usize, f64)| {
        let ramp = ((i as f64 - low) / width).clamp(0.0, 1.0);
        kept * (1.0 - ramp) + kept / yarn.factor * ramp
    };
    plain_frequencies(rope).into_iter().enumerate().map(blend).collect()
}

fn llama3_frequencies(rope: &Rope, llama3: &Llama3) -> Vec<f64> {
    let blend = |frequency: f64| {
        let turns = llama3.original_context as f64 * frequency / (2.0 * PI);
        let kept = (turns - llama3.low_freq_factor) / (llama3.high_freq_factor - llama3.low_freq_factor);
        let kept = kept.clamp(0.0, 1.0);
        frequency * kept + frequency / llama3.factor * (1.0 - kept)
    };
    plain_frequencies(rope).into_iter().map(blend).collect()
}

fn blend_bounds(rope: &Rope, yarn: &Yarn) -> (f64, f64) {
    let width = rope.head_dim as f64;
    let index_of =
        |turns: f64| width * (yarn.original_context as f64 / (turns * 2.0 * PI)).ln() / (2.0 * rope.theta.ln());
    let (low, high) = (index_of(yarn.beta_fast), index_of(yarn.beta_slow));
    let (low, high) = if yarn.is_truncated { (low.floor(), high.ceil()) } else { (low, high) };
    (low.max(0.0), high.min(width - 1.0))
}

fn concentration(yarn: &Yarn) -> f64 {
    yarn.concentration.unwrap_or_else(|| 0.1 * yarn.factor.ln() + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yarn() -> Yarn {
        Yarn {
            factor: 32.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_context: 4096,
            is_truncated: false,
            concentration: None,
        }
    }

    fn gpt_oss(yarn: Yarn) -> Rope {
        Rope { theta: 150_000.0, head_dim: 64, scaling: Scaling::Yarn(yarn) }
    }

    #[test]
    fn the_blend_of_gpt_oss_lies_where_its_authors_say() {
        let rope = gpt_oss(yarn());
        let (low, high) = blend_bounds(&rope, &yarn());
        assert!((low - 8.09).abs() < 0.01, "{low}");
        assert!((high - 17.40).abs() < 0.01, "{high}");
        assert!((RopeTable::new(&rope).concentration() - 1.346_573_6).abs() < 1e-6);
    }

    #[test]
    fn a_position_turns_each_pair_by_its_frequency() {
        let table = RopeTable::new(&Rope { theta: 10_000.0, head_dim: 4, scaling: Scaling::None });
        assert_eq!(table.inverse_frequencies(), [1.0, 0.01]);
        let (mut cos, mut sin) = ([0.0; 2], [0.0; 2]);
        table.write(0, &mut cos, &mut sin);
        assert_eq!((cos, sin), ([1.0; 2], [0.0; 2]));
        table.write(3, &mut cos, &mut sin);
        assert_eq!((cos[0], sin[0]), (3f32.cos(), 3f32.sin()));
        assert_eq!((cos[1], sin[1]), ((3.0 * 0.01f32).cos(), (3.0 * 0.01f32).sin()));
    }

    #[test]
    fn a_set_concentration_wins() {
        let rope = gpt_oss(Yarn { concentration: Some(1.0), ..yarn() });
        assert_eq!(RopeTable::new(&rope).concentration(), 1.0);
    }
}

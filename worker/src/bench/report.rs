//! What was measured, as a table for people or as one JSON object.

use std::collections::BTreeMap;
use std::io::{self, Write};

use bulkhead_shared::units::Bytes;
use serde::Serialize;

use super::bandwidth::Bandwidth;

/// The middle and the extremes of repeated measurements.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    /// Sums up measurements: the median of an even number is the mean of the middle two.
    ///
    /// # Panics
    /// When there are none.
    pub(super) fn of(values: &[f64]) -> Spread {
        assert!(!values.is_empty(), "something was measured");
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
        Spread { median: low.midpoint(high), min: sorted[0], max: sorted[sorted.len() - 1] }
    }
}

/// What the command was told to measure.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Asked {
    pub(super) prompt_tokens: u32,
    pub(super) generate_tokens: u32,
    pub(super) depth_tokens: u32,
    pub(super) batch: u32,
    pub(super) repetitions: u32,
}

/// What is held in memory. Units: bytes.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Memory {
    /// What the plan grants.
    pub(super) by_purpose: BTreeMap<&'static str, u64>,
    /// What the plan had to give up.
    pub(super) given_up: Vec<String>,
    /// The most that was ever in memory, touched pages of the files included.
    pub(super) peak_resident_bytes: u64,
    /// What is not backed by a file, at the end.
    pub(super) anonymous_bytes: u64,
}

/// Everything that was measured. A step computes one token of each sequence.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Report {
    pub(super) model: String,
    pub(super) device: String,
    pub(super) format: String,
    pub(super) asked: Asked,
    pub(super) load_seconds: f64,
    /// What that was spent on. Units: seconds.
    pub(super) load_phases: Vec<(&'static str, f64)>,
    pub(super) prefill_tokens_per_second: Spread,
    /// Of all sequences together.
    pub(super) decode_tokens_per_second: Spread,
    /// Matrices and biases of a decode step's products, those of the experts that were routed to among them. Norms,
    /// sinks and the embedding's rows are left out.
    pub(super) weight_bytes_per_step: f64,
    pub(super) kv_bytes_per_step: f64,
    pub(super) weight_bytes_per_token: f64,
    pub(super) kv_bytes_per_token: f64,
    /// What decode reads, at its median speed.
    pub(super) decode_bytes_per_second: f64,
    /// That as a share of the best bandwidth.
    pub(super) share_of_bandwidth: f64,
    pub(super) bandwidth: Bandwidth,
    pub(super) memory: Memory,
}

impl Report {
    /// Prints one line of JSON.
    pub(super) fn write_json(&self, out: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut *out, self)?;
        writeln!(out)
    }

    /// Prints a table.
    pub(super) fn write_table(&self, out: &mut impl Write) -> io::Result<()> {
        let asked = &self.asked;
        writeln!(out, "{}: {} on {}", self.model, self.format, self.device)?;
        for (purpose, bytes) in &self.memory.by_purpose {
            writeln!(out, "{purpose:<20}{}", Bytes(*bytes))?;
        }
        for what in &self.memory.given_up {
            writeln!(out, "{:<20}{what}", "given up")?;
        }
        for (what, value) in [
            ("load", format!("{:.2} s{}", self.load_seconds, phases(&self.load_phases))),
            ("peak in memory", Bytes(self.memory.peak_resident_bytes).to_string()),
            ("  not from files", Bytes(self.memory.anonymous_bytes).to_string()),
            ("prefill", format!("{} of a prompt of {}", tokens(self.prefill_tokens_per_second), asked.prompt_tokens)),
            (
                "decode",
                format!(
                    "{}, {} sequence(s), context {}, {} tokens each",
                    tokens(self.decode_tokens_per_second),
                    asked.batch,
                    asked.depth_tokens,
                    asked.generate_tokens
                ),
            ),
            (
                "  reads per token",
                format!(
                    "{:.2} MB of weights, {:.2} MB of KV",
                    self.weight_bytes_per_token / 1e6,
                    self.kv_bytes_per_token / 1e6
                ),
            ),
            ("  reads", format!("{:.2} GB/s", self.decode_bytes_per_second / 1e9)),
            ("bandwidth", bandwidth(&self.bandwidth)),
            ("decode / bandwidth", format!("{:.1} %", 100.0 * self.share_of_bandwidth)),
        ] {
            writeln!(out, "{what:<20}{value}")?;
        }
        Ok(())
    }
}

fn phases(phases: &[(&str, f64)]) -> String {
    let each: Vec<String> = phases.iter().map(|(phase, seconds)| format!("{phase} {seconds:.2}")).collect();
    if each.is_empty() { String::new() } else { format!(": {}", each.join(", ")) }
}

fn tokens(rate: Spread) -> String {
    format!("{:.2} tokens/s ({:.2} to {:.2})", rate.median, rate.min, rate.max)
}

fn bandwidth(measured: &Bandwidth) -> String {
    let (rate, buffer) = (measured.bytes_per_second, Bytes(measured.buffer_bytes));
    format!("{:.2} GB/s at best, {:.2} median, reading {buffer}", rate.max / 1e9, rate.median / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads_of_odd_and_even_numbers_of_values() {
        assert_eq!(Spread::of(&[5.0]), Spread { median: 5.0, min: 5.0, max: 5.0 });
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 3.0]), Spread { median: 2.5, min: 1.0, max: 4.0 });
    }
}

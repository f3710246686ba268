//! What is counted, and how Prometheus reads it.
//!
//! Owns: the counters and histograms of requests and workers, and the text format. What can be read off elsewhere at the
//! moment of asking (queue, worker) is not kept here but handed in as [`Now`]. Invariants: names and labels are fixed, so
//! nothing of a request can reach a metric; every admitted request is counted at its one end, as a success or a failure.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bulkhead_shared::message::{FinishReason, MemoryKind};
use bulkhead_shared::units::Bytes;

/// Buckets of the times of single tokens, as vLLM has them. Units: seconds.
const TOKEN_BUCKETS: &[f64] =
    &[0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];

/// Buckets of the time to the first token, as vLLM has them. Units: seconds.
const FIRST_TOKEN_BUCKETS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];

/// Buckets of the times of whole requests, as vLLM has them. Units: seconds.
const REQUEST_BUCKETS: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];

/// All that is counted.
#[derive(Debug, Default)]
pub struct Metrics {
    counts: Mutex<Counts>,
}

/// The counts. Changed under one lock, so that a reader never sees half of a request.
#[derive(Debug, Default)]
pub struct Counts {
    /// Tokens of prompts that a worker accepted, once for each request.
    pub prompt_tokens: u64,
    /// Tokens that were delivered, once each.
    pub generation_tokens: u64,
    /// Times that a request went on behind its tokens on another worker.
    pub resumes: u64,
    /// Requests that were set aside because they end their workers.
    pub quarantines: u64,
    successes: BTreeMap<&'static str, u64>,
    failures: BTreeMap<&'static str, u64>,
    refusals: BTreeMap<&'static str, u64>,
    restarts: BTreeMap<&'static str, u64>,
    /// From the admission of a request to its first token.
    pub first_token: Histogram,
    /// From each token of a request to its next.
    pub inter_token: Histogram,
    /// From the admission of a request to its end.
    pub whole: Histogram,
    /// From the admission of a request to the worker.
    pub queued: Histogram,
}

/// A distribution: how many values came to lie in which bucket. Its buckets are chosen where it is written.
#[derive(Debug, Default)]
pub struct Histogram {
    values: BTreeMap<u64, u64>,
    sum_us: u64,
}

impl Histogram {
    /// Adds a time.
    ///
    /// Kept by its upper bucket of all tables, so memory does not grow with the number of values.
    pub fn add(&mut self, time: Duration, count: u64) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        let edges = [TOKEN_BUCKETS, FIRST_TOKEN_BUCKETS, REQUEST_BUCKETS];
        let above = edges.into_iter().flatten().map(|edge| edge_us(*edge)).filter(|edge| *edge >= micros);
        *self.values.entry(above.min().unwrap_or(u64::MAX)).or_default() += count;
        self.sum_us = self.sum_us.saturating_add(micros.saturating_mul(count));
    }

    fn write(&self, text: &mut String, name: &str, labels: &str, buckets: &[f64]) {
        for edge in buckets {
            let count: u64 = self.values.range(..=edge_us(*edge)).map(|(_, count)| count).sum();
            line(text, &format!("{name}_bucket"), &format!("{labels},le=\"{edge:?}\""), count);
        }
        let count: u64 = self.values.values().sum();
        line(text, &format!("{name}_bucket"), &format!("{labels},le=\"+Inf\""), count);
        line(text, &format!("{name}_sum"), labels, self.sum_us as f64 / 1e6);
        line(text, &format!("{name}_count"), labels, count);
    }
}

fn edge_us(seconds: f64) -> u64 {
    (seconds * 1e6).round() as u64
}

impl Counts {
    /// Counts a whole answer.
    pub fn success(&mut self, reason: FinishReason) {
        let word = match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::ToolCalls => "tool_calls",
        };
        *self.successes.entry(word).or_default() += 1;
    }

    /// Counts a request that ended otherwise.
    pub fn failure(&mut self, reason: &'static str) {
        *self.failures.entry(reason).or_default() += 1;
    }

    /// Counts a request that was not admitted.
    pub fn refusal(&mut self, reason: &'static str) {
        *self.refusals.entry(reason).or_default() += 1;
    }

    /// Counts a worker that was started in the place of another.
    pub fn restart(&mut self, cause: &'static str) {
        *self.restarts.entry(cause).or_default() += 1;
    }
}

/// What is read off at the moment of asking.
#[derive(Clone, Debug)]
pub struct Now {
    /// The model's name in the API.
    pub model: String,
    /// Requests at a worker.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// Which run of the worker this is.
    pub incarnation: u32,
    /// Whether a model answers.
    pub is_up: bool,
    /// Blocks of KV cache: all of them, and those that are free.
    pub blocks: Option<(u32, u32)>,
    /// What the worker says that it holds.
    pub memory: Vec<(MemoryKind, Bytes)>,
}

impl Metrics {
    /// Gives the counts, to add to them.
    pub fn counts(&self) -> MutexGuard<'_, Counts> {
        // Numbers are whole at any time, whatever happened to who added them.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes everything in Prometheus' text format.
    #[must_use]
    pub fn text(&self, now: &Now) -> String {
        let mut text = String::new();
        let labels = format!("model_name=\"{}\"", escape(&now.model));
        write_now(&mut text, now, &labels);
        let counts = self.counts();
        for (name, help, value) in [
            ("prompt_tokens_total", "Tokens of accepted prompts.", counts.prompt_tokens),
            ("generation_tokens_total", "Tokens delivered.", counts.generation_tokens),
            ("resumes_total", "Answers that went on with another worker.", counts.resumes),
            ("quarantines_total", "Requests set aside because they end their workers.", counts.quarantines),
        ] {
            head(&mut text, name, help, "counter");
            line(&mut text, &format!("bulkhead:{name}"), &labels, value);
        }
        for (name, help, label, values) in [
            ("request_success_total", "Requests with a whole answer.", "finished_reason", &counts.successes),
            ("request_failure_total", "Requests that ended otherwise.", "reason", &counts.failures),
            ("request_refusal_total", "Requests that were not admitted.", "reason", &counts.refusals),
            ("worker_restarts_total", "Workers started in the place of another.", "cause", &counts.restarts),
        ] {
            head(&mut text, name, help, "counter");
            for (word, value) in values {
                line(&mut text, &format!("bulkhead:{name}"), &format!("{labels},{label}=\"{word}\""), *value);
            }
        }
        for (name, help, histogram, buckets) in [
            ("time_to_first_token_seconds", "From admission.", &counts.first_token, FIRST_TOKEN_BUCKETS),
            ("inter_token_latency_seconds", "From token to token.", &counts.inter_token, TOKEN_BUCKETS),
            ("e2e_request_latency_seconds", "From admission to the end.", &counts.whole, REQUEST_BUCKETS),
            ("request_queue_time_seconds", "From admission to a worker.", &counts.queued, REQUEST_BUCKETS),
        ] {
            head(&mut text, name, help, "histogram");
            histogram.write(&mut text, &format!("bulkhead:{name}"), &labels, buckets);
        }
        text
    }
}

fn write_now(text: &mut String, now: &Now, labels: &str) {
    let usage = now.blocks.map_or(0.0, |(all, free)| f64::from(all.saturating_sub(free)) / f64::from(all.max(1)));
    for (name, help, value) in [
        ("num_requests_running", "Requests at a worker.", now.running as f64),
        ("num_requests_waiting", "Requests that wait for a worker.", now.waiting as f64),
        ("kv_cache_usage_perc", "Share of the KV cache in use, from 0 to 1.", usage),
        ("incarnation", "Which run of the worker this is, from 1.", f64::from(now.incarnation)),
        ("worker_up", "Whether a model answers.", f64::from(u8::from(now.is_up))),
    ] {
        head(text, name, help, "gauge");
        line(text, &format!("bulkhead:{name}"), labels, value);
    }
    head(text, "memory_bytes", "What the worker says that it holds.", "gauge");
    for (kind, bytes) in &now.memory {
        line(text, "bulkhead:memory_bytes", &format!("{labels},kind=\"{}\"", kind.as_str()), bytes.0);
    }
}

fn head(text: &mut String, name: &str, help: &str, kind: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "# HELP bulkhead:{name} {help}\n# TYPE bulkhead:{name} {kind}");
}

fn line(text: &mut String, name: &str, labels: &str, value: impl std::fmt::Display) {
    let _ = writeln!(text, "{name}{{{labels}}} {value}");
}

/// Makes a text fit for a label's value.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn now(model: &str) -> Now {
        Now {
            model: model.into(),
            running: 2,
            waiting: 1,
            incarnation: 3,
            is_up: true,
            blocks: Some((8, 6)),
            memory: vec![(MemoryKind::Weights, Bytes(99))],
        }
    }

    #[test]
    fn what_is_counted_is_written() {
        let metrics = Metrics::default();
        metrics.counts().generation_tokens = 5;
        metrics.counts().success(FinishReason::ToolCalls);
        metrics.counts().restart("killed_from_outside");
        let text = metrics.text(&now("a\"b\\"));
        for expected in [
            "# TYPE bulkhead:num_requests_running gauge",
            "bulkhead:num_requests_running{model_name=\"a\\\"b\\\\\"} 2",
            "bulkhead:kv_cache_usage_perc{model_name=\"a\\\"b\\\\\"} 0.25",
            "bulkhead:generation_tokens_total{model_name=\"a\\\"b\\\\\"} 5",
            "bulkhead:request_success_total{model_name=\"a\\\"b\\\\\",finished_reason=\"tool_calls\"} 1",
            "bulkhead:worker_restarts_total{model_name=\"a\\\"b\\\\\",cause=\"killed_from_outside\"} 1",
            "bulkhead:memory_bytes{model_name=\"a\\\"b\\\\\",kind=\"weights\"} 99",
        ] {
            assert!(text.lines().any(|line| line == expected), "{expected} is not in\n{text}");
        }
    }

    #[test]
    fn a_value_on_an_edge_lies_within_it() {
        let metrics = Metrics::default();
        for (ms, count) in [(10, 1), (11, 2), (90_000, 3)] {
            metrics.counts().inter_token.add(Duration::from_millis(ms), count);
        }
        let text = metrics.text(&now("m"));
        for (edge, count) in [("0.01", 1), ("0.025", 3), ("80.0", 3), ("+Inf", 6)] {
            let line = format!("bulkhead:inter_token_latency_seconds_bucket{{model_name=\"m\",le=\"{edge}\"}} {count}");
            assert!(text.contains(&line), "{line} is not in\n{text}");
        }
        assert!(text.contains("inter_token_latency_seconds_sum{model_name=\"m\"} 270.032\n"), "{text}");
        assert!(text.contains("inter_token_latency_seconds_count{model_name=\"m\"} 6\n"), "{text}");
    }
}

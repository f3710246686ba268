//! What the supervisor takes from outside beside requests: a worker's messages in any order, admin requests, configuration.

use std::fs;

use bulkhead_shared::layers::SandboxMode;
use bulkhead_shared::message::FromWorker;
use bulkhead_supervisor::admin::command;
use bulkhead_supervisor::child::SoFar;
use bulkhead_supervisor::child::protocol::Protocol;
use bulkhead_supervisor::config::{self, Environment, flags};
use bulkhead_tests::fuzz::{Random, mutate, mutate_json, run};
use serde_json::json;

use crate::frames::{from_worker, generate};
use crate::memory::{alone, bounded};

/// A conversation in which a worker says anything at any time, and the supervisor hands it requests as it does.
fn converse(corpus: &[FromWorker], random: &mut Random) {
    let mut protocol = Protocol::new(SandboxMode::BestEffort);
    let mut is_loading = false;
    for _ in 0..random.below(60) {
        let message = &corpus[random.below(corpus.len())];
        if protocol.check(message).is_err() {
            // Here the supervisor kills the worker and believes nothing more.
            return;
        }
        let is_greeting = matches!(message, FromWorker::Hello { .. });
        if is_greeting && !std::mem::replace(&mut is_loading, true) {
            protocol.load_sent();
        }
        if random.once_in(2) {
            let mut request = generate();
            request.id.0 = 3;
            request.resume.truncate(random.below(3));
            request.logprobs = request.logprobs.filter(|_| random.once_in(2));
            let so_far = SoFar { text_bytes: random.below(1 << 20), logprobs_waiting: random.below(3) };
            protocol.generate_sent(&request, so_far);
        }
        if random.once_in(4) {
            protocol.next_nonce();
        }
        assert!(protocol.outstanding() <= 1, "what was not sent is not known");
    }
}

#[test]
fn messages_of_a_worker_in_any_order() {
    alone(|| {
        let corpus = from_worker();
        run("messages of a worker", |random| bounded(1 << 16, || converse(&corpus, random)));
    });
}

#[test]
fn admin_requests() {
    alone(|| {
        run("admin requests", |random| {
            let names = ["status", "start", "stop", "restart", "queue", "cancel", "tail", "version", ""];
            let mut request = json!({"command": random.pick(&names), "id": 7, "lines": 20, "follow": true});
            mutate_json(&mut request, random);
            let mut line = request.to_string().into_bytes();
            if random.once_in(3) {
                mutate(&mut line, random);
            }
            if let Err(error) = bounded((1 << 16) + 64 * line.len(), || command::read(&line)) {
                assert!(!error.is_empty());
            }
        });
    });
}

const CONFIG: &str = r#"
listen = "127.0.0.1:8000"
model = "/models/gpt-oss-20b"
model_id = "gpt-oss-20b"
aliases = ["openai/gpt-oss-20b", "x"]
threads = 3
context_tokens = 32_768
sequences_max = 8
queue_bytes_max = 268435456
request_timeout = "90s"
allow_faults = true
log = { level = "debug", format = "json" }
[faults]
step_delay_ms = 5
die_on_token = 7
"#;

#[test]
fn configuration_files() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let path = folder.path().join("bulkhead.toml");
    let flag = path.to_str().expect("is text").to_owned();
    alone(|| {
        run("configuration files", |random| {
            let mut text = CONFIG.as_bytes().to_vec();
            mutate(&mut text, random);
            fs::write(&path, &text).expect("the folder can be written");
            let command = flags(clap::Command::new("test"));
            let matches = command.try_get_matches_from(["test", "--config", &flag]).expect("the flag is known");
            match config::load(&matches, &Environment::of(&[])) {
                Ok(loaded) => assert!(loaded.listing().contains("listen = ")),
                Err(error) => assert!(!error.0.is_empty() && !error.to_string().is_empty()),
            }
        });
    });
}

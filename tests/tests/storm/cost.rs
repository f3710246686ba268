//! What the walls of a worker cost: starts, steps and pauses of one service with them and one without, which take turns.

use std::time::{Duration, Instant};

use bulkhead_tests::process;
use bulkhead_tests::server::Server;
use bulkhead_tests::talk::COMPLETIONS;
use nix::sys::signal::Signal;
use serde_json::json;

use super::pause::{UNWALLED, marks};
use super::{is_full, running_worker};

/// Tokens of the answer whose time is shared among them.
const TOKENS: u32 = 200;

/// Events before the worker is killed, and behind it: among these is the pause.
const EVENTS_BEFORE: u32 = 20;
const EVENTS_BEHIND: u32 = 10;

/// Time between tokens of the service whose worker is killed, so that its events come one by one.
const DELAY: [&str; 3] = ["--allow-faults", "--faults-step-delay-ms", "5"];

/// Two services of one mode, and what was measured of them.
struct Service {
    mode: &'static str,
    killed: Server,
    timed: Server,
    pauses: Vec<Duration>,
    tokens: Vec<Duration>,
}

impl Service {
    fn start(mode: &'static str) -> Service {
        let sandbox = ["--sandbox", mode];
        let (killed, timed) = (Server::start(&[&sandbox[..], &DELAY].concat()), Server::start(&sandbox));
        Service { mode, killed, timed, pauses: Vec::new(), tokens: Vec::new() }
    }

    /// Kills a worker in the middle of an answer and measures the longest silence.
    fn pause(&mut self) {
        // The built-in model goes on with this word until its context is full.
        let request = json!({"prompt": "hello", "temperature": 0, "max_tokens": 8000, "stream": true});
        let mut events = self.killed.post(COMPLETIONS, &request).events();
        let mut next = || {
            let asked = Instant::now();
            events.next_data().expect("the stream runs").expect("the stream goes on");
            asked.elapsed()
        };
        for _ in 0..EVENTS_BEFORE {
            next();
        }
        process::signal(running_worker(&self.killed), Signal::SIGKILL);
        self.pauses.extend((0..EVENTS_BEHIND).map(|_| next()).max());
    }

    /// Measures an answer by its tokens.
    fn token(&mut self) {
        let request = json!({"prompt": "hello", "temperature": 0, "max_tokens": TOKENS});
        let began = Instant::now();
        let answer = self.timed.post(COMPLETIONS, &request).json().expect("an answer");
        assert_eq!(answer["usage"]["completion_tokens"], json!(TOKENS), "{answer}");
        self.tokens.push(began.elapsed() / TOKENS);
    }
}

/// Prints a row of the table: the median, and between what half and all of the times lie.
fn row(what: &str, mode: &str, mut times: Vec<Duration>) {
    times.sort_unstable();
    let ms = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize].as_secs_f64() * 1e3;
    println!(
        "| {what} | {mode} | {:.2} ms | {:.2} to {:.2} | {:.2} to {:.2} | {} |",
        ms(0.5),
        ms(0.25),
        ms(0.75),
        ms(0.0),
        ms(1.0),
        times.len()
    );
}

/// Lists the times between two lines of the log that follow each other in each start.
fn between(log: &[(String, f64)], from: &str, to: &str) -> Vec<Duration> {
    let mut since = None;
    let mut times = Vec::new();
    for (message, at) in log {
        if message == from {
            since = Some(*at);
        } else if message == to {
            times.extend(since.take().map(|since| Duration::from_secs_f64((at - since).max(0.0))));
        }
    }
    times
}

#[test]
fn the_cost_of_the_walls_is_printed() {
    let rounds = if is_full() { 40 } else { 2 };
    let mut services = ["full", "off"].map(Service::start);
    for round in 0..rounds {
        // Neither is always the first.
        if round % 2 == 1 {
            services.reverse();
        }
        services.iter_mut().for_each(Service::pause);
        services.iter_mut().for_each(Service::token);
    }
    println!("| what | sandbox | median | half | all | times |\n| --- | --- | --- | --- | --- | --- |");
    services.sort_by_key(|service| service.mode == "off");
    for (what, from, to) in [
        ("from spawn to `Hello`", "worker started", "worker is behind its walls"),
        ("from spawn to ready", "worker started", "worker is ready"),
    ] {
        for service in &services {
            // Without walls another line says so.
            let to = if service.mode == "off" && to.contains("walls") { UNWALLED } else { to };
            row(what, service.mode, between(&marks(&service.killed.log()), from, to));
        }
    }
    for service in &services {
        row("from kill -9 to the next token", service.mode, service.pauses.clone());
    }
    for service in &services {
        row("a token", service.mode, service.tokens.clone());
    }
}

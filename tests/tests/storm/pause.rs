//! How long the pause is that a client sees, and where it goes.

use std::time::{Duration, Instant};

use bulkhead_tests::process;
use bulkhead_tests::server::Server;
use bulkhead_tests::talk::COMPLETIONS;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{Times, is_full, running_worker};

/// The lines that a restart logs, in their order.
const MARKS: [&str; 5] =
    ["worker ended", "worker started", "worker is behind its walls", "model is loaded", "worker is ready"];

/// Reads the times at which the lines of the restarts were logged, by their own stamps. Units: seconds of the day.
fn marks(log: &str) -> Vec<(String, f64)> {
    let read = |line: &str| {
        let line: Value = serde_json::from_str(line).ok()?;
        let message = line["message"].as_str()?.to_owned();
        let stamp = line["timestamp"].as_str()?;
        let (_, clock) = stamp.trim_end_matches('Z').split_once('T')?;
        let seconds = clock.split(':').try_fold(0.0, |sum, part| Some(sum * 60.0 + part.parse::<f64>().ok()?))?;
        MARKS.contains(&message.as_str()).then_some((message, seconds))
    };
    log.lines().filter_map(read).collect()
}

#[test]
fn the_pause_is_measured() {
    let server = Server::start(&["--allow-faults", "--faults-step-delay-ms", "5"]);
    let kills = if is_full() { 40 } else { 3 };
    let mut pauses = Times::default();
    // The built-in model goes on with this word until its context is full.
    let request = json!({"prompt": "hello", "temperature": 0, "max_tokens": 8000, "stream": true});
    let mut events = server.post(COMPLETIONS, &request).events();
    for _ in 0..kills {
        for _ in 0..20 {
            events.next_data().expect("the stream runs").expect("the stream goes on");
        }
        let start = Instant::now();
        process::signal(running_worker(&server), Signal::SIGKILL);
        // What the dead one had sent comes first and at once; the pause is the longest silence.
        let mut longest = Duration::ZERO;
        for _ in 0..10 {
            let asked = Instant::now();
            events.next_data().expect("the stream runs").expect("the stream goes on");
            longest = longest.max(asked.elapsed());
        }
        assert!(longest <= start.elapsed());
        pauses.0.push(longest);
    }
    drop(events);
    pauses.print("from kill -9 to the next token");
    let marks = marks(&server.log());
    for pair in MARKS.windows(2) {
        let steps = marks.windows(2).filter(|found| found[0].0 == pair[0] && found[1].0 == pair[1]);
        let times = steps.map(|found| Duration::from_secs_f64((found[1].1 - found[0].1).max(0.0))).collect();
        Times(times).print(&format!("from {:?} to {:?}", pair[0], pair[1]));
    }
    assert_eq!(server.health()["workers"][0]["restarts"], kills);
}

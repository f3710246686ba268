//! How long the pause is that a client sees, and where it goes.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bulkhead_tests::process;
use bulkhead_tests::server::Server;
use bulkhead_tests::talk::COMPLETIONS;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::{Times, is_full, running_worker};

/// What happens in a restart, in its order: what the test does and sees, and between them the lines of the log.
const MARKS: [&str; 7] = [
    "kill -9",
    "worker ended",
    "worker started",
    "worker is behind its walls",
    "model is loaded",
    "worker is ready",
    "next token",
];

/// What stands in the log in place of the walls where there are none.
pub(super) const UNWALLED: &str = "worker lacks walls";

/// Gives the time of the day. Units: seconds.
fn now() -> f64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is set");
    since_1970.as_secs_f64() % 86_400.0
}

/// Reads the times at which the lines of the restarts were logged, by their own stamps. Units: seconds of the day.
pub(super) fn marks(log: &str) -> Vec<(String, f64)> {
    let read = |line: &str| {
        let line: Value = serde_json::from_str(line).ok()?;
        let message = line["message"].as_str()?.to_owned();
        let stamp = line["timestamp"].as_str()?;
        let (_, clock) = stamp.trim_end_matches('Z').split_once('T')?;
        let seconds = clock.split(':').try_fold(0.0, |sum, part| Some(sum * 60.0 + part.parse::<f64>().ok()?))?;
        (MARKS.contains(&message.as_str()) || message == UNWALLED).then_some((message, seconds))
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
    let mut seen = Vec::new();
    for _ in 0..kills {
        let mut events = server.post(COMPLETIONS, &request).events();
        for _ in 0..20 {
            events.next_data().expect("the stream runs").expect("the stream goes on");
        }
        let worker = running_worker(&server);
        seen.push((MARKS[0].to_owned(), now()));
        process::signal(worker, Signal::SIGKILL);
        // What the dead one had sent comes first and at once; the pause is the longest silence.
        let (mut longest, mut next) = (Duration::ZERO, 0.0);
        for _ in 0..10 {
            let asked = Instant::now();
            events.next_data().expect("the stream runs").expect("the stream goes on");
            if asked.elapsed() > longest {
                (longest, next) = (asked.elapsed(), now());
            }
        }
        seen.push((MARKS[6].to_owned(), next));
        pauses.0.push(longest);
    }
    pauses.print("from kill -9 to the next token");
    let mut marks = [marks(&server.log()), seen].concat();
    marks.sort_by(|one, other| one.1.total_cmp(&other.1));
    for pair in MARKS.windows(2) {
        let steps = marks.windows(2).filter(|found| found[0].0 == pair[0] && found[1].0 == pair[1]);
        let times = steps.map(|found| Duration::from_secs_f64((found[1].1 - found[0].1).max(0.0))).collect();
        Times(times).print(&format!("from {:?} to {:?}", pair[0], pair[1]));
    }
    assert_eq!(server.health()["workers"][0]["restarts"], kills);
}

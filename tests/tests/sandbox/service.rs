//! The walls as the service shows them: asked for, refused, left out, and broken through.

use std::time::{Duration, Instant};

use bulkhead_tests::fake::Fake;
use bulkhead_tests::process;
use bulkhead_tests::server::Server;
use bulkhead_tests::talk::{COMPLETIONS, QUESTION, greedy};
use nix::sys::signal::Signal;
use serde_json::json;

#[test]
fn the_service_says_that_its_worker_is_walled_in() {
    let server = Server::start(&[]);
    let worker = &server.health()["workers"][0];
    assert_eq!((&worker["sandbox"], worker.get("isolation_missing")), (&json!("full"), None), "{worker}");
    for thread in crate::scene::threads(server.worker().expect("a worker runs").pid.unsigned_abs()) {
        assert!(thread.contains("Seccomp:\t2"), "{thread}");
    }
    assert!(!server.ask(&greedy(QUESTION)).content.is_empty());
}

#[test]
fn a_worker_with_fewer_walls_is_refused() {
    let fake = Fake { words: "no-walls", ..Fake::default() };
    let server = Server::spawn_fake(fake, &[]);
    let _ = server.wait_for_log("worker is given up");
    let worker = &server.health()["workers"][0];
    assert_eq!(worker["state"], "FATAL", "{worker}");
    let reason = worker["last_end"].as_str().expect("a text");
    for part in ["landlock-files", "system-call-filter", "--sandbox best-effort"] {
        assert!(reason.contains(part), "{reason}");
    }
    let fake = Fake { words: "no-walls", ..Fake::default() };
    let server = Server::spawn_fake(fake, &["--sandbox", "best-effort"]);
    server.wait_until_loaded();
    let worker = &server.health()["workers"][0];
    assert_eq!(worker["sandbox"], "partial", "{worker}");
    assert!(worker["isolation_missing"].as_array().is_some_and(|missing| missing.contains(&json!("landlock-files"))));
}

#[test]
fn a_service_without_walls_says_so() {
    let server = Server::start(&["--sandbox", "off"]);
    let worker = &server.health()["workers"][0];
    assert_eq!(worker["sandbox"], "off", "{worker}");
    assert!(server.log().contains("workers have no walls"), "{}", server.log());
    let pid = server.worker().expect("a worker runs").pid;
    assert_eq!(process::status(pid)["Seccomp"], "0");
}

#[test]
fn a_break_in_is_not_tried_again() {
    let server = Server::start(&[]);
    // What the kernel does at a call that is not on the list.
    process::signal(server.worker().expect("a worker runs").pid, Signal::SIGSYS);
    let _ = server.wait_for_log("worker is given up");
    let health = server.health();
    let worker = &health["workers"][0];
    assert_eq!(worker["state"], "FATAL", "{worker}");
    assert!(worker["last_end"].as_str().is_some_and(|reason| reason.contains("sandbox violation")), "{worker}");
    assert_eq!(server.get("/health/live").status, 200, "the service lives on");
}

/// Prints what the walls cost; nothing is asserted of times.
#[test]
fn the_cost_is_printed() {
    const STARTS: usize = 5;
    for mode in ["off", "full"] {
        let server = Server::start(&["--sandbox", mode]);
        let mut pauses = Vec::new();
        for _ in 0..STARTS {
            let before = server.health()["workers"][0]["incarnation"].as_u64();
            let worker = server.worker().expect("a worker runs").pid;
            let killed = Instant::now();
            process::signal(worker, Signal::SIGKILL);
            server.wait_for("the next worker runs", |health| {
                let worker = &health["workers"][0];
                (worker["incarnation"].as_u64() > before && worker["state"] == "RUNNING").then_some(())
            });
            pauses.push(killed.elapsed());
        }
        let began = Instant::now();
        let request = json!({"prompt": "hello", "temperature": 0, "max_tokens": 400});
        let answer = server.post(COMPLETIONS, &request).json().expect("an answer");
        let tokens = answer["usage"]["completion_tokens"].as_u64().expect("a number");
        assert!(tokens > 0, "{answer}");
        let token = began.elapsed().div_f64(tokens as f64);
        println!("sandbox {mode}: {:?} from a kill to the next worker, {token:?} for a token", median(pauses));
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

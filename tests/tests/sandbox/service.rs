//! The walls as the service shows them: asked for, refused, left out, and broken through.

use bulkhead_tests::fake::Fake;
use bulkhead_tests::process;
use bulkhead_tests::server::Server;
use bulkhead_tests::talk::{QUESTION, greedy};
use bulkhead_worker::quant::cpu::CpuPath;
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

/// The widest registers work behind the filter, tiles too, which the kernel has to be asked for before: every integer path that
/// this processor has gives the same answer there.
#[test]
fn every_path_of_the_processor_computes_behind_the_walls() {
    let mut answers = Vec::new();
    for path in [CpuPath::Scalar, CpuPath::Avx2, CpuPath::AvxVnni, CpuPath::Avx512, CpuPath::Amx] {
        let server = Server::spawn(&["--cpu", path.as_str(), "--sandbox", "full"]);
        if let Err(missing) = path.check() {
            eprintln!("skipped: {path} behind the walls: {missing}");
            let health = server.wait_for_health("/workers/0/state", &json!("FATAL"));
            assert_eq!(health["workers"][0]["incarnation"], 1, "{health}");
            assert!(health["reason"].as_str().is_some_and(|reason| reason.contains(missing.feature)), "{health}");
            continue;
        }
        server.wait_until_loaded();
        let worker = &server.health()["workers"][0];
        assert_eq!(worker["sandbox"], "full", "{worker}");
        assert!(worker.to_string().contains(&format!("({path}, ")), "{path}: {worker}");
        let answer = server.ask(&greedy(QUESTION));
        assert!(!answer.content.is_empty(), "{path}");
        if path != CpuPath::Scalar {
            answers.push((path, answer));
        }
    }
    assert!(answers.windows(2).all(|pair| pair[0].1 == pair[1].1), "{answers:?}");
}

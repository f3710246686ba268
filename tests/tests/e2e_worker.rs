//! The worker as a process: what it is, what it may, and what happens when it or its supervisor is killed.

use std::fs;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use bulkhead_tests::process;
use bulkhead_tests::server::{Server, WORKER};
use bulkhead_tests::talk::{CHAT, QUESTION, check_error, greedy, read_stream, with};
use bulkhead_tests::wait;
use nix::sys::signal::Signal;
use serde_json::json;

/// Kills of the storm.
const KILLS: usize = 50;

/// Clients that ask all the time during the storm.
const CLIENTS: usize = 4;

#[test]
fn the_worker_is_a_walled_in_child() {
    let server = Server::start(&[]);
    let worker = server.worker().expect("a worker runs");
    assert_eq!((worker.parent, worker.name.as_str()), (server.pid(), WORKER));
    let children = process::children(server.pid());
    assert_eq!(children.len(), 1, "the worker is the only child: {children:?}");

    let status = process::status(worker.pid);
    assert_eq!(status["NoNewPrivs"], "1");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!(process::limit(worker.pid, "Max core file size"), ("0".into(), "0".into()));
    assert_eq!(process::limit(worker.pid, "Max file size"), ("0".into(), "0".into()));

    // Not dumpable: these files belong to root, and others of the same user may not even look.
    match fs::read(format!("/proc/{}/environ", worker.pid)) {
        Ok(environment) => assert_eq!(String::from_utf8_lossy(&environment), ""),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied),
    }
    if let Ok(executable) = fs::read_link(format!("/proc/{}/exe", worker.pid)) {
        assert_eq!(executable.file_name().and_then(|name| name.to_str()), Some(WORKER));
    }
    let command_line = fs::read_to_string(format!("/proc/{}/cmdline", worker.pid)).expect("everybody may read it");
    assert_eq!(command_line.split('\0').nth(1), Some("serve"));

    let isolation = &server.health()["workers"][0]["isolation"];
    for layer in ["no-new-privileges", "no-capabilities", "empty-environment", "closed-descriptors", "not-dumpable"] {
        assert!(isolation.as_array().is_some_and(|layers| layers.contains(&json!(layer))), "{layer}: {isolation}");
    }
}

#[test]
fn the_worker_ends_with_its_supervisor() {
    let mut server = Server::start(&[]);
    let worker = server.worker().expect("a worker runs").pid;
    let stream = server.open_stream(&with(greedy(QUESTION), json!({"max_tokens": 4000, "temperature": 2})));
    server.signal(Signal::SIGKILL);
    server.wait();
    wait::until("the worker has ended", || (!process::is_alive(worker)).then_some(()));
    drop(stream);
}

#[test]
fn a_killed_worker_is_replaced_and_the_request_gets_a_typed_error() {
    let server = Server::start(&["--allow-faults", "--faults-step-delay-ms", "20"]);
    let first = server.worker().expect("a worker runs").pid;
    let long = with(greedy(QUESTION), json!({"max_tokens": 4000, "temperature": 2, "seed": 1}));
    let mut events = server.open_stream(&long);
    // The first events come with the acceptance; the kill must hit an answer that has begun.
    for _ in 0..5 {
        events.next_data().expect("the stream runs").expect("the stream goes on");
    }
    process::signal(first, Signal::SIGKILL);
    let reply = read_stream(events).expect("the stream is ended in order");
    assert_eq!(reply.error.expect("it says why")["code"], "worker_crashed");

    // A request that comes while no worker runs waits for the next one.
    let reply = server.ask(&greedy("Who are you?"));
    assert_eq!(reply.finish_reason, "stop");
    let second = server.worker().expect("a new worker runs").pid;
    assert_ne!(first, second);
    let worker = &server.health()["workers"][0];
    assert_eq!((&worker["incarnation"], &worker["restarts"]), (&json!(2), &json!(1)), "{worker}");
}

/// How the requests of the storm ended.
#[derive(Debug, Default)]
struct Ends {
    answers: AtomicUsize,
    errors: AtomicUsize,
}

fn ask_until(server: &Server, is_over: &AtomicBool, ends: &Ends, client: usize) {
    let request = with(greedy(QUESTION), json!({"max_tokens": 30 + client}));
    for round in 0.. {
        if is_over.load(Ordering::Relaxed) {
            return;
        }
        let is_stream = (round + client).is_multiple_of(2);
        let answer = server.post(CHAT, &with(request.clone(), json!({"stream": is_stream})));
        let failed = match (answer.status, is_stream) {
            (200, true) => read_stream(answer.events()).expect("a stream ends in order").error.is_some(),
            (200, false) => {
                let body = answer.json().expect("answers are JSON");
                assert!(body["choices"][0]["finish_reason"].is_string(), "{body}");
                false
            }
            (503, _) => {
                assert!(answer.headers.contains_key("retry-after"), "a 503 says when to come back");
                let body = answer.json().expect("errors are JSON");
                check_error(&body);
                assert_eq!(body["error"]["code"], "worker_crashed", "{body}");
                true
            }
            (status, _) => panic!("status {status}: {:?}", answer.text()),
        };
        let count = if failed { &ends.errors } else { &ends.answers };
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// Waits until a worker other than the last one has delivered tokens, then kills it; gives its process id.
fn kill_next(server: &Server, last: i32, ends: &Ends) -> i32 {
    let worker = server.wait_for("a new worker runs", |health| {
        let worker = &health["workers"][0];
        let pid = i32::try_from(worker["pid"].as_i64()?).ok()?;
        (worker["state"] == "RUNNING" && pid != last).then_some(pid)
    });
    let answers = ends.answers.load(Ordering::Relaxed);
    wait::until("it has answered", || (ends.answers.load(Ordering::Relaxed) > answers).then_some(()));
    process::signal(worker, Signal::SIGKILL);
    worker
}

#[test]
fn fifty_kills_under_load() {
    let server = Server::start(&[]);
    // Connections of clients come and go, so descriptors are compared in quiet.
    let before = process::descriptors(server.pid()).expect("it is ours");
    let (is_over, ends) = (AtomicBool::new(false), Ends::default());
    let times = thread::scope(|scope| {
        for client in 0..CLIENTS {
            let (server, is_over, ends) = (&server, &is_over, &ends);
            scope.spawn(move || ask_until(server, is_over, ends, client));
        }
        let guard = SetAtEnd(&is_over);
        let mut last = 0;
        let mut times = Vec::new();
        for _ in 0..KILLS {
            let start = std::time::Instant::now();
            last = kill_next(&server, last, &ends);
            times.push(start.elapsed());
        }
        drop(guard);
        times
    });
    server.wait_until_loaded();
    server.wait_until_idle();

    let worker = &server.health()["workers"][0];
    assert_eq!((&worker["incarnation"], &worker["restarts"]), (&json!(KILLS + 1), &json!(KILLS)), "{worker}");
    let children = process::children(server.pid());
    assert_eq!(children.len(), 1, "no zombies: {children:?}");
    server.wait_for("descriptors are given back", |_| {
        let now = process::descriptors(server.pid()).expect("it is ours");
        (now <= before + 1).then_some(())
    });
    // Each worker had answered before it was killed, so none of the restarts had to wait.
    assert!(!server.log().contains("BACKOFF"), "a worker that made progress is replaced at once");
    let median = |times: &[std::time::Duration]| {
        let mut sorted = times.to_vec();
        sorted.sort_unstable();
        sorted[sorted.len() / 2]
    };
    let (early, late) = (median(&times[1..KILLS / 2]), median(&times[KILLS / 2..]));
    // Backoff would make it hundreds of times slower; a busy machine does not reach a factor of four in the median.
    assert!(late < early * 4, "restarts became slower: {early:?}, then {late:?}");
    assert!(ends.errors.load(Ordering::Relaxed) >= 1, "{ends:?}");
}

/// Ends the clients also when the storm panics: a scope waits for them.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

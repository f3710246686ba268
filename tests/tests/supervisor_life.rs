//! The life of a worker under a supervisor: crashes, kills, hangs, lies, and the supervisor's own start and end.

use std::os::unix::net::UnixStream;
use std::process::{Command, Output};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use bulkhead_tests::client::{self, Events};
use bulkhead_tests::fake::Fake;
use bulkhead_tests::process;
use bulkhead_tests::server::{Server, binary};
use bulkhead_tests::talk::read_events;
use bulkhead_tests::wait;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

fn stream(server: &Server, text: &str) -> Events {
    server.open_stream(&json!({"messages": [{"role": "user", "content": text}]}))
}

fn worker_pid(server: &Server) -> i32 {
    server.wait_for("a worker runs", |health| i32::try_from(health["workers"][0]["pid"].as_i64()?).ok())
}

fn begun(mut events: Events) -> Events {
    assert!(events.next_data().expect("the stream runs").is_some());
    events
}

#[test]
fn what_a_lying_worker_says_ends_its_incarnation_only() {
    let server = Server::start_fake(&[]);
    let lies =
        ["garbage=1", "long-frame=1", "unknown-id=1", "hello=1", "progress=1", "count=1", "logprob=1,-0.5", "flood"];
    for (count, lie) in lies.iter().enumerate() {
        let answer = server.chat(&format!("[{lie}] [once] one two"));
        let content = answer.json()["choices"][0]["message"]["content"].clone();
        // Whoever floods has said too much to take it back; the others are resumed behind their last true token.
        let is_flood = *lie == "flood";
        assert!(is_flood || content == json!("one two"), "{lie}: {content}");
        server.wait_for_log("killed: it broke the protocol");
        server.wait_for_health("/workers/0/incarnation", &json!(count + 2));
        assert_eq!(server.chat("fine").status, 200, "after {lie}");
    }
}

#[test]
fn a_hung_worker_is_replaced() {
    let server = Server::start_fake(&["--hang-timeout", "1500ms"]);
    for (count, way) in ["hang=1", "mute=1"].iter().enumerate() {
        let (events, is_done) = read_events(stream(&server, &format!("[{way}] [once] one two")));
        assert!(is_done, "{events:?}");
        server.wait_for_log("killed: it hung");
        server.wait_for_health("/workers/0/incarnation", &json!(count + 2));
        server.wait_until_loaded();
    }
    // A request that is only slow is left alone.
    assert_eq!(server.chat("[delay=400] [repeat=6] word").status, 200);
    assert_eq!(server.health()["workers"][0]["incarnation"], 3);
}

#[test]
fn a_worker_that_closes_its_link_and_stays_is_killed() {
    let server = Server::start_fake(&[]);
    assert_eq!(server.chat("[close=1] [once] one two").status, 200);
    server.wait_for_log("it closed its link and stayed");
    server.wait_for_health("/workers/0/incarnation", &json!(2));
}

#[test]
fn fifty_kills_under_load_leave_nothing_behind() {
    let server = Server::start_fake(&[]);
    let descriptors = || process::descriptors(server.pid()).expect("it is ours");
    let before = descriptors();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let mut times = Vec::new();
    thread::scope(|scope| {
        for index in 0..4 {
            let (server, is_over) = (&server, &is_over);
            scope.spawn(move || {
                while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                    let text = format!("[delay=1] [repeat=20] load {index}");
                    let response = server.chat(&text);
                    assert_eq!(response.status, 200, "{}", response.text);
                }
            });
        }
        for count in 1..=50 {
            let start = Instant::now();
            process::signal(worker_pid(&server), Signal::SIGKILL);
            server.wait_for_health("/workers/0/incarnation", &json!(count + 1));
            server.wait_for_health("/status", &json!("healthy"));
            times.push(start.elapsed());
        }
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    server.wait_for_health("/queue", &json!({"running": 0, "waiting": 0}));
    let slowest = times.iter().max().expect("there were restarts");
    assert!(*slowest < Duration::from_secs(3), "the slowest restart took {slowest:?}");
    wait::until("one child is left and no zombie", || {
        matches!(&process::children(server.pid())[..], [child] if child.state != 'Z').then_some(())
    });
    // Connections of the last clients may still be closing.
    wait::until("descriptors have come back", || (descriptors() <= before).then_some(()));
}

#[test]
fn a_worker_that_never_gets_ready_is_given_up() {
    let server = Server::spawn_fake(Fake { load: "fail tensor x is too short\nexit 20", ..Fake::default() }, &[]);
    let health = server.wait_for_health("/status", &json!("unhealthy"));
    assert_eq!(health["workers"][0]["state"], "FATAL");
    let reason = health["reason"].as_str().expect("is text");
    assert_eq!(reason, "the model cannot be served: tensor x is too short");
    assert_eq!(server.get("/health").status, 503);
    let refused = server.chat("x");
    assert_eq!((refused.status, refused.json()["error"]["code"].clone()), (503, json!("model_unavailable")));
    assert!(refused.headers.contains_key("retry-after"));
    assert!(process::children(server.pid()).is_empty());
}

#[test]
fn a_start_that_fails_backs_off() {
    for (fake, arguments) in [
        (Fake { load: "abort", ..Fake::default() }, &[][..]),
        (Fake { words: "exit 3", ..Fake::default() }, &[]),
        (Fake { load: "stall", ..Fake::default() }, &["--load-timeout", "300ms"]),
    ] {
        let server = Server::spawn_fake(fake, arguments);
        server.wait_for_health("/workers/0/state", &json!("BACKOFF"));
        let health = server.wait_for_health("/workers/0/incarnation", &json!(2));
        assert_eq!(health["status"], "loading");
    }
    // What has no words of its own left is told by what it was about.
    for (load, arguments, cause) in [
        ("steps 3\nabort", &[][..], "crashed by SIGABRT"),
        ("steps 3\nstall", &["--load-timeout", "300ms"], "killed: its load did not move"),
    ] {
        let server = Server::spawn_fake(Fake { load, ..Fake::default() }, arguments);
        let health = server.wait_for_health("/workers/0/state", &json!("BACKOFF"));
        assert_eq!(health["workers"][0]["last_end"], json!(format!("{cause}, while it loaded the weights")));
    }
    let server = Server::spawn_fake(Fake { words: "wrong-version", ..Fake::default() }, &[]);
    let health = server.wait_for_health("/workers/0/state", &json!("FATAL"));
    assert!(health["reason"].as_str().is_some_and(|reason| reason.contains("version")), "{health}");
}

#[test]
fn a_load_that_moves_is_left_alone() {
    let server = Server::spawn_fake(Fake { load: "steps 40", ..Fake::default() }, &["--load-timeout", "300ms"]);
    server.wait_until_loaded();
    assert_eq!(server.health()["workers"][0]["incarnation"], 1);
}

#[test]
fn standard_error_of_a_worker_is_carried() {
    let server = Server::start_fake(&[]);
    assert_eq!(server.chat("[say=hello-from-the-worker] x").status, 200);
    let line: Value = serde_json::from_str(&server.wait_for_log("hello-from-the-worker")).expect("the log is JSON");
    assert_eq!((&line["incarnation"], &line["message"]), (&json!(1), &json!("worker says")));
}

#[test]
fn a_worker_ends_with_its_supervisor() {
    // Also where it does not look at its link, and so does not see the end of that.
    for (load, state) in [("", "RUNNING"), ("steps 1\nstall", "LOADING")] {
        let mut server = Server::spawn_fake(Fake { load, ..Fake::default() }, &[]);
        server.wait_for_health("/workers/0/state", &json!(state));
        let pid = worker_pid(&server);
        server.signal(Signal::SIGKILL);
        assert!(!server.wait().success());
        wait::until("the worker has ended", || (!process::is_alive(pid)).then_some(()));
    }
}

#[test]
fn a_stop_lets_running_requests_end() {
    let mut server = Server::start_fake(&[]);
    let start = Instant::now();
    let events = begun(stream(&server, "[delay=20] [repeat=40] word"));
    server.signal(Signal::SIGTERM);
    server.wait_for_log("shutting down");
    let refused = server.chat("x");
    assert_eq!((refused.status, refused.json()["error"]["code"].clone()), (503, json!("shutting_down")));
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(server.get("/health/ready").status, 503);
    assert!(read_events(events).1, "the stream ended well");
    assert_eq!(server.wait().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_stop_ends_what_takes_too_long() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut server = Server::start_fake(&["--shutdown-timeout", "2s"]);
        let events = begun(stream(&server, "[delay=20] [repeat=4000] word"));
        let start = Instant::now();
        server.signal(signal);
        let (events, is_done) = read_events(events);
        assert_eq!(events.last().expect("there are events")["error"]["code"], "shutting_down");
        assert!(!is_done);
        assert_eq!(server.wait().code(), Some(0));
        assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    }
}

#[test]
fn a_second_signal_ends_at_once() {
    let mut server = Server::start_fake(&["--shutdown-timeout", "1h"]);
    let _running = begun(stream(&server, "[delay=20] [repeat=4000] word"));
    server.signal(Signal::SIGTERM);
    server.wait_for_log("shutting down");
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(1));
    let own_pid = i32::try_from(std::process::id()).expect("process ids fit");
    wait::until("no zombie is left", || {
        process::children(own_pid).iter().all(|child| child.state != 'Z').then_some(())
    });
}

fn run(mut command: Command) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = command.output().expect("it runs");
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

#[test]
fn what_cannot_start_says_so_in_one_line_and_exits_with_2() {
    let server = Server::start_fake(&[]);
    let port_in_use = server.address.to_string();
    let other_dir = server.runtime_dir().display().to_string();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = folder.path().join("bad.toml");
    std::fs::write(&config, "queue_mx = 3\n").expect("is written");
    let config = config.display().to_string();
    for (flags, text) in [
        (&["--listen", port_in_use.as_str()][..], "the address is in use"),
        (&["--listen", "0.0.0.0:0"], "--allow-unauthenticated"),
        (&["--model", "/nowhere/model"], "model folder /nowhere/model does not exist"),
        (&["--model", "/dev/null"], "is not a folder"),
        (&["--model", "/tmp"], "has no config.json"),
        (&["--worker", "/nowhere/worker"], "worker /nowhere/worker does not exist"),
        (&["--worker", "/dev/null"], "is not an executable file"),
        (&["--device", "cuda:0", "--worker-cuda", "/nowhere/worker"], "no CUDA worker is installed (/nowhere/worker"),
        (&["--config", config.as_str()], "bad.toml:1: unknown setting \"queue_mx\", did you mean \"queue_max\"?"),
        (&["--runtime-dir", other_dir.as_str()], "another bulkhead uses"),
    ] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (code, stderr) = run(Fake::default().command(folder.path(), flags));
        assert_eq!(code, Some(2), "{flags:?}: {stderr}");
        assert!(stderr.starts_with("bulkhead: ") && stderr.contains(text), "{flags:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

#[test]
fn the_environment_is_a_layer_and_can_be_listed() {
    let mut command = Command::new(binary("bulkhead"));
    command.args(["config", "--threads", "3"]).env_clear().env("BULKHEAD_LISTEN", "localhost:9");
    let output = command.output().expect("it runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("listen = \"localhost:9\"  # BULKHEAD_LISTEN\n"), "{text}");
    assert!(text.contains("threads = 3  # --threads\n"), "{text}");
    let version = Command::new(binary("bulkhead")).arg("--version").output().expect("it runs");
    assert!(String::from_utf8_lossy(&version.stdout).starts_with("bulkhead "));
}

#[test]
fn bulkheadctl_tells_the_status_with_supervisorctls_codes() {
    let mut server = Server::start_fake(&[]);
    let ask = |server: &Server, flags: &[&str]| {
        let mut command = Command::new(binary("bulkheadctl"));
        command.arg("--runtime-dir").arg(server.runtime_dir()).args(flags).arg("status");
        let Output { status, stdout, .. } = command.output().expect("it runs");
        (status.code(), String::from_utf8_lossy(&stdout).into_owned())
    };
    let (code, text) = ask(&server, &[]);
    let pid = worker_pid(&server);
    assert_eq!(code, Some(0));
    assert!(text.starts_with("fake-model ") && text.contains(&format!("RUNNING   pid {pid}, uptime 0:00:")), "{text}");
    assert!(text.contains("0 running, 0 waiting"), "{text}");
    let (code, text) = ask(&server, &["--json"]);
    let status: Value = serde_json::from_str(&text).expect("is JSON");
    assert_eq!((code, &status["workers"][0]["state"]), (Some(0), &json!("RUNNING")));
    let socket = server.runtime_dir().join("admin.sock");
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&socket).expect("is there"));
    assert_eq!(mode & 0o777, 0o600);
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
    assert!(!socket.exists());
    assert_eq!(ask(&server, &[]).0, Some(4));

    let given_up = Server::spawn_fake(Fake { load: "exit 21", ..Fake::default() }, &[]);
    given_up.wait_for_health("/workers/0/state", &json!("FATAL"));
    assert_eq!(ask(&given_up, &[]).0, Some(3));
}

/// Runs bulkheadctl against a server: exit code and standard output.
fn ctl(server: &Server, arguments: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(binary("bulkheadctl"));
    command.arg("--runtime-dir").arg(server.runtime_dir()).args(arguments);
    let Output { status, stdout, .. } = command.output().expect("it runs");
    (status.code(), String::from_utf8_lossy(&stdout).into_owned())
}

fn says(text: &str) -> (Option<i32>, String) {
    (Some(0), text.to_owned())
}

#[test]
fn bulkheadctl_stops_starts_and_restarts() {
    let server = Server::start_fake(&[]);
    assert_eq!(ctl(&server, &["start"]), says("fake-model: ERROR (already started)\n"));
    assert_eq!(ctl(&server, &["stop", "fake-model"]), says("fake-model: stopped\n"));
    assert_eq!(ctl(&server, &["stop"]), says("fake-model: ERROR (not running)\n"));
    assert_eq!(ctl(&server, &["status"]).0, Some(3));
    let refused = server.chat("x");
    assert_eq!((refused.status, refused.json()["error"]["code"].clone()), (503, json!("model_unavailable")));
    assert_eq!(server.get("/health/live").status, 200);
    assert_eq!(ctl(&server, &["start", "all"]), says("fake-model: started\n"));
    assert_eq!(server.chat("x").status, 200);
    assert_eq!(ctl(&server, &["restart"]), says("fake-model: stopped\nfake-model: started\n"));
    assert_eq!(server.health()["workers"][0]["incarnation"], 3);
    assert_eq!(ctl(&server, &["restart", "other"]), (Some(1), "other: ERROR (no such process)\n".into()));
    assert_eq!(ctl(&server, &["status", "other"]).0, Some(4));
    assert_eq!(ctl(&server, &["status", "fake-model"]).0, Some(0));
    assert_eq!(ctl(&server, &["cancel", "x"]).0, Some(2));
    assert_eq!(ctl(&server, &["version"]), says(&format!("{}\n", env!("CARGO_PKG_VERSION"))));

    let given_up = Server::spawn_fake(Fake { load: "fail tensor x is too short\nexit 20", ..Fake::default() }, &[]);
    given_up.wait_for_health("/workers/0/state", &json!("FATAL"));
    let (code, text) = ctl(&given_up, &["start"]);
    assert_eq!(code, Some(7));
    assert_eq!(text, "fake-model: ERROR (the model cannot be served: tensor x is too short)\n");
}

/// Runs bulkheadctl beside what else happens.
fn ctl_beside<'scope>(
    scope: &'scope Scope<'scope, '_>,
    server: &'scope Server,
    arguments: &'static [&'static str],
) -> ScopedJoinHandle<'scope, (Option<i32>, String)> {
    scope.spawn(move || ctl(server, arguments))
}

/// Expects that a new request is refused with a word when to try again.
fn is_refused(server: &Server) {
    let refused = server.chat("x");
    assert_eq!((refused.status, refused.json()["error"]["code"].clone()), (503, json!("model_unavailable")));
    assert!(refused.headers.contains_key("retry-after"));
    assert_eq!(server.get("/health/ready").status, 503);
}

#[test]
fn a_stop_waits_for_the_requests_that_there_are() {
    let server = Server::start_fake(&[]);
    thread::scope(|scope| {
        let running = begun(stream(&server, "[delay=20] [repeat=60] word"));
        let whole = scope.spawn(|| server.chat("[delay=20] [repeat=60] one"));
        server.wait_for_health("/queue/running", &json!(2));
        let stopping = ctl_beside(scope, &server, &["stop"]);
        server.wait_for_health("/workers/0/stops_when_idle", &json!(true));
        is_refused(&server);
        assert_eq!(server.health()["status"], "unhealthy");
        assert!(ctl(&server, &["status"]).1.contains("stops when its requests have ended"));
        // A death in the meantime is a pause.
        process::signal(worker_pid(&server), Signal::SIGKILL);
        let (events, is_done) = read_events(running);
        let texts = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
        assert_eq!((texts.collect::<String>(), is_done), (vec!["word"; 60].join(" "), true));
        let whole = whole.join().expect("does not panic");
        assert_eq!(whole.json()["choices"][0]["message"]["content"], vec!["one"; 60].join(" "));
        assert_eq!(stopping.join().expect("does not panic"), says("fake-model: stopped\n"));
    });
    is_refused(&server);
    assert_eq!(server.metric_sum("bulkhead:request_failure_total"), 0.0);
    assert_eq!(ctl(&server, &["start"]), says("fake-model: started\n"));
    assert_eq!(server.chat("x").status, 200);
}

#[test]
fn a_stop_at_once_ends_requests_with_a_word_when_to_try_again() {
    let server = Server::start_fake(&[]);
    // Also one that waits for its requests is cut short.
    for is_draining in [false, true] {
        thread::scope(|scope| {
            let mut streamed = begun(stream(&server, "[delay=10] [repeat=4000] word"));
            assert!(streamed.next_data().expect("the stream runs").is_some());
            let whole = scope.spawn(|| server.chat("[delay=10] [repeat=4000] word"));
            server.wait_for_health("/queue/running", &json!(2));
            let stopping = is_draining.then(|| ctl_beside(scope, &server, &["stop"]));
            server.wait_for_health("/workers/0/stops_when_idle", &json!(is_draining));
            assert_eq!(ctl(&server, &["stop", "--now"]), says("fake-model: stopped\n"));
            let whole = whole.join().expect("does not panic");
            assert_eq!((whole.status, &whole.json()["error"]["code"]), (503, &json!("model_unavailable")));
            assert!(whole.headers.contains_key("retry-after"));
            let (events, is_done) = read_events(streamed);
            let last = events.last().expect("there are events");
            assert_eq!((&last["error"]["code"], is_done), (&json!("model_unavailable"), false));
            if let Some(stopping) = stopping {
                assert_eq!(stopping.join().expect("does not panic"), says("fake-model: stopped\n"));
            }
        });
        assert_eq!(ctl(&server, &["start"]), says("fake-model: started\n"));
        assert_eq!(server.chat("x").status, 200);
    }
}

#[test]
fn a_stop_that_waits_is_taken_back_by_a_start() {
    let server = Server::start_fake(&[]);
    thread::scope(|scope| {
        let running = begun(stream(&server, "[delay=10] [repeat=100] word"));
        let stopping = ctl_beside(scope, &server, &["stop"]);
        server.wait_for_health("/workers/0/stops_when_idle", &json!(true));
        assert_eq!(ctl(&server, &["start"]), says("fake-model: started\n"));
        assert_eq!(server.chat("x").status, 200);
        assert!(read_events(running).1, "the stream ended well");
        assert_eq!(server.health()["workers"][0]["incarnation"], 1);
        // Whoever waits for the stop sees the next one.
        assert_eq!(ctl(&server, &["stop"]), says("fake-model: stopped\n"));
        assert_eq!(stopping.join().expect("does not panic"), says("fake-model: stopped\n"));
    });
}

#[test]
fn each_end_of_a_worker_has_its_word_and_its_consequence() {
    for (signal, cause, state) in [
        (Signal::SIGSYS, "sandbox violation", "FATAL"),
        (Signal::SIGABRT, "crashed by SIGABRT", "RUNNING"),
        (Signal::SIGTERM, "crashed by SIGTERM", "RUNNING"),
        (Signal::SIGKILL, "killed from outside", "RUNNING"),
    ] {
        let server = Server::start_fake(&[]);
        process::signal(worker_pid(&server), signal);
        let line = server.wait_for_log("worker ended");
        assert!(line.contains(cause), "{line}");
        // What is given up is not started again; the others run again, as the next incarnation.
        let incarnation = if state == "FATAL" { 1 } else { 2 };
        server.wait_for(&format!("{cause} leads to {state}"), |health| {
            let worker = &health["workers"][0];
            (worker["state"] == state && worker["incarnation"] == incarnation).then_some(())
        });
        assert_eq!(server.get("/health/live").status, 200);
    }
    // What ends itself in order, with nothing left to do, is not wanted back.
    for (code, state) in [("0", "EXITED"), ("21", "FATAL"), ("27", "FATAL"), ("28", "FATAL")] {
        let server = Server::spawn_fake(Fake { load: &format!("exit {code}"), ..Fake::default() }, &[]);
        server.wait_for_health("/workers/0/state", &json!(state));
        assert_eq!(server.health()["status"], "unhealthy");
    }
}

#[test]
fn a_restart_on_request_is_a_pause_for_clients() {
    let server = Server::start_fake(&[]);
    let events = begun(stream(&server, "[delay=10] [repeat=50] word"));
    wait::until("a token is delivered", || {
        (server.metric("bulkhead:generation_tokens_total") >= Some(1.0)).then_some(())
    });
    assert_eq!(ctl(&server, &["restart"]).0, Some(0));
    let (events, is_done) = read_events(events);
    let texts = events.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str());
    assert_eq!((texts.collect::<String>(), is_done), (vec!["word"; 50].join(" "), true));
    assert_eq!(server.metric("bulkhead:resumes_total"), Some(1.0));
}

#[test]
fn bulkheadctl_lists_and_cancels_requests() {
    let server = Server::start_fake(&[]);
    let running = begun(stream(&server, "[delay=20] [repeat=4000] word"));
    let (code, text) = ctl(&server, &["--json", "queue"]);
    let queue: Value = serde_json::from_str(&text).expect("is JSON");
    let request = &queue["requests"][0];
    assert_eq!((code, &request["state"]), (Some(0), &json!("running")), "{text}");
    let id = request["id"].to_string();
    assert!(ctl(&server, &["queue"]).1.starts_with(&format!("{id} ")), "{text}");
    assert_eq!(ctl(&server, &["cancel", &id]), says(&format!("{id}: cancelled\n")));
    let (events, is_done) = read_events(running);
    assert_eq!(events.last().expect("there are events")["error"]["code"], "request_cancelled");
    assert!(!is_done);
    server.wait_for_health("/queue/running", &json!(0));
    assert_eq!(ctl(&server, &["cancel", &id]).0, Some(1));
    assert_eq!(ctl(&server, &["queue"]), says(""));
}

#[test]
fn bulkheadctl_shows_the_end_of_the_log_and_follows_it() {
    use std::io::BufRead;
    let server = Server::start_fake(&[]);
    let (code, text) = ctl(&server, &["tail", "-n", "1000"]);
    assert_eq!(code, Some(0));
    assert_eq!(text.lines().next(), server.log().lines().next());
    assert_eq!(ctl(&server, &["tail", "-n", "1"]).1.lines().count(), 1);
    let mut command = Command::new(binary("bulkheadctl"));
    command.arg("--runtime-dir").arg(server.runtime_dir()).args(["tail", "-f", "-n", "0"]);
    let mut follower = command.stdout(std::process::Stdio::piped()).spawn().expect("it runs");
    let mut lines = std::io::BufReader::new(follower.stdout.take().expect("is a pipe")).lines();
    // It begins when it has connected, so the line is said until it is seen.
    let seen =
        std::thread::spawn(move || lines.find(|line| line.as_ref().is_ok_and(|line| line.contains("followed-line"))));
    wait::until("the line is seen", || {
        assert_eq!(server.chat("[say=followed-line] x").status, 200);
        seen.is_finished().then_some(())
    });
    assert!(seen.join().expect("does not panic").is_some());
    follower.kill().expect("it runs");
    follower.wait().expect("it was killed");
}

#[test]
fn a_stale_socket_is_replaced() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run_dir = folder.path().join("shared-run");
    let flag = run_dir.display().to_string();
    for _ in 0..2 {
        let mut server = Server::spawn_fake(Fake::default(), &["--runtime-dir", flag.as_str()]);
        wait::until("the socket answers", || UnixStream::connect(run_dir.join("admin.sock")).ok());
        // Killed, it leaves its socket behind.
        server.signal(Signal::SIGKILL);
        server.wait();
        assert!(run_dir.join("admin.sock").exists());
    }
}

#[test]
fn a_raw_connection_that_says_nothing_is_harmless() {
    let server = Server::start_fake(&[]);
    let silent = client::connect(server.address).expect("the server listens");
    assert_eq!(server.get("/health").status, 200);
    drop(silent);
}

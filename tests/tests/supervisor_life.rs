//! The life of a worker under a supervisor: crashes, kills, hangs, lies, and the supervisor's own start and end.

use std::process::{Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use bulkhead_tests::http::{self, Stream};
use bulkhead_tests::service::{Service, Setup, binary, children, command, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";

fn streamed(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}], "stream": true})
}

fn kill_worker(service: &Service) {
    let pid = wait_for("a worker", || service.worker_pid());
    // It may have been replaced in between, which is as good.
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap_or_default();
}

#[test]
fn a_crash_in_mid_stream_is_an_error_event_and_a_new_worker() {
    let service = Service::ready(&[]);
    let mut stream = Stream::post(service.port, CHAT, &streamed("[abort=2] one two three"));
    assert_eq!(stream.status, 200);
    let (events, is_done) = stream.events();
    let (last, before) = events.split_last().expect("there are events");
    let content: String = before.iter().filter_map(|event| event["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!((content.as_str(), is_done), ("one two", false));
    assert_eq!(last["error"]["code"], "worker_crashed");
    service.wait_for_health("/workers/0/incarnation", &json!(2));
    // What comes meanwhile waits for the next worker.
    assert_eq!(service.chat("again").json()["choices"][0]["message"]["content"], "again");
    let health = service.get("/health").json();
    assert_eq!(health["workers"][0]["restarts"], 1);
    let whole = service.chat("[exit=1,101] one two");
    assert_eq!(whole.status, 503);
    assert!(whole.header("retry-after").is_some());
    assert_eq!(whole.json()["error"]["code"], "worker_crashed");
    assert_eq!(service.chat("and again").status, 200);
}

#[test]
fn what_a_lying_worker_says_ends_its_incarnation_only() {
    let service = Service::ready(&[]);
    for (count, lie) in ["garbage=1", "long-frame=1", "unknown-id=1", "no-prompt", "flood"].iter().enumerate() {
        let answer = service.chat(&format!("[{lie}] one two"));
        assert_eq!((answer.status, answer.json()["error"]["code"].clone()), (503, json!("worker_crashed")), "{lie}");
        service.wait_for_log("killed: it broke the protocol");
        service.wait_for_health("/workers/0/incarnation", &json!(count + 2));
        assert_eq!(service.chat("fine").status, 200, "after {lie}");
    }
    let last_end = service.get("/health").json()["workers"][0]["last_end"].clone();
    assert!(last_end.as_str().is_some_and(|end| end.starts_with("killed: it broke the protocol: ")), "{last_end}");
}

#[test]
fn a_hung_worker_is_replaced() {
    let service = Service::ready(&["--hang-timeout", "1500ms"]);
    for (count, way) in ["hang=1", "mute=1"].iter().enumerate() {
        let (events, _) = Stream::post(service.port, CHAT, &streamed(&format!("[{way}] one two"))).events();
        let text = events.last().expect("there are events")["error"]["message"].to_string();
        assert!(text.contains("killed: it hung"), "{text}");
        service.wait_for_health("/workers/0/incarnation", &json!(count + 2));
        service.wait_until_ready();
    }
    // A request that is only slow is left alone.
    assert_eq!(service.chat("[delay=400] [repeat=6] word").status, 200);
}

#[test]
fn a_worker_that_closes_its_link_and_stays_is_killed() {
    let service = Service::ready(&[]);
    assert_eq!(service.chat("[close=1] one two").status, 503);
    service.wait_for_log("it closed its link and stayed");
    service.wait_for_health("/workers/0/incarnation", &json!(2));
}

#[test]
fn fifty_kills_under_load_leave_nothing_behind() {
    let service = Service::ready(&[]);
    let descriptors = service.descriptors();
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let mut times = Vec::new();
    thread::scope(|scope| {
        for index in 0..4 {
            let (service, is_over) = (&service, &is_over);
            scope.spawn(move || {
                while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                    let text = format!("[delay=1] [repeat=20] load {index}");
                    let response = service.chat(&text);
                    match response.status {
                        200 => {}
                        503 => assert_eq!(response.json()["error"]["code"], "worker_crashed"),
                        other => panic!("{other}: {}", response.json()),
                    }
                }
            });
        }
        for count in 1..=50 {
            let start = Instant::now();
            kill_worker(&service);
            service.wait_for_health("/workers/0/incarnation", &json!(count + 1));
            service.wait_for_health("/status", &json!("healthy"));
            times.push(start.elapsed());
        }
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    service.wait_for_health("/queue", &json!({"running": 0, "waiting": 0}));
    let slowest = times.iter().max().expect("there were restarts");
    assert!(*slowest < Duration::from_secs(3), "the slowest restart took {slowest:?}");
    wait_for("one child and no zombie", || {
        matches!(service.children()[..], [(_, state)] if state != 'Z').then_some(())
    });
    // Connections of the last clients may still be closing.
    wait_for("descriptors to come back", || (service.descriptors() <= descriptors).then_some(()));
}

#[test]
fn a_worker_that_never_gets_ready_is_given_up() {
    let service = Service::start(&Setup { load: "fail tensor x is too short\nexit 20", ..Setup::default() });
    let health = service.wait_for_health("/status", &json!("unhealthy"));
    assert_eq!(health["workers"][0]["state"], "FATAL");
    let reason = health["reason"].as_str().expect("is text");
    assert_eq!(reason, "the model cannot be served: tensor x is too short");
    assert_eq!(service.get("/health").status, 503);
    let refused = service.chat("x");
    assert_eq!((refused.status, refused.json()["error"]["code"].clone()), (503, json!("model_unavailable")));
    assert!(refused.header("retry-after").is_some());
    assert!(service.children().is_empty());
}

#[test]
fn a_start_that_fails_backs_off() {
    for setup in [
        Setup { load: "abort", ..Setup::default() },
        Setup { worker_words: "exit 3", ..Setup::default() },
        Setup { load: "stall", flags: &["--load-timeout", "300ms"], ..Setup::default() },
    ] {
        let service = Service::start(&setup);
        service.wait_for_health("/workers/0/state", &json!("BACKOFF"));
        let health = service.wait_for_health("/workers/0/incarnation", &json!(2));
        assert_eq!(health["status"], "loading");
    }
    let service = Service::start(&Setup { worker_words: "wrong-version", ..Setup::default() });
    let health = service.wait_for_health("/workers/0/state", &json!("FATAL"));
    assert!(health["reason"].as_str().is_some_and(|reason| reason.contains("version")), "{health}");
}

#[test]
fn a_load_that_moves_is_left_alone() {
    let service = Service::start(&Setup { load: "steps 40", flags: &["--load-timeout", "300ms"], ..Setup::default() });
    service.wait_until_ready();
    assert_eq!(service.get("/health").json()["workers"][0]["incarnation"], 1);
}

#[test]
fn standard_error_of_a_worker_is_carried() {
    let service = Service::ready(&[]);
    assert_eq!(service.chat("[say=hello-from-the-worker] x").status, 200);
    let line: Value = serde_json::from_str(&service.wait_for_log("hello-from-the-worker")).expect("the log is JSON");
    assert_eq!((&line["incarnation"], &line["message"]), (&json!(1), &json!("worker says")));
}

#[test]
fn a_worker_ends_with_its_supervisor() {
    let mut service = Service::ready(&[]);
    let pid = service.worker_pid().expect("there is a worker");
    service.signal(Signal::SIGKILL);
    assert!(!service.wait().success());
    wait_for("the worker's end", || kill(Pid::from_raw(pid), None).is_err().then_some(()));
}

#[test]
fn a_stop_lets_running_requests_end() {
    let mut service = Service::ready(&[]);
    let start = Instant::now();
    let mut stream = Stream::post(service.port, CHAT, &streamed("[delay=20] [repeat=40] word"));
    assert!(stream.event().is_some());
    service.signal(Signal::SIGTERM);
    service.wait_for_log("shutting down");
    let refused = service.chat("x");
    assert_eq!((refused.status, refused.json()["error"]["code"].clone()), (503, json!("shutting_down")));
    assert!(refused.header("retry-after").is_some());
    assert_eq!(service.get("/health/ready").status, 503);
    assert!(stream.events().1, "the stream ended well");
    assert_eq!(service.wait().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_stop_ends_what_takes_too_long() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut service = Service::ready(&["--shutdown-timeout", "2s"]);
        let mut stream = Stream::post(service.port, CHAT, &streamed("[delay=20] [repeat=4000] word"));
        assert!(stream.event().is_some());
        let start = Instant::now();
        service.signal(signal);
        let (events, is_done) = stream.events();
        assert_eq!(events.last().expect("there are events")["error"]["code"], "shutting_down");
        assert!(!is_done);
        assert_eq!(service.wait().code(), Some(0));
        assert!(start.elapsed() < Duration::from_secs(4), "{:?}", start.elapsed());
    }
}

#[test]
fn a_second_signal_ends_at_once() {
    let mut service = Service::ready(&["--shutdown-timeout", "1h"]);
    let mut stream = Stream::post(service.port, CHAT, &streamed("[delay=20] [repeat=4000] word"));
    assert!(stream.event().is_some());
    service.signal(Signal::SIGTERM);
    service.wait_for_log("shutting down");
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait().code(), Some(1));
    wait_for("no child to be left", || children(std::process::id()).iter().all(|(_, s)| *s != 'Z').then_some(()));
}

fn run(mut command: Command) -> (Option<i32>, String) {
    let Output { status, stderr, .. } = command.output().expect("it runs");
    (status.code(), String::from_utf8_lossy(&stderr).into_owned())
}

#[test]
fn what_cannot_start_says_so_in_one_line_and_exits_with_2() {
    let service = Service::ready(&[]);
    let port_in_use = format!("127.0.0.1:{}", service.port);
    let other_dir = service.runtime_dir().display().to_string();
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
        (&["--device", "cuda:0"], "no CUDA worker is installed"),
        (&["--config", config.as_str()], "bad.toml:1: unknown setting \"queue_mx\", did you mean \"queue_max\"?"),
        (&["--runtime-dir", other_dir.as_str()], "another bulkhead uses"),
    ] {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let command = command(folder.path(), &Setup { flags, ..Setup::default() });
        let (code, stderr) = run(command);
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
    let mut service = Service::ready(&[]);
    let ask = |service: &Service, flags: &[&str]| {
        let mut command = Command::new(binary("bulkheadctl"));
        command.arg("--runtime-dir").arg(service.runtime_dir()).args(flags).arg("status");
        let Output { status, stdout, .. } = command.output().expect("it runs");
        (status.code(), String::from_utf8_lossy(&stdout).into_owned())
    };
    let (code, text) = ask(&service, &[]);
    let pid = service.worker_pid().expect("there is a worker");
    assert_eq!(code, Some(0));
    assert!(text.starts_with("fake-model ") && text.contains(&format!("RUNNING   pid {pid}, uptime 0:00:")), "{text}");
    assert!(text.contains("0 running, 0 waiting"), "{text}");
    let (code, text) = ask(&service, &["--json"]);
    let status: Value = serde_json::from_str(&text).expect("is JSON");
    assert_eq!((code, &status["workers"][0]["state"]), (Some(0), &json!("RUNNING")));
    let socket = service.runtime_dir().join("admin.sock");
    let mode = std::os::unix::fs::MetadataExt::mode(&std::fs::metadata(&socket).expect("is there"));
    assert_eq!(mode & 0o777, 0o600);
    service.signal(Signal::SIGTERM);
    assert_eq!(service.wait().code(), Some(0));
    assert!(!socket.exists());
    assert_eq!(ask(&service, &[]).0, Some(4));

    let given_up = Service::start(&Setup { load: "exit 21", ..Setup::default() });
    given_up.wait_for_health("/workers/0/state", &json!("FATAL"));
    assert_eq!(ask(&given_up, &[]).0, Some(3));
}

#[test]
fn a_stale_socket_is_replaced() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let run_dir = folder.path().join("shared-run");
    let flag = run_dir.display().to_string();
    for _ in 0..2 {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let flags = ["--runtime-dir", flag.as_str()];
        let mut command = command(folder.path(), &Setup { flags: &flags, ..Setup::default() });
        command.stderr(std::process::Stdio::null());
        let mut process = command.spawn().expect("it starts");
        wait_for("the socket to answer", || std::os::unix::net::UnixStream::connect(run_dir.join("admin.sock")).ok());
        // Killed, it leaves its socket behind.
        process.kill().expect("it lives");
        process.wait().expect("it is our child");
        assert!(run_dir.join("admin.sock").exists());
    }
}

#[test]
fn a_raw_connection_that_says_nothing_is_harmless() {
    let service = Service::ready(&[]);
    let silent = http::connect(service.port);
    assert_eq!(service.get("/health").status, 200);
    drop(silent);
}

//! How the supervisor starts, what it refuses, what it says about a broken model, and how it ends.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use bulkhead_tests::server::{Server, binary, command, demo_model, demo_model_copy};
use bulkhead_tests::talk::{CHAT, QUESTION, check_error, greedy, read_stream, with};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// The time that a stop may take by default, with what a slow machine adds.
const STOP_TIME_MAX: Duration = Duration::from_secs(6);

fn refuses(arguments: &[&str], words: &[&str]) {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let Output { status, stderr, .. } = command(folder.path(), arguments).output().expect("the binary can be started");
    let stderr = String::from_utf8(stderr).expect("messages are text");
    assert_eq!(status.code(), Some(2), "{arguments:?}: {stderr}");
    assert_eq!(stderr.lines().count(), 1, "one line: {stderr}");
    for word in words {
        assert!(stderr.contains(word), "{arguments:?}: {word:?} is not in {stderr:?}");
    }
}

#[test]
fn what_cannot_work_is_refused_with_one_line() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let path = |name: &str| folder.path().join(name).to_str().expect("the folder's name is text").to_owned();
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = taken.local_addr().expect("it is bound").to_string();
    refuses(&["--listen", &address], &["in use", &address]);
    refuses(&["--model", &path("nowhere")], &["does not exist", "nowhere"]);
    refuses(&["--model", folder.path().to_str().expect("text")], &["config.json"]);
    refuses(&["--listen", "nonsense"], &["listen", "nonsense"]);
    refuses(&["--device", "tpu"], &["device", "tpu"]);
    refuses(&["--listen", "0.0.0.0:0"], &["allow"]);
    refuses(&["--worker", &path("no-worker")], &["no-worker"]);
    refuses(&["--config", &path("no.toml")], &["no.toml"]);
    fs::write(path("typo.toml"), "listen = \"127.0.0.1:0\"\nmodle = \"x\"\n").expect("the folder can be written");
    refuses(&["--config", &path("typo.toml")], &["typo.toml:2", "modle", "model"]);
}

#[test]
fn the_built_in_model_is_found_from_anywhere() {
    let elsewhere = tempfile::tempdir().expect("a temporary folder can be made");
    let server = Server::spawn_with(&[], |command| {
        command.current_dir(elsewhere.path());
    });
    server.wait_until_loaded();
    assert_eq!(server.get("/v1/models").json().expect("JSON")["data"][0]["id"], "bulkhead-demo");
    drop(server);

    // Installed: the worker beside the supervisor, the model in the share folder.
    let prefix = elsewhere.path().join("prefix");
    let share = prefix.join("share/bulkhead/demo-model");
    fs::create_dir_all(prefix.join("bin")).expect("the folder can be written");
    fs::create_dir_all(&share).expect("the folder can be written");
    for name in ["bulkhead", "bulkhead-worker"] {
        fs::copy(binary(name), prefix.join("bin").join(name)).expect("a binary can be copied");
    }
    for entry in fs::read_dir(demo_model()).expect("the built-in model is in the source tree") {
        let entry = entry.expect("the folder can be read");
        fs::copy(entry.path(), share.join(entry.file_name())).expect("a model file can be copied");
    }
    let runtime_dir = elsewhere.path().join("run");
    let output = std::process::Command::new(prefix.join("bin/bulkhead"))
        .args([Path::new("config"), Path::new("--runtime-dir"), &runtime_dir])
        .output()
        .expect("the copy can be started");
    let listing = String::from_utf8(output.stdout).expect("the listing is text");
    let model =
        listing.lines().find(|line| line.starts_with("model ")).unwrap_or_else(|| panic!("no model: {listing}"));
    let share = share.canonicalize().expect("it was made");
    assert!(model.contains(share.to_str().expect("text")), "{model}");
}

#[test]
fn the_environment_configures_and_flags_win() {
    let model = demo_model();
    let server = Server::spawn_with(&[], |command| {
        command.env("BULKHEAD_MODEL", &model).env("BULKHEAD_MODEL_ID", "from-environment");
    });
    assert_eq!(server.get("/v1/models").json().expect("JSON")["data"][0]["id"], "from-environment");
    let server = Server::spawn_with(&["--model-id", "from-flag"], |command| {
        command.env("BULKHEAD_MODEL_ID", "from-environment");
    });
    assert_eq!(server.get("/v1/models").json().expect("JSON")["data"][0]["id"], "from-flag");
}

/// Does something to a model folder.
type Damage = fn(&Path);

#[test]
fn a_broken_model_is_named_and_not_tried_again() {
    let damages: [(&str, Damage, &[&str]); 4] = [
        (
            "cut weights",
            |folder| truncate(&folder.join("model.safetensors"), 1_000_000),
            &["model.safetensors", "tensor"],
        ),
        ("no weights", |folder| remove(&folder.join("model.safetensors")), &["safetensors"]),
        ("no tokenizer", |folder| remove(&folder.join("tokenizer.json")), &["tokenizer.json"]),
        ("another config", enlarge_vocabulary, &["embed_tokens", "model.safetensors"]),
    ];
    for (what, damage, words) in damages {
        let model = demo_model_copy();
        damage(model.path());
        let server = Server::spawn(&["--model", model.path().to_str().expect("text"), "--model-id", "broken"]);
        let health =
            server.wait_for("it is unhealthy", |health| (health["status"] == "unhealthy").then(|| health.clone()));
        assert_eq!(
            (&health["model_loaded"], &health["workers"][0]["state"]),
            (&json!(false), &json!("FATAL")),
            "{what}"
        );
        for word in words {
            assert!(
                health["reason"].as_str().is_some_and(|reason| reason.contains(word)),
                "{what}: {word} in {health}"
            );
        }
        assert_eq!(server.get("/health").status, 503);
        assert_eq!(server.get("/health/live").status, 200);
        assert_eq!(server.get("/v1/models").status, 200);
        let answer = server.post(CHAT, &greedy("Hi"));
        assert_eq!(answer.status, 503, "{what}");
        assert!(answer.headers.contains_key("retry-after"));
        check_error(&answer.json().expect("errors are JSON"));
        assert_eq!(server.health()["workers"][0]["incarnation"], 1, "{what}: one try is enough");
    }
}

fn remove(path: &Path) {
    fs::remove_file(path).expect("it is there");
}

/// Makes the config contradict the weights.
fn enlarge_vocabulary(folder: &Path) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).expect("it is there")).expect("it is JSON");
    config["vocab_size"] = (config["vocab_size"].as_u64().expect("a number") + 512).into();
    fs::write(path, config.to_string()).expect("it is ours");
}

fn truncate(path: &Path, bytes: u64) {
    let file = fs::File::options().write(true).open(path).expect("it is there");
    file.set_len(bytes).expect("it is ours");
}

#[test]
fn sigterm_lets_running_answers_end() {
    let mut server = Server::start(&["--allow-faults", "--faults-step-delay-ms", "10"]);
    let mut events = server.open_stream(&with(greedy(QUESTION), json!({"max_tokens": 40})));
    events.next_data().expect("the stream runs").expect("the stream goes on");
    server.signal(Signal::SIGTERM);
    let reply = read_stream(events).expect("the answer comes to its end");
    assert!(reply.error.is_none() && !reply.finish_reason.is_empty(), "{reply:?}");
    assert_eq!(server.wait().code(), Some(0), "{}", server.log());
}

#[test]
fn sigterm_and_ctrl_c_end_in_time_with_endless_answers_running() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut server = Server::start(&["--allow-faults", "--faults-step-delay-ms", "100"]);
        let worker = server.worker().expect("a worker runs").pid;
        let endless = with(greedy(QUESTION), json!({"max_tokens": 8000, "temperature": 2, "seed": 5}));
        let mut events = server.open_stream(&endless);
        events.next_data().expect("the stream runs").expect("the stream goes on");
        let start = Instant::now();
        server.signal(signal);
        // Refused with a typed error while it drains, or not accepted any more.
        if let Ok(answer) = server.try_post(CHAT, &greedy("Hi")) {
            assert_eq!(answer.status, 503, "{signal}");
        }
        drop(read_stream(events));
        assert_eq!(server.wait().code(), Some(0), "{signal}: {}", server.log());
        assert!(start.elapsed() < STOP_TIME_MAX, "{signal}: {:?}", start.elapsed());
        assert!(!bulkhead_tests::process::is_alive(worker), "{signal}: the worker is gone first");
    }
}

#[test]
fn text_never_reaches_the_log() {
    const CANARY: &str = "xyzzycanary";
    let mut server = Server::start(&["--log-level", "trace"]);
    let request = with(greedy(&format!("Repeat after me: {CANARY}")), json!({"stop": [format!("{CANARY}stop")]}));
    let reply = server.ask(&request);
    assert_eq!(server.ask_stream(&request), reply);
    let refused = [
        with(request.clone(), json!({"temperature": 9})),
        with(
            request.clone(),
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "url": CANARY}]}]}),
        ),
        with(request.clone(), json!({"max_tokens": 1_000_000})),
        json!({"messages": [{"role": CANARY, "content": CANARY}]}),
    ];
    for request in refused {
        assert_eq!(server.refused(CHAT, &request).0, 400, "{request}");
    }
    let worker = server.worker().expect("a worker runs").pid;
    bulkhead_tests::process::signal(worker, Signal::SIGKILL);
    // Its death is logged with the requests that it ran, of which there are none now.
    server.wait_for("a new worker runs", |health| (health["workers"][0]["incarnation"] == 2).then_some(()));
    server.wait_until_loaded();
    assert_eq!(server.ask(&request), reply);
    server.signal(Signal::SIGTERM);
    server.wait();
    let log = server.log();
    assert!(log.lines().count() > 5, "the log is on: {log}");
    assert!(!log.contains(CANARY), "{log}");
    let answer = reply.content.trim();
    assert!(answer.len() < 8 || !log.contains(answer), "{answer:?} in {log}");
}

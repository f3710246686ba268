//! A service whose model is exchanged under it, a service beside it that must not notice, and what came of each load.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use bulkhead_tests::client::WholeAnswer;
use bulkhead_tests::process;
use bulkhead_tests::server::{Server, binary};
use bulkhead_tests::talk::{COMPLETIONS, check_error};
use bulkhead_tests::wait;
use serde_json::{Value, json};
use tempfile::TempDir;

/// What a worker may hold at once of its own while it loads any of these folders; each is smaller than 100 MB. Units: KiB.
const HELD_KIB_MAX: u64 = 1 << 20;

/// What the supervisor may grow by, whatever its workers read and say. Units: KiB.
const SUPERVISOR_KIB_MAX: u64 = 64 << 10;

/// The causes that say what is wrong with a folder.
const NAMED: [&str; 3] = [
    "the model cannot be served: ",
    "the worker cannot do what its plan asks: ",
    "killed: it could not generate its first token: ",
];

/// What came of a load.
#[derive(Debug)]
pub(crate) struct Came {
    /// `RUNNING` or `FATAL`.
    pub(crate) state: String,
    /// Why it is not running.
    pub(crate) reason: String,
    /// Workers that were started for it.
    pub(crate) tries: u64,
}

impl Came {
    pub(crate) fn is_running(&self) -> bool {
        self.state == "RUNNING"
    }

    /// Says whether it was refused at the first try, for a cause that names what is wrong.
    pub(crate) fn is_named(&self) -> bool {
        let is_named = NAMED.iter().any(|cause| self.reason.strip_prefix(cause).is_some_and(|rest| !rest.is_empty()));
        self.state == "FATAL" && self.tries == 1 && is_named
    }
}

/// The service, its model's folder, and the neighbour.
pub(crate) struct Stage {
    pub(crate) server: Server,
    neighbour: Server,
    home: TempDir,
    source: PathBuf,
    expected: Value,
    supervisor_kib: u64,
}

impl Stage {
    /// Starts a service with a copy of a good model, and its neighbour with the model itself.
    pub(crate) fn new(source: PathBuf) -> Stage {
        Stage::with(source, &[])
    }

    /// As `new`, with further flags.
    pub(crate) fn with(source: PathBuf, flags: &[&str]) -> Stage {
        let home = tempfile::tempdir().expect("a temporary folder can be made");
        let folder = home.path().join("model");
        copy(&source, &folder);
        let server = Server::start(&[&["--model", text(&folder), "--model-id", "guest"], flags].concat());
        let neighbour = Server::start(&["--model", text(&source), "--model-id", "neighbour"]);
        let expected = answered(&neighbour);
        let supervisor_kib = peak_kib(server.pid());
        Stage { server, neighbour, home, source, expected, supervisor_kib }
    }

    /// Gives the folder that the model's folder lies in, which no worker may read.
    pub(crate) fn home(&self) -> &Path {
        self.home.path()
    }

    /// Puts the good model back, changes it, has the service load it, and sees what comes of it.
    pub(crate) fn load(&self, change: impl FnOnce(&Path)) -> Came {
        let folder = self.home.path().join("model");
        fs::remove_dir_all(&folder).expect("ours");
        copy(&self.source, &folder);
        change(&folder);
        let before = incarnation(&self.server.health());
        let mut order = self.ctl("restart");
        let mut held_kib = 0;
        let mut is_asked = false;
        let came = wait::until("the service runs or gives up", || {
            held_kib = held_kib.max(self.server.worker().and_then(|worker| own_kib(worker.pid)).unwrap_or(0));
            if !std::mem::replace(&mut is_asked, true) {
                assert_eq!(answered(&self.neighbour), self.expected, "the neighbour answers as ever");
            }
            let health = self.server.health();
            let worker = &health["workers"][0];
            let tries = incarnation(&health) - before;
            let state = worker["state"].as_str().expect("a state");
            let is_over = tries > 0 && matches!(state, "RUNNING" | "FATAL");
            let reason = health["reason"].as_str().unwrap_or_default().to_owned();
            is_over.then(|| Came { state: state.to_owned(), reason, tries })
        });
        drop(order.wait());
        assert!(held_kib < HELD_KIB_MAX, "a worker held {held_kib} KiB: {came:?}");
        came
    }

    fn ctl(&self, command: &str) -> Child {
        let mut ctl = Command::new(binary("bulkheadctl"));
        ctl.arg("--runtime-dir").arg(self.server.runtime_dir()).arg(command);
        ctl.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts")
    }

    /// Checks that a folder is refused at once, by name, with these words, and that the service says so and lives.
    pub(crate) fn refuses(&self, what: &str, change: impl FnOnce(&Path), words: &[&str]) {
        let came = self.load(change);
        assert!(came.is_named(), "{what}: {came:?}\n{}", self.server.log());
        for word in words {
            assert!(came.reason.contains(word), "{what}: {word:?} is not in {:?}", came.reason);
        }
        let health = self.server.get("/health").read_whole().expect("whole");
        assert_eq!((health.status, &health.json()["status"]), (503, &json!("unhealthy")), "{what}");
        assert_eq!(self.server.get("/health/live").status, 200, "{what}");
        let answer = self.complete("Hello");
        assert_eq!(answer.status, 503, "{what}: {answer:?}");
        check_error(&answer.json());
    }

    /// Asks the service to continue a text.
    pub(crate) fn complete(&self, prompt: &str) -> WholeAnswer {
        complete(&self.server, prompt)
    }

    /// Checks that the service goes on with a good model, and what all of it took.
    pub(crate) fn goes_on(&self) {
        let came = self.load(|_| {});
        assert!(came.is_running() && came.tries == 1, "{came:?}\n{}", self.server.log());
        assert_eq!(answered(&self.server), self.expected);
        let restarts = &self.neighbour.health()["workers"][0]["restarts"];
        assert_eq!(*restarts, json!(0), "the neighbour's worker is its first");
        let grown = peak_kib(self.server.pid()).saturating_sub(self.supervisor_kib);
        println!("the supervisor grew by {grown} KiB at most");
        assert!(grown < SUPERVISOR_KIB_MAX, "{grown} KiB");
    }
}

fn complete(server: &Server, prompt: &str) -> WholeAnswer {
    let request = json!({"prompt": prompt, "temperature": 0, "max_tokens": 8});
    server.post(COMPLETIONS, &request).read_whole().expect("whole")
}

/// Asks a service that must answer.
fn answered(server: &Server) -> Value {
    let answer = complete(server, "Hello");
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["choices"][0]["text"].clone()
}

fn incarnation(health: &Value) -> u64 {
    health["workers"][0]["incarnation"].as_u64().expect("a number")
}

/// What a process holds that is no page of a file. `None` when it is gone.
fn own_kib(pid: i32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

fn peak_kib(pid: i32) -> u64 {
    let peak = &process::status(pid)["VmHWM"];
    peak.split(' ').next().and_then(|number| number.parse().ok()).expect("a number of kB")
}

fn copy(source: &Path, target: &Path) {
    fs::create_dir(target).expect("the place is free");
    for entry in fs::read_dir(source).expect("the fixture is in the source tree") {
        let entry = entry.expect("readable");
        if entry.file_name() != "expected.safetensors" && entry.file_name() != "expected.json" {
            fs::copy(entry.path(), target.join(entry.file_name())).expect("there is room");
        }
    }
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("the tests' paths are text")
}

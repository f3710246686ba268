//! A running `bulkhead serve`: its start, its health, its log and its end.
//!
//! Invariants: every server listens on a port that the system chose and has a folder of its own, so tests run side by side;
//! a server never outlives its handle, and a worker that outlives its server fails the test.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::client::{self, Answer};
use crate::fake::FAKE_WORKER;
use crate::process::{self, Stat};
use crate::wait;

/// The name of the worker's program.
pub const WORKER: &str = "bulkhead-worker";

const SUPERVISOR: &str = "bulkhead";

/// Time for a server to end in order when its handle is dropped, and for its workers to end after it.
const END_TIME: Duration = Duration::from_secs(10);

/// Finds a built binary beside the running test.
///
/// # Panics
/// When it was not built.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own executable");
    let folder = test.ancestors().nth(2).expect("tests lie in target/PROFILE/deps");
    let path = folder.join(name);
    assert!(path.is_file(), "{} is missing: run `cargo build --workspace --bins` first", path.display());
    path
}

/// Gives the folder of the built-in model in the source tree.
#[must_use]
pub fn demo_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../worker/demo-model/checkpoint")
}

/// Copies the built-in model to a folder of its own, for tests that damage it.
///
/// # Panics
/// When it cannot be copied.
#[must_use]
pub fn demo_model_copy() -> TempDir {
    let copy = tempfile::tempdir().expect("a temporary folder can be made");
    for entry in fs::read_dir(demo_model()).expect("the built-in model is in the source tree") {
        let entry = entry.expect("the folder can be read");
        fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("a model file can be copied");
    }
    copy
}

/// Prepares `bulkhead serve` with these arguments and a clean environment. What the arguments leave open is a port that the
/// system chooses, a log as JSON, and a place in the folder for the admin socket.
#[must_use]
pub fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(binary(SUPERVISOR));
    for (name, _) in std::env::vars_os() {
        let is_setting = name.to_str().is_some_and(|name| name.starts_with("BULKHEAD_"));
        if is_setting {
            command.env_remove(name);
        }
    }
    command.arg("serve").args(arguments);
    let runtime_dir = runtime_dir(folder);
    let defaults = [
        ("--listen", OsStr::new("127.0.0.1:0")),
        ("--log-format", OsStr::new("json")),
        // Also where the machine has a card: what these tests expect is what the processor does.
        ("--device", OsStr::new("cpu")),
        ("--runtime-dir", runtime_dir.as_os_str()),
    ];
    add_defaults(&mut command, arguments, &defaults);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// Adds the flags that are not among the arguments.
pub(crate) fn add_defaults(command: &mut Command, arguments: &[&str], defaults: &[(&str, &OsStr)]) {
    for (flag, value) in defaults.iter().filter(|(flag, _)| !arguments.contains(flag)) {
        command.arg(flag).arg(value);
    }
}

fn runtime_dir(folder: &Path) -> PathBuf {
    folder.join("run")
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    child: Child,
    log: Log,
    reader: Option<JoinHandle<()>>,
    /// Holds the admin socket, and what a fake worker needs, until the end.
    folder: TempDir,
}

type Log = Arc<Mutex<Vec<String>>>;

impl Server {
    /// Starts a server with the built-in model and waits until that is loaded.
    ///
    /// # Panics
    /// When it is not loaded before the deadline.
    #[must_use]
    pub fn start(arguments: &[&str]) -> Server {
        let server = Server::spawn(arguments);
        server.wait_until_loaded();
        server
    }

    /// Starts a server and waits until it listens.
    ///
    /// # Panics
    /// When it ends instead.
    #[must_use]
    pub fn spawn(arguments: &[&str]) -> Server {
        Server::spawn_with(arguments, |_| {})
    }

    /// As `spawn`, with a last change to the command.
    ///
    /// # Panics
    /// When it ends instead.
    #[must_use]
    pub fn spawn_with(arguments: &[&str], change: impl FnOnce(&mut Command)) -> Server {
        Server::launch(|folder| {
            let mut command = command(folder, arguments);
            change(&mut command);
            command
        })
    }

    /// Starts what is prepared in a new folder and waits until it listens.
    ///
    /// # Panics
    /// When it ends instead.
    pub fn launch(prepare: impl FnOnce(&Path) -> Command) -> Server {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let mut child = prepare(folder.path()).spawn().expect("the built binary can be started");
        let stderr = child.stderr.take().expect("standard error is a pipe");
        let log = Log::default();
        let reader = {
            let log = log.clone();
            thread::spawn(move || {
                for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                    log.lock().unwrap_or_else(PoisonError::into_inner).push(line);
                }
            })
        };
        let listening = || log.lock().unwrap_or_else(PoisonError::into_inner).iter().find_map(|line| bound(line));
        let found = wait::within(wait::DEADLINE, || match listening() {
            Some(address) => Some(Some(address)),
            None if reader.is_finished() => Some(None),
            None => None,
        });
        let Some(Some(address)) = found else {
            // Ending it may fail only because it has ended.
            drop(child.kill());
            drop(child.wait());
            panic!("the server does not listen; its log:\n{}", lines(&log));
        };
        Server { address, child, log, reader: Some(reader), folder }
    }

    /// Waits until a model answers.
    ///
    /// # Panics
    /// When none does before the deadline; with the log.
    pub fn wait_until_loaded(&self) {
        self.wait_for("the model is loaded", |health| (health["model_loaded"] == true).then_some(()));
    }

    /// Waits until the health report holds something.
    ///
    /// # Panics
    /// When it does not before the deadline; with the last report and the log.
    pub fn wait_for<T>(&self, what: &str, mut find: impl FnMut(&Value) -> Option<T>) -> T {
        let mut last = Value::Null;
        let found = wait::within(wait::DEADLINE, || {
            last = self.health();
            find(&last)
        });
        found.unwrap_or_else(|| panic!("gave up waiting until {what}; health: {last}\n{}", self.log()))
    }

    /// Waits until the health report has a value at a JSON pointer, and gives that report.
    ///
    /// # Panics
    /// When that does not come before the deadline.
    pub fn wait_for_health(&self, pointer: &str, expected: &Value) -> Value {
        self.wait_for(&format!("health has {expected} at {pointer}"), |health| {
            (health.pointer(pointer) == Some(expected)).then(|| health.clone())
        })
    }

    /// Waits until a line of the log holds a text, and gives that line.
    ///
    /// # Panics
    /// When that does not come before the deadline; with the log.
    pub fn wait_for_log(&self, text: &str) -> String {
        let find = || self.log().lines().find(|line| line.contains(text)).map(str::to_owned);
        let found = wait::within(wait::DEADLINE, find);
        found.unwrap_or_else(|| panic!("gave up waiting until {text:?} is logged:\n{}", self.log()))
    }

    /// Waits until nothing runs or waits and every block of KV cache is free.
    ///
    /// # Panics
    /// When that does not come before the deadline.
    pub fn wait_until_idle(&self) {
        self.wait_for("nothing runs and all blocks are free", |health| {
            let blocks = &health["workers"][0]["blocks"];
            let is_idle = health["queue"]["running"] == 0
                && health["queue"]["waiting"] == 0
                && blocks["total"].is_u64()
                && blocks["free"] == blocks["total"];
            is_idle.then_some(())
        });
    }

    /// Asks `/health`.
    ///
    /// # Panics
    /// When there is no answer: the supervisor answers in every state.
    #[must_use]
    pub fn health(&self) -> Value {
        self.get("/health").json().expect("the health report is JSON")
    }

    /// Reads a metric that has the model's name as its only label.
    ///
    /// # Panics
    /// When there is no answer.
    #[must_use]
    pub fn metric(&self, name: &str) -> Option<f64> {
        let values = self.metrics(name);
        values.into_iter().find(|(labels, _)| !labels.contains(',')).map(|(_, value)| value)
    }

    /// Adds up a metric over all of its labels.
    ///
    /// # Panics
    /// When there is no answer.
    #[must_use]
    pub fn metric_sum(&self, name: &str) -> f64 {
        self.metrics(name).iter().map(|(_, value)| value).sum()
    }

    /// Reads the lines of a metric: labels and value.
    fn metrics(&self, name: &str) -> Vec<(String, f64)> {
        let text = self.get("/metrics").text().expect("metrics are text");
        let lines = text.lines().filter_map(|line| {
            let (labels, value) = line.strip_prefix(name)?.strip_prefix('{')?.rsplit_once("} ")?;
            Some((labels.to_owned(), value.parse().expect("a metric is a number")))
        });
        lines.collect()
    }

    /// Sends a GET request.
    ///
    /// # Panics
    /// When there is no answer.
    #[must_use]
    pub fn get(&self, path: &str) -> Answer {
        client::send(self.address, "GET", path, None)
            .unwrap_or_else(|error| panic!("GET {path}: {error}\n{}", self.log()))
    }

    /// Sends a POST request.
    ///
    /// # Panics
    /// When there is no answer.
    #[must_use]
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.try_post(path, body).unwrap_or_else(|error| panic!("POST {path}: {error}\n{}", self.log()))
    }

    /// Sends a POST request to a server that may be ending.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn try_post(&self, path: &str, body: &Value) -> io::Result<Answer> {
        client::send(self.address, "POST", path, Some(&body.to_string()))
    }

    /// Gives the supervisor's process id.
    ///
    /// # Panics
    /// Never: process ids are positive and small.
    #[must_use]
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("process ids fit")
    }

    /// Gives the folder of the admin socket, where no argument named another one.
    #[must_use]
    pub fn runtime_dir(&self) -> PathBuf {
        runtime_dir(self.folder.path())
    }

    /// Finds the worker among the supervisor's children.
    #[must_use]
    pub fn worker(&self) -> Option<Stat> {
        process::children(self.pid()).into_iter().find(|child| child.name == WORKER && child.state != 'Z')
    }

    /// Gives the log so far.
    #[must_use]
    pub fn log(&self) -> String {
        lines(&self.log)
    }

    /// Sends a signal to the supervisor.
    pub fn signal(&self, signal: Signal) {
        process::signal(self.pid(), signal);
    }

    /// Waits until the supervisor has ended, and all of its log has been read.
    ///
    /// # Panics
    /// When it does not end before the deadline.
    pub fn wait(&mut self) -> ExitStatus {
        let status = wait::until("the supervisor has ended", || self.child.try_wait().expect("the child is ours"));
        self.read_log_to_its_end();
        status
    }

    fn read_log_to_its_end(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.join().expect("the reader of the log does not panic");
        }
    }

    /// Ends the supervisor in order if it will, else by force.
    fn end(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        self.signal(Signal::SIGTERM);
        let ended = wait::within(END_TIME, || self.child.try_wait().ok().flatten());
        if ended.is_none() {
            // It was given its time; what fails here has ended in between.
            drop(self.child.kill());
            drop(self.child.wait());
        }
    }

    /// Lists the workers that were started, by the log, and live on without a supervisor.
    fn orphans(&self) -> Vec<Stat> {
        let log = self.log();
        let workers = log.lines().filter_map(started).filter_map(process::stat);
        workers.filter(is_orphan).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
        self.read_log_to_its_end();
        let mut orphans = Vec::new();
        let ended = wait::within(END_TIME, || {
            orphans = self.orphans();
            orphans.is_empty().then_some(())
        });
        for orphan in &orphans {
            process::signal(orphan.pid, Signal::SIGKILL);
        }
        if thread::panicking() {
            eprintln!("the server's log:\n{}", self.log());
        } else {
            assert!(ended.is_some(), "workers outlived their server: {orphans:?}\n{}", self.log());
        }
    }
}

/// Finds the process id in the line that a supervisor logs when it has started a worker.
fn started(line: &str) -> Option<i32> {
    let fields: HashMap<String, Value> = serde_json::from_str(line).ok()?;
    let is_start = fields.get("message")? == "worker started";
    is_start.then(|| i32::try_from(fields.get("pid")?.as_i64()?).ok()).flatten()
}

/// Says whether a process that had the id of a worker still is one, and not that of another supervisor, whose worker got
/// the same id later.
fn is_orphan(process: &Stat) -> bool {
    let is_worker = [WORKER, FAKE_WORKER].contains(&process.name.as_str());
    let has_supervisor = process::stat(process.parent).is_some_and(|parent| parent.name == SUPERVISOR);
    is_worker && process.state != 'Z' && !has_supervisor
}

/// Finds the address in the line that a supervisor logs once it listens.
fn bound(line: &str) -> Option<SocketAddr> {
    let fields: HashMap<String, Value> = serde_json::from_str(line).ok()?;
    let is_start = fields.get("message")? == "bulkhead serves";
    is_start.then(|| fields.get("address")?.as_str()?.parse().ok()).flatten()
}

fn lines(log: &Log) -> String {
    log.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
}

//! A running `bulkhead` for tests: its own folder, its own port, its log read line by line.

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::http::{self, Response};

/// Time for anything that must happen; reaching it is a failure.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// Finds a binary of the workspace beside the running test.
///
/// # Panics
/// When it was not built: `cargo build --workspace --bins`.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a test has an executable");
    let folder = test.ancestors().find(|folder| folder.join(name).is_file());
    folder.unwrap_or_else(|| panic!("{name} is not built: run cargo build --workspace --bins")).join(name)
}

/// Waits for a condition.
///
/// # Panics
/// When it does not come true within the deadline.
pub fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < DEADLINE, "waited in vain for {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// A supervisor with the fake worker, or whatever its flags say.
#[derive(Debug)]
pub struct Service {
    process: Child,
    folder: tempfile::TempDir,
    log: Arc<Mutex<Vec<String>>>,
    /// The port it listens on.
    pub port: u16,
}

/// What a service is started with.
#[derive(Debug, Default)]
pub struct Setup<'a> {
    /// Further flags.
    pub flags: &'a [&'a str],
    /// The lines of `fake.txt`.
    pub load: &'a str,
    /// What the fake worker gets on its command line in front.
    pub worker_words: &'a str,
}

impl Service {
    /// Starts a supervisor and waits until its worker is ready.
    #[must_use]
    pub fn ready(flags: &[&str]) -> Service {
        let service = Service::start(&Setup { flags, ..Setup::default() });
        service.wait_until_ready();
        service
    }

    /// Starts a supervisor and waits until it listens.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn start(setup: &Setup<'_>) -> Service {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut process = command(folder.path(), setup).spawn().expect("bulkhead starts");
        let log = Arc::new(Mutex::new(Vec::new()));
        let stderr = BufReader::new(process.stderr.take().expect("stderr is piped"));
        let lines = log.clone();
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                lines.lock().expect("no panics").push(line);
            }
        });
        let mut service = Service { process, folder, log, port: 0 };
        service.port = wait_for("the address", || {
            let line = service.log_lines().into_iter().find(|line| line.contains("bulkhead serves"))?;
            let line: Value = serde_json::from_str(&line).expect("the log is JSON");
            line["address"].as_str()?.rsplit_once(':')?.1.parse().ok()
        });
        service
    }

    /// Gives the lines of the log so far.
    #[must_use]
    pub fn log_lines(&self) -> Vec<String> {
        self.log.lock().expect("no panics").clone()
    }

    /// Waits for a line of the log that holds a text.
    pub fn wait_for_log(&self, text: &str) -> String {
        wait_for(text, || self.log_lines().into_iter().find(|line| line.contains(text)))
    }

    /// Waits until the worker is ready.
    pub fn wait_until_ready(&self) {
        wait_for("readiness", || (self.get("/health/ready").status == 200).then_some(()));
    }

    /// Waits until the health has a value at a JSON pointer.
    pub fn wait_for_health(&self, pointer: &str, expected: &Value) -> Value {
        let mut last = Value::Null;
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            last = self.get("/health").json();
            if last.pointer(pointer) == Some(expected) {
                return last;
            }
            thread::sleep(Duration::from_millis(5));
        }
        panic!("health never had {expected} at {pointer}: {last}");
    }

    /// Gives the worker's process id, when it has one.
    #[must_use]
    pub fn worker_pid(&self) -> Option<i32> {
        self.get("/health").json()["workers"][0]["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok())
    }

    /// Gets a path.
    #[must_use]
    pub fn get(&self, path: &str) -> Response {
        http::request(self.port, "GET", path, &[], b"")
    }

    /// Posts JSON.
    #[must_use]
    pub fn post(&self, path: &str, body: &Value) -> Response {
        http::request(self.port, "POST", path, &[], body.to_string().as_bytes())
    }

    /// Asks for a chat completion of one user message.
    #[must_use]
    pub fn chat(&self, text: &str) -> Response {
        self.post("/v1/chat/completions", &serde_json::json!({"messages": [{"role": "user", "content": text}]}))
    }

    /// Gives the supervisor's process id.
    ///
    /// # Panics
    /// Never: process ids fit.
    #[must_use]
    pub fn pid(&self) -> nix::unistd::Pid {
        nix::unistd::Pid::from_raw(i32::try_from(self.process.id()).expect("process ids fit"))
    }

    /// Gives the folder of the admin socket.
    #[must_use]
    pub fn runtime_dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// Counts the supervisor's open descriptors.
    ///
    /// # Panics
    /// When it is gone.
    #[must_use]
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.process.id())).expect("it lives").count()
    }

    /// Lists the supervisor's children with their state letters.
    #[must_use]
    pub fn children(&self) -> Vec<(i32, char)> {
        children(self.process.id())
    }

    /// Sends a signal.
    ///
    /// # Panics
    /// When the supervisor is gone.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(self.pid(), signal).expect("it lives");
    }

    /// Waits for the end.
    #[must_use]
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("the end", || self.process.try_wait().expect("it is our child"))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// Makes the command of a supervisor with a fake model in a folder.
///
/// # Panics
/// When the folder cannot be written.
#[must_use]
pub fn command(folder: &Path, setup: &Setup<'_>) -> Command {
    let model = folder.join("fake-model");
    std::fs::create_dir_all(&model).expect("the folder can be written");
    std::fs::write(model.join("config.json"), "{}").expect("the folder can be written");
    std::fs::write(model.join("fake.txt"), setup.load).expect("the folder can be written");
    let worker = folder.join("bulkhead-worker");
    let script = format!("#!/bin/sh\nexec '{}' {} \"$@\"\n", binary("fake-worker").display(), setup.worker_words);
    if setup.worker_words.is_empty() {
        std::os::unix::fs::symlink(binary("fake-worker"), &worker).expect("the folder can be written");
    } else {
        std::fs::write(&worker, script).expect("the folder can be written");
        std::fs::set_permissions(&worker, PermissionsExt::from_mode(0o755)).expect("the folder can be written");
    }
    let run = folder.join("run");
    let text = |path: &Path| path.to_str().expect("temporary folders are text").to_owned();
    let defaults = [
        ("--listen", "127.0.0.1:0".to_owned()),
        ("--log-format", "json".to_owned()),
        ("--model", text(&model)),
        ("--worker", text(&worker)),
        ("--runtime-dir", text(&run)),
    ];
    let mut command = Command::new(binary("bulkhead"));
    command.arg("serve").args(setup.flags).env_clear();
    for (flag, value) in defaults.iter().filter(|(flag, _)| !setup.flags.contains(flag)) {
        command.args([flag, value.as_str()]);
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    command
}

/// Lists the children of a process with their state letters.
#[must_use]
pub fn children(parent: u32) -> Vec<(i32, char)> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let child = |entry: std::fs::DirEntry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?.chars().next()?;
        (fields.next()?.parse::<u32>().ok()? == parent).then_some((pid, state))
    };
    entries.flatten().filter_map(child).collect()
}

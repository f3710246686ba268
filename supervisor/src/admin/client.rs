//! bulkheadctl's side of the admin socket: asks, prints, and gives supervisorctl's exit codes.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::limits::ADMIN_TIMEOUT;

/// Bytes of one answer, at most.
const ANSWER_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// How bulkheadctl ends, in supervisorctl's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything asked about is running.
    Running,
    /// Something is not running.
    NotRunning,
}

impl Outcome {
    /// Gives the process exit code.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Outcome::Running => 0,
            Outcome::NotRunning => 3,
        }
    }
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens.
    #[error("no bulkhead answers at {}: start it, or name its socket with --socket or --runtime-dir", .0.display())]
    NotThere(PathBuf),
    /// The socket failed.
    #[error("cannot talk to {}: {source}", path.display())]
    Failed {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The supervisor said no.
    #[error("bulkhead answers: {0}")]
    Refused(String),
}

impl ClientError {
    /// Gives the process exit code: 4 as supervisorctl where nobody answers, 1 for the rest.
    #[must_use]
    pub const fn code(&self) -> u8 {
        match self {
            ClientError::NotThere(_) => 4,
            ClientError::Failed { .. } | ClientError::Refused(_) => 1,
        }
    }
}

/// Asks for the status.
///
/// # Errors
/// `ClientError` when there is no answer.
pub fn status(socket: &Path) -> Result<Value, ClientError> {
    ask(socket, &json!({"command": "status"}))
}

/// Prints a status for people: one line for each worker in supervisord's form, below it where that computes and what it
/// had to give up, then the queue.
#[must_use]
pub fn print(status: &Value) -> (String, Outcome) {
    let mut text = String::new();
    let mut outcome = Outcome::Running;
    for worker in status["workers"].as_array().into_iter().flatten() {
        let state = worker["state"].as_str().unwrap_or("UNKNOWN");
        if state != "RUNNING" {
            outcome = Outcome::NotRunning;
        }
        text.push_str(&format!("{:<32} {state:<9} {}\n", worker["model"].as_str().unwrap_or("?"), describe(worker)));
        circumstances(worker).iter().for_each(|line| text.push_str(&format!("{:<32} {line}\n", "")));
    }
    let queue = &status["queue"];
    text.push_str(&format!("{:<32} {} running, {} waiting\n", "queue", queue["running"], queue["waiting"]));
    (text, outcome)
}

fn describe(worker: &Value) -> String {
    let seconds = worker["since_s"].as_u64().unwrap_or(0);
    let time = format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60);
    let incarnation = &worker["incarnation"];
    let process = match worker["pid"].as_u64() {
        Some(pid) => format!("pid {pid}, uptime {time}, incarnation {incarnation}"),
        None => format!("for {time}, incarnation {incarnation}"),
    };
    match (worker["state"].as_str(), worker["last_end"].as_str(), worker["progress"]["what"].as_str()) {
        (Some("RUNNING"), _, _) | (_, None, None) => process,
        (_, _, Some(what)) => format!("{process}, {what}"),
        (_, Some(end), None) => format!("{process}, last one {end}"),
    }
}

/// Tells where a worker computes, why there, and what its memory plan gave up.
fn circumstances(worker: &Value) -> Vec<String> {
    let place = match (worker["device"].as_str(), worker["device_reason"].as_str()) {
        (Some(device), Some(reason)) => Some(format!("on {device}: {reason}")),
        (Some(device), None) => Some(format!("on {device}")),
        (None, reason) => reason.map(str::to_owned),
    };
    let clauses: Vec<&str> = worker["given_up"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let given_up = (!clauses.is_empty()).then(|| format!("to fit in memory: {}", clauses.join("; ")));
    place.into_iter().chain(given_up).collect()
}

fn ask(socket: &Path, request: &Value) -> Result<Value, ClientError> {
    let failed = |source: io::Error| {
        let path = socket.to_owned();
        let is_absent = matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
        if is_absent { ClientError::NotThere(path) } else { ClientError::Failed { path, source } }
    };
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    stream.set_read_timeout(Some(ADMIN_TIMEOUT)).map_err(failed)?;
    stream.set_write_timeout(Some(ADMIN_TIMEOUT)).map_err(failed)?;
    stream.write_all(format!("{request}\n").as_bytes()).map_err(failed)?;
    let mut line = Vec::new();
    BufReader::new(stream.take(ANSWER_BYTES_MAX)).read_until(b'\n', &mut line).map_err(failed)?;
    let mut answer: Value = serde_json::from_slice(&line).map_err(|error| failed(error.into()))?;
    match answer["ok"].as_bool() {
        Some(true) => Ok(answer["result"].take()),
        _ => Err(ClientError::Refused(answer["error"].as_str().unwrap_or("nothing that is understood").to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_tells_where_and_at_what_cost() {
        let card = json!({"device": "cuda:0", "given_up": ["a smaller context", "the embedding"]});
        assert_eq!(circumstances(&card), ["on cuda:0", "to fit in memory: a smaller context; the embedding"]);
        let cpu = json!({"device": "cpu (avx2)", "device_reason": "there is no CUDA device", "given_up": []});
        assert_eq!(circumstances(&cpu), ["on cpu (avx2): there is no CUDA device"]);
        assert_eq!(circumstances(&json!({"device_reason": "is asked"})), ["is asked"]);
        assert!(circumstances(&json!({})).is_empty());
    }

    #[test]
    fn a_status_prints_in_supervisords_form() {
        let worker = |state: &str, pid: Option<u32>, last_end: Option<&str>| {
            json!({"workers": [{"model": "m", "state": state, "pid": pid, "incarnation": 2, "since_s": 3725,
                "last_end": last_end}], "queue": {"running": 1, "waiting": 0}})
        };
        for (status, line, outcome) in [
            (worker("RUNNING", Some(7), None), "RUNNING   pid 7, uptime 1:02:05, incarnation 2", Outcome::Running),
            (
                worker("BACKOFF", None, Some("killed from outside")),
                "BACKOFF   for 1:02:05, incarnation 2, last one killed from outside",
                Outcome::NotRunning,
            ),
        ] {
            let (text, got) = print(&status);
            assert!(text.starts_with("m  ") && text.contains(line), "{text}");
            assert!(text.contains("1 running, 0 waiting"), "{text}");
            assert_eq!(got, outcome);
        }
    }
}

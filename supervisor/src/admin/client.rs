//! bulkheadctl's side of the admin socket: asks, prints, and gives supervisorctl's exit codes.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::limits::{ADMIN_ACTION_TIMEOUT, ADMIN_TIMEOUT};

/// Bytes of one answer, at most.
const ANSWER_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// How bulkheadctl ends, in supervisorctl's numbers. It has 2 for its command line, and 4 where nobody answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Everything asked about is running, or everything asked for was done.
    Well,
    /// What was asked for could not be done.
    Failed,
    /// Something is not running.
    NotRunning,
    /// There is nothing of the name whose status was asked.
    Unknown,
    /// The worker that was to be started has ended.
    Dead,
}

impl Outcome {
    /// Gives the process exit code.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Outcome::Well => 0,
            Outcome::Failed => 1,
            Outcome::NotRunning => 3,
            Outcome::Unknown => 4,
            Outcome::Dead => 7,
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

/// Prints a status for people: one line for each worker in supervisord's form, below it where that computes and what it
/// had to give up, then the queue. `names` are the models asked about; none or `all` means every one.
#[must_use]
pub fn print_status(status: &Value, names: &[String]) -> (String, Outcome) {
    let mut text = String::new();
    let mut outcome = Outcome::Well;
    let workers: Vec<_> = status["workers"].as_array().into_iter().flatten().collect();
    let name_of = |worker: &Value| worker["model"].as_str().unwrap_or("?").to_owned();
    for worker in workers.iter().filter(|worker| is_meant(names, &name_of(worker))) {
        let state = worker["state"].as_str().unwrap_or("UNKNOWN");
        if state != "RUNNING" {
            outcome = Outcome::NotRunning;
        }
        text.push_str(&format!("{:<32} {state:<9} {}\n", name_of(worker), describe(worker)));
        circumstances(worker).iter().for_each(|line| text.push_str(&format!("{:<32} {line}\n", "")));
    }
    for name in unknown(names, &workers.iter().map(|worker| name_of(worker)).collect::<Vec<_>>()) {
        outcome = Outcome::Unknown;
        text.push_str(&format!("{name}: ERROR (no such process)\n"));
    }
    if names.is_empty() {
        let warnings = status["supervisor"]["warnings"].as_array().into_iter().flatten().filter_map(Value::as_str);
        warnings.for_each(|warning| text.push_str(&format!("{:<32} WARNING: {warning}\n", "supervisor")));
        let queue = &status["queue"];
        text.push_str(&format!("{:<32} {} running, {} waiting\n", "queue", queue["running"], queue["waiting"]));
    }
    (text, outcome)
}

fn is_meant(names: &[String], name: &str) -> bool {
    names.is_empty() || names.iter().any(|asked| asked == name || asked == "all")
}

fn unknown<'a>(names: &'a [String], known: &[String]) -> Vec<&'a String> {
    names.iter().filter(|name| *name != "all" && !known.contains(name)).collect()
}

/// What people want of workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// One that is there.
    Start,
    /// None, when its requests have ended.
    Stop,
    /// None, at once.
    StopNow,
    /// Another one.
    Restart,
}

impl Wish {
    fn request(self, model: &str) -> Value {
        match self {
            Wish::Start => json!({"command": "start", "model": model}),
            Wish::Stop => json!({"command": "stop", "model": model}),
            Wish::StopNow => json!({"command": "stop", "now": true, "model": model}),
            Wish::Restart => json!({"command": "restart", "model": model}),
        }
    }
}

/// Has a wish carried out for the models of these names, and tells what came of it in supervisorctl's words.
///
/// # Errors
/// `ClientError` when there is no answer.
pub fn control(socket: &Path, wish: Wish, names: &[String]) -> Result<(Value, String, Outcome), ClientError> {
    let status = ask(socket, &json!({"command": "status"}))?;
    let workers = status["workers"].as_array().into_iter().flatten();
    let known: Vec<String> = workers.filter_map(|worker| worker["model"].as_str().map(str::to_owned)).collect();
    let (mut results, mut text, mut outcome) = (Vec::new(), String::new(), Outcome::Well);
    for name in unknown(names, &known) {
        outcome = Outcome::Failed;
        text.push_str(&format!("{name}: ERROR (no such process)\n"));
    }
    for name in known.iter().filter(|name| is_meant(names, name)) {
        let result = ask(socket, &wish.request(name))?;
        let (line, is_dead) = print_control(wish, name, &result);
        text.push_str(&line);
        if is_dead {
            outcome = Outcome::Dead;
        }
        results.push(result);
    }
    Ok((Value::Array(results), text, outcome))
}

/// Tells what came of a wish, and whether a worker that should be there has ended.
fn print_control(wish: Wish, name: &str, result: &Value) -> (String, bool) {
    let state = result["worker"]["state"].as_str().unwrap_or("UNKNOWN");
    let was_running = !matches!(result["was"].as_str(), Some("STOPPED" | "EXITED" | "FATAL"));
    let stopped = if wish == Wish::Restart && was_running { format!("{name}: stopped\n") } else { String::new() };
    let (word, is_dead) = match (wish, result["needed_nothing"].as_bool().unwrap_or(false), state) {
        (Wish::Stop | Wish::StopNow, true, _) => ("ERROR (not running)".to_owned(), false),
        (Wish::Start, true, _) => ("ERROR (already started)".to_owned(), false),
        (Wish::Stop | Wish::StopNow, false, "STOPPED") => ("stopped".to_owned(), false),
        (Wish::Stop, false, other) => {
            let requests = &result["requests"];
            (format!("is {other} until {requests} requests have ended; stop --now ends it at once"), false)
        }
        (Wish::Start | Wish::Restart, _, "RUNNING") => ("started".to_owned(), false),
        (Wish::Start | Wish::Restart, _, "FATAL" | "EXITED" | "STOPPED") => {
            let reason = result["worker"]["last_end"].as_str().unwrap_or("spawn error");
            (format!("ERROR ({reason})"), true)
        }
        (_, _, other) => (format!("is {other}"), false),
    };
    (format!("{stopped}{name}: {word}\n"), is_dead)
}

/// Prints the requests that have not ended.
#[must_use]
pub fn print_queue(queue: &Value) -> String {
    let requests = queue["requests"].as_array().into_iter().flatten();
    let lines = requests.map(|request| {
        let age = request["age_s"].as_f64().unwrap_or(0.0);
        let (id, tokens) = (request["id"].to_string(), &request["tokens"]);
        format!("{id:<12} {:<9} {age:.1} s, {tokens} tokens\n", request["state"].as_str().unwrap_or("?"))
    });
    lines.collect()
}

/// Prints lines of the log.
#[must_use]
pub fn print_lines(answer: &Value) -> String {
    let lines = answer["lines"].as_array().into_iter().flatten().filter_map(Value::as_str);
    lines.flat_map(|line| [line, "\n"]).collect()
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
    let sandbox = worker["sandbox"].as_str().filter(|word| *word != "full");
    let missing: Vec<&str> =
        worker["isolation_missing"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let sandbox = sandbox.map(|word| match missing.as_slice() {
        [] => format!("sandbox: {word}"),
        missing => format!("sandbox: {word}, without {}", missing.join(", ")),
    });
    let stops =
        worker["stops_when_idle"].as_bool().unwrap_or(false).then(|| "stops when its requests have ended".into());
    place.into_iter().chain(given_up).chain(sandbox).chain(stops).collect()
}

/// Asks one thing.
///
/// # Errors
/// `ClientError` when there is no answer.
pub fn ask(socket: &Path, request: &Value) -> Result<Value, ClientError> {
    let mut answer = None;
    each_answer(socket, request, ADMIN_ACTION_TIMEOUT + ADMIN_TIMEOUT, |result| {
        answer = Some(result);
        false
    })?;
    answer.ok_or_else(|| ClientError::Refused("nothing".into()))
}

/// Asks for what goes on, and hands over each answer for as long as the taker wants more.
///
/// Blocking: until then.
///
/// # Errors
/// `ClientError` when there is no answer.
pub fn follow(socket: &Path, request: &Value, take: impl FnMut(Value) -> bool) -> Result<(), ClientError> {
    each_answer(socket, request, FOLLOW_TIMEOUT, take)
}

/// Time for which nothing may be added to what goes on.
const FOLLOW_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

fn each_answer(
    socket: &Path,
    request: &Value,
    silence_max: Duration,
    mut take: impl FnMut(Value) -> bool,
) -> Result<(), ClientError> {
    let failed = |source: io::Error| {
        let path = socket.to_owned();
        let is_absent = matches!(source.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
        if is_absent { ClientError::NotThere(path) } else { ClientError::Failed { path, source } }
    };
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    stream.set_read_timeout(Some(silence_max)).map_err(failed)?;
    stream.set_write_timeout(Some(ADMIN_TIMEOUT)).map_err(failed)?;
    stream.write_all(format!("{request}\n").as_bytes()).map_err(failed)?;
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        (&mut stream).take(ANSWER_BYTES_MAX).read_until(b'\n', &mut line).map_err(failed)?;
        if line.is_empty() {
            return Ok(());
        }
        let mut answer: Value = serde_json::from_slice(&line).map_err(|error| failed(error.into()))?;
        match answer["ok"].as_bool() {
            Some(true) if take(answer["result"].take()) => {}
            Some(true) => return Ok(()),
            _ => {
                let error = answer["error"].as_str().unwrap_or("nothing that is understood");
                return Err(ClientError::Refused(error.to_owned()));
            }
        }
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
        assert_eq!(circumstances(&json!({"sandbox": "full"})), Vec::<String>::new());
        let off = json!({"sandbox": "off", "isolation_missing": ["landlock-files", "not-dumpable"]});
        assert_eq!(circumstances(&off), ["sandbox: off, without landlock-files, not-dumpable"]);
        assert_eq!(circumstances(&json!({"stops_when_idle": true})), ["stops when its requests have ended"]);
        assert!(circumstances(&json!({"stops_when_idle": false})).is_empty());
    }

    #[test]
    fn a_status_prints_in_supervisords_form() {
        let worker = |state: &str, pid: Option<u32>, last_end: Option<&str>| {
            json!({"workers": [{"model": "m", "state": state, "pid": pid, "incarnation": 2, "since_s": 3725,
                "last_end": last_end}], "queue": {"running": 1, "waiting": 0}})
        };
        for (status, line, outcome) in [
            (worker("RUNNING", Some(7), None), "RUNNING   pid 7, uptime 1:02:05, incarnation 2", Outcome::Well),
            (
                worker("BACKOFF", None, Some("killed from outside")),
                "BACKOFF   for 1:02:05, incarnation 2, last one killed from outside",
                Outcome::NotRunning,
            ),
        ] {
            let (text, got) = print_status(&status, &[]);
            assert!(text.starts_with("m  ") && text.contains(line), "{text}");
            assert!(text.contains("1 running, 0 waiting"), "{text}");
            assert_eq!(got, outcome);
            let (text, got) = print_status(&status, &["m".to_owned()]);
            assert_eq!((text.lines().count(), got), (1, outcome));
            let (text, got) = print_status(&status, &["other".to_owned()]);
            assert_eq!((text.as_str(), got), ("other: ERROR (no such process)\n", Outcome::Unknown));
        }
    }

    #[test]
    fn what_came_of_a_wish_is_told_in_supervisorctls_words() {
        let result = |was: &str, state: &str, needed_nothing: bool| {
            let worker = json!({"state": state, "last_end": "the model cannot be served"});
            json!({"was": was, "needed_nothing": needed_nothing, "requests": 2, "worker": worker})
        };
        for (wish, result, text, is_dead) in [
            (Wish::Start, result("STOPPED", "RUNNING", false), "m: started\n", false),
            (Wish::Start, result("RUNNING", "RUNNING", true), "m: ERROR (already started)\n", false),
            (Wish::Start, result("FATAL", "FATAL", false), "m: ERROR (the model cannot be served)\n", true),
            (Wish::Start, result("STOPPED", "LOADING", false), "m: is LOADING\n", false),
            (Wish::Stop, result("RUNNING", "STOPPED", false), "m: stopped\n", false),
            (Wish::Stop, result("STOPPED", "STOPPED", true), "m: ERROR (not running)\n", false),
            (Wish::StopNow, result("STOPPED", "STOPPED", true), "m: ERROR (not running)\n", false),
            (Wish::StopNow, result("RUNNING", "STOPPED", false), "m: stopped\n", false),
            (
                Wish::Stop,
                result("RUNNING", "RUNNING", false),
                "m: is RUNNING until 2 requests have ended; stop --now ends it at once\n",
                false,
            ),
            (Wish::Restart, result("RUNNING", "RUNNING", false), "m: stopped\nm: started\n", false),
            (Wish::Restart, result("FATAL", "RUNNING", false), "m: started\n", false),
        ] {
            assert_eq!(print_control(wish, "m", &result), (text.to_owned(), is_dead), "{wish:?} {result}");
        }
    }

    #[test]
    fn requests_and_lines_are_printed_one_by_one() {
        let queue = json!({"requests": [{"id": 7, "state": "running", "tokens": 3, "age_s": 1.25}]});
        assert_eq!(print_queue(&queue), "7            running   1.2 s, 3 tokens\n");
        assert_eq!(print_lines(&json!({"lines": ["a", "b"]})), "a\nb\n");
    }
}

//! What the worker of a running service holds, looked for in its memory, descriptors and mappings: secrets are not among it.

use std::fs::{self, File};
use std::io::Write;
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, PermissionsExt, chown};
use std::path::Path;

use bulkhead_tests::client;
use bulkhead_tests::process;
use bulkhead_tests::server::{self, Server};
use bulkhead_tests::wait;
use serde_json::json;

const NOBODY: u32 = 65534;

/// Put together when they are looked for, so that the search does not find itself.
const KEY: [&str; 2] = ["sk-canary-in-a-file", "-0123456789abcdef"];
const TOKEN: [&str; 2] = ["hf_canary-in-a-variable", "-fedcba9876543210"];
const TEXT: [&str; 2] = ["A canary of a request", " sings in the worker"];

/// What a worker may hold open beside its link, its lines and its model: facts of the machine.
const GRANTED: [&str; 2] = ["/dev/null", "/proc/meminfo"];

/// Bytes of memory that are read at once.
const WINDOW_BYTES: usize = 1 << 20;

/// Looks for a text in everything that a process holds and could write, or `None` where the system forbids to look.
fn holds(pid: i32, needle: &str) -> Option<bool> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).ok()?;
    let memory = File::open(format!("/proc/{pid}/mem")).ok()?;
    let mut window = vec![0; WINDOW_BYTES + needle.len()];
    for line in maps.lines().filter(|line| line.contains(" rw")) {
        let (start, end) = line.split(' ').next()?.split_once('-')?;
        let (start, end) = (u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?);
        let mut at = start;
        while at < end {
            let bytes = usize::try_from(end - at).unwrap_or(usize::MAX).min(window.len());
            // Guard pages and what is gone meanwhile cannot be read.
            let read = memory.read_at(&mut window[..bytes], at).unwrap_or(0);
            if window[..read].windows(needle.len()).any(|found| found == needle.as_bytes()) {
                return Some(true);
            }
            at += WINDOW_BYTES as u64;
        }
    }
    Some(false)
}

/// Starts the service with secrets around it, as this user or as nobody.
fn serve(home: &Path, user: Option<u32>) -> Server {
    let model = home.join("model");
    fs::create_dir(&model).expect("ours");
    for entry in fs::read_dir(server::demo_model()).expect("in the source tree") {
        let entry = entry.expect("readable");
        fs::copy(entry.path(), model.join(entry.file_name())).expect("there is room");
    }
    let keys = home.join("keys");
    fs::write(&keys, KEY.concat()).expect("ours");
    fs::set_permissions(&keys, PermissionsExt::from_mode(0o600)).expect("ours");
    fs::set_permissions(home, PermissionsExt::from_mode(0o755)).expect("ours");
    if let Some(user) = user {
        chown(&keys, Some(user), Some(user)).expect("root may");
    }
    let (model, keys) = (model.display().to_string(), keys.display().to_string());
    let mut flags = vec!["--model", &model, "--api-keys-file", &keys, "--allow-faults", "--faults-step-delay-ms", "20"];
    flags.extend(user.map(|_| ["--user", "nobody"]).into_iter().flatten());
    let server = Server::launch(|folder| {
        fs::set_permissions(folder, PermissionsExt::from_mode(0o755)).expect("ours");
        let mut command = server::command(folder, &flags);
        command.env("HF_TOKEN", TOKEN.concat());
        command
    });
    server.wait_until_loaded();
    server
}

/// Asks with the key, which so passes through the supervisor, and with a text that the worker keeps while it answers: where
/// to stop. The connection holds the answer, which goes on for as long as anybody looks.
fn ask(server: &Server) -> TcpStream {
    let body =
        json!({"prompt": "hello", "max_tokens": 8000, "temperature": 0, "stream": true, "stop": [TEXT.concat()]});
    let body = body.to_string();
    let request = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {}\r\ncontent-length: {}\r\n\r\n{body}",
        KEY.concat(),
        body.len()
    );
    let mut stream = client::connect(server.address).expect("the server listens");
    stream.write_all(request.as_bytes()).expect("it is sent");
    server.wait_for_health("/queue/running", &json!(1));
    stream
}

fn check_worker_of(home: &Path, user: Option<u32>) {
    let server = serve(home, user);
    let worker = server.worker().expect("a worker runs").pid;
    let running = ask(&server);
    let (key, token, text) = (KEY.concat(), TOKEN.concat(), TEXT.concat());
    let Some(holds_key) = holds(worker, &key) else {
        eprintln!("skipped: the memory of a worker: only root may look into it");
        return;
    };
    assert_eq!(holds(server.pid(), &key), Some(true), "the search finds what is there");
    let is_found = wait::within(wait::DEADLINE, || (holds(worker, &text) == Some(true)).then_some(()));
    assert!(is_found.is_some(), "the search finds what a worker holds");
    assert!(!holds_key && holds(worker, &key) == Some(false), "as {user:?}: the key");
    assert_eq!(holds(worker, &token), Some(false), "as {user:?}: the token");
    assert_eq!(fs::read(format!("/proc/{worker}/environ")).expect("root may"), b"", "as {user:?}");

    // Open are the link with its copies, what it writes its lines to, and files of its model; mapped are its program,
    // libraries and its model.
    let model = home.join("model");
    for entry in fs::read_dir(format!("/proc/{worker}/fd")).expect("root may") {
        let target = fs::read_link(entry.expect("it runs").path()).expect("root may");
        let name = target.to_string_lossy();
        let is_its_own = name.starts_with("socket:") || name.starts_with("pipe:") || GRANTED.contains(&&*name);
        let is_known = is_its_own || target.starts_with(&model) || name.starts_with("anon_inode:");
        assert!(is_known, "as {user:?}: {name} is open");
    }
    let maps = fs::read_to_string(format!("/proc/{worker}/maps")).expect("root may");
    for path in maps.lines().filter_map(|line| line.split_once('/')).map(|(_, path)| format!("/{path}")) {
        let is_program = path.contains("bulkhead-worker") || path.contains("/lib");
        assert!(is_program || Path::new(&path).starts_with(&model), "as {user:?}: {path} is mapped");
    }
    drop(running);
    let status = process::status(worker);
    let uid = user.unwrap_or_else(|| nix::unistd::getuid().as_raw()).to_string();
    assert!(status["Uid"].split_whitespace().all(|id| id == uid), "{}", status["Uid"]);
}

#[test]
fn a_worker_holds_no_secret() {
    let home = tempfile::tempdir().expect("a temporary folder can be made");
    check_worker_of(home.path(), None);
    if nix::unistd::getuid().is_root() {
        let home = tempfile::tempdir().expect("a temporary folder can be made");
        check_worker_of(home.path(), Some(NOBODY));
    } else {
        eprintln!("skipped: a worker of another user than the test's: this test does not run as root");
    }
}

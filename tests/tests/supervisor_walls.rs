//! The supervisor's own walls, seen from outside: user, capabilities, memory, descriptors, files, the private door.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use bulkhead_tests::fake::{FAKE_WORKER, Fake};
use bulkhead_tests::process;
use bulkhead_tests::server::{Server, binary};
use bulkhead_tests::skip;
use nix::sys::signal::Signal;
use serde_json::json;

const NOBODY: &str = "nobody";
const NOBODY_ID: u32 = 65534;

/// Says whether the test runs as root, and that it is skipped where not.
fn is_root() -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    if !is_root {
        skip("only root can become another user");
    }
    is_root
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("ours");
}

fn ctl(server: &Server, arguments: &[&str]) -> String {
    let mut command = Command::new(binary("bulkheadctl"));
    command.arg("--runtime-dir").arg(server.runtime_dir()).args(arguments);
    let Output { stdout, .. } = command.output().expect("it runs");
    String::from_utf8_lossy(&stdout).into_owned()
}

/// A server whose folder everyone may enter.
fn as_nobody() -> Server {
    let server = Server::launch(|folder| {
        set_mode(folder, 0o755);
        Fake::default().command(folder, &["--user", NOBODY])
    });
    server.wait_until_loaded();
    server
}

/// The threads of a process.
fn threads(pid: i32) -> Vec<i32> {
    let entries = fs::read_dir(format!("/proc/{pid}/task")).expect("it runs");
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

fn check_powerless(pid: i32) {
    let threads = threads(pid);
    assert!(threads.len() > 2, "the supervisor has threads");
    for thread in threads {
        let status = process::status(thread);
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(u64::from_str_radix(&status[set], 16), Ok(0), "{set} of thread {thread}");
        }
        // Only who holds CAP_SETPCAP can empty it, and it grants nothing with the next line.
        if nix::unistd::geteuid().is_root() {
            assert_eq!(u64::from_str_radix(&status["CapBnd"], 16), Ok(0), "of thread {thread}");
        }
        assert_eq!(status["NoNewPrivs"], "1", "of thread {thread}");
    }
    assert_eq!(process::limit(pid, "Max core file size"), ("0".into(), "0".into()));
}

#[test]
fn no_thread_of_the_supervisor_has_a_capability() {
    let server = Server::start_fake(&[]);
    check_powerless(server.pid());
    let supervisor = &server.health()["supervisor"];
    for wall in ["closed-descriptors", "not-dumpable", "no-new-privileges", "no-capabilities"] {
        assert!(supervisor["isolation"].as_array().is_some_and(|walls| walls.contains(&json!(wall))), "{supervisor}");
    }
    // Without a card nothing below /proc is writable, and root says that it is root.
    let is_warned = supervisor["warnings"].to_string().contains("runs as root");
    assert_eq!(is_warned, nix::unistd::geteuid().is_root(), "{supervisor}");
    assert_eq!(ctl(&server, &["status"]).contains("WARNING: bulkhead runs as root"), is_warned);
    assert_eq!(server.log().contains("bulkhead runs as root"), is_warned);
    assert_eq!(server.chat("one").json()["choices"][0]["message"]["content"], "one");
}

#[test]
fn root_becomes_an_ordinary_user_for_good() {
    if !is_root() {
        return;
    }
    let server = as_nobody();
    check_powerless(server.pid());
    let worker = server.worker().expect("it runs").pid;
    for pid in [server.pid(), worker] {
        let status = process::status(pid);
        let ids: Vec<u32> = status["Uid"].split_whitespace().filter_map(|id| id.parse().ok()).collect();
        assert_eq!(ids, [NOBODY_ID; 4], "of process {pid}");
        let groups = format!("{} {}", status["Gid"], status["Groups"]);
        assert!(groups.split_whitespace().all(|id| id != "0"), "of process {pid}: {groups}");
    }
    let health = server.health();
    assert_eq!(health["supervisor"]["user"], NOBODY);
    assert!(health["supervisor"]["isolation"].as_array().is_some_and(|walls| walls.contains(&json!("user"))));
    assert!(!health["supervisor"]["warnings"].to_string().contains("root"), "{health}");
    assert_eq!(fs::metadata(server.runtime_dir()).expect("it is there").uid(), NOBODY_ID);
    assert_eq!(server.chat("one").json()["choices"][0]["message"]["content"], "one");
    assert!(!ctl(&server, &["status"]).contains("runs as root"));

    // Another process of the same user sees nothing of its memory, and would of an ordinary one.
    let look = |pid: u32| {
        let mut command = Command::new("cat");
        command.arg(format!("/proc/{pid}/environ")).uid(NOBODY_ID).gid(NOBODY_ID).current_dir("/");
        command.stdout(Stdio::null()).stderr(Stdio::null()).status().expect("it runs").success()
    };
    let mut ordinary =
        Command::new("sleep").arg("60").uid(NOBODY_ID).gid(NOBODY_ID).current_dir("/").spawn().expect("it runs");
    let is_seen = bulkhead_tests::wait::within(bulkhead_tests::wait::DEADLINE, || look(ordinary.id()).then_some(()));
    drop(ordinary.kill());
    drop(ordinary.wait());
    assert!(is_seen.is_some(), "the look works");
    assert!(!look(u32::try_from(server.pid()).expect("positive")));
}

#[test]
fn a_user_that_cannot_be_become_is_refused() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let refuse = |user: &str, words: &str| {
        let command = &mut Fake::default().command(&folder.path().join(user), &["--user", user]);
        let Output { status, stderr, .. } = command.output().expect("it runs");
        let text = String::from_utf8_lossy(&stderr);
        assert_eq!((status.code(), text.lines().count()), (Some(2), 1), "{text}");
        assert!(text.contains(words), "{text}");
    };
    for user in ["no-such-user", "root", "0", NOBODY] {
        fs::create_dir(folder.path().join(user)).expect("ours");
    }
    refuse("no-such-user", "there is no user \"no-such-user\"");
    refuse("root", "is root: name an ordinary user");
    refuse("0", "is root: name an ordinary user");
    if !nix::unistd::geteuid().is_root() {
        refuse(NOBODY, "only root can become");
    }
}

/// A script that tries each way of changing files in a folder, and says on standard error what it could.
fn attempts(place: &Path) -> String {
    let place = place.display();
    [
        ("create", format!("echo x > '{place}/new'")),
        ("append", format!("echo x >> '{place}/old'")),
        ("truncate", format!(": > '{place}/old'")),
        ("mkdir", format!("mkdir '{place}/folder'")),
        ("symlink", format!("ln -s / '{place}/link'")),
        ("fifo", format!("mkfifo '{place}/fifo'")),
        ("rename", format!("mv '{place}/old' '{place}/older'")),
        ("unlink", format!("rm -f '{place}/older' '{place}/old' && [ ! -e '{place}/old' ]")),
    ]
    .map(|(what, command)| {
        format!("if ( {command} ) 2>/dev/null; then echo 'did {what}' >&2; else echo 'not {what}' >&2; fi\n")
    })
    .concat()
}

fn outcome(log: &str, word: &str) -> usize {
    ["create", "append", "truncate", "mkdir", "symlink", "fifo", "rename", "unlink"]
        .iter()
        .filter(|what| log.contains(&format!("{word} {what}")))
        .count()
}

fn place(folder: &Path, name: &str) -> PathBuf {
    let place = folder.join(name);
    fs::create_dir_all(&place).expect("ours");
    fs::write(place.join("old"), "old").expect("ours");
    place
}

#[test]
fn nothing_that_the_supervisor_starts_writes_outside_of_its_folder() {
    const PATH: &str = "PATH=/usr/bin:/bin\n";
    let check = |inside: bool| -> String {
        let server = Server::launch(|folder| {
            let run = folder.join("run");
            let target = if inside { place(folder, "run/deep") } else { place(folder, "outside") };
            fs::create_dir_all(&run).expect("ours");
            set_mode(&run, 0o700);
            let worker = folder.join("script");
            let text =
                format!("#!/bin/sh\n{PATH}{}exec '{}' \"$@\"\n", attempts(&target), binary(FAKE_WORKER).display());
            fs::write(&worker, text).expect("ours");
            set_mode(&worker, 0o755);
            Fake::default().command(folder, &["--worker", worker.to_str().expect("text")])
        });
        server.wait_until_loaded();
        server.wait_for_log("unlink");
        let walls = server.health()["supervisor"]["isolation"].to_string();
        if !walls.contains("landlock-writes") {
            println!("SKIPPED: this kernel has no Landlock");
            return "not create append truncate mkdir symlink fifo rename unlink".into();
        }
        server.log()
    };
    let outside = check(false);
    if outside.starts_with("not ") {
        return;
    }
    assert_eq!((outcome(&outside, "not"), outcome(&outside, "did")), (8, 0), "{outside}");
    let inside = check(true);
    assert_eq!((outcome(&inside, "not"), outcome(&inside, "did")), (0, 8), "{inside}");
    // The same attempts succeed where nobody put up a wall.
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let text = format!("{PATH}{}", attempts(&place(folder.path(), "outside")));
    let bare = Command::new("sh").arg("-c").arg(text).output().expect("it runs");
    assert_eq!(outcome(&String::from_utf8_lossy(&bare.stderr), "did"), 8);
}

#[test]
fn inherited_descriptors_are_closed() {
    let server = Server::launch(|folder| {
        let command = Fake::default().command(folder, &[]);
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec 7</dev/zero 8>/dev/full; exec \"$0\" \"$@\""]);
        shell.arg(command.get_program()).args(command.get_args());
        shell.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        shell
    });
    let entries = fs::read_dir(format!("/proc/{}/fd", server.pid())).expect("tests of root's children may");
    let targets: Vec<PathBuf> = entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
    assert!(targets.len() > 3);
    assert!(!targets.iter().any(|target| target.ends_with("zero") || target.ends_with("full")), "{targets:?}");
}

#[test]
fn the_private_door_answers_its_own_user_only() {
    if !is_root() {
        return;
    }
    let server = as_nobody();
    let socket = server.runtime_dir().join("admin.sock");
    let metadata = fs::metadata(&socket).expect("it is there");
    assert_eq!((metadata.mode() & 0o777, metadata.uid()), (0o600, NOBODY_ID));
    let ask = |uid: u32| {
        let mut command = Command::new(binary("bulkheadctl"));
        command.arg("--socket").arg(&socket).arg("version").uid(uid).gid(uid).current_dir("/");
        command.output().expect("it runs").status.code()
    };
    assert_eq!((ask(0), ask(NOBODY_ID)), (Some(0), Some(0)));
    const OTHER_ID: u32 = 12345;
    assert_eq!(ask(OTHER_ID), Some(1), "by the modes");
    // As if the modes were not there.
    set_mode(&server.runtime_dir(), 0o755);
    set_mode(&socket, 0o666);
    assert_eq!(ask(OTHER_ID), Some(1), "by who asks");
    server.wait_for_log("another user tried the admin socket");
    assert_eq!(ask(NOBODY_ID), Some(0));
}

/// Sends a question with a descriptor, or without where that is refused, again and again; each has to be answered.
const SEND_DESCRIPTORS: &str = r#"
import json, socket, sys
refused, zero = 0, open("/dev/zero", "rb")
for _ in range(20):
    door = socket.socket(socket.AF_UNIX)
    door.connect(sys.argv[1])
    line = b'{"command": "version"}\n'
    try:
        socket.send_fds(door, [line], [zero.fileno()])
    except PermissionError:
        refused += 1
        door.sendall(line)
    assert json.loads(door.makefile().readline())["ok"]
print(refused, "of 20 descriptors were refused by the kernel")
"#;

#[test]
fn descriptors_sent_to_the_private_door_do_not_stay() {
    let server = Server::start_fake(&[]);
    let count = || process::descriptors(server.pid()).expect("tests of root's children may");
    let before = count();
    let mut python = Command::new("python3");
    python.args(["-c", SEND_DESCRIPTORS]).arg(server.runtime_dir().join("admin.sock"));
    let Output { status, stdout, stderr } = python.output().expect("the README asks for Python 3");
    assert!(status.success(), "{}", String::from_utf8_lossy(&stderr));
    println!("{}", String::from_utf8_lossy(&stdout));
    bulkhead_tests::wait::until("the connections are closed", || (count() <= before).then_some(()));
}

#[test]
fn a_hangup_without_keys_changes_nothing() {
    let server = Server::start_fake(&[]);
    server.signal(Signal::SIGHUP);
    server.wait_for_log("API keys were read anew");
    assert_eq!(server.chat("one").status, 200);
}

/// Starts a program on a terminal of its own, closes the terminal once the program serves, hangs up, and ends as it does.
const CLOSE_TERMINAL: &str = r#"
import os, pty, signal, subprocess, sys
master, slave = pty.openpty()
server = subprocess.Popen(sys.argv[1:], stdin=slave, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
for line in server.stderr:
    if "bulkhead serves" in line:
        break
os.close(slave)
os.close(master)
server.send_signal(signal.SIGHUP)
print(server.communicate(timeout=60)[1])
sys.exit(server.returncode)
"#;

#[test]
fn a_closed_terminal_ends_it_in_order() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let command = Fake::default().command(folder.path(), &[]);
    let mut python = Command::new("python3");
    python.args(["-c", CLOSE_TERMINAL]).arg(command.get_program()).args(command.get_args());
    let Output { status, stdout, stderr } = python.output().expect("the README asks for Python 3");
    let (log, fault) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert_eq!(status.code(), Some(0), "{log}{fault}");
    assert!(log.contains("\"signal\":\"SIGHUP\"") && log.contains("bulkhead has ended"), "{log}");
}

/// What a driver of a card does to name its threads.
const NAME_THREAD: &str =
    "if ( echo named > /proc/self/comm ) 2>/dev/null; then echo 'did name' >&2; else echo 'not name' >&2; fi\n";

#[test]
fn below_proc_only_a_worker_for_a_card_writes() {
    for (device, expected) in [("cpu", "not name"), ("auto", "did name")] {
        let server = Server::launch(|folder| {
            let script = folder.join("script");
            let list = r#"{"devices":[]}"#;
            let serve = format!("{NAME_THREAD}exec '{}' \"$@\"\n", binary(FAKE_WORKER).display());
            fs::write(&script, format!("#!/bin/sh\n[ \"$1\" = devices ] && echo '{list}' && exit 0\n{serve}"))
                .expect("ours");
            set_mode(&script, 0o755);
            let script = script.to_str().expect("text");
            Fake::default().command(folder, &["--device", device, "--worker", script, "--worker-cuda", script])
        });
        server.wait_until_loaded();
        let has_landlock = server.health()["supervisor"]["isolation"].to_string().contains("landlock-writes");
        let line = server.wait_for_log(" name\"");
        if has_landlock {
            assert!(line.contains(expected), "{device}: {line}");
        } else {
            println!("SKIPPED: this kernel has no Landlock");
        }
    }
}

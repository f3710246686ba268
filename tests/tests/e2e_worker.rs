//! The worker as a process: what it is, what it may, and what happens when its supervisor is killed.

use std::fs;
use std::io;

use bulkhead_tests::process;
use bulkhead_tests::server::{Server, WORKER};
use bulkhead_tests::talk::{QUESTION, greedy, with};
use bulkhead_tests::wait;
use nix::sys::signal::Signal;
use serde_json::json;

#[test]
fn the_worker_is_a_walled_in_child() {
    let server = Server::start(&[]);
    let worker = server.worker().expect("a worker runs");
    assert_eq!((worker.parent, worker.name.as_str()), (server.pid(), WORKER));
    let children = process::children(server.pid());
    assert_eq!(children.len(), 1, "the worker is the only child: {children:?}");

    let status = process::status(worker.pid);
    assert_eq!(status["NoNewPrivs"], "1");
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(status[set], "0000000000000000", "{set}");
    }
    assert_eq!(process::limit(worker.pid, "Max core file size"), ("0".into(), "0".into()));
    assert_eq!(process::limit(worker.pid, "Max file size"), ("0".into(), "0".into()));

    // Not dumpable: these files belong to root, and others of the same user may not even look.
    match fs::read(format!("/proc/{}/environ", worker.pid)) {
        Ok(environment) => assert_eq!(String::from_utf8_lossy(&environment), ""),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::PermissionDenied),
    }
    if let Ok(executable) = fs::read_link(format!("/proc/{}/exe", worker.pid)) {
        assert_eq!(executable.file_name().and_then(|name| name.to_str()), Some(WORKER));
    }
    let command_line = fs::read_to_string(format!("/proc/{}/cmdline", worker.pid)).expect("everybody may read it");
    assert_eq!(command_line.split('\0').nth(1), Some("serve"));

    let isolation = &server.health()["workers"][0]["isolation"];
    for layer in ["no-new-privileges", "no-capabilities", "empty-environment", "closed-descriptors", "not-dumpable"] {
        assert!(isolation.as_array().is_some_and(|layers| layers.contains(&json!(layer))), "{layer}: {isolation}");
    }
}

#[test]
fn the_worker_ends_with_its_supervisor() {
    let mut server = Server::start(&[]);
    let worker = server.worker().expect("a worker runs").pid;
    let stream = server.open_stream(&with(greedy(QUESTION), json!({"max_tokens": 4000, "temperature": 2})));
    server.signal(Signal::SIGKILL);
    server.wait();
    wait::until("the worker has ended", || (!process::is_alive(worker)).then_some(()));
    drop(stream);
}

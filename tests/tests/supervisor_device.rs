//! Where the model computes, with a CUDA worker that is a script: it lists a card or refuses, hangs or babbles.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use bulkhead_tests::fake::{FAKE_WORKER, Fake};
use bulkhead_tests::server::{Server, binary};
use nix::sys::signal::Signal;
use serde_json::json;

const CARD: &str = r#"{"devices":[{"index":0,"name":"Some Card","compute_capability":"9.0","memory_bytes":10737418240,"free_bytes":1}]}"#;

/// Prepares a server whose CUDA worker answers `devices --json` with this shell code, and serves as the fake worker does.
fn prepare(folder: &Path, answer: &str, load: &str, flags: &[&str]) -> Command {
    let path = folder.join("bulkhead-worker-cuda");
    symlink(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/cuda-worker.sh"), &path).expect("is linked");
    let conf = format!("SERVER='{}'\nlist() {{ {answer}; }}\n", binary(FAKE_WORKER).display());
    fs::write(path.with_extension("conf"), conf).expect("is written");
    let path = path.display().to_string();
    let flags: Vec<&str> = ["--worker-cuda", &path].into_iter().chain(flags.iter().copied()).collect();
    Fake { load, ..Fake::default() }.command(folder, &flags)
}

/// A server that listens.
fn spawn(answer: &str, load: &str, flags: &[&str]) -> Server {
    Server::launch(|folder| prepare(folder, answer, load, flags))
}

#[test]
fn a_card_is_used_with_the_worker_for_cards() {
    let list = format!("echo '{CARD}'; exit 0");
    for device in ["auto", "cuda:0"] {
        let server = spawn(&list, "", &["--device", device, "--kv-cache-type", "int8"]);
        server.wait_until_loaded();
        let health = server.health();
        assert_eq!(health["workers"][0]["device"], "cuda:0 (fake, 9.0 GiB of int8)", "{health}");
        assert!(health["workers"][0].get("device_reason").is_none(), "{health}");
        // No NVML here, or a card that is not the script's: never nothing.
        assert!(health["gpu_memory_used"].is_f64() && health["gpu_memory_total"].is_f64(), "{health}");
    }
    let server = spawn(&list, "", &["--device", "auto", "--device-memory", "4GiB"]);
    server.wait_until_loaded();
    assert_eq!(server.health()["workers"][0]["device"], "cuda:0 (fake, 4.0 GiB of bf16)");
}

#[test]
fn without_a_card_the_processor_computes_and_the_reason_is_told() {
    for (answer, reason) in [
        ("echo 'the driver is too old' >&2; exit 2", "the driver is too old"),
        (
            "echo 'error while loading shared libraries: libm.so.7' >&2; exit 127",
            "the CUDA worker cannot be loaded: error while loading shared libraries: libm.so.7",
        ),
        ("head -c 9000000 /dev/zero; exit 0", "the CUDA worker answered with more than 65536 bytes"),
        ("echo '{}'; exit 0", "the CUDA worker answered with what is no list of devices: missing field"),
    ] {
        let server = spawn(answer, "", &["--device", "auto"]);
        server.wait_until_loaded();
        let health = server.health();
        assert_eq!(health["workers"][0]["device"], "cpu (fake)", "{health}");
        let told = health["workers"][0]["device_reason"].as_str().unwrap_or_default();
        assert!(told.starts_with(reason), "{health}");
        assert_eq!((&health["gpu_memory_used"], &health["gpu_memory_total"]), (&json!(0.0), &json!(0.0)));
        server.wait_for_log("the model computes on the CPU");
    }
}

#[test]
fn a_card_that_was_asked_for_and_cannot_be_used_ends_the_start() {
    let flags = ["--device", "cuda:0"];
    let mut server = spawn("echo 'the driver is too old' >&2; exit 2", "", &flags);
    assert_eq!(server.wait().code(), Some(2));
    let line = server.log().lines().last().unwrap_or_default().to_owned();
    assert!(line.starts_with("bulkhead: device cuda:0 cannot be used: the driver is too old"), "{line}");

    let mut server = spawn(&format!("echo '{CARD}'; exit 0"), "", &["--device", "cuda:1"]);
    assert_eq!(server.wait().code(), Some(2));
    assert!(server.log().contains("device cuda:1 cannot be used: the devices are 0"), "{}", server.log());
}

#[test]
fn nothing_waits_for_a_driver_that_hangs() {
    let mut server = spawn("exec sleep 600", "", &["--device", "auto"]);
    let health = server.health();
    assert_eq!((&health["status"], &health["workers"][0]["state"]), (&json!("loading"), &json!("STARTING")));
    assert_eq!(health["workers"][0]["device_reason"], "the CUDA worker is asked for its devices");
    assert_eq!(server.get("/health/live").status, 200);
    let asked_to_end = Instant::now();
    server.signal(Signal::SIGTERM);
    assert_eq!(server.wait().code(), Some(0));
    assert!(asked_to_end.elapsed() < Duration::from_secs(10), "the end does not wait for it either");
}

#[test]
fn a_lost_card_is_no_reason_to_restart() {
    let server = spawn(&format!("echo '{CARD}'; exit 0"), "exit 25", &["--device", "auto"]);
    let health = server.wait_for_health("/workers/0/state", &json!("FATAL"));
    assert_eq!((&health["status"], &health["workers"][0]["incarnation"]), (&json!("unhealthy"), &json!(1)));
    assert_eq!(health["reason"], "the device is lost: a restart of the worker will not help");
}

#[test]
fn a_worker_that_found_too_little_memory_is_followed_by_one_that_takes_less() {
    let server = spawn(&format!("echo '{CARD}'; exit 0"), "exit 22", &["--device", "auto"]);
    let line = server.wait_for_log("the worker gets less of the card");
    assert!(line.contains("8.1 GiB"), "nine tenths of nine tenths of ten: {line}");
}

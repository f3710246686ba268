//! What stands in place of a file: links out of the folder, pipes, devices, folders; and files that shrink while they are
//! mapped.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::Path;

use bulkhead_tests::oracle;
use bulkhead_tests::server::Server;
use bulkhead_tests::talk::check_error;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::mkfifo;
use serde_json::json;

use crate::damage::{WEIGHTS, json as edit_json};
use crate::stage::{Stage, text};

const INDEX: &str = "model.safetensors.index.json";
const SHARD: &str = "model-00002-of-00004.safetensors";

/// Every file that a load reads.
const FILES: [&str; 5] = ["config.json", "tokenizer.json", "generation_config.json", "tokenizer_config.json", SHARD];

fn stage() -> Stage {
    Stage::new(oracle::model("llama3_untied_sharded"))
}

fn remove(folder: &Path, name: &str) {
    if let Err(error) = fs::remove_file(folder.join(name)) {
        assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{name}");
    }
}

#[test]
fn an_index_reaches_nothing_outside_of_its_folder() {
    let stage = stage();
    fs::copy(oracle::model("llama_tied").join(WEIGHTS), stage.home().join("other.safetensors")).expect("copied");
    let outside = stage.home().join("other.safetensors");
    for name in ["../other.safetensors", outside.to_str().expect("text"), "./x/../../other.safetensors", "..", ""] {
        let change = |folder: &Path| {
            edit_json(folder, INDEX, |index| index["weight_map"]["model.norm.weight"] = json!(name));
        };
        stage.refuses(name, change, &[INDEX, "plain file name"]);
    }
    let missing = |folder: &Path| {
        edit_json(folder, INDEX, |index| index["weight_map"]["model.norm.weight"] = json!("x.safetensors"));
    };
    stage.refuses("a shard that is not there", missing, &["x.safetensors", "missing"]);
    let many = |folder: &Path| {
        let shards = (0..5000).map(|number| (format!("t{number}"), json!(format!("{number}.safetensors"))));
        edit_json(folder, INDEX, |index| index["weight_map"] = shards.collect());
    };
    stage.refuses("five thousand shards", many, &[INDEX, "5000 shards"]);
    // None of them has too many tensors, all of them have.
    let shards = |folder: &Path| {
        let entry = |index| format!("\"{index:x}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}");
        for (shard, range) in [("a.safetensors", 0..600_000), ("b.safetensors", 600_000..1_200_000)] {
            let header = format!("{{{}}}", range.map(entry).collect::<Vec<_>>().join(","));
            let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
            fs::write(folder.join(shard), bytes).expect("ours");
        }
        let weight_map = json!({"0": "a.safetensors", format!("{:x}", 600_000): "b.safetensors"});
        edit_json(folder, INDEX, |index| index["weight_map"] = weight_map);
    };
    stage.refuses("a million tensors in two shards", shards, &["b.safetensors", "more than 1048576 tensors"]);
    stage.goes_on();
}

/// The supervisor's user may read all of these; the worker may not.
#[test]
fn a_link_out_of_the_folder_leads_nowhere() {
    let stage = stage();
    for name in FILES {
        // What it leads to is a good one: only the wall stands between.
        let good = stage.home().join(name);
        let source = oracle::model("llama3_untied_sharded").join(name);
        if source.exists() {
            fs::copy(source, &good).expect("copied");
        } else {
            fs::write(&good, "{}").expect("ours");
        }
        for target in [good.as_path(), Path::new("/etc/passwd"), Path::new("/proc/self/environ")] {
            let change = |folder: &Path| {
                remove(folder, name);
                symlink(target, folder.join(name)).expect("ours");
            };
            stage.refuses(&format!("{name} to {}", target.display()), change, &[name, "Permission denied"]);
        }
        let change = |folder: &Path| {
            remove(folder, name);
            symlink(name, folder.join(name)).expect("ours");
        };
        stage.refuses(&format!("{name} to itself"), change, &[name]);
    }
    stage.goes_on();
}

/// As the hub's cache has it, links of a snapshot lead to `blobs`; a `blobs` that is a link itself would open any folder.
#[test]
fn a_cache_that_leads_elsewhere_is_no_cache() {
    let home = tempfile::tempdir().expect("a temporary folder can be made");
    let (snapshot, secrets) = (home.path().join("model/snapshots/1"), home.path().join("secrets"));
    let blobs = home.path().join("model/blobs");
    fs::create_dir_all(&snapshot).expect("ours");
    fs::create_dir_all(&blobs).expect("ours");
    for name in ["config.json", "tokenizer.json", WEIGHTS] {
        fs::copy(oracle::model("gptoss_window_edges").join(name), blobs.join(name)).expect("copied");
        symlink(Path::new("../../blobs").join(name), snapshot.join(name)).expect("ours");
    }
    let flags = ["--model", text(&snapshot)];
    let server = Server::start(&flags);
    assert!(server.worker().is_some(), "an honest cache is served");
    drop(server);
    fs::rename(&blobs, &secrets).expect("ours");
    symlink(&secrets, &blobs).expect("ours");
    let server = Server::spawn(&flags);
    let health = server.wait_for_health("/workers/0/state", &json!("FATAL"));
    assert!(health["reason"].as_str().is_some_and(|reason| reason.contains("Permission denied")), "{health}");
}

#[test]
fn what_is_no_file_is_not_waited_for() {
    let stage = stage();
    for name in FILES {
        let place = |folder: &Path| {
            remove(folder, name);
            folder.join(name)
        };
        let pipe = |folder: &Path| mkfifo(&place(folder), Mode::S_IRUSR).expect("ours");
        stage.refuses(&format!("{name} is a pipe"), pipe, &[name, "not a regular file"]);
        let in_its_place = |folder: &Path| fs::create_dir(place(folder)).expect("ours");
        stage.refuses(&format!("{name} is a folder"), in_its_place, &[name, "not a regular file"]);
        let socket = |folder: &Path| drop(UnixListener::bind(place(folder)).expect("ours"));
        stage.refuses(&format!("{name} is a socket"), socket, &[name, "not a regular file"]);
        for (device, minor) in [("zero", 5), ("random", 8)] {
            let trial = stage.home().join("device");
            match mknod(&trial, SFlag::S_IFCHR, Mode::S_IRUSR, makedev(1, minor)) {
                Ok(()) => fs::remove_file(trial).expect("ours"),
                Err(error) => {
                    eprintln!("skipped: {name} as /dev/{device}: this test may not make devices: {error}");
                    continue;
                }
            }
            let node = |folder: &Path| {
                mknod(&place(folder), SFlag::S_IFCHR, Mode::S_IRUSR, makedev(1, minor)).expect("it went well before");
            };
            stage.refuses(&format!("{name} is /dev/{device}"), node, &[name, "not a regular file"]);
        }
    }
    stage.goes_on();
}

/// A worker that touches weights which are no longer there dies by SIGBUS. The next one says what is wrong.
#[test]
fn weights_that_shrink_while_they_are_mapped() {
    let stage = stage();
    let folder = stage.home().join("model");
    fs::File::options().write(true).open(folder.join(SHARD)).and_then(|file| file.set_len(0)).expect("ours");
    let answer = stage.complete("Hello");
    assert!(answer.status >= 500, "{answer:?}");
    check_error(&answer.json());
    let health = stage.server.wait_for_health("/workers/0/state", &json!("FATAL"));
    let reason = health["reason"].as_str().expect("a reason");
    assert!(reason.contains(SHARD) && reason.contains("0 bytes"), "{reason}");
    assert!(stage.server.log().contains("SIGBUS"), "{}", stage.server.log());
    assert_eq!(stage.server.get("/health/live").status, 200);
    stage.goes_on();
}

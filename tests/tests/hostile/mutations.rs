//! Good checkpoints, changed at random from a printed seed: each loads, or is refused at the first try for a cause that names
//! what is wrong.

use std::fs;
use std::path::Path;

use bulkhead_tests::fuzz::{Random, mutate, mutate_json, run};
use bulkhead_tests::oracle;
use bulkhead_tests::talk::{CHAT, check_error, greedy, with};
use serde_json::json;

use crate::damage::write;
use crate::stage::Stage;

/// Bytes from the start of a file of weights in which a change strikes the header more often than not.
const HEADER_BYTES: usize = 8 << 10;

fn change(folder: &Path, random: &mut Random) -> String {
    let mut names: Vec<String> = fs::read_dir(folder)
        .expect("ours")
        .map(|entry| entry.expect("ours").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    let name = names[random.below(names.len())].clone();
    let mut bytes = fs::read(folder.join(&name)).expect("ours");
    if name.ends_with(".safetensors") {
        let tail = bytes.split_off(bytes.len().min(HEADER_BYTES));
        mutate(&mut bytes, random);
        bytes.extend(tail);
    } else if name.ends_with(".json") && random.once_in(2) {
        let mut value = serde_json::from_slice(&bytes).expect("the fixture is JSON");
        mutate_json(&mut value, random);
        bytes = value.to_string().into_bytes();
    } else {
        mutate(&mut bytes, random);
    }
    write(folder, &name, bytes);
    name
}

fn try_mutations_of(model: &str) {
    let stage = Stage::new(oracle::model(model));
    let (mut served, mut refused) = (0, 0);
    run(&format!("whole folders of {model}"), |random| {
        let mut changed = String::new();
        let came = stage.load(|folder| changed = change(folder, random));
        let is_nonsense = came.reason.contains("not a number") && came.tries <= 2;
        assert!(came.is_running() || came.is_named() || is_nonsense, "{changed}: {came:?}\n{}", stage.server.log());
        match came.is_running() {
            true => served += 1,
            false => refused += 1,
        }
        if came.is_running() {
            let chat = stage.server.post(CHAT, &with(greedy("Hello"), json!({"max_tokens": 4})));
            for answer in [chat.read_whole().expect("whole"), stage.complete("Hello")] {
                if answer.status != 200 {
                    check_error(&answer.json());
                }
            }
        }
        assert_eq!(stage.server.get("/health/live").status, 200);
    });
    println!("{served} were served, {refused} refused");
    stage.goes_on();
}

#[test]
fn one_file_of_gpt_oss() {
    try_mutations_of("gptoss_window_edges");
}

#[test]
fn shards_of_gpt_oss_in_four_bits() {
    try_mutations_of("gptoss_mxfp4");
}

#[test]
fn shards_of_llama() {
    try_mutations_of("llama3_untied_sharded");
}

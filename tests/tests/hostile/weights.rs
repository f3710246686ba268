//! Files of weights: headers that lie, numbers that are none, and sizes that no disk has.

use std::fs::File;
use std::path::Path;

use bulkhead_tests::oracle;
use safetensors::Dtype;
use serde_json::{Value, json};

use crate::damage::{WEIGHTS, bytes, entry, header, json as edit_json, tensors, write};
use crate::stage::Stage;

const NORM: &str = "model.norm.weight";

/// More tensors than a file may list.
const TENSORS: usize = (1 << 20) + 1;

/// What is done to a folder, and words that the reason must hold.
type Case = (&'static str, fn(&Path), &'static [&'static str]);

fn stage() -> Stage {
    Stage::new(oracle::model("gptoss_window_edges"))
}

/// Goes through cases and ends with the good model.
fn all_are_refused(stage: &Stage, cases: &[Case]) {
    for (what, change, words) in cases {
        stage.refuses(what, change, words);
    }
    stage.goes_on();
}

/// Gives the header with one entry written twice.
fn doubled(header: &Value) -> String {
    let text = header.to_string();
    format!("{},\"{NORM}\":{}}}", &text[..text.len() - 1], header[NORM])
}

fn many_tensors(_: Value) -> String {
    let entry = |index| format!("\"{index:x}\":{{\"dtype\":\"U8\",\"shape\":[0],\"data_offsets\":[0,0]}}");
    format!("{{{}}}", (0..TENSORS).map(entry).collect::<Vec<_>>().join(","))
}

fn set_length(folder: &Path, length: u64) {
    bytes(folder, WEIGHTS, |bytes| bytes[..8].copy_from_slice(&length.to_le_bytes()));
}

#[test]
fn headers_that_lie() {
    let stage = stage();
    all_are_refused(
        &stage,
        &[
            ("no byte", |folder| write(folder, WEIGHTS, ""), &[WEIGHTS, "0 bytes"]),
            ("a length of 2^64", |folder| set_length(folder, u64::MAX), &[WEIGHTS, "18446744073709551615"]),
            ("a length beyond the file", |folder| set_length(folder, 1 << 25), &[WEIGHTS, "truncated"]),
            ("a length of nothing", |folder| set_length(folder, 0), &[WEIGHTS, "malformed"]),
            ("half of the file", |folder| bytes(folder, WEIGHTS, |b| b.truncate(b.len() / 2)), &[WEIGHTS, "truncated"]),
            (
                "ten million brackets",
                |folder| header(folder, |_| format!("{{\"a\":{}", "[".repeat(10 << 20))),
                &[WEIGHTS, "malformed"],
            ),
            (
                "brackets where nobody looks",
                |folder| header(folder, |_| format!("{{\"a\":{{\"x\":{}", "[".repeat(10 << 20))),
                &[WEIGHTS, "malformed"],
            ),
            ("a million tensors", |folder| header(folder, many_tensors), &[WEIGHTS, "more than 1048576 tensors"]),
            ("a tensor twice", |folder| header(folder, |h| doubled(&h)), &[WEIGHTS, NORM, "twice"]),
            ("tensors in each other", |f| entry(f, NORM, "data_offsets", json!([0, 128])), &[NORM, "inside tensor"]),
            (
                "a tensor beyond the end",
                |folder| entry(folder, NORM, "data_offsets", json!([u64::MAX - 128, u64::MAX])),
                &[NORM, WEIGHTS],
            ),
            ("a tensor that runs backward", |f| entry(f, NORM, "data_offsets", json!([128, 0])), &[NORM, WEIGHTS]),
            ("an unknown type", |folder| entry(folder, NORM, "dtype", json!("X9")), &[NORM, "X9"]),
            ("a shape that overflows", |f| entry(f, NORM, "shape", json!([u64::MAX, 2])), &[NORM, "overflows"]),
            ("a product of nothing", |f| entry(f, NORM, "shape", json!([0, u64::MAX, u64::MAX])), &[NORM]),
            ("a negative shape", |folder| entry(folder, NORM, "shape", json!([-64])), &[NORM, "malformed"]),
            ("ten thousand dimensions", |f| entry(f, NORM, "shape", json!(vec![1; 10_000])), &[NORM, "dimensions"]),
        ],
    );
}

/// Fills a tensor with one value.
fn fill(folder: &Path, name: &str, value: f32) {
    tensors(folder, |tensors| {
        let bits = half::bf16::from_f32(value).to_le_bytes();
        let stored = tensors.0.get_mut(name).expect("the model has it");
        stored.bytes = bits.repeat(stored.bytes.len() / 2);
    });
}

#[test]
fn tensors_that_are_not_what_the_model_needs() {
    let stage = stage();
    all_are_refused(
        &stage,
        &[
            (
                "no rows",
                |f| tensors(f, |t| t.insert("model.embed_tokens.weight", Dtype::BF16, &[0, 64], Vec::new())),
                &["embed_tokens", "[0, 64]"],
            ),
            (
                "a type of another kind",
                |f| tensors(f, |t| t.insert(NORM, Dtype::I64, &[64], vec![0; 512])),
                &[NORM, "I64"],
            ),
            ("no norm", |folder| tensors(folder, |tensors| drop(tensors.0.remove(NORM))), &[NORM, "missing"]),
            ("a norm of NaN", |folder| fill(folder, NORM, f32::NAN), &[NORM, "NaN"]),
            ("sinks without end", |f| fill(f, "model.layers.0.self_attn.sinks", f32::INFINITY), &["sinks", "inf"]),
            (
                "a bias without end",
                |f| fill(f, "model.layers.1.mlp.router.bias", f32::NEG_INFINITY),
                &["router.bias", "-inf"],
            ),
        ],
    );
}

/// What is too large to be looked through at the start shows with the first token, and a second worker has to see it too: a
/// card may have been at fault.
#[test]
fn weights_that_compute_nonsense() {
    let stage = stage();
    for (name, value) in [
        ("lm_head.weight", f32::NAN),
        ("model.embed_tokens.weight", f32::INFINITY),
        ("model.layers.1.self_attn.v_proj.weight", f32::NAN),
        ("model.layers.0.mlp.experts.down_proj", 3e38),
    ] {
        let came = stage.load(|folder| fill(folder, name, value));
        assert_eq!((came.state.as_str(), came.tries), ("FATAL", 2), "{name}: {came:?}\n{}", stage.server.log());
        assert!(came.reason.contains("not a number"), "{name}: {came:?}");
    }
    stage.goes_on();
}

/// A file of zeros with holes, as long as a disk allows; it takes no room.
fn sparse(path: &Path, bytes: u64) {
    File::create(path).and_then(|file| file.set_len(bytes)).expect("the file system has files with holes");
}

const TIB: u64 = 1 << 40;

/// A model of the largest dimensions, all of whose tensors are there, and are zeros.
fn a_model_of_terabytes(folder: &Path) {
    const VOCABULARY: u64 = 1 << 22;
    const WIDTH: u64 = 1 << 17;
    edit_json(folder, "config.json", |config| {
        for (key, value) in [
            ("vocab_size", VOCABULARY),
            ("hidden_size", WIDTH),
            ("intermediate_size", WIDTH),
            ("num_hidden_layers", 1),
            ("num_local_experts", 1),
        ] {
            config[key] = value.into();
        }
        config["layer_types"] = json!(["full_attention"]);
    });
    let shapes: [(&str, &[u64]); 19] = [
        ("lm_head.weight", &[VOCABULARY, WIDTH]),
        ("model.embed_tokens.weight", &[VOCABULARY, WIDTH]),
        ("model.norm.weight", &[WIDTH]),
        ("model.layers.0.input_layernorm.weight", &[WIDTH]),
        ("model.layers.0.post_attention_layernorm.weight", &[WIDTH]),
        ("model.layers.0.mlp.experts.down_proj", &[1, WIDTH, WIDTH]),
        ("model.layers.0.mlp.experts.down_proj_bias", &[1, WIDTH]),
        ("model.layers.0.mlp.experts.gate_up_proj", &[1, WIDTH, 2 * WIDTH]),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", &[1, 2 * WIDTH]),
        ("model.layers.0.mlp.router.bias", &[1]),
        ("model.layers.0.mlp.router.weight", &[1, WIDTH]),
        ("model.layers.0.self_attn.q_proj.weight", &[64, WIDTH]),
        ("model.layers.0.self_attn.q_proj.bias", &[64]),
        ("model.layers.0.self_attn.k_proj.weight", &[64, WIDTH]),
        ("model.layers.0.self_attn.k_proj.bias", &[64]),
        ("model.layers.0.self_attn.v_proj.weight", &[64, WIDTH]),
        ("model.layers.0.self_attn.v_proj.bias", &[64]),
        ("model.layers.0.self_attn.o_proj.weight", &[WIDTH, 64]),
        ("model.layers.0.self_attn.o_proj.bias", &[WIDTH]),
    ];
    let mut entries =
        json!({"model.layers.0.self_attn.sinks": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}});
    let mut end = 8;
    for (name, shape) in shapes {
        let start = end;
        end += 2 * shape.iter().product::<u64>();
        entries[name] = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
    }
    let header = entries.to_string();
    write(folder, WEIGHTS, [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat());
    let file = File::options().write(true).open(folder.join(WEIGHTS)).expect("ours");
    file.set_len(8 + header.len() as u64 + end).expect("the file system has files with holes");
}

#[test]
fn files_of_terabytes() {
    let stage = stage();
    all_are_refused(
        &stage,
        &[
            ("weights of holes", |folder| sparse(&folder.join(WEIGHTS), 4 * TIB), &[WEIGHTS, "malformed"]),
            ("a config of holes", |folder| sparse(&folder.join("config.json"), TIB), &["config.json", "1099511627776"]),
            ("a tokenizer of holes", |f| sparse(&f.join("tokenizer.json"), TIB), &["tokenizer.json", "1099511627776"]),
            ("settings of holes", |f| sparse(&f.join("generation_config.json"), TIB), &["generation_config.json"]),
            ("a model of terabytes", a_model_of_terabytes, &["GiB of weights"]),
        ],
    );
}

//! Files of a model folder: the header of safetensors, the index of shards, config.json.

use bulkhead_tests::fuzz::{Random, mutate, mutate_json, run};
use bulkhead_worker::checkpoint::{parse_header, parse_index};
use bulkhead_worker::model::config::Config;
use bulkhead_worker::model::rope::RopeTable;
use serde_json::{Value, json};

use crate::memory::{alone, bounded};

/// What reading a JSON text may take: names and numbers as text become values with their own headers.
fn allowed(input_bytes: usize) -> usize {
    (1 << 16) + 256 * input_bytes
}

/// A safetensors file of a few tensors.
fn safetensors(header: &Value, data_bytes: usize) -> Vec<u8> {
    let header = header.to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.resize(file.len() + data_bytes, 0x5a);
    file
}

fn header() -> Value {
    json!({
        "__metadata__": {"format": "pt"},
        "model.embed_tokens.weight": {"dtype": "BF16", "shape": [8, 4], "data_offsets": [0, 64]},
        "model.layers.0.mlp.experts.gate_up_proj_blocks": {"dtype": "U8", "shape": [2, 1, 1, 16], "data_offsets": [64, 96]},
        "model.layers.0.mlp.experts.gate_up_proj_scales": {"dtype": "U8", "shape": [2, 1, 1], "data_offsets": [96, 98]},
        "model.layers.0.self_attn.sinks": {"dtype": "F32", "shape": [], "data_offsets": [98, 102]},
        "empty": {"dtype": "F32", "shape": [0, 3], "data_offsets": [102, 102]},
    })
}

fn check_header(random: &mut Random) {
    let mut json = header();
    if random.once_in(2) {
        mutate_json(&mut json, random);
    }
    let data_bytes = if random.once_in(4) { random.below(200) } else { 102 };
    let mut file = safetensors(&json, data_bytes);
    if random.once_in(2) {
        mutate(&mut file, random);
    }
    let bytes = file.len();
    let Ok(header) = bounded(allowed(bytes), || parse_header(&file, bytes as u64)) else { return };
    let mut covered = header.tensors.first().map_or(bytes, |first| first.range.start);
    for tensor in &header.tensors {
        assert_eq!(tensor.range.start, covered, "tensors follow each other without hole or overlap");
        covered = tensor.range.end;
    }
    assert_eq!(covered, bytes, "tensors end with the file");
}

fn index() -> Value {
    json!({
        "metadata": {"total_size": 102},
        "weight_map": {
            "model.embed_tokens.weight": "model-00001-of-00002.safetensors",
            "lm_head.weight": "model-00002-of-00002.safetensors",
        },
    })
}

/// As in the published checkpoints, with every field that is read.
fn config() -> Value {
    json!({
        "architectures": ["GptOssForCausalLM"], "attention_bias": true, "eos_token_id": 2041, "experts_per_token": 2,
        "head_dim": 64, "hidden_size": 256, "initial_context_length": 4096, "intermediate_size": 256,
        "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 16384,
        "model_type": "gpt_oss", "num_attention_heads": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "num_local_experts": 4, "rms_norm_eps": 1e-5, "rope_theta": 150_000.0,
        "quantization_config": {
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": true, "load_in_4bit": true,
            "quant_method": "bitsandbytes",
        },
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 4.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": false,
        },
        "sliding_window": 128, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "vocab_size": 2048,
    })
}

fn llama_config() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 499, "eos_token_id": [500, 503],
        "head_dim": 64, "hidden_act": "silu", "hidden_size": 256, "intermediate_size": 512, "mlp_bias": false,
        "max_position_embeddings": 131_072, "model_type": "llama", "num_attention_heads": 4, "num_hidden_layers": 2,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": true, "vocab_size": 2048,
        "rope_parameters": {
            "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
            "rope_theta": 500_000.0, "rope_type": "llama3",
        },
    })
}

/// Gives the damaged bytes of a JSON file.
fn damaged(mut json: Value, random: &mut Random) -> Vec<u8> {
    mutate_json(&mut json, random);
    let mut bytes = json.to_string().into_bytes();
    if random.once_in(4) {
        mutate(&mut bytes, random);
    }
    bytes
}

#[test]
fn safetensors_headers() {
    alone(|| run("safetensors headers", check_header));
}

#[test]
fn the_valid_files_are_valid() {
    let file = safetensors(&header(), 102);
    assert_eq!(parse_header(&file, file.len() as u64).expect("valid").tensors.len(), 5);
    parse_index(index().to_string().as_bytes()).expect("valid");
    for config in [config(), llama_config()] {
        Config::parse(config.to_string().as_bytes(), "config.json").expect("valid");
    }
}

#[test]
fn shard_indexes() {
    alone(|| {
        run("shard indexes", |random| {
            let bytes = damaged(index(), random);
            // Whether it is taken does not matter here, only that it ends.
            drop(bounded(allowed(bytes.len()), || parse_index(&bytes)));
        });
    });
}

#[test]
fn model_configs() {
    alone(|| {
        run("model configs", |random| {
            let config = if random.once_in(2) { config() } else { llama_config() };
            let bytes = damaged(config, random);
            let Ok(config) = bounded(allowed(bytes.len()), || Config::parse(&bytes, "config.json")) else { return };
            // The accessors multiply what was accepted: none may overflow.
            let widths = (config.query_width(), config.kv_width(), config.window(0));
            assert!(widths.0 >= widths.1, "query heads are a multiple of key heads: {widths:?}");
            let frequencies = RopeTable::new(&config.rope);
            assert!(
                frequencies.inverse_frequencies().iter().all(|frequency| frequency.is_finite()),
                "{:?}",
                config.rope
            );
        });
    });
}

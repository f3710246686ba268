//! Tables over config.json: what is read, and what is refused with which words.

use serde_json::{Value, json};

use super::*;
use crate::model::rope::{Llama3, Scaling, Yarn};

fn published() -> Value {
    json!({
        "model_type": "gpt_oss", "hidden_act": "silu", "attention_bias": true, "tie_word_embeddings": false,
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 16,
        "num_local_experts": 8, "num_experts_per_tok": 4, "experts_per_token": 4,
        "sliding_window": 16, "max_position_embeddings": 131072, "initial_context_length": 4096,
        "rms_norm_eps": 1e-5, "swiglu_limit": 7.0, "eos_token_id": [496, 500], "bos_token_id": 494,
        "rope_theta": 150000, "torch_dtype": "bfloat16",
        "rope_scaling": {
            "rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
            "original_max_position_embeddings": 4096, "truncate": false,
        },
    })
}

fn parse(config: &Value) -> Result<Config, ConfigError> {
    Config::parse(config.to_string().as_bytes(), "config.json")
}

/// Replaces fields given as JSON pointers; null removes.
fn edited(edits: &[(&str, Value)]) -> Value {
    let mut config = published();
    for (pointer, value) in edits {
        let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
        let parent = config.pointer_mut(parent).and_then(Value::as_object_mut).expect("an object");
        if value.is_null() {
            parent.remove(key)
        } else {
            parent.insert(key.to_owned(), value.clone())
        };
    }
    config
}

#[test]
fn the_published_style_is_read_whole() {
    let config = parse(&published()).expect("valid");
    let yarn = Yarn {
        factor: 32.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        original_context: 4096,
        is_truncated: false,
        concentration: None,
    };
    let sliding = LayerKind::Sliding { window: 16 };
    let experts =
        ExpertsConfig { count: 8, per_token: 4, intermediate_size: 128, swiglu_limit: 7.0, swiglu_alpha: 1.702 };
    let expected = Config {
        architecture: Architecture::GptOss,
        vocab_size: 512,
        hidden_size: 64,
        mlp: Mlp::Experts(experts),
        layers: vec![sliding, LayerKind::Full, sliding],
        heads: 8,
        kv_heads: 2,
        head_dim: 16,
        context_tokens: 131_072,
        norm_eps: 1e-5,
        has_attention_bias: true,
        has_sinks: true,
        has_tied_embeddings: false,
        rope: Rope { theta: 150_000.0, head_dim: 16, scaling: Scaling::Yarn(yarn) },
        eos_tokens: vec![496, 500],
        bos_token: Some(494),
        quantization: None,
    };
    assert_eq!(config, expected);
    assert_eq!((config.window(0), config.window(1)), (Some(16), None));
    assert_eq!((config.query_width(), config.kv_width()), (128, 32));
}

#[test]
fn the_style_of_transformers_5_says_the_same() {
    let mut newer = published();
    let fields = newer.as_object_mut().expect("an object");
    let mut parameters = fields.remove("rope_scaling").expect("there");
    parameters["rope_theta"] = fields.remove("rope_theta").expect("there");
    fields.insert("rope_parameters".to_owned(), parameters);
    fields.remove("experts_per_token");
    fields.remove("initial_context_length");
    assert_eq!(parse(&newer).expect("valid"), parse(&published()).expect("valid"));
}

#[test]
fn what_may_be_left_out_has_the_value_of_gpt_oss() {
    let left_out =
        ["swiglu_limit", "rms_norm_eps", "rope_theta", "attention_bias", "tie_word_embeddings", "hidden_act"];
    let edits: Vec<_> = left_out.iter().map(|key| (format!("/{key}"), Value::Null)).collect();
    let edits: Vec<_> = edits.iter().map(|(pointer, value)| (pointer.as_str(), value.clone())).collect();
    assert_eq!(parse(&edited(&edits)).expect("valid"), parse(&published()).expect("valid"));
    let config = parse(&edited(&[("/layer_types", Value::Null), ("/sliding_window", Value::Null)])).expect("valid");
    assert_eq!(config.layers[1..], [LayerKind::Full, LayerKind::Sliding { window: 128 }]);
}

fn llama() -> Value {
    json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "vocab_size": 512,
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "eos_token_id": [500, 503], "bos_token_id": 499, "tie_word_embeddings": true,
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    })
}

#[test]
fn a_llama_is_read_whole() {
    let llama3 = Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 64 };
    let expected = Config {
        architecture: Architecture::Llama,
        vocab_size: 512,
        hidden_size: 64,
        mlp: Mlp::Dense(DenseConfig { intermediate_size: 128, has_bias: false }),
        layers: vec![LayerKind::Full; 2],
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        context_tokens: 1024,
        norm_eps: 1e-5,
        has_attention_bias: false,
        has_sinks: false,
        has_tied_embeddings: true,
        rope: Rope { theta: 500_000.0, head_dim: 16, scaling: Scaling::Llama3(llama3) },
        eos_tokens: vec![500, 503],
        bos_token: Some(499),
        quantization: None,
    };
    assert_eq!(parse(&llama()).expect("valid"), expected);
    assert_eq!((expected.window(0), expected.experts()), (None, None));
}

#[test]
fn what_a_llama_may_leave_out_has_the_value_of_transformers() {
    let mut config = llama();
    let fields = config.as_object_mut().expect("an object");
    for key in ["rope_theta", "rope_scaling", "rms_norm_eps", "num_key_value_heads", "tie_word_embeddings"] {
        fields.remove(key);
    }
    fields.remove("max_position_embeddings");
    fields.remove("architectures");
    fields.insert("mlp_bias".to_owned(), json!(true));
    fields.insert("attention_bias".to_owned(), json!(true));
    let config = parse(&config).expect("valid");
    assert_eq!(config.rope, Rope { theta: 10_000.0, head_dim: 16, scaling: Scaling::None });
    assert_eq!((config.norm_eps, config.kv_heads, config.context_tokens), (1e-6, 4, 2048));
    assert_eq!(config.mlp, Mlp::Dense(DenseConfig { intermediate_size: 128, has_bias: true }));
    assert!(config.has_attention_bias && !config.has_tied_embeddings);
}

#[test]
fn a_llama_that_cannot_be_is_refused_by_name() {
    let table = [
        ("/num_attention_heads", json!(5), "num_attention_heads is 5, expected a divisor of hidden_size"),
        ("/num_attention_heads", json!(0), "num_attention_heads is 0"),
        ("/num_key_value_heads", json!(3), "num_key_value_heads is 3, expected a divisor"),
        ("/head_dim", json!(15), "head_dim is 15, expected an even number"),
        ("/architectures", json!(["LlamaForSequenceClassification"]), "is not supported, only LlamaForCausalLM"),
        ("/intermediate_size", json!(0), "intermediate_size is 0"),
        ("/rope_scaling/factor", json!(1e300), "rope factor is 1"),
        ("/rope_scaling/low_freq_factor", json!(-1.0), "low_freq_factor is -1, expected a finite number above 0"),
        ("/rope_scaling/high_freq_factor", json!(1.0), "high_freq_factor is 1, expected above low_freq_factor"),
        ("/rope_scaling/original_max_position_embeddings", json!(0), "original_max_position_embeddings is 0"),
        ("/rope_scaling/partial_rotary_factor", json!(0.5), r#"parameter "partial_rotary_factor" is not supported"#),
        ("/rope_scaling/rope_type", json!("linear"), r#"rope_type "linear" is not supported"#),
    ];
    for (pointer, value, words) in table {
        let mut config = llama();
        let (parent, key) = pointer.rsplit_once('/').expect("a pointer");
        let parent = config.pointer_mut(parent).and_then(Value::as_object_mut).expect("an object");
        parent.insert(key.to_owned(), value);
        let error = parse(&config).expect_err(pointer).to_string();
        assert!(error.starts_with("config.json: ") && error.contains(words), "{pointer}: {error}");
    }
}

#[test]
fn rope_can_be_plain() {
    for scaling in [r#"null"#, r#"{"rope_type":"default"}"#] {
        let text = edited(&[("/rope_scaling", json!("HERE"))]).to_string().replace(r#""HERE""#, scaling);
        let config = Config::parse(text.as_bytes(), "config.json").expect("valid");
        assert_eq!(config.rope.scaling, Scaling::None, "{scaling}");
    }
}

#[test]
fn quantisation_claims_are_read() {
    for (claim, expected) in [
        (json!({"quant_method": "mxfp4"}), Quantization::Mxfp4),
        (
            json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}),
            Quantization::Nf4,
        ),
    ] {
        let config = parse(&edited(&[("/quantization_config", claim)])).expect("valid");
        assert_eq!(config.quantization, Some(expected));
    }
}

#[test]
fn absurd_or_contradicting_values_are_refused_by_name() {
    let table = [
        ("/model_type", json!("qwen3"), r#"model_type "qwen3" is not supported, only gpt_oss and llama"#),
        (
            "/architectures",
            json!(["GptOssForSequenceClassification"]),
            r#""GptOssForSequenceClassification" is not supported, only GptOssForCausalLM"#,
        ),
        ("/model_type", Value::Null, "model_type is missing"),
        ("/hidden_act", json!("gelu"), r#"hidden_act "gelu" is not supported"#),
        ("/vocab_size", json!(0), "vocab_size is 0, expected 1 to"),
        ("/vocab_size", json!(u64::MAX), "vocab_size is 18446744073709551615, expected 1 to"),
        ("/vocab_size", json!(-3), "malformed"),
        ("/vocab_size", json!(500), "eos_token_id is 500, expected below vocab_size, which is 500"),
        ("/hidden_size", Value::Null, "hidden_size is missing"),
        ("/hidden_size", json!(limits::WIDTH_MAX + 1), "hidden_size is 131073, expected 1 to 131072"),
        ("/intermediate_size", json!(0), "intermediate_size is 0"),
        ("/num_hidden_layers", json!(0), "num_hidden_layers is 0"),
        ("/num_hidden_layers", json!(4), "layer_types is a list of 3 but num_hidden_layers is 4"),
        ("/layer_types", json!(["linear_attention", "a", "b"]), r#"layer_types "linear_attention" is not supported"#),
        ("/num_attention_heads", json!(0), "num_attention_heads is 0"),
        ("/num_key_value_heads", json!(3), "num_key_value_heads is 3, expected a divisor"),
        ("/head_dim", json!(15), "head_dim is 15, expected an even number"),
        ("/head_dim", json!(limits::HEAD_DIM_MAX + 2), "head_dim is 1026"),
        ("/num_local_experts", json!(3), "num_experts_per_tok is 4, expected at most num_local_experts, which is 3"),
        ("/num_local_experts", json!(1u64 << 40), "num_local_experts is 1099511627776"),
        ("/experts_per_token", json!(2), "num_experts_per_tok is 4 but experts_per_token is 2"),
        ("/sliding_window", json!(0), "sliding_window is 0"),
        ("/max_position_embeddings", json!(1 << 21), "max_position_embeddings is 2097152"),
        ("/max_position_embeddings", Value::Null, "max_position_embeddings is missing"),
        ("/rms_norm_eps", json!(-1e-5), "rms_norm_eps is -0.00001, expected a finite number above 0"),
        ("/rms_norm_eps", json!(1e-300), "rms_norm_eps is"),
        ("/swiglu_limit", json!(0.0), "swiglu_limit is 0"),
        ("/swiglu_limit", json!(1e300), "swiglu_limit is 1"),
        ("/rope_theta", json!(1.0), "rope_theta is 1, expected a number above 1"),
        ("/rope_scaling", Value::Null, "rope_scaling is missing"),
        (
            "/rope_scaling/rope_type",
            json!("dynamic"),
            r#"rope_type "dynamic" is not supported, only default, yarn and"#,
        ),
        ("/rope_scaling/rope_type", json!("llama3"), "low_freq_factor is missing"),
        ("/rope_scaling/rope_type", Value::Null, "rope_type is missing"),
        ("/rope_scaling/mscale", json!(1.0), r#"the rope parameter "mscale" is not supported"#),
        ("/rope_scaling/factor", Value::Null, "rope factor is missing"),
        ("/rope_scaling/factor", json!(0.5), "rope factor is 0.5, expected a finite number of at least 1"),
        ("/rope_scaling/beta_slow", json!(64.0), "beta_slow is 64, expected at most beta_fast, which is 32"),
        ("/rope_scaling/rope_theta", json!(1e4), "rope_theta is 150000 but rope_parameters.rope_theta is 10000"),
        (
            "/initial_context_length",
            json!(2048),
            "original_max_position_embeddings is 4096 but initial_context_length is 2048",
        ),
        ("/rope_parameters", json!({"rope_type": "default"}), "rope_parameters is present but rope_scaling is present"),
        ("/eos_token_id", json!(512), "eos_token_id is 512, expected below vocab_size"),
        ("/eos_token_id", json!(vec![1; limits::EOS_TOKENS_MAX + 1]), "eos_token_id is a list of 65"),
        ("/bos_token_id", json!(1u64 << 33), "bos_token_id is 8589934592"),
        ("/quantization_config", json!({}), "quantization_config.quant_method is missing"),
        ("/quantization_config", json!({"quant_method": "awq"}), r#"quant_method "awq" is not supported"#),
        (
            "/quantization_config",
            json!({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "fp4"}),
            r#"bnb_4bit_quant_type "fp4" is not supported, only nf4"#,
        ),
        (
            "/quantization_config",
            json!({"quant_method": "bitsandbytes", "load_in_8bit": true}),
            r#""load_in_8bit" is not supported"#,
        ),
    ];
    for (pointer, value, words) in table {
        let error = parse(&edited(&[(pointer, value.clone())])).expect_err(pointer).to_string();
        assert!(error.starts_with("config.json: ") && error.contains(words), "{pointer} {value}: {error}");
    }
}

#[test]
fn malformed_json_is_refused() {
    for text in ["", "[]", "{", r#"{"vocab_size":1e999}"#, r#"{"model_type":"gpt_oss","model_type":"gpt_oss"}"#] {
        assert!(matches!(Config::parse(text.as_bytes(), "f"), Err(ConfigError::Json { .. })), "{text}");
    }
}

#[test]
fn the_file_is_limited() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let text = published().to_string();
    let check = |length: u64| {
        let padded = format!("{text}{}", " ".repeat(usize::try_from(length).expect("small") - text.len()));
        std::fs::write(folder.path().join(CONFIG_FILE), padded).expect("written");
        Config::read(folder.path())
    };
    assert!(check(CONFIG_BYTES_MAX).is_ok());
    assert!(matches!(check(CONFIG_BYTES_MAX + 1), Err(ConfigError::File(CheckpointError::TooLarge { .. }))));
    std::fs::remove_file(folder.path().join(CONFIG_FILE)).expect("removed");
    assert!(matches!(Config::read(folder.path()), Err(ConfigError::File(CheckpointError::Read { .. }))));
}

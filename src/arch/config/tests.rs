//! What each architecture's configuration means, and one rejection per error.

use serde_json::json;

use super::*;

fn config(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "vocab_size": 10, "rms_norm_eps": 1e-6,
    })
}

fn with(model_type: &str, more: &Value) -> Value {
    let mut config = config(model_type);
    for (key, value) in more.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn without(model_type: &str, key: &str) -> Value {
    let mut config = config(model_type);
    config.as_object_mut().unwrap().remove(key).unwrap();
    config
}

fn parse(config: &Value) -> Result<ModelConfig, ConfigError> {
    ModelConfig::parse(config.to_string().as_bytes(), None)
}

fn scaling(rope: &Value) -> Result<RopeScaling, ConfigError> {
    let parsed = parse(&with("llama", &json!({ "max_position_embeddings": 4096, "rope_scaling": rope })))?;
    Ok(parsed.rope.scaling)
}

#[test]
fn the_fixture_is_read() {
    let folder = "tests/fixtures/tiny-qwen3";
    let read = |name: &str| std::fs::read(format!("{folder}/{name}")).unwrap();
    let parsed = ModelConfig::parse(&read("config.json"), Some(&read("generation_config.json"))).unwrap();
    let expected = ModelConfig {
        model_type: ModelType::Qwen3,
        hidden: 192,
        intermediate: 512,
        layers: 4,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        vocab: 2048,
        rms_norm_eps: 1e-6,
        rope: Rope { theta: 1e6, scaling: RopeScaling::Default },
        tie_word_embeddings: true,
        q_k_norm: true,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        embedding_multiplier: 1.0,
        residual_multiplier: 1.0,
        attention_multiplier: 0.125,
        logits_scaling: 1.0,
        layer_attention: vec![LayerAttention::FULL; 4],
        max_position_embeddings: 1024,
        eos_token_ids: vec![2, 0],
    };
    assert_eq!(parsed, expected);
    assert_eq!((parsed.queries(), parsed.keys()), (256, 128));
}

#[test]
fn defaults_are_those_of_the_class() {
    let of = |model_type| parse(&config(model_type)).unwrap();
    for (model_type, positions) in [("llama", 2048), ("mistral", 131_072), ("qwen2", 32_768), ("qwen3", 32_768)] {
        let parsed = of(model_type);
        assert_eq!(parsed.max_position_embeddings, positions, "{model_type}");
        assert_eq!(parsed.rope, Rope { theta: 10_000.0, scaling: RopeScaling::Default });
        assert!(!parsed.tie_word_embeddings);
    }
    assert_eq!((of("llama").eos_token_ids, of("qwen2").eos_token_ids), (vec![2], vec![]));
    assert_eq!(of("mistral").attention(0).window, Some(4096));
    let llama = parse(&without("llama", "num_key_value_heads")).unwrap();
    assert_eq!((llama.kv_heads, llama.head_dim), (4, 6));
    assert_eq!(parse(&without("llama", "head_dim")).unwrap().head_dim, 2);
}

#[test]
fn biases_and_norms_follow_the_class() {
    let of = |model_type| {
        let parsed = parse(&with(model_type, &json!({ "attention_bias": true, "mlp_bias": true }))).unwrap();
        (parsed.qkv_bias, parsed.o_bias, parsed.mlp_bias, parsed.q_k_norm)
    };
    assert_eq!(of("llama"), (true, true, true, false));
    assert_eq!(of("mistral"), (false, false, false, false));
    assert_eq!(of("qwen2"), (true, false, false, false));
    assert_eq!(of("qwen3"), (true, true, false, true));
    assert!(parse(&config("qwen2")).unwrap().qkv_bias);
    assert!(!parse(&config("llama")).unwrap().qkv_bias);
}

#[test]
fn rope_types_have_all_their_parameters() {
    assert_eq!(scaling(&json!({ "type": "linear", "factor": 2 })).unwrap(), RopeScaling::Linear { factor: 2.0 });
    assert_eq!(
        scaling(&json!({ "rope_type": "dynamic", "factor": 4.0 })).unwrap(),
        RopeScaling::Dynamic { factor: 4.0, max_position_embeddings: 4096.0 }
    );
    let llama3 = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192 });
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192.0,
    };
    assert_eq!(scaling(&llama3).unwrap(), expected);
    let yarn = json!({ "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "beta_fast": 16, "beta_slow": 0,
        "mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 1.25, "truncate": false });
    let expected = RopeScaling::Yarn {
        factor: 4.0,
        original_max_position_embeddings: 1024.0,
        attention_factor: Some(1.25),
        beta_fast: Some(16.0),
        beta_slow: None,
        mscale: Some(1.0),
        mscale_all_dim: Some(0.5),
        truncate: false,
    };
    assert_eq!(scaling(&yarn).unwrap(), expected);
}

#[test]
fn yarn_without_lengths_takes_those_of_the_model() {
    let of = |rope| match scaling(&rope).unwrap() {
        RopeScaling::Yarn { factor, original_max_position_embeddings: original, truncate: true, .. } => (factor, original),
        other => panic!("{other:?}"),
    };
    assert_eq!(of(json!({ "type": "yarn", "factor": 2.0 })), (2.0, 4096.0));
    assert_eq!(of(json!({ "type": "yarn", "factor": null, "original_max_position_embeddings": 1024 })), (4.0, 1024.0));
}

#[test]
fn newer_configurations_keep_everything_in_rope_parameters() {
    let more = json!({ "rope_theta": 1.5, "rope_parameters": { "rope_type": "linear", "factor": 3.0, "rope_theta": 5e5 } });
    let parsed = parse(&with("qwen3", &more)).unwrap();
    assert_eq!(parsed.rope, Rope { theta: 5e5, scaling: RopeScaling::Linear { factor: 3.0 } });
    let parsed = parse(&with("qwen3", &json!({ "rope_parameters": { "rope_theta": 5e5 } }))).unwrap();
    assert_eq!(parsed.rope, Rope { theta: 5e5, scaling: RopeScaling::Default });
}

#[test]
fn sliding_windows_count_where_a_layer_has_one() {
    let windows = |model_type, more: Value| {
        let parsed = parse(&with(model_type, &more)).unwrap();
        [0, 1].map(|layer| parsed.attention(layer).window)
    };
    assert_eq!(windows("mistral", json!({ "sliding_window": 7 })), [Some(7); 2]);
    assert_eq!(windows("mistral", json!({ "sliding_window": null })), [None; 2]);
    assert_eq!(windows("llama", json!({ "sliding_window": 7 })), [None; 2]);
    assert_eq!(windows("qwen2", json!({ "sliding_window": 7, "use_sliding_window": false })), [None; 2]);
    assert_eq!(windows("qwen2", json!({ "sliding_window": 7, "use_sliding_window": true })), [None; 2]);
    let first = json!({ "sliding_window": 7, "use_sliding_window": true, "max_window_layers": 1 });
    assert_eq!(windows("qwen2", first), [None, Some(7)]);
    let types = json!({ "use_sliding_window": true, "layer_types": ["sliding_attention", "full_attention"] });
    assert_eq!(windows("qwen3", types), [Some(4096), None]);
    for types in [json!(["full_attention"]), json!(["full_attention", "chunked_attention"]), json!("full_attention")] {
        let error = parse(&with("qwen3", &json!({ "use_sliding_window": true, "layer_types": types }))).unwrap_err();
        assert!(matches!(&error, ConfigError::BadValue { key, .. } if key == "layer_types"), "{error}");
    }
}

#[test]
fn token_ids_may_be_lists_and_generation_config_wins() {
    let config = with("llama", &json!({ "eos_token_id": [5, 6] })).to_string();
    let ids = |generation| ModelConfig::parse(config.as_bytes(), generation).unwrap().eos_token_ids;
    assert_eq!(ids(None), [5, 6]);
    assert_eq!(ids(Some(br#"{"eos_token_id": 9}"#)), [9]);
    for none in ["{}", r#"{"eos_token_id": null}"#, r#"{"eos_token_id": -1}"#] {
        assert_eq!(ids(Some(none.as_bytes())), [5, 6], "{none}");
    }
}

#[test]
fn keys_that_every_model_needs() {
    for key in ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "rms_norm_eps"]
    {
        let error = parse(&without("llama", key)).unwrap_err();
        assert!(matches!(&error, ConfigError::MissingKey { model_type: "llama", key: found } if found == key), "{error}");
    }
    for model_type in ["mistral", "qwen2", "qwen3"] {
        let error = parse(&without(model_type, "num_key_value_heads")).unwrap_err();
        assert!(matches!(error, ConfigError::MissingKey { .. }), "{error}");
    }
    let error = parse(&without("qwen3", "head_dim")).unwrap_err();
    assert!(matches!(&error, ConfigError::MissingKey { key, .. } if key == "head_dim"), "{error}");
    let error = parse(&without("llama", "model_type")).unwrap_err();
    assert!(matches!(&error, ConfigError::MissingKey { model_type: "all", .. }), "{error}");
}

#[test]
fn values_that_cannot_be_name_their_key() {
    let cases = [
        (json!({ "hidden_size": 0 }), "hidden_size"),
        (json!({ "vocab_size": 1_u64 << 32 }), "vocab_size"),
        (json!({ "rms_norm_eps": -1.0 }), "rms_norm_eps"),
        (json!({ "hidden_act": "gelu" }), "hidden_act"),
        (json!({ "head_dim": 7 }), "head_dim"),
        (json!({ "tie_word_embeddings": 1 }), "tie_word_embeddings"),
        (json!({ "eos_token_id": "x" }), "eos_token_id"),
        (json!({ "rope_theta": 0 }), "rope_theta"),
        (json!({ "rope_scaling": 3 }), "rope_scaling"),
        (json!({ "rope_scaling": { "type": "longrope" } }), "rope_scaling.type"),
        (json!({ "rope_parameters": { "rope_type": "mrope" } }), "rope_parameters.rope_type"),
        (json!({ "rope_scaling": { "type": "linear", "factor": 0.5 } }), "rope_scaling.factor"),
        (json!({ "partial_rotary_factor": 0.5 }), "partial_rotary_factor"),
        (
            json!({ "rope_scaling": { "type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4 } }),
            "rope_scaling.high_freq_factor",
        ),
    ];
    for (more, key) in cases {
        let error = parse(&with("llama", &more)).unwrap_err();
        assert!(matches!(&error, ConfigError::BadValue { key: found, .. } if found == key), "{key}: {error}");
    }
    let error = scaling(&json!({ "type": "linear" })).unwrap_err();
    assert!(matches!(&error, ConfigError::MissingKey { key, .. } if key == "rope_scaling.factor"), "{error}");
}

#[test]
fn models_that_cannot_be() {
    let error = parse(&with("llama", &json!({ "num_key_value_heads": 3 }))).unwrap_err();
    assert!(matches!(error, ConfigError::Indivisible { value: 4, divisor: 3, .. }), "{error}");
    let error = parse(&with("llama", &json!({ "head_dim": 1_u32 << 31 }))).unwrap_err();
    assert!(matches!(error, ConfigError::Overflow { heads: 4, .. }), "{error}");
    let error = parse(&with("llama", &json!({ "num_hidden_layers": 1_u64 << 31 }))).unwrap_err();
    assert!(matches!(error, ConfigError::TooManyLayers { limit: MAX_LAYERS, .. }), "{error}");
    let error = parse(&config("gpt2")).unwrap_err();
    assert!(matches!(&error, ConfigError::ModelType { found } if found == "gpt2"), "{error}");
    let error = ModelConfig::parse(b"[]", None).unwrap_err();
    assert!(matches!(error, ConfigError::Json { file: "config.json", .. }), "{error}");
    let error = ModelConfig::parse(config("llama").to_string().as_bytes(), Some(b"{")).unwrap_err();
    assert!(matches!(error, ConfigError::Json { file: "generation_config.json", .. }), "{error}");
}

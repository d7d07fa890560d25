//! What each architecture's configuration means, and one rejection per error.

use serde_json::json;

use super::*;
use crate::arch::Obstacle;

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
        family: Family::find("qwen3").unwrap(),
        hidden: 192,
        intermediate: 512,
        layers: 4,
        heads: 4,
        kv_heads: 2,
        head_dim: 64,
        vocab: 2048,
        rms_norm_eps: 1e-6,
        rope: Rope { theta: 1e6, dim: 64, scaling: RopeScaling::Default },
        windowed_rope: None,
        tied: true,
        q_k_norm: true,
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
        embedding_multiplier: 1.0,
        residual_multiplier: 1.0,
        attention_multiplier: 0.125,
        logits_scaling: 1.0,
        layer_attention: vec![LayerAttention { window: None, rotary: true }; 4],
        max_position_embeddings: 1024,
        eos_token_ids: vec![2, 0],
        ignored_keys: vec![],
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
        assert_eq!(parsed.rope, Rope { theta: 10_000.0, dim: 6, scaling: RopeScaling::Default });
        assert!(!parsed.tied);
    }
    assert_eq!((of("llama").eos_token_ids, of("qwen2").eos_token_ids), (vec![2], vec![]));
    assert_eq!(of("mistral").attention(0).window, Some(4096));
    let llama = parse(&without("llama", "num_key_value_heads")).unwrap();
    assert_eq!((llama.kv_heads, llama.head_dim), (4, 6));
    assert_eq!(parse(&without("llama", "head_dim")).unwrap().head_dim, 2);
    for model_type in ["granite", "llama", "mistral", "qwen2", "qwen3", "seed_oss", "smollm3"] {
        assert_eq!(parse(&without(model_type, "rms_norm_eps")).unwrap().rms_norm_eps, 1e-6, "{model_type}");
    }
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
    // Inside this object transformers takes any number.
    assert_eq!(of(json!({ "type": "yarn", "factor": 0.5, "original_max_position_embeddings": 64.0 })), (0.5, 64.0));
    let yarn = scaling(&json!({ "type": "yarn", "factor": 2.0, "truncate": null, "attention_factor": 0 })).unwrap();
    assert!(matches!(yarn, RopeScaling::Yarn { truncate: false, attention_factor: Some(0.0), .. }), "{yarn:?}");
    for kind in ["linear", "dynamic"] {
        scaling(&json!({ "type": kind, "factor": 0.5 })).unwrap();
    }
}

#[test]
fn newer_configurations_keep_everything_in_rope_parameters() {
    let more = json!({ "rope_theta": 1.5, "rope_parameters": { "rope_type": "linear", "factor": 3.0, "rope_theta": 5e5 } });
    let parsed = parse(&with("qwen3", &more)).unwrap();
    assert_eq!(parsed.rope, Rope { theta: 5e5, dim: 6, scaling: RopeScaling::Linear { factor: 3.0 } });
    let parsed = parse(&with("qwen3", &json!({ "rope_parameters": { "rope_theta": 5e5 } }))).unwrap();
    assert_eq!(parsed.rope, Rope { theta: 5e5, dim: 6, scaling: RopeScaling::Default });
}

/// As `AutoConfig` and the rotary embedding of transformers 5.24 read the same.
#[test]
fn rope_scaling_wins_over_rope_parameters_unless_it_is_empty() {
    let yarn = json!({ "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16 });
    let saved = json!({ "rope_type": "default", "rope_theta": 1e6 });
    let rope = |more: Value| {
        let parsed = parse(&with("qwen3", &more)).unwrap();
        let yarn = matches!(parsed.rope.scaling, RopeScaling::Yarn { factor: 4.0, .. });
        (parsed.rope.theta, yarn, parsed.ignored_keys)
    };
    let ignored = |keys: &[&str]| keys.iter().map(|&key| key.to_owned()).collect::<Vec<_>>();
    let both = |scaling: &Value, saved: &Value| json!({ "rope_scaling": scaling, "rope_parameters": saved });
    // Its theta is its own, or that of the top level, or the default: not that of the other key.
    assert_eq!(rope(both(&yarn, &saved)), (1e4, true, ignored(&["rope_parameters"])));
    let mut more = both(&yarn, &saved);
    more["rope_theta"] = json!(5e5);
    assert_eq!(rope(more.clone()), (5e5, true, ignored(&["rope_parameters"])));
    more["rope_scaling"]["rope_theta"] = json!(2e5);
    assert_eq!(rope(more), (2e5, true, ignored(&["rope_parameters"])));
    for empty in [json!({}), json!(null), json!(false), json!([]), json!(0), json!("")] {
        assert_eq!(rope(both(&yarn, &empty)), (1e4, true, vec![]));
        assert_eq!(rope(both(&empty, &saved)), (1e6, false, vec![]));
        assert_eq!(rope(both(&empty, &yarn)), (1e4, true, vec![]));
        assert_eq!(rope(both(&empty, &empty)), (1e4, false, vec![]));
    }
    assert_eq!(rope(both(&yarn, &yarn)), (1e4, true, vec![]));
}

#[test]
fn keys_of_the_rotary_embedding_that_have_no_effect_are_listed() {
    let ignored = |more: Value| parse(&with("llama", &more)).unwrap().ignored_keys;
    let yarn = json!({ "type": "yarn", "rope_type": "yarn", "factor": 2.0, "beta_fast": 16, "finetuned": true });
    assert_eq!(ignored(json!({ "rope_scaling": yarn })), ["rope_scaling.finetuned"]);
    let plain = json!({ "rope_type": "default", "factor": 2.0, "mrope_section": [1, 2] });
    assert_eq!(ignored(json!({ "rope_parameters": plain })), ["rope_parameters.factor", "rope_parameters.mrope_section"]);
    assert_eq!(ignored(json!({ "partial_rotary_factor": 0.5 })), ["partial_rotary_factor"]);
    assert_eq!(ignored(json!({ "partial_rotary_factor": 1.0, "rope_scaling": { "rope_type": "default" } })), [""; 0]);
}

#[test]
fn gemma_means_the_approximation_by_tanh_with_gelu() {
    let gemma = |more: Value| parse(&with("gemma", &more));
    let parsed = gemma(json!({ "hidden_act": "gelu", "hidden_activation": null })).unwrap();
    assert_eq!((parsed.embedding_multiplier, parsed.family.norm.weight_offset), (8_f64.sqrt(), 1.0));
    assert_eq!((parsed.tied, parsed.qkv_bias, parsed.eos_token_ids), (true, false, vec![1]));
    gemma(json!({ "hidden_act": "gelu_pytorch_tanh", "use_bidirectional_attention": false })).unwrap();
    for (more, key) in [
        (json!({ "hidden_act": "silu" }), "hidden_act"),
        (json!({ "hidden_act": null }), "hidden_act"),
        (json!({ "head_dim": null }), "head_dim"),
        (json!({ "use_bidirectional_attention": true }), "use_bidirectional_attention"),
    ] {
        let error = gemma(more).unwrap_err();
        assert!(matches!(&error, ConfigError::BadValue { key: found, .. } if found == key), "{key}: {error}");
    }
    // Elsewhere it is the exact function, which no kernel has.
    assert!(parse(&with("gemma3_text", &json!({ "hidden_activation": "gelu" }))).is_err());
}

#[test]
fn gemma3_has_a_rotary_embedding_for_each_kind_of_layer() {
    let gemma3 = |more: Value| parse(&with("gemma3_text", &more));
    let plain = |theta| Rope { theta, dim: 6, scaling: RopeScaling::Default };
    let linear = |theta, factor| Rope { theta, dim: 6, scaling: RopeScaling::Linear { factor } };
    let ropes = |more: Value| {
        let parsed = gemma3(more).unwrap();
        (parsed.rope, parsed.windowed_rope.unwrap(), parsed.ignored_keys)
    };
    let none = Vec::<String>::new();
    assert_eq!(ropes(json!({})), (plain(1e6), plain(1e4), none.clone()));
    let older =
        json!({ "rope_theta": 5e5, "rope_local_base_freq": 300, "rope_scaling": { "rope_type": "linear", "factor": 8 } });
    assert_eq!(ropes(older), (linear(5e5, 8.0), plain(300.0), none.clone()));
    let kinds = json!({ "rope_theta": 5e5, "rope_parameters": {
        "full_attention": { "rope_type": "linear", "factor": 2, "rope_theta": 7e5 },
        "sliding_attention": { "rope_type": "linear", "factor": 3 },
    } });
    assert_eq!(ropes(kinds.clone()), (linear(7e5, 2.0), linear(1e4, 3.0), none.clone()));
    // An older key changes some of the newer ones.
    let mut both = kinds;
    both["rope_scaling"] = json!({ "factor": 4 });
    assert_eq!(ropes(both).0, linear(7e5, 4.0));
    // Without its kind, the type stays.
    let unused = json!({ "rope_scaling": { "type": "linear", "factor": 4 }, "rope_parameters": { "rope_theta": 9e5 } });
    assert_eq!(
        ropes(unused),
        (plain(1e6), plain(1e4), vec!["rope_parameters.rope_theta".into(), "rope_scaling.factor".into()])
    );
    let kind = json!({ "rope_parameters": { "sliding_attention": { "rope_type": "dynamic", "factor": 2 } } });
    let error = gemma3(kind).unwrap_err().to_string();
    assert!(error.contains("rope_parameters.sliding_attention.rope_type"), "{error}");
}

#[test]
fn gemma3_has_windows_by_a_pattern_and_scales_of_its_own() {
    let gemma3 = |more: Value| parse(&with("gemma3_text", &more));
    let windows = |more: Value| {
        let parsed = gemma3(more).unwrap();
        (0..parsed.layers).map(|layer| parsed.attention(layer).window).collect::<Vec<_>>()
    };
    let six = json!({ "num_hidden_layers": 7 });
    let (full, window) = (None, Some(4096));
    assert_eq!(windows(six), [window, window, window, window, window, full, window]);
    assert_eq!(windows(json!({ "sliding_window": 5, "sliding_window_pattern": 2 })), [Some(5), None]);
    let types = json!(["full_attention", "sliding_attention"]);
    assert_eq!(windows(json!({ "sliding_window": 5, "layer_types": types })), [None, Some(5)]);
    assert_eq!(windows(json!({ "sliding_window": null, "layer_types": ["full_attention", "full_attention"] })), [None; 2]);
    let parsed = gemma3(json!({ "query_pre_attn_scalar": 64 })).unwrap();
    assert_eq!((parsed.embedding_multiplier, parsed.attention_multiplier), (8_f64.sqrt(), 0.125));
    assert_eq!(gemma3(json!({})).unwrap().attention_multiplier, 1.0 / 16.0);
    assert_eq!((parsed.tied, parsed.eos_token_ids, parsed.family.norm.weight_offset), (true, vec![1], 1.0));
    let off =
        json!({ "attn_logit_softcapping": null, "final_logit_softcapping": null, "use_bidirectional_attention": false });
    gemma3(off).unwrap();
    for (more, key) in [
        (json!({ "sliding_window": null }), "sliding_window"),
        (json!({ "sliding_window": null, "layer_types": types }), "layer_types"),
        (json!({ "hidden_activation": "gelu" }), "hidden_activation"),
        (json!({ "final_logit_softcapping": 30.0 }), "final_logit_softcapping"),
        (json!({ "attn_logit_softcapping": 50.0 }), "attn_logit_softcapping"),
        (json!({ "use_bidirectional_attention": true }), "use_bidirectional_attention"),
        (json!({ "query_pre_attn_scalar": 0 }), "query_pre_attn_scalar"),
    ] {
        let error = gemma3(more).unwrap_err();
        assert!(matches!(&error, ConfigError::BadValue { key: found, .. } if found == key), "{error}");
    }
}

#[test]
fn phi3_rotates_a_part_of_each_head() {
    let phi3 = |more: Value| parse(&with("phi3", &more));
    let dim = |more: Value| phi3(more).unwrap().rope.dim;
    assert_eq!(dim(json!({})), 6);
    assert_eq!(dim(json!({ "partial_rotary_factor": 0.75 })), 4);
    // The key counts in the parameters, too, and before that of the model.
    let inner = json!({ "rope_type": "default", "partial_rotary_factor": 0.4 });
    assert_eq!(dim(json!({ "partial_rotary_factor": 0.75, "rope_parameters": inner })), 2);
    assert_eq!(dim(json!({ "partial_rotary_factor": 0.75, "rope_scaling": { "type": "default" } })), 4);
    let parsed = phi3(json!({ "rope_theta": 5e5, "sliding_window": 7 })).unwrap();
    assert_eq!((parsed.rope.theta, parsed.attention(1).window), (5e5, Some(7)));
    let parsed = phi3(json!({ "layer_types": ["sliding_attention"] })).unwrap();
    assert_eq!((parsed.attention(0).window, parsed.rms_norm_eps, parsed.ignored_keys), (None, 1e-6, vec![]));
    for (more, key, expected) in [
        (json!({ "partial_rotary_factor": 0.9 }), "partial_rotary_factor", "even number"),
        (json!({ "partial_rotary_factor": 0.1 }), "partial_rotary_factor", "even number"),
        (json!({ "partial_rotary_factor": 1.5 }), "partial_rotary_factor", "at most 1"),
        (json!({ "partial_rotary_factor": null }), "partial_rotary_factor", "at most 1"),
        (json!({ "rope_scaling": { "type": "longrope" } }), "rope_scaling.type", "one of default"),
        (json!({ "rope_scaling": { "rope_type": "linear", "factor": 2 } }), "rope_scaling.rope_type", "one of default"),
    ] {
        let error = phi3(more).unwrap_err();
        assert!(matches!(&error, ConfigError::BadValue { key: found, .. } if found == key), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn phi3_has_the_rows_of_projections_in_fused_tensors() {
    let parsed = parse(&with("phi3", &json!({}))).unwrap();
    let rows = |role| {
        let TensorRows { tensor, inputs, outputs, first, count } = parsed.rows_of(role).unwrap();
        (tensor, inputs, [outputs, first, count])
    };
    assert_eq!(rows(Role::QProj), (Role::QkvProj, 8, [48, 0, 24]));
    assert_eq!(rows(Role::KProj), (Role::QkvProj, 8, [48, 24, 12]));
    assert_eq!(rows(Role::VProj), (Role::QkvProj, 8, [48, 36, 12]));
    assert_eq!(rows(Role::OProj), (Role::OProj, 24, [8, 0, 8]));
    assert_eq!(rows(Role::GateProj), (Role::GateUpProj, 8, [24, 0, 12]));
    assert_eq!(rows(Role::UpProj), (Role::GateUpProj, 8, [24, 12, 12]));
    assert_eq!(parsed.rows_of(Role::QkvProj), None);
    let sizes = |more| parse(&with("phi3", &more)).unwrap().check_runnable();
    let found = sizes(json!({ "head_dim": 16, "intermediate_size": 64 })).unwrap_err();
    assert!(matches!(found, Obstacle::FusedRows { role: Role::KProj, found: 32 }), "{found}");
    sizes(json!({ "head_dim": 32, "intermediate_size": 64 })).unwrap();
}

#[test]
fn granite_has_four_scalars() {
    let scalars = |more: Value| {
        let parsed = parse(&with("granite", &more)).unwrap();
        [parsed.embedding_multiplier, parsed.residual_multiplier, parsed.attention_multiplier, parsed.logits_scaling]
    };
    let all = json!({ "embedding_multiplier": 12, "residual_multiplier": 0.22, "attention_multiplier": 0.015625,
        "logits_scaling": 8.0 });
    assert_eq!(scalars(all), [12.0, 0.22, 0.015625, 8.0]);
    // That of attention, too, is 1 and not that of the size of a head.
    assert_eq!(scalars(json!({})), [1.0; 4]);
    let llama = parse(&with("llama", &json!({ "embedding_multiplier": 12, "logits_scaling": 8.0 }))).unwrap();
    assert_eq!((llama.embedding_multiplier, llama.logits_scaling), (1.0, 1.0));
    for key in ["embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"] {
        for value in [json!(0), json!(null), json!("1")] {
            let error = parse(&with("granite", &json!({ key: value }))).unwrap_err();
            assert!(matches!(&error, ConfigError::BadValue { key: found, .. } if found == key), "{error}");
        }
    }
}

#[test]
fn smollm3_has_layers_without_a_rotary_embedding() {
    let layers = |more: Value| {
        let mut config = with("smollm3", &json!({ "num_hidden_layers": 4 }));
        more.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
        let parsed = parse(&config)?;
        Ok::<_, ConfigError>([0, 1, 2, 3].map(|i| (parsed.attention(i).rotary, parsed.attention(i).window)))
    };
    let of = |rotary: [bool; 4], windows: [Option<u32>; 4]| [0, 1, 2, 3].map(|i| (rotary[i], windows[i]));
    let (fourth, none) = ([true, true, true, false], [None; 4]);
    assert_eq!(layers(json!({})).unwrap(), of(fourth, none));
    assert_eq!(layers(json!({ "no_rope_layer_interval": 2 })).unwrap(), of([true, false, true, false], none));
    let listed = json!({ "no_rope_layers": [0, 1, 1, 0, 1], "no_rope_layer_interval": 2 });
    assert_eq!(layers(listed).unwrap(), of([false, true, true, false], none));
    let slides = json!({ "sliding_window": 7, "use_sliding_window": true });
    assert_eq!(layers(slides).unwrap(), of(fourth, [None, None, None, Some(7)]));
    assert_eq!(layers(json!({ "sliding_window": 7 })).unwrap(), of(fourth, none));
    // The mask follows `layer_types`, with any `use_sliding_window`.
    let types = json!(["sliding_attention", "full_attention", "full_attention", "full_attention"]);
    let listed = json!({ "sliding_window": 7, "layer_types": types });
    assert_eq!(layers(listed).unwrap(), of(fourth, [Some(7), None, None, None]));
    for (more, key) in [
        (json!({ "layer_types": types }), "layer_types"),
        (json!({ "no_rope_layers": [1, 0] }), "no_rope_layers"),
        (json!({ "no_rope_layers": [1, 0, 1, "x"] }), "no_rope_layers"),
        (json!({ "no_rope_layer_interval": 0 }), "no_rope_layer_interval"),
    ] {
        let error = layers(more).unwrap_err();
        assert!(matches!(&error, ConfigError::BadValue { key: found, .. } if found == key), "{error}");
    }
    let parsed = parse(&with("smollm3", &json!({}))).unwrap();
    assert_eq!((parsed.tied, parsed.rope.theta, parsed.eos_token_ids), (true, 2e6, vec![128_001]));
}

#[test]
fn seed_oss_has_biases_unless_it_says_otherwise() {
    let biases = |more: Value| {
        let parsed = parse(&with("seed_oss", &more)).unwrap();
        (parsed.qkv_bias, parsed.o_bias, parsed.mlp_bias)
    };
    assert_eq!(biases(json!({})), (true, false, false));
    assert_eq!(
        biases(json!({ "attention_bias": false, "attention_out_bias": true, "mlp_bias": true })),
        (false, true, true)
    );
    assert_eq!(parse(&with("seed_oss", &json!({ "head_dim": null }))).unwrap().head_dim, 2);
    let error = parse(&without("seed_oss", "head_dim")).unwrap_err();
    assert!(matches!(&error, ConfigError::MissingKey { key, .. } if key == "head_dim"), "{error}");
}

#[test]
fn the_configuration_of_a_model_of_text_and_images_is_nested() {
    let mut nested = json!({ "model_type": "mistral3", "tie_word_embeddings": true, "eos_token_id": 7 });
    nested["text_config"] = config("qwen3");
    nested["text_config"]["rope_parameters"] = json!({ "rope_type": "linear", "factor": 2.0, "rope_theta": 5e5 });
    let parsed = parse(&nested).unwrap();
    assert_eq!((parsed.family.model_type, parsed.tied, parsed.eos_token_ids), ("qwen3", true, vec![7]));
    assert_eq!(parsed.rope, Rope { theta: 5e5, dim: 6, scaling: RopeScaling::Linear { factor: 2.0 } });
    nested["text_config"]["hidden_size"] = json!(0);
    let error = parse(&nested).unwrap_err();
    assert!(matches!(&error, ConfigError::BadValue { key, .. } if key == "text_config.hidden_size"), "{error}");
}

#[test]
fn what_the_kernels_cannot_run_is_known_beforehand() {
    let of = |head_dim: u32| parse(&with("llama", &json!({ "head_dim": head_dim }))).unwrap().check_runnable();
    assert!(matches!(of(10), Err(Obstacle::HeadDim { found: 10 })));
    assert!(matches!(of(260), Err(Obstacle::HeadDim { found: 260 })));
    assert!(of(256).is_ok());
    let text = of(10).unwrap_err().to_string();
    assert_eq!(text, "a head has 10 features: the kernels need a multiple of 4, and at most 256");
}

#[test]
fn the_parts_of_a_model_have_its_shapes() {
    let parsed = parse(&with("seed_oss", &json!({ "num_hidden_layers": 1 }))).unwrap();
    let name = |(part, layer): (&Part, Option<u32>)| (part.name, layer, parsed.shape(part));
    let parts: Vec<_> = parsed.parts().map(name).collect();
    let layer = |name, shape: &[u64]| (name, Some(0), shape.to_vec());
    let expected = [
        ("embed_tokens.weight", None, vec![10, 8]),
        layer("input_layernorm.weight", &[8]),
        layer("self_attn.q_proj.weight", &[24, 8]),
        layer("self_attn.k_proj.weight", &[12, 8]),
        layer("self_attn.v_proj.weight", &[12, 8]),
        layer("self_attn.o_proj.weight", &[8, 24]),
        layer("self_attn.q_proj.bias", &[24]),
        layer("self_attn.k_proj.bias", &[12]),
        layer("self_attn.v_proj.bias", &[12]),
        layer("post_attention_layernorm.weight", &[8]),
        layer("mlp.gate_proj.weight", &[12, 8]),
        layer("mlp.up_proj.weight", &[12, 8]),
        layer("mlp.down_proj.weight", &[8, 12]),
        ("norm.weight", None, vec![8]),
        ("lm_head.weight", None, vec![10, 8]),
    ];
    assert_eq!(parts, expected);
    assert_eq!(parsed.projection(Role::KProj), Some((8, 12)));
    assert_eq!(parsed.projection(Role::OBias), None);
}

#[test]
fn sliding_windows_count_where_a_layer_has_one() {
    assert_eq!(parse(&with("qwen3", &json!({ "hidden_act": "swish" }))).unwrap(), parse(&config("qwen3")).unwrap());
    let windows = |model_type, more: Value| {
        let parsed = parse(&with(model_type, &more)).unwrap();
        [0, 1].map(|layer| parsed.attention(layer).window)
    };
    assert_eq!(windows("mistral", json!({ "sliding_window": 7 })), [Some(7); 2]);
    assert_eq!(windows("mistral", json!({ "sliding_window": null })), [None; 2]);
    assert_eq!(windows("llama", json!({ "sliding_window": 7 })), [None; 2]);
    // With a list, transformers' AutoConfig takes a mistral for a ministral.
    let listed = |more: [&str; 2]| windows("mistral", json!({ "sliding_window": 7, "layer_types": more }));
    assert_eq!(listed(["full_attention", "sliding_attention"]), [None, Some(7)]);
    assert_eq!(listed(["full_attention"; 2]), [None; 2]);
    assert_eq!(windows("mistral", json!({ "sliding_window": 7, "layer_types": null })), [Some(7); 2]);
    let mut nested = json!({ "model_type": "mistral3", "text_config": config("mistral") });
    nested["text_config"]["layer_types"] = json!(["full_attention", "full_attention"]);
    assert_eq!(parse(&nested).unwrap().attention(0).window, Some(4096));
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

    let sliding = json!({ "layer_types": ["sliding_attention", "full_attention"] });
    let error = parse(&with("qwen2", &sliding)).unwrap_err();
    assert!(matches!(&error, ConfigError::BadValue { key, .. } if key == "layer_types"), "{error}");
    let older = json!({ "layer_types": ["attention", "attention"] });
    assert_eq!(windows("qwen2", older), [None; 2]);
}

#[test]
fn token_ids_may_be_lists_and_generation_config_wins() {
    let config = with("llama", &json!({ "eos_token_id": [5, 6] })).to_string();
    let ids = |generation| ModelConfig::parse(config.as_bytes(), generation).unwrap().eos_token_ids;
    assert_eq!(ids(None), [5, 6]);
    assert_eq!(ids(Some(br#"{"eos_token_id": 9}"#)), [9]);
    assert_eq!(ids(Some(br#"{"temperature": NaN, "eos_token_id": 9}"#)), [9]);
    // transformers ignores a file that is not JSON.
    for none in ["{}", r#"{"eos_token_id": null}"#, r#"{"eos_token_id": -1}"#, "<html>", "{"] {
        assert_eq!(ids(Some(none.as_bytes())), [5, 6], "{none}");
    }
}

#[test]
fn keys_that_every_model_needs() {
    for key in ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"] {
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
        (json!({ "rms_norm_eps": null }), "rms_norm_eps"),
        (json!({ "hidden_act": "gelu" }), "hidden_act"),
        (json!({ "hidden_act": "swiglu" }), "hidden_act"),
        (json!({ "hidden_act": null }), "hidden_act"),
        (json!({ "head_dim": 7 }), "head_dim"),
        (json!({ "tie_word_embeddings": 1 }), "tie_word_embeddings"),
        (json!({ "eos_token_id": "x" }), "eos_token_id"),
        (json!({ "rope_theta": 0 }), "rope_theta"),
        (json!({ "rope_scaling": 3 }), "rope_scaling"),
        (json!({ "rope_scaling": { "type": "longrope" } }), "rope_scaling.type"),
        (json!({ "rope_parameters": { "rope_type": "mrope" } }), "rope_parameters.rope_type"),
        (json!({ "rope_scaling": { "type": "linear", "factor": 0 } }), "rope_scaling.factor"),
        (json!({ "rope_scaling": { "type": "yarn", "factor": -2 } }), "rope_scaling.factor"),
        (
            json!({ "partial_rotary_factor": 0.5, "rope_scaling": { "type": "linear", "factor": 2 } }),
            "partial_rotary_factor",
        ),
        (json!({ "rope_parameters": { "rope_theta": null } }), "rope_parameters.rope_theta"),
        (json!({ "rope_theta": null }), "rope_theta"),
        (json!({ "rope_parameters": { "full_attention": { "rope_theta": 1e6 } } }), "rope_parameters.full_attention"),
        (json!({ "per_layer_config": { "1": { "intermediate_size": 4 } } }), "per_layer_config"),
        (json!({ "text_config": 3 }), "text_config"),
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
    let error = ModelConfig::parse(config("llama").to_string().as_bytes(), Some(b"[]")).unwrap_err();
    assert!(matches!(error, ConfigError::Json { file: "generation_config.json", .. }), "{error}");
}

/// The rotary embedding turns pairs of features: a head of odd size is refused, at convert too.
#[test]
fn heads_of_odd_size_are_refused() {
    let of = |head_dim: u32| parse(&with("llama", &json!({ "head_dim": head_dim })));
    assert_eq!(of(8).unwrap().head_dim, 8);
    for odd in [1, 7, 255] {
        let error = of(odd).unwrap_err();
        let ConfigError::BadValue { key, found, .. } = &error else { panic!("{error}") };
        assert_eq!((key.as_str(), found), ("head_dim", &json!(odd)));
    }
}

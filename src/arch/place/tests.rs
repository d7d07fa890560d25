//! One rejection per error variant, and what each architecture accepts.

use serde_json::json;

use super::*;
use crate::arch::config::MAX_LAYERS;

/// Hidden 8, 2 layers, 4 heads of 4 elements (q is 16 wide), 2 kv heads, feed-forward 12,
/// vocabulary 10.
fn config(model_type: &str) -> Map<String, Value> {
    let Value::Object(config) = json!({
        "model_type": model_type, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 10, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": true,
    }) else {
        unreachable!()
    };
    config
}

fn with(model_type: &str, key: &str, value: Value) -> Map<String, Value> {
    let mut config = config(model_type);
    config.insert(key.to_owned(), value);
    config
}

fn without(model_type: &str, key: &str) -> Map<String, Value> {
    let mut config = config(model_type);
    config.remove(key).unwrap();
    config
}

/// A tensor of a checkpoint.
#[derive(Debug, Clone)]
struct Tensor {
    name: String,
    shape: Vec<u64>,
}

fn tensor(name: &str, shape: &[u64]) -> Tensor {
    Tensor { name: name.to_owned(), shape: shape.to_vec() }
}

fn place(config: &Map<String, Value>, tensors: &[Tensor]) -> Result<Model, ArchError> {
    let shapes: Vec<_> = tensors.iter().map(|t| TensorShape { name: &t.name, shape: &t.shape }).collect();
    super::place(config, &shapes)
}

/// Parts of a layer that every architecture here has.
const COMMON: [(&str, &[u64]); 9] = [
    ("input_layernorm.weight", &[8]),
    ("mlp.down_proj.weight", &[8, 12]),
    ("mlp.gate_proj.weight", &[12, 8]),
    ("mlp.up_proj.weight", &[12, 8]),
    ("post_attention_layernorm.weight", &[8]),
    ("self_attn.k_proj.weight", &[8, 8]),
    ("self_attn.o_proj.weight", &[8, 16]),
    ("self_attn.q_proj.weight", &[16, 8]),
    ("self_attn.v_proj.weight", &[8, 8]),
];
const QK_NORM: [(&str, &[u64]); 2] = [("self_attn.q_norm.weight", &[4]), ("self_attn.k_norm.weight", &[4])];
const QKV_BIAS: [(&str, &[u64]); 3] =
    [("self_attn.q_proj.bias", &[16]), ("self_attn.k_proj.bias", &[8]), ("self_attn.v_proj.bias", &[8])];
const O_BIAS: [(&str, &[u64]); 1] = [("self_attn.o_proj.bias", &[8])];
const MLP_BIAS: [(&str, &[u64]); 3] =
    [("mlp.gate_proj.bias", &[12]), ("mlp.up_proj.bias", &[12]), ("mlp.down_proj.bias", &[8])];

/// A tied model with these parts in each of its layers, and the common ones.
fn tensors(extra: &[&[(&str, &[u64])]]) -> Vec<Tensor> {
    let mut all = vec![tensor("model.embed_tokens.weight", &[10, 8])];
    for layer in 0..2 {
        for (part, shape) in COMMON.iter().chain(extra.iter().copied().flatten()) {
            all.push(tensor(&format!("model.layers.{layer}.{part}"), shape));
        }
    }
    all.push(tensor("model.norm.weight", &[8]));
    all
}

fn qwen3() -> Vec<Tensor> {
    tensors(&[&QK_NORM])
}

#[test]
fn every_tensor_of_a_model_is_placed() {
    let tensors = qwen3();
    let model = place(&config("qwen3"), &tensors).unwrap();
    assert_eq!((model.config.layers, model.config.tied, model.tensors.len()), (2, true, tensors.len()));
    assert_eq!((model.prefix, model.strays.len()), (Prefix::PLAIN, 0));
    assert!(model.tensors.iter().enumerate().all(|(i, placed)| placed.tensor == i && placed.expert.is_none()));
    assert_eq!(model.tensors.iter().filter(|placed| placed.quantise).count(), 14);
    let at = |name: &str| *model.tensors.iter().find(|placed| tensors[placed.tensor].name == name).unwrap();
    let (q, norm) = (at("model.layers.1.self_attn.q_proj.weight"), at("model.norm.weight"));
    assert_eq!((q.role, q.layer, q.quantise), (Role::QProj, Some(1), true));
    assert_eq!((norm.role, norm.layer, norm.quantise), (Role::FinalNorm, None, false));
    assert_eq!((norm.tensor, q.expert), (tensors.len() - 1, None));
}

#[test]
fn each_architecture_has_its_own_biases() {
    let accepts = |config: &Map<String, Value>, parts: &[&[(&str, &[u64])]]| place(config, &tensors(parts)).map(|_| ());
    accepts(&config("llama"), &[]).unwrap();
    accepts(&config("mistral"), &[]).unwrap();
    accepts(&config("qwen2"), &[&QKV_BIAS]).unwrap();
    accepts(&with("llama", "attention_bias", json!(true)), &[&QKV_BIAS, &O_BIAS]).unwrap();
    accepts(&with("llama", "mlp_bias", json!(true)), &[&MLP_BIAS]).unwrap();
    accepts(&with("qwen3", "attention_bias", json!(true)), &[&QK_NORM, &QKV_BIAS, &O_BIAS]).unwrap();
    // Mistral's classes in transformers know no such key.
    accepts(&with("mistral", "attention_bias", json!(true)), &[]).unwrap();
    for (config, parts) in [
        (config("qwen2"), &[][..]),
        (config("qwen3"), &[]),
        (with("llama", "attention_bias", json!(true)), &[&QKV_BIAS[..]]),
        (with("llama", "mlp_bias", json!(true)), &[]),
    ] {
        assert!(matches!(accepts(&config, parts), Err(ArchError::MissingTensor { .. })));
    }
    for (config, parts, strays) in [
        (config("llama"), &[&QK_NORM[..]][..], 4),
        (config("llama"), &[&MLP_BIAS], 6),
        (config("qwen2"), &[&QKV_BIAS, &O_BIAS], 2),
        (config("qwen3"), &[&QK_NORM, &O_BIAS], 2),
    ] {
        let model = place(&config, &tensors(parts)).unwrap();
        let not_here = model.strays.iter().filter(|stray| stray.why == StrayKind::NotInThisModel).count();
        assert_eq!((not_here, model.strays.len()), (strays, strays));
    }
}

#[test]
fn unknown_model_types_are_refused_with_the_known_ones() {
    let error = place(&config("gpt2"), &[]).unwrap_err();
    let known: Vec<&str> = ModelConfig::model_types().collect();
    assert!(known.is_sorted() && known.contains(&"llama"), "{known:?}");
    let expected = format!("model_type \"gpt2\" is not supported; supported are {}", known.join(", "));
    assert_eq!(error.to_string(), expected);
    let nested = with("mistral3", "text_config", json!({"model_type": "gemma2"}));
    let error = place(&nested, &[]).unwrap_err();
    assert!(matches!(&error, ArchError::Config(ConfigError::ModelType { found }) if found == "gemma2"), "{error}");
}

#[test]
fn missing_keys_are_refused_by_name() {
    let required =
        ["model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"];
    for key in required {
        for model_type in ModelConfig::model_types() {
            let result = place(&without(model_type, key), &[]);
            let missing = |e| matches!(e, ArchError::Config(ConfigError::MissingKey { key: found, .. }) if found == key);
            assert!(result.is_err_and(missing), "{model_type} {key}");
        }
    }
    for (model_type, key) in [
        ("mistral", "num_key_value_heads"),
        ("qwen2", "num_key_value_heads"),
        ("qwen3", "num_key_value_heads"),
        ("qwen3", "head_dim"),
    ] {
        let result = place(&without(model_type, key), &[]);
        let missing = |e| matches!(e, ArchError::Config(ConfigError::MissingKey { key: found, .. }) if found == key);
        assert!(result.is_err_and(missing), "{model_type} {key}");
    }
}

#[test]
fn values_that_cannot_be_are_refused() {
    for (key, value) in [
        ("model_type", json!(3)),
        ("hidden_size", json!(0)),
        ("hidden_size", json!(-8)),
        ("vocab_size", json!(10.0)),
        ("intermediate_size", json!("12")),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(0)),
        ("num_hidden_layers", json!(null)),
        ("head_dim", json!(null)),
        ("tie_word_embeddings", json!("yes")),
        ("attention_bias", json!(1)),
        ("rms_norm_eps", json!(-1.0)),
        ("rms_norm_eps", json!("1e-6")),
    ] {
        let result = place(&with("qwen3", key, value.clone()), &qwen3());
        let bad =
            |e| matches!(e, ArchError::Config(ConfigError::BadValue { key: k, found, .. }) if k == key && found == value);
        assert!(result.is_err_and(bad), "{key}");
    }
}

#[test]
fn hostile_sizes_do_not_overflow() {
    let most = with("qwen3", "num_hidden_layers", json!(MAX_LAYERS));
    assert!(matches!(place(&most, &qwen3()), Err(ArchError::MissingTensor { .. })));
    let too_many = place(&with("qwen3", "num_hidden_layers", json!(u32::MAX)), &qwen3()).unwrap_err();
    let expected = |e: &ConfigError| matches!(e, ConfigError::TooManyLayers { limit: MAX_LAYERS, found: u32::MAX });
    assert!(matches!(&too_many, ArchError::Config(e) if expected(e)), "{too_many}");
    let result = place(&with("qwen3", "head_dim", json!(u32::MAX - 1)), &qwen3());
    assert!(matches!(result, Err(ArchError::Config(ConfigError::Overflow { heads: 4, .. }))));
    for key in ["num_hidden_layers", "head_dim", "hidden_size"] {
        let result = place(&with("qwen3", key, json!(u64::MAX)), &qwen3());
        assert!(matches!(result, Err(ArchError::Config(ConfigError::BadValue { key: found, .. })) if found == key));
    }
    let result = place(&with("qwen3", "hidden_size", json!(u32::MAX)), &qwen3());
    assert!(matches!(result, Err(ArchError::Shape { .. })));
}

#[test]
fn heads_that_do_not_divide_are_refused() {
    let indivisible = |result: Result<Model, ArchError>| match result {
        Err(ArchError::Config(ConfigError::Indivisible { value, divisor, .. })) => (value, divisor),
        other => panic!("{other:?}"),
    };
    assert_eq!(indivisible(place(&with("qwen3", "num_key_value_heads", json!(3)), &qwen3())), (4, 3));
    let mut config = with("llama", "hidden_size", json!(10));
    config.remove("head_dim");
    assert_eq!(indivisible(place(&config, &[])), (10, 4));
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    for i in 0..qwen3().len() {
        let mut tensors = qwen3();
        let removed = tensors.remove(i).name;
        let error = place(&config("qwen3"), &tensors).unwrap_err();
        assert!(matches!(&error, ArchError::MissingTensor { tensor, .. } if *tensor == removed), "{error}");
        let mut tensors = qwen3();
        tensors[i].shape.push(1);
        let (name, wrong) = (tensors[i].name.clone(), tensors[i].shape.clone());
        let error = place(&config("qwen3"), &tensors).unwrap_err();
        let ArchError::Shape { tensor, expected, found } = error else { panic!("{error}") };
        assert_eq!((tensor, expected.as_slice(), &found), (name, &wrong[..wrong.len() - 1], &wrong));
    }
}

#[test]
fn what_is_no_part_of_the_model_is_listed_with_the_reason() {
    let cases = [
        ("model.layers.2.input_layernorm.weight", StrayKind::BeyondLayers, None),
        ("model.layers.99999999999999999999999.x", StrayKind::BeyondLayers, None),
        ("model.layers.1.mlp.up_proj.bias", StrayKind::NotInThisModel, Some(1)),
        ("model.layers.0.mlp.extra_proj.weight", StrayKind::Unknown, Some(0)),
        ("q_proj.weight", StrayKind::Unknown, None),
        ("model.layers.00.mlp.up_proj.weight", StrayKind::Unknown, None),
        ("model.layers.1.self_attn.rotary_emb.inv_freq", StrayKind::Unknown, Some(1)),
        ("model.layers.+1.x", StrayKind::Unknown, None),
        ("mtp.layers.0.self_attn.q_proj.weight", StrayKind::Unknown, None),
        ("score.weight", StrayKind::Unknown, None),
    ];
    let mut tensors = qwen3();
    let first = tensors.len();
    tensors.extend(cases.map(|(name, ..)| tensor(name, &[8])));
    let mut model = place(&config("qwen3"), &tensors).unwrap();
    let expected: Vec<_> = (first..).zip(cases).map(|(tensor, (_, why, layer))| Stray { tensor, layer, why }).collect();
    assert_eq!((&model.strays, model.tensors.len()), (&expected, first));

    tensors.swap(0, first);
    model = place(&config("qwen3"), &tensors).unwrap();
    assert_eq!(model.strays[0], Stray { tensor: 0, layer: None, why: StrayKind::BeyondLayers });
    let strays = std::mem::take(&mut model.strays);
    model.keep(strays);
    assert!(model.tensors.iter().enumerate().all(|(i, placed)| placed.tensor == i));
    assert_eq!((model.tensors[0].role, model.tensors[0].quantise), (Role::Other, false));
}

#[test]
fn models_of_text_and_images_have_longer_names_and_a_nested_configuration() {
    let mut outer = Map::new();
    outer.insert("model_type".to_owned(), json!("llava"));
    outer.insert("text_config".to_owned(), Value::Object(config("llama")));
    for prefix in Prefix::ALL {
        let renamed = |name: &str| match name.strip_prefix("model.") {
            Some(rest) => format!("{}{rest}", prefix.decoder),
            None => format!("{}{name}", prefix.head),
        };
        let mut tensors = tensors(&[]);
        tensors.push(tensor("lm_head.weight", &[10, 8]));
        tensors.iter_mut().for_each(|tensor| tensor.name = renamed(&tensor.name));
        tensors.push(tensor("vision_tower.layers.0.self_attn.q_proj.weight", &[4, 4]));
        let model = place(&outer, &tensors).unwrap();
        assert_eq!((model.prefix, model.config.family.model_type), (prefix, "llama"));
        assert_eq!((model.tensors.len(), model.strays.len()), (tensors.len() - 1, 1));
        assert_eq!(model.tensors.last().unwrap().role, Role::LmHead);
    }
}

#[test]
fn an_untied_model_needs_an_output_projection() {
    let result = place(&with("qwen3", "tie_word_embeddings", json!(false)), &qwen3());
    assert!(matches!(result, Err(ArchError::MissingTensor { tensor, .. }) if tensor == "lm_head.weight"));
}

/// transformers ties the one that is missing to the one that is there.
#[test]
fn the_only_matrix_of_a_tied_vocabulary_is_the_embedding_whatever_its_name() {
    let mut tensors = tensors(&[&QK_NORM]);
    tensors.iter_mut().filter(|t| t.name.contains("embed_tokens")).for_each(|t| t.name = "lm_head.weight".to_owned());
    let model = place(&config("qwen3"), &tensors).unwrap();
    let of =
        |role| model.tensors.iter().filter(|placed| placed.role == role).map(|placed| placed.tensor).collect::<Vec<_>>();
    let at = tensors.iter().position(|t| t.name == "lm_head.weight").unwrap();
    assert_eq!((of(Role::Embedding), of(Role::LmHead)), (vec![at], vec![]));
    let untied = place(&with("qwen3", "tie_word_embeddings", json!(false)), &tensors);
    assert!(matches!(untied, Err(ArchError::MissingTensor { tensor, .. }) if tensor == "model.embed_tokens.weight"));
}

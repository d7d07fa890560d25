//! One rejection per error variant, and what each architecture accepts.

use std::fs;

use serde_json::json;

use super::*;
use crate::convert::source::CONFIG;
use crate::format::FloatType;

/// Hidden 8, 2 layers, 4 heads of 4 elements (q is 16 wide), 2 kv heads, feed-forward 12, vocabulary 10.
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

fn tensor(name: &str, shape: &[u64]) -> TensorInfo {
    let length = 2 * shape.iter().product::<u64>();
    TensorInfo { name: name.to_owned(), float_type: FloatType::Bf16, shape: shape.to_vec(), file: 0, offset: 0, length }
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

/// A tied model with these parts in each of its layers beside the common ones.
fn tensors(extra: &[&[(&str, &[u64])]]) -> Vec<TensorInfo> {
    let mut all = vec![tensor(EMBEDDING, &[10, 8])];
    for layer in 0..2 {
        for (part, shape) in COMMON.iter().chain(extra.iter().copied().flatten()) {
            all.push(tensor(&format!("model.layers.{layer}.{part}"), shape));
        }
    }
    all.push(tensor("model.norm.weight", &[8]));
    all
}

fn qwen3() -> Vec<TensorInfo> {
    tensors(&[&QK_NORM])
}

#[test]
fn every_tensor_of_a_model_is_placed() {
    let tensors = qwen3();
    let model = place(&config("qwen3"), &tensors).unwrap();
    assert_eq!((model.layers, model.tied, model.tensors.len()), (2, true, tensors.len()));
    assert!(model.tensors.iter().enumerate().all(|(i, placed)| placed.tensor == i && placed.expert.is_none()));
    assert_eq!(model.tensors.iter().filter(|placed| placed.quantise).count(), 14);
    let at = |name: &str| *model.tensors.iter().find(|placed| tensors[placed.tensor].name == name).unwrap();
    let (q, norm) = (at("model.layers.1.self_attn.q_proj.weight"), at("model.norm.weight"));
    assert_eq!((q.role, q.layer, q.quantise), (Role::QProj, Some(1), true));
    assert_eq!((norm.role, norm.layer, norm.quantise), (Role::FinalNorm, None, false));
    assert!(model.tensors.iter().all(|placed| placed.role != Role::Other));
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
    for (config, parts) in [
        (config("llama"), &[&QK_NORM[..]][..]),
        (config("llama"), &[&MLP_BIAS]),
        (config("qwen2"), &[&QKV_BIAS, &O_BIAS]),
        (config("qwen3"), &[&QK_NORM, &O_BIAS]),
    ] {
        assert!(matches!(accepts(&config, parts), Err(ArchError::UnexpectedTensor { .. })));
    }
}

#[test]
fn unknown_model_types_are_refused_with_the_known_ones() {
    let error = place(&config("gpt2"), &[]).unwrap_err();
    assert_eq!(error.to_string(), "model_type \"gpt2\" is not supported; supported are llama, mistral, qwen2, qwen3");
    let multimodal = with("gemma3", "text_config", json!({"model_type": "llama"}));
    assert!(matches!(place(&multimodal, &[]), Err(ArchError::UnknownModelType { found, .. }) if found == "gemma3"));
}

#[test]
fn missing_keys_are_refused_by_name() {
    let required =
        ["model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"];
    for key in required.into_iter().chain(["rms_norm_eps"]) {
        for model_type in model_types() {
            let result = place(&without(model_type, key), &[]);
            assert!(matches!(result, Err(ArchError::MissingKey { key: found, .. }) if found == key), "{model_type} {key}");
        }
    }
    for (model_type, key) in [
        ("mistral", "num_key_value_heads"),
        ("qwen2", "num_key_value_heads"),
        ("qwen3", "num_key_value_heads"),
        ("qwen3", "head_dim"),
    ] {
        let result = place(&without(model_type, key), &[]);
        assert!(matches!(result, Err(ArchError::MissingKey { key: found, .. }) if found == key), "{model_type} {key}");
    }
}

#[test]
fn defaults_are_those_of_transformers_for_the_same_model_type() {
    // As many kv heads as heads, and heads of hidden_size / heads = 2 elements.
    let mut config = without("llama", "num_key_value_heads");
    config.remove("head_dim");
    config.remove("tie_word_embeddings");
    let sizes = Sizes::read(&config).unwrap();
    assert_eq!((sizes.head_dim, sizes.queries, sizes.keys, sizes.tied), (2, 8, 8, false));
    let sizes = Sizes::read(&with("qwen3", "num_key_value_heads", Value::Null)).unwrap();
    assert_eq!(sizes.keys, 16);
    assert_eq!(Sizes::read(&with("mistral", "head_dim", Value::Null)).unwrap().head_dim, 2);
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
        assert!(matches!(result, Err(ArchError::BadValue { key: k, found, .. }) if k == key && found == value), "{key}");
    }
}

#[test]
fn hostile_sizes_do_not_overflow() {
    let most = with("qwen3", "num_hidden_layers", json!(MAX_LAYERS));
    assert!(matches!(place(&most, &qwen3()), Err(ArchError::MissingTensor { .. })));
    let result = place(&with("qwen3", "num_hidden_layers", json!(u64::MAX)), &qwen3());
    assert_eq!(result, Err(ArchError::TooManyLayers { limit: MAX_LAYERS, found: u64::MAX }));
    let result = place(&with("qwen3", "head_dim", json!(u64::MAX)), &qwen3());
    assert_eq!(result, Err(ArchError::Overflow { heads: 4, head_dim: u64::MAX }));
    let result = place(&with("qwen3", "hidden_size", json!(u64::MAX)), &qwen3());
    assert!(matches!(result, Err(ArchError::Shape { .. })));
}

#[test]
fn heads_that_do_not_divide_are_refused() {
    let result = place(&with("qwen3", "num_key_value_heads", json!(3)), &qwen3());
    assert!(matches!(result, Err(ArchError::Indivisible { value: 4, divisor: 3, .. })));
    let mut config = with("llama", "hidden_size", json!(10));
    config.remove("head_dim");
    assert!(matches!(place(&config, &[]), Err(ArchError::Indivisible { value: 10, divisor: 4, .. })));
}

#[test]
fn missing_misshapen_and_extra_tensors_are_named() {
    for i in 0..qwen3().len() {
        let mut tensors = qwen3();
        let removed = tensors.remove(i).name;
        assert_eq!(place(&config("qwen3"), &tensors), Err(ArchError::MissingTensor { tensor: removed }));
        let mut tensors = qwen3();
        tensors[i].shape.push(1);
        let (tensor, found) = (tensors[i].name.clone(), tensors[i].shape.clone());
        let expected = found[..found.len() - 1].to_vec();
        assert_eq!(place(&config("qwen3"), &tensors), Err(ArchError::Shape { tensor, expected, found }));
    }
    for name in ["model.layers.2.input_layernorm.weight", "model.layers.99999999999999999999999.x"] {
        let mut tensors = qwen3();
        tensors.push(tensor(name, &[8]));
        assert_eq!(place(&config("qwen3"), &tensors), Err(ArchError::ExtraLayer { tensor: name.to_owned(), layers: 2 }));
    }
    for name in ["model.layers.0.mlp.extra_proj.weight", "q_proj.weight", "model.layers.00.mlp.up_proj.weight"] {
        let mut tensors = qwen3();
        tensors.push(tensor(name, &[8]));
        let unexpected = ArchError::UnexpectedTensor { tensor: name.to_owned(), model_type: "qwen3" };
        assert_eq!(place(&config("qwen3"), &tensors), Err(unexpected));
    }
}

#[test]
fn unknown_tensors_are_kept_as_others() {
    let mut tensors = qwen3();
    tensors.push(tensor("model.layers.1.self_attn.rotary_emb.inv_freq", &[2]));
    tensors.push(tensor("model.layers.+1.x", &[2]));
    tensors.push(tensor("score.weight", &[2, 8]));
    let model = place(&config("qwen3"), &tensors).unwrap();
    let others: Vec<_> = model.tensors.iter().filter(|p| p.role == Role::Other).map(|p| (p.layer, p.quantise)).collect();
    assert_eq!(others, [(Some(1), false), (None, false), (None, false)]);
}

/// A checkpoint of a tied qwen3 model with an output projection; the embedding is all zeros.
fn with_head(head: u8, tied: bool) -> (Model, Checkpoint, tempfile::TempDir) {
    let mut tensors = qwen3();
    tensors.push(tensor(LM_HEAD, &[10, 8]));
    let (mut header, mut end) = (Map::new(), 0);
    for TensorInfo { name, shape, length, .. } in &tensors {
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [end, end + length]}));
        end += length;
    }
    let json = serde_json::to_vec(&header).unwrap();
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json);
    bytes.resize(bytes.len() + end as usize, 0);
    *bytes.last_mut().unwrap() = head;
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    let config = Value::Object(with("qwen3", "tie_word_embeddings", json!(tied)));
    fs::write(dir.path().join(CONFIG), config.to_string()).unwrap();
    let checkpoint = Checkpoint::open(dir.path(), None).unwrap();
    (place(&checkpoint.config, &checkpoint.tensors).unwrap(), checkpoint, dir)
}

#[test]
fn a_tied_head_is_dropped_only_where_it_repeats_the_embedding() {
    let heads = |model: &Model| model.tensors.iter().filter(|placed| placed.role == Role::LmHead).count();
    let (mut model, checkpoint, _dir) = with_head(0, true);
    assert_eq!(heads(&model), 1);
    assert_eq!(resolve_tied(&mut model, &checkpoint).unwrap(), Some(Notice::TiedHeadDropped));
    assert_eq!((heads(&model), model.tensors.len()), (0, checkpoint.tensors.len() - 1));
    let (mut model, checkpoint, _dir) = with_head(1, true);
    assert_eq!(resolve_tied(&mut model, &checkpoint).unwrap(), Some(Notice::TiedHeadDiffers));
    assert_eq!(heads(&model), 1);
    let (mut model, checkpoint, _dir) = with_head(0, false);
    assert_eq!(resolve_tied(&mut model, &checkpoint).unwrap(), None);
    assert_eq!(heads(&model), 1);
    let mut tied = place(&config("qwen3"), &qwen3()).unwrap();
    assert_eq!(resolve_tied(&mut tied, &checkpoint).unwrap(), None);
}

#[test]
fn an_untied_model_needs_an_output_projection() {
    let result = place(&with("qwen3", "tie_word_embeddings", json!(false)), &qwen3());
    assert_eq!(result, Err(ArchError::MissingTensor { tensor: LM_HEAD.to_owned() }));
}

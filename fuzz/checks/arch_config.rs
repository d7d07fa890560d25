//! config.json and generation_config.json, as they are or with values changed: they are refused
//! with a reason, or describe a model whose sizes fit together.

use arbitrary::{Result, Unstructured};
use nf4pack::arch::ModelConfig;
use nf4pack::format::Role;
use serde_json::{Value, json};

use super::json;

/// One configuration of each family.
const CONFIGS: [&[u8]; 15] = [
    include_bytes!("../../tests/fixtures/architectures/gemma/config.json"),
    include_bytes!("../../tests/fixtures/architectures/granite/config.json"),
    include_bytes!("../../tests/fixtures/architectures/llama/config.json"),
    include_bytes!("../../tests/fixtures/architectures/mistral/config.json"),
    include_bytes!("../../tests/fixtures/architectures/qwen2/config.json"),
    include_bytes!("../../tests/fixtures/architectures/qwen2_windows/config.json"),
    include_bytes!("../../tests/fixtures/architectures/qwen3/config.json"),
    include_bytes!("../../tests/fixtures/architectures/qwen3_windows/config.json"),
    include_bytes!("../../tests/fixtures/architectures/seed_oss/config.json"),
    include_bytes!("../../tests/fixtures/architectures/seed_oss_out_bias/config.json"),
    include_bytes!("../../tests/fixtures/architectures/smollm3/config.json"),
    include_bytes!("../../tests/fixtures/architectures/smollm3_windows/config.json"),
    include_bytes!("../../tests/fixtures/architectures/phi3/config.json"),
    include_bytes!("../../tests/fixtures/architectures/gemma3/config.json"),
    include_bytes!("../../tests/fixtures/architectures/gemma3_kinds/config.json"),
];

/// Keys that the readers look for.
pub const KEYS: [&str; 53] = [
    "model_type",
    "text_config",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "rms_norm_eps",
    "hidden_act",
    "max_position_embeddings",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "attention_out_bias",
    "per_layer_config",
    "layer_types",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "no_rope_layers",
    "no_rope_layer_interval",
    "eos_token_id",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "partial_rotary_factor",
    "short_factor",
    "long_factor",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "logits_scaling",
    "full_attention",
    "hidden_activation",
    "query_pre_attn_scalar",
    "rope_local_base_freq",
    "sliding_attention",
    "sliding_window_pattern",
    "use_bidirectional_attention",
    "attn_logit_softcapping",
    "final_logit_softcapping",
];

/// Runs the check: text is config.json itself; other bytes choose one and change it.
pub fn run(bytes: &[u8]) {
    if bytes.first().is_none_or(u8::is_ascii) {
        check(bytes, None);
        check(CONFIGS[bytes.len() % CONFIGS.len()], Some(bytes));
    } else {
        let _ = edited(&mut Unstructured::new(&bytes[1..]));
    }
}

fn edited(u: &mut Unstructured<'_>) -> Result<()> {
    let config = config(u)?;
    let mut generation = json!({"eos_token_id": [1, 2], "bos_token_id": 0});
    json::edit(u, &mut generation, &["eos_token_id"])?;
    let generation = json::bytes(u, &generation)?;
    check(&json::bytes(u, &config)?, Some(&generation).filter(|bytes| bytes.len() % 4 != 0).map(Vec::as_slice));
    Ok(())
}

/// A good configuration with changes.
pub fn config(u: &mut Unstructured<'_>) -> Result<Value> {
    let mut config = serde_json::from_slice(u.choose(&CONFIGS)?).map_err(|_| arbitrary::Error::IncorrectFormat)?;
    json::edit(u, &mut config, &KEYS)?;
    if u.ratio(1, 16)? {
        config = json!({"model_type": "llava", "text_config": config});
    }
    Ok(config)
}

fn check(config: &[u8], generation: Option<&[u8]>) {
    let config = match ModelConfig::parse(config, generation) {
        Ok(config) => config,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let ModelConfig { hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, .. } = config;
    assert!([hidden, intermediate, layers, heads, kv_heads, head_dim, vocab].iter().all(|&size| size > 0));
    assert!(heads.is_multiple_of(kv_heads) && head_dim.is_multiple_of(2) && layers <= 1 << 16);
    assert_eq!((config.queries(), config.keys()), (heads * head_dim, kv_heads * head_dim));
    assert!(config.rms_norm_eps >= 0.0 && config.rms_norm_eps.is_finite());
    let scales = [config.embedding_multiplier, config.residual_multiplier, config.attention_multiplier];
    assert!(scales.iter().chain([&config.logits_scaling]).all(|&scale| scale > 0.0));
    for &role in Role::ALL {
        assert!(config.projection(role).is_none_or(|(inputs, outputs)| inputs > 0 && outputs > 0));
    }
    if let Err(obstacle) = config.check_runnable() {
        assert!(!obstacle.to_string().is_empty());
    }
}

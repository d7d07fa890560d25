//! adapter_config.json: PEFT's settings of LoRA.

use regex::Regex;
use serde_json::{Map, Value, json};

use super::{AdapterError, module};
use crate::arch::config::ModelConfig;
use crate::format::Role;
use crate::lora::config::{LoraConfig, TARGETS};

/// Settings that make an adapter something else than B (A x) on whole projections, unless they are
/// absent, null, false or empty.
const UNSUPPORTED: [&str; 17] = [
    "alora_invocation_tokens",
    "alpha_pattern",
    "exclude_modules",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "layers_pattern",
    "layers_to_transform",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
];

/// Initialisations that leave the base as it is; the others store a difference to a changed one.
const PLAIN_INITIALISATIONS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// The settings, and the name of the base. What is absent has the default of PEFT's class.
pub(super) fn parse(bytes: &[u8], model: &ModelConfig) -> Result<(LoraConfig, Option<String>), AdapterError> {
    let object: Map<String, Value> = serde_json::from_slice(bytes).map_err(AdapterError::Json)?;
    let keys = Keys(&object);
    keys.only("peft_type", "\"LORA\"", |v| v == "LORA")?;
    keys.only("task_type", "\"CAUSAL_LM\" or null", |v| v == "CAUSAL_LM" || v.is_null())?;
    keys.only("bias", "\"none\"", |v| v == "none")?;
    if let Some(key) = UNSUPPORTED.into_iter().find(|key| keys.0.get(*key).is_some_and(|v| !is_unset(v))) {
        return Err(AdapterError::Unsupported { key, found: keys.get(key) });
    }
    let plain = |v: &Value| v.as_str().is_none_or(|s| PLAIN_INITIALISATIONS.contains(&s));
    if !object.get("init_lora_weights").is_none_or(plain) {
        return Err(AdapterError::Unsupported { key: "init_lora_weights", found: keys.get("init_lora_weights") });
    }
    let config = LoraConfig {
        rank: keys.value("r", "a whole number from 1 on", 8, |v| v.as_u64().and_then(|n| u32::try_from(n).ok()))?,
        alpha: keys.value("lora_alpha", "a number", 8.0, Value::as_f64)?,
        dropout: keys.value("lora_dropout", "a number", 0.0, Value::as_f64)?,
        targets: targets(&keys.get("target_modules"), model)?,
        rslora: keys.value("use_rslora", "true or false", false, Value::as_bool)?,
    };
    Ok((config, object.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned)))
}

struct Keys<'a>(&'a Map<String, Value>);

impl Keys<'_> {
    fn get(&self, key: &str) -> Value {
        self.0.get(key).cloned().unwrap_or_default()
    }

    fn bad(&self, key: &'static str, expected: &'static str) -> AdapterError {
        AdapterError::BadValue { key, expected, found: self.get(key) }
    }

    /// An error where the key is there with a value that `valid` refuses.
    fn only(&self, key: &'static str, expected: &'static str, valid: fn(&Value) -> bool) -> Result<(), AdapterError> {
        if self.0.get(key).is_none_or(valid) { Ok(()) } else { Err(self.bad(key, expected)) }
    }

    fn value<T>(
        &self,
        key: &'static str,
        expected: &'static str,
        default: T,
        read: fn(&Value) -> Option<T>,
    ) -> Result<T, AdapterError> {
        self.0.get(key).map_or(Ok(default), |v| read(v).ok_or_else(|| self.bad(key, expected)))
    }
}

fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(entries) => entries.is_empty(),
        _ => false,
    }
}

/// The projections that `target_modules` takes: names, or the ends of names after a dot; a pattern
/// for the whole name; or the word for all of them.
fn targets(found: &Value, model: &ModelConfig) -> Result<Vec<Role>, AdapterError> {
    let bad =
        || AdapterError::BadValue { key: "target_modules", expected: "a list of names, or a pattern", found: found.clone() };
    match found {
        Value::String(word) if word.eq_ignore_ascii_case("all-linear") => Ok(TARGETS.to_vec()),
        Value::String(pattern) => {
            let error = |source| AdapterError::Pattern { pattern: pattern.clone(), source };
            let whole = Regex::new(&format!("^(?:{pattern})$")).map_err(error)?;
            taken(model, |name| whole.is_match(name))
        }
        Value::Array(names) => {
            let names: Vec<&str> = names.iter().map(|v| v.as_str().ok_or_else(bad)).collect::<Result<_, _>>()?;
            let ends =
                |name: &str, end: &str| name.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
            taken(model, |name| names.iter().any(|end| ends(name, end)))
        }
        _ => Err(bad()),
    }
}

fn taken(model: &ModelConfig, takes: impl Fn(&str) -> bool) -> Result<Vec<Role>, AdapterError> {
    let mut targets = Vec::new();
    for role in TARGETS {
        let layers = (0..model.layers).filter(|&layer| takes(&module(model.family, layer, role))).count();
        match layers {
            0 => {}
            n if n == model.layers as usize => targets.push(role),
            _ => return Err(AdapterError::SomeLayers { role }),
        }
    }
    Ok(targets)
}

/// What all versions of PEFT with rsLoRA read; later ones fill in the rest with their defaults.
pub(super) fn render(config: &LoraConfig, base: Option<&str>) -> String {
    let targets: Vec<&str> = TARGETS.iter().filter(|r| config.targets.contains(r)).map(|r| r.name()).collect();
    // PEFT declares a whole number, and takes any; above 2^53 not all have a place in an f64.
    let whole = config.alpha.fract() == 0.0 && (0.0..9_007_199_254_740_992.0).contains(&config.alpha);
    let alpha = if whole { json!(config.alpha as u64) } else { json!(config.alpha) };
    let value = json!({
        "alpha_pattern": {},
        "auto_mapping": null,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": null,
        "layers_to_transform": null,
        "loftq_config": {},
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        "megatron_config": null,
        "megatron_core": "megatron.core",
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": config.rank,
        "rank_pattern": {},
        "revision": null,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_rslora": config.rslora,
    });
    format!("{value:#}\n")
}

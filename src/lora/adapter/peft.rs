//! adapter_config.json: PEFT's settings of LoRA.

use fancy_regex::Regex;
use serde_json::{Map, Value, json};

use super::{AdapterError, CONFIG, module};
use crate::arch::config::{Keys, ModelConfig};
use crate::format::Role;
use crate::lora::config::{LoraConfig, TARGETS};

/// Settings that make an adapter something else than B (A x) on whole projections, unless they are
/// absent, null, false or empty. PEFT ignores `fan_in_fan_out` for the projections of these models.
const UNSUPPORTED: [&str; 13] = [
    "alora_invocation_tokens",
    "alpha_pattern",
    "kasa_config",
    "layer_replication",
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
    let keys = Keys::new(CONFIG, &object);
    keys.one_of("peft_type", "LORA", &["LORA"], "\"LORA\"")?;
    keys.one_of("bias", "none", &["none"], "\"none\"")?;
    if keys.given("task_type").is_some() {
        keys.one_of("task_type", "CAUSAL_LM", &["CAUSAL_LM"], "\"CAUSAL_LM\" or null")?;
    }
    if let Some((key, found)) = UNSUPPORTED.into_iter().find_map(|key| Some((key, keys.truthy(key)?))) {
        return Err(AdapterError::Unsupported { key, found: found.clone() });
    }
    let changes_base = |v: &&Value| v.as_str().is_some_and(|s| !PLAIN_INITIALISATIONS.contains(&s));
    if let Some(found) = keys.get("init_lora_weights").filter(changes_base) {
        return Err(AdapterError::Unsupported { key: "init_lora_weights", found: found.clone() });
    }
    let number = |key| keys.number_if_present(key, "a number", |_| true);
    let config = LoraConfig {
        rank: keys.get("r").map_or(Ok(8), |_| keys.size("r"))?,
        alpha: number("lora_alpha")?.unwrap_or(8.0),
        dropout: number("lora_dropout")?.unwrap_or(0.0),
        targets: targets(&keys, model)?,
        // A null is false for Python.
        rslora: keys.given("use_rslora").is_some() && keys.flag("use_rslora", false)?,
    };
    Ok((config, keys.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned)))
}

/// Modules of a model, as `target_modules` and `exclude_modules` name them.
enum Modules {
    /// All projections: the word `all-linear`.
    All,
    /// A pattern for the whole name.
    Pattern(Box<Regex>),
    /// Names, or the ends of names after a dot.
    Names(Vec<String>),
}

impl Modules {
    /// The modules under `key`; `None` if it is absent or null.
    fn read(keys: &Keys<'_>, key: &'static str) -> Result<Option<Self>, AdapterError> {
        match keys.given(key) {
            None => Ok(None),
            Some(Value::String(word)) if word.eq_ignore_ascii_case("all-linear") => Ok(Some(Self::All)),
            Some(Value::String(pattern)) => match Regex::new(&format!("^(?:{pattern})$")) {
                Ok(whole) => Ok(Some(Self::Pattern(Box::new(whole)))),
                Err(source) => Err(AdapterError::Pattern { key, pattern: pattern.clone(), source: Box::new(source) }),
            },
            Some(_) => {
                let name = |value: &Value| value.as_str().map(str::to_owned);
                Ok(keys.list(key, 0, "a list of names, or a pattern", name)?.map(Self::Names))
            }
        }
    }

    /// Whether they have the module `name`.
    fn contains(&self, name: &str) -> bool {
        let ends = |end: &str| name.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        match self {
            Self::All => true,
            // An error is a pattern that takes too long.
            Self::Pattern(pattern) => pattern.is_match(name).unwrap_or(false),
            Self::Names(names) => names.iter().any(|name| ends(name)),
        }
    }
}

/// The projections that an adapter changes: those of `target_modules` without those of
/// `exclude_modules`, in the layers of `layers_to_transform`.
fn targets(keys: &Keys<'_>, model: &ModelConfig) -> Result<Vec<Role>, AdapterError> {
    const TARGET: &str = "target_modules";
    let missing = || keys.bad(TARGET, "a list of names, or a pattern", &Value::Null);
    let (taken, excluded) = (Modules::read(keys, TARGET)?.ok_or_else(missing)?, Modules::read(keys, "exclude_modules")?);
    let layers = layers(keys)?;
    let mut targets = Vec::new();
    for role in TARGETS {
        let takes = |&layer: &u32| {
            let name = module(model.family, layer, role);
            let in_layer = layers.as_ref().is_none_or(|layers| layers.contains(&layer));
            in_layer && taken.contains(&name) && !excluded.as_ref().is_some_and(|excluded| excluded.contains(&name))
        };
        match (0..model.layers).filter(takes).count() {
            0 => {}
            n if n == model.layers as usize => targets.push(role),
            _ => return Err(AdapterError::SomeLayers { role }),
        }
    }
    Ok(targets)
}

/// The layers of `layers_to_transform`, a number or a list; `None` if it is absent or null.
fn layers(keys: &Keys<'_>) -> Result<Option<Vec<u32>>, AdapterError> {
    const KEY: &str = "layers_to_transform";
    // The name of the list of layers, which is the same in all of these models.
    if let Some(found) = keys.truthy("layers_pattern").filter(|found| *found != "layers" && **found != json!(["layers"])) {
        return Err(AdapterError::Unsupported { key: "layers_pattern", found: found.clone() });
    }
    let number = |value: &Value| value.as_u64().and_then(|n| u32::try_from(n).ok());
    match keys.given(KEY) {
        Some(Value::Array(list)) if list.is_empty() => Ok(None),
        Some(one @ Value::Number(_)) => {
            let layer = number(one).ok_or_else(|| keys.bad(KEY, "the number of a layer, or a list of them", one))?;
            Ok(Some(vec![layer]))
        }
        _ => Ok(keys.list(KEY, 0, "the number of a layer, or a list of them", number)?),
    }
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

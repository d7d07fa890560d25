//! adapter_config.json: PEFT's settings of LoRA.

use std::collections::BTreeSet;

use fancy_regex::{Regex, RegexBuilder};
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

/// Steps that a pattern may go back on one name. A pattern with more is meant to be slow.
const MAX_BACKTRACKS: usize = 100_000;
/// Bytes that a compiled pattern may have.
const MAX_PATTERN_LEN: usize = 1 << 20;

/// The settings of a file. What is absent has the default of PEFT's class.
pub(super) struct Settings {
    object: Map<String, Value>,
    /// Without targets.
    config: LoraConfig,
}

impl Settings {
    /// Reads all settings that do not depend on a model.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, AdapterError> {
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
            targets: Vec::new(),
            // A null is false for Python.
            rslora: keys.given("use_rslora").is_some() && keys.flag("use_rslora", false)?,
        };
        Ok(Self { object, config })
    }

    /// The settings on this model, and the name of the base.
    pub(super) fn of(self, model: &ModelConfig) -> Result<(LoraConfig, Option<String>), AdapterError> {
        let keys = Keys::new(CONFIG, &self.object);
        let config = LoraConfig { targets: targets(&keys, model)?, ..self.config };
        Ok((config, keys.get("base_model_name_or_path").and_then(Value::as_str).map(str::to_owned)))
    }
}

/// Modules of a model, as `target_modules` and `exclude_modules` name them.
enum Modules {
    /// All projections: the word `all-linear`.
    All,
    /// The key, and a pattern for the whole name.
    Pattern(&'static str, Box<Regex>),
    /// Names, or the ends of names after a dot.
    Names(BTreeSet<String>),
}

impl Modules {
    /// The modules under `key`; `None` if it is absent or null.
    fn read(keys: &Keys<'_>, key: &'static str) -> Result<Option<Self>, AdapterError> {
        match keys.given(key) {
            None => Ok(None),
            Some(Value::String(word)) if word.eq_ignore_ascii_case("all-linear") => Ok(Some(Self::All)),
            Some(Value::String(pattern)) => match compile(pattern) {
                Ok(whole) => Ok(Some(Self::Pattern(key, Box::new(whole)))),
                Err(source) => Err(AdapterError::Pattern { key, pattern: pattern.clone(), source: Box::new(source) }),
            },
            Some(_) => {
                let name = |value: &Value| value.as_str().map(str::to_owned);
                let names = keys.list(key, 0, "a list of names, or a pattern", name)?;
                Ok(names.map(|names| Self::Names(names.into_iter().collect())))
            }
        }
    }

    /// Whether they have the module `name`.
    fn contains(&self, name: &str) -> Result<bool, AdapterError> {
        let ends = || name.match_indices('.').filter_map(|(at, _)| name.get(at + 1..));
        match self {
            Self::All => Ok(true),
            Self::Pattern(key, pattern) => pattern.is_match(name).map_err(|_| AdapterError::SlowPattern {
                key,
                pattern: pattern.as_str().to_owned(),
                module: name.to_owned(),
            }),
            Self::Names(names) => Ok(names.contains(name) || ends().any(|end| names.contains(end))),
        }
    }
}

/// A pattern for a whole name.
fn compile(pattern: &str) -> Result<Regex, fancy_regex::Error> {
    let mut builder = RegexBuilder::new(&format!("^(?:{pattern})$"));
    builder.backtrack_limit(MAX_BACKTRACKS).delegate_size_limit(MAX_PATTERN_LEN).build()
}

/// The projections that an adapter changes: those of `target_modules` without those of
/// `exclude_modules`, in the layers of `layers_to_transform`.
fn targets(keys: &Keys<'_>, model: &ModelConfig) -> Result<Vec<Role>, AdapterError> {
    const TARGET: &str = "target_modules";
    let missing = || keys.bad(TARGET, "a list of names, or a pattern", &Value::Null);
    let (taken, excluded) = (Modules::read(keys, TARGET)?.ok_or_else(missing)?, Modules::read(keys, "exclude_modules")?);
    let layers = layers(keys)?;
    let mut targets = Vec::new();
    for role in TARGETS.into_iter().filter(|&role| model.projection(role).is_some()) {
        let mut count = 0;
        for layer in (0..model.layers).filter(|layer| layers.as_ref().is_none_or(|layers| layers.contains(layer))) {
            let name = module(model.family, layer, role);
            let is_excluded = || excluded.as_ref().map_or(Ok(false), |excluded| excluded.contains(&name));
            count += u32::from(taken.contains(&name)? && !is_excluded()?);
        }
        match count {
            0 => {}
            count if count == model.layers => targets.push(role),
            _ => return Err(AdapterError::SomeLayers { role }),
        }
    }
    Ok(targets)
}

/// The layers of `layers_to_transform`, a number or a list; `None` if it is absent or null.
fn layers(keys: &Keys<'_>) -> Result<Option<BTreeSet<u32>>, AdapterError> {
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
            Ok(Some(BTreeSet::from([layer])))
        }
        _ => {
            let layers = keys.list(KEY, 0, "the number of a layer, or a list of them", number)?;
            Ok(layers.map(|layers| layers.into_iter().collect()))
        }
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

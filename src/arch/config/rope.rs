//! The rotary embedding: `rope_parameters` of newer configurations, `rope_theta` and `rope_scaling`
//! of older ones.

use serde_json::{Map, Value};

use super::error::ConfigError;
use super::keys::Keys;
use crate::arch::family::{Family, WindowedRotary};

/// A rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// The base of the wavelengths.
    pub theta: f64,
    /// The features of a head that turn: its first ones; an even number.
    pub dim: u32,
    /// The scaling for positions beyond those of the first training.
    pub scaling: RopeScaling,
}

/// The scaling of a rotary embedding; the parameters have transformers' names. Lengths are in
/// tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    Default,
    /// Positions divided by `factor`.
    Linear {
        /// Above 0; below 1 it shortens the waves.
        factor: f64,
    },
    /// A theta that grows with the longest position beyond `max_position_embeddings`.
    Dynamic {
        /// Above 0; below 1 it shortens the waves.
        factor: f64,
        /// Up to this length theta does not change.
        max_position_embeddings: f64,
    },
    /// Long waves divided by `factor`, short ones left, those between blended.
    Llama3 {
        /// Above 0; below 1 it shortens the waves.
        factor: f64,
        /// Waves longer than `original_max_position_embeddings` divided by this are long.
        low_freq_factor: f64,
        /// Waves shorter than `original_max_position_embeddings` divided by this are short; above
        /// `low_freq_factor`.
        high_freq_factor: f64,
        /// Length of the first training.
        original_max_position_embeddings: f64,
    },
    /// A ramp over the features from unscaled to divided by `factor`, and a factor on the
    /// attention.
    Yarn {
        /// Above 0; below 1 it shortens the waves.
        factor: f64,
        /// Length of the first training.
        original_max_position_embeddings: f64,
        /// On sine and cosine; by default it follows from `factor`, `mscale` and `mscale_all_dim`.
        attention_factor: Option<f64>,
        /// Rotations above which a feature stays unscaled; 32 by default.
        beta_fast: Option<f64>,
        /// Rotations below which a feature is fully scaled; 1 by default.
        beta_slow: Option<f64>,
        /// For the default of `attention_factor`.
        mscale: Option<f64>,
        /// For the default of `attention_factor`.
        mscale_all_dim: Option<f64>,
        /// Whether the ends of the ramp are rounded outwards to whole features.
        truncate: bool,
    },
}

impl Rope {
    /// Reads the configuration of a model that was made for `max_positions`, as
    /// `convert_rope_params_to_dict` of transformers 5.24 does: `rope_scaling`, unless it is empty,
    /// or else `rope_parameters`. Keys that the scaling does not use are added to `ignored`. The
    /// second one is that of layers with a window, if the family has one.
    pub(super) fn read(
        config: &Keys<'_>,
        family: &Family,
        head_dim: u32,
        max_positions: u32,
        ignored: &mut Vec<String>,
    ) -> Result<(Self, Option<Self>), ConfigError> {
        match family.windowed_rotary {
            None => Ok((Self::of_all_layers(config, family, head_dim, max_positions, ignored)?, None)),
            Some(windowed) => {
                let [full, windowed] = of_kinds(config, family, windowed, head_dim, max_positions, ignored)?;
                Ok((full, Some(windowed)))
            }
        }
    }

    fn of_all_layers(
        config: &Keys<'_>,
        family: &Family,
        head_dim: u32,
        max_positions: u32,
        ignored: &mut Vec<String>,
    ) -> Result<Self, ConfigError> {
        let (scaling, parameters) = (config.truthy_inner("rope_scaling")?, config.truthy_inner("rope_parameters")?);
        if scaling.is_some() && parameters.is_some() && config.get("rope_scaling") != config.get("rope_parameters") {
            ignored.push(config.full("rope_parameters"));
        }
        let parameters = scaling.or(parameters);
        let theta = |keys: &Keys<'_>| keys.number_if_present("rope_theta", "a number above 1", |x| x > 1.0);
        let own_theta = parameters.as_ref().map_or(Ok(None), theta)?;
        let theta = own_theta.or(theta(config)?).unwrap_or(family.theta);
        let partial = |keys: &Keys<'_>| partial_dim(keys, head_dim);
        let Some(parameters) = parameters else {
            let dim = if family.partial_rotary { partial(config)? } else { None };
            if !family.partial_rotary {
                whole_head(config, RopeScaling::Default, ignored)?;
            }
            return Ok(Self { theta, dim: dim.unwrap_or(head_dim), scaling: RopeScaling::Default });
        };
        one_for_all_layers(&parameters)?;
        let (scaling, used) = scaling_of(config, &parameters, family, f64::from(max_positions))?;
        let dim = match family.partial_rotary {
            true => partial(&parameters)?.or(partial(config)?),
            false => {
                whole_head(config, scaling, ignored)?;
                whole_head(&parameters, scaling, ignored)?;
                None
            }
        };
        let unused = parameters.entries().filter(|(key, _)| !COMMON_KEYS.contains(key) && !used.contains(key));
        ignored.extend(unused.map(|(key, _)| parameters.full(key)));
        Ok(Self { theta, dim: dim.unwrap_or(head_dim), scaling })
    }
}

/// The keys that every scaling reads.
const COMMON_KEYS: [&str; 4] = ["rope_theta", "rope_type", "type", PARTIAL];

/// Families without [`Family::windowed_rotary`] have one rotary embedding, with parameters that are
/// no objects.
fn one_for_all_layers(parameters: &Keys<'_>) -> Result<(), ConfigError> {
    match parameters.entries().find(|(_, value)| value.is_object()) {
        Some((key, value)) => {
            Err(parameters.bad(key, "absent: all layers of these models have the same rotary embedding", value))
        }
        None => Ok(()),
    }
}

/// The rotary embeddings of layers without a window and of those with one, as in
/// `Gemma3TextConfig.convert_rope_params_to_dict`: the parameters of each kind in
/// `rope_parameters`. Older configurations have `rope_scaling`, for layers without a window.
fn of_kinds(
    config: &Keys<'_>,
    family: &Family,
    windowed: WindowedRotary,
    head_dim: u32,
    max_positions: u32,
    ignored: &mut Vec<String>,
) -> Result<[Rope; 2], ConfigError> {
    const KINDS: [&str; 2] = ["full_attention", "sliding_attention"];
    let (parameters, scaling) = (config.inner("rope_parameters")?, config.inner("rope_scaling")?);
    if let Some(keys) = &parameters {
        let unused = keys.entries().filter(|(key, _)| !KINDS.contains(key));
        ignored.extend(unused.map(|(key, _)| keys.full(key)));
    }
    let of_kind = |kind| parameters.as_ref().map_or(Ok(None), |keys| keys.inner(kind));
    let [full, sliding] = KINDS.map(of_kind);
    let (full, sliding) = (full?, sliding?);
    let mut merged = full.as_ref().map_or_else(default_parameters, Keys::to_map);
    merged.extend(scaling.as_ref().map(Keys::to_map).unwrap_or_default());
    let key = if scaling.is_some() { "rope_scaling" } else { "rope_parameters.full_attention" };
    let theta_of = |key| config.number_if_present(key, "a number above 1", |x| x > 1.0);
    let thetas = [theta_of("rope_theta")?.unwrap_or(family.theta), theta_of(windowed.key)?.unwrap_or(windowed.theta)];
    let plain = default_parameters();
    let sliding = sliding.unwrap_or_else(|| config.nested("rope_parameters.sliding_attention", &plain));
    let mut read = |parameters: &Keys<'_>, default: f64| -> Result<Rope, ConfigError> {
        let theta = parameters.number_if_present("rope_theta", "a number above 1", |x| x > 1.0)?.unwrap_or(default);
        let (scaling, used) = scaling_of(config, parameters, family, f64::from(max_positions))?;
        whole_head(parameters, scaling, ignored)?;
        let unused = parameters.entries().filter(|(key, _)| !COMMON_KEYS.contains(key) && !used.contains(key));
        ignored.extend(unused.map(|(key, _)| parameters.full(key)));
        Ok(Rope { theta, dim: head_dim, scaling })
    };
    Ok([read(&config.nested(key, &merged), thetas[0])?, read(&sliding, thetas[1])?])
}

/// The parameters of a kind of layer without any.
fn default_parameters() -> Map<String, Value> {
    Map::from_iter([("rope_type".to_owned(), "default".into())])
}

const PARTIAL: &str = "partial_rotary_factor";

/// The features of a head that turn by `partial_rotary_factor`; `None` if it is absent.
fn partial_dim(keys: &Keys<'_>, head_dim: u32) -> Result<Option<u32>, ConfigError> {
    let Some(factor) = keys.number_if_present(PARTIAL, "a number above 0, and at most 1", |x| x > 0.0 && x <= 1.0)? else {
        return Ok(None);
    };
    // Rounded down, as Python's int.
    let dim = (f64::from(head_dim) * factor) as u32;
    if dim < 2 || !dim.is_multiple_of(2) {
        return Err(keys.bad(PARTIAL, "a share of a head with an even number of features", &factor.into()));
    }
    Ok(Some(dim))
}

/// Most classes turn every feature of a head. Without scaling they do not look at
/// this key; with one, transformers computes angles for a part of the head, and then fails.
fn whole_head(keys: &Keys<'_>, scaling: RopeScaling, ignored: &mut Vec<String>) -> Result<(), ConfigError> {
    match keys.given(PARTIAL) {
        None => Ok(()),
        Some(value) if value.as_f64() == Some(1.0) => Ok(()),
        Some(_) if scaling == RopeScaling::Default => {
            ignored.push(keys.full(PARTIAL));
            Ok(())
        }
        Some(value) => Err(keys.bad(PARTIAL, "1: these models turn whole heads", value)),
    }
}

/// The scaling, and the keys of `parameters` that it reads.
fn scaling_of(
    config: &Keys<'_>,
    parameters: &Keys<'_>,
    family: &Family,
    max_positions: f64,
) -> Result<(RopeScaling, &'static [&'static str]), ConfigError> {
    let key = if parameters.get("rope_type").is_some() { "rope_type" } else { "type" };
    let kind = parameters.one_of(key, "default", family.rope_types, format!("one of {}", family.rope_types.join(", ")))?;
    let factor = || parameters.number("factor", "a number above 0", |x| x > 0.0);
    Ok(match kind {
        "linear" => (RopeScaling::Linear { factor: factor()? }, &["factor"]),
        "dynamic" => (RopeScaling::Dynamic { factor: factor()?, max_position_embeddings: max_positions }, &["factor"]),
        "llama3" => {
            let original = original_positions(config, parameters)?.unwrap_or(max_positions);
            (llama3(parameters, factor()?, original)?, &LLAMA3_KEYS)
        }
        "yarn" => (yarn(config, parameters, max_positions)?, &YARN_KEYS),
        _ => (RopeScaling::Default, &[]),
    })
}

const LLAMA3_KEYS: [&str; 4] = ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"];

const YARN_KEYS: [&str; 8] = [
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
];

/// Length of the first training; the value outside of `parameters` takes precedence.
fn original_positions(config: &Keys<'_>, parameters: &Keys<'_>) -> Result<Option<f64>, ConfigError> {
    const KEY: &str = "original_max_position_embeddings";
    let length = |keys: &Keys<'_>| keys.optional_number(KEY, "a number from 1 on", |x| x >= 1.0);
    let outside = length(config)?;
    Ok(outside.or(length(parameters)?))
}

fn llama3(parameters: &Keys<'_>, factor: f64, original: f64) -> Result<RopeScaling, ConfigError> {
    let positive = |key| parameters.number(key, "a number above 0", |x| x > 0.0);
    let (low, high) = (positive("low_freq_factor")?, positive("high_freq_factor")?);
    if high <= low {
        return Err(parameters.bad("high_freq_factor", "above low_freq_factor", &high.into()));
    }
    Ok(RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: original,
    })
}

fn yarn(config: &Keys<'_>, parameters: &Keys<'_>, max_positions: f64) -> Result<RopeScaling, ConfigError> {
    let original = original_positions(config, parameters)?.unwrap_or(max_positions);
    // A null, unlike a missing key, asks for the ratio of the two lengths.
    let factor = match parameters.get("factor") {
        Some(found) if found.is_null() => max_positions / original,
        _ => parameters.number("factor", "a number above 0", |x| x > 0.0)?,
    };
    let from_0 = |key| parameters.optional_number(key, "a number from 0 on", |x| x >= 0.0);
    // transformers takes a zero for "the default".
    let or_default = |key| Ok::<_, ConfigError>(from_0(key)?.filter(|&x| x > 0.0));
    // It takes a null for false.
    let is_null = parameters.get("truncate").is_some_and(serde_json::Value::is_null);
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: original,
        attention_factor: from_0("attention_factor")?,
        beta_fast: or_default("beta_fast")?,
        beta_slow: or_default("beta_slow")?,
        mscale: or_default("mscale")?,
        mscale_all_dim: or_default("mscale_all_dim")?,
        truncate: !is_null && parameters.flag("truncate", true)?,
    })
}

//! The rotary embedding: `rope_parameters` of newer configurations, `rope_theta` and `rope_scaling` of older ones.

use super::ConfigError;
use super::keys::Keys;

/// The base wavelength where config.json has none, in all the classes that are supported.
const DEFAULT_THETA: f64 = 10_000.0;

/// A rotary embedding of all features of a head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rope {
    /// The base of the wavelengths.
    pub theta: f64,
    /// How positions beyond those of the first training are reached.
    pub scaling: RopeScaling,
}

/// How a rotary embedding is stretched; the parameters have transformers' names. Lengths are in tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// It is not.
    Default,
    /// Positions divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// A theta that grows with the longest position beyond `max_position_embeddings`.
    Dynamic {
        /// At least 1.
        factor: f64,
        /// Up to this length theta stays as it is.
        max_position_embeddings: f64,
    },
    /// Long waves divided by `factor`, short ones left, those between blended.
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Waves longer than `original_max_position_embeddings` divided by this are long.
        low_freq_factor: f64,
        /// Waves shorter than `original_max_position_embeddings` divided by this are short; above `low_freq_factor`.
        high_freq_factor: f64,
        /// Length of the first training.
        original_max_position_embeddings: f64,
    },
    /// A ramp over the features from unscaled to divided by `factor`, and a factor on the attention.
    Yarn {
        /// At least 1.
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
    /// Reads the configuration of a model that was made for `max_positions`.
    pub(super) fn read(config: &Keys<'_>, max_positions: u32) -> Result<Self, ConfigError> {
        let parameters = match config.inner("rope_parameters")? {
            Some(parameters) => Some(parameters),
            None => config.inner("rope_scaling")?,
        };
        let theta = |keys: &Keys<'_>| keys.optional_number("rope_theta", "a number above 1", |x| x > 1.0);
        let own_theta = parameters.as_ref().map_or(Ok(None), theta)?;
        let theta = own_theta.or(theta(config)?).unwrap_or(DEFAULT_THETA);
        whole_head(config)?;
        let Some(parameters) = parameters else { return Ok(Self { theta, scaling: RopeScaling::Default }) };
        whole_head(&parameters)?;
        Ok(Self { theta, scaling: scaling(config, &parameters, f64::from(max_positions))? })
    }
}

/// The classes that are supported turn every feature of a head.
fn whole_head(keys: &Keys<'_>) -> Result<(), ConfigError> {
    keys.optional_number("partial_rotary_factor", "1: partly turned heads are not supported", |x| x == 1.0).map(|_| ())
}

fn scaling(config: &Keys<'_>, parameters: &Keys<'_>, max_positions: f64) -> Result<RopeScaling, ConfigError> {
    const KNOWN: [&str; 5] = ["default", "linear", "dynamic", "llama3", "yarn"];
    let key = if parameters.get("rope_type").is_some() { "rope_type" } else { "type" };
    let kind = parameters.one_of(key, "default", &KNOWN, "one of default, linear, dynamic, llama3, yarn")?;
    let factor = || parameters.number("factor", "a number from 1 on", |x| x >= 1.0);
    Ok(match kind {
        "linear" => RopeScaling::Linear { factor: factor()? },
        "dynamic" => RopeScaling::Dynamic { factor: factor()?, max_position_embeddings: max_positions },
        "llama3" => llama3(parameters, factor()?, original_positions(config, parameters)?.unwrap_or(max_positions))?,
        "yarn" => yarn(config, parameters, max_positions)?,
        _ => RopeScaling::Default,
    })
}

/// Length of the first training; where it stands outside, that counts.
fn original_positions(config: &Keys<'_>, parameters: &Keys<'_>) -> Result<Option<f64>, ConfigError> {
    const KEY: &str = "original_max_position_embeddings";
    let outside = config.optional_size(KEY)?;
    Ok(outside.or(parameters.optional_size(KEY)?).map(f64::from))
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
    let positive = |key| parameters.optional_number(key, "a number above 0", |x| x > 0.0);
    // A null, unlike a missing key, asks for the ratio of the two lengths.
    let factor = match parameters.get("factor") {
        Some(found) if found.is_null() => max_positions / original,
        _ => parameters.number("factor", "a number from 1 on", |x| x >= 1.0)?,
    };
    // transformers takes a zero for "the default".
    let or_default = |key| {
        Ok::<_, ConfigError>(parameters.optional_number(key, "a number from 0 on", |x| x >= 0.0)?.filter(|&x| x > 0.0))
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: original,
        attention_factor: positive("attention_factor")?,
        beta_fast: or_default("beta_fast")?,
        beta_slow: or_default("beta_slow")?,
        mscale: or_default("mscale")?,
        mscale_all_dim: or_default("mscale_all_dim")?,
        truncate: parameters.flag("truncate", true)?,
    })
}

//! Errors of a configuration.

use serde_json::Value;
use thiserror::Error;

use crate::arch::families::model_types;

/// Why a configuration does not describe a supported model.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Not a JSON object.
    #[error("{file} is not a JSON object: {source}")]
    Json {
        /// config.json or generation_config.json.
        file: &'static str,
        /// The parser's error.
        source: serde_json::Error,
    },
    /// An architecture that is not supported.
    #[error("model_type {found:?} is not supported; supported are {}", model_types().collect::<Vec<_>>().join(", "))]
    ModelType {
        /// The type in config.json or its `text_config`.
        found: String,
    },
    /// A required key is missing.
    #[error("config.json has no {key:?}, which {model_type} models need")]
    MissingKey {
        /// The model type; "all" for the key `model_type` itself.
        model_type: &'static str,
        /// The key; with a dot inside an object such as `rope_parameters`.
        key: String,
    },
    /// A key has an invalid or unsupported value.
    #[error("{file}: {key:?} should be {expected}, found {found}")]
    BadValue {
        /// config.json or generation_config.json.
        file: &'static str,
        /// The key; with a dot inside an object such as `rope_parameters`.
        key: String,
        /// The expected value.
        expected: Box<str>,
        /// Its value.
        found: Value,
    },
    /// More layers than a pack can number.
    #[error("config.json: num_hidden_layers is {found}, at most {limit} are supported")]
    TooManyLayers {
        /// Layers supported.
        limit: u32,
        /// Layers in config.json.
        found: u32,
    },
    /// A number of heads that does not divide another size.
    #[error("config.json: {divisor_key} = {divisor} does not divide {key} = {value}")]
    Indivisible {
        /// The key whose value is divided.
        key: &'static str,
        /// Its value.
        value: u32,
        /// The key of the divisor.
        divisor_key: &'static str,
        /// Its value.
        divisor: u32,
    },
    /// Heads times head size does not fit in 32 bits.
    #[error("config.json: {heads} heads of {head_dim} elements are too many")]
    Overflow {
        /// Number of heads.
        heads: u32,
        /// Elements of a head.
        head_dim: u32,
    },
}

//! What a pack's own config.json says about its model. A missing key takes the default of that very class in transformers,
//! where it has one that is not the number of one certain model; every other missing key is an error.

mod keys;
mod rope;

use serde_json::{Map, Value};
use thiserror::Error;

use keys::Keys;
pub use rope::{Rope, RopeScaling};

/// Why a configuration does not describe a model that can be run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// Not a JSON object.
    #[error("{file} is not a JSON object: {source}")]
    Json {
        /// config.json or generation_config.json.
        file: &'static str,
        /// Where it is broken.
        source: serde_json::Error,
    },
    /// An architecture that is not supported.
    #[error("model_type {found:?} is not supported; supported are llama, mistral, qwen2, qwen3")]
    ModelType {
        /// What config.json says.
        found: String,
    },
    /// A key without which the model is not described.
    #[error("config.json has no {key:?}, which {model_type} models need")]
    MissingKey {
        /// The model type; "all" for the key `model_type` itself.
        model_type: &'static str,
        /// The key; with a dot inside `rope_scaling` or `rope_parameters`.
        key: String,
    },
    /// A key with a value that cannot be, or that is not supported.
    #[error("{file}: {key:?} should be {expected}, found {found}")]
    BadValue {
        /// config.json or generation_config.json.
        file: &'static str,
        /// The key; with a dot inside `rope_scaling` or `rope_parameters`.
        key: String,
        /// What it should be.
        expected: &'static str,
        /// What it is.
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
    /// A number of heads that does not divide what it has to.
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

/// The architectures that are supported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelType {
    /// Llama.
    Llama,
    /// Mistral.
    Mistral,
    /// Qwen2 and Qwen2.5.
    Qwen2,
    /// Qwen3.
    Qwen3,
}

impl ModelType {
    const ALL: [Self; 4] = [Self::Llama, Self::Mistral, Self::Qwen2, Self::Qwen3];

    /// As config.json says it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    fn default_max_positions(self) -> u32 {
        match self {
            Self::Llama => 2048,
            Self::Mistral => 131_072,
            Self::Qwen2 | Self::Qwen3 => 32_768,
        }
    }

    /// `eos_token_id` where config.json has no such key.
    fn default_eos(self) -> &'static [u32] {
        match self {
            Self::Llama | Self::Mistral => &[2],
            Self::Qwen2 | Self::Qwen3 => &[],
        }
    }
}

/// Layers that a model may have: as many as a pack can number.
pub const MAX_LAYERS: u32 = 1 << 16;

/// What the attention of one layer does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerAttention {
    /// A token attends to itself and the `window - 1` tokens before it; to all before it where this is `None`.
    pub window: Option<u32>,
    /// Whether queries and keys are rotated by their positions.
    pub rotary: bool,
}

impl LayerAttention {
    /// All tokens before, rotated.
    pub const FULL: Self = Self { window: None, rotary: true };
}

/// A decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The architecture.
    pub model_type: ModelType,
    /// Features of the residual stream.
    pub hidden: u32,
    /// Features inside the feed-forward network.
    pub intermediate: u32,
    /// Number of layers.
    pub layers: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Features of a head; even. `heads * head_dim` need not be `hidden`.
    pub head_dim: u32,
    /// Rows of the embedding.
    pub vocab: u32,
    /// What RMSNorm adds to the mean square.
    pub rms_norm_eps: f64,
    /// The rotary embedding.
    pub rope: Rope,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether queries and keys are normalised per head.
    pub q_k_norm: bool,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether attention's output projection has a bias.
    pub o_bias: bool,
    /// Whether the feed-forward projections have biases.
    pub mlp_bias: bool,
    /// What each embedding is multiplied by.
    pub embedding_multiplier: f64,
    /// What the output of attention and of the feed-forward network is multiplied by before it is added to the residual.
    pub residual_multiplier: f64,
    /// What the product of a query and a key is multiplied by before the softmax; usually `1 / sqrt(head_dim)`.
    pub attention_multiplier: f64,
    /// What the logits are divided by.
    pub logits_scaling: f64,
    /// The attention of each layer, in order; read it through [`ModelConfig::attention`].
    pub layer_attention: Vec<LayerAttention>,
    /// Positions that the model was made for.
    pub max_position_embeddings: u32,
    /// Tokens that end a text; those of generation_config.json where it names some.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads config.json and, if there is one, generation_config.json.
    ///
    /// # Errors
    /// A [`ConfigError`] that names the key.
    pub fn parse(config_json: &[u8], generation_config: Option<&[u8]>) -> Result<Self, ConfigError> {
        let config = object("config.json", config_json)?;
        let model_type = model_type(&config)?;
        let keys = Keys::new("config.json", &config, model_type);
        keys.one_of("hidden_act", "silu", &["silu"], "\"silu\"")?;
        let (hidden, heads) = (keys.size("hidden_size")?, keys.size("num_attention_heads")?);
        let kv_heads = kv_heads(&keys, heads)?;
        let head_dim = head_dim(&keys, hidden, heads)?;
        let layers = layers(&keys)?;
        let sliding_window = sliding_window(&keys, layers)?;
        let max_position_embeddings =
            keys.optional_size("max_position_embeddings")?.unwrap_or(model_type.default_max_positions());
        let attention_bias = keys.flag("attention_bias", false)?;
        Ok(Self {
            model_type,
            hidden,
            intermediate: keys.size("intermediate_size")?,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab: keys.size("vocab_size")?,
            rms_norm_eps: keys.number("rms_norm_eps", "a number from 0 on", |eps| eps >= 0.0)?,
            rope: Rope::read(&keys, max_position_embeddings)?,
            tie_word_embeddings: keys.flag("tie_word_embeddings", false)?,
            q_k_norm: model_type == ModelType::Qwen3,
            qkv_bias: match model_type {
                ModelType::Llama | ModelType::Qwen3 => attention_bias,
                ModelType::Mistral => false,
                ModelType::Qwen2 => true,
            },
            o_bias: matches!(model_type, ModelType::Llama | ModelType::Qwen3) && attention_bias,
            mlp_bias: model_type == ModelType::Llama && keys.flag("mlp_bias", false)?,
            embedding_multiplier: 1.0,
            residual_multiplier: 1.0,
            attention_multiplier: 1.0 / f64::from(head_dim).sqrt(),
            logits_scaling: 1.0,
            layer_attention: layer_attention(&keys, layers, sliding_window)?,
            max_position_embeddings,
            eos_token_ids: eos_token_ids(&keys, generation_config)?,
        })
    }

    /// What the attention of `layer` does.
    pub fn attention(&self, layer: u32) -> LayerAttention {
        self.layer_attention.get(layer as usize).copied().unwrap_or(LayerAttention::FULL)
    }

    /// Rows of the query projection.
    pub fn queries(&self) -> u32 {
        self.heads * self.head_dim
    }

    /// Rows of the key and of the value projection.
    pub fn keys(&self) -> u32 {
        self.kv_heads * self.head_dim
    }
}

/// Those of generation_config.json, if it names some, or else those of config.json, which is checked all the same.
fn eos_token_ids(keys: &Keys<'_>, generation_config: Option<&[u8]>) -> Result<Vec<u32>, ConfigError> {
    const KEY: &str = "eos_token_id";
    let ids = keys.token_ids(KEY)?.unwrap_or_else(|| keys.model_type.default_eos().to_vec());
    let Some(bytes) = generation_config else { return Ok(ids) };
    let generation = object("generation_config.json", bytes)?;
    let named = Keys::new("generation_config.json", &generation, keys.model_type).token_ids(KEY)?;
    Ok(named.filter(|named| !named.is_empty()).unwrap_or(ids))
}

fn object(file: &'static str, bytes: &[u8]) -> Result<Map<String, Value>, ConfigError> {
    serde_json::from_slice(bytes).map_err(|source| ConfigError::Json { file, source })
}

fn model_type(config: &Map<String, Value>) -> Result<ModelType, ConfigError> {
    let found =
        config.get("model_type").ok_or(ConfigError::MissingKey { model_type: "all", key: "model_type".to_owned() })?;
    let named = |&t: &ModelType| found.as_str() == Some(t.name());
    let unknown = || ConfigError::ModelType { found: found.as_str().map_or_else(|| found.to_string(), str::to_owned) };
    ModelType::ALL.into_iter().find(named).ok_or_else(unknown)
}

fn layers(keys: &Keys<'_>) -> Result<u32, ConfigError> {
    let layers = keys.size("num_hidden_layers")?;
    if layers > MAX_LAYERS { Err(ConfigError::TooManyLayers { limit: MAX_LAYERS, found: layers }) } else { Ok(layers) }
}

fn kv_heads(keys: &Keys<'_>, heads: u32) -> Result<u32, ConfigError> {
    let kv_heads = match keys.get("num_key_value_heads") {
        // A null means this in every class; a missing key only in Llama's, the others' default is one certain model's.
        Some(Value::Null) => heads,
        None if keys.model_type == ModelType::Llama => heads,
        _ => keys.size("num_key_value_heads")?,
    };
    divide("num_attention_heads", heads, "num_key_value_heads", kv_heads)?;
    Ok(kv_heads)
}

fn head_dim(keys: &Keys<'_>, hidden: u32, heads: u32) -> Result<u32, ConfigError> {
    let head_dim = match keys.optional_size("head_dim")? {
        Some(head_dim) => head_dim,
        None if keys.model_type == ModelType::Qwen3 => return Err(keys.missing("head_dim")),
        None => divide("hidden_size", hidden, "num_attention_heads", heads)?,
    };
    if !head_dim.is_multiple_of(2) {
        return Err(keys.bad("head_dim", "even: the rotary embedding turns pairs", &head_dim.into()));
    }
    heads.checked_mul(head_dim).ok_or(ConfigError::Overflow { heads, head_dim })?;
    Ok(head_dim)
}

fn divide(key: &'static str, value: u32, divisor_key: &'static str, divisor: u32) -> Result<u32, ConfigError> {
    let quotient = value.checked_div(divisor).filter(|_| value.is_multiple_of(divisor));
    quotient.ok_or(ConfigError::Indivisible { key, value, divisor_key, divisor })
}

/// The window of those layers that have one; `None` where no layer has.
fn sliding_window(keys: &Keys<'_>, layers: u32) -> Result<Option<u32>, ConfigError> {
    const DEFAULT: u32 = 4096;
    let window = || match keys.get("sliding_window") {
        None => Ok(Some(DEFAULT)),
        Some(_) => keys.optional_size("sliding_window"),
    };
    match keys.model_type {
        ModelType::Llama => Ok(None),
        ModelType::Mistral => window(),
        ModelType::Qwen2 | ModelType::Qwen3 => {
            let slides = keys.flag("use_sliding_window", false)? && sliding_layers(keys, layers)?.contains(&true);
            if slides { window() } else { Ok(None) }
        }
    }
}

/// The attention of each layer, where the layers that slide see `window` tokens.
fn layer_attention(keys: &Keys<'_>, layers: u32, window: Option<u32>) -> Result<Vec<LayerAttention>, ConfigError> {
    let of = |slides: bool| LayerAttention { window: window.filter(|_| slides), rotary: true };
    match keys.model_type {
        ModelType::Llama => Ok(vec![LayerAttention::FULL; layers as usize]),
        ModelType::Mistral => Ok(vec![of(true); layers as usize]),
        ModelType::Qwen2 | ModelType::Qwen3 => Ok(sliding_layers(keys, layers)?.into_iter().map(of).collect()),
    }
}

/// Which layers have a window: by `layer_types`, or else from layer `max_window_layers` on.
fn sliding_layers(keys: &Keys<'_>, layers: u32) -> Result<Vec<bool>, ConfigError> {
    const DEFAULT_MAX_WINDOW_LAYERS: u32 = 28;
    match keys.get("layer_types") {
        None | Some(Value::Null) => {
            let first = keys.optional_count("max_window_layers")?.unwrap_or(DEFAULT_MAX_WINDOW_LAYERS);
            Ok((0..layers).map(|layer| layer >= first).collect())
        }
        Some(types) => {
            let bad = || keys.bad("layer_types", "one of full_attention, sliding_attention for each layer", types);
            let listed = types.as_array().filter(|listed| listed.len() == layers as usize).ok_or_else(bad)?;
            let slides = |name: &Value| match name.as_str() {
                Some("full_attention") => Ok(false),
                Some("sliding_attention") => Ok(true),
                _ => Err(bad()),
            };
            listed.iter().map(slides).collect()
        }
    }
}

#[cfg(test)]
mod tests;

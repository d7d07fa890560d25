//! The configuration of a model in config.json. A missing key has the default of its class in
//! transformers 5.24, unless that default is a size of one particular model: then the key is
//! required.

mod attention;
mod error;
mod keys;
mod python;
mod rope;

use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::families::model_types;
use super::family::{Absent, Bias, Dim, Family, PROJECTION_TENSORS, Part, Scale, Scope, When, projections_of};
use crate::format::Role;
use crate::format::files::GENERATION_CONFIG;
pub use attention::LayerAttention;
pub use error::ConfigError;
pub(crate) use keys::Keys;
pub use python::standard_json;
pub use rope::Rope;
#[cfg(any(test, feature = "train"))]
pub use rope::RopeScaling;

/// The maximum number of layers: a pack cannot number more.
pub const MAX_LAYERS: u32 = 1 << 16;

/// A decoder-only transformer.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// The family of its `model_type`.
    pub(crate) family: &'static Family,
    /// Features of the residual stream.
    pub hidden: u32,
    /// Features inside the feed-forward network.
    pub intermediate: u32,
    /// Number of layers; at most 65,536.
    pub layers: u32,
    /// Query heads.
    pub heads: u32,
    /// Key and value heads; divides `heads`.
    pub kv_heads: u32,
    /// Features of a head; even. `heads * head_dim` need not be `hidden`.
    pub head_dim: u32,
    /// Rows of the embedding.
    pub vocab: u32,
    /// The number that RMSNorm adds to the mean square.
    pub rms_norm_eps: f64,
    /// The rotary embedding of the layers that have one.
    pub(crate) rope: Rope,
    /// The rotary embedding of layers with a window, if it is another one.
    pub(crate) windowed_rope: Option<Rope>,
    /// Whether a checkpoint may lack the output projection, because the embedding takes its place.
    /// A pack may have it in any case.
    pub tied: bool,
    /// Whether queries and keys are normalised per head.
    pub q_k_norm: bool,
    /// Whether the query, key and value projections have biases.
    pub qkv_bias: bool,
    /// Whether attention's output projection has a bias.
    pub o_bias: bool,
    /// Whether the feed-forward projections have biases.
    pub mlp_bias: bool,
    /// The factor of embeddings.
    pub embedding_multiplier: f64,
    /// The factor of the outputs of attention and of the feed-forward network, before they are
    /// added to the residual.
    pub residual_multiplier: f64,
    /// The factor of the product of a query and a key before the softmax; usually
    /// `1 / sqrt(head_dim)`.
    pub attention_multiplier: f64,
    /// The divisor of the logits.
    pub logits_scaling: f64,
    /// The attention of each layer, in order; read it through [`ModelConfig::attention`].
    pub(crate) layer_attention: Vec<LayerAttention>,
    /// The positions of the model's training.
    pub max_position_embeddings: u32,
    /// Tokens that end a text; those of generation_config.json if it names some.
    pub eos_token_ids: Vec<u32>,
    /// Keys of the rotary embedding's parameters that have no effect. transformers warns of them,
    /// too.
    pub ignored_keys: Vec<String>,
}

impl ModelConfig {
    /// The `model_type`s that are supported.
    pub fn model_types() -> impl Iterator<Item = &'static str> {
        model_types()
    }

    /// The class of a supported `model_type` in transformers.
    pub fn class_of(model_type: &str) -> Option<&'static str> {
        Family::find(model_type).map(|family| family.class)
    }

    /// Reads config.json and, if there is one, generation_config.json. The latter is ignored if it
    /// is not JSON, as in transformers.
    ///
    /// # Errors
    /// A [`ConfigError`] that names the key.
    pub fn parse(config_json: &[u8], generation_config: Option<&[u8]>) -> Result<Self, ConfigError> {
        let config = object("config.json", config_json)?;
        let generation = generation_config.filter(|bytes| not_json(bytes).is_none());
        let generation = generation.map(|bytes| object(GENERATION_CONFIG, bytes)).transpose()?;
        Self::read(&config, generation.as_ref())
    }

    /// Reads the object of config.json and, if there is one, that of generation_config.json. If
    /// config.json belongs to a model of text and images, its `text_config` is read.
    ///
    /// # Errors
    /// A [`ConfigError`] that names the key.
    pub fn read(config: &Map<String, Value>, generation: Option<&Map<String, Value>>) -> Result<Self, ConfigError> {
        let outer = Keys::new("config.json", config);
        let nested = outer.inner("text_config")?;
        let is_nested = nested.is_some();
        let mut keys = nested.unwrap_or_else(|| outer.clone());
        let family = family(&keys)?;
        keys.model_type = family.model_type;
        let keys = &keys;
        let names = [family.activation.names(), family.activation_aliases].concat();
        let default = names.first().copied().unwrap_or_default();
        keys.one_of(family.activation_key, default, &names, family.activation.expected())?;
        if let Some((key, found)) = family.unsupported.iter().find_map(|key| Some((key, keys.truthy(key)?))) {
            return Err(keys.bad(key, "null or absent: no kernel does this", found));
        }
        let (hidden, heads) = (keys.size("hidden_size")?, keys.size("num_attention_heads")?);
        let head_dim = head_dim(keys, family, hidden, heads)?;
        let layers = layers(keys)?;
        let max_positions = keys.optional_size("max_position_embeddings")?.unwrap_or(family.max_positions);
        let layer_attention = LayerAttention::read(keys, family, layers, is_nested)?;
        let mut ignored_keys = Vec::new();
        let (rope, windowed_rope) = Rope::read(keys, family, head_dim, max_positions, &mut ignored_keys)?;
        let scale = |scale| scale_of(keys, scale, hidden);
        Ok(Self {
            family,
            hidden,
            intermediate: keys.size("intermediate_size")?,
            layers,
            heads,
            kv_heads: kv_heads(keys, family, heads)?,
            head_dim,
            vocab: keys.size("vocab_size")?,
            rms_norm_eps: epsilon(keys, family)?,
            rope,
            windowed_rope,
            // Models of text and images say it outside, inside or in both places.
            tied: keys.flag(TIED, family.tied)? || outer.flag(TIED, false)?,
            q_k_norm: family.q_k_norm,
            qkv_bias: bias(keys, family.qkv_bias)?,
            o_bias: bias(keys, family.o_bias)?,
            mlp_bias: bias(keys, family.mlp_bias)?,
            embedding_multiplier: scale(family.scales.embedding)?.unwrap_or(1.0),
            residual_multiplier: scale(family.scales.residual)?.unwrap_or(1.0),
            attention_multiplier: scale(family.scales.attention)?.unwrap_or(1.0 / f64::from(head_dim).sqrt()),
            logits_scaling: scale(family.scales.logits)?.unwrap_or(1.0),
            layer_attention,
            max_position_embeddings: max_positions,
            eos_token_ids: eos_token_ids(keys, &outer, family, generation)?,
            ignored_keys,
        })
    }

    /// The attention of `layer`.
    #[cfg(any(test, feature = "train"))]
    pub(crate) fn attention(&self, layer: u32) -> LayerAttention {
        self.layer_attention.get(layer as usize).copied().unwrap_or(LayerAttention { window: None, rotary: true })
    }

    /// Rows of the query projection.
    pub fn queries(&self) -> u32 {
        self.heads * self.head_dim
    }

    /// Rows of the key and of the value projection.
    pub fn keys(&self) -> u32 {
        self.kv_heads * self.head_dim
    }

    /// Whether such a model has a part. A tied model may have an output projection, too.
    pub(crate) fn has(&self, part: &Part) -> bool {
        match part.when {
            When::Always => true,
            When::QkNorm => self.q_k_norm,
            When::QkvBias => self.qkv_bias,
            When::OBias => self.o_bias,
            When::MlpBias => self.mlp_bias,
            When::Head => !self.tied,
        }
    }

    /// The shape of a part.
    pub(crate) fn shape(&self, part: &Part) -> Vec<u64> {
        let size = |dim: &Dim| match dim {
            Dim::Hidden => self.hidden,
            Dim::Intermediate => self.intermediate,
            Dim::Vocabulary => self.vocab,
            Dim::Head => self.head_dim,
            Dim::Queries => self.queries(),
            Dim::Keys => self.keys(),
            Dim::QueriesKeysValues => self.queries().saturating_add(self.keys().saturating_mul(2)),
            Dim::GateAndUp => self.intermediate.saturating_mul(2),
        };
        part.shape.iter().map(|dim| size(dim).into()).collect()
    }

    /// Inputs and outputs of the tensor of projections with this role; `None` for a role that is
    /// none, or not in this model.
    pub fn projection(&self, role: Role) -> Option<(u32, u32)> {
        let part = self.family.part(role).filter(|part| self.has(part))?;
        let [outputs, inputs] = self.shape(part).try_into().ok()?;
        Some((u32::try_from(inputs).ok()?, u32::try_from(outputs).ok()?))
    }

    /// The rows of a tensor that are a projection; `None` for a role that is none.
    pub(crate) fn rows_of(&self, projection: Role) -> Option<TensorRows> {
        let tensor = PROJECTION_TENSORS
            .into_iter()
            .find(|&tensor| projections_of(tensor).contains(&projection) && self.family.part(tensor).is_some())?;
        let (inputs, outputs) = self.projection(tensor)?;
        let mut first = 0_u32;
        for &role in projections_of(tensor) {
            let count = if tensor.is_fused() { self.outputs_in_fused(role) } else { outputs };
            if role == projection {
                return Some(TensorRows { tensor, inputs, outputs, first, count });
            }
            first = first.saturating_add(count);
        }
        None
    }

    /// The outputs of a projection that may be fused with others.
    fn outputs_in_fused(&self, projection: Role) -> u32 {
        match projection {
            Role::QProj => self.queries(),
            Role::KProj | Role::VProj => self.keys(),
            _ => self.intermediate,
        }
    }

    /// Every part of the model with its layer: the parts before the layers, the layers, the rest.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (&'static Part, Option<u32>)> {
        let parts = self.family.parts;
        let in_layer = |part: &Part| part.scope == Scope::Layer;
        let (before, after) = parts.split_at(parts.iter().position(in_layer).unwrap_or(parts.len()));
        let once = move |parts: &'static [Part]| {
            parts.iter().filter(move |part| !in_layer(part) && self.has(part)).map(|part| (part, None))
        };
        let of_layer = move |layer| {
            parts.iter().filter(move |part| in_layer(part) && self.has(part)).map(move |part| (part, Some(layer)))
        };
        once(before).chain((0..self.layers).flat_map(of_layer)).chain(once(after))
    }
}

/// The rows of a tensor that are one projection of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TensorRows {
    /// The role of the tensor.
    pub tensor: Role,
    /// Inputs of the projection, and columns of the tensor.
    pub inputs: u32,
    /// Rows of the tensor.
    pub outputs: u32,
    /// The first row of the projection.
    pub first: u32,
    /// Rows of the projection.
    pub count: u32,
}

const TIED: &str = "tie_word_embeddings";

fn object(file: &'static str, bytes: &[u8]) -> Result<Map<String, Value>, ConfigError> {
    serde_json::from_slice(&standard_json(bytes)).map_err(|source| ConfigError::Json { file, source })
}

/// Why a configuration is not JSON, as Python reads it.
pub fn not_json(bytes: &[u8]) -> Option<serde_json::Error> {
    serde_json::from_slice::<IgnoredAny>(&standard_json(bytes)).err()
}

fn family(keys: &Keys<'_>) -> Result<&'static Family, ConfigError> {
    const KEY: &str = "model_type";
    let found = keys.get(KEY).ok_or_else(|| keys.missing(KEY))?;
    let found = found.as_str().ok_or_else(|| keys.bad(KEY, "a string", found))?;
    Family::find(found).ok_or_else(|| ConfigError::ModelType { found: found.to_owned() })
}

/// The number of layers by config.json, without a look at the rest of it. `None` if it names none.
pub(crate) fn layer_count(config_json: &[u8]) -> Option<u64> {
    let config = object("config.json", config_json).ok()?;
    let outer = Keys::new("config.json", &config);
    let keys = outer.inner("text_config").ok()?.unwrap_or_else(|| outer.clone());
    keys.get("num_hidden_layers")?.as_u64()
}

fn layers(keys: &Keys<'_>) -> Result<u32, ConfigError> {
    // Layers that differ in size: transformers' heterogeneous models.
    let is_empty = |found: &Value| found.as_object().is_some_and(Map::is_empty);
    if let Some(found) = keys.given("per_layer_config").filter(|found| !is_empty(found)) {
        return Err(keys.bad("per_layer_config", "absent: one description is read for all layers", found));
    }
    let layers = keys.size("num_hidden_layers")?;
    if layers > MAX_LAYERS { Err(ConfigError::TooManyLayers { limit: MAX_LAYERS, found: layers }) } else { Ok(layers) }
}

fn kv_heads(keys: &Keys<'_>, family: &Family, heads: u32) -> Result<u32, ConfigError> {
    const KEY: &str = "num_key_value_heads";
    let kv_heads = match keys.get(KEY) {
        // A null means this in every class.
        Some(Value::Null) => heads,
        None if family.kv_heads == Absent::Derived => heads,
        _ => keys.size(KEY)?,
    };
    divide("num_attention_heads", heads, KEY, kv_heads)?;
    Ok(kv_heads)
}

fn head_dim(keys: &Keys<'_>, family: &Family, hidden: u32, heads: u32) -> Result<u32, ConfigError> {
    const KEY: &str = "head_dim";
    let derived = || divide("hidden_size", hidden, "num_attention_heads", heads);
    let head_dim = match (keys.get(KEY), family.head_dim) {
        (None, Absent::Derived) | (Some(Value::Null), Absent::Derived | Absent::Required) => derived()?,
        _ => keys.size(KEY)?,
    };
    if !head_dim.is_multiple_of(2) {
        return Err(keys.bad(KEY, "even: the rotary embedding turns pairs", &head_dim.into()));
    }
    heads.checked_mul(head_dim).ok_or(ConfigError::Overflow { heads, head_dim })?;
    Ok(head_dim)
}

fn divide(key: &'static str, value: u32, divisor_key: &'static str, divisor: u32) -> Result<u32, ConfigError> {
    let quotient = value.checked_div(divisor).filter(|_| value.is_multiple_of(divisor));
    quotient.ok_or(ConfigError::Indivisible { key, value, divisor_key, divisor })
}

/// The number that the norms add to the mean square; a null is an error, as in transformers.
fn epsilon(keys: &Keys<'_>, family: &Family) -> Result<f64, ConfigError> {
    let found = keys.number_if_present(family.norm.epsilon, "a number from 0 on", |eps| eps >= 0.0)?;
    Ok(found.unwrap_or(family.norm.default_epsilon))
}

fn bias(keys: &Keys<'_>, bias: Bias) -> Result<bool, ConfigError> {
    match bias {
        Bias::Never => Ok(false),
        Bias::Always => Ok(true),
        Bias::Key(key, default) => keys.flag(key, default),
    }
}

/// A scalar; `None` if the family has none.
fn scale_of(keys: &Keys<'_>, scale: Scale, hidden: u32) -> Result<Option<f64>, ConfigError> {
    let positive = |key| keys.number_if_present(key, "a number above 0", |x| x > 0.0);
    Ok(match scale {
        Scale::None => None,
        Scale::Key(key) => Some(positive(key)?.unwrap_or(1.0)),
        Scale::RootOfHidden => Some(f64::from(hidden).sqrt()),
        Scale::InverseRoot(key, default) => Some(1.0 / positive(key)?.unwrap_or(default).sqrt()),
    })
}

/// The tokens of generation_config.json if it names some, else those of config.json, which is
/// checked in both cases.
fn eos_token_ids(
    keys: &Keys<'_>,
    outer: &Keys<'_>,
    family: &Family,
    generation: Option<&Map<String, Value>>,
) -> Result<Vec<u32>, ConfigError> {
    const KEY: &str = "eos_token_id";
    let ids = keys.token_ids(KEY)?.or(outer.token_ids(KEY)?).unwrap_or_else(|| family.eos.to_vec());
    let Some(generation) = generation else { return Ok(ids) };
    let named = Keys::new(GENERATION_CONFIG, generation).token_ids(KEY)?;
    Ok(named.filter(|named| !named.is_empty()).unwrap_or(ids))
}

#[cfg(test)]
mod tests;

//! Which tensor of a checkpoint is which part of the model: `model_type` picks a row of a table, config.json gives the
//! sizes, and the names and shapes of the tensors must fit both.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::notice::Notice;
use super::source::{Checkpoint, SourceError, TensorInfo};
use crate::format::Role;

/// Layers that a model may have: as many as a pack can number.
pub const MAX_LAYERS: u64 = 1 << 16;

/// What sets one `model_type` apart, by its configuration and modelling files in transformers.
struct Architecture {
    /// As config.json says it.
    model_type: &'static str,
    /// Per-head RMSNorm of queries and keys.
    q_k_norm: bool,
    /// Biases of the query, key and value projections.
    qkv_bias: Bias,
    /// Bias of attention's output projection.
    o_bias: Bias,
    /// Biases of the feed-forward projections.
    mlp_bias: Bias,
    /// Without `num_key_value_heads`, there are as many as `num_attention_heads`. Otherwise transformers' default is the
    /// number of one certain model, and the key is required.
    kv_heads_optional: bool,
    /// Without `head_dim`, it is `hidden_size / num_attention_heads`.
    head_dim_optional: bool,
    /// `tie_word_embeddings` where config.json does not say.
    tied_by_default: bool,
}

/// Whether projections have a bias.
#[derive(Clone, Copy)]
enum Bias {
    Never,
    Always,
    /// As this key of config.json says; no where it is absent.
    Key(&'static str),
}

const ARCHITECTURES: [Architecture; 4] = [
    Architecture {
        model_type: "llama",
        q_k_norm: false,
        qkv_bias: Bias::Key("attention_bias"),
        o_bias: Bias::Key("attention_bias"),
        mlp_bias: Bias::Key("mlp_bias"),
        kv_heads_optional: true,
        head_dim_optional: true,
        tied_by_default: false,
    },
    Architecture {
        model_type: "mistral",
        q_k_norm: false,
        qkv_bias: Bias::Never,
        o_bias: Bias::Never,
        mlp_bias: Bias::Never,
        kv_heads_optional: false,
        head_dim_optional: true,
        tied_by_default: false,
    },
    Architecture {
        model_type: "qwen2",
        q_k_norm: false,
        qkv_bias: Bias::Always,
        o_bias: Bias::Never,
        mlp_bias: Bias::Never,
        kv_heads_optional: false,
        head_dim_optional: true,
        tied_by_default: false,
    },
    Architecture {
        model_type: "qwen3",
        q_k_norm: true,
        qkv_bias: Bias::Key("attention_bias"),
        o_bias: Bias::Key("attention_bias"),
        mlp_bias: Bias::Never,
        kv_heads_optional: false,
        head_dim_optional: false,
        tied_by_default: false,
    },
];

/// The `model_type`s that are converted.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    ARCHITECTURES.iter().map(|arch| arch.model_type)
}

/// One dimension of a tensor, by its meaning.
#[derive(Clone, Copy)]
enum Dim {
    Hidden,
    Intermediate,
    Vocabulary,
    /// `head_dim`.
    Head,
    /// `num_attention_heads * head_dim`.
    Queries,
    /// `num_key_value_heads * head_dim`.
    Keys,
}

/// Which models have a part.
#[derive(Clone, Copy)]
enum When {
    Always,
    QkNorm,
    QkvBias,
    OBias,
    MlpBias,
    Untied,
}

/// A tensor that a model may have.
struct Part {
    /// Its name, or what follows `model.layers.N.` in it.
    name: &'static str,
    role: Role,
    /// Its shape; weights are `[outputs, inputs]`.
    shape: &'static [Dim],
    when: When,
}

const fn part(name: &'static str, role: Role, shape: &'static [Dim], when: When) -> Part {
    Part { name, role, shape, when }
}

/// The token embedding.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// The output projection.
pub const LM_HEAD: &str = "lm_head.weight";
/// What the names of a layer's tensors start with; the layer's number follows.
const LAYER_PREFIX: &str = "model.layers.";

/// The parts that a model has once.
const MODEL_PARTS: [Part; 3] = [
    part(EMBEDDING, Role::Embedding, &[Dim::Vocabulary, Dim::Hidden], When::Always),
    part("model.norm.weight", Role::FinalNorm, &[Dim::Hidden], When::Always),
    part(LM_HEAD, Role::LmHead, &[Dim::Vocabulary, Dim::Hidden], When::Untied),
];

/// The parts that every layer has.
const LAYER_PARTS: [Part; 18] = [
    part("input_layernorm.weight", Role::InputNorm, &[Dim::Hidden], When::Always),
    part("self_attn.q_proj.weight", Role::QProj, &[Dim::Queries, Dim::Hidden], When::Always),
    part("self_attn.k_proj.weight", Role::KProj, &[Dim::Keys, Dim::Hidden], When::Always),
    part("self_attn.v_proj.weight", Role::VProj, &[Dim::Keys, Dim::Hidden], When::Always),
    part("self_attn.o_proj.weight", Role::OProj, &[Dim::Hidden, Dim::Queries], When::Always),
    part("self_attn.q_proj.bias", Role::QBias, &[Dim::Queries], When::QkvBias),
    part("self_attn.k_proj.bias", Role::KBias, &[Dim::Keys], When::QkvBias),
    part("self_attn.v_proj.bias", Role::VBias, &[Dim::Keys], When::QkvBias),
    part("self_attn.o_proj.bias", Role::OBias, &[Dim::Hidden], When::OBias),
    part("self_attn.q_norm.weight", Role::QNorm, &[Dim::Head], When::QkNorm),
    part("self_attn.k_norm.weight", Role::KNorm, &[Dim::Head], When::QkNorm),
    part("post_attention_layernorm.weight", Role::PostAttentionNorm, &[Dim::Hidden], When::Always),
    part("mlp.gate_proj.weight", Role::GateProj, &[Dim::Intermediate, Dim::Hidden], When::Always),
    part("mlp.up_proj.weight", Role::UpProj, &[Dim::Intermediate, Dim::Hidden], When::Always),
    part("mlp.down_proj.weight", Role::DownProj, &[Dim::Hidden, Dim::Intermediate], When::Always),
    part("mlp.gate_proj.bias", Role::GateBias, &[Dim::Intermediate], When::MlpBias),
    part("mlp.up_proj.bias", Role::UpBias, &[Dim::Intermediate], When::MlpBias),
    part("mlp.down_proj.bias", Role::DownBias, &[Dim::Hidden], When::MlpBias),
];

/// Whether a tensor of this role is one of the seven projections that are quantised.
fn is_projection(role: Role) -> bool {
    use Role::{DownProj, GateProj, KProj, OProj, QProj, UpProj, VProj};
    matches!(role, QProj | KProj | VProj | OProj | GateProj | UpProj | DownProj)
}

/// Why config.json and the tensors are not a model that can be converted.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ArchError {
    /// An architecture that is not in the table.
    #[error("model_type {found:?} is not supported; supported are {}", .known.join(", "))]
    UnknownModelType {
        /// What config.json says.
        found: String,
        /// What is supported.
        known: Vec<&'static str>,
    },
    /// A key without which the model is not described.
    #[error("config.json has no {key:?}, which {model_type} models need")]
    MissingKey {
        /// The model type; "all" for the key `model_type` itself.
        model_type: &'static str,
        /// The key.
        key: &'static str,
    },
    /// A key with a value that cannot be.
    #[error("config.json: {key:?} should be {expected}, found {found}")]
    BadValue {
        /// The key.
        key: &'static str,
        /// What it should be.
        expected: &'static str,
        /// What it is.
        found: Value,
    },
    /// More layers than a pack can number.
    #[error("config.json: num_hidden_layers is {found}, at most {limit} are supported")]
    TooManyLayers {
        /// Layers supported.
        limit: u64,
        /// Layers in config.json.
        found: u64,
    },
    /// A number of heads that does not divide what it has to.
    #[error("config.json: {divisor_key} = {divisor} does not divide {key} = {value}")]
    Indivisible {
        /// The key whose value is divided.
        key: &'static str,
        /// Its value.
        value: u64,
        /// The key of the divisor.
        divisor_key: &'static str,
        /// Its value.
        divisor: u64,
    },
    /// Heads times head size does not fit in 64 bits.
    #[error("config.json: {heads} heads of {head_dim} elements are too many")]
    Overflow {
        /// Number of heads.
        heads: u64,
        /// Elements of a head.
        head_dim: u64,
    },
    /// A part of the model is not in the checkpoint.
    #[error("tensor {tensor:?} is missing in the checkpoint")]
    MissingTensor {
        /// The name that it should have.
        tensor: String,
    },
    /// A tensor whose shape is not the one that config.json makes it have.
    #[error("tensor {tensor:?} has the shape {found:?}, by config.json it should have {expected:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Shape by config.json.
        expected: Vec<u64>,
        /// Shape in the checkpoint.
        found: Vec<u64>,
    },
    /// A tensor of a layer that the model does not have.
    #[error("tensor {tensor:?} belongs to a layer beyond the {layers} of config.json")]
    ExtraLayer {
        /// The tensor.
        tensor: String,
        /// Layers by config.json.
        layers: u32,
    },
    /// A projection, bias or norm that such a model does not have.
    #[error("tensor {tensor:?} has no place in a {model_type} model with this config.json")]
    UnexpectedTensor {
        /// The tensor.
        tensor: String,
        /// The model type.
        model_type: &'static str,
    },
}

/// What the tensors of a checkpoint are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Model {
    /// As config.json says it.
    pub model_type: &'static str,
    /// Number of layers.
    pub layers: u32,
    /// Whether config.json ties the output projection to the embedding. [`Role::LmHead`] may be there all the same, and
    /// then differs: see [`resolve_tied`].
    pub tied: bool,
    /// The tensors of the model in the order of the checkpoint: every one, but for a tied output projection that
    /// [`resolve_tied`] dropped.
    pub tensors: Vec<Placed>,
}

/// One tensor and its place in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Index into [`Checkpoint::tensors`].
    pub tensor: usize,
    /// What it is; [`Role::Other`] where the architecture does not name it.
    pub role: Role,
    /// Its layer.
    pub layer: Option<u32>,
    /// Its expert in a mixture of experts; no supported architecture has any yet.
    pub expert: Option<u32>,
    /// Whether it is one of the seven projections, which are quantised.
    pub quantise: bool,
}

/// The sizes in config.json that shapes depend on.
struct Sizes {
    arch: &'static Architecture,
    layers: u32,
    hidden: u64,
    intermediate: u64,
    vocabulary: u64,
    head_dim: u64,
    queries: u64,
    keys: u64,
    tied: bool,
    qkv_bias: bool,
    o_bias: bool,
    mlp_bias: bool,
}

impl Sizes {
    fn read(config: &Map<String, Value>) -> Result<Self, ArchError> {
        let arch = architecture(config)?;
        let keys = Keys { config, model_type: arch.model_type };
        let (hidden, heads) = (keys.size("hidden_size")?, keys.size("num_attention_heads")?);
        let layers = keys.size("num_hidden_layers")?;
        let too_many = ArchError::TooManyLayers { limit: MAX_LAYERS, found: layers };
        let layers = u32::try_from(layers).ok().filter(|_| layers <= MAX_LAYERS).ok_or(too_many)?;
        let kv_heads = match config.get("num_key_value_heads") {
            None if !arch.kv_heads_optional => return Err(keys.missing("num_key_value_heads")),
            // A null means this in every architecture of the table.
            None | Some(Value::Null) => heads,
            Some(_) => keys.size("num_key_value_heads")?,
        };
        divide("num_attention_heads", heads, "num_key_value_heads", kv_heads)?;
        let head_dim = match config.get("head_dim") {
            None | Some(Value::Null) if arch.head_dim_optional => {
                divide("hidden_size", hidden, "num_attention_heads", heads)?
            }
            _ => keys.size("head_dim")?,
        };
        let width = |heads: u64| heads.checked_mul(head_dim).ok_or(ArchError::Overflow { heads, head_dim });
        keys.epsilon("rms_norm_eps")?;
        let bias = |bias| match bias {
            Bias::Never => Ok(false),
            Bias::Always => Ok(true),
            Bias::Key(key) => keys.flag(key, false),
        };
        Ok(Self {
            arch,
            layers,
            hidden,
            intermediate: keys.size("intermediate_size")?,
            vocabulary: keys.size("vocab_size")?,
            head_dim,
            queries: width(heads)?,
            keys: width(kv_heads)?,
            tied: keys.flag("tie_word_embeddings", arch.tied_by_default)?,
            qkv_bias: bias(arch.qkv_bias)?,
            o_bias: bias(arch.o_bias)?,
            mlp_bias: bias(arch.mlp_bias)?,
        })
    }

    fn shape(&self, part: &Part) -> Vec<u64> {
        let size = |dim: &Dim| match dim {
            Dim::Hidden => self.hidden,
            Dim::Intermediate => self.intermediate,
            Dim::Vocabulary => self.vocabulary,
            Dim::Head => self.head_dim,
            Dim::Queries => self.queries,
            Dim::Keys => self.keys,
        };
        part.shape.iter().map(size).collect()
    }

    fn has(&self, part: &Part) -> bool {
        match part.when {
            When::Always => true,
            When::QkNorm => self.arch.q_k_norm,
            When::QkvBias => self.qkv_bias,
            When::OBias => self.o_bias,
            When::MlpBias => self.mlp_bias,
            When::Untied => !self.tied,
        }
    }
}

/// The table's row for the configuration's `model_type`.
fn architecture(config: &Map<String, Value>) -> Result<&'static Architecture, ArchError> {
    const KEY: &str = "model_type";
    let found = config.get(KEY).ok_or(ArchError::MissingKey { model_type: "all", key: KEY })?;
    let bad = || ArchError::BadValue { key: KEY, expected: "a string", found: found.clone() };
    let found = found.as_str().ok_or_else(bad)?;
    let unknown = || ArchError::UnknownModelType { found: found.to_owned(), known: model_types().collect() };
    ARCHITECTURES.iter().find(|arch| arch.model_type == found).ok_or_else(unknown)
}

/// The quotient of two values of config.json, where there is no remainder.
fn divide(key: &'static str, value: u64, divisor_key: &'static str, divisor: u64) -> Result<u64, ArchError> {
    let quotient = value.checked_div(divisor).filter(|_| value.is_multiple_of(divisor));
    quotient.ok_or(ArchError::Indivisible { key, value, divisor_key, divisor })
}

/// Typed access to config.json.
struct Keys<'a> {
    config: &'a Map<String, Value>,
    model_type: &'static str,
}

impl Keys<'_> {
    fn missing(&self, key: &'static str) -> ArchError {
        ArchError::MissingKey { model_type: self.model_type, key }
    }

    fn required(&self, key: &'static str) -> Result<&Value, ArchError> {
        self.config.get(key).ok_or_else(|| self.missing(key))
    }

    /// A whole number from 1 on.
    fn size(&self, key: &'static str) -> Result<u64, ArchError> {
        let found = self.required(key)?;
        let bad = || ArchError::BadValue { key, expected: "a whole number from 1 on", found: found.clone() };
        found.as_u64().filter(|&n| n > 0).ok_or_else(bad)
    }

    /// A boolean, or `default` where the key is absent.
    fn flag(&self, key: &'static str, default: bool) -> Result<bool, ArchError> {
        let bad = |found: &Value| ArchError::BadValue { key, expected: "true or false", found: found.clone() };
        self.config.get(key).map_or(Ok(default), |found| found.as_bool().ok_or_else(|| bad(found)))
    }

    /// The small number that a norm adds; the converter needs it only to be there for those who run the model.
    fn epsilon(&self, key: &'static str) -> Result<(), ArchError> {
        let found = self.required(key)?;
        let bad = || ArchError::BadValue { key, expected: "a number from 0 on", found: found.clone() };
        found.as_f64().filter(|&eps| eps >= 0.0).map(|_| ()).ok_or_else(bad)
    }
}

/// Finds the place of every tensor, by names and shapes alone.
///
/// # Errors
///
/// An [`ArchError`] that names the key or the tensor: a part that is missing, has another shape or too many.
pub fn place(config: &Map<String, Value>, tensors: &[TensorInfo]) -> Result<Model, ArchError> {
    let sizes = Sizes::read(config)?;
    let mut places = Places {
        sizes: &sizes,
        tensors,
        by_name: tensors.iter().enumerate().map(|(i, tensor)| (tensor.name.as_str(), i)).collect(),
        placed: vec![None; tensors.len()],
    };
    for part in &MODEL_PARTS {
        places.take(part, None)?;
    }
    for layer in 0..sizes.layers {
        for part in &LAYER_PARTS {
            places.take(part, Some(layer))?;
        }
    }
    let placed = tensors.iter().zip(places.placed).enumerate().map(|(i, (tensor, placed))| match placed {
        Some(placed) => Ok(placed),
        None => place_other(&sizes, i, tensor),
    });
    Ok(Model {
        model_type: sizes.arch.model_type,
        layers: sizes.layers,
        tied: sizes.tied,
        tensors: placed.collect::<Result<_, _>>()?,
    })
}

/// The search for the parts of a model among its tensors.
struct Places<'a> {
    sizes: &'a Sizes,
    tensors: &'a [TensorInfo],
    by_name: HashMap<&'a str, usize>,
    /// One a tensor: its place, once found.
    placed: Vec<Option<Placed>>,
}

impl Places<'_> {
    /// Finds the tensor of `part` and checks its shape.
    fn take(&mut self, part: &Part, layer: Option<u32>) -> Result<(), ArchError> {
        // The one part that may be there although it need not: an output projection beside a tied embedding.
        let optional = matches!(part.role, Role::LmHead) && self.sizes.tied;
        if !self.sizes.has(part) && !optional {
            return Ok(());
        }
        let name = match layer {
            Some(layer) => format!("{LAYER_PREFIX}{layer}.{}", part.name),
            None => part.name.to_owned(),
        };
        let found = self.by_name.get(name.as_str()).and_then(|&i| Some((i, self.tensors.get(i)?)));
        let Some((i, tensor)) = found else {
            return if optional { Ok(()) } else { Err(ArchError::MissingTensor { tensor: name }) };
        };
        let expected = self.sizes.shape(part);
        if tensor.shape != expected {
            return Err(ArchError::Shape { tensor: name, expected, found: tensor.shape.clone() });
        }
        if let Some(slot) = self.placed.get_mut(i) {
            let quantise = is_projection(part.role);
            *slot = Some(Placed { tensor: i, role: part.role, layer, expert: None, quantise });
        }
        Ok(())
    }
}

/// The place of a tensor that is no part of the model; an error where it looks like one.
fn place_other(sizes: &Sizes, i: usize, tensor: &TensorInfo) -> Result<Placed, ArchError> {
    let name = tensor.name.as_str();
    let layer = layer_of(name);
    if layer.is_some_and(|(layer, _)| layer >= u64::from(sizes.layers)) {
        return Err(ArchError::ExtraLayer { tensor: name.to_owned(), layers: sizes.layers });
    }
    let known = layer.is_some_and(|(_, rest)| LAYER_PARTS.iter().any(|part| part.name == rest));
    if known || name.split('.').any(|word| word.ends_with("_proj")) {
        return Err(ArchError::UnexpectedTensor { tensor: name.to_owned(), model_type: sizes.arch.model_type });
    }
    let layer = layer.and_then(|(layer, _)| u32::try_from(layer).ok());
    Ok(Placed { tensor: i, role: Role::Other, layer, expert: None, quantise: false })
}

/// The layer that a name gives, and what follows it; a number that no u64 holds counts as the largest.
fn layer_of(name: &str) -> Option<(u64, &str)> {
    let (number, rest) = name.strip_prefix(LAYER_PREFIX)?.split_once('.')?;
    let canonical =
        !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit()) && (number == "0" || !number.starts_with('0'));
    canonical.then(|| (number.parse().unwrap_or(u64::MAX), rest))
}

/// Settles what becomes of an output projection that config.json ties to the embedding: one that repeats the embedding is
/// dropped from `model`, one that differs stays. Reads both tensors.
///
/// # Errors
///
/// [`SourceError::Io`] where the tensors cannot be read.
pub fn resolve_tied(model: &mut Model, checkpoint: &Checkpoint) -> Result<Option<Notice>, SourceError> {
    let tensor = |role| {
        let placed = model.tensors.iter().find(|placed| placed.role == role)?;
        checkpoint.tensors.get(placed.tensor)
    };
    let (true, Some(embedding), Some(head)) = (model.tied, tensor(Role::Embedding), tensor(Role::LmHead)) else {
        return Ok(None);
    };
    if !checkpoint.same_bytes(embedding, head)? {
        return Ok(Some(Notice::TiedHeadDiffers));
    }
    model.tensors.retain(|placed| placed.role != Role::LmHead);
    Ok(Some(Notice::TiedHeadDropped))
}

#[cfg(test)]
mod tests;

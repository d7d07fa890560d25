//! The description of one `model_type`, as data. The converter takes names, roles and shapes from
//! here, the trainer sizes, LoRA its targets. CONTRIBUTING.md says how to add a family.
//!
//! Not described yet, because no supported family needs it: experts (a [`Part`] has no expert
//! number).

use crate::format::Role;

/// One `model_type`, by its configuration and modelling files in transformers 5.24.
#[derive(Debug)]
pub struct Family {
    /// Its name in config.json.
    pub model_type: &'static str,
    /// Its class in transformers, which `architectures` of config.json names.
    pub class: &'static str,
    /// Every tensor that a model may have, in the order of its layers.
    pub parts: &'static [Part],
    /// The norms of the layers and of the output.
    pub norm: Norm,
    /// Whether queries and keys have an RMSNorm per head.
    pub q_k_norm: bool,
    /// Biases of the query, key and value projections.
    pub qkv_bias: Bias,
    /// Bias of attention's output projection.
    pub o_bias: Bias,
    /// Biases of the feed-forward projections.
    pub mlp_bias: Bias,
    /// The function between the feed-forward projections.
    pub activation: Activation,
    /// The key of config.json that names it.
    pub activation_key: &'static str,
    /// Values of this key that mean another function elsewhere, and this one in the family.
    pub activation_aliases: &'static [&'static str],
    /// The meaning of a missing `num_key_value_heads`.
    pub kv_heads: Absent,
    /// The meaning of a missing `head_dim`.
    pub head_dim: Absent,
    /// Which layers have a sliding window.
    pub windows: Windows,
    /// Which layers have a rotary embedding.
    pub rotary: Rotary,
    /// The base wavelength of the rotary embedding without `rope_theta`.
    pub theta: f64,
    /// The rotary embedding of layers with a window, if it has parameters of its own.
    pub windowed_rotary: Option<WindowedRotary>,
    /// Whether only a part of each head is rotated, as `partial_rotary_factor` says.
    pub partial_rotary: bool,
    /// The scalings of the rotary embedding, by their `rope_type`.
    pub rope_types: &'static [&'static str],
    /// The scalars.
    pub scales: Scales,
    /// The default of `tie_word_embeddings`.
    pub tied: bool,
    /// The default of `max_position_embeddings`.
    pub max_positions: u32,
    /// The default of `eos_token_id`.
    pub eos: &'static [u32],
    /// Keys that must be absent, or what Python takes for false: no kernel does what they ask for.
    pub unsupported: &'static [&'static str],
}

/// The defaults: what most decoders do. A family's file states the differences.
pub const DECODER: Family = Family {
    model_type: "",
    class: "",
    parts: &PARTS,
    norm: Norm { weight_offset: 0.0, epsilon: "rms_norm_eps", default_epsilon: 1e-6 },
    q_k_norm: false,
    qkv_bias: Bias::Never,
    o_bias: Bias::Never,
    mlp_bias: Bias::Never,
    activation: Activation::Silu,
    activation_key: "hidden_act",
    activation_aliases: &[],
    kv_heads: Absent::Required,
    head_dim: Absent::Derived,
    windows: Windows::None,
    rotary: Rotary::EveryLayer,
    theta: 10_000.0,
    windowed_rotary: None,
    partial_rotary: false,
    rope_types: &["default", "linear", "dynamic", "llama3", "yarn"],
    scales: Scales { embedding: Scale::None, residual: Scale::None, attention: Scale::None, logits: Scale::None },
    tied: false,
    max_positions: 2048,
    eos: &[],
    unsupported: &[],
};

/// The norms of a family.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// The number that is added to the stored weight: 1 in some families.
    pub weight_offset: f64,
    /// The key of the number that is added to the mean square.
    pub epsilon: &'static str,
    /// The default of that key.
    pub default_epsilon: f64,
}

/// Whether projections have a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// They have none.
    Never,
    /// They have one.
    Always,
    /// As this key of config.json says; its default.
    Key(&'static str, bool),
}

/// The function between the feed-forward projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `silu(gate) * up`.
    Silu,
    /// `gelu(gate) * up`, with gelu's approximation by tanh.
    GeluTanh,
}

impl Activation {
    /// The values of config.json that mean it; the first one is the default.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Self::Silu => &["silu", "swish"],
            Self::GeluTanh => &["gelu_pytorch_tanh"],
        }
    }

    /// Its names in a message.
    pub fn expected(self) -> &'static str {
        match self {
            Self::Silu => "\"silu\", or its other name \"swish\"",
            Self::GeluTanh => "\"gelu_pytorch_tanh\"",
        }
    }
}

/// The meaning of a missing size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absent {
    /// It is an error: the default of the class is the size of one certain model. A null means the
    /// same as for [`Absent::Derived`].
    Required,
    /// It is an error, and so is a null.
    Given,
    /// It follows from other sizes.
    Derived,
}

/// Which layers have a sliding window, and its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Windows {
    /// No layer.
    None,
    /// All layers have one of `sliding_window` tokens, unless that is null. With `layer_types`,
    /// transformers reads a `mistral` model as a `ministral` one: only the layers that the list
    /// names have windows.
    EveryLayer {
        /// The default of `sliding_window`.
        default: u32,
    },
    /// All layers have one of `sliding_window` tokens, if that is given.
    Same,
    /// The layers that `layer_types` names, if `use_sliding_window`; without that list the layers
    /// from `max_window_layers` on.
    Listed {
        /// The default of `sliding_window`.
        default: u32,
        /// The default of `max_window_layers`.
        first: u32,
    },
    /// The layers that `layer_types` names; without that list, if `use_sliding_window`, the layers
    /// without a rotary embedding.
    WithoutRotary,
    /// The layers that `layer_types` names; without that list all layers except every
    /// `sliding_window_pattern`-th.
    Pattern {
        /// The default of `sliding_window`.
        default: u32,
        /// The default of `sliding_window_pattern`.
        interval: u32,
    },
}

/// The parameters of the rotary embedding of layers with a window: those of `sliding_attention` in
/// `rope_parameters`. The other layers have those of `full_attention`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WindowedRotary {
    /// The key of its base wavelength in older configurations.
    pub key: &'static str,
    /// The default of that key.
    pub theta: f64,
}

/// Which layers rotate queries and keys by their positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotary {
    /// All layers.
    EveryLayer,
    /// The layers with a 1 in `no_rope_layers`; without that list all layers except every
    /// `no_rope_layer_interval`-th.
    Listed {
        /// The default of `no_rope_layer_interval`.
        interval: u32,
    },
}

/// A family's scalars.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Scales {
    /// The factor of embeddings.
    pub embedding: Scale,
    /// The factor of the outputs of attention and of the feed-forward network.
    pub residual: Scale,
    /// The factor of attention scores; `1 / sqrt(head_dim)` for [`Scale::None`].
    pub attention: Scale,
    /// The divisor of logits.
    pub logits: Scale,
}

/// A scalar.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scale {
    /// The family has none.
    None,
    /// The number under this key of config.json; 1 if it is missing.
    Key(&'static str),
    /// The square root of `hidden_size`.
    RootOfHidden,
    /// 1 divided by the square root of the number under this key; its default.
    InverseRoot(&'static str, f64),
}

/// A tensor that a model may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Its name without the prefix, which [`Scope`] gives.
    pub name: &'static str,
    /// Its role.
    pub role: Role,
    /// Its shape; weights are `[outputs, inputs]`.
    pub shape: &'static [Dim],
    /// The part of the model that has it.
    pub scope: Scope,
    /// Which models have it.
    pub when: When,
}

/// The part of a model that has a tensor, and the prefix of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// The model, outside the decoder: no prefix, usually.
    Model,
    /// The decoder, once: `model.`.
    Decoder,
    /// Each layer: `model.layers.N.`.
    Layer,
}

/// One dimension of a tensor, by its meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dim {
    /// `hidden_size`.
    Hidden,
    /// `intermediate_size`.
    Intermediate,
    /// `vocab_size`.
    Vocabulary,
    /// `head_dim`.
    Head,
    /// `num_attention_heads * head_dim`.
    Queries,
    /// `num_key_value_heads * head_dim`.
    Keys,
    /// The sum of queries, keys and values.
    QueriesKeysValues,
    /// Twice `intermediate_size`.
    GateAndUp,
}

/// Which models have a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// All models.
    Always,
    /// Models with [`Family::q_k_norm`].
    QkNorm,
    /// Models with [`Family::qkv_bias`].
    QkvBias,
    /// Models with [`Family::o_bias`].
    OBias,
    /// Models with [`Family::mlp_bias`].
    MlpBias,
    /// Models whose config.json does not tie it to the embedding. A tied model may have it, too.
    Head,
}

/// A tensor of a model.
pub const fn part(scope: Scope, name: &'static str, role: Role, shape: &'static [Dim], when: When) -> Part {
    Part { name, role, shape, scope, when }
}

/// A tensor of each layer.
pub const fn layer(name: &'static str, role: Role, shape: &'static [Dim], when: When) -> Part {
    part(Scope::Layer, name, role, shape, when)
}

/// The tensors of [`DECODER`].
const PARTS: [Part; 21] = [
    part(Scope::Decoder, "embed_tokens.weight", Role::Embedding, &[Dim::Vocabulary, Dim::Hidden], When::Always),
    layer("input_layernorm.weight", Role::InputNorm, &[Dim::Hidden], When::Always),
    layer("self_attn.q_proj.weight", Role::QProj, &[Dim::Queries, Dim::Hidden], When::Always),
    layer("self_attn.k_proj.weight", Role::KProj, &[Dim::Keys, Dim::Hidden], When::Always),
    layer("self_attn.v_proj.weight", Role::VProj, &[Dim::Keys, Dim::Hidden], When::Always),
    layer("self_attn.o_proj.weight", Role::OProj, &[Dim::Hidden, Dim::Queries], When::Always),
    layer("self_attn.q_proj.bias", Role::QBias, &[Dim::Queries], When::QkvBias),
    layer("self_attn.k_proj.bias", Role::KBias, &[Dim::Keys], When::QkvBias),
    layer("self_attn.v_proj.bias", Role::VBias, &[Dim::Keys], When::QkvBias),
    layer("self_attn.o_proj.bias", Role::OBias, &[Dim::Hidden], When::OBias),
    layer("self_attn.q_norm.weight", Role::QNorm, &[Dim::Head], When::QkNorm),
    layer("self_attn.k_norm.weight", Role::KNorm, &[Dim::Head], When::QkNorm),
    layer("post_attention_layernorm.weight", Role::PostAttentionNorm, &[Dim::Hidden], When::Always),
    layer("mlp.gate_proj.weight", Role::GateProj, &[Dim::Intermediate, Dim::Hidden], When::Always),
    layer("mlp.up_proj.weight", Role::UpProj, &[Dim::Intermediate, Dim::Hidden], When::Always),
    layer("mlp.down_proj.weight", Role::DownProj, &[Dim::Hidden, Dim::Intermediate], When::Always),
    layer("mlp.gate_proj.bias", Role::GateBias, &[Dim::Intermediate], When::MlpBias),
    layer("mlp.up_proj.bias", Role::UpBias, &[Dim::Intermediate], When::MlpBias),
    layer("mlp.down_proj.bias", Role::DownBias, &[Dim::Hidden], When::MlpBias),
    part(Scope::Decoder, "norm.weight", Role::FinalNorm, &[Dim::Hidden], When::Always),
    part(Scope::Model, "lm_head.weight", Role::LmHead, &[Dim::Vocabulary, Dim::Hidden], When::Head),
];

/// The projections that a layer computes, in their order.
pub const PROJECTIONS: [Role; 7] =
    [Role::QProj, Role::KProj, Role::VProj, Role::OProj, Role::GateProj, Role::UpProj, Role::DownProj];

/// The tensors of projections, which are quantised and which LoRA can adapt, in the order of an
/// adapter's layer. A family has a fused tensor, or those that it joins.
pub const PROJECTION_TENSORS: [Role; 9] = [
    Role::QProj,
    Role::KProj,
    Role::VProj,
    Role::QkvProj,
    Role::OProj,
    Role::GateProj,
    Role::UpProj,
    Role::GateUpProj,
    Role::DownProj,
];

/// The projections in the tensor of a role, in the order of its rows.
pub fn projections_of(tensor: Role) -> &'static [Role] {
    match tensor {
        Role::QkvProj => &[Role::QProj, Role::KProj, Role::VProj],
        Role::GateUpProj => &[Role::GateProj, Role::UpProj],
        _ => PROJECTIONS.iter().find(|&&role| role == tensor).map_or(&[], std::slice::from_ref),
    }
}

/// Families are equal if their model types are.
impl PartialEq for Family {
    fn eq(&self, other: &Self) -> bool {
        self.model_type == other.model_type
    }
}

impl Eq for Family {}

impl Family {
    /// The part with this role.
    pub fn part(&self, role: Role) -> Option<&'static Part> {
        self.parts.iter().find(|part| part.role == role)
    }
}

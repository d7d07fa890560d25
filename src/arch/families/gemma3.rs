//! Gemma 3: layers with a window have a rotary embedding of their own; each layer has four norms,
//! which add 1 to their weights; the embedding is multiplied by the square root of its width. Its
//! `attention_dropout` is left out: an adapter has a dropout of its own.

use crate::arch::family::{
    Absent, Activation, Bias, DECODER, Dim, Family, Norm, Part, Scale, Scales, Scope, When, WindowedRotary, Windows, layer,
    part,
};
use crate::format::Role;

pub(super) static FAMILY: Family = Family {
    model_type: "gemma3_text",
    class: "Gemma3ForCausalLM",
    parts: &PARTS,
    norm: Norm { weight_offset: 1.0, ..DECODER.norm },
    q_k_norm: true,
    qkv_bias: Bias::Key("attention_bias", false),
    o_bias: Bias::Key("attention_bias", false),
    activation: Activation::GeluTanh,
    activation_key: "hidden_activation",
    head_dim: Absent::Given,
    windows: Windows::Pattern { default: 4096, interval: 6 },
    theta: 1_000_000.0,
    windowed_rotary: Some(WindowedRotary { key: "rope_local_base_freq", theta: 10_000.0 }),
    rope_types: &["default", "linear", "llama3", "yarn"],
    scales: Scales {
        embedding: Scale::RootOfHidden,
        attention: Scale::InverseRoot("query_pre_attn_scalar", 256.0),
        ..DECODER.scales
    },
    tied: true,
    max_positions: 131_072,
    eos: &[1],
    unsupported: &["attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"],
    ..DECODER
};

/// `post_attention_layernorm` is the norm of attention's output, and `pre_feedforward_layernorm`
/// has the role that other families' `post_attention_layernorm` has.
const PARTS: [Part; 20] = [
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
    layer("post_attention_layernorm.weight", Role::AttentionOutputNorm, &[Dim::Hidden], When::Always),
    layer("pre_feedforward_layernorm.weight", Role::PostAttentionNorm, &[Dim::Hidden], When::Always),
    layer("mlp.gate_proj.weight", Role::GateProj, &[Dim::Intermediate, Dim::Hidden], When::Always),
    layer("mlp.up_proj.weight", Role::UpProj, &[Dim::Intermediate, Dim::Hidden], When::Always),
    layer("mlp.down_proj.weight", Role::DownProj, &[Dim::Hidden, Dim::Intermediate], When::Always),
    layer("post_feedforward_layernorm.weight", Role::FeedForwardOutputNorm, &[Dim::Hidden], When::Always),
    part(Scope::Decoder, "norm.weight", Role::FinalNorm, &[Dim::Hidden], When::Always),
    part(Scope::Model, "lm_head.weight", Role::LmHead, &[Dim::Vocabulary, Dim::Hidden], When::Head),
];

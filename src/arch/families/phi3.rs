//! Phi-3 and Phi-4: one tensor has the rows of q, k and v, another those of gate and up. Only a
//! part of each head may be rotated. Its `resid_pdrop`, `embd_pdrop` and `attention_dropout` are
//! left out: an adapter has a dropout of its own.

use crate::arch::family::{Absent, DECODER, Dim, Family, Norm, Part, Scope, When, Windows, layer, part};
use crate::format::Role;

pub(super) static FAMILY: Family = Family {
    model_type: "phi3",
    class: "Phi3ForCausalLM",
    parts: &PARTS,
    norm: Norm { default_epsilon: 1e-5, ..DECODER.norm },
    kv_heads: Absent::Derived,
    windows: Windows::Same,
    partial_rotary: true,
    rope_types: &["default"],
    max_positions: 4096,
    eos: &[32_000],
    ..DECODER
};

const PARTS: [Part; 9] = [
    part(Scope::Decoder, "embed_tokens.weight", Role::Embedding, &[Dim::Vocabulary, Dim::Hidden], When::Always),
    layer("input_layernorm.weight", Role::InputNorm, &[Dim::Hidden], When::Always),
    layer("self_attn.qkv_proj.weight", Role::QkvProj, &[Dim::QueriesKeysValues, Dim::Hidden], When::Always),
    layer("self_attn.o_proj.weight", Role::OProj, &[Dim::Hidden, Dim::Queries], When::Always),
    layer("post_attention_layernorm.weight", Role::PostAttentionNorm, &[Dim::Hidden], When::Always),
    layer("mlp.gate_up_proj.weight", Role::GateUpProj, &[Dim::GateAndUp, Dim::Hidden], When::Always),
    layer("mlp.down_proj.weight", Role::DownProj, &[Dim::Hidden, Dim::Intermediate], When::Always),
    part(Scope::Decoder, "norm.weight", Role::FinalNorm, &[Dim::Hidden], When::Always),
    part(Scope::Model, "lm_head.weight", Role::LmHead, &[Dim::Vocabulary, Dim::Hidden], When::Head),
];

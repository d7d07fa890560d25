//! Gemma, the first one: norms that add 1 to their weights, GEGLU, and an embedding that is
//! multiplied by the square root of its width. Its `attention_dropout` is left out: an adapter has
//! a dropout of its own.

use crate::arch::family::{Absent, Activation, Bias, DECODER, Family, Norm, Scale, Scales};

pub(super) static FAMILY: Family = Family {
    model_type: "gemma",
    class: "GemmaForCausalLM",
    norm: Norm { weight_offset: 1.0, ..DECODER.norm },
    qkv_bias: Bias::Key("attention_bias", false),
    o_bias: Bias::Key("attention_bias", false),
    activation: Activation::GeluTanh,
    // The first checkpoints have it, and mean the approximation by tanh.
    activation_aliases: &["gelu"],
    head_dim: Absent::Given,
    scales: Scales { embedding: Scale::RootOfHidden, ..DECODER.scales },
    tied: true,
    max_positions: 8192,
    eos: &[1],
    unsupported: &["use_bidirectional_attention"],
    ..DECODER
};

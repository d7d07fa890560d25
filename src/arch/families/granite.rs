//! Granite 3: Llama with four scalars.

use crate::arch::family::{Absent, Bias, DECODER, Family, Scales};

pub(super) static FAMILY: Family = Family {
    model_type: "granite",
    class: "GraniteForCausalLM",
    qkv_bias: Bias::Key("attention_bias", false),
    o_bias: Bias::Key("attention_bias", false),
    mlp_bias: Bias::Key("mlp_bias", false),
    kv_heads: Absent::Derived,
    scales: Scales {
        embedding: Some("embedding_multiplier"),
        residual: Some("residual_multiplier"),
        attention: Some("attention_multiplier"),
        logits: Some("logits_scaling"),
    },
    eos: &[2],
    ..DECODER
};

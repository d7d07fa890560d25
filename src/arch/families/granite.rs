//! Granite 3: Llama with four scalars.

use crate::arch::family::{Absent, Bias, DECODER, Family, Scale, Scales};

pub(super) static FAMILY: Family = Family {
    model_type: "granite",
    class: "GraniteForCausalLM",
    qkv_bias: Bias::Key("attention_bias", false),
    o_bias: Bias::Key("attention_bias", false),
    mlp_bias: Bias::Key("mlp_bias", false),
    kv_heads: Absent::Derived,
    scales: Scales {
        embedding: Scale::Key("embedding_multiplier"),
        residual: Scale::Key("residual_multiplier"),
        attention: Scale::Key("attention_multiplier"),
        logits: Scale::Key("logits_scaling"),
    },
    eos: &[2],
    ..DECODER
};

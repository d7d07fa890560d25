//! Llama, and the many models that took over its architecture.

use crate::arch::family::{Absent, Bias, DECODER, Family};

pub(super) static FAMILY: Family = Family {
    model_type: "llama",
    class: "LlamaForCausalLM",
    qkv_bias: Bias::Key("attention_bias", false),
    o_bias: Bias::Key("attention_bias", false),
    mlp_bias: Bias::Key("mlp_bias", false),
    kv_heads: Absent::Derived,
    eos: &[2],
    ..DECODER
};

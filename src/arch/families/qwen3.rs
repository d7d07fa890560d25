//! Qwen3: queries and keys are normalised per head.

use crate::arch::family::{Absent, Bias, DECODER, Family, Windows};

pub(super) static FAMILY: Family = Family {
    model_type: "qwen3",
    class: "Qwen3ForCausalLM",
    q_k_norm: true,
    qkv_bias: Bias::Key("attention_bias", false),
    o_bias: Bias::Key("attention_bias", false),
    head_dim: Absent::Given,
    windows: Windows::Listed { default: 4096, first: 28 },
    max_positions: 32_768,
    ..DECODER
};

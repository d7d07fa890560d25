//! SmolLM3: every fourth layer has no rotary embedding. The embedding is the output projection
//! unless config.json says otherwise.

use crate::arch::family::{Bias, DECODER, Family, Rotary, Windows};

pub(super) static FAMILY: Family = Family {
    model_type: "smollm3",
    class: "SmolLM3ForCausalLM",
    qkv_bias: Bias::Key("attention_bias", false),
    o_bias: Bias::Key("attention_bias", false),
    mlp_bias: Bias::Key("mlp_bias", false),
    windows: Windows::WithoutRotary,
    rotary: Rotary::Listed { interval: 4 },
    theta: 2_000_000.0,
    tied: true,
    max_positions: 32_768,
    eos: &[128_001],
    ..DECODER
};

//! Qwen2 and Qwen2.5: queries, keys and values have biases; layers may have windows.

use crate::arch::family::{Bias, DECODER, Family, Windows};

pub(super) static FAMILY: Family = Family {
    model_type: "qwen2",
    class: "Qwen2ForCausalLM",
    qkv_bias: Bias::Always,
    windows: Windows::Listed { default: 4096, first: 28 },
    max_positions: 32_768,
    ..DECODER
};

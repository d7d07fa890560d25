//! Mistral: every layer has a window, unless config.json says null.

use crate::arch::family::{DECODER, Family, Windows};

pub(super) static FAMILY: Family = Family {
    model_type: "mistral",
    class: "MistralForCausalLM",
    windows: Windows::EveryLayer { default: 4096 },
    max_positions: 131_072,
    eos: &[2],
    ..DECODER
};

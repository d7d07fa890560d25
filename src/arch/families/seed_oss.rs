//! Seed-OSS: biases of queries, keys and values, unless config.json says otherwise; that of the
//! output has a key of its own. Its `attention_dropout` and `residual_dropout` are left out: an
//! adapter has a dropout of its own.

use crate::arch::family::{Absent, Bias, DECODER, Family};

pub(super) static FAMILY: Family = Family {
    model_type: "seed_oss",
    class: "SeedOssForCausalLM",
    qkv_bias: Bias::Key("attention_bias", true),
    o_bias: Bias::Key("attention_out_bias", false),
    mlp_bias: Bias::Key("mlp_bias", false),
    head_dim: Absent::Required,
    max_positions: 524_288,
    eos: &[2],
    ..DECODER
};

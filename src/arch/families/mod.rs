//! The families, one a file.

mod granite;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;
mod seed_oss;
mod smollm3;

use super::family::Family;

/// All of them, by name.
pub(super) const ALL: &[&Family] = &[
    &granite::FAMILY,
    &llama::FAMILY,
    &mistral::FAMILY,
    &qwen2::FAMILY,
    &qwen3::FAMILY,
    &seed_oss::FAMILY,
    &smollm3::FAMILY,
];

//! The families, one a file.

mod gemma;
mod gemma3;
mod granite;
mod llama;
mod mistral;
mod phi3;
mod qwen2;
mod qwen3;
mod seed_oss;
mod smollm3;

use super::family::Family;

impl Family {
    /// Every family, by name.
    pub const ALL: &'static [&'static Self] = &[
        &gemma::FAMILY,
        &gemma3::FAMILY,
        &granite::FAMILY,
        &llama::FAMILY,
        &mistral::FAMILY,
        &phi3::FAMILY,
        &qwen2::FAMILY,
        &qwen3::FAMILY,
        &seed_oss::FAMILY,
        &smollm3::FAMILY,
    ];

    /// The family of a `model_type`.
    pub fn find(model_type: &str) -> Option<&'static Self> {
        Self::ALL.iter().copied().find(|family| family.model_type == model_type)
    }
}

/// The `model_type`s that are supported.
pub fn model_types() -> impl Iterator<Item = &'static str> {
    Family::ALL.iter().map(|family| family.model_type)
}

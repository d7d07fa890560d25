//! What a caller may choose.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use regex::Regex;

use super::encode::Encoder;
use crate::format::nf4::{DEFAULT_BLOCK_SIZE, ScaleType};

/// Choices for a conversion. The default is the smallest error at 4.25 bits a weight.
#[derive(Debug, Clone)]
pub struct Options {
    /// How scales and codes are chosen.
    pub encoder: Encoder,
    /// How scales are stored.
    pub scale_type: ScaleType,
    /// Weights per block: one of [`crate::format::nf4::BLOCK_SIZES`].
    pub block_size: u32,
    /// Projections whose name matches stay in their own float type; this wins over `quantize`.
    pub keep: Option<Regex>,
    /// Further tensors of two or more dimensions whose name matches are quantised, too (lm_head,
    /// say).
    pub quantize: Option<Regex>,
    /// Worker threads; `None` takes one per core. The output does not depend on it.
    pub threads: Option<NonZeroUsize>,
    /// A config.json to use in place of the checkpoint's.
    pub config: Option<PathBuf>,
    /// Whether an existing target is replaced.
    pub force: bool,
    /// Whether an interrupted conversion keeps its finished part in a hidden file next to the
    /// target, and whether such a part is used. The bytes are the same.
    pub resume: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            encoder: Encoder::Mse,
            scale_type: ScaleType::Bf16,
            block_size: DEFAULT_BLOCK_SIZE,
            keep: None,
            quantize: None,
            threads: None,
            config: None,
            force: false,
            resume: false,
        }
    }
}

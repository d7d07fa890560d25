//! The heads of attention, in training and over a KV cache.

use super::{Mat, same};
use crate::ops::error::OpError;

/// The heads of one attention and the scores between them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Number of query heads, a multiple of `kv_heads`.
    pub heads: u32,
    /// Number of key and value heads. Query head `h` uses head `h / (heads / kv_heads)`.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// Factor of the scores. 1 / sqrt(head_dim) in most models.
    pub scale: f32,
    /// Size of the attention window in tokens, including the token itself. `None`: no window.
    pub window: Option<u32>,
}

/// The largest head of the kernels.
pub(super) const MAX_HEAD_DIM: u32 = 256;
const _: () =
    assert!(MAX_HEAD_DIM == crate::arch::obstacle::MAX_HEAD_DIM, "convert and verify check packs against this limit");

/// The window size in the kernels for no window.
const NO_WINDOW: u32 = u32::MAX;

/// Checks a head size that kernels are compiled for.
pub(super) fn check_head_dim(operation: &'static str, head_dim: u32) -> Result<(), OpError> {
    if head_dim.is_multiple_of(4) && (4..=MAX_HEAD_DIM).contains(&head_dim) {
        return Ok(());
    }
    let expected = "a multiple of 4, from 4 to 256";
    Err(OpError::Value { operation, what: "the size of a head", expected, found: head_dim.into() })
}

impl Heads {
    /// Checks the numbers for kernels that were compiled for heads of `head_dim` elements.
    pub(super) fn check(&self, operation: &'static str, head_dim: u32) -> Result<(), OpError> {
        same(operation, "the size of a head", head_dim.into(), self.head_dim.into())?;
        let left_over = self.heads.checked_rem(self.kv_heads).map_or(1, |rest| u64::from(rest) + u64::from(self.heads == 0));
        same(operation, "the remainder of heads / kv_heads", 0, left_over)?;
        match self.window {
            Some(0) => Err(OpError::Value { operation, what: "the window size", expected: "at least 1 token", found: 0.0 }),
            _ => Ok(()),
        }
    }

    /// Checks matrices with a row per token: [tokens, heads * head_dim].
    pub(super) fn check_queries(&self, operation: &'static str, tokens: u32, mats: &[&Mat]) -> Result<(), OpError> {
        let columns = self.heads.saturating_mul(self.head_dim);
        mats.iter().try_for_each(|mat| mat.check(operation, tokens, columns))
    }

    /// Checks matrices with a row per token: [tokens, kv_heads * head_dim].
    pub(super) fn check_keys(&self, operation: &'static str, tokens: u32, mats: &[&Mat]) -> Result<(), OpError> {
        let columns = self.kv_heads.saturating_mul(self.head_dim);
        mats.iter().try_for_each(|mat| mat.check(operation, tokens, columns))
    }

    /// The window size as the kernels take it.
    pub(super) fn window_size(&self) -> u32 {
        self.window.unwrap_or(NO_WINDOW)
    }
}

//! The sizes and the tensors of one attention.

use crate::gpu::BufferRange;
use crate::ops::Mat;
use crate::ops::heads::Heads;

/// The sizes of one attention.
///
/// The samples are packed, one after another. A token attends to the tokens of its sample up to
/// itself, or to the last `window` of them if there is a window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// The first token whose query is given. Matrices of queries have the rows of the tokens from
    /// this one on.
    pub first: u32,
    /// The end of the tokens. Matrices of keys have the rows of all tokens before it, from token 0
    /// on.
    pub tokens: u32,
    /// The heads.
    pub heads: Heads,
}

impl AttentionShape {
    /// Rows of matrices of queries.
    pub fn queries(&self) -> u32 {
        self.tokens.saturating_sub(self.first)
    }
}

/// The tensors of the forward pass.
#[derive(Debug, Clone, Copy)]
pub(super) struct Forward<'a> {
    pub shape: &'a AttentionShape,
    pub q: &'a Mat,
    pub k: &'a Mat,
    pub v: &'a Mat,
    pub starts: &'a BufferRange,
    pub out: &'a Mat,
    pub lse: &'a Mat,
}

/// The other tensors of the backward pass.
#[derive(Debug, Clone, Copy)]
pub(super) struct Backward<'a> {
    pub d_out: &'a Mat,
    pub delta: &'a Mat,
    pub dq: &'a Mat,
    pub dk: &'a Mat,
    pub dv: &'a Mat,
    /// Whether `dk` and `dv` are added to what is there.
    pub add: bool,
}

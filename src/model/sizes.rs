//! The sizes of a workspace, and what its matrices are.

use crate::ops::Mat;

/// Tokens that pass through a layer together. So a longer pass needs no more memory for most
/// activations, and the products of a window of this size are nearly as fast as larger ones. A
/// multiple of 64 tokens starts at an offset that can be bound.
pub(crate) const WINDOW: u32 = 8192;

/// The sizes of a workspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Maximum tokens of a micro-batch.
    pub tokens: u32,
    /// Rank of the adapter. 0: no adapter.
    pub rank: u32,
    /// Whether adapters have dropout.
    pub dropout: bool,
    /// Whether gradients are computed.
    pub training: bool,
    /// Layers, the last ones, that keep their activations for their gradients.
    pub kept: u32,
    /// Residual streams, the first ones, that are in host memory between the forward and the
    /// backward pass. At least two are not.
    pub offloaded: u32,
    /// Whether gradients are computed from activations in f16.
    pub halves: bool,
    /// Tokens that pass through a layer together: [`WINDOW`], or fewer in tests. The order of sums
    /// depends on it.
    pub window: u32,
    /// Columns of a chunk of logits: those that `workspace::chunk` computes, or fewer in tests. The
    /// order of sums depends on it.
    pub chunk: u32,
}

/// The numbers of residual streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Streams {
    /// In GPU memory until the backward pass.
    pub saved: u32,
    /// The first ones, in host memory until the backward pass.
    pub offloaded: u32,
    /// Matrices that the others have in turn.
    pub in_turn: u32,
}

impl Sizes {
    /// The residual streams of a model of this number of layers.
    pub(crate) fn streams(&self, layers: u32) -> Streams {
        let all = layers.saturating_add(1);
        match (self.training, self.kept.min(layers)) {
            (false, _) => Streams { saved: 0, offloaded: 0, in_turn: 2 },
            (true, kept) if self.halves && kept > 0 => {
                // Layers that keep their activations in f16 have their input there.
                let others = layers - kept;
                let offloaded = self.offloaded.min(others.saturating_sub(2));
                Streams { saved: others - offloaded, offloaded, in_turn: 2 }
            }
            (true, _) => Streams { saved: all.saturating_sub(self.offloaded), offloaded: self.offloaded, in_turn: 0 },
        }
    }
}

/// A matrix, or what stands for one.
pub(crate) trait Matrix: Clone {
    /// A matrix of this shape in the same memory. It has at most the elements of this one.
    fn reshaped(&self, rows: u32, cols: u32) -> Self;
    /// Some rows of it.
    fn rows(&self, first: u32, rows: u32) -> Self;
}

impl Matrix for () {
    fn reshaped(&self, _: u32, _: u32) {}

    fn rows(&self, _: u32, _: u32) {}
}

impl Matrix for Mat {
    fn reshaped(&self, rows: u32, cols: u32) -> Self {
        self.narrow(rows, cols)
    }

    fn rows(&self, first: u32, rows: u32) -> Self {
        self.window(first, rows)
    }
}

//! Errors of the layer stream.

use thiserror::Error;

use crate::gpu::GpuError;
use crate::source::ReadError;

/// An error of the layer stream.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The pack cannot be opened or read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// An error of the GPU.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// A ring of two layers exceeds the budget.
    #[error(
        "a budget of {budget} bytes is too small: two layers of {layer} bytes, {globals} bytes of global tensors and staging \
         take {needed}"
    )]
    Budget {
        /// Budget in bytes.
        budget: u64,
        /// Bytes of the smallest plan.
        needed: u64,
        /// Bytes of the largest layer.
        layer: u64,
        /// Bytes of the requested global tensors.
        globals: u64,
    },
    /// The pack has no such layer.
    #[error("layer {layer} does not exist: the pack has {count} (0 to {})", count.saturating_sub(1))]
    OutOfRange {
        /// Requested layer.
        layer: u32,
        /// Layers of the pack.
        count: u32,
    },
    /// The loader thread or its workers could not start or have ended.
    #[error("cannot run the loader: {0}")]
    Loader(String),
}

//! Errors of the layer stream.

use std::path::PathBuf;

use thiserror::Error;

use crate::OpenError;
use crate::format::FormatError;
use crate::gpu::GpuError;

/// An error of the layer stream.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The file cannot be opened or is not a pack.
    #[error(transparent)]
    Open(#[from] OpenError),
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
    /// A payload violates the index or the specification.
    #[error("{}: {source}", path.display())]
    Damaged {
        /// The pack.
        path: PathBuf,
        /// The violation.
        source: FormatError,
    },
    /// The file is shorter than when it was opened.
    #[error("{} was cut to {found} bytes while it was in use; it had {expected}", path.display())]
    Truncated {
        /// The pack.
        path: PathBuf,
        /// Length at opening.
        expected: u64,
        /// Present length.
        found: u64,
    },
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The pack.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// The loader thread or its workers could not start or have ended.
    #[error("cannot run the loader: {0}")]
    Loader(String),
}

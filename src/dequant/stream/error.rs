//! Why a layer could not be streamed.

use std::path::PathBuf;

use thiserror::Error;

use crate::OpenError;
use crate::format::FormatError;
use crate::gpu::GpuError;

/// Why a pack could not be streamed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The pack cannot be opened, or is not one.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The GPU could not take it.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// Not even a ring of two layers fits into the budget.
    #[error(
        "a budget of {budget} bytes is too small: two layers of {layer} bytes, {globals} bytes of global tensors and staging \
         take {needed}"
    )]
    Budget {
        /// Bytes allowed.
        budget: u64,
        /// Bytes of the smallest plan.
        needed: u64,
        /// Bytes of the largest layer.
        layer: u64,
        /// Bytes of the global tensors that were asked for.
        globals: u64,
    },
    /// The pack has no such layer.
    #[error("layer {layer} does not exist: the pack has {count} (0 to {})", count.saturating_sub(1))]
    OutOfRange {
        /// The layer asked for.
        layer: u32,
        /// Layers of the pack.
        count: u32,
    },
    /// A payload is not what the index or the specification says.
    #[error("{}: {source}", path.display())]
    Damaged {
        /// The pack.
        path: PathBuf,
        /// What is wrong with it.
        source: FormatError,
    },
    /// The file is shorter than when it was opened.
    #[error("{} was cut to {found} bytes while it was in use; it had {expected}", path.display())]
    Truncated {
        /// The pack.
        path: PathBuf,
        /// Its length when it was opened.
        expected: u64,
        /// Its length now.
        found: u64,
    },
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The pack.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The thread that loads layers, or its workers, could not be started or have ended.
    #[error("cannot run the loader: {0}")]
    Loader(String),
}

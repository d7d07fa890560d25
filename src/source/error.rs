//! Why a pack cannot be read.

use std::path::PathBuf;

use thiserror::Error;

use crate::OpenError;
use crate::format::FormatError;

/// Why an open pack cannot be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReadError {
    /// The file cannot be opened or is not a pack.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A payload violates the index or the specification.
    #[error("{}: {source}", path.display())]
    Damaged {
        /// The pack.
        path: PathBuf,
        /// The violation.
        source: FormatError,
    },
    /// The file is shorter than when it was opened.
    #[error("{}: the file is shorter than when it was opened: {found} of {expected} bytes", path.display())]
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
    /// A payload does not fit in memory.
    #[error("{}: no memory for a section of {bytes} bytes", path.display())]
    Memory {
        /// The pack.
        path: PathBuf,
        /// Bytes of the payload.
        bytes: u64,
    },
}

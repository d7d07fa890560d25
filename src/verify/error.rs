//! Why a pack could not be checked.

use std::path::PathBuf;

use thiserror::Error;

use crate::arch::ArchError;
use crate::convert::parts::PartsError;
use crate::convert::source::SourceError;
use crate::format::FormatError;
use crate::source::ReadError;

/// Why a pack could not be checked. (A fault is not an error; it is part of the report.)
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// The pack is damaged, and the caller needs an undamaged one.
    #[error("{} is damaged: {first}", path.display())]
    Damaged {
        /// The pack.
        path: PathBuf,
        /// The first fault.
        first: FormatError,
    },
    /// The pack cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The checkpoint to compare with cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The checkpoint to compare with contradicts its config.json.
    #[error(transparent)]
    Arch(#[from] ArchError),
    /// The caller asked to stop.
    #[error("stopped before the end")]
    Cancelled,
    /// The worker threads could not be started.
    #[error("cannot start the worker threads: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

impl From<PartsError> for VerifyError {
    fn from(error: PartsError) -> Self {
        match error {
            PartsError::Source(e) => Self::Source(e),
            PartsError::Arch(e) => Self::Arch(e),
        }
    }
}

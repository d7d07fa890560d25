//! Why a conversion failed.

use std::path::PathBuf;

use thiserror::Error;

use super::parts::PartsError;
use super::plan::PlanError;
use super::source::SourceError;
use crate::arch::ArchError;

impl From<PartsError> for ConvertError {
    fn from(error: PartsError) -> Self {
        match error {
            PartsError::Source(e) => Self::Source(e),
            PartsError::Arch(e) => Self::Arch(e),
        }
    }
}

/// Why a conversion failed. After [`ConvertError::NotDurable`] the target is whole; after any other
/// error there is none (or still the old one). A temporary file is never left behind; with
/// [`Options::resume`](super::Options::resume) the finished part is.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConvertError {
    /// The checkpoint cannot be read, or is not one.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The checkpoint's tensors are not those that its config.json promises.
    #[error(transparent)]
    Arch(#[from] ArchError),
    /// The checkpoint cannot be converted as asked.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A weight is a NaN or an infinity.
    #[error("tensor {tensor}: the value at flat index {index} is {value}, not a finite number")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// Index into the flattened tensor.
        index: u64,
        /// The value.
        value: f32,
    },
    /// Something stands where the pack should go.
    #[error("{} exists already", path.display())]
    TargetExists {
        /// The target.
        path: PathBuf,
    },
    /// A device, a pipe or a socket stands where the pack should go.
    #[error("{} is not a regular file", path.display())]
    TargetNotAFile {
        /// The target.
        path: PathBuf,
    },
    /// The target is one of the checkpoint's own files.
    #[error("{} is a file of the checkpoint itself", path.display())]
    TargetIsSource {
        /// The target.
        path: PathBuf,
    },
    /// The pack would not fit.
    #[error("{} has {available} bytes free, the pack needs {needed}", path.display())]
    NoSpace {
        /// The folder.
        path: PathBuf,
        /// Length of the pack.
        needed: u64,
        /// Free bytes.
        available: u64,
    },
    /// The target cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Target {
        /// The target.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The target is whole and has its name, but its folder cannot be made durable: a loss of power
    /// may undo the renaming.
    #[error("{} is written and whole, but its folder cannot be made durable: {source}", path.display())]
    NotDurable {
        /// The target.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// Another process continues the same interrupted conversion.
    #[error("another process is converting to {}", path.display())]
    PartialInUse {
        /// The file of the finished part.
        path: PathBuf,
    },
    /// The finished part is not of this conversion.
    #[error("{} keeps a conversion with other options, of another checkpoint or by another version", path.display())]
    PartialDiffers {
        /// The file of the finished part.
        path: PathBuf,
    },
    /// A weights file has changed since the finished part was made from it.
    #[error("{} has changed since the conversion that {} keeps", file.display(), path.display())]
    PartialSource {
        /// The file of the finished part.
        path: PathBuf,
        /// The weights file.
        file: PathBuf,
    },
    /// The caller asked to stop.
    #[error("stopped before the end")]
    Cancelled,
    /// The worker threads could not be started.
    #[error("cannot start the worker threads: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
    /// The thread that syncs the target could not be started.
    #[error("cannot start the syncing thread: {0}")]
    SyncThread(std::io::Error),
}

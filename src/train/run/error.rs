//! Why a run does not start, or ends early.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

use crate::data::DataError;
use crate::model::error::ModelError;
use crate::model::plan::MemoryError;
use crate::train::checkpoint::{CheckpointError, Difference};
use crate::train::record::RecordError;
use crate::train::settings::SettingsError;

/// Why a run could not start, or failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RunError {
    /// Invalid settings.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The model, the data or the device.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The memory does not suffice.
    #[error(transparent)]
    Plan(#[from] MemoryError),
    /// A checkpoint cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The run of the checkpoint has other settings.
    #[error("cannot resume from {}: {source}", checkpoint.display())]
    OtherRun {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// What differs.
        source: Difference,
    },
    /// A new run would replace files in the folder.
    #[error("{} has {found}", out.display())]
    Occupied {
        /// The folder.
        out: PathBuf,
        /// What it has.
        found: Leftover,
    },
    /// Another run trains into the folder.
    #[error("another nf4pack{} trains into {}", pid.map_or_else(String::new, |pid| format!(" (process {pid})")), out.display())]
    Locked {
        /// The folder.
        out: PathBuf,
        /// The number of its process, if known.
        pid: Option<u32>,
    },
    /// The folder cannot be locked against other runs.
    #[error("cannot lock {}: {source}", path.display())]
    Lock {
        /// The file of the lock.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The best adapter of the resumed run is lost, so the search starts again.
    #[error("the best adapter so far cannot be read, so the search for the best one starts again: {source}")]
    BestLost {
        /// Why it cannot be read.
        source: CheckpointError,
    },
    /// A checkpoint of another run.
    #[error("the checkpoint {} is not in {}, the folder of the run", checkpoint.display(), out.display())]
    Elsewhere {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// The folder.
        out: PathBuf,
    },
    /// Nothing to resume.
    #[error("{} has no checkpoint to resume from", out.display())]
    NoCheckpoint {
        /// The folder.
        out: PathBuf,
    },
    /// Records cannot be written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A loss or a gradient that is not finite.
    #[error("{source}{}", last_good(.checkpoint.as_deref()))]
    Diverged {
        /// The number, its step and its layer.
        source: Box<ModelError>,
        /// The last checkpoint before.
        checkpoint: Option<PathBuf>,
    },
}

/// The files in a folder that a new run would replace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leftover {
    /// Checkpoints of a run: it can be resumed.
    Checkpoints,
    /// A trained adapter, without checkpoints.
    Adapter,
    /// Only records.
    Records,
    /// Checkpoints of another program, whose names this one needs.
    Foreign,
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Checkpoints => "checkpoints of an earlier run",
            Self::Adapter => "the adapter of an earlier run",
            Self::Records => "the records of an earlier run",
            Self::Foreign => "checkpoints of another program",
        })
    }
}

fn last_good(checkpoint: Option<&Path>) -> String {
    checkpoint.map_or_else(String::new, |path| format!("; the last good checkpoint is {}", path.display()))
}

impl From<DataError> for RunError {
    fn from(error: DataError) -> Self {
        Self::Model(error.into())
    }
}

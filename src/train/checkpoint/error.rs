//! Why a checkpoint could not be written, found or read.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use crate::io::read::FileError;
use crate::lora::adapter::{AdapterError, TensorsError};

/// Why a checkpoint could not be written, found or read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file or folder cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file is not a regular file of a usual size.
    #[error(transparent)]
    File(FileError),
    /// An old checkpoint, or a best adapter that no checkpoint needs, cannot be removed.
    #[error("cannot remove {}, which the run no longer needs: {source}", path.display())]
    Remove {
        /// The folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A checkpoint of a later step than the resumed one, or something else with the name of a
    /// folder that the run writes, cannot be renamed.
    #[error("cannot rename {}, which is not part of the run: {source}", path.display())]
    SetAside {
        /// The folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The adapter of a checkpoint cannot be read or written.
    #[error("the checkpoint {}: {source}", path.display())]
    Adapter {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        source: AdapterError,
    },
    /// The state is damaged, or from another program.
    #[error("{} is damaged: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where it is broken.
        source: serde_json::Error,
    },
    /// The moments are not a safetensors file.
    #[error("{} is damaged: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: TensorsError,
    },
    /// The state is from another version of this program.
    #[error("{}: the format is {found}, this version reads {expected}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The format that this version reads.
        expected: u32,
        /// The format of the file.
        found: u32,
    },
    /// A tensor of the moments differs in type or shape from the adapter's.
    #[error("{}: tensor {tensor:?} should be {expected}, found {found}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// The adapter's type and shape.
        expected: String,
        /// The tensor's type and shape.
        found: String,
    },
    /// The state is damaged or was changed.
    #[error("{} is damaged: its checksum is {found:08x}, and should be {expected:08x}", path.display())]
    StateChecksum {
        /// The file.
        path: PathBuf,
        /// The checksum in the file.
        expected: u32,
        /// The checksum of its state.
        found: u32,
    },
    /// The state is that of another step.
    #[error("{} has the state of step {found}, by its name it should be that of step {expected}", path.display())]
    Step {
        /// The folder.
        path: PathBuf,
        /// The step in its name.
        expected: u64,
        /// The step of its state.
        found: u64,
    },
    /// The files are damaged, or from different checkpoints.
    #[error("{} is damaged: the checksum of its numbers is {found:08x}, and should be {expected:08x}", path.display())]
    Checksum {
        /// The folder.
        path: PathBuf,
        /// The checksum in the state.
        expected: u32,
        /// The checksum of adapter and moments.
        found: u32,
    },
    /// The moments do not have the adapter's layout: a defect of this program.
    #[error("the optimiser has moments of {found} floats, the adapter has {expected}")]
    Length {
        /// Floats of the adapter.
        expected: u64,
        /// Floats of the moments.
        found: u64,
    },
}

impl From<FileError> for CheckpointError {
    fn from(error: FileError) -> Self {
        match error {
            FileError::Io { path, source } => Self::Read { path, source },
            error => Self::File(error),
        }
    }
}

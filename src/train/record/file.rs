//! A file of records, and why it could not be read or written.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;

use thiserror::Error;

use crate::io::read::FileError;

/// Why records could not be written or read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The records cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The records are not a regular file of a usual size.
    #[error(transparent)]
    File(FileError),
    /// The records cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A line is not a record.
    #[error("{}: line {line} is not a record: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The line, from 1 on.
        line: u64,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

impl From<FileError> for RecordError {
    fn from(error: FileError) -> Self {
        match error {
            FileError::Io { path, source } => Self::Read { path, source },
            error => Self::File(error),
        }
    }
}

/// A file that grows by whole records.
#[derive(Debug)]
pub(super) struct Appender {
    path: PathBuf,
    pub(super) file: File,
    /// Bytes of whole records.
    len: u64,
    /// Whether a part of a record may follow these bytes.
    pub(super) partial: bool,
}

impl Appender {
    /// Opens the file, or creates it.
    pub(super) fn open(path: PathBuf) -> Result<Self, RecordError> {
        let open = || {
            let file = File::options().append(true).create(true).open(&path)?;
            let len = file.metadata()?.len();
            Ok((file, len))
        };
        match open() {
            Ok((file, len)) => Ok(Self { path, file, len, partial: false }),
            Err(source) => Err(RecordError::Write { path, source }),
        }
    }

    /// Closes and removes the file.
    pub(super) fn remove(self) -> Result<(), RecordError> {
        let Self { path, file, .. } = self;
        drop(file);
        std::fs::remove_file(&path).map_err(|source| RecordError::Write { path, source })
    }

    /// Makes all bytes durable.
    pub(super) fn sync(&self) -> Result<(), RecordError> {
        self.file.sync_all().map_err(|source| RecordError::Write { path: self.path.clone(), source })
    }

    /// Appends all of the bytes, or none.
    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), RecordError> {
        if bytes.is_empty() {
            return Ok(());
        }
        // A full disk may take a part of the bytes. It is cut off at once or, if that fails, before
        // the next bytes.
        let undone = if self.partial { self.file.set_len(self.len) } else { Ok(()) };
        if let Err(source) = undone.and_then(|()| self.file.write_all(bytes)) {
            self.partial = self.file.set_len(self.len).is_err();
            return Err(RecordError::Write { path: self.path.clone(), source });
        }
        self.partial = false;
        self.len += bytes.len() as u64;
        Ok(())
    }
}

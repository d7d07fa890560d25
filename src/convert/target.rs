//! The file that a pack is written to: under another name until it is whole, then renamed.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::{Builder, NamedTempFile};

use super::error::ConvertError;
use crate::io::{folder_of, sync_dir, write_all_at};

/// A pack being written. Dropped before [`Target::publish`], it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct Target {
    temporary: NamedTempFile,
    path: PathBuf,
    folder: PathBuf,
    force: bool,
}

/// A temporary file beside `path`, with the permissions that a new file gets there.
fn temporary_beside(path: &Path) -> io::Result<NamedTempFile> {
    let mut builder = Builder::new();
    builder.prefix(".nf4pack-").suffix(".tmp");
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(folder_of(path))
}

impl Target {
    /// Creates the temporary file beside `path`, after looking whether `len` bytes fit.
    ///
    /// # Errors
    /// Where `path` exists and `force` is not set, where it is a folder, where the folder is missing or full.
    pub(crate) fn create(path: &Path, len: u64, force: bool) -> Result<Self, ConvertError> {
        let error = |source| ConvertError::Target { path: path.to_owned(), source };
        if path.is_dir() {
            return Err(error(io::Error::from(io::ErrorKind::IsADirectory)));
        }
        if !force && path.symlink_metadata().is_ok() {
            return Err(ConvertError::TargetExists { path: path.to_owned() });
        }
        let folder = folder_of(path).to_owned();
        let available = fs4::available_space(&folder).map_err(error)?;
        if available < len {
            return Err(ConvertError::NoSpace { path: folder, needed: len, available });
        }
        let temporary = temporary_beside(path).map_err(error)?;
        // What is never written, the padding, reads as zero.
        temporary.as_file().set_len(len).map_err(error)?;
        Ok(Self { temporary, path: path.to_owned(), folder, force })
    }

    /// Writes `bytes` at `offset`; calls from several threads may overlap in time.
    pub(crate) fn write(&self, bytes: &[u8], offset: u64) -> Result<(), ConvertError> {
        write_all_at(self.file(), bytes, offset).map_err(|source| self.error(source))
    }

    fn file(&self) -> &File {
        self.temporary.as_file()
    }

    fn error(&self, source: io::Error) -> ConvertError {
        ConvertError::Target { path: self.path.clone(), source }
    }

    /// Makes the bytes durable.
    pub(crate) fn sync(&self) -> Result<(), ConvertError> {
        self.file().sync_all().map_err(|source| self.error(source))
    }

    /// Gives the file its name, durably; to be called after [`Target::sync`].
    pub(crate) fn publish(self) -> Result<(), ConvertError> {
        let Self { temporary, path, folder, force } = self;
        let persisted = if force { temporary.persist(&path) } else { temporary.persist_noclobber(&path) };
        persisted.map_err(|e| match e.error.kind() {
            io::ErrorKind::AlreadyExists => ConvertError::TargetExists { path: path.clone() },
            _ => ConvertError::Target { path: path.clone(), source: e.error },
        })?;
        sync_dir(&folder).map_err(|source| ConvertError::Target { path, source })
    }
}

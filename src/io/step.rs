//! The steps that publish a file or a folder: every change of the file system that a crash may cut
//! off goes through this module. Tests record the steps (`record.rs`) and replay what a crash after
//! each of them may leave on the disk (`crash.rs`).

use std::fs::{self, File};
use std::io;
use std::path::Path;

#[cfg(feature = "convert")]
use tempfile::TempPath;

use super::access::Readers;
#[cfg(test)]
use super::record::{self, Step};
use super::write_all_at;

/// A file that is being written.
#[derive(Debug)]
pub(crate) struct Output {
    file: File,
    #[cfg(test)]
    log: Option<record::FileLog>,
}

impl Output {
    /// Creates the file `path`, with the permissions of a new file.
    ///
    /// # Errors
    /// `AlreadyExists` if the file exists; else the error of the operating system.
    pub(crate) fn create_new(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        Ok(Self {
            file,
            #[cfg(test)]
            log: record::created(path),
        })
    }

    /// Opens the existing file `path`, to continue it.
    ///
    /// # Errors
    /// Any error of the operating system.
    #[cfg(feature = "convert")]
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut options = File::options();
        options.read(true).write(true);
        #[cfg(unix)]
        no_follow(&mut options);
        let file = options.open(path)?;
        Ok(Self {
            file,
            #[cfg(test)]
            log: record::opened(path),
        })
    }

    /// A file in `folder` without a name: it vanishes with the process, however that ends. `None`
    /// if the system or the file system has no such files.
    ///
    /// # Errors
    /// Any error of the operating system.
    #[cfg(feature = "convert")]
    pub(crate) fn unnamed(folder: &Path) -> io::Result<Option<Self>> {
        #[cfg(test)]
        if record::refuses_unnamed(folder) {
            return Ok(None);
        }
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{Mode, OFlags};
            use rustix::io::Errno;
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            let file = match rustix::fs::open(folder, flags, Mode::from_raw_mode(0o666)) {
                Ok(file) => File::from(file),
                // What file systems and kernels without unnamed files return.
                Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOSYS | Errno::NOENT) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            // Without /proc, it could not get a name at the end.
            if !self_path(&file).exists() {
                return Ok(None);
            }
            Ok(Some(Self {
                file,
                #[cfg(test)]
                log: record::unnamed(folder),
            }))
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = folder;
            Ok(None)
        }
    }

    /// Gives an unnamed file the name `path`.
    ///
    /// # Errors
    /// `AlreadyExists` if something has the name; else the error of the operating system.
    #[cfg(feature = "convert")]
    pub(crate) fn link(&self, path: &Path) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        {
            use rustix::fs::{AtFlags, CWD};
            rustix::fs::linkat(CWD, self_path(&self.file), CWD, path, AtFlags::SYMLINK_FOLLOW)?;
            #[cfg(test)]
            record::file(&self.log, |id| Step::Link { id, path: path.to_owned() });
            Ok(())
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = path;
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    /// Writes `bytes` from `offset` on.
    ///
    /// # Errors
    /// See [`write_all_at`].
    pub(crate) fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        write_all_at(&self.file, bytes, offset)?;
        #[cfg(test)]
        record::file(&self.log, |id| Step::Write { id, offset, bytes: bytes.to_vec() });
        Ok(())
    }

    /// Sets the length; new bytes are zero.
    ///
    /// # Errors
    /// Any error of the operating system.
    #[cfg(feature = "convert")]
    pub(crate) fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)?;
        #[cfg(test)]
        record::file(&self.log, |id| Step::SetLen { id, len });
        Ok(())
    }

    /// Makes the file no wider readable than `readers` allow.
    ///
    /// # Errors
    /// Any error of the operating system.
    pub(crate) fn restrict(&self, readers: &Readers) -> io::Result<()> {
        match readers.permissions(&self.file.metadata()?) {
            Some(permissions) => self.file.set_permissions(permissions),
            None => Ok(()),
        }
    }

    /// Makes the bytes durable.
    ///
    /// # Errors
    /// Any error of the operating system.
    #[cfg(feature = "convert")]
    pub(crate) fn sync_data(&self) -> io::Result<()> {
        self.sync(File::sync_data)
    }

    /// Makes the bytes and the permissions durable.
    ///
    /// # Errors
    /// Any error of the operating system.
    pub(crate) fn sync_all(&self) -> io::Result<()> {
        self.sync(File::sync_all)
    }

    fn sync(&self, sync: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        #[cfg(test)]
        let begun = record::begin_sync(&self.log);
        sync(&self.file)?;
        #[cfg(test)]
        record::file(&self.log, |id| Step::SyncFile { id, until: begun });
        Ok(())
    }

    /// The file, to read it, to lock it and to look at its metadata.
    #[cfg(feature = "convert")]
    pub(crate) const fn as_file(&self) -> &File {
        &self.file
    }

    /// The output with another file in its place, for tests of failing writes.
    #[cfg(all(test, feature = "convert"))]
    pub(crate) fn of(file: File) -> Self {
        Self { file, log: None }
    }
}

/// The path of an open file.
#[cfg(all(target_os = "linux", feature = "convert"))]
fn self_path(file: &File) -> std::path::PathBuf {
    use std::os::fd::AsRawFd;
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Opening then fails at a link and does not wait at a pipe.
#[cfg(unix)]
pub(super) fn no_follow(options: &mut fs::OpenOptions) {
    use rustix::fs::OFlags;
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    std::os::unix::fs::OpenOptionsExt::custom_flags(options, flags.bits().cast_signed());
}

/// Renames a file or a folder. A file, or on Unix an empty folder, with the name `to` is replaced.
///
/// # Errors
/// Any error of the operating system.
pub(crate) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    fs::rename(from, to)?;
    #[cfg(test)]
    record::path(to, || Step::Rename { from: from.to_owned(), to: to.to_owned() });
    Ok(())
}

/// Renames a file, unless something has the name `to`.
///
/// # Errors
/// `AlreadyExists` if something has the name; else the error of the operating system; and the path.
#[cfg(feature = "convert")]
pub(crate) fn rename_new(from: TempPath, to: &Path) -> Result<(), tempfile::PathPersistError> {
    #[cfg(test)]
    let step = Step::Rename { from: from.to_path_buf(), to: to.to_owned() };
    from.persist_noclobber(to)?;
    #[cfg(test)]
    record::path(to, || step);
    Ok(())
}

/// Removes a file.
///
/// # Errors
/// Any error of the operating system.
pub(crate) fn remove_file(path: &Path) -> io::Result<()> {
    fs::remove_file(path)?;
    #[cfg(test)]
    record::path(path, || Step::Remove { path: path.to_owned() });
    Ok(())
}

/// Removes a folder and what is in it, without following links.
///
/// # Errors
/// Any error of the operating system.
pub(crate) fn remove_dir_all(path: &Path) -> io::Result<()> {
    fs::remove_dir_all(path)?;
    #[cfg(test)]
    record::path(path, || Step::Remove { path: path.to_owned() });
    Ok(())
}

/// Creates a folder in an existing one.
///
/// # Errors
/// `AlreadyExists` if something has the name; else the error of the operating system.
#[cfg(feature = "convert")]
pub(crate) fn create_dir(path: &Path) -> io::Result<()> {
    fs::create_dir(path)?;
    #[cfg(test)]
    record::path(path, || Step::CreateFolder { path: path.to_owned() });
    Ok(())
}

/// Syncs `folder`, so that renames and new files in it survive a power failure. Does nothing on
/// systems that cannot sync folders.
///
/// # Errors
///
/// Any error from opening or syncing the folder.
pub(crate) fn sync_dir(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    match File::open(folder)?.sync_all() {
        // Some file systems do not support a sync of folders, and return an error.
        Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => {}
        result => result?,
    }
    #[cfg(test)]
    record::path(folder, || Step::SyncFolder { path: folder.to_owned() });
    #[cfg(not(any(unix, test)))]
    let _ = folder;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_can_be_synced() {
        sync_dir(tempfile::tempdir().unwrap().path()).unwrap();
    }
}

//! A file that gets its name when it is complete.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use tempfile::TempPath;

use super::access::Readers;
use super::leftovers::{Lock, lock, temporary_names};
use super::step::{self, Output};

/// A file without its final name. Dropped before [`NewFile::publish`], it leaves nothing, unless it
/// is one that is kept.
#[derive(Debug)]
pub(crate) struct NewFile {
    /// Dropped before the file, whose lock covers the removal.
    name: Name,
    output: Output,
    folder: PathBuf,
}

/// The name of a file that is not complete.
#[derive(Debug)]
enum Name {
    /// None: the system removes the file with the process.
    None,
    /// If the file system has no unnamed files.
    Temporary(TempPath),
    /// It may stay for a later run.
    Kept(KeptName),
}

/// A name that is removed on drop, unless the file is kept.
#[derive(Debug)]
struct KeptName {
    path: PathBuf,
    is_kept: AtomicBool,
}

impl KeptName {
    /// The name, which is then removed on drop in any case.
    fn into_temporary(mut self) -> io::Result<TempPath> {
        *self.is_kept.get_mut() = true;
        TempPath::try_from_path(std::mem::take(&mut self.path))
    }
}

impl Drop for KeptName {
    fn drop(&mut self) {
        if !*self.is_kept.get_mut() {
            // A later run replaces what cannot be removed.
            let _ = step::remove_file(&self.path);
        }
    }
}

impl NewFile {
    /// Creates the file in `folder`, without a name if the file system can do that. It has the
    /// permissions of a new file, and is no wider readable than `readers` allow.
    ///
    /// # Errors
    /// Any error of the operating system.
    pub(crate) fn create(folder: &Path, readers: &Readers) -> io::Result<Self> {
        let (output, name) = match Output::unnamed(folder)? {
            Some(output) => {
                // For the moment before a replacement when it has a temporary name. A file system
                // without locks has no leftovers that are removed.
                let _ = output.as_file().try_lock();
                (output, Name::None)
            }
            None => named(folder)?,
        };
        output.restrict(readers)?;
        Ok(Self { name, output, folder: folder.to_owned() })
    }

    /// Opens the file `path` to continue it, or creates it. On drop, a new file is removed, unless
    /// [`NewFile::set_kept`] keeps it. It is no wider readable than `readers` allow.
    ///
    /// # Errors
    /// `WouldBlock` if another process has it; else the error of the operating system.
    pub(crate) fn open_kept(path: &Path, readers: &Readers) -> io::Result<Self> {
        let (output, is_kept) = match Output::open(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => (Output::create_new(path)?, false),
            opened => (opened?, true),
        };
        if !output.as_file().metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        if lock(output.as_file(), path) == Lock::Lost {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let name = Name::Kept(KeptName { path: path.to_owned(), is_kept: AtomicBool::new(is_kept) });
        let file = Self { name, output, folder: super::folder_of(path).to_owned() };
        file.output.restrict(readers)?;
        Ok(file)
    }

    /// Whether a file of [`NewFile::open_kept`] stays if it is dropped.
    pub(crate) fn set_kept(&self, is_kept: bool) {
        if let Name::Kept(name) = &self.name {
            name.is_kept.store(is_kept, Ordering::Relaxed);
        }
    }

    /// The file, to write it.
    pub(crate) const fn output(&self) -> &Output {
        &self.output
    }

    /// Makes the file durable and names it `path`, in the folder that it was created in. The caller
    /// syncs the folder: if that fails, the file has its name; if this fails, nothing of it
    /// remains.
    ///
    /// # Errors
    /// `AlreadyExists` if something has the name, unless `replace`; else the error of the operating
    /// system.
    pub(crate) fn publish(self, path: &Path, replace: bool) -> io::Result<()> {
        self.output.sync_all()?;
        let name = match self.name {
            Name::None if !replace => return self.output.link(path),
            // A link cannot replace a file.
            Name::None => temporary_names().make_in(&self.folder, |name| self.output.link(name))?.into_temp_path(),
            Name::Temporary(name) => name,
            Name::Kept(name) => name.into_temporary()?,
        };
        if !replace {
            return Ok(step::rename_new(name, path)?);
        }
        step::rename(&name, path)?;
        // The temporary name no longer exists, so there is nothing to remove.
        let _ = name.keep();
        Ok(())
    }

    /// Replaces the file, for tests of failing writes.
    #[cfg(all(test, feature = "train"))]
    pub(crate) fn set_output(&mut self, output: Output) {
        self.output = output;
    }
}

/// A file with a temporary name.
fn named(folder: &Path) -> io::Result<(Output, Name)> {
    loop {
        let (output, name) = temporary_names().make_in(folder, Output::create_new)?.into_parts();
        match lock(output.as_file(), &name) {
            Lock::Taken | Lock::None => return Ok((output, Name::Temporary(name))),
            // Another process took it for a leftover.
            Lock::Lost => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::record;

    /// Publishes `bytes`; `unnamed` says whether the file system has unnamed files.
    fn publish(path: &Path, bytes: &[u8], replace: bool, unnamed: bool) -> io::Result<()> {
        let folder = path.parent().unwrap();
        let recording = record::start(folder);
        recording.set_unnamed(unnamed);
        let file = NewFile::create(folder, &Readers::default())?;
        file.output().write_at(bytes, 0)?;
        file.publish(path, replace)
    }

    #[test]
    fn a_name_is_given_once_and_replaced_on_request() {
        for unnamed in [true, false] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("out");
            publish(&path, b"one", false, unnamed).unwrap();
            let error = publish(&path, b"two", false, unnamed).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::AlreadyExists, "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), b"one");
            publish(&path, b"two", true, unnamed).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"two");
            publish(&folder.path().join("new"), b"x", true, unnamed).unwrap();
            drop(NewFile::create(folder.path(), &Readers::default()).unwrap());
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn an_unfinished_file_has_no_name_on_linux() {
        let folder = tempfile::tempdir().unwrap();
        let file = NewFile::create(folder.path(), &Readers::default()).unwrap();
        // A file system without unnamed files has nothing to show here.
        let expected = usize::from(!matches!(file.name, Name::None));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), expected);
    }
}

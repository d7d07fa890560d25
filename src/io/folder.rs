//! Atomic updates of folders: their files appear complete, or not at all.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use super::access::Readers;
#[cfg(feature = "train")]
use super::leftovers::remove_leftovers;
use super::leftovers::{Lock, lock, temporary_names};
#[cfg(feature = "train")]
use super::step::sync_dir;
use super::step::{self, Output};

/// A hidden folder, which is removed on drop.
#[derive(Debug)]
pub(crate) struct TemporaryFolder {
    folder: TempDir,
    /// Holds the lock as long as the process uses the folder.
    _lock: Option<fs::File>,
}

impl TemporaryFolder {
    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Leaves the folder in place, and returns its path.
    pub(crate) fn keep(self) -> PathBuf {
        self.folder.keep()
    }
}

/// Creates a hidden folder in `parent`, with the default permissions.
///
/// # Errors
///
/// Any error of the operating system.
pub(crate) fn temporary_folder(parent: &Path) -> io::Result<TemporaryFolder> {
    #[cfg_attr(not(unix), allow(unused_mut, reason = "only Unix has permissions"))]
    let mut builder = temporary_names();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    loop {
        let folder = builder.tempdir_in(parent)?;
        #[cfg(test)]
        super::record::path(folder.path(), || super::record::Step::CreateFolder { path: folder.path().to_owned() });
        // Only Unix opens folders.
        let file = if cfg!(unix) { fs::File::open(folder.path()).map(Some) } else { Ok(None) };
        // Another process may take it for a leftover before it is locked.
        let is_lost = match &file {
            Ok(file) => file.as_ref().is_some_and(|file| lock(file, folder.path()) == Lock::Lost),
            Err(error) => error.kind() == io::ErrorKind::NotFound,
        };
        if !is_lost {
            return Ok(TemporaryFolder { folder, _lock: file? });
        }
    }
}

/// Makes the folder no wider readable than `readers` allow.
///
/// # Errors
/// Any error of the operating system.
#[cfg(feature = "convert")]
pub(crate) fn restrict(folder: &Path, readers: &Readers) -> io::Result<()> {
    match readers.permissions(&fs::metadata(folder)?) {
        Some(permissions) => fs::set_permissions(folder, permissions),
        None => Ok(()),
    }
}

/// Renames `temporary` to `target`, in the same parent folder. `target` must be an empty folder or
/// not exist. The caller syncs the parent: if that fails, the folder exists; if this fails, it does
/// not.
///
/// # Errors
///
/// Any error of the operating system.
pub(crate) fn publish_folder(temporary: TemporaryFolder, target: &Path) -> io::Result<()> {
    // Windows cannot rename over an empty folder.
    if cfg!(windows) && target.is_dir() {
        fs::remove_dir(target)?;
    }
    step::rename(temporary.path(), target)?;
    // The temporary name no longer exists, so there is nothing to remove.
    let _ = temporary.keep();
    Ok(())
}

/// Creates the file `path` with these bytes and syncs it. It is no wider readable than `readers`
/// allow.
///
/// # Errors
///
/// `AlreadyExists` if the file exists; else the error of the operating system.
pub(crate) fn write_synced(path: &Path, bytes: &[u8], readers: &Readers) -> io::Result<()> {
    let file = Output::create_new(path)?;
    file.restrict(readers)?;
    file.write_at(bytes, 0)?;
    file.sync_all()
}

/// Writes `files` (names and bytes) into the folder `target`. All files are synced under another
/// name before `target` changes. A new folder then appears complete; missing parent folders are
/// created. In an existing folder, each file replaces its earlier version, in the given order, and
/// all other files stay. First, what dead processes left there is removed.
///
/// # Errors
/// Any error of the operating system. `target` is then unchanged, or some of its files are
/// replaced.
#[cfg(feature = "train")]
pub(crate) fn publish(target: &Path, files: &[(&str, &[u8])]) -> io::Result<()> {
    // An existing folder may be a link, or a separate file system such as a container volume. A
    // rename from its parent folder cannot replace it.
    let there = fs::symlink_metadata(target).is_ok();
    let place = if there { target } else { super::folder_of(target) };
    if !there {
        fs::create_dir_all(place)?;
    }
    remove_leftovers(place);
    let temporary = temporary_folder(place)?;
    for (name, bytes) in files {
        write_synced(&temporary.path().join(name), bytes, &Readers::default())?;
    }
    sync_dir(temporary.path())?;
    if !there {
        publish_folder(temporary, target)?;
        return sync_dir(place);
    }
    for (name, _) in files {
        step::rename(&temporary.path().join(name), &target.join(name))?;
    }
    sync_dir(target)
}

#[cfg(all(test, feature = "train"))]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

    use super::*;
    use crate::io::leftovers::names;

    /// A number that identifies the folder, even if another one takes its name.
    fn number(path: &Path) -> u64 {
        #[cfg(unix)]
        return std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
        #[cfg(not(unix))]
        return path.exists().into();
    }

    #[test]
    fn a_folder_appears_with_those_above_it() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("a/b/out");
        publish(&target, &[("x", b"1"), ("y", b"2")]).unwrap();
        assert_eq!(names(&target), ["x", "y"]);
        assert_eq!(fs::read(target.join("y")).unwrap(), b"2");
        assert_eq!(names(&root.path().join("a/b")), ["out"], "no other files remain");
    }

    #[test]
    fn an_earlier_version_is_replaced_and_other_files_stay() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        fs::create_dir(&target).unwrap();
        let before = number(&target);
        publish(&target, &[("x", b"1")]).unwrap();
        assert_eq!(number(&target), before, "the folder may be a separate file system: it must not be replaced");
        fs::write(target.join("notes"), "mine").unwrap();
        publish(&target, &[("x", b"2"), ("y", b"3")]).unwrap();
        assert_eq!(names(&target), ["notes", "x", "y"]);
        assert_eq!(fs::read(target.join("x")).unwrap(), b"2");
        assert_eq!(names(root.path()), ["out"]);
    }

    #[test]
    fn a_file_in_the_way_is_an_error_and_stays() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        fs::write(&target, "precious").unwrap();
        publish(&target, &[("x", b"1")]).unwrap_err();
        assert_eq!(fs::read(&target).unwrap(), b"precious");
        assert_eq!(names(root.path()), ["out"]);
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_a_folder_stays_a_link() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("real")).unwrap();
        std::os::unix::fs::symlink("real", root.path().join("out")).unwrap();
        publish(&root.path().join("out"), &[("x", b"1")]).unwrap();
        assert_eq!(fs::read(root.path().join("real/x")).unwrap(), b"1");
        assert!(root.path().join("out").is_symlink());
    }
}

//! Temporary files and folders: their names, their locks, and the removal of those whose process is
//! dead.
//!
//! A process locks each temporary file or folder while it lives; the system releases the lock with
//! the process, however that ends. So a leftover is a temporary name that another process can lock.

use std::fs::{self, File, FileType, TryLockError};
use std::io;
use std::path::Path;

use tempfile::Builder;

use super::step;

/// Prefix and suffix of a temporary name.
const TEMPORARY: [&str; 2] = [".nf4pack-", ".tmp"];

/// Makes temporary names.
pub(super) fn temporary_names() -> Builder<'static, 'static> {
    let mut builder = Builder::new();
    let [prefix, suffix] = TEMPORARY;
    builder.prefix(prefix).suffix(suffix);
    builder
}

/// Whether the path has a temporary name.
pub(crate) fn is_temporary(path: &Path) -> bool {
    let [prefix, suffix] = TEMPORARY;
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix) && name.ends_with(suffix))
}

/// What an attempt to lock a file or folder gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lock {
    /// Locked until the file is closed.
    Taken,
    /// Another process has the lock, or the name no longer leads to the file.
    Lost,
    /// The file system has no locks.
    None,
}

/// Locks `file`, which was opened or created as `path`.
pub(crate) fn lock(file: &File, path: &Path) -> Lock {
    match file.try_lock() {
        // Another process may have removed it between its opening and the lock.
        Ok(()) if is_at(file, path) => Lock::Taken,
        Ok(()) | Err(TryLockError::WouldBlock) => Lock::Lost,
        Err(TryLockError::Error(_)) => Lock::None,
    }
}

/// Whether `path` is this file.
fn is_at(file: &File, path: &Path) -> bool {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let number = |m: fs::Metadata| (m.dev(), m.ino());
        let there = path.symlink_metadata().map(number);
        there.is_ok_and(|there| file.metadata().is_ok_and(|m| number(m) == there))
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        path.symlink_metadata().is_ok()
    }
}

/// Removes the temporary files and folders of dead processes from `folder`. What cannot be locked
/// or removed, such as another user's, stays: no run depends on it.
pub(crate) fn remove_leftovers(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if is_temporary(&path) {
            let _ = entry.file_type().and_then(|kind| remove_dead(&path, kind));
        }
    }
}

fn remove_dead(path: &Path, kind: FileType) -> io::Result<()> {
    // A link or a device is from another program.
    if !kind.is_dir() && !kind.is_file() {
        return Ok(());
    }
    let mut options = File::options();
    options.read(true);
    #[cfg(unix)]
    step::no_follow(&mut options);
    let file = options.open(path)?;
    match lock(&file, path) {
        Lock::Taken if kind.is_dir() => step::remove_dir_all(path),
        Lock::Taken => step::remove_file(path),
        Lock::Lost | Lock::None => Ok(()),
    }
}

/// The names in a folder, sorted.
#[cfg(all(test, any(unix, feature = "train")))]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
pub(crate) fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[cfg(all(test, unix))]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::io::temporary_folder;

    #[test]
    fn what_dead_processes_left_is_removed_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        fs::create_dir_all(root.join(".nf4pack-dead.tmp/inside")).unwrap();
        fs::write(root.join(".nf4pack-dead.tmp/inside/file"), "x").unwrap();
        fs::write(root.join(".nf4pack-file.tmp"), "x").unwrap();
        for other in [".nf4pack-other", "nf4pack-a.tmp", "notes.tmp", ".q.nf4pack-partial"] {
            fs::write(root.join(other), "x").unwrap();
        }
        std::os::unix::fs::symlink("notes.tmp", root.join(".nf4pack-link.tmp")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join(".nf4pack-pipe.tmp"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        let live = temporary_folder(root).unwrap();
        let mut expected = vec![
            ".nf4pack-link.tmp",
            ".nf4pack-other",
            ".nf4pack-pipe.tmp",
            ".q.nf4pack-partial",
            "nf4pack-a.tmp",
            "notes.tmp",
            live.path().file_name().unwrap().to_str().unwrap(),
        ];
        expected.sort_unstable();
        remove_leftovers(root);
        assert_eq!(names(root), expected);
        let kept = live.keep();
        assert!(kept.is_dir());
        remove_leftovers(root);
        assert!(!kept.exists(), "its lock is gone");
    }

    #[test]
    fn a_folder_that_is_taken_for_a_leftover_at_once_is_made_again() {
        let root = tempfile::tempdir().unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    remove_leftovers(root.path());
                }
            });
            let made: Vec<io::Result<bool>> =
                (0..2000).map(|_| temporary_folder(root.path()).map(|folder| folder.path().is_dir())).collect();
            done.store(true, Ordering::Relaxed);
            assert!(made.iter().all(|made| matches!(made, Ok(true))), "{:?}", made.iter().find(|made| made.is_err()));
        });
    }

    #[test]
    fn a_name_that_leads_elsewhere_is_not_locked() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("x");
        fs::write(&path, "").unwrap();
        let file = File::open(&path).unwrap();
        fs::remove_file(&path).unwrap();
        assert_eq!(lock(&file, &path), Lock::Lost);
        let second = root.path().join("y");
        fs::write(&second, "").unwrap();
        let (first, other) = (File::open(&second).unwrap(), File::open(&second).unwrap());
        assert_eq!([lock(&first, &second), lock(&other, &second)], [Lock::Taken, Lock::Lost]);
    }
}

//! One run at a time trains into a folder: two would mix their files.
//!
//! The lock is a locked file in the folder. The system releases it with the process, however that
//! ends. It is advisory, and only training takes it: a command that reads the adapter is not
//! blocked.

use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use super::RunError;
use crate::io::leftovers::{self, Lock};
use crate::io::read::{FileError, Links, RegularFile};
use crate::io::read_exact_at;

/// The file of the lock. It has the number of the process.
const NAME: &str = ".nf4pack-lock";
/// Attempts to lock a file that others also remove, or look at for a moment.
const ATTEMPTS: u32 = 20;
/// The pause between two attempts.
const PAUSE: Duration = Duration::from_millis(10);

/// The lock of a folder, until it is dropped.
#[derive(Debug)]
pub(super) struct RunLock {
    /// `None` if the file system has no locks.
    file: Option<File>,
    path: PathBuf,
    /// Folders that were made for it, the outermost first.
    made: Vec<PathBuf>,
    /// Why the file system has no locks.
    pub(super) warning: Option<RunError>,
}

impl RunLock {
    /// Locks the folder of a run; creates it if there is none.
    ///
    /// # Errors
    /// [`RunError::Locked`], [`RunError::Lock`].
    pub(super) fn take(out: &Path) -> Result<Self, RunError> {
        let path = out.join(NAME);
        let mut lock = Self { file: None, path: path.clone(), made: Vec::new(), warning: None };
        let failed = |source| RunError::Lock { path: path.clone(), source };
        let mut pid = None;
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                sleep(PAUSE);
            }
            lock.make_folders(out).map_err(failed)?;
            let file = match open(&path) {
                // The end of another run has just removed the folder.
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(failed)?,
            };
            match leftovers::lock(&file, &path) {
                Lock::Taken => {
                    // The number only serves the error of another process.
                    let _ = file.set_len(0).and_then(|()| writeln!(&file, "{}", std::process::id()));
                    lock.file = Some(file);
                    return Ok(lock);
                }
                // Or the end of another run has just removed the file.
                Lock::Lost => pid = read_pid(&file),
                Lock::None => {
                    lock.warning = Some(failed(io::ErrorKind::Unsupported.into()));
                    return Ok(lock);
                }
            }
        }
        Err(RunError::Locked { out: out.to_owned(), pid })
    }

    /// Whether another run trains into the folder; changes nothing.
    ///
    /// # Errors
    /// [`RunError::Locked`].
    pub(super) fn check(out: &Path) -> Result<(), RunError> {
        // What cannot be opened is an error of `take`.
        let Ok(RegularFile { file, .. }) = RegularFile::open(&out.join(NAME), Links::Refuse) else { return Ok(()) };
        match file.try_lock_shared() {
            Err(TryLockError::WouldBlock) => Err(RunError::Locked { out: out.to_owned(), pid: read_pid(&file) }),
            Ok(()) | Err(TryLockError::Error(_)) => Ok(()),
        }
    }

    /// Creates the folder and those above it that are missing.
    fn make_folders(&mut self, out: &Path) -> io::Result<()> {
        let missing = out.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists());
        let missing: Vec<PathBuf> = missing.map(Path::to_owned).collect();
        for folder in missing.into_iter().rev() {
            match fs::create_dir(&folder) {
                Ok(()) => self.made.push(folder),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
            }
        }
        // A file in the way is an error here.
        fs::metadata(out)?.is_dir().then_some(()).ok_or_else(|| io::ErrorKind::NotADirectory.into())
    }
}

impl Drop for RunLock {
    /// Removes the file, and the folders that nothing was written into.
    fn drop(&mut self) {
        if let Some(file) = self.file.take() {
            // While the lock is held: a process that waits for it then finds that the name is gone,
            // and creates a new file. Windows does not show that, so the file stays there.
            if cfg!(unix) {
                let _ = fs::remove_file(&self.path);
            }
            drop(file);
        }
        for folder in self.made.iter().rev() {
            // It fails where there are files.
            let _ = fs::remove_dir(folder);
        }
    }
}

/// Opens the file of a lock, or creates it.
fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    if fs::symlink_metadata(path).is_ok() {
        // It must be a file of an earlier run, not a link or a pipe.
        let found = RegularFile::open(path, Links::Refuse);
        found.map_err(|error| match error {
            FileError::Io { source, .. } => source,
            other => io::Error::new(io::ErrorKind::InvalidInput, other),
        })?;
        options.create(false);
    }
    options.open(path)
}

/// The number of the process that has the lock; `None` where it has not written it yet, or where a
/// locked file cannot be read (Windows).
fn read_pid(file: &File) -> Option<u32> {
    let len = file.metadata().ok()?.len().min(16);
    let mut bytes = vec![0; usize::try_from(len).ok()?];
    read_exact_at(file, &mut bytes, 0).ok()?;
    str::from_utf8(&bytes).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_and_nothing_remains() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("a/b/out");
        RunLock::check(&out).unwrap();
        let lock = RunLock::take(&out).unwrap();
        assert!(lock.warning.is_none());
        let other = |result: Result<(), RunError>| match result.unwrap_err() {
            RunError::Locked { out: found, pid } => assert_eq!((found, pid), (out.clone(), Some(std::process::id()))),
            error => panic!("{error}"),
        };
        other(RunLock::take(&out).map(drop));
        other(RunLock::check(&out));
        drop(lock);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0, "also no folder");
        // A run that was killed left its file.
        fs::create_dir_all(&out).unwrap();
        fs::write(out.join(NAME), "4294967296 is no number of a process").unwrap();
        RunLock::check(&out).unwrap();
        let lock = RunLock::take(&out).unwrap();
        fs::write(out.join("adapter"), "x").unwrap();
        drop(lock);
        assert_eq!(fs::read_dir(&out).unwrap().count(), 1, "what was written stays");
    }

    #[test]
    fn a_folder_that_cannot_be_locked_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        for out in ["file", "file/out"] {
            let error = RunLock::take(&root.path().join(out)).unwrap_err();
            assert!(matches!(&error, RunError::Lock { .. }), "{error}");
        }
        fs::create_dir(root.path().join(NAME)).unwrap();
        let error = RunLock::take(root.path()).unwrap_err();
        assert!(matches!(&error, RunError::Lock { .. }), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn a_link_or_a_pipe_in_its_place_is_an_error() {
        let root = tempfile::tempdir().unwrap();
        let (path, precious) = (root.path().join(NAME), root.path().join("precious"));
        fs::write(&precious, "mine").unwrap();
        std::os::unix::fs::symlink(&precious, &path).unwrap();
        assert!(matches!(RunLock::take(root.path()).unwrap_err(), RunError::Lock { .. }));
        assert_eq!(fs::read(&precious).unwrap(), b"mine");
        fs::remove_file(&path).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).unwrap();
        assert!(matches!(RunLock::take(root.path()).unwrap_err(), RunError::Lock { .. }));
    }

    /// Threads stand for processes: each opens the file anew.
    #[test]
    fn of_many_at_once_exactly_one_has_it() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("out");
        for round in 0..50 {
            let ready = std::sync::Barrier::new(4);
            let attempt = || {
                ready.wait();
                let _ = RunLock::check(&out);
                let lock = RunLock::take(&out).ok();
                ready.wait();
                lock.is_some()
            };
            let won: usize = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..4).map(|_| scope.spawn(attempt)).collect();
                threads.into_iter().map(|thread| usize::from(thread.join().unwrap())).sum()
            });
            assert_eq!(won, 1, "round {round}");
            // An empty folder may stay: the thread that made it may have lost.
            assert!(!out.join(NAME).exists(), "round {round}");
        }
    }
}

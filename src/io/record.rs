//! Records the steps of [`step`](super::step) below a folder, in tests only.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One change of the file system. Paths are as the caller wrote them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// An empty file with a name.
    CreateFile { id: usize, path: PathBuf },
    /// An existing file is opened, to be written.
    OpenFile { id: usize, path: PathBuf },
    /// An empty file without a name.
    CreateUnnamed { id: usize },
    /// Another name of a file.
    Link { id: usize, path: PathBuf },
    /// The length of a file.
    SetLen { id: usize, len: u64 },
    /// Bytes of a file.
    Write { id: usize, offset: u64, bytes: Vec<u8> },
    /// The file is durable as it was after the first `until` steps.
    SyncFile { id: usize, until: usize },
    /// An empty folder.
    CreateFolder { path: PathBuf },
    /// A file or a folder gets another name.
    Rename { from: PathBuf, to: PathBuf },
    /// A file, or a folder and what is in it, is removed.
    Remove { path: PathBuf },
    /// The names in a folder are durable.
    SyncFolder { path: PathBuf },
}

/// The steps below one folder.
#[derive(Debug, Default)]
struct Log {
    steps: Vec<Step>,
    files: usize,
    named_only: bool,
}

type SharedLog = Arc<Mutex<Log>>;

/// Folders that are recorded now.
static ACTIVE: Mutex<Vec<(PathBuf, SharedLog)>> = Mutex::new(Vec::new());

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Records while it lives.
#[derive(Debug)]
pub(crate) struct Recording {
    root: PathBuf,
    log: SharedLog,
}

/// Records the steps below `root`, of all threads.
pub(crate) fn start(root: &Path) -> Recording {
    let log = SharedLog::default();
    locked(&ACTIVE).push((root.to_owned(), log.clone()));
    Recording { root: root.to_owned(), log }
}

impl Recording {
    /// Whether the file system has unnamed files, which is the default.
    pub(crate) fn set_unnamed(&self, has: bool) {
        locked(&self.log).named_only = !has;
    }

    /// The steps so far.
    #[cfg(all(feature = "convert", feature = "train"))]
    pub(crate) fn steps(&self) -> Vec<Step> {
        locked(&self.log).steps.clone()
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        locked(&ACTIVE).retain(|(root, log)| *root != self.root || !Arc::ptr_eq(log, &self.log));
    }
}

/// The log that a file's steps go to, and the file's number there.
#[derive(Debug)]
pub(crate) struct FileLog {
    log: SharedLog,
    id: usize,
}

fn log_of(path: &Path) -> Option<SharedLog> {
    locked(&ACTIVE).iter().rev().find(|(root, _)| path.starts_with(root)).map(|(_, log)| log.clone())
}

fn new_file(path: &Path, step: impl FnOnce(usize) -> Step) -> Option<FileLog> {
    let log = log_of(path)?;
    let id = {
        let mut log = locked(&log);
        let id = log.files;
        log.files += 1;
        log.steps.push(step(id));
        id
    };
    Some(FileLog { log, id })
}

/// A file was created.
pub(super) fn created(path: &Path) -> Option<FileLog> {
    new_file(path, |id| Step::CreateFile { id, path: path.to_owned() })
}

/// A file was opened.
pub(super) fn opened(path: &Path) -> Option<FileLog> {
    new_file(path, |id| Step::OpenFile { id, path: path.to_owned() })
}

/// A file without a name was created in `folder`.
pub(super) fn unnamed(folder: &Path) -> Option<FileLog> {
    new_file(folder, |id| Step::CreateUnnamed { id })
}

/// Whether files in `folder` must have names.
pub(super) fn refuses_unnamed(folder: &Path) -> bool {
    log_of(folder).is_some_and(|log| locked(&log).named_only)
}

/// A step of a file was made.
pub(super) fn file(log: &Option<FileLog>, step: impl FnOnce(usize) -> Step) {
    if let Some(FileLog { log, id }) = log {
        locked(log).steps.push(step(*id));
    }
}

/// The number of steps before a sync: writes of other threads during it may not be durable.
pub(super) fn begin_sync(log: &Option<FileLog>) -> usize {
    log.as_ref().map_or(0, |log| locked(&log.log).steps.len())
}

/// A step at `path` was made.
pub(super) fn path(path: &Path, step: impl FnOnce() -> Step) {
    if let Some(log) = log_of(path) {
        locked(&log).steps.push(step());
    }
}

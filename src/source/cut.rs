//! Cuts a pack at a chosen read, in tests: a file that shrinks while it is in use.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Packs that are watched.
static WATCHED: Mutex<Vec<Watched>> = Mutex::new(Vec::new());

struct Watched {
    path: PathBuf,
    /// The number of the read before which the file is cut, and its length then.
    cut: Option<(u64, u64)>,
    reads: u64,
}

fn watched() -> MutexGuard<'static, Vec<Watched>> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `work`, and cuts the pack at `path` before a read of it: its number, from 0, and the length
/// of the file then. The number of reads, too.
pub(crate) fn cut_at<T>(path: &Path, cut: Option<(u64, u64)>, work: impl FnOnce() -> T) -> (T, u64) {
    watched().push(Watched { path: path.to_owned(), cut, reads: 0 });
    let done = work();
    let mut all = watched();
    let place = all.iter().position(|watched| watched.path == path);
    (done, place.map_or(0, |place| all.remove(place).reads))
}

/// Called before each read of a pack.
pub(super) fn before_read(path: &Path) {
    let mut all = watched();
    let Some(watched) = all.iter_mut().find(|watched| watched.path == path) else { return };
    if let Some((_, len)) = watched.cut.filter(|(number, _)| *number == watched.reads) {
        let cut = File::options().write(true).open(path).and_then(|file| file.set_len(len));
        assert!(cut.is_ok(), "{cut:?}");
    }
    watched.reads += 1;
}

//! The file that a pack is written to: it gets its name when it is complete.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread;

use super::error::ConvertError;
use crate::io::access::Readers;
use crate::io::leftovers::remove_leftovers;
use crate::io::new_file::NewFile;
use crate::io::step::Output;
use crate::io::{folder_of, sync_dir};

/// A pack being written. Dropped before [`Target::finish`], it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct Target {
    file: NewFile,
    path: PathBuf,
    folder: PathBuf,
    force: bool,
}

/// Bytes that may be written before they are sent to the disk.
const SYNC_LEN: u64 = 64 << 20;

/// The way to write a [`Target`].
#[derive(Debug)]
pub(crate) struct Writer<'a> {
    target: &'a Target,
    unsynced: AtomicU64,
    wake: Sender<()>,
}

impl Writer<'_> {
    /// Writes `bytes` at `offset`.
    pub(crate) fn write(&self, bytes: &[u8], offset: u64) -> Result<(), ConvertError> {
        self.target.output().write_at(bytes, offset).map_err(|source| self.target.error(source))?;
        let len = bytes.len() as u64;
        let unsynced = self.unsynced.fetch_add(len, Ordering::Relaxed) + len;
        if unsynced >= SYNC_LEN {
            self.unsynced.store(0, Ordering::Relaxed);
            // The thread is gone only after an error of its own, which is reported at the end.
            let _ = self.wake.send(());
        }
        Ok(())
    }
}

impl Target {
    /// Creates the file in the folder of `path`, after checking that `len` bytes fit. It is no
    /// wider readable than `readers` allow; one that replaces a file keeps its permissions. First,
    /// what dead processes left in the folder is removed.
    ///
    /// # Errors
    /// If `path` exists and `force` is not set, if it is a folder, or if its folder is missing or
    /// full.
    pub(crate) fn create(path: &Path, len: u64, force: bool, mut readers: Readers) -> Result<Self, ConvertError> {
        let error = |source| ConvertError::Target { path: path.to_owned(), source };
        if path.is_dir() {
            return Err(error(io::Error::from(io::ErrorKind::IsADirectory)));
        }
        // A device or a pipe would be replaced by a file of its name.
        if path.metadata().is_ok_and(|m| !m.is_file()) {
            return Err(ConvertError::TargetNotAFile { path: path.to_owned() });
        }
        if !force && path.symlink_metadata().is_ok() {
            return Err(ConvertError::TargetExists { path: path.to_owned() });
        }
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            return Err(error(io::Error::from(io::ErrorKind::IsADirectory)));
        }
        let folder = folder_of(path).to_owned();
        // Asked for now, not after the work: the folder is made durable at the end.
        sync_dir(&folder).map_err(error)?;
        remove_leftovers(&folder);
        let available = fs4::available_space(&folder).map_err(error)?;
        if available < len {
            return Err(ConvertError::NoSpace { path: folder, needed: len, available });
        }
        if let Ok(old) = path.metadata() {
            readers.replace(&old);
        }
        let file = NewFile::create(&folder, &readers).map_err(error)?;
        // What is never written, the padding, reads as zero.
        file.output().set_len(len).map_err(error)?;
        Ok(Self { file, path: path.to_owned(), folder, force })
    }

    /// Runs `work`, which writes through the [`Writer`]. Beside it a thread of its own makes the
    /// file durable as it grows, so that little is left to wait for at the end.
    pub(crate) fn write_with<T>(
        &self,
        work: impl FnOnce(&Writer<'_>) -> Result<T, ConvertError>,
    ) -> Result<T, ConvertError> {
        let (wake, woken) = mpsc::channel();
        thread::scope(|scope| {
            let sync = move || woken.iter().try_for_each(|()| self.output().sync_data());
            let syncing = thread::Builder::new().spawn_scoped(scope, sync).map_err(ConvertError::SyncThread)?;
            let writer = Writer { target: self, unsynced: AtomicU64::new(0), wake };
            let result = work(&writer);
            drop(writer);
            // A write that failed in the background is reported once: it must not be lost.
            let synced = syncing.join().unwrap_or_else(|_| Err(io::Error::other("the syncing thread stopped")));
            let result = result?;
            synced.map_err(|source| self.error(source))?;
            Ok(result)
        })
    }

    fn output(&self) -> &Output {
        self.file.output()
    }

    fn error(&self, source: io::Error) -> ConvertError {
        ConvertError::Target { path: self.path.clone(), source }
    }

    /// Makes the file durable and gives it its name.
    ///
    /// # Errors
    /// After [`ConvertError::NotDurable`] the file has its name; after any other error there is
    /// nothing of it.
    pub(crate) fn finish(self) -> Result<(), ConvertError> {
        let Self { file, path, folder, force } = self;
        file.publish(&path, force).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => ConvertError::TargetExists { path: path.clone() },
            _ => ConvertError::Target { path: path.clone(), source },
        })?;
        sync_dir(&folder).map_err(|source| ConvertError::NotDurable { path, source })
    }
}

#[cfg(all(test, feature = "train"))]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::convert::synth::{self, Shape};
    use crate::convert::{Options, convert};
    use crate::io::{crash, record};

    #[test]
    fn a_failing_write_is_an_error_that_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let mut target = Target::create(&path, 100, false, Readers::default()).unwrap();
        // A file that cannot be written stands for a disk that cannot.
        std::fs::write(folder.path().join("read-only"), "").unwrap();
        target.file.set_output(Output::of(std::fs::File::open(folder.path().join("read-only")).unwrap()));
        let error = target.write_with(|writer| writer.write(&[1; 10], 0)).unwrap_err();
        assert!(matches!(&error, ConvertError::Target { path: found, .. } if *found == path), "{error:?}");
        drop(target);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_target_that_appears_meanwhile_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        let target = Target::create(&path, 10, false, Readers::default()).unwrap();
        std::fs::write(&path, "precious").unwrap();
        let error = target.finish().unwrap_err();
        assert!(matches!(error, ConvertError::TargetExists { .. }), "{error:?}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[cfg(unix)]
    #[test]
    fn a_folder_that_cannot_be_made_durable_leaves_the_whole_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        std::fs::write(&path, "old").unwrap();
        let mut target = Target::create(&path, 10, true, Readers::default()).unwrap();
        target.write_with(|writer| writer.write(b"0123456789", 0)).unwrap();
        // A folder that is not there stands for one that cannot be synced.
        target.folder = folder.path().join("none");
        let error = target.finish().unwrap_err();
        assert!(matches!(&error, ConvertError::NotDurable { path: found, .. } if *found == path), "{error:?}");
        assert_eq!(std::fs::read(&path).unwrap(), b"0123456789");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_pack_that_cannot_fit_is_refused_before_anything_is_written() {
        let folder = tempfile::tempdir().unwrap();
        let error = Target::create(&folder.path().join("out"), u64::MAX, false, Readers::default()).unwrap_err();
        assert!(matches!(error, ConvertError::NoSpace { needed: u64::MAX, .. }), "{error:?}");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    /// A conversion into `root/out.nf4pack`, cut at each step; `old` is a pack that it replaces.
    fn cut_conversion(unnamed: bool, replace: bool) -> crash::Counts {
        let (root, source) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let shape = Shape {
            hidden: 48,
            intermediate: 80,
            layers: 1,
            heads: 2,
            kv_heads: 1,
            head_dim: 24,
            vocabulary: 50,
            tied: true,
        };
        let source = source.path().join("model");
        synth::write(&source, &shape, 7, None, &()).unwrap();
        let options = |force| Options { threads: Some(NonZeroUsize::MIN), force, ..Options::default() };
        let pack = |root: &Path| root.join("out.nf4pack");
        let old = b"an older pack".to_vec();
        let before: crash::Tree = replace.then(|| ("out.nf4pack".to_owned(), old.clone())).into_iter().collect();
        crash::put(&before, root.path());
        let recording = record::start(root.path());
        recording.set_unnamed(unnamed);
        convert(&source, &pack(root.path()), options(replace), &()).unwrap();
        let new = std::fs::read(pack(root.path())).unwrap();
        crash::every_crash(root.path(), &before, &recording.steps(), |crash| {
            match crash.tree.get("out.nf4pack") {
                None => assert!(!replace && !crash.at_end, "the pack is lost"),
                Some(found) => assert!(*found == new || (replace && !crash.at_end && *found == old), "half a pack"),
            }
            if crash.is_new_shape {
                let root = tempfile::tempdir().unwrap();
                crash::put(crash.tree, root.path());
                convert(&source, &pack(root.path()), options(true), &()).unwrap();
                assert_eq!(crash::tree(root.path()), [("out.nf4pack".to_owned(), new.clone())].into());
            }
        })
    }

    #[test]
    fn cut_at_any_step_a_pack_is_whole_or_not_there_and_an_old_one_stays() {
        for (unnamed, replace) in [(true, false), (true, true), (false, false), (false, true)] {
            let counts = cut_conversion(unnamed, replace);
            assert!(counts.steps >= 8 && counts.states > 2, "{counts:?}");
        }
    }
}

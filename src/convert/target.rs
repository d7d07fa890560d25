//! The file that a pack is written to: it gets its name when it is complete.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread;

use super::error::ConvertError;
use super::journal::{self, Record, Slots};
use crate::io::access::Readers;
use crate::io::leftovers::remove_leftovers;
use crate::io::new_file::NewFile;
use crate::io::step::Output;
use crate::io::{folder_of, read_exact_at, sync_dir};

/// A pack being written. Dropped before [`Target::finish`], it leaves nothing behind, unless it is
/// one of [`Target::resume`].
#[derive(Debug)]
pub(crate) struct Target {
    file: NewFile,
    path: PathBuf,
    folder: PathBuf,
    force: bool,
    len: u64,
    partial: Option<Partial>,
}

/// The file of a conversion that keeps its finished part.
#[derive(Debug)]
struct Partial {
    path: PathBuf,
    slots: Slots,
}

/// Where a conversion into `target` keeps its finished part.
pub(crate) fn partial_path(target: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(target.file_name().unwrap_or_default());
    name.push("-partial");
    folder_of(target).join(name)
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

impl<'a> Writer<'a> {
    /// The target.
    pub(crate) const fn target(&self) -> &'a Target {
        self.target
    }

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
    pub(crate) fn create(path: &Path, len: u64, force: bool, readers: Readers) -> Result<Self, ConvertError> {
        let error = |source| ConvertError::Target { path: path.to_owned(), source };
        let (folder, readers) = Self::check(path, force, readers)?;
        check_space(&folder, len)?;
        let file = NewFile::create(&folder, &readers).map_err(error)?;
        // What is never written, the padding, reads as zero.
        file.output().set_len(len).map_err(error)?;
        Ok(Self { file, path: path.to_owned(), folder, force, len, partial: None })
    }

    /// As [`Target::create`], but the file is [`partial_path`]. It is continued if it exists, and
    /// stays after an error if it has a record.
    ///
    /// # Errors
    /// As [`Target::create`], and [`ConvertError::PartialInUse`].
    pub(super) fn resume(path: &Path, len: u64, force: bool, readers: Readers, slots: Slots) -> Result<Self, ConvertError> {
        let (folder, readers) = Self::check(path, force, readers)?;
        let partial = partial_path(path);
        let error = |source| ConvertError::Target { path: partial.clone(), source };
        let file = NewFile::open_kept(&partial, &readers).map_err(|source| match source.kind() {
            io::ErrorKind::WouldBlock => ConvertError::PartialInUse { path: partial.clone() },
            _ => error(source),
        })?;
        let used = fs4::FileExt::allocated_size(file.output().as_file()).map_err(error)?;
        check_space(&folder, len.saturating_sub(used))?;
        let partial = Some(Partial { path: partial, slots });
        Ok(Self { file, path: path.to_owned(), folder, force, len, partial })
    }

    /// Checks that `path` can be written, and removes what dead processes left there. Returns its
    /// folder, and the readers with those of the file that is replaced.
    fn check(path: &Path, force: bool, mut readers: Readers) -> Result<(PathBuf, Readers), ConvertError> {
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
        // Opened now, not after the work: the folder is made durable at the end.
        sync_dir(&folder).map_err(error)?;
        remove_leftovers(&folder);
        if let Ok(old) = path.metadata() {
            readers.replace(&old);
        }
        Ok((folder, readers))
    }

    /// The records of an interrupted conversion, the newest first.
    ///
    /// # Errors
    /// [`ConvertError::Target`].
    pub(super) fn records(&self) -> Result<Vec<Record>, ConvertError> {
        let Some(partial) = &self.partial else { return Ok(Vec::new()) };
        let records = journal::read(self.output().as_file());
        let records = records.map_err(|source| ConvertError::Target { path: partial.path.clone(), source })?;
        self.file.set_kept(!records.is_empty());
        Ok(records)
    }

    /// Forgets what an interrupted conversion has written.
    ///
    /// # Errors
    /// [`ConvertError::Target`].
    pub(super) fn clear(&self) -> Result<(), ConvertError> {
        let Some(partial) = &self.partial else { return Ok(()) };
        self.file.set_kept(false);
        partial.slots.clear(self.output()).map_err(|source| self.error(source))
    }

    /// Records what is finished. All of it has been written.
    ///
    /// # Errors
    /// [`ConvertError::Target`].
    pub(super) fn record(&self, record: &Record) -> Result<(), ConvertError> {
        let Some(partial) = &self.partial else { return Ok(()) };
        partial.slots.write(self.output(), record).map_err(|source| self.error(source))?;
        self.file.set_kept(true);
        Ok(())
    }

    /// The path of the finished part, for errors.
    pub(super) fn partial(&self) -> PathBuf {
        self.partial.as_ref().map_or_else(|| self.path.clone(), |partial| partial.path.clone())
    }

    /// Fills `bytes` with those of the finished part at `offset`.
    ///
    /// # Errors
    /// [`ConvertError::Target`].
    pub(super) fn read(&self, bytes: &mut [u8], offset: u64) -> Result<(), ConvertError> {
        read_exact_at(self.output().as_file(), bytes, offset)
            .map_err(|source| ConvertError::Target { path: self.partial(), source })
    }

    /// Runs `work`, which writes through the [`Writer`]. Meanwhile a thread of its own makes the
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
    /// nothing of it, except the finished part where another file has the name.
    pub(crate) fn finish(self) -> Result<(), ConvertError> {
        if self.partial.is_some() {
            if !self.force && self.path.symlink_metadata().is_ok() {
                return Err(ConvertError::TargetExists { path: self.path });
            }
            // The records go last: without them, a crash would lose the finished part.
            self.output().sync_data().map_err(|source| self.error(source))?;
            self.output().set_len(self.len).map_err(|source| self.error(source))?;
            self.file.set_kept(false);
        }
        let Self { file, path, folder, force, .. } = self;
        file.publish(&path, force).map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => ConvertError::TargetExists { path: path.clone() },
            _ => ConvertError::Target { path: path.clone(), source },
        })?;
        sync_dir(&folder).map_err(|source| ConvertError::NotDurable { path, source })
    }
}

/// Fails unless `folder` has room for `needed` bytes.
fn check_space(folder: &Path, needed: u64) -> Result<(), ConvertError> {
    let error = |source| ConvertError::Target { path: folder.to_owned(), source };
    let available = fs4::available_space(folder).map_err(error)?;
    match available < needed {
        true => Err(ConvertError::NoSpace { path: folder.to_owned(), needed, available }),
        false => Ok(()),
    }
}

#[cfg(all(test, feature = "train"))]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

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

    #[test]
    fn a_part_without_a_record_is_not_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let (path, count) = (folder.path().join("out"), || std::fs::read_dir(folder.path()).unwrap().count());
        let resume = |len| Target::resume(&path, len, false, Readers::default(), Slots::new(10, 0, 0));
        let error = resume(u64::MAX).unwrap_err();
        assert!(matches!(error, ConvertError::NoSpace { .. }), "{error:?}");
        assert_eq!(count(), 0, "no space");
        drop(resume(10).unwrap());
        assert_eq!(count(), 0, "an error before the first record");
        let target = resume(10).unwrap();
        target.record(&Record::default()).unwrap();
        std::fs::write(&path, "precious").unwrap();
        let error = target.finish().unwrap_err();
        assert!(matches!(error, ConvertError::TargetExists { .. }), "{error:?}");
        assert_eq!((std::fs::read(&path).unwrap().as_slice(), count()), (b"precious".as_slice(), 2), "a finished part");
        std::fs::remove_file(&path).unwrap();
        resume(10).unwrap().record(&Record::default()).unwrap();
        assert_eq!(count(), 1, "a record");
        resume(u64::MAX).unwrap_err();
        assert_eq!(count(), 1, "an earlier part");
    }

    const SHAPE: Shape = Shape {
        hidden: 48,
        intermediate: 80,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        head_dim: 24,
        vocabulary: 50,
        tied: true,
        q_k_norm: true,
    };

    /// A conversion into `root/out.nf4pack`, cut at each step; `old` is a pack that it replaces.
    fn cut_conversion(unnamed: bool, replace: bool) -> crash::Counts {
        let (root, source) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let source = source.path().join("model");
        synth::write(&source, &SHAPE, 7, None, &()).unwrap();
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

    #[test]
    fn cut_at_any_step_a_conversion_that_keeps_its_part_continues_to_the_same_bytes() {
        for force in [false, true] {
            cut_conversion_with_a_part(force);
        }
    }

    /// As [`cut_conversion`], with `--resume`; with `force`, it replaces an old pack.
    fn cut_conversion_with_a_part(force: bool) {
        let (root, source) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let source = source.path().join("model");
        synth::write(&source, &SHAPE, 7, Some(12_000), &()).unwrap();
        let options = Options { threads: Some(NonZeroUsize::MIN), resume: true, force, ..Options::default() };
        let old = b"an older pack".to_vec();
        let before: crash::Tree = force.then(|| ("out.nf4pack".to_owned(), old.clone())).into_iter().collect();
        crash::put(&before, root.path());
        let recording = record::start(root.path());
        let pack = |root: &Path| root.join("out.nf4pack");
        convert(&source, &pack(root.path()), options.clone(), &()).unwrap();
        let whole = crash::tree(root.path());
        assert_eq!(whole.keys().collect::<Vec<_>>(), ["out.nf4pack"]);
        let (mut continued, mut damaged) = (0, 0);
        let counts = crash::every_crash(root.path(), &before, &recording.steps(), |crash| {
            let found = crash.tree.get("out.nf4pack");
            assert!(!force || found.is_some(), "the old pack is lost");
            if crash.at_end || found.is_some_and(|found| !force || *found != old) {
                assert!(*crash.tree == whole, "half a pack");
                return;
            }
            let root = tempfile::tempdir().unwrap();
            crash::put(crash.tree, root.path());
            let report = convert(&source, &pack(root.path()), options.clone(), &()).unwrap();
            assert!(crash::tree(root.path()) == whole);
            continued += u32::from(report.kept.is_some_and(|kept| kept.weights > 0));
            damaged += u32::from(report.kept.is_some_and(|kept| kept.damaged));
        });
        assert!(counts.steps > 30 && continued > 30, "{counts:?}, {continued} continued");
        assert_eq!(damaged, 0, "a record was durable before what it names");
    }
}

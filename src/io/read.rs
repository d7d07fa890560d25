//! Reads files that others made: regular files only, none larger than a limit.
//!
//! A pipe has no end that is known, a device may have none at all, and a sparse file of a few bytes
//! on disk may be a terabyte long. None of them may hang the program or fill its memory.

use std::fs::{self, File};
use std::io;
#[cfg(feature = "train")]
use std::io::Read;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::read_exact_at;

/// Why a file was not read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FileError {
    /// The system refuses.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A folder, a pipe, a socket or a device.
    #[error("{} is {found}, not a regular file", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// Its kind.
        found: &'static str,
    },
    /// A symbolic link in place of a file that this program writes itself.
    #[error("{} is a symbolic link: this program never writes one there, and follows none", path.display())]
    Link {
        /// The link.
        path: PathBuf,
    },
    /// Larger than any such file.
    #[error("{} has {found} bytes, at most {limit} are accepted", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Bytes that are accepted.
        limit: u64,
        /// Bytes of the file.
        found: u64,
    },
}

/// What a symbolic link as the last part of a path is.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Links {
    /// The file that it leads to. Caches of the hub are folders of links.
    Follow,
    /// An error: a file that this program writes is never a link.
    #[cfg(feature = "train")]
    Refuse,
}

impl Links {
    fn are_refused(self) -> bool {
        match self {
            Self::Follow => false,
            #[cfg(feature = "train")]
            Self::Refuse => true,
        }
    }
}

/// A regular file that is open for reading.
#[derive(Debug)]
pub(crate) struct RegularFile {
    path: PathBuf,
    /// The open file.
    pub(crate) file: File,
    /// Its bytes when it was opened.
    pub(crate) len: u64,
}

impl RegularFile {
    /// Opens a file. It neither waits for the writer of a pipe nor opens a device.
    ///
    /// # Errors
    /// [`FileError`], except [`FileError::TooLarge`].
    pub(crate) fn open(path: &Path, links: Links) -> Result<Self, FileError> {
        let failed = |source| FileError::Io { path: path.to_owned(), source };
        // Asked before opening, too: opening a device may change it.
        let metadata = if links.are_refused() { fs::symlink_metadata(path) } else { fs::metadata(path) };
        check(path, &metadata.map_err(failed)?)?;
        let file = open_without_waiting(path, links).map_err(failed)?;
        // Another file may have taken the name since.
        let metadata = file.metadata().map_err(failed)?;
        check(path, &metadata)?;
        Ok(Self { path: path.to_owned(), file, len: metadata.len() })
    }

    /// The bytes from `offset` on that fill `buf`.
    ///
    /// # Errors
    /// [`FileError::Io`], also if the file is shorter.
    pub(crate) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<(), FileError> {
        read_exact_at(&self.file, buf, offset).map_err(|source| FileError::Io { path: self.path.clone(), source })
    }

    /// All bytes that the file had when it was opened.
    ///
    /// # Errors
    /// [`FileError::TooLarge`] before anything is allocated, [`FileError::Io`].
    pub(crate) fn read(&self, limit: u64) -> Result<Vec<u8>, FileError> {
        let too_large = || FileError::TooLarge { path: self.path.clone(), limit, found: self.len };
        let len = usize::try_from(self.len).ok().filter(|_| self.len <= limit).ok_or_else(too_large)?;
        let mut bytes = vec![0; len];
        self.read_exact_at(&mut bytes, 0)?;
        Ok(bytes)
    }
}

/// Reads a regular file of at most `limit` bytes.
///
/// # Errors
/// [`FileError`].
pub(crate) fn read(path: &Path, links: Links, limit: u64) -> Result<Vec<u8>, FileError> {
    RegularFile::open(path, links)?.read(limit)
}

/// Bytes of a file of a user that are read into memory.
#[cfg(feature = "train")]
pub(crate) const MAX_READ: u64 = 4 << 30;

/// Opens what a user names: also a pipe, such as a shell makes of `<(..)`, but no device, which may
/// have no end.
///
/// # Errors
/// [`FileError::NotAFile`], [`FileError::Io`].
#[cfg(feature = "train")]
pub(crate) fn open_any(path: &Path) -> Result<(File, fs::Metadata), FileError> {
    let failed = |source| FileError::Io { path: path.to_owned(), source };
    // The system says what is wrong with other paths when they are opened.
    if let Ok(found @ "a device") = fs::metadata(path).map(|metadata| name_of(metadata.file_type())) {
        return Err(FileError::NotAFile { path: path.to_owned(), found });
    }
    let file = File::open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    Ok((file, metadata))
}

/// Reads what a user names on the command line, also a pipe, but no more than `limit` bytes.
///
/// # Errors
/// [`FileError::TooLarge`], [`FileError::Io`].
#[cfg(feature = "cli")]
pub(crate) fn read_any(path: &Path, limit: u64) -> Result<Vec<u8>, FileError> {
    let file = File::open(path).map_err(|source| FileError::Io { path: path.to_owned(), source })?;
    read_open(path, file, limit)
}

/// Reads an open file, but no more than `limit` bytes; errors name the path.
///
/// # Errors
/// [`FileError::TooLarge`], [`FileError::Io`].
#[cfg(feature = "train")]
pub(crate) fn read_open(path: &Path, file: File, limit: u64) -> Result<Vec<u8>, FileError> {
    let failed = |source| FileError::Io { path: path.to_owned(), source };
    let len = file.metadata().map_err(failed)?.len();
    let too_large = |found| FileError::TooLarge { path: path.to_owned(), limit, found };
    if len > limit {
        return Err(too_large(len));
    }
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(usize::try_from(len).unwrap_or_default()).map_err(|e| failed(e.into()))?;
    let found = file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(failed)? as u64;
    if found > limit { Err(too_large(found)) } else { Ok(bytes) }
}

/// Checks that it is a regular file.
fn check(path: &Path, metadata: &fs::Metadata) -> Result<(), FileError> {
    let kind = metadata.file_type();
    match kind.is_file() {
        true => Ok(()),
        false if kind.is_symlink() => Err(FileError::Link { path: path.to_owned() }),
        false => Err(FileError::NotAFile { path: path.to_owned(), found: name_of(kind) }),
    }
}

/// A kind of file in words.
fn name_of(kind: fs::FileType) -> &'static str {
    #[cfg(unix)]
    {
        use std::os::unix::fs::FileTypeExt;
        if kind.is_fifo() {
            return "a pipe";
        } else if kind.is_socket() {
            return "a socket";
        } else if kind.is_char_device() || kind.is_block_device() {
            return "a device";
        }
    }
    if kind.is_dir() { "a folder" } else { "something else" }
}

/// Opens a file, and returns at once where a pipe has taken its name.
fn open_without_waiting(path: &Path, links: Links) -> io::Result<File> {
    #[cfg(unix)]
    {
        use rustix::fs::{Mode, OFlags};
        let follow = if links.are_refused() { OFlags::NOFOLLOW } else { OFlags::empty() };
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC | follow;
        Ok(File::from(rustix::fs::open(path, flags, Mode::empty())?))
    }
    #[cfg(not(unix))]
    {
        let _ = links;
        File::open(path)
    }
}

#[cfg(all(test, feature = "cli"))]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_up_to_its_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, b"0123456789").unwrap();
        for links in [Links::Follow, Links::Refuse] {
            assert_eq!(read(&path, links, 10).unwrap(), b"0123456789");
            let error = read(&path, links, 9).unwrap_err();
            assert!(matches!(error, FileError::TooLarge { limit: 9, found: 10, .. }), "{error}");
        }
        assert_eq!(read_any(&path, 10).unwrap(), b"0123456789");
        assert!(matches!(read_any(&path, 9).unwrap_err(), FileError::TooLarge { limit: 9, found: 10, .. }));
        let missing = read(&folder.path().join("none"), Links::Follow, 9).unwrap_err();
        assert!(matches!(&missing, FileError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound), "{missing}");
        let of_folder = read(folder.path(), Links::Follow, 9).unwrap_err();
        assert!(matches!(of_folder, FileError::NotAFile { found: "a folder", .. }), "{of_folder}");
    }

    #[cfg(unix)]
    #[test]
    fn a_device_is_refused_also_behind_a_link() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("data.jsonl");
        std::os::unix::fs::symlink("/dev/zero", &link).unwrap();
        for path in [link.as_path(), Path::new("/dev/zero")] {
            assert!(matches!(open_any(path), Err(FileError::NotAFile { found: "a device", .. })), "{path:?}");
        }
        fs::write(folder.path().join("file"), "a").unwrap();
        assert_eq!(open_any(&folder.path().join("file")).unwrap().1.len(), 1);
        assert!(matches!(open_any(&folder.path().join("none")), Err(FileError::Io { .. })));
    }

    #[test]
    fn a_sparse_file_of_a_terabyte_is_refused_unread() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sparse");
        // Some file systems have no files of that size.
        if File::create(&path).and_then(|file| file.set_len(1 << 40)).is_ok() {
            let errors = [read(&path, Links::Follow, 1 << 20), read_any(&path, 1 << 20)];
            assert!(errors.into_iter().all(|e| matches!(e, Err(FileError::TooLarge { found, .. }) if found == 1 << 40)));
        }
    }

    #[cfg(unix)]
    #[test]
    fn pipes_sockets_devices_and_links_are_no_files() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        rustix::fs::mkfifoat(rustix::fs::CWD, at("pipe"), 0o600.into()).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        symlink("/dev/zero", at("device")).unwrap();
        symlink("pipe", at("to pipe")).unwrap();
        for (name, expected) in [("pipe", "a pipe"), ("socket", "a socket"), ("device", "a device"), ("to pipe", "a pipe")] {
            let error = read(&at(name), Links::Follow, 9).unwrap_err();
            assert!(matches!(error, FileError::NotAFile { found, .. } if found == expected), "{error}");
        }
        fs::write(at("file"), b"bytes").unwrap();
        symlink("file", at("link")).unwrap();
        assert_eq!(read(&at("link"), Links::Follow, 9).unwrap(), b"bytes");
        for name in ["link", "device"] {
            let error = read(&at(name), Links::Refuse, 9).unwrap_err();
            assert!(matches!(error, FileError::Link { .. }), "{error}");
        }
        assert!(open_without_waiting(&at("link"), Links::Refuse).is_err());
        assert!(open_without_waiting(&at("pipe"), Links::Follow).unwrap().metadata().is_ok(), "it does not wait");
        assert!(matches!(read_any("/dev/zero".as_ref(), 1 << 16).unwrap_err(), FileError::TooLarge { .. }));
        // The system calls it a regular file without bytes.
        #[cfg(target_os = "linux")]
        assert_eq!(read("/proc/self/status".as_ref(), Links::Refuse, 9).unwrap(), b"");
    }
}

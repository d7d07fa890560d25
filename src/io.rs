//! Reads and writes at an offset without a shared cursor, and page-aligned buffers for fast reads.

use std::fs::File;
use std::io;
#[cfg(any(feature = "convert", feature = "train"))]
use std::path::Path;

#[cfg(feature = "train")]
pub(crate) mod folder;
#[cfg(any(feature = "convert", feature = "gpu"))]
pub(crate) mod read;

/// Alignment of an [`AlignedBuf`]: a page. A large allocation usually starts 16 bytes past a page,
/// and a read into such a buffer has a fifth of the speed.
pub(crate) const BUFFER_ALIGN: usize = 4096;

/// Fills `buf` with the bytes of `file` from `offset` on. It does not use the file cursor (and does
/// not move it on Unix), so threads may share one `File`.
///
/// # Errors
///
/// `UnexpectedEof` if the file is too short; else the error of the operating system.
pub(crate) fn read_exact_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::read_exact_at(file, buf, offset);
    #[cfg(windows)]
    return windows::read_exact_at(file, buf, offset);
    #[cfg(not(any(unix, windows)))]
    {
        let _ = (file, buf, offset);
        Err(io::Error::new(io::ErrorKind::Unsupported, "this platform has no read at an offset"))
    }
}

/// Writes `bytes` to `file` from `offset` on, without the file cursor, as [`read_exact_at`].
///
/// # Errors
///
/// `WriteZero` if the file accepts no more bytes; else the error of the operating system.
#[cfg(feature = "convert")]
pub(crate) fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    return std::os::unix::fs::FileExt::write_all_at(file, bytes, offset);
    #[cfg(windows)]
    return windows::write_all_at(file, bytes, offset);
    #[cfg(not(any(unix, windows)))]
    {
        let _ = (file, bytes, offset);
        Err(io::Error::new(io::ErrorKind::Unsupported, "this platform has no write at an offset"))
    }
}

/// On Windows, `seek_read` and `seek_write` move the cursor, but each call has its own offset. So
/// threads may share a file.
#[cfg(windows)]
mod windows {
    use std::fs::File;
    use std::io::{self, ErrorKind};
    use std::os::windows::fs::FileExt;

    pub(super) fn read_exact_at(file: &File, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match file.seek_read(buf, offset) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(n) => {
                    buf = &mut buf[n..];
                    offset += n as u64;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    #[cfg(feature = "convert")]
    pub(super) fn write_all_at(file: &File, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            match file.seek_write(bytes, offset) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(n) => {
                    bytes = &bytes[n..];
                    offset += n as u64;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// The parent folder of a path.
#[cfg(any(feature = "convert", feature = "train"))]
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Syncs `folder`, so that renames and new files in it survive a power failure. Does nothing on
/// systems that cannot sync folders.
///
/// # Errors
///
/// Any error from opening or syncing the folder.
#[cfg(any(feature = "convert", feature = "train"))]
pub(crate) fn sync_dir(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    return match File::open(folder)?.sync_all() {
        // Some file systems do not support a sync of folders, and return an error.
        Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        result => result,
    };
    #[cfg(not(unix))]
    {
        let _ = folder;
        Ok(())
    }
}

/// Creates the file `path` with these bytes and syncs it.
///
/// # Errors
///
/// `AlreadyExists` if the file exists; else the error of the operating system.
#[cfg(any(feature = "convert", feature = "train"))]
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    io::Write::write_all(&mut file, bytes)?;
    file.sync_all()
}

/// Prefix and suffix of the name of a temporary folder.
#[cfg(any(feature = "convert", feature = "train"))]
const TEMPORARY: [&str; 2] = [".nf4pack-", ".tmp"];

/// Whether the path names a temporary folder.
#[cfg(feature = "train")]
pub(crate) fn is_temporary(path: &Path) -> bool {
    let [prefix, suffix] = TEMPORARY;
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix) && name.ends_with(suffix))
}

/// Creates a hidden folder in `parent`, with the default permissions. It is removed on drop unless
/// it is published.
///
/// # Errors
///
/// Any error of the operating system.
#[cfg(any(feature = "convert", feature = "train"))]
pub(crate) fn temporary_folder(parent: &Path) -> io::Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    let [prefix, suffix] = TEMPORARY;
    builder.prefix(prefix).suffix(suffix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    builder.tempdir_in(parent)
}

/// Renames `temporary` to `target`, in the same parent folder. `target` must be an empty folder or
/// not exist. The caller syncs the parent: if that fails, the folder exists; if this fails, it does
/// not.
///
/// # Errors
///
/// Any error of the operating system.
#[cfg(any(feature = "convert", feature = "train"))]
pub(crate) fn publish_folder(temporary: tempfile::TempDir, target: &Path) -> io::Result<()> {
    // Some systems cannot rename over an empty folder.
    if target.is_dir() {
        std::fs::remove_dir(target)?;
    }
    std::fs::rename(temporary.path(), target)?;
    // The temporary name no longer exists, so there is nothing to remove.
    let _ = temporary.keep();
    Ok(())
}

/// A page of bytes, aligned to a page.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; BUFFER_ALIGN]);

/// A page-aligned byte buffer, for reuse across reads.
#[derive(Debug, Default)]
pub(crate) struct AlignedBuf(Vec<Page>);

impl AlignedBuf {
    /// A buffer with capacity for `len` bytes, filled with zeros.
    #[cfg(feature = "convert")]
    pub(crate) fn new(len: usize) -> Self {
        let mut buf = Self::default();
        buf.first_mut(len);
        buf
    }

    /// All bytes.
    #[cfg(feature = "convert")]
    pub(crate) fn filled(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }

    /// The first `len` bytes, for overwriting. Grows the buffer if it is shorter; its contents are
    /// then lost.
    pub(crate) fn first_mut(&mut self, len: usize) -> &mut [u8] {
        if self.0.len() * BUFFER_ALIGN < len {
            self.0 = vec![bytemuck::Zeroable::zeroed(); len.div_ceil(BUFFER_ALIGN)];
        }
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
    }

    /// As [`AlignedBuf::first_mut`]; `None` if there is no memory for `len` bytes.
    #[cfg(any(feature = "convert", feature = "gpu"))]
    pub(crate) fn try_first_mut(&mut self, len: usize) -> Option<&mut [u8]> {
        let pages = len.div_ceil(BUFFER_ALIGN);
        if self.0.len() < pages {
            // Frees the old pages first.
            self.0 = Vec::new();
            self.0.try_reserve_exact(pages).ok()?;
            self.0.resize(pages, bytemuck::Zeroable::zeroed());
        }
        Some(self.first_mut(len))
    }
}

#[cfg(all(test, feature = "convert"))]
mod tests {
    use super::*;

    #[test]
    fn writes_and_reads_at_offsets_without_the_cursor() {
        let file = tempfile::tempfile().unwrap();
        write_all_at(&file, b"world", 6).unwrap();
        write_all_at(&file, b"hello ", 0).unwrap();
        let mut all = [0; 11];
        read_exact_at(&file, &mut all, 0).unwrap();
        assert_eq!(&all, b"hello world");
        let mut tail = [0; 4];
        read_exact_at(&file, &mut tail, 7).unwrap();
        assert_eq!(&tail, b"orld");
        assert_eq!(read_exact_at(&file, &mut tail, 8).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        read_exact_at(&file, &mut [], 1000).unwrap();
    }

    #[test]
    fn buffers_start_on_a_page_also_after_growing() {
        let mut buf = AlignedBuf::new(10);
        for len in [0, 1, 10, 4096, 5000, 1 << 20, 17] {
            let bytes = buf.first_mut(len);
            assert_eq!(bytes.len(), len);
            assert_eq!(bytes.as_ptr() as usize % BUFFER_ALIGN, 0);
            bytes.fill(0xaa);
        }
    }

    #[test]
    fn a_folder_can_be_synced() {
        sync_dir(tempfile::tempdir().unwrap().path()).unwrap();
    }
}

//! Reading and writing at an offset without a shared cursor, and buffers that the kernel copies into at full speed.

use std::fs::File;
use std::io;
#[cfg(any(feature = "convert", feature = "train"))]
use std::path::Path;

#[cfg(feature = "train")]
pub(crate) mod folder;

/// Alignment of an [`AlignedBuf`]: a page. A read into a buffer that starts 16 bytes past a page, where a large allocation
/// usually lands, runs at a fifth of the speed.
pub(crate) const BUFFER_ALIGN: usize = 4096;

/// Fills `buf` with the bytes of `file` from `offset` on. The file's cursor is neither used nor, on Unix, moved, so threads
/// may share one `File`.
///
/// # Errors
///
/// `UnexpectedEof` where the file ends first; otherwise what the operating system says.
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

/// Writes all of `bytes` into `file` from `offset` on, with the same freedom from the cursor as [`read_exact_at`].
///
/// # Errors
///
/// `WriteZero` where the file takes no more bytes; otherwise what the operating system says.
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

/// Windows moves the cursor in `seek_read` and `seek_write`, but takes the offset with the call, so sharing stays safe.
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

/// The folder that a path lies in.
#[cfg(any(feature = "convert", feature = "train"))]
pub(crate) fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes a rename or a new file in `folder` survive a power cut; does nothing where folders cannot be synced.
///
/// # Errors
///
/// What the operating system says when it opens or syncs the folder.
#[cfg(any(feature = "convert", feature = "train"))]
pub(crate) fn sync_dir(folder: &Path) -> io::Result<()> {
    #[cfg(unix)]
    return match File::open(folder)?.sync_all() {
        // Some file systems have nothing to do for a folder, and say so.
        Err(e) if matches!(e.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) => Ok(()),
        result => result,
    };
    #[cfg(not(unix))]
    {
        let _ = folder;
        Ok(())
    }
}

/// Makes the new file `path` with these bytes, durable.
///
/// # Errors
///
/// `AlreadyExists` where there is one; otherwise what the operating system says.
#[cfg(any(feature = "convert", feature = "train"))]
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    io::Write::write_all(&mut file, bytes)?;
    file.sync_all()
}

/// How the name of a temporary folder begins and ends.
#[cfg(any(feature = "convert", feature = "train"))]
const TEMPORARY: [&str; 2] = [".nf4pack-", ".tmp"];

/// Whether a path has the name of a temporary folder.
#[cfg(feature = "train")]
pub(crate) fn is_temporary(path: &Path) -> bool {
    let [prefix, suffix] = TEMPORARY;
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(prefix) && name.ends_with(suffix))
}

/// A hidden folder in `parent`, with the permissions that a new folder gets there; it vanishes unless it is published.
///
/// # Errors
///
/// What the operating system says.
#[cfg(any(feature = "convert", feature = "train"))]
pub(crate) fn temporary_folder(parent: &Path) -> io::Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    let [prefix, suffix] = TEMPORARY;
    builder.prefix(prefix).suffix(suffix);
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o777));
    builder.tempdir_in(parent)
}

/// Gives `temporary`, which lies beside it, the name of a folder that is empty or not there. To make that durable is the
/// caller's: when that fails, the folder is there, and when this fails, it is not.
///
/// # Errors
///
/// What the operating system says.
#[cfg(any(feature = "convert", feature = "train"))]
pub(crate) fn publish_folder(temporary: tempfile::TempDir, target: &Path) -> io::Result<()> {
    // Not every system renames over an empty folder.
    if target.is_dir() {
        std::fs::remove_dir(target)?;
    }
    std::fs::rename(temporary.path(), target)?;
    // Its name is gone: there is nothing left to remove.
    let _ = temporary.keep();
    Ok(())
}

/// A page of bytes, on a page.
#[derive(Debug, Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(4096))]
struct Page([u8; BUFFER_ALIGN]);

/// A byte buffer that starts on a page, to be reused from read to read.
#[derive(Debug, Default)]
pub(crate) struct AlignedBuf(Vec<Page>);

impl AlignedBuf {
    /// A buffer that holds `len` bytes without growing; it starts as zeros.
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

    /// The first `len` bytes, to be overwritten. The buffer grows where it is shorter, and its contents are then lost.
    pub(crate) fn first_mut(&mut self, len: usize) -> &mut [u8] {
        if self.0.len() * BUFFER_ALIGN < len {
            self.0 = vec![bytemuck::Zeroable::zeroed(); len.div_ceil(BUFFER_ALIGN)];
        }
        &mut bytemuck::cast_slice_mut(&mut self.0)[..len]
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

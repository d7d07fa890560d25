//! Reads and writes at an offset without a shared cursor, page-aligned buffers for fast reads, and
//! files and folders that appear complete or not at all.

use std::fs::File;
use std::io;
#[cfg(any(feature = "convert", feature = "train"))]
use std::path::Path;

#[cfg(any(feature = "convert", feature = "train"))]
pub(crate) mod access;
#[cfg(all(test, feature = "convert", feature = "train"))]
pub(crate) mod crash;
#[cfg(any(feature = "convert", feature = "train"))]
pub(crate) mod folder;
#[cfg(any(feature = "convert", feature = "train"))]
pub(crate) mod leftovers;
#[cfg(feature = "convert")]
pub(crate) mod new_file;
#[cfg(any(feature = "convert", feature = "gpu"))]
pub(crate) mod read;
#[cfg(all(test, any(feature = "convert", feature = "train")))]
pub(crate) mod record;
#[cfg(any(feature = "convert", feature = "train"))]
pub(crate) mod step;

#[cfg(any(feature = "convert", feature = "train"))]
pub(crate) use folder::temporary_folder;
#[cfg(feature = "convert")]
pub(crate) use folder::{publish_folder, write_synced};
#[cfg(feature = "train")]
pub(crate) use leftovers::is_temporary;
#[cfg(feature = "convert")]
pub(crate) use step::sync_dir;

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
#[cfg(any(feature = "convert", feature = "train"))]
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

    #[cfg(any(feature = "convert", feature = "train"))]
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
}

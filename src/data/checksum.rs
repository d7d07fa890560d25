//! What identifies a file of samples.

use std::io::{self, Read};

use crate::format::{PieceCrc, crc32};

/// Identifies what was read of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FileChecksum {
    /// The CRC-32 of all bytes.
    pub crc32: u32,
    /// Their number.
    pub len: u64,
}

impl FileChecksum {
    /// That of these bytes.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self { crc32: crc32(bytes), len: bytes.len() as u64 }
    }
}

/// A reader that adds what is read to a checksum.
#[derive(Debug)]
pub(super) struct Checksummed<R> {
    input: R,
    seen: PieceCrc,
}

impl<R> Checksummed<R> {
    pub(super) fn new(input: R) -> Self {
        Self { input, seen: PieceCrc::default() }
    }

    /// The checksum of what was read so far.
    pub(super) fn checksum(&self) -> FileChecksum {
        FileChecksum { crc32: self.seen.value(), len: self.seen.len() }
    }
}

impl<R: Read> Read for Checksummed<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.input.read(buf)?;
        let read = buf.get(..len).unwrap_or_default();
        self.seen.push(crc32(read), len as u64);
        Ok(len)
    }
}

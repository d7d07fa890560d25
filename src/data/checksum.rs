//! What identifies a file of samples.

use crate::format::crc32;

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

//! CRC-32 (the one of zlib and PNG: polynomial 0x04C11DB7, reflected) of whole payloads and of
//! payloads in pieces.

/// The CRC-32 of `bytes`.
pub fn crc32(bytes: &[u8]) -> u32 {
    crc32fast::hash(bytes)
}

/// Combines the CRC-32 of a payload's pieces, possibly from several threads: push the pieces in
/// order.
#[derive(Debug, Clone, Default)]
pub struct PieceCrc {
    hasher: crc32fast::Hasher,
    len: u64,
}

impl PieceCrc {
    /// Appends a piece of `len` bytes whose CRC-32 is `crc`.
    pub fn push(&mut self, crc: u32, len: u64) {
        self.hasher.combine(&crc32fast::Hasher::new_with_initial_len(crc, len));
        self.len = self.len.wrapping_add(len);
    }

    /// The CRC-32 of everything pushed.
    pub fn value(&self) -> u32 {
        self.hasher.clone().finalize()
    }

    /// Bytes of all pieces.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether no byte was pushed.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_of_the_standard() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn pieces_sum_to_the_whole() {
        let bytes: Vec<u8> = (0..10_000_u32).map(|i| ((i * i) >> 5) as u8).collect();
        let mut pieces = PieceCrc::default();
        for piece in bytes.chunks(777) {
            pieces.push(crc32(piece), piece.len() as u64);
        }
        assert_eq!((pieces.value(), pieces.len()), (crc32(&bytes), 10_000));
        let mut again = PieceCrc::default();
        assert!(again.is_empty());
        again.push(pieces.value(), pieces.len());
        assert_eq!(again.value(), pieces.value());
    }
}

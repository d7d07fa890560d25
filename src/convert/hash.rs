//! SHA-256 of source files.

use sha2::{Digest, Sha256};

/// SHA-256 of a file that is read in order, piece by piece.
#[derive(Debug, Default, Clone)]
pub(crate) struct FileHash(Sha256);

impl FileHash {
    /// Appends the next bytes of the file.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The hash as 64 lower-case hexadecimal digits.
    pub(crate) fn hex(self) -> String {
        self.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

/// SHA-256 of `bytes` as 64 lower-case hexadecimal digits.
pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    let mut hash = FileHash::default();
    hash.update(bytes);
    hash.hex()
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_test_vector_of_the_standard() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(super::sha256_hex(b"abc"), expected);
    }
}

//! Rows of raw matrices, without the rest of the matrix.

use half::{bf16, f16};
use rayon::prelude::*;

use super::{PackSource, ReadError};
use crate::format::{FloatType, FormatError, PieceCrc, Section, check, crc32};
use crate::io::AlignedBuf;

/// Bytes of one read and checksum. They stay in the L2 cache between the two.
const PIECE_LEN: u64 = 256 << 10;

/// The buffer of a row, reused from row to row.
#[derive(Debug, Default)]
pub(crate) struct RowBuf(AlignedBuf);

impl PackSource {
    /// Compares the checksum of section `number`, unless the pack is unverified. Its bytes are read
    /// once, by all threads of the pool, and not kept.
    ///
    /// # Errors
    /// [`ReadError`], except [`ReadError::Open`].
    pub(crate) fn check_payload(&self, number: usize) -> Result<(), ReadError> {
        if !self.verifies {
            return Ok(());
        }
        self.check_len()?;
        let section = self.raw_section(number)?;
        let (offset, length) = (section.offset, section.length);
        let crc_of = |buf: &mut AlignedBuf, piece: u64| {
            let (first, end) = (piece * PIECE_LEN, length.min((piece + 1) * PIECE_LEN));
            Ok((crc32(self.bytes(offset + first, end - first, buf)?), end - first))
        };
        let pieces = (0..length.div_ceil(PIECE_LEN)).into_par_iter().map_init(AlignedBuf::default, crc_of);
        let mut crc = PieceCrc::default();
        for (of_piece, len) in pieces.collect::<Result<Vec<_>, ReadError>>()? {
            crc.push(of_piece, len);
        }
        check::checksum(self.index(), number, section, crc.value()).map_err(|e| self.damaged(e))
    }

    /// Appends rows of the raw matrix of section `number` as float32. Checksums are not compared.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(crate) fn rows(
        &self,
        number: usize,
        rows: &[u32],
        buf: &mut RowBuf,
        floats: &mut Vec<f32>,
    ) -> Result<(), ReadError> {
        let section = self.raw_section(number)?;
        let unpaired = || self.damaged(FormatError::Unpaired { section: number as u64, offset: section.offset });
        let float_type = section.element_type.float_type().ok_or_else(unpaired)?;
        let row_bytes = section.shape.dims().last().map_or(0, |columns| columns * float_type.size() as u64);
        for &row in rows {
            let bytes = self.bytes(section.offset + u64::from(row) * row_bytes, row_bytes, &mut buf.0)?;
            let (words, halves) = (bytes.as_chunks::<4>().0, bytes.as_chunks::<2>().0);
            match float_type {
                FloatType::F32 => floats.extend(words.iter().map(|&word| f32::from_le_bytes(word))),
                FloatType::F16 => floats.extend(halves.iter().map(|&half| f16::from_le_bytes(half).to_f32())),
                FloatType::Bf16 => floats.extend(halves.iter().map(|&half| bf16::from_le_bytes(half).to_f32())),
            }
        }
        Ok(())
    }

    fn raw_section(&self, number: usize) -> Result<&Section, ReadError> {
        let missing = || self.damaged(FormatError::Unpaired { section: number as u64, offset: 0 });
        self.index().sections().get(number).ok_or_else(missing)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::format::{Role, SectionKind};

    const PACK: &str = "tests/fixtures/golden/v1.0-full.nf4pack";

    fn embedding(pack: &PackSource) -> (usize, Section) {
        let is = |s: &Section| s.role == Role::Embedding && s.kind == Some(SectionKind::Raw);
        let number = pack.index().sections().iter().position(is).unwrap();
        (number, pack.index().sections()[number].clone())
    }

    #[test]
    fn rows_are_those_of_the_whole_matrix() {
        let pack = PackSource::open(PACK).unwrap();
        let (number, section) = embedding(&pack);
        let [rows, columns] = *section.shape.dims() else { unreachable!("a matrix") };
        let (mut buf, mut all, mut some) = (RowBuf::default(), Vec::new(), Vec::new());
        pack.rows(number, &(0..rows as u32).collect::<Vec<_>>(), &mut buf, &mut all).unwrap();
        assert_eq!(all.len() as u64, rows * columns);
        let ids = [rows as u32 - 1, 0, 1, 1];
        pack.rows(number, &ids, &mut buf, &mut some).unwrap();
        let columns = columns as usize;
        for (found, id) in some.chunks(columns).zip(ids) {
            assert_eq!(found, &all[id as usize * columns..][..columns]);
        }
    }

    #[test]
    fn a_damaged_payload_is_found_unless_the_pack_is_unverified() {
        let (folder, mut bytes) = (tempfile::tempdir().unwrap(), std::fs::read(PACK).unwrap());
        let (number, section) = embedding(&PackSource::open(PACK).unwrap());
        PackSource::open(PACK).unwrap().check_payload(number).unwrap();
        bytes[section.offset as usize + 5] ^= 1;
        let path = folder.path().join("damaged.nf4pack");
        std::fs::write(&path, bytes).unwrap();
        let damaged = PackSource::open(&path).unwrap();
        assert!(matches!(damaged.check_payload(number), Err(ReadError::Damaged { .. })));
        damaged.unverified().check_payload(number).unwrap();
    }
}

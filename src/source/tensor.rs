//! Tensors in memory: whole and checked, or a window of their weights.

use rayon::prelude::*;

use super::windows::WindowBuf;
use super::{Bytes, PackSource, ReadError};
use crate::format::nf4::{Nf4Tensor, Scales, block_count};
use crate::format::{FormatError, PieceCrc, Section, check, crc32};
use crate::io::AlignedBuf;

/// Bytes of one read and checksum. They stay in the L2 cache between the two.
const PIECE_LEN: usize = 256 << 10;

/// Buffers for the payloads of one tensor, reused from tensor to tensor.
#[derive(Debug, Default)]
pub(crate) struct TensorBuf {
    elements: AlignedBuf,
    scales: AlignedBuf,
}

impl PackSource {
    /// The payload of section `number`, checked. All threads of the pool read it.
    ///
    /// # Errors
    /// [`ReadError`], except [`ReadError::Open`].
    pub(crate) fn raw<'a>(&'a self, number: usize, buf: &'a mut TensorBuf) -> Result<&'a [u8], ReadError> {
        let section = self.section(number, number)?;
        self.payload(number, section, &mut buf.elements)
    }

    /// The quantised tensor whose codes are section `number`, checked. All threads of the pool read
    /// it.
    ///
    /// # Errors
    /// [`ReadError`], except [`ReadError::Open`].
    pub(crate) fn quantized<'a>(&'a self, number: usize, buf: &'a mut TensorBuf) -> Result<Nf4Tensor<'a>, ReadError> {
        // Validation ensures that a scale table directly follows its codes.
        let (section, table) = (self.section(number, number)?, self.section(number + 1, number)?);
        let codes = self.payload(number, section, &mut buf.elements)?;
        let scales = self.payload(number + 1, table, &mut buf.scales)?;
        let blocks = block_count(section.shape.elements(), section.block_size) as usize;
        let scales = section.scale_type.and_then(|scale_type| Scales::from_payload(scales, scale_type, blocks));
        Ok(Nf4Tensor {
            codes,
            scales: scales.ok_or_else(|| self.unpaired(number))?,
            block_size: section.block_size,
            elements: section.shape.elements(),
        })
    }

    /// Section `number` of the tensor that starts with section `first`.
    fn section(&self, number: usize, first: usize) -> Result<&Section, ReadError> {
        self.index().sections().get(number).ok_or_else(|| self.unpaired(first))
    }

    fn unpaired(&self, number: usize) -> ReadError {
        self.damaged(FormatError::Unpaired { section: number as u64, offset: 0 })
    }

    /// A whole payload, after its checks.
    fn payload<'a>(&'a self, number: usize, section: &Section, buf: &'a mut AlignedBuf) -> Result<&'a [u8], ReadError> {
        let piece_crc = |piece: &[u8]| if self.verifies { crc32(piece) } else { 0 };
        let (bytes, crcs): (&[u8], Vec<u32>) = match &self.bytes {
            Bytes::Mapped(_) => {
                let bytes = self.bytes(section.offset, section.length, buf)?;
                (bytes, bytes.par_chunks(PIECE_LEN).map(piece_crc).collect())
            }
            Bytes::Read { file, .. } => {
                let bytes = self.room(section.length, buf)?;
                let pieces = bytes.par_chunks_mut(PIECE_LEN).enumerate().map(|(i, piece)| {
                    self.read_into(file, piece, section.offset + (i * PIECE_LEN) as u64)?;
                    Ok(piece_crc(piece))
                });
                let crcs = pieces.collect::<Result<_, ReadError>>()?;
                (bytes, crcs)
            }
        };
        let index = self.index();
        if self.verifies {
            let mut crc = PieceCrc::default();
            bytes.chunks(PIECE_LEN).zip(crcs).for_each(|(piece, of_piece)| crc.push(of_piece, piece.len() as u64));
            check::checksum(index, number, section, crc.value()).map_err(|e| self.damaged(e))?;
        }
        check::contents(index, number, section, bytes).map_err(|e| self.damaged(e))?;
        Ok(bytes)
    }

    /// Weights `first..first + len` of the tensor whose codes are section `number`. `first` is a
    /// multiple of the weights of [`SUPER_BLOCK`](crate::format::nf4::SUPER_BLOCK) blocks.
    /// Checksums are not compared.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub(crate) fn weights<'a>(
        &'a self,
        number: usize,
        first: u64,
        len: u64,
        buf: &'a mut WindowBuf,
    ) -> Result<Nf4Tensor<'a>, ReadError> {
        let (section, table) = (self.section(number, number)?, self.section(number + 1, number)?);
        let blocks = block_count(len, section.block_size);
        let codes_len = blocks * u64::from(section.block_size / 2);
        let codes = self.bytes(section.offset + first / 2, codes_len, &mut buf.codes)?;
        let scales = self.scales(table, first / u64::from(section.block_size.max(1)), blocks, &mut buf.scales)?;
        Ok(Nf4Tensor { codes, scales, block_size: section.block_size, elements: len })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::MappedPack;
    use crate::format::SectionKind;

    const PACK: &str = "tests/fixtures/golden/v1.0-full.nf4pack";

    /// What a thread loads: for each tensor its bytes, or that it is damaged.
    fn load(pack: &PackSource, first: usize) -> Vec<(usize, Option<Vec<u8>>)> {
        let (mut buf, count) = (TensorBuf::default(), pack.index().sections().len());
        let mut loaded: Vec<_> = (0..count)
            .map(|i| (first + i) % count)
            .filter_map(|number| {
                let bytes = match pack.index().sections()[number].kind.unwrap() {
                    SectionKind::Codes => pack.quantized(number, &mut buf).map(|tensor| tensor.codes.to_vec()),
                    SectionKind::Scales => return None,
                    _ => pack.raw(number, &mut buf).map(<[u8]>::to_vec),
                };
                match bytes {
                    Ok(bytes) => Some((number, Some(bytes))),
                    Err(ReadError::Damaged { .. }) => Some((number, None)),
                    Err(other) => panic!("{other}"),
                }
            })
            .collect();
        loaded.sort();
        loaded
    }

    fn check(path: &Path, damaged: usize) {
        let mapped = PackSource::of_mapped(path, MappedPack::read(path).unwrap());
        let expected = load(&mapped, 0);
        assert_eq!(expected.iter().filter(|(_, bytes)| bytes.is_none()).count(), damaged);
        for pack in [mapped, PackSource::open(path).unwrap()] {
            let (pack, expected) = (&pack, &expected);
            std::thread::scope(|scope| {
                for thread in 0..8 {
                    scope.spawn(move || (0..4).for_each(|_| assert!(load(pack, 3 * thread) == *expected)));
                }
            });
        }
    }

    #[test]
    fn threads_load_one_pack_in_any_order() {
        check(Path::new(PACK), 0);
    }

    #[test]
    fn each_thread_finds_the_damaged_tensor() {
        let (folder, mut bytes) = (tempfile::tempdir().unwrap(), std::fs::read(PACK).unwrap());
        let codes = PackSource::open(PACK).unwrap();
        let codes = codes.index().sections().iter().find(|s| s.kind == Some(SectionKind::Codes)).unwrap();
        bytes[codes.offset as usize] ^= 1;
        let path = folder.path().join("damaged.nf4pack");
        std::fs::write(&path, bytes).unwrap();
        check(&path, 1);
    }
}

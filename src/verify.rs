//! Checks a whole pack: every checksum, scale and padding byte, on all cores; and a pack against
//! the checkpoint that it was made from.

mod against;
mod error;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

#[cfg(feature = "train")]
pub(crate) use against::widen;
pub use against::{AgainstReport, Mismatch, TensorReport, against};
pub use error::VerifyError;

use crate::MappedPack;
use crate::convert::Progress;
use crate::format::{FormatError, PieceCrc, Section, check, crc32};
use crate::io::{AlignedBuf, read_exact_at};

/// Bytes that are read and checksummed at a time: they fit in the second-level cache.
const PIECE_LEN: u64 = 256 << 10;

/// The result of [`verify`].
#[derive(Debug, Clone, Serialize)]
pub struct VerifyReport {
    /// Bytes of the file.
    pub bytes: u64,
    /// Sections checked.
    pub sections: u64,
    /// Wall-clock seconds.
    pub seconds: f64,
    /// All faults: of sections in file order, then between sections. Empty for a good pack.
    #[serde(serialize_with = "as_text")]
    pub faults: Vec<FormatError>,
}

fn as_text<S: serde::Serializer>(faults: &[FormatError], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(faults.iter().map(FormatError::to_string))
}

/// A part of a section.
#[derive(Debug, Clone, Copy)]
struct Piece {
    section: usize,
    offset: u64,
    len: u64,
}

/// Checks every checksum, every scale and every padding byte of a pack, on `threads` threads (0:
/// one per core).
///
/// The payloads of a mapped pack are read from its file, which is faster and keeps memory flat.
/// Only scale tables and padding are accessed through the mapping.
///
/// # Errors
/// If the file cannot be read. The report has the damage of payloads.
pub fn verify(pack: &MappedPack, threads: usize, progress: &dyn Progress) -> Result<VerifyReport, VerifyError> {
    let started = Instant::now();
    let io = |source| VerifyError::Io { path: pack.path().to_owned(), source };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let faults = pool.install(|| {
        let crcs = payload_crcs(pack, progress).map_err(|e| e.map_or(VerifyError::Cancelled, io))?;
        Ok::<_, VerifyError>(faults(pack, &crcs))
    })?;
    let (bytes, sections) = (pack.pack().bytes().len() as u64, pack.pack().index().sections().len() as u64);
    Ok(VerifyReport { bytes, sections, seconds: started.elapsed().as_secs_f64(), faults })
}

/// Verifies a pack. `progress` only stops it.
///
/// # Errors
/// As [`verify`], and [`VerifyError::Damaged`].
pub(crate) fn require_undamaged(pack: &MappedPack, progress: &dyn Progress) -> Result<(), VerifyError> {
    let report = verify(pack, 0, &Stoppable(progress))?;
    match report.faults.into_iter().next() {
        Some(first) => Err(VerifyError::Damaged { path: pack.path().to_owned(), first }),
        None => Ok(()),
    }
}

/// Forwards only the request to stop, not the progress.
struct Stoppable<'a>(&'a dyn Progress);

impl Progress for Stoppable<'_> {
    fn cancelled(&self) -> bool {
        self.0.cancelled()
    }
}

/// The CRC-32 of every payload; `Err(None)` if the caller asked to stop.
fn payload_crcs(pack: &MappedPack, progress: &dyn Progress) -> Result<Vec<u32>, Option<std::io::Error>> {
    let index = pack.pack().index();
    let pieces: Vec<Piece> = index.sections().iter().enumerate().flat_map(|(n, s)| pieces(n, s)).collect();
    let done = AtomicU64::new(0);
    let total = index.header().file_len;
    let sums = pieces.par_iter().map_init(AlignedBuf::default, |buf, piece| {
        if progress.cancelled() {
            return Err(None);
        }
        let crc = crc32(piece_bytes(pack, piece, buf).map_err(Some)?);
        progress.advance(done.fetch_add(piece.len, Ordering::Relaxed) + piece.len, total);
        Ok(crc)
    });
    let sums: Vec<u32> = sums.collect::<Result<_, _>>()?;
    let mut crcs = vec![PieceCrc::default(); index.sections().len()];
    for (piece, crc) in pieces.iter().zip(sums) {
        crcs[piece.section].push(crc, piece.len);
    }
    Ok(crcs.iter().map(PieceCrc::value).collect())
}

/// The bytes of a piece: from the file if the pack is mapped, else from memory.
fn piece_bytes<'a>(pack: &'a MappedPack, piece: &Piece, buf: &'a mut AlignedBuf) -> std::io::Result<&'a [u8]> {
    let (offset, len) = (piece.offset as usize, piece.len as usize);
    let Some(file) = pack.mapped_file() else {
        let bytes = pack.pack().bytes().get(offset..offset + len);
        return bytes.ok_or_else(|| std::io::ErrorKind::UnexpectedEof.into());
    };
    let bytes = buf.first_mut(len);
    read_exact_at(file, bytes, piece.offset)?;
    Ok(bytes)
}

fn pieces(number: usize, section: &Section) -> impl Iterator<Item = Piece> + use<> {
    let (start, length) = (section.offset, section.length);
    let piece = move |i: u64| {
        let from = i * PIECE_LEN;
        Piece { section: number, offset: start + from, len: (length - from).min(PIECE_LEN) }
    };
    (0..length.div_ceil(PIECE_LEN)).map(piece)
}

/// All faults of a pack whose payloads have these checksums: of sections, then of gaps.
fn faults(mapped: &MappedPack, crcs: &[u32]) -> Vec<FormatError> {
    let pack = mapped.pack();
    let index = pack.index();
    let sections = index.sections().par_iter().zip(crcs).enumerate();
    let of_section = |(number, (section, &crc)): (usize, (&Section, &u32))| {
        check::checksum(index, number, section, crc)?;
        check::contents(index, number, section, pack.payload(section))
    };
    let mut faults: Vec<FormatError> = sections.map(of_section).filter_map(Result::err).collect();
    let gap = |(start, end): (u64, u64)| pack.bytes().get(start as usize..end as usize).map(|bytes| (start, bytes));
    let gaps = check::gaps(index).filter_map(gap);
    faults.extend(gaps.filter_map(|(start, bytes)| check::padding(start, bytes).err()));
    faults
}

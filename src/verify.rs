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

use crate::convert::Progress;
use crate::format::{FormatError, PieceCrc, Section, check, crc32};
use crate::io::AlignedBuf;
use crate::source::{PackSource, ReadError, WindowBuf};

/// Bytes that are read and checksummed at a time: they fit in the second-level cache.
const PIECE_LEN: u64 = 256 << 10;

/// Pieces that are distributed over the threads at a time, 1 GiB: a list of all pieces of a pack of
/// a terabyte would take hundreds of megabytes.
const BATCH: usize = 4096;

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
/// one per core). Memory stays flat for packs of any size.
///
/// # Errors
/// If the file cannot be read. The report has the damage of payloads.
pub fn verify(pack: &PackSource, threads: usize, progress: &dyn Progress) -> Result<VerifyReport, VerifyError> {
    let started = Instant::now();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let faults = pool.install(|| {
        let crcs = payload_crcs(pack, progress)?;
        faults(pack, &crcs, progress)
    })?;
    let (bytes, sections) = (pack.index().header().file_len, pack.index().sections().len() as u64);
    Ok(VerifyReport { bytes, sections, seconds: started.elapsed().as_secs_f64(), faults })
}

/// Verifies a pack, unless it is to be used without a look at its checksums. `progress` only stops
/// it.
///
/// # Errors
/// As [`verify`], and [`VerifyError::Damaged`].
pub(crate) fn require_undamaged(pack: &PackSource, progress: &dyn Progress) -> Result<(), VerifyError> {
    if !pack.verifies() {
        return Ok(());
    }
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

/// The CRC-32 of every payload.
fn payload_crcs(pack: &PackSource, progress: &dyn Progress) -> Result<Vec<u32>, VerifyError> {
    let index = pack.index();
    let mut pieces = index.sections().iter().enumerate().flat_map(|(n, s)| pieces(n, s));
    let done = AtomicU64::new(0);
    let total = index.header().file_len;
    let mut crcs = vec![PieceCrc::default(); index.sections().len()];
    loop {
        let batch: Vec<Piece> = pieces.by_ref().take(BATCH).collect();
        if batch.is_empty() {
            return Ok(crcs.iter().map(PieceCrc::value).collect());
        }
        let sums = batch.par_iter().map_init(AlignedBuf::default, |buf, piece| {
            if progress.cancelled() {
                return Err(VerifyError::Cancelled);
            }
            let crc = crc32(pack.bytes(piece.offset, piece.len, buf)?);
            progress.advance(done.fetch_add(piece.len, Ordering::Relaxed) + piece.len, total);
            Ok(crc)
        });
        let sums: Vec<u32> = sums.collect::<Result<_, VerifyError>>()?;
        for (piece, crc) in batch.iter().zip(sums) {
            crcs[piece.section].push(crc, piece.len);
        }
    }
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
fn faults(pack: &PackSource, crcs: &[u32], progress: &dyn Progress) -> Result<Vec<FormatError>, VerifyError> {
    let index = pack.index();
    let sections = index.sections().par_iter().zip(crcs).enumerate();
    let of_section = |buf: &mut WindowBuf, (number, (section, &crc)): (usize, (&Section, &u32))| {
        let checked = check::checksum(index, number, section, crc).map_err(|e| pack.damaged(e));
        fault(checked.and_then(|()| pack.check_contents(number, buf, || !progress.cancelled())))
    };
    let found: Vec<Option<FormatError>> = sections.map_init(WindowBuf::default, of_section).collect::<Result<_, _>>()?;
    let mut faults: Vec<FormatError> = found.into_iter().flatten().collect();
    if progress.cancelled() {
        return Err(VerifyError::Cancelled);
    }
    let mut buf = AlignedBuf::default();
    for (start, end) in check::gaps(index) {
        faults.extend(check::padding(start, pack.bytes(start, end - start, &mut buf)?).err());
    }
    Ok(faults)
}

/// A violation is a fault of the pack; all else is an error.
fn fault(checked: Result<(), ReadError>) -> Result<Option<FormatError>, VerifyError> {
    match checked {
        Ok(()) => Ok(None),
        Err(ReadError::Damaged { source, .. }) => Ok(Some(source)),
        Err(error) => Err(error.into()),
    }
}

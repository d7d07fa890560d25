//! Records of the finished part of a conversion, and the continuation of an interrupted one.
//!
//! What is finished is a prefix of the source, piece by piece, outside of a `dq8` tensor's first
//! pass. The state after a prefix does not depend on windows or threads, so the bytes are those of
//! an uninterrupted run.

use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::state::State;
use crate::convert::error::ConvertError;
use crate::convert::hash::{FileHash, sha256_hex};
use crate::convert::journal::{ENCODER_REVISION, Record};
use crate::convert::plan::{Plan, PlanError};
use crate::convert::report::{Kept, Progress};
use crate::convert::source::{SourceError, SourceFile};
use crate::convert::target::Writer;
use crate::format::{PieceCrc, Role, Section, SectionKind, crc32};
use crate::io::{AlignedBuf, read_exact_at};

/// A record is written after this time. Unit tests record at every chance.
const RECORD_AFTER: Duration = if cfg!(test) { Duration::ZERO } else { Duration::from_secs(1) };

/// Bytes that are checked at a time.
const CHECK_LEN: u64 = 1 << 20;

/// Records what is finished, and finds what an interrupted run had finished.
pub(super) struct Journal<'a> {
    plan: &'a Plan,
    files: &'a [SourceFile],
    writer: &'a Writer<'a>,
    progress: &'a dyn Progress,
    identity: String,
    sequence: u64,
    recorded: Instant,
}

/// Where the first unfinished source file starts, and the hash of the bytes before.
#[derive(Debug, Default)]
pub(super) struct Start {
    pub(super) offset: u64,
    pub(super) hash: FileHash,
}

/// SHA-256 of all that determines the bytes of a pack except its weights: the version, the options,
/// the small files, names, shapes and places of all tensors.
fn identity(plan: &Plan) -> Result<String, PlanError> {
    let metadata = plan.provenance.to_json()?;
    let front = plan.layout.front(&vec![0; plan.layout.sections().len()], 0, &metadata)?;
    Ok(sha256_hex(&[&ENCODER_REVISION.to_le_bytes(), front.as_slice()].concat()))
}

/// The state that a record names.
fn state_of(record: Record) -> State {
    let crc = |&(crc, len): &(u32, u64)| {
        let mut whole = PieceCrc::default();
        whole.push(crc, len);
        whole
    };
    State {
        crcs: record.sections.iter().map(crc).collect(),
        signed: record.signed,
        roles: record.roles.into_iter().filter_map(|(n, sums)| Some((Role::from_number(n)?, sums))).collect(),
        hashes: record.hashes,
        done: record.done,
        kept: Some(Kept { weights: record.done, damaged: false }),
        ..State::default()
    }
}

impl<'a> Journal<'a> {
    /// For a pack of `plan` from `files`.
    ///
    /// # Errors
    /// See [`PlanError`].
    pub(super) fn new(
        plan: &'a Plan,
        files: &'a [SourceFile],
        writer: &'a Writer<'a>,
        progress: &'a dyn Progress,
    ) -> Result<Self, PlanError> {
        let (identity, recorded) = (identity(plan)?, Instant::now());
        Ok(Self { plan, files, writer, progress, identity, sequence: 0, recorded })
    }

    /// Whether the last record is old enough for another one.
    pub(super) fn is_due(&self) -> bool {
        self.recorded.elapsed() >= RECORD_AFTER
    }

    /// Records the state: `offset` bytes of the present file are finished, with this hash. All of
    /// them have been written.
    ///
    /// # Errors
    /// [`ConvertError::Target`].
    pub(super) fn record(&mut self, state: &State, hash: &FileHash, offset: u64) -> Result<(), ConvertError> {
        self.sequence += 1;
        let finished = |(section, crc): (&Section, &PieceCrc)| match section.kind {
            // Embedded files are always written again.
            Some(SectionKind::File) => (0, 0),
            _ => (crc.value(), crc.len()),
        };
        let record = Record {
            sequence: self.sequence,
            identity: self.identity.clone(),
            hashes: state.hashes.clone(),
            offset,
            hash: hash.clone().hex(),
            sections: self.plan.layout.sections().iter().zip(&state.crcs).map(finished).collect(),
            signed: state.signed,
            roles: state.roles.iter().map(|(role, sums)| (role.number(), sums.clone())).collect(),
            done: state.done,
        };
        self.writer.target().record(&record)?;
        self.recorded = Instant::now();
        Ok(())
    }

    /// Takes over the finished part of an interrupted conversion, if there is one.
    ///
    /// # Errors
    /// [`ConvertError::PartialDiffers`], [`ConvertError::PartialSource`]: the part stays. A damaged
    /// part is forgotten, and the conversion starts at the beginning.
    pub(super) fn resume(&mut self, state: &mut State) -> Result<Start, ConvertError> {
        let target = self.writer.target();
        let records = target.records()?;
        if records.iter().any(|record| record.identity != self.identity) {
            return Err(ConvertError::PartialDiffers { path: target.partial() });
        }
        let is_damaged = !records.is_empty();
        for record in records {
            if let Some(hash) = self.check(&record)? {
                self.clear_gaps()?;
                self.sequence = record.sequence;
                let start = Start { offset: record.offset, hash };
                *state = state_of(record);
                return Ok(start);
            }
        }
        target.clear()?;
        state.kept = is_damaged.then_some(Kept { weights: 0, damaged: true });
        Ok(Start::default())
    }

    /// Compares what a record names with the bytes of the pack and of the source. Returns the hash
    /// of the first unfinished file up to there; `None` if the pack is damaged.
    fn check(&self, record: &Record) -> Result<Option<FileHash>, ConvertError> {
        let (files, sections) = (self.files, self.plan.layout.sections());
        let fits = sections.len() == record.sections.len()
            && sections.iter().zip(&record.sections).all(|(section, &(_, len))| len <= section.length)
            && record.hashes.len() <= files.len()
            && files.get(record.hashes.len()).map_or(record.offset == 0, |file| record.offset <= file.length);
        if !fits {
            return Ok(None);
        }
        let finished = sections.par_iter().zip(&record.sections).filter(|(_, (_, len))| *len > 0);
        let is_same = |(section, &(crc, len)): (&Section, &(u32, u64))| {
            Ok::<_, ConvertError>(self.crc_of(section.offset, len)? == crc)
        };
        if !finished.map(is_same).try_reduce(|| true, |a, b| Ok(a && b))? {
            return Ok(None);
        }
        files
            .par_iter()
            .zip(&record.hashes)
            .try_for_each(|(file, hash)| self.same_source(file, &self.hash_of(file, file.length)?, hash))?;
        let Some(file) = files.get(record.hashes.len()) else { return Ok(Some(FileHash::default())) };
        let hash = self.hash_of(file, record.offset)?;
        self.same_source(file, &hash, &record.hash)?;
        Ok(Some(hash))
    }

    fn same_source(&self, file: &SourceFile, found: &FileHash, expected: &str) -> Result<(), ConvertError> {
        match found.clone().hex() == expected {
            true => Ok(()),
            false => {
                let (path, file) = (self.writer.target().partial(), file.path.clone());
                Err(ConvertError::PartialSource { path, file })
            }
        }
    }

    /// CRC-32 of `len` bytes of the finished part.
    fn crc_of(&self, offset: u64, len: u64) -> Result<u32, ConvertError> {
        let mut crc = PieceCrc::default();
        self.in_chunks(len, |at, bytes| {
            self.writer.target().read(bytes, offset + at)?;
            crc.push(crc32(bytes), bytes.len() as u64);
            Ok(())
        })?;
        Ok(crc.value())
    }

    /// SHA-256 of the first `len` bytes of a source file.
    fn hash_of(&self, file: &SourceFile, len: u64) -> Result<FileHash, ConvertError> {
        let mut hash = FileHash::default();
        self.in_chunks(len, |at, bytes| {
            let read = read_exact_at(&file.file, bytes, at);
            read.map_err(|source| SourceError::Io { path: file.path.clone(), source })?;
            hash.update(bytes);
            Ok(())
        })?;
        Ok(hash)
    }

    fn in_chunks(
        &self,
        len: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), ConvertError>,
    ) -> Result<(), ConvertError> {
        let mut buf = AlignedBuf::default();
        let mut at = 0;
        while at < len {
            if self.progress.cancelled() {
                return Err(ConvertError::Cancelled);
            }
            let chunk = (len - at).min(CHECK_LEN);
            read(at, buf.first_mut(chunk as usize))?;
            at += chunk;
        }
        Ok(())
    }

    /// Writes the zeros between the sections: no checksum covers them.
    fn clear_gaps(&self) -> Result<(), ConvertError> {
        let sections = self.plan.layout.sections();
        let mut gap = 0;
        for section in sections {
            let zeros = vec![0; section.offset.saturating_sub(gap) as usize];
            self.writer.write(&zeros, gap)?;
            gap = section.offset + section.length;
        }
        let zeros = vec![0; self.plan.layout.file_len().saturating_sub(gap) as usize];
        self.writer.write(&zeros, gap)
    }
}

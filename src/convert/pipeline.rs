//! Runs a plan. Every source file is read once, front to back, in windows. Each thread reads a
//! piece of the window and encodes it while it is in that core's cache; meanwhile the window before
//! is hashed, and its output written. Memory is two windows and their output, for a model of any
//! size.

mod resume;
mod state;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rayon::prelude::*;

use super::error::ConvertError;
use super::hash::FileHash;
use super::journal::Slots;
use super::nesting::{Candidates, Trial};
use super::notice::{LeftOut, Notice};
use super::options::Options;
use super::parts::{self, Parts};
use super::piece::{Outcome, Payload, Work, Write};
use super::plan::{Action, Plan, PlanError};
use super::report::{Progress, Report, RoleSums, name_of, notice_texts};
use super::source::{self, Checkpoint, SourceError, SourceFile};
use super::target::{Target, Writer};
use super::walk::{Piece, Window, tensor_pieces, windows};
use crate::arch::ModelConfig;
use crate::arch::place::Model;
use crate::format::layout::FEATURE_SIGNED_SCALES;
use crate::format::nf4::{ScaleType, Scales};
use crate::format::{PieceCrc, Section, SectionKind, check, crc32};
use crate::io::access::Readers;
use crate::io::{AlignedBuf, folder_of, read_exact_at};
use resume::{Journal, Start};
use state::State;

/// Bytes of a window for each thread, so that there is work for all; at least [`MIN_WINDOW`], at
/// most [`MAX_WINDOW`].
const WINDOW_PER_THREAD: usize = 2 << 20;
const MIN_WINDOW: usize = 4 << 20;
const MAX_WINDOW: usize = 64 << 20;

/// Pieces of a `dq8` tensor whose codes are held at a time.
const NESTED_PIECES: usize = 64;

/// A checkpoint that has been opened, checked against its config.json, and planned: all that can be
/// known before writing.
#[derive(Debug)]
pub struct Conversion {
    checkpoint: Checkpoint,
    plan: Plan,
    model: Model,
    options: Options,
    left_out: Vec<LeftOut>,
    kept_unused: Vec<String>,
    notices: Vec<Notice>,
    started: Instant,
}

/// Converts the checkpoint at `source` into the pack `target`.
///
/// # Errors
/// See [`ConvertError`]: it says what is left behind, which is a whole target or none.
pub fn convert(source: &Path, target: &Path, options: Options, progress: &dyn Progress) -> Result<Report, ConvertError> {
    Conversion::prepare(source, options)?.write(target, progress)
}

impl Conversion {
    /// Opens and plans; reads headers and small files only (and a tied lm_head, to compare it with
    /// the embedding).
    ///
    /// # Errors
    /// Where the checkpoint cannot be read or converted as asked.
    pub fn prepare(source: &Path, options: Options) -> Result<Self, ConvertError> {
        let started = Instant::now();
        let checkpoint = Checkpoint::open(source, options.config.as_deref())?;
        let Parts { mut model, left_out, kept_unused, notices: of_parts } = parts::place(&checkpoint)?;
        let mut notices = checkpoint.notices.clone();
        notices.extend(of_parts);
        notices.extend(parts::resolve_tied(&mut model, &checkpoint)?);
        let plan = Plan::new(&checkpoint, &model, &options)?;
        if !model.config.ignored_keys.is_empty() {
            notices.push(Notice::IgnoredKeys { keys: model.config.ignored_keys.clone() });
        }
        notices
            .extend(model.config.check_runnable().err().map(|obstacle| Notice::NotRunnable { why: obstacle.to_string() }));
        if plan.weights == 0 {
            notices.push(Notice::NothingQuantised);
        }
        notices.extend(source::no_tokenizer(&checkpoint.side_files));
        notices.extend(source::tokens_without_rows(&checkpoint.side_files, model.config.vocab));
        Ok(Self { checkpoint, plan, model, options, left_out, kept_unused, notices, started })
    }

    /// What will be written where.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The configuration of the model.
    pub fn config(&self) -> &ModelConfig {
        &self.model.config
    }

    /// Tensors that the pack will not hold, since they are no part of the model.
    pub fn left_out(&self) -> &[LeftOut] {
        &self.left_out
    }

    /// Tensors that the pack will hold although the model does not use them.
    pub fn kept_unused(&self) -> &[String] {
        &self.kept_unused
    }

    /// The bytes of a file of the checkpoint that the pack will hold.
    pub fn file(&self, name: &str) -> Option<&[u8]> {
        self.files().find(|(file, _)| *file == name).map(|(_, bytes)| bytes)
    }

    /// Name and bytes of each file of the checkpoint that the pack will hold, by its name there.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.checkpoint.side_files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
    }

    /// What the user should know.
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }

    /// Bytes of the weights files.
    pub fn source_bytes(&self) -> u64 {
        self.checkpoint.files.iter().map(|f| f.length).sum()
    }

    /// Writes the pack: a file without its name in the folder of `path`, fsync, the name, fsync of
    /// the folder. The pack is no wider readable than the checkpoint's files; one that replaces a
    /// pack keeps its permissions.
    ///
    /// # Errors
    /// See [`ConvertError`].
    pub fn write(&self, path: &Path, progress: &dyn Progress) -> Result<Report, ConvertError> {
        self.check_target(path)?;
        let target = self.target(path)?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(self.options.threads.map_or(0, |n| n.get())).build()?;
        let state = target.write_with(|writer| pool.install(|| Run::new(self, writer, progress).run()))?;
        if progress.cancelled() {
            return Err(ConvertError::Cancelled);
        }
        target.finish()?;
        Ok(self.report(&state))
    }

    fn target(&self, path: &Path) -> Result<Target, ConvertError> {
        let (layout, &Options { force, resume, .. }) = (&self.plan.layout, &self.options);
        let (len, readers) = (layout.file_len(), self.readers()?);
        match resume {
            true => {
                let slots = Slots::new(len, layout.sections().len(), self.checkpoint.files.len());
                Target::resume(path, len, force, readers, slots)
            }
            false => Target::create(path, len, force, readers),
        }
    }

    /// Refuses to replace a file that the conversion reads.
    fn check_target(&self, path: &Path) -> Result<(), ConvertError> {
        let Ok(target) = path.canonicalize() else { return Ok(()) };
        if self.source_paths().any(|source| source.canonicalize().is_ok_and(|source| source == target)) {
            return Err(ConvertError::TargetIsSource { path: path.to_owned() });
        }
        Ok(())
    }

    /// The files that the conversion reads: weights, index, small files, `--config`.
    fn source_paths(&self) -> impl Iterator<Item = PathBuf> {
        self.checkpoint.files.iter().map(|f| f.path.clone()).chain(self.small_paths())
    }

    fn small_paths(&self) -> impl Iterator<Item = PathBuf> {
        let folder = self.checkpoint.files.first().map(|f| folder_of(&f.path));
        let names = self.checkpoint.index.iter().chain(&self.checkpoint.side_files).map(|(name, _)| name);
        let paths = folder.into_iter().flat_map(move |folder| names.clone().map(|name| folder.join(name)));
        paths.chain(self.options.config.clone())
    }

    /// Those who may read all these files.
    fn readers(&self) -> Result<Readers, ConvertError> {
        let mut readers = Readers::default();
        for SourceFile { file, path, .. } in &self.checkpoint.files {
            readers.add(&file.metadata().map_err(|source| SourceError::Io { path: path.clone(), source })?);
        }
        for path in self.small_paths() {
            match path.metadata() {
                Ok(source) => readers.add(&source),
                // config.json, if `--config` takes its place.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(SourceError::Io { path, source }.into()),
            }
        }
        Ok(readers)
    }

    fn report(&self, state: &State) -> Report {
        let seconds = self.started.elapsed().as_secs_f64();
        let sections = self.plan.layout.sections().iter();
        let raw: Vec<&Section> = sections.filter(|s| s.kind == Some(SectionKind::Raw)).collect();
        let mut all = RoleSums::default();
        state.roles.values().for_each(|sums| all.merge(&sums.stats, sums.worst_tensor));
        let tensors = &self.checkpoint.tensors;
        Report {
            source_bytes: self.source_bytes(),
            pack_bytes: self.plan.layout.file_len(),
            layers: self.model.config.layers,
            weights: self.plan.weights,
            raw_tensors: raw.len() as u64,
            raw_bytes: raw.iter().map(|s| s.length).sum(),
            seconds,
            weights_per_second: self.plan.weights as f64 / seconds.max(f64::MIN_POSITIVE),
            relative_error: all.stats.relative_sq_error(),
            max_block_error: all.stats.worst_block.relative(),
            max_block_error_tensor: name_of(all.worst_tensor, tensors),
            roles: state.roles.iter().map(|(&role, sums)| sums.report(role, tensors)).collect(),
            left_out: self.left_out.clone(),
            kept_unused: self.kept_unused.clone(),
            notices: notice_texts(&self.notices),
            kept: state.kept,
        }
    }
}

/// The output of a window that has been worked on, with the source bytes that parts of it repeat.
#[derive(Debug, Default)]
struct Pending {
    buf: AlignedBuf,
    window: Window,
    writes: Vec<(Piece, Write)>,
}

impl Pending {
    /// The bytes of the window.
    fn bytes(&self) -> &[u8] {
        self.buf.filled().get(..self.window.len).unwrap_or_default()
    }
}

struct Run<'a> {
    job: &'a Conversion,
    writer: &'a Writer<'a>,
    progress: &'a dyn Progress,
    state: State,
    /// With [`Options::resume`].
    journal: Option<Journal<'a>>,
}

impl<'a> Run<'a> {
    fn new(job: &'a Conversion, writer: &'a Writer<'a>, progress: &'a dyn Progress) -> Self {
        let crcs = vec![PieceCrc::default(); job.plan.layout.sections().len()];
        Self { job, writer, progress, state: State { crcs, ..State::default() }, journal: None }
    }

    fn run(mut self) -> Result<State, ConvertError> {
        let mut start = self.resume()?;
        self.progress.advance(self.state.done, self.job.plan.weights);
        self.write_files()?;
        for file in self.job.checkpoint.files.iter().skip(self.state.hashes.len()) {
            let hash = self.convert_file(file, std::mem::take(&mut start))?;
            self.state.hashes.push(hash);
        }
        self.record(&FileHash::default(), 0)?;
        self.write_front()?;
        Ok(self.state)
    }

    /// Takes over the finished part of an interrupted conversion, if that is asked for.
    fn resume(&mut self) -> Result<Start, ConvertError> {
        let Conversion { checkpoint, plan, options, .. } = self.job;
        if !options.resume {
            return Ok(Start::default());
        }
        let journal = Journal::new(plan, &checkpoint.files, self.writer, self.progress)?;
        self.journal.insert(journal).resume(&mut self.state)
    }

    /// Whether to record what is finished now.
    fn record_is_due(&self, is_cancelled: bool) -> bool {
        self.state.wanted.is_empty() && self.journal.as_ref().is_some_and(|journal| is_cancelled || journal.is_due())
    }

    /// Records what is finished, if an interrupted conversion is to be continued.
    fn record(&mut self, hash: &FileHash, offset: u64) -> Result<(), ConvertError> {
        self.journal.as_mut().map_or(Ok(()), |journal| journal.record(&self.state, hash, offset))
    }

    /// The embedded files; they are in memory already.
    fn write_files(&mut self) -> Result<(), ConvertError> {
        let layout = &self.job.plan.layout;
        for (number, section) in layout.sections().iter().enumerate() {
            if section.kind != Some(SectionKind::File) {
                continue;
            }
            let name = &layout.entries()[section.name as usize].name;
            let file = self.job.checkpoint.side_files.iter().find(|(n, _)| n == name);
            let bytes = file.map_or(&[][..], |(_, bytes)| bytes);
            self.writer.write(bytes, section.offset)?;
            self.state.crcs[number].push(crc32(bytes), bytes.len() as u64);
        }
        Ok(())
    }

    /// Header, index and metadata go last: they hold the checksums and hashes of everything else.
    fn write_front(&mut self) -> Result<(), ConvertError> {
        let crcs: Vec<u32> = self.state.crcs.iter().map(PieceCrc::value).collect();
        let mut provenance = self.job.plan.provenance.clone();
        // The weights files come first in the record.
        for (record, hash) in provenance.sources.iter_mut().zip(&self.state.hashes) {
            record.sha256.clone_from(hash);
        }
        let metadata = provenance.to_json().map_err(PlanError::from)?;
        let features = if self.state.signed { FEATURE_SIGNED_SCALES } else { 0 };
        let front = self.job.plan.layout.front(&crcs, features, &metadata).map_err(PlanError::from)?;
        self.writer.write(&front, 0)
    }

    /// Converts the tensors of a file that are not finished, and gives the file's SHA-256.
    fn convert_file(&mut self, file: &SourceFile, start: Start) -> Result<String, ConvertError> {
        let window_len = (WINDOW_PER_THREAD * rayon::current_num_threads()).clamp(MIN_WINDOW, MAX_WINDOW);
        let Start { offset, mut hash } = start;
        let windows = windows(file, &self.job.checkpoint.tensors, offset, window_len);
        let (mut previous, mut spare) = (Pending::default(), AlignedBuf::default());
        for window in windows {
            let is_cancelled = self.progress.cancelled();
            if self.record_is_due(is_cancelled) {
                hash.update(previous.bytes());
                self.write_pending(&previous)?;
                previous = Pending { buf: previous.buf, ..Pending::default() };
                self.record(&hash, window.offset)?;
            }
            if is_cancelled {
                return Err(ConvertError::Cancelled);
            }
            let mut buf = spare;
            let (this, bytes) = (&*self, buf.first_mut(window.len));
            let ((), (wrote, outcomes)) = rayon::join(
                || hash.update(previous.bytes()),
                || rayon::join(|| this.write_pending(&previous), || this.convert_window(file, &window, bytes)),
            );
            let writes = self.absorb_window(&window, outcomes)?;
            wrote?;
            spare = std::mem::replace(&mut previous, Pending { buf, window, writes }).buf;
        }
        hash.update(previous.bytes());
        self.write_pending(&previous)?;
        Ok(hash.hex())
    }

    /// Reads a window to `bytes`; one outcome per piece.
    fn convert_window(
        &self,
        file: &SourceFile,
        window: &Window,
        mut bytes: &mut [u8],
    ) -> Vec<Result<Outcome, ConvertError>> {
        let mut pieces = Vec::with_capacity(window.pieces.len());
        for piece in &window.pieces {
            let (first, rest) = bytes.split_at_mut(piece.len);
            pieces.push((*piece, first));
            bytes = rest;
        }
        let convert = |(piece, bytes): (Piece, &mut [u8])| {
            let read = read_exact_at(&file.file, bytes, piece.offset);
            read.map_err(|source| SourceError::Io { path: file.path.clone(), source })?;
            self.work(piece, bytes).map_or(Ok(Outcome::default()), |work| work.run())
        };
        pieces.into_par_iter().map(convert).collect()
    }

    /// The piece with its tensor; `None` for the header of the file.
    fn work<'b>(&'b self, piece: Piece, bytes: &'b [u8]) -> Option<Work<'b>> {
        Some(self.work_on(piece, piece.tensor?, bytes))
    }

    /// The piece of tensor `number`.
    fn work_on<'b>(&'b self, piece: Piece, number: usize, bytes: &'b [u8]) -> Work<'b> {
        let (plan, options) = (&self.job.plan, &self.job.options);
        let (tensor, action) = (&self.job.checkpoint.tensors[number], plan.actions[number]);
        Work { plan, options, tensor, action, piece, bytes }
    }

    /// Adds the outcomes of a window to the state, and returns the output to write.
    fn absorb_window(
        &mut self,
        window: &Window,
        outcomes: Vec<Result<Outcome, ConvertError>>,
    ) -> Result<Vec<(Piece, Write)>, ConvertError> {
        let mut writes = Vec::with_capacity(2 * outcomes.len());
        for (piece, outcome) in window.pieces.iter().zip(outcomes) {
            let mut outcome = outcome?;
            if let (Some((scales, margins)), Some(tensor)) = (outcome.wanted.take(), piece.tensor) {
                self.state.wanted.entry(tensor).or_default().extend(&scales, &margins);
                let info = &self.job.checkpoint.tensors[tensor];
                if piece.offset + piece.len as u64 == info.offset + info.length {
                    self.finish_nested(tensor)?;
                }
            }
            writes.extend(self.absorb(piece, outcome).into_iter().map(|w| (*piece, w)));
        }
        self.progress.advance(self.state.done, self.job.plan.weights);
        Ok(writes)
    }

    fn absorb(&mut self, piece: &Piece, outcome: Outcome) -> Vec<Write> {
        for write in &outcome.writes {
            self.state.crcs[write.section].push(write.crc, write.len);
        }
        self.state.signed |= outcome.signed;
        let action = piece.tensor.map(|n| self.job.plan.actions[n]);
        if let (Some(stats), Some(Action::Quantise { codes })) = (&outcome.stats, action) {
            let sections = self.job.plan.layout.sections();
            let sums = self.state.roles.entry(sections[codes].role).or_default();
            if piece.first == 0 {
                sums.tensors += 1;
                sums.bytes += sections[codes].length + sections[codes + 1].length;
            }
            sums.merge(stats, piece.tensor);
            self.state.done += stats.weights;
        }
        outcome.writes
    }

    fn write_pending(&self, pending: &Pending) -> Result<(), ConvertError> {
        pending.writes.iter().try_for_each(|(piece, write)| match &write.payload {
            Payload::Piece => self.writer.write(&pending.bytes()[pending.window.range_of(piece)], write.offset),
            Payload::Made(bytes) => self.writer.write(bytes, write.offset),
        })
    }

    /// Second pass of a `dq8` tensor: its scales are nested, its pieces are read again, and codes
    /// are chosen for the scales as they will be read.
    fn finish_nested(&mut self, tensor: usize) -> Result<(), ConvertError> {
        let Action::Quantise { codes } = self.job.plan.actions[tensor] else { return Ok(()) };
        let mut wanted = self.state.wanted.remove(&tensor).unwrap_or_default();
        let section = &self.job.plan.layout.sections()[codes + 1];
        let table = match wanted.table(self.job.options.encoder) {
            Some(table) => table,
            None => self.best_table(tensor, &wanted.scales)?,
        };
        self.writer.write(&table, section.offset)?;
        self.state.crcs[codes + 1].push(crc32(&table), table.len() as u64);
        self.state.signed |= check::has_negative_scale(section, &table);
        let Some(stored) = Scales::from_payload(&table, ScaleType::Dq8, wanted.scales.len()) else {
            return Ok(());
        };
        for pieces in self.pieces_of(tensor).chunks(NESTED_PIECES) {
            let outcomes = self.read_again(pieces, |work| work.encode_nested(codes, &stored))?;
            for (piece, outcome) in pieces.iter().zip(outcomes) {
                for write in self.absorb(piece, outcome) {
                    if let Payload::Made(bytes) = &write.payload {
                        self.writer.write(bytes, write.offset)?;
                    }
                }
            }
            self.progress.advance(self.state.done, self.job.plan.weights);
        }
        Ok(())
    }

    /// The table of a `dq8` tensor whose scales differ too much for the even map: the tensor is
    /// read again, once for the scales of plain absmax and once to measure each table.
    fn best_table(&self, tensor: usize, wanted: &[f32]) -> Result<Vec<u8>, ConvertError> {
        let pieces = self.pieces_of(tensor);
        let mut absmax = Vec::with_capacity(wanted.len());
        for pieces in pieces.chunks(NESTED_PIECES) {
            self.read_again(pieces, |work| work.absmax_scales())?.iter().for_each(|scales| absmax.extend(scales));
        }
        let candidates = Candidates::new(wanted, &absmax);
        let (tables, mut trial) = (candidates.scales(), Trial::new());
        for pieces in pieces.chunks(NESTED_PIECES) {
            self.read_again(pieces, |work| work.try_tables(&tables))?.iter().for_each(|errors| trial.add(errors));
        }
        Ok(candidates.choose(trial))
    }

    fn pieces_of(&self, tensor: usize) -> Vec<Piece> {
        tensor_pieces(tensor, &self.job.checkpoint.tensors[tensor]).collect()
    }

    /// Reads pieces of a tensor once more, and gives what `make` makes of each, in their order.
    fn read_again<T: Send>(&self, pieces: &[Piece], make: impl Fn(&Work<'_>) -> T + Sync) -> Result<Vec<T>, ConvertError> {
        if self.progress.cancelled() {
            return Err(ConvertError::Cancelled);
        }
        let made = pieces.par_iter().filter_map(|piece| Some((*piece, piece.tensor?))).map_init(
            AlignedBuf::default,
            |buf, (piece, tensor)| {
                let info = &self.job.checkpoint.tensors[tensor];
                let bytes = buf.first_mut(piece.len);
                self.job.checkpoint.read(info, piece.offset - info.offset, bytes)?;
                Ok(make(&self.work_on(piece, tensor, bytes)))
            },
        );
        made.collect()
    }
}

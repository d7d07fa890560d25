//! Runs a plan: every source file is read once, front to back; while one window of it is hashed and encoded, the next one
//! is read. Memory is two windows and one piece of output a thread, whatever the model's size.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::Instant;

use rayon::prelude::*;

use super::arch::{self, Model};
use super::encode::{self, NotFinite, ScalePrecision, Stats, Weights, nested};
use super::error::ConvertError;
use super::hash::FileHash;
use super::notice::Notice;
use super::options::Options;
use super::plan::{Action, Plan};
use super::report::{Progress, Report, RoleSums, notice_texts};
use super::source::{Checkpoint, SourceError, SourceFile};
use super::target::Target;
use super::walk::{Piece, Window, tensor_pieces, windows};
use crate::format::layout::FEATURE_SIGNED_SCALES;
use crate::format::nf4::{ScaleType, Scales};
use crate::format::{PieceCrc, Role, Section, SectionKind, crc32};
use crate::io::{AlignedBuf, read_exact_at};

/// Bytes of a window for each thread, so that there is work for all; at least [`MIN_WINDOW`], at most [`MAX_WINDOW`].
const WINDOW_PER_THREAD: usize = 2 << 20;
const MIN_WINDOW: usize = 4 << 20;
const MAX_WINDOW: usize = 64 << 20;

/// A checkpoint that has been opened, checked against its config.json, and planned: all that can be known before writing.
#[derive(Debug)]
pub struct Conversion {
    checkpoint: Checkpoint,
    plan: Plan,
    model: Model,
    options: Options,
    notices: Vec<Notice>,
    started: Instant,
}

/// Converts the checkpoint at `source` into the pack `target`.
///
/// # Errors
/// See [`ConvertError`]; after any of them there is no target (or still the old one) and no temporary file.
pub fn convert(source: &Path, target: &Path, options: Options, progress: &dyn Progress) -> Result<Report, ConvertError> {
    Conversion::prepare(source, options)?.write(target, progress)
}

impl Conversion {
    /// Opens and plans; reads headers and small files only (and a tied lm_head, to compare it with the embedding).
    ///
    /// # Errors
    /// Where the checkpoint cannot be read or converted as asked.
    pub fn prepare(source: &Path, options: Options) -> Result<Self, ConvertError> {
        let started = Instant::now();
        let checkpoint = Checkpoint::open(source, options.config.as_deref())?;
        let mut model = arch::place(&checkpoint.config, &checkpoint.tensors)?;
        let mut notices = checkpoint.notices.clone();
        notices.extend(arch::resolve_tied(&mut model, &checkpoint)?);
        let plan = Plan::new(&checkpoint, &model, &options)?;
        Ok(Self { checkpoint, plan, model, options, notices, started })
    }

    /// What will be written where.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The model that config.json and the tensors describe.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// What the user should know.
    pub fn notices(&self) -> &[Notice] {
        &self.notices
    }

    /// Bytes of the weights files.
    pub fn source_bytes(&self) -> u64 {
        self.checkpoint.files.iter().map(|f| f.length).sum()
    }

    /// Writes the pack: a temporary file beside `path`, fsync, rename, fsync of the folder.
    ///
    /// # Errors
    /// See [`ConvertError`].
    pub fn write(&self, path: &Path, progress: &dyn Progress) -> Result<Report, ConvertError> {
        self.check_target(path)?;
        let target = Target::create(path, self.plan.layout.file_len(), self.options.force)?;
        let pool = rayon::ThreadPoolBuilder::new().num_threads(self.options.threads.map_or(0, |n| n.get())).build()?;
        let state = pool.install(|| Run::new(self, &target, progress).run())?;
        target.sync()?;
        // That takes a while, and whoever asked to stop in the meantime expects no target.
        if progress.cancelled() {
            return Err(ConvertError::Cancelled);
        }
        target.publish()?;
        Ok(self.report(&state))
    }

    fn check_target(&self, path: &Path) -> Result<(), ConvertError> {
        let Ok(target) = path.canonicalize() else { return Ok(()) };
        let is_target = |f: &SourceFile| f.path.canonicalize().is_ok_and(|p| p == target);
        if self.checkpoint.files.iter().any(is_target) {
            return Err(ConvertError::TargetIsSource { path: path.to_owned() });
        }
        Ok(())
    }

    fn report(&self, state: &State) -> Report {
        let seconds = self.started.elapsed().as_secs_f64();
        let raw: Vec<&Section> = self.plan.layout.sections().iter().filter(|s| s.kind == Some(SectionKind::Raw)).collect();
        let mut all = Stats::default();
        state.roles.values().for_each(|sums| all.merge(&sums.stats));
        Report {
            source_bytes: self.source_bytes(),
            pack_bytes: self.plan.layout.file_len(),
            layers: self.model.layers,
            weights: self.plan.weights,
            raw_tensors: raw.len() as u64,
            raw_bytes: raw.iter().map(|s| s.length).sum(),
            seconds,
            weights_per_second: self.plan.weights as f64 / seconds.max(f64::MIN_POSITIVE),
            relative_error: all.relative_sq_error(),
            roles: state.roles.iter().map(|(&role, sums)| sums.report(role)).collect(),
            notices: notice_texts(&self.notices),
        }
    }
}

/// What the pieces add up to. Pieces are absorbed in file order, so that nothing depends on the number of threads.
#[derive(Debug)]
struct State {
    crcs: Vec<PieceCrc>,
    signed: bool,
    roles: BTreeMap<Role, RoleSums>,
    /// Scales of the `dq8` tensors whose first pass is under way.
    pending: HashMap<usize, Vec<f32>>,
    hashes: Vec<String>,
    done: u64,
}

/// Room for the output of one piece, reused by each thread.
#[derive(Debug, Default)]
struct Scratch {
    source: AlignedBuf,
    codes: Vec<u8>,
    scales: Vec<f32>,
    table: Vec<u8>,
}

/// What became of one piece.
#[derive(Debug)]
enum Outcome {
    /// Only hashed.
    Skipped,
    /// Copied to `section`.
    Copied { section: usize, crc: u32, len: u64 },
    /// Encoded; the scale table too, unless it is `dq8`.
    Encoded { codes: usize, codes_crc: u32, codes_len: u64, table: Option<(u32, u64)>, signed: bool, stats: Stats },
    /// First pass of a `dq8` tensor: the scales that the encoder would like.
    Wanted { tensor: usize, scales: Vec<f32> },
}

struct Run<'a> {
    job: &'a Conversion,
    target: &'a Target,
    progress: &'a dyn Progress,
    state: State,
}

impl<'a> Run<'a> {
    fn new(job: &'a Conversion, target: &'a Target, progress: &'a dyn Progress) -> Self {
        let crcs = vec![PieceCrc::default(); job.plan.layout.sections().len()];
        let (pending, hashes) = (HashMap::new(), Vec::new());
        let state = State { crcs, signed: false, roles: BTreeMap::new(), pending, hashes, done: 0 };
        Self { job, target, progress, state }
    }

    fn run(mut self) -> Result<State, ConvertError> {
        self.progress.advance(0, self.job.plan.weights);
        self.write_files()?;
        for file in &self.job.checkpoint.files {
            let hash = self.convert_file(file)?;
            self.state.hashes.push(hash);
        }
        self.write_front()?;
        Ok(self.state)
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
            self.target.write(bytes, section.offset)?;
            self.state.crcs[number].push(crc32(bytes), bytes.len() as u64);
        }
        Ok(())
    }

    /// Header, index and metadata go last: they hold the checksums and hashes of everything else.
    fn write_front(&mut self) -> Result<(), ConvertError> {
        let crcs: Vec<u32> = self.state.crcs.iter().map(PieceCrc::value).collect();
        let mut provenance = self.job.plan.provenance.clone();
        for (record, hash) in provenance.sources.iter_mut().zip(&self.state.hashes) {
            record.sha256.clone_from(hash);
        }
        let metadata = provenance.to_json().map_err(super::plan::PlanError::from)?;
        let features = if self.state.signed { FEATURE_SIGNED_SCALES } else { 0 };
        let front = self.job.plan.layout.front(&crcs, features, &metadata).map_err(super::plan::PlanError::from)?;
        self.target.write(&front, 0)
    }

    /// Converts every tensor of a file, and gives the file's SHA-256.
    fn convert_file(&mut self, file: &SourceFile) -> Result<String, ConvertError> {
        let window_len = (WINDOW_PER_THREAD * rayon::current_num_threads()).clamp(MIN_WINDOW, MAX_WINDOW);
        let mut windows = windows(file, &self.job.checkpoint.tensors, window_len);
        let mut hash = FileHash::default();
        let mut next = windows.next();
        let (mut current_buf, mut next_buf) = (AlignedBuf::default(), AlignedBuf::default());
        if let Some(window) = &next {
            read_window(file, window, &mut next_buf)?;
        }
        while let Some(window) = next {
            if self.progress.cancelled() {
                return Err(ConvertError::Cancelled);
            }
            std::mem::swap(&mut current_buf, &mut next_buf);
            next = windows.next();
            let bytes = &*current_buf.first_mut(window.len);
            let read_next = || next.as_ref().map_or(Ok(()), |w| read_window(file, w, &mut next_buf));
            let this = &*self;
            let ((), (read, outcomes)) =
                rayon::join(|| hash.update(bytes), || rayon::join(read_next, || this.convert_window(&window, bytes)));
            for (piece, outcome) in window.pieces.iter().zip(outcomes) {
                self.absorb(piece, outcome?)?;
            }
            read?;
        }
        Ok(hash.hex())
    }

    /// One outcome per piece of the window.
    fn convert_window(&self, window: &Window, bytes: &[u8]) -> Vec<Result<Outcome, ConvertError>> {
        let pieces = window.pieces.par_iter();
        pieces
            .map_init(Scratch::default, |scratch, piece| {
                let from = (piece.offset - window.offset) as usize;
                self.convert_piece(piece, &bytes[from..from + piece.len], scratch)
            })
            .collect()
    }

    fn convert_piece(&self, piece: &Piece, bytes: &[u8], scratch: &mut Scratch) -> Result<Outcome, ConvertError> {
        let Some(number) = piece.tensor else { return Ok(Outcome::Skipped) };
        let tensor = &self.job.checkpoint.tensors[number];
        let weights = Weights { float_type: tensor.float_type, bytes };
        let not_finite = |e: NotFinite| self.not_finite(piece, e);
        match self.job.plan.actions[number] {
            Action::Drop => Ok(Outcome::Skipped),
            Action::Copy { section } => {
                if let Some(e) = encode::first_not_finite(weights) {
                    return Err(not_finite(e));
                }
                let offset = self.section(section).offset + piece.first * tensor.float_type.size() as u64;
                self.target.write(bytes, offset)?;
                Ok(Outcome::Copied { section, crc: crc32(bytes), len: bytes.len() as u64 })
            }
            Action::Quantise { codes } => {
                let Some(precision) = precision(self.job.options.scale_type) else {
                    let mut scales = vec![0.0; weights.len().div_ceil(self.job.options.block_size as usize)];
                    encode::choose_scales(self.job.options.encoder, self.job.options.block_size, weights, &mut scales)
                        .map_err(not_finite)?;
                    return Ok(Outcome::Wanted { tensor: number, scales });
                };
                scratch.resize(weights.len(), self.job.options.block_size);
                let options = &self.job.options;
                let Scratch { codes: out, scales, .. } = scratch;
                let stats = encode::encode(options.encoder, precision, options.block_size, weights, out, scales)
                    .map_err(not_finite)?;
                self.write_encoded(piece, codes, stats, precision, scratch)
            }
        }
    }

    fn section(&self, number: usize) -> &Section {
        &self.job.plan.layout.sections()[number]
    }

    fn not_finite(&self, piece: &Piece, e: NotFinite) -> ConvertError {
        let tensor = piece.tensor.map_or("", |n| &self.job.checkpoint.tensors[n].name).to_owned();
        ConvertError::NotFinite { tensor, index: piece.first + e.index as u64, value: e.value }
    }

    /// Writes the codes and scales in `scratch` to their places.
    fn write_encoded(
        &self,
        piece: &Piece,
        codes: usize,
        stats: Stats,
        precision: ScalePrecision,
        scratch: &mut Scratch,
    ) -> Result<Outcome, ConvertError> {
        scratch.table.clear();
        match precision {
            ScalePrecision::F32 => scratch.table.extend(scratch.scales.iter().flat_map(|s| s.to_le_bytes())),
            // The scales are rounded already: their lower halves are zero.
            ScalePrecision::Bf16 => scratch.table.extend(scratch.scales.iter().flat_map(|s| {
                let [_, _, low, high] = s.to_le_bytes();
                [low, high]
            })),
        }
        let first_block = piece.first / u64::from(self.job.options.block_size);
        let scale_len = (scratch.table.len() / scratch.scales.len().max(1)) as u64;
        self.target.write(&scratch.table, self.section(codes + 1).offset + first_block * scale_len)?;
        let table = Some((crc32(&scratch.table), scratch.table.len() as u64));
        let signed = scratch.scales.iter().any(|s| s.is_sign_negative());
        self.write_codes(piece, codes, &scratch.codes)?;
        let (codes_crc, codes_len) = (crc32(&scratch.codes), scratch.codes.len() as u64);
        Ok(Outcome::Encoded { codes, codes_crc, codes_len, table, signed, stats })
    }

    fn write_codes(&self, piece: &Piece, codes: usize, bytes: &[u8]) -> Result<(), ConvertError> {
        self.target.write(bytes, self.section(codes).offset + piece.first / 2)
    }

    fn absorb(&mut self, piece: &Piece, outcome: Outcome) -> Result<(), ConvertError> {
        match outcome {
            Outcome::Skipped => Ok(()),
            Outcome::Copied { section, crc, len } => {
                self.state.crcs[section].push(crc, len);
                Ok(())
            }
            Outcome::Encoded { codes, codes_crc, codes_len, table, signed, stats } => {
                self.state.crcs[codes].push(codes_crc, codes_len);
                if let Some((crc, len)) = table {
                    self.state.crcs[codes + 1].push(crc, len);
                }
                self.state.signed |= signed;
                self.add_stats(piece, codes, &stats);
                Ok(())
            }
            Outcome::Wanted { tensor, scales } => {
                let all = self.state.pending.entry(tensor).or_default();
                all.extend_from_slice(&scales);
                let info = &self.job.checkpoint.tensors[tensor];
                if piece.offset + piece.len as u64 == info.offset + info.length {
                    return self.finish_nested(tensor);
                }
                Ok(())
            }
        }
    }

    fn add_stats(&mut self, piece: &Piece, codes: usize, stats: &Stats) {
        let (section, table) = (self.section(codes), self.section(codes + 1));
        let (role, bytes) = (section.role, section.length + table.length);
        let sums = self.state.roles.entry(role).or_default();
        if piece.first == 0 {
            sums.tensors += 1;
            sums.bytes += bytes;
        }
        sums.stats.merge(stats);
        self.state.done += stats.weights;
        self.progress.advance(self.state.done, self.job.plan.weights);
    }

    /// Second pass of a `dq8` tensor: its scales are nested, and codes are chosen for the scales as they will be read.
    fn finish_nested(&mut self, tensor: usize) -> Result<(), ConvertError> {
        let Action::Quantise { codes } = self.job.plan.actions[tensor] else { return Ok(()) };
        let wanted = self.state.pending.remove(&tensor).unwrap_or_default();
        let table = nested::nest(&wanted, self.job.options.encoder);
        self.target.write(&table, self.section(codes + 1).offset)?;
        self.state.crcs[codes + 1].push(crc32(&table), table.len() as u64);
        let Some(stored) = Scales::from_payload(&table, ScaleType::Dq8, wanted.len()) else { return Ok(()) };
        self.state.signed |= crate::format::check::has_negative_scale(self.section(codes + 1), &table);
        let pieces: Vec<Piece> = tensor_pieces(tensor, &self.job.checkpoint.tensors[tensor]).collect();
        let this = &*self;
        let outcomes: Vec<_> = pieces
            .par_iter()
            .map_init(Scratch::default, |scratch, piece| this.encode_nested(piece, tensor, codes, &stored, scratch))
            .collect();
        pieces.iter().zip(outcomes).try_for_each(|(piece, outcome)| self.absorb(piece, outcome?))
    }

    fn encode_nested(
        &self,
        piece: &Piece,
        tensor: usize,
        codes: usize,
        stored: &Scales<'_>,
        scratch: &mut Scratch,
    ) -> Result<Outcome, ConvertError> {
        if self.progress.cancelled() {
            return Err(ConvertError::Cancelled);
        }
        let info = &self.job.checkpoint.tensors[tensor];
        let block_size = self.job.options.block_size;
        let len = piece.len / info.float_type.size();
        scratch.resize(len, block_size);
        let bytes = scratch.source.first_mut(piece.len);
        self.job.checkpoint.read(info, piece.offset - info.offset, bytes)?;
        let weights = Weights { float_type: info.float_type, bytes };
        stored.read((piece.first / u64::from(block_size)) as usize, &mut scratch.scales);
        let stats = encode::encode_with_scales(block_size, weights, &scratch.scales, &mut scratch.codes);
        self.write_codes(piece, codes, &scratch.codes)?;
        let (codes_crc, codes_len) = (crc32(&scratch.codes), scratch.codes.len() as u64);
        Ok(Outcome::Encoded { codes, codes_crc, codes_len, table: None, signed: false, stats })
    }
}

impl Scratch {
    /// Room for the codes and scales of `weights` weights, in whole blocks.
    fn resize(&mut self, weights: usize, block_size: u32) {
        let blocks = weights.div_ceil(block_size as usize);
        self.codes.resize(blocks * block_size as usize / 2, 0);
        self.scales.resize(blocks, 0.0);
    }
}

/// How a scale is rounded before codes are chosen; `None` where that needs the whole tensor.
fn precision(scale_type: ScaleType) -> Option<ScalePrecision> {
    match scale_type {
        ScaleType::F32 => Some(ScalePrecision::F32),
        ScaleType::Bf16 => Some(ScalePrecision::Bf16),
        ScaleType::Dq8 => None,
    }
}

fn read_window(file: &SourceFile, window: &Window, buf: &mut AlignedBuf) -> Result<(), ConvertError> {
    let read = read_exact_at(&file.file, buf.first_mut(window.len), window.offset);
    read.map_err(|source| SourceError::Io { path: file.path.clone(), source }.into())
}

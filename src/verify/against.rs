//! Compares a pack with its checkpoint: every tensor exists, and no error exceeds what the encoder
//! can produce.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use half::{bf16, f16};
use rayon::prelude::*;
use serde::Serialize;

use super::error::VerifyError;
use crate::arch::place::{Model, Placed};
use crate::convert::source::{Checkpoint, TensorInfo};
use crate::convert::{Progress, encode, parts};
use crate::dequant;
use crate::format::nf4::{self, SUPER_BLOCK, Scales};
use crate::format::{FloatType, Provenance, Role, Section, SectionKind};
use crate::io::AlignedBuf;
use crate::source::{PackSource, WindowBuf};

/// Weights to compare at a time, or the weights of a super-block if it has more: a multiple of
/// every block size.
const PIECE_WEIGHTS: u64 = 1 << 17;
/// Bytes of an unquantised tensor to compare at a time.
const PIECE_BYTES: u64 = 1 << 20;
/// Pieces that are distributed over the threads at a time.
const BATCH: usize = 4096;

/// The error of a nested scale, as a part of its super-scale, is at most this: half the widest gap
/// of the 8-bit dynamic map (0.9 / 64), and the step of the 65,536-point grid that bitsandbytes
/// rounds through.
const DQ8_STEP: f32 = 0.5 * 0.9 / 64.0 + 1.0 / 32768.0;

/// Slack for float32 rounding, relative and absolute (the weakest block that the absmax encoder
/// resolves).
const SLACK: f32 = 1.0 + 1e-3;
const TINY: f32 = 1e-38;

/// The result of a comparison.
#[derive(Debug, Clone, Serialize)]
pub struct AgainstReport {
    /// One entry per tensor of the pack that was quantised, in file order.
    pub tensors: Vec<TensorReport>,
    /// Raw tensors and files that were compared byte for byte.
    pub identical: u64,
    /// All mismatches; empty if the pack was made from this checkpoint.
    pub mismatches: Vec<Mismatch>,
}

/// The error of one quantised tensor.
#[derive(Debug, Clone, Serialize)]
pub struct TensorReport {
    /// Its name.
    pub name: String,
    /// Its role's name.
    pub role: &'static str,
    /// Its weights.
    pub weights: u64,
    /// Largest absolute error.
    pub max_abs_error: f32,
    /// Root of the mean squared error.
    pub rms_error: f64,
    /// Sum of squared errors over sum of squared weights.
    pub relative_error: f64,
    /// The largest relative error of a block: norm of its errors over norm of its weights.
    pub max_block_error: f64,
    /// The index of that block.
    pub max_block: u64,
}

/// A mismatch.
#[derive(Debug, Clone, PartialEq, Serialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Mismatch {
    /// The checkpoint has no such tensor or file.
    #[error("{} is in the pack, but not in the checkpoint", name.escape_debug())]
    NotInCheckpoint {
        /// Its name.
        name: String,
    },
    /// The pack has no such tensor or file.
    #[error("{} is in the checkpoint, but not in the pack", name.escape_debug())]
    NotInPack {
        /// Its name.
        name: String,
    },
    /// Another shape or element type.
    #[error("{} has another shape or type: {found} in the pack, {expected} in the checkpoint", name.escape_debug())]
    Shape {
        /// Its name.
        name: String,
        /// Shape and type in the checkpoint.
        expected: String,
        /// Shape and type in the pack.
        found: String,
    },
    /// Another place in the model: role, layer or expert.
    #[error("{} is {found} in the pack, {expected} in the checkpoint", name.escape_debug())]
    Place {
        /// Its name.
        name: String,
        /// What it is in the checkpoint.
        expected: String,
        /// What the pack says.
        found: String,
    },
    /// A raw tensor or a file has other bytes.
    #[error("{} differs from the checkpoint at byte {offset}", name.escape_debug())]
    Bytes {
        /// Its name.
        name: String,
        /// The first byte that differs.
        offset: u64,
    },
    /// The error of a block exceeds that of any encoder.
    #[error("{}: the RMS error of block {block} is {found}, the maximum of any encoder is {limit}", name.escape_debug())]
    BlockError {
        /// The tensor.
        name: String,
        /// Number of the block.
        block: u64,
        /// The largest error that an encoder can produce.
        limit: f32,
        /// The block's RMS error.
        found: f32,
    },
    /// A code is not the nearest one for its scale.
    #[error("{}: the error of element {element} is {found}, that of the nearest code is {limit}", name.escape_debug())]
    Code {
        /// The tensor.
        name: String,
        /// Index into the flattened tensor.
        element: u64,
        /// The error of the nearest code.
        limit: f32,
        /// The error of the stored one.
        found: f32,
    },
}

/// Compares a pack with the checkpoint at `source`, on `threads` threads (0: one per core).
///
/// # Errors
/// If the checkpoint cannot be read. The report has the mismatches.
pub fn against(
    pack: &PackSource,
    source: &Path,
    config: Option<&Path>,
    threads: usize,
    progress: &dyn Progress,
) -> Result<AgainstReport, VerifyError> {
    // A pack of another program may have no such record; then nothing was left out.
    let provenance = Provenance::from_json(pack.index().metadata());
    let dropped = provenance.map(|p| p.dropped).unwrap_or_default();
    let checkpoint = Checkpoint::open(source, config)?;
    let mut model = parts::place(&checkpoint)?.model;
    // Do not trust the record: decide again what a conversion may leave out.
    parts::resolve_tied(&mut model, &checkpoint)?;
    let kept: HashSet<&str> = model.tensors.iter().map(|p| checkpoint.tensors[p.tensor].name.as_str()).collect();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build()?;
    let comparison = Comparison::new(pack, &checkpoint, &model, progress);
    let mut report = pool.install(|| comparison.run())?;
    let in_pack: HashSet<&str> = pack.index().tensors().map(|(_, section)| pack.index().name(section)).collect();
    let missing = checkpoint
        .tensors
        .iter()
        .map(|t| t.name.as_str())
        .filter(|name| !in_pack.contains(name) && (kept.contains(name) || !dropped.iter().any(|d| d == name)));
    report.mismatches.extend(missing.map(|name| Mismatch::NotInPack { name: name.to_owned() }));
    Ok(report)
}

/// Role, layer and expert.
type Place = (Role, Option<u32>, Option<u32>);

struct Comparison<'a> {
    pack: &'a PackSource,
    checkpoint: &'a Checkpoint,
    by_name: HashMap<&'a str, &'a TensorInfo>,
    /// Role, layer and expert of each tensor of the model.
    places: HashMap<&'a str, Place>,
    progress: &'a dyn Progress,
}

/// Sums and the first mismatch of a piece of a tensor.
#[derive(Debug, Default)]
struct PieceResult {
    max: f32,
    sum_sq: f64,
    sum_sq_error: f64,
    worst: WorstBlock,
    mismatch: Option<Mismatch>,
}

/// The block that lost most of itself, so far.
#[derive(Debug, Clone, Copy, Default)]
struct WorstBlock {
    error: encode::BlockError,
    number: u64,
}

impl WorstBlock {
    fn update(&mut self, other: Self) {
        if other.error.exceeds(&self.error) {
            *self = other;
        }
    }
}

impl PieceResult {
    /// Adds the next piece of the tensor.
    fn add(&mut self, piece: Self) {
        self.max = self.max.max(piece.max);
        self.sum_sq += piece.sum_sq;
        self.sum_sq_error += piece.sum_sq_error;
        self.worst.update(piece.worst);
        self.mismatch = self.mismatch.take().or(piece.mismatch);
    }
}

/// A quantised tensor of the pack.
struct Quantised<'a> {
    /// Number of its codes section.
    number: usize,
    section: &'a Section,
    name: &'a str,
}

impl Quantised<'_> {
    fn piece_weights(&self) -> u64 {
        PIECE_WEIGHTS.max(SUPER_BLOCK as u64 * u64::from(self.section.block_size))
    }
}

/// Buffers of a thread.
#[derive(Debug, Default)]
struct Scratch {
    window: WindowBuf,
    bytes: AlignedBuf,
    source: Vec<f32>,
    decoded: Vec<f32>,
    scales: Vec<f32>,
    codes: Vec<u8>,
    reference: Vec<f32>,
    reference_codes: Vec<u8>,
}

impl<'a> Comparison<'a> {
    fn new(pack: &'a PackSource, checkpoint: &'a Checkpoint, model: &Model, progress: &'a dyn Progress) -> Self {
        let by_name = checkpoint.tensors.iter().map(|t| (t.name.as_str(), t)).collect();
        let place = |p: &Placed| (checkpoint.tensors[p.tensor].name.as_str(), (p.role, p.layer, p.expert));
        let places = model.tensors.iter().map(place).collect();
        Self { pack, checkpoint, by_name, places, progress }
    }

    fn run(&self) -> Result<AgainstReport, VerifyError> {
        let mut report = AgainstReport { tensors: Vec::new(), identical: 0, mismatches: Vec::new() };
        let index = self.pack.index();
        let of_kind = |kind| index.tensors().filter(move |(_, section)| section.kind == Some(kind));
        let total = of_kind(SectionKind::Codes).map(|(_, section)| section.shape.elements()).sum();
        let mut done = 0;
        for (number, section) in of_kind(SectionKind::Codes) {
            let Some(tensor) = self.source_of(section, &mut report) else { continue };
            self.quantised(&Quantised { number, section, name: index.name(section) }, tensor, &mut report)?;
            done += section.shape.elements();
            self.progress.advance(done, total);
        }
        for (_, section) in of_kind(SectionKind::Raw) {
            let Some(tensor) = self.source_of(section, &mut report) else { continue };
            self.raw(section, tensor, &mut report)?;
        }
        self.files(&mut report)?;
        Ok(report)
    }

    /// The checkpoint's tensor of this name, if it has the same shape (and type); otherwise the
    /// report says so.
    fn source_of(&self, section: &Section, report: &mut AgainstReport) -> Option<&'a TensorInfo> {
        let (name, dims) = (self.pack.index().name(section), section.shape.dims());
        let float_type = section.element_type.float_type();
        let place = (section.role, section.layer, section.expert);
        let Some(&tensor) = self.by_name.get(name) else {
            report.mismatches.push(Mismatch::NotInCheckpoint { name: name.to_owned() });
            return None;
        };
        if tensor.shape != dims || float_type.is_some_and(|t| t != tensor.float_type) {
            let expected = format!("{:?} {}", tensor.shape, tensor.float_type);
            let found = format!("{dims:?} {}", float_type.map_or("nf4", |t| t.element_type().name()));
            report.mismatches.push(Mismatch::Shape { name: name.to_owned(), expected, found });
            return None;
        }
        if let Some(&expected) = self.places.get(name).filter(|&&expected| expected != place) {
            let (expected, found) = (describe_place(expected), describe_place(place));
            report.mismatches.push(Mismatch::Place { name: name.to_owned(), expected, found });
        }
        Some(tensor)
    }

    fn files(&self, report: &mut AgainstReport) -> Result<(), VerifyError> {
        for (name, bytes) in &self.checkpoint.side_files {
            match self.pack.file(name)? {
                Some(file) => match first_difference(&file, bytes) {
                    None => report.identical += 1,
                    Some(offset) => report.mismatches.push(Mismatch::Bytes { name: name.clone(), offset }),
                },
                None => report.mismatches.push(Mismatch::NotInPack { name: name.clone() }),
            }
        }
        let known = |name: &str| self.checkpoint.side_files.iter().any(|(n, _)| n == name);
        let extra = self.pack.file_names().filter(|name| !known(name));
        report.mismatches.extend(extra.map(|name| Mismatch::NotInCheckpoint { name: name.to_owned() }));
        Ok(())
    }

    fn raw(&self, section: &Section, tensor: &TensorInfo, report: &mut AgainstReport) -> Result<(), VerifyError> {
        let (mut in_pack, mut in_checkpoint) = (AlignedBuf::default(), AlignedBuf::default());
        let mut from = 0;
        while from < section.length {
            if self.progress.cancelled() {
                return Err(VerifyError::Cancelled);
            }
            let len = (section.length - from).min(PIECE_BYTES);
            let piece = self.pack.bytes(section.offset + from, len, &mut in_pack)?;
            let bytes = in_checkpoint.first_mut(piece.len());
            self.checkpoint.read(tensor, from, bytes)?;
            if let Some(offset) = first_difference(piece, bytes) {
                let name = self.pack.index().name(section).to_owned();
                report.mismatches.push(Mismatch::Bytes { name, offset: from + offset });
                return Ok(());
            }
            from += len;
        }
        report.identical += 1;
        Ok(())
    }

    fn quantised(
        &self,
        quantised: &Quantised<'_>,
        tensor: &TensorInfo,
        report: &mut AgainstReport,
    ) -> Result<(), VerifyError> {
        let elements = quantised.section.shape.elements();
        let weights = quantised.piece_weights();
        let pieces = elements.div_ceil(weights);
        let mut sums = PieceResult::default();
        for batch in (0..pieces).step_by(BATCH) {
            let results: Vec<Result<PieceResult, VerifyError>> = (batch..pieces.min(batch + BATCH as u64))
                .into_par_iter()
                .map_init(Scratch::default, |scratch, i| self.piece(quantised, tensor, i * weights, scratch))
                .collect();
            results.into_iter().try_for_each(|piece| Ok::<_, VerifyError>(sums.add(piece?)))?;
        }
        report.mismatches.extend(sums.mismatch);
        report.tensors.push(TensorReport {
            name: quantised.name.to_owned(),
            role: quantised.section.role.name(),
            weights: elements,
            max_abs_error: sums.max,
            rms_error: (sums.sum_sq_error / elements as f64).sqrt(),
            // A checkpoint with a NaN gives a NaN.
            relative_error: if sums.sum_sq == 0.0 { 0.0 } else { sums.sum_sq_error / sums.sum_sq },
            max_block_error: sums.worst.error.relative(),
            max_block: sums.worst.number,
        });
        Ok(())
    }

    fn piece(
        &self,
        quantised: &Quantised<'_>,
        tensor: &TensorInfo,
        first: u64,
        scratch: &mut Scratch,
    ) -> Result<PieceResult, VerifyError> {
        if self.progress.cancelled() {
            return Err(VerifyError::Cancelled);
        }
        let len = (quantised.section.shape.elements() - first).min(quantised.piece_weights());
        let Scratch { window, bytes, source, decoded, scales, codes, reference, reference_codes } = scratch;
        let data = &self.pack.weights(quantised.number, first, len, window)?;
        let len = len as usize;
        let bytes = bytes.first_mut(len * tensor.float_type.size());
        self.checkpoint.read(tensor, first * tensor.float_type.size() as u64, bytes)?;
        widen(tensor.float_type, bytes, source);
        decoded.resize(len, 0.0);
        if dequant::dequantize(data, 0, decoded).is_err() {
            // A validated pack always decodes; if not, the shape is what disagrees.
            let (expected, found) = (format!("{:?}", tensor.shape), quantised.section.shape.to_string());
            let mismatch = Some(Mismatch::Shape { name: quantised.name.to_owned(), expected, found });
            return Ok(PieceResult { mismatch, ..PieceResult::default() });
        }
        let block = data.block_size as usize;
        scales.resize(len.div_ceil(block), 0.0);
        data.scales.read(0, scales);
        codes.resize(scales.len() * block / 2, 0);
        let weights = encode::Weights { float_type: tensor.float_type, bytes };
        encode::encode_with_scales(data.block_size, weights, scales, codes);
        reference.clear();
        reference.extend(source.chunks(block).map(|weights| absmax_scale(weights, &data.scales)));
        reference_codes.resize(codes.len(), 0);
        encode::encode_with_scales(data.block_size, weights, reference, reference_codes);
        let best = Encoded { scales, codes };
        let absmax = Encoded { scales: reference, codes: reference_codes };
        let blocks = Blocks { name: quantised.name, data, first, source, decoded, best, absmax };
        Ok(blocks.compare())
    }
}

/// Codes and scales of a piece.
#[derive(Clone, Copy)]
struct Encoded<'a> {
    scales: &'a [f32],
    codes: &'a [u8],
}

impl Encoded<'_> {
    /// The value of element `i`.
    fn value(&self, i: usize, block: usize) -> f32 {
        let code = (self.codes[i / 2] >> (4 * (i % 2))) & 15;
        nf4::CODEBOOK[usize::from(code)] * self.scales[i / block]
    }
}

/// One piece of a tensor: the source, the decoded pack, the best codes for the stored scales, and
/// plain absmax.
struct Blocks<'a> {
    name: &'a str,
    /// Codes and scales of the piece.
    data: &'a nf4::Nf4Tensor<'a>,
    /// The number in the tensor of the piece's first weight.
    first: u64,
    source: &'a [f32],
    decoded: &'a [f32],
    best: Encoded<'a>,
    absmax: Encoded<'a>,
}

impl Blocks<'_> {
    fn compare(&self) -> PieceResult {
        let block = self.data.block_size as usize;
        let mut result = PieceResult::default();
        let pairs = self.source.chunks(block).zip(self.decoded.chunks(block));
        for (i, (source, decoded)) in pairs.enumerate() {
            let mut error = encode::BlockError { sum_sq: 0.0, sum_sq_error: 0.0 };
            for (&w, &v) in source.iter().zip(decoded) {
                let difference = (w - v).abs();
                result.max = result.max.max(difference);
                error.sum_sq += f64::from(w) * f64::from(w);
                error.sum_sq_error += f64::from(difference) * f64::from(difference);
            }
            result.sum_sq += error.sum_sq;
            result.sum_sq_error += error.sum_sq_error;
            let number = self.first / block as u64 + i as u64;
            result.worst.update(WorstBlock { error, number });
            let rms = (error.sum_sq_error / source.len() as f64).sqrt() as f32;
            let limit = self.limit(source, i);
            // Written so that a NaN does not pass.
            let within = rms <= limit;
            if !within && result.mismatch.is_none() {
                let name = self.name.to_owned();
                result.mismatch = Some(Mismatch::BlockError { name, block: number, limit, found: rms });
            }
        }
        result.mismatch = result.mismatch.take().or_else(|| self.worse_code());
        result
    }

    /// The largest RMS error of a block by any encoder: that of plain absmax, which the mse encoder
    /// never exceeds, plus the rounding of the stored scale (codebook values are at most 1, so it
    /// moves no weight by more).
    fn limit(&self, source: &[f32], number: usize) -> f32 {
        let block = self.data.block_size as usize;
        let error = |(i, &w): (usize, &f32)| f64::from(w - self.absmax.value(number * block + i, block)).powi(2);
        let sum_sq: f64 = source.iter().enumerate().map(error).sum();
        let scale_step = match self.data.scales {
            Scales::F32(_) | Scales::Bf16(_) => 0.0,
            Scales::Dq8 { super_scales, .. } => DQ8_STEP * Scales::F32(super_scales).get(number / SUPER_BLOCK).abs(),
        };
        ((sum_sq / source.len() as f64).sqrt() as f32 + scale_step) * SLACK + TINY
    }

    /// The first stored code that is farther from the source than the best one for the same scale.
    fn worse_code(&self) -> Option<Mismatch> {
        let stored = self.data.codes.get(..self.best.codes.len()).unwrap_or_default();
        if stored == self.best.codes {
            return None;
        }
        let block = self.data.block_size as usize;
        self.source.iter().zip(self.decoded).enumerate().find_map(|(i, (&w, &v))| {
            let limit = (w - self.best.value(i, block)).abs();
            let found = (w - v).abs();
            let name = || self.name.to_owned();
            let worse = found > limit * SLACK + TINY;
            worse.then(|| Mismatch::Code { name: name(), element: self.first + i as u64, limit, found })
        })
    }
}

/// The scale of plain absmax for a block, rounded as the table stores it.
fn absmax_scale(weights: &[f32], table: &Scales<'_>) -> f32 {
    let absmax = weights.iter().fold(0.0_f32, |m, w| m.max(w.abs()));
    match table {
        Scales::Bf16(_) => bf16::from_f32(absmax).to_f32().min(bf16::MAX.to_f32()),
        Scales::F32(_) | Scales::Dq8 { .. } => absmax,
    }
}

/// `q_proj of layer 3`
fn describe_place((role, layer, expert): Place) -> String {
    let of = |what, number: Option<u32>| number.map_or(String::new(), |n| format!(" of {what} {n}"));
    format!("{role}{}{}", of("expert", expert), of("layer", layer))
}

fn first_difference(a: &[u8], b: &[u8]) -> Option<u64> {
    if a == b {
        return None;
    }
    let common = a.iter().zip(b).position(|(x, y)| x != y);
    Some(common.unwrap_or(a.len().min(b.len())) as u64)
}

/// Little-endian floats as float32, exactly.
pub(crate) fn widen(float_type: FloatType, bytes: &[u8], out: &mut Vec<f32>) {
    out.clear();
    match float_type {
        FloatType::F32 => out.extend(bytes.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b))),
        FloatType::F16 => out.extend(bytes.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32())),
        FloatType::Bf16 => out.extend(bytes.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32())),
    }
}

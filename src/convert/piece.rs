//! What becomes of one piece of a source file: pure work on bytes in memory, for any thread.

use super::encode::nested::Margin;
use super::encode::{self, BlockError, Encoder, NotFinite, ScalePrecision, Stats, Weights};
use super::error::ConvertError;
use super::nesting::TABLES;
use super::options::Options;
use super::plan::{Action, Plan};
use super::source::TensorInfo;
use super::walk::Piece;
use crate::format::nf4::{ScaleType, Scales};
use crate::format::{Section, crc32};

/// The bytes of a write.
#[derive(Debug)]
pub(super) enum Payload {
    /// Those of the piece itself.
    Piece,
    /// Made from it.
    Made(Vec<u8>),
}

/// A part of a section, ready to be written.
#[derive(Debug)]
pub(super) struct Write {
    /// The section that it is a part of.
    pub section: usize,
    /// Where it goes in the pack.
    pub offset: u64,
    /// Its length.
    pub len: u64,
    /// Its CRC-32.
    pub crc: u32,
    /// Its bytes.
    pub payload: Payload,
}

/// What became of one piece.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// What is to be written, in any order.
    pub writes: Vec<Write>,
    /// What encoding cost, if something was encoded.
    pub stats: Option<Stats>,
    /// Whether a scale is negative.
    pub signed: bool,
    /// First pass of a `dq8` tensor: the scales that the encoder would like, and what each has to
    /// spare.
    pub wanted: Option<(Vec<f32>, Vec<Margin>)>,
}

/// A piece with all that its conversion depends on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Work<'a> {
    pub plan: &'a Plan,
    pub options: &'a Options,
    pub tensor: &'a TensorInfo,
    pub action: Action,
    pub piece: Piece,
    pub bytes: &'a [u8],
}

impl Work<'_> {
    /// Converts the piece, all but the second pass of a `dq8` tensor.
    pub(super) fn run(&self) -> Result<Outcome, ConvertError> {
        let outcome = match (self.action, precision(self.options.scale_type)) {
            (Action::Drop, _) => Ok(Outcome::default()),
            (Action::Copy { section }, _) => self.copy(section),
            (Action::Quantise { codes }, Some(precision)) => self.encode(codes, precision),
            (Action::Quantise { .. }, None) => self.choose_scales(),
        };
        outcome.map_err(|e: NotFinite| ConvertError::NotFinite {
            tensor: self.tensor.name.clone(),
            index: self.piece.first + e.index as u64,
            value: e.value,
        })
    }

    fn weights(&self) -> Weights<'_> {
        Weights { float_type: self.tensor.float_type, bytes: self.bytes }
    }

    fn blocks(&self) -> usize {
        self.weights().len().div_ceil(self.options.block_size as usize)
    }

    /// The number in its tensor of the piece's first block.
    fn first_block(&self) -> usize {
        (self.piece.first / u64::from(self.options.block_size)) as usize
    }

    fn section(&self, number: usize) -> &Section {
        &self.plan.layout.sections()[number]
    }

    fn copy(&self, section: usize) -> Result<Outcome, NotFinite> {
        if let Some(e) = encode::first_not_finite(self.weights()) {
            return Err(e);
        }
        let offset = self.section(section).offset + self.piece.first * self.tensor.float_type.size() as u64;
        let (len, crc) = (self.bytes.len() as u64, crc32(self.bytes));
        let write = Write { section, offset, len, crc, payload: Payload::Piece };
        Ok(Outcome { writes: vec![write], ..Outcome::default() })
    }

    fn encode(&self, codes: usize, precision: ScalePrecision) -> Result<Outcome, NotFinite> {
        let mut scales = vec![0.0; self.blocks()];
        let mut packed = self.room_for_codes();
        let (encoder, block_size) = (self.options.encoder, self.options.block_size);
        let stats = encode::encode(encoder, precision, block_size, self.weights(), &mut packed, &mut scales)?;
        let table = table_bytes(&scales, precision);
        let scale_len = (table.len() / scales.len().max(1)) as u64;
        let table_offset = self.section(codes + 1).offset + self.first_block() as u64 * scale_len;
        Ok(Outcome {
            writes: vec![self.codes_write(codes, packed), made(codes + 1, table_offset, table)],
            stats: Some(stats),
            signed: scales.iter().any(|s| s.is_sign_negative()),
            wanted: None,
        })
    }

    fn choose_scales(&self) -> Result<Outcome, NotFinite> {
        let mut scales = vec![0.0; self.blocks()];
        let (block_size, mut margins) = (self.options.block_size, Vec::new());
        match self.options.encoder {
            Encoder::Absmax => encode::choose_scales(Encoder::Absmax, block_size, self.weights(), &mut scales)?,
            Encoder::Mse => {
                margins.resize(scales.len(), Margin::default());
                encode::choose_scales_with_margins(block_size, self.weights(), &mut scales, &mut margins)?;
            }
        }
        Ok(Outcome { wanted: Some((scales, margins)), ..Outcome::default() })
    }

    /// The scales of plain absmax. The first pass has refused what is not finite.
    pub(super) fn absmax_scales(&self) -> Vec<f32> {
        let mut scales = vec![0.0; self.blocks()];
        let _ = encode::choose_scales(Encoder::Absmax, self.options.block_size, self.weights(), &mut scales);
        scales
    }

    /// The error of each block with each of these tables.
    pub(super) fn try_tables(&self, tables: &[Option<Scales<'_>>; TABLES]) -> [Vec<BlockError>; TABLES] {
        let mut scales = vec![0.0; self.blocks()];
        tables.each_ref().map(|table| {
            let mut errors = vec![BlockError::default(); scales.len()];
            if let Some(table) = table {
                table.read(self.first_block(), &mut scales);
                encode::block_errors(self.options.block_size, self.weights(), &scales, &mut errors);
            }
            errors
        })
    }

    /// Second pass of a `dq8` tensor: codes for the scales as they will be read.
    pub(super) fn encode_nested(&self, codes: usize, stored: &Scales<'_>) -> Outcome {
        let mut scales = vec![0.0; self.blocks()];
        stored.read(self.first_block(), &mut scales);
        let mut packed = self.room_for_codes();
        let stats = encode::encode_with_scales(self.options.block_size, self.weights(), &scales, &mut packed);
        Outcome { writes: vec![self.codes_write(codes, packed)], stats: Some(stats), ..Outcome::default() }
    }

    fn room_for_codes(&self) -> Vec<u8> {
        vec![0; self.blocks() * self.options.block_size as usize / 2]
    }

    fn codes_write(&self, codes: usize, packed: Vec<u8>) -> Write {
        made(codes, self.section(codes).offset + self.piece.first / 2, packed)
    }
}

fn made(section: usize, offset: u64, bytes: Vec<u8>) -> Write {
    Write { section, offset, len: bytes.len() as u64, crc: crc32(&bytes), payload: Payload::Made(bytes) }
}

/// How a scale is rounded before codes are chosen; `None` where that needs the whole tensor.
fn precision(scale_type: ScaleType) -> Option<ScalePrecision> {
    match scale_type {
        ScaleType::F32 => Some(ScalePrecision::F32),
        ScaleType::Bf16 => Some(ScalePrecision::Bf16),
        ScaleType::Dq8 => None,
    }
}

/// Scales that have been rounded to `precision`, as a pack stores them.
fn table_bytes(scales: &[f32], precision: ScalePrecision) -> Vec<u8> {
    let mut table = Vec::with_capacity(4 * scales.len());
    match precision {
        ScalePrecision::F32 => scales.iter().for_each(|s| table.extend(s.to_le_bytes())),
        // The lower halves are zero.
        ScalePrecision::Bf16 => scales.iter().for_each(|s| table.extend(&s.to_le_bytes()[2..])),
    }
    table
}

#[cfg(test)]
mod tests;

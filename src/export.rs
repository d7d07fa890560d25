//! Exports a pack to a snapshot folder that transformers loads.

mod config;
pub(crate) mod writer;

use std::borrow::Cow;
use std::cell::RefCell;
use std::path::Path;
use std::time::Instant;

use half::{bf16, f16};
use rayon::prelude::*;
use serde::Serialize;
use thiserror::Error;

use crate::arch::Obstacle;
use crate::convert::Progress;
use crate::dequant;
use crate::format::files::CONFIG;
use crate::format::nf4::Nf4Tensor;
use crate::format::{FloatType, SectionKind};
use crate::source::{PackSource, TensorBuf};
use crate::verify::{VerifyError, require_undamaged};
use writer::Tensor;
pub use writer::{MAX_SHARD_LEN, WriteError, Written};

/// Weights that a thread decodes at a time.
const PIECE_WEIGHTS: usize = 1 << 17;

/// Why a pack could not be exported. No files remain, except after [`WriteError::NotDurable`].
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The pack cannot be checked, or is damaged.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// The pack's config.json does not describe its layers.
    #[error("{0}")]
    Obstacle(#[from] Obstacle),
    /// A weight is too large for the requested type.
    #[error("tensor {tensor} has a weight that {dtype} cannot represent")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// The requested type.
        dtype: FloatType,
    },
    /// The snapshot cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// The report of an export.
#[derive(Debug, Clone, Serialize)]
pub struct ExportReport {
    /// The snapshot.
    #[serde(flatten)]
    pub written: Written,
    /// Wall-clock seconds.
    pub seconds: f64,
}

/// Writes a pack as a snapshot folder `target`: quantised tensors decoded to `dtype`,
/// raw ones in their own type byte for byte, and the embedded files of checkpoints
/// ([`crate::format::files::place_of`]) unchanged, except config.json: its dtype can represent all
/// tensors, `tie_word_embeddings` is false if the pack has an output projection, and it has no
/// quantisation settings. The folder appears only when it is complete.
///
/// # Errors
/// See [`ExportError`]; a pack whose payloads are damaged is refused.
pub fn export(
    pack: &PackSource,
    target: &Path,
    dtype: FloatType,
    progress: &dyn Progress,
) -> Result<ExportReport, ExportError> {
    export_sharded(pack, target, dtype, MAX_SHARD_LEN, progress)
}

/// [`export`] with weights files of at most `shard_len` bytes of tensors each (or one longer
/// tensor).
///
/// # Errors
/// As [`export`].
pub fn export_sharded(
    pack: &PackSource,
    target: &Path,
    dtype: FloatType,
    shard_len: u64,
    progress: &dyn Progress,
) -> Result<ExportReport, ExportError> {
    let started = Instant::now();
    writer::refuse_existing(target)?;
    if let Some(config) = pack.file(CONFIG).map_err(WriteError::from)? {
        Obstacle::check_layer_count(&config, pack.index().header().layer_count)?;
    }
    require_undamaged(pack, progress)?;
    let readers = writer::readers(pack)?;
    let index = pack.index();
    let of_kind = |kind| index.tensors().filter(move |(_, section)| section.kind == Some(kind));
    let buf = &RefCell::new(TensorBuf::default());
    let tensors = of_kind(SectionKind::Codes).chain(of_kind(SectionKind::Raw));
    let tensor = |(number, section)| Tensor {
        name: index.name(section),
        float_type: section.element_type.float_type().unwrap_or(dtype),
        dims: section.shape.dims(),
        make: Box::new(move || tensor_bytes(pack, number, &mut buf.borrow_mut(), dtype, progress).map(Cow::Owned)),
    };
    let tensors: Vec<Tensor<'_, ExportError>> = tensors.map(tensor).collect();
    let written = writer::write(target, pack, &tensors, shard_len, &readers, progress)?;
    Ok(ExportReport { written, seconds: started.elapsed().as_secs_f64() })
}

/// The bytes of a tensor: decoded, or as they are in the pack.
fn tensor_bytes(
    pack: &PackSource,
    number: usize,
    buf: &mut TensorBuf,
    dtype: FloatType,
    progress: &dyn Progress,
) -> Result<Vec<u8>, ExportError> {
    let section = pack.index().sections().get(number);
    if section.is_some_and(|section| section.kind == Some(SectionKind::Raw)) {
        return Ok(pack.raw(number, buf).map_err(WriteError::from)?.to_vec());
    }
    let name = section.map_or("", |section| pack.index().name(section));
    decode(name, &pack.quantized(number, buf).map_err(WriteError::from)?, dtype, progress)
}

/// The bytes of a decoded tensor; all threads work on it.
fn decode(name: &str, tensor: &Nf4Tensor<'_>, dtype: FloatType, progress: &dyn Progress) -> Result<Vec<u8>, ExportError> {
    let mut out = writer::zeros(name, tensor.elements, dtype)?;
    let pieces = out.par_chunks_mut(PIECE_WEIGHTS * dtype.size()).enumerate();
    pieces.try_for_each(|(i, bytes)| {
        if progress.cancelled() {
            return Err(WriteError::Cancelled.into());
        }
        decode_piece(name, tensor, dtype, (i * PIECE_WEIGHTS) as u64, bytes)
    })?;
    Ok(out)
}

fn decode_piece(
    name: &str,
    data: &Nf4Tensor<'_>,
    dtype: FloatType,
    first: u64,
    bytes: &mut [u8],
) -> Result<(), ExportError> {
    let overflow = || ExportError::Overflow { tensor: name.to_owned(), dtype };
    let len = bytes.len() / dtype.size();
    // A validated pack always decodes: the only error of these calls is a range outside the tensor.
    match dtype {
        FloatType::F32 => {
            let mut values = vec![0.0_f32; len];
            dequant::dequantize(data, first, &mut values).map_err(|_| overflow())?;
            put(bytes, values.iter().map(|v| v.to_le_bytes()));
            values.iter().all(|v| v.is_finite())
        }
        FloatType::Bf16 => {
            let mut values = vec![bf16::ZERO; len];
            dequant::dequantize_bf16(data, first, &mut values).map_err(|_| overflow())?;
            put(bytes, values.iter().map(|v| v.to_le_bytes()));
            values.iter().all(|v| v.is_finite())
        }
        FloatType::F16 => {
            let mut values = vec![f16::ZERO; len];
            dequant::dequantize_f16(data, first, &mut values).map_err(|_| overflow())?;
            put(bytes, values.iter().map(|v| v.to_le_bytes()));
            values.iter().all(|v| v.is_finite())
        }
    }
    .then_some(())
    .ok_or_else(overflow)
}

fn put<const N: usize>(bytes: &mut [u8], values: impl Iterator<Item = [u8; N]>) {
    bytes.as_chunks_mut::<N>().0.iter_mut().zip(values).for_each(|(to, from)| *to = from);
}

//! Exports a pack to a snapshot folder that transformers loads.

mod config;
pub(crate) mod writer;

use std::borrow::Cow;
use std::path::Path;
use std::time::Instant;

use half::{bf16, f16};
use rayon::prelude::*;
use serde::Serialize;
use thiserror::Error;

use crate::MappedPack;
use crate::convert::Progress;
use crate::dequant;
use crate::format::{FloatType, QuantizedTensor};
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
    pack: &MappedPack,
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
    pack: &MappedPack,
    target: &Path,
    dtype: FloatType,
    shard_len: u64,
    progress: &dyn Progress,
) -> Result<ExportReport, ExportError> {
    let started = Instant::now();
    writer::refuse_existing(target)?;
    require_undamaged(pack, progress)?;
    let readers = writer::readers(pack)?;
    let pack = pack.pack();
    let decoded = pack.quantized_tensors().map(|tensor| Tensor {
        name: tensor.name,
        float_type: dtype,
        dims: tensor.shape.dims(),
        make: Box::new(move || decode(&tensor, dtype, progress).map(Cow::Owned)),
    });
    let raw = pack.raw_tensors().map(|tensor| Tensor {
        name: tensor.name,
        float_type: tensor.float_type,
        dims: tensor.shape.dims(),
        make: Box::new(move || Ok(Cow::Borrowed(tensor.bytes))),
    });
    let tensors: Vec<Tensor<'_, ExportError>> = decoded.chain(raw).collect();
    let written = writer::write(target, pack, &tensors, shard_len, &readers, progress)?;
    Ok(ExportReport { written, seconds: started.elapsed().as_secs_f64() })
}

/// The bytes of a decoded tensor; all threads work on it.
fn decode(tensor: &QuantizedTensor<'_>, dtype: FloatType, progress: &dyn Progress) -> Result<Vec<u8>, ExportError> {
    let mut out = vec![0; tensor.data.elements as usize * dtype.size()];
    let pieces = out.par_chunks_mut(PIECE_WEIGHTS * dtype.size()).enumerate();
    pieces.try_for_each(|(i, bytes)| {
        if progress.cancelled() {
            return Err(WriteError::Cancelled.into());
        }
        decode_piece(tensor, dtype, (i * PIECE_WEIGHTS) as u64, bytes)
    })?;
    Ok(out)
}

fn decode_piece(tensor: &QuantizedTensor<'_>, dtype: FloatType, first: u64, bytes: &mut [u8]) -> Result<(), ExportError> {
    let overflow = || ExportError::Overflow { tensor: tensor.name.to_owned(), dtype };
    let len = bytes.len() / dtype.size();
    let data = &tensor.data;
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

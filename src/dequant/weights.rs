//! Quantised tensors in GPU memory.

use super::codec::Codec;
use super::error::DequantError;
use super::plan;
use crate::format::nf4::{self, Nf4Tensor, Scales};
use crate::gpu::{BufferRange, Gpu, GpuError};

/// A quantised tensor in GPU memory: the buffers of an [`Nf4Tensor`]. The offset of each range is a
/// multiple of 256 bytes.
#[derive(Debug, Clone)]
pub struct GpuWeights {
    /// The codes section in one range, or in several if it exceeds the largest buffer of the
    /// device. All ranges except the last have the same size, a multiple of 2048 bytes. So each of
    /// them ends at the end of a block, for every block size.
    pub codes: Vec<BufferRange>,
    /// The scales section as stored in the file (spec section 7.2). Its size may be any number, but
    /// the buffer must extend to the next multiple of 4: bindings are rounded up.
    pub scales: BufferRange,
    /// How the codes are decoded, and the storage type of the scales.
    pub codec: Codec,
    /// Elements per block, one of [`nf4::BLOCK_SIZES`].
    pub block_size: u32,
    /// Number of weights, without the padding of the last block.
    pub elements: u64,
}

/// The size of each part of the codes, except the last, is a multiple of this: the codes of the
/// largest block.
const PART_ALIGN: u64 = 2048;

impl GpuWeights {
    /// Copies one tensor to the device through the queue. For tests and small programs.
    ///
    /// # Errors
    /// [`GpuError::TooLarge`] if the scales exceed the largest buffer, [`GpuError::OutOfMemory`].
    pub fn upload(gpu: &Gpu, tensor: &Nf4Tensor<'_>) -> Result<Self, GpuError> {
        let part = (gpu.limits().max_buffer_size / PART_ALIGN * PART_ALIGN).max(PART_ALIGN);
        let part = usize::try_from(part).unwrap_or(usize::MAX);
        let buffer = |bytes: &[u8]| {
            let buffer = gpu.storage_with("weights", bytes)?;
            Ok(BufferRange { buffer, offset: 0, size: bytes.len() as u64 })
        };
        Ok(Self {
            codes: tensor.codes.chunks(part).map(buffer).collect::<Result<_, GpuError>>()?,
            scales: buffer(&payload(&tensor.scales))?,
            codec: Codec::Nf4(tensor.scales.scale_type()),
            block_size: tensor.block_size,
            elements: tensor.elements,
        })
    }

    /// Checks all sizes. Returns the words in each part of the codes, except the last.
    pub(super) fn part_words(&self) -> Result<u64, DequantError> {
        let wrong = |what, found, expected| Err(DequantError::Weights { what, found, expected });
        if !nf4::BLOCK_SIZES.contains(&self.block_size) {
            return wrong("the block size", self.block_size.into(), nf4::DEFAULT_BLOCK_SIZE.into());
        }
        let scales = nf4::scales_len(nf4::block_count(self.elements, self.block_size), self.codec.scale_type());
        if scales != Some(self.scales.size) {
            return wrong("the size of the scales", self.scales.size, scales.unwrap_or(u64::MAX));
        }
        let codes = nf4::codes_len(self.elements, self.block_size);
        let found = self.codes.iter().fold(0_u64, |sum, part| sum.saturating_add(part.size));
        if codes != Some(found) {
            return wrong("the size of the codes", found, codes.unwrap_or(u64::MAX));
        }
        let part = self.codes.first().map_or(PART_ALIGN, |part| part.size);
        if let [parts @ .., last] = self.codes.as_slice() {
            if let Some(uneven) = parts.iter().find(|p| p.size != part || !part.is_multiple_of(PART_ALIGN)) {
                return wrong("the size of a part of the codes", uneven.size, part.next_multiple_of(PART_ALIGN));
            }
            if last.size > part {
                return wrong("the size of the last part of the codes", last.size, part);
            }
        }
        if let Some(range) = self.codes.iter().chain([&self.scales]).find(|r| !r.offset.is_multiple_of(plan::ALIGN)) {
            return wrong("the offset of a range", range.offset, range.offset.next_multiple_of(plan::ALIGN));
        }
        Ok((part / 4).max(1))
    }
}

/// A scale table as stored in the file.
fn payload(scales: &Scales<'_>) -> Vec<u8> {
    match *scales {
        Scales::F32(bytes) | Scales::Bf16(bytes) => bytes.to_vec(),
        Scales::Dq8 { offset, map, super_scales, codes } => {
            [offset.to_le_bytes().as_slice(), map, super_scales, codes].concat()
        }
    }
}

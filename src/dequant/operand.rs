//! Quantised weights as operands of kernels that decode on the fly.

use std::ops::Range;

use super::codec::Codec;
use super::dequantize;
use super::error::DequantError;
pub(crate) use super::plan::ALIGN;
use super::plan::{Job, Window};
use super::sample::Sample;
use super::weights::GpuWeights;
use crate::format::nf4::{self, CODES_PER_WORD};
use crate::gpu::{BufferRange, Gpu, GpuError};

/// Block size of the weights in a kernel test. It is small, so that small weights have many blocks.
const SAMPLE_BLOCK: u32 = 32;

impl Codec {
    /// Random test weights in GPU memory, and their values as decoded by the CPU.
    pub(crate) fn sample(self, gpu: &Gpu, elements: u64) -> Result<(GpuWeights, Vec<f32>), GpuError> {
        let sample = Sample::even(self.scale_type(), elements, SAMPLE_BLOCK);
        let weights = GpuWeights { codec: self, ..GpuWeights::upload(gpu, &sample.tensor())? };
        let mut values = vec![f32::NAN; elements as usize];
        match self {
            // The lengths of the sample are right by construction. If they were wrong, NaN would
            // fail the kernel.
            Self::Nf4(_) => drop(dequantize(&sample.tensor(), 0, &mut values)),
            #[cfg(test)]
            Self::Linear(_) => {
                let (tensor, codebook) = (sample.tensor(), self.codebook());
                for (i, value) in values.iter_mut().enumerate() {
                    let code = tensor.codes[i / 2] >> (4 * (i % 2)) & 15;
                    *value = codebook[usize::from(code)] * tensor.scales.get(i / SAMPLE_BLOCK as usize);
                }
            }
        }
        Ok((weights, values))
    }
}

/// A range of weights as bound to a kernel, and its position in the bindings. The input of a
/// [`Codec`](super::Codec).
#[derive(Debug, Clone)]
pub(crate) struct Operand {
    /// Codes, head, super-scales and scales: bindings 0 to 3.
    pub bindings: [BufferRange; 4],
    /// Index of the first element, from the first bound code.
    pub first: u32,
    /// Offset of the first element in its block.
    pub block_first: u32,
    /// log2 of the block size.
    pub block_bits: u32,
    /// Index of the scale of its block, from the first bound scale.
    pub scales_first: u32,
    /// The same index, from the first scale of the first bound super-scale.
    pub supers_first: u32,
}

impl GpuWeights {
    /// Elements in each part of the codes, except the last. A multiple of 4096.
    ///
    /// # Errors
    /// [`DequantError::Weights`] if the sizes are inconsistent.
    pub(crate) fn part_elements(&self) -> Result<u64, DequantError> {
        Ok(self.part_words()?.saturating_mul(CODES_PER_WORD as u64))
    }

    /// Maximum elements of an [`Operand`] with bindings of `binding` bytes. A multiple of 8, at
    /// least 8.
    pub(crate) fn operand_elements(binding: u64) -> u64 {
        // The codes are the largest window. Indices of 2^30 elements fit 32 bits with room to
        // spare.
        (2 * binding.saturating_sub(ALIGN)).clamp(CODES_PER_WORD as u64, 1 << 30) / 8 * 8
    }

    /// Binds the elements in `range`, at least one, all in the same part.
    ///
    /// # Errors
    /// [`DequantError::Weights`] if the sizes are inconsistent, [`DequantError::Range`] if `range`
    /// exceeds the tensor.
    pub(crate) fn operand(&self, range: Range<u64>) -> Result<Operand, DequantError> {
        let (part_words, per_word) = (self.part_words()?, CODES_PER_WORD as u64);
        let (start, end, elements) = (range.start, range.end, self.elements);
        let words = start / per_word..end.div_ceil(per_word);
        if start >= end || end > elements || words.start / part_words != (words.end - 1) / part_words {
            return Err(DequantError::Range { start, end, elements });
        }
        let block_words = u64::from(self.block_size) / per_word;
        let blocks = nf4::block_count(elements, self.block_size);
        let (scale_type, binding) = (self.codec.scale_type(), u64::MAX);
        let chunk =
            Job { words: words.clone(), block_words, blocks, scale_type, part_words, out_bytes: 0, binding }.chunk(words);
        let part = self.codes.get(chunk.part).ok_or(DequantError::Range { start, end, elements })?;
        let scales = |window: Window| self.scales.slice(window.offset, window.size);
        let in_word = (start % per_word) as u32;
        Ok(Operand {
            bindings: [
                part.slice(chunk.codes.offset, chunk.codes.size),
                scales(chunk.head),
                scales(chunk.supers),
                scales(chunk.scales),
            ],
            first: chunk.codes_first * CODES_PER_WORD as u32 + in_word,
            block_first: chunk.block_phase * CODES_PER_WORD as u32 + in_word,
            block_bits: self.block_size.ilog2(),
            scales_first: chunk.scales_first,
            supers_first: chunk.supers_first,
        })
    }
}

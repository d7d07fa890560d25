//! Quantised weights as operands of kernels that decode on the fly, and their codecs.

use std::ops::Range;

use super::dequantize;
use super::error::DequantError;
use super::kernel::scales_constant;
pub(crate) use super::plan::ALIGN;
use super::plan::{Job, Window};
use super::sample::Sample;
use super::weights::GpuWeights;
use crate::format::nf4::{self, CODEBOOK, CODES_PER_WORD, ScaleType};
use crate::gpu::{BufferRange, Gpu, GpuError};

/// Block size of the weights in a kernel test. It is small, so that small weights have many blocks.
const SAMPLE_BLOCK: u32 = 32;

/// How kernels decode quantised weights. A new 4-bit codec with 16 values is a WGSL file with the
/// four functions that codec_nf4.wgsl lists, and an arm here. For other sizes of codes,
/// matmul_quantized.wgsl and [`Codec::codebook`] must change, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Codec {
    /// NF4 with scales of this type.
    Nf4(ScaleType),
}

impl Codec {
    /// The bindings and functions in WGSL. Every decoding kernel includes them.
    pub fn source(self) -> &'static str {
        match self {
            Self::Nf4(_) => {
                concat!(include_str!("../../shaders/nf4_bindings.wgsl"), include_str!("../../shaders/codec_nf4.wgsl"))
            }
        }
    }

    /// The constants of those functions.
    pub fn constants(self) -> [(&'static str, f64); 1] {
        match self {
            Self::Nf4(scale_type) => [("SCALES", scales_constant(scale_type))],
        }
    }

    /// The value of each code before scaling: `params.codebook`.
    pub fn codebook(self) -> [f32; 16] {
        match self {
            Self::Nf4(_) => CODEBOOK,
        }
    }

    /// Random test weights in GPU memory, and their values as decoded by the CPU.
    pub fn sample(self, gpu: &Gpu, elements: u64) -> Result<(GpuWeights, Vec<f32>), GpuError> {
        match self {
            Self::Nf4(scale_type) => {
                let sample = Sample::even(scale_type, elements, SAMPLE_BLOCK);
                let mut values = vec![f32::NAN; elements as usize];
                // The lengths of the sample are right by construction. If they were wrong, NaN
                // would fail the kernel.
                let _ = dequantize(&sample.tensor(), 0, &mut values);
                Ok((GpuWeights::upload(gpu, &sample.tensor())?, values))
            }
        }
    }
}

/// A range of weights as bound to a kernel, and its position in the bindings. The input of a
/// [`Codec`].
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
    /// The codec of the weights.
    pub(crate) fn codec(&self) -> Codec {
        Codec::Nf4(self.scale_type)
    }

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
        let (scale_type, binding) = (self.scale_type, u64::MAX);
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

//! Quantised weights as an operand of kernels that decode them as they go, and the codecs that do it.

use std::ops::Range;

use super::dequantize;
use super::error::DequantError;
use super::kernel::GpuWeights;
use super::kernel::scales_constant;
pub(crate) use super::plan::ALIGN;
use super::plan::{Job, Window};
use super::sample::Sample;
use crate::format::nf4::{self, CODEBOOK, CODES_PER_WORD, ScaleType};
use crate::gpu::{BufferRange, Gpu, GpuError};

/// Elements in a block of the weights that kernels are tried on: they have many blocks, few as they are.
const SAMPLE_BLOCK: u32 = 32;

/// How kernels decode quantised weights. Another codec is another file of the same four functions (codec_nf4.wgsl names
/// them), and an arm here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Codec {
    /// NF4, with scales of this type.
    Nf4(ScaleType),
}

impl Codec {
    /// The functions in WGSL: a part of every kernel that decodes.
    pub fn source(self) -> &'static str {
        match self {
            Self::Nf4(_) => include_str!("../../shaders/codec_nf4.wgsl"),
        }
    }

    /// The constants of those functions.
    pub fn constants(self) -> [(&'static str, f64); 1] {
        match self {
            Self::Nf4(scale_type) => [("SCALES", scales_constant(scale_type))],
        }
    }

    /// The value of each code, before it is scaled: `params.codebook`.
    pub fn codebook(self) -> [f32; 16] {
        match self {
            Self::Nf4(_) => CODEBOOK,
        }
    }

    /// Random weights for a trial in GPU memory, and as the CPU decodes them.
    pub fn sample(self, gpu: &Gpu, elements: u64) -> Result<(GpuWeights, Vec<f32>), GpuError> {
        match self {
            Self::Nf4(scale_type) => {
                let sample = Sample::even(scale_type, elements, SAMPLE_BLOCK);
                let mut values = vec![f32::NAN; elements as usize];
                // The sample's lengths are right by construction; were they not, NaN would fail the kernel.
                let _ = dequantize(&sample.projection(), 0, &mut values);
                Ok((GpuWeights::upload(gpu, &sample.projection())?, values))
            }
        }
    }
}

/// A run of weights that can be bound, and where in its bindings they are: what a [`Codec`] works on.
#[derive(Debug, Clone)]
pub(crate) struct Operand {
    /// Codes, head, super-scales and scales: bindings 0 to 3.
    pub bindings: [BufferRange; 4],
    /// The first element, counted from the first code that is bound.
    pub first: u32,
    /// Elements of its block that lie before the first element.
    pub block_first: u32,
    /// Logarithm to base 2 of the elements in a block.
    pub block_bits: u32,
    /// The scale of its block, in the scales that are bound.
    pub scales_first: u32,
    /// The same, counted from the first scale of the first super-scale that is bound.
    pub supers_first: u32,
}

impl GpuWeights {
    /// How they are decoded.
    pub(crate) fn codec(&self) -> Codec {
        Codec::Nf4(self.scale_type)
    }

    /// Elements in every part of the codes but the last, a multiple of 4096.
    ///
    /// # Errors
    /// [`DequantError::Weights`] where the sizes are not right.
    pub(crate) fn part_elements(&self) -> Result<u64, DequantError> {
        Ok(self.part_words()?.saturating_mul(CODES_PER_WORD as u64))
    }

    /// The most elements that an [`Operand`] binds within `binding` bytes, as a multiple of 8 and at least 8.
    pub(crate) fn operand_elements(binding: u64) -> u64 {
        // The codes are the largest window; 2^30 elements are far from the end of 32 bits.
        (2 * binding.saturating_sub(ALIGN)).clamp(CODES_PER_WORD as u64, 1 << 30) / 8 * 8
    }

    /// The elements in `range`, at least one, which lie in one part.
    ///
    /// # Errors
    /// [`DequantError::Weights`] where the sizes are not right, [`DequantError::Range`] where there are no such elements.
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

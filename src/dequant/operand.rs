//! Quantised weights as an operand of kernels that decode them as they go.

use std::ops::Range;

use super::error::DequantError;
use super::kernel::GpuWeights;
pub(crate) use super::kernel::scales_constant;
pub(crate) use super::plan::ALIGN;
use super::plan::{Job, Window};
use crate::format::nf4::{self, CODES_PER_WORD};
use crate::gpu::BufferRange;

/// A run of weights that can be bound, and where in its bindings they are: what nf4_tables.wgsl works on.
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

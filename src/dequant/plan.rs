//! A range of a tensor cut into dispatches: pure arithmetic over sizes, so that it is tested for tensors that no test could hold.
//!
//! The kernels index in 32 bits and, on real devices, unchecked. Everything they lean on is made here: each window lies within its
//! section and the binding limit, starts on a multiple of 256 bytes, and holds every element that the chunk's parameters lead to.

use crate::format::nf4::{SUPER_BLOCK, ScaleType, Scales};
use std::ops::Range;

/// Bytes that bindings start on multiples of: WebGPU's largest `minStorageBufferOffsetAlignment`.
pub(super) const ALIGN: u64 = 256;
/// Words of codes that one dispatch decodes at most: the indices of 2^30 elements are far from the end of 32 bits.
const MAX_WORDS: u64 = 1 << 27;
/// The smallest binding limit that is served: the fixed part of a `dq8` table and a few words of everything else.
pub(super) const MIN_BINDING: u64 = 2048;

/// The sizes that a plan depends on.
#[derive(Debug, Clone)]
pub(super) struct Job {
    /// Words of codes to decode, counted from the start of the tensor.
    pub words: Range<u64>,
    /// Words in a block: a power of two, at least 4.
    pub block_words: u64,
    /// Blocks of the tensor.
    pub blocks: u64,
    pub scale_type: ScaleType,
    /// Words in every part of the codes but the last, at least 1.
    pub part_words: u64,
    /// Bytes of output for a word of codes: 16 or 32.
    pub out_bytes: u64,
    /// Bytes that a binding may have, at least [`MIN_BINDING`].
    pub binding: u64,
}

/// A part of a section, as it is bound: from a multiple of [`ALIGN`], in whole words of 4 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    /// First byte, within the section.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// One dispatch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Words of codes that it decodes.
    pub words: u32,
    /// The part that the codes lie in.
    pub part: usize,
    /// Within that part.
    pub codes: Window,
    /// Within the scales section: the fixed part of a `dq8` table.
    pub head: Window,
    /// Within the scales section: super-scales of `dq8`.
    pub supers: Window,
    /// Within the scales section: what each block has one of.
    pub scales: Window,
    /// Within the output.
    pub out: Window,
    /// Word in `codes` of the first word.
    pub codes_first: u32,
    /// Words of its block that lie before it.
    pub block_phase: u32,
    /// Its scale, in `scales`.
    pub scales_first: u32,
    /// Its scale, counted from the first scale of the first super-scale in `supers`.
    pub supers_first: u32,
    /// Its first 16 bytes, in `out`.
    pub out_first: u32,
}

/// The window that holds bytes `start..end`, and the bytes in it that lie before `start`.
fn window(start: u64, end: u64) -> (Window, u64) {
    let offset = start / ALIGN * ALIGN;
    (Window { offset, size: end.next_multiple_of(4) - offset }, start - offset)
}

/// A number that the caller has shown to be small.
fn small(x: u64) -> u32 {
    debug_assert!(x < 1 << 31, "{x} is no index within a chunk");
    x as u32
}

/// What a kernel that takes no such table has bound in its place.
const UNUSED: Window = Window { offset: 0, size: 4 };

impl Job {
    /// The dispatches, in order.
    pub fn chunks(&self) -> impl Iterator<Item = Chunk> + '_ {
        // The output is by far the largest window: with it in the limit, so are the others.
        let most = ((self.binding - ALIGN) / self.out_bytes).min(MAX_WORDS);
        let mut at = self.words.start;
        std::iter::from_fn(move || {
            let part_end = (at / self.part_words).saturating_add(1).saturating_mul(self.part_words);
            let end = self.words.end.min(part_end).min(at.saturating_add(most));
            let chunk = (at < end).then(|| self.chunk(at..end));
            at = end;
            chunk
        })
    }

    fn chunk(&self, words: Range<u64>) -> Chunk {
        let part = words.start / self.part_words;
        let part_start = part * self.part_words;
        let (codes, before_codes) = window(4 * (words.start - part_start), 4 * (words.end - part_start));
        let written = (words.start - self.words.start)..(words.end - self.words.start);
        let (out, before_out) = window(self.out_bytes * written.start, self.out_bytes * written.end);
        let blocks = words.start / self.block_words..words.end.div_ceil(self.block_words);
        let tables = self.tables(blocks);
        Chunk {
            words: small(words.end - words.start),
            part: part as usize,
            codes,
            out,
            codes_first: small(before_codes / 4),
            block_phase: small(words.start % self.block_words),
            out_first: small(before_out / 16),
            ..tables
        }
    }

    /// Where the scales of `blocks` are; the rest of the chunk is left empty.
    fn tables(&self, blocks: Range<u64>) -> Chunk {
        let empty = Chunk {
            words: 0,
            part: 0,
            codes: UNUSED,
            head: UNUSED,
            supers: UNUSED,
            scales: UNUSED,
            out: UNUSED,
            codes_first: 0,
            block_phase: 0,
            scales_first: 0,
            supers_first: 0,
            out_first: 0,
        };
        let plain = |bytes: u64| {
            let (scales, before) = window(bytes * blocks.start, bytes * blocks.end);
            Chunk { scales, scales_first: small(before / bytes), ..empty.clone() }
        };
        match self.scale_type {
            ScaleType::F32 => plain(4),
            ScaleType::Bf16 => plain(2),
            ScaleType::Dq8 => {
                let group = SUPER_BLOCK as u64;
                let first_super = Scales::DQ8_FIXED_LEN as u64;
                let first_code = first_super + 4 * self.blocks.div_ceil(group);
                let (scales, before_scales) = window(first_code + blocks.start, first_code + blocks.end);
                let (supers, before_supers) =
                    window(first_super + 4 * (blocks.start / group), first_super + 4 * blocks.end.div_ceil(group));
                Chunk {
                    head: Window { offset: 0, size: first_super },
                    supers,
                    scales,
                    scales_first: small(before_scales),
                    supers_first: small(before_supers / 4 * group + blocks.start % group),
                    ..empty
                }
            }
        }
    }
}

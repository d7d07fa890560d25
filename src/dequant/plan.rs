//! Cuts a range of a tensor into dispatches. This is pure arithmetic over sizes, so tests cover
//! tensors that would not fit in memory.
//!
//! The kernels use 32-bit indices, and run unchecked on real devices. This plan guarantees their
//! safety: each window lies in its section and in the binding limit, its offset is a multiple of
//! 256 bytes, and it holds every element that the kernel reads for the chunk.

use crate::format::nf4::{SUPER_BLOCK, ScaleType, Scales};
use std::ops::Range;

/// Alignment of bindings in bytes: the largest `minStorageBufferOffsetAlignment` of WebGPU.
pub(crate) const ALIGN: u64 = 256;
/// Maximum words of codes in one dispatch. Indices of 2^30 elements fit 32 bits with room to spare.
const MAX_WORDS: u64 = 1 << 27;
/// Smallest supported binding limit: the fixed part of a `dq8` table and a few words of each other
/// section.
pub(super) const MIN_BINDING: u64 = 2048;

/// The input of a plan.
#[derive(Debug, Clone)]
pub(super) struct Job {
    /// Words of codes to decode, from the start of the tensor.
    pub words: Range<u64>,
    /// Words per block: a power of two, at least 4.
    pub block_words: u64,
    /// Blocks of the tensor.
    pub blocks: u64,
    pub scale_type: ScaleType,
    /// Words in each part of the codes, except the last. At least 1.
    pub part_words: u64,
    /// Bytes of output per word of codes: 16 or 32.
    pub out_bytes: u64,
    /// Maximum bytes of a binding, at least [`MIN_BINDING`].
    pub binding: u64,
}

/// A bound part of a section. Its offset is a multiple of [`ALIGN`], its size a multiple of 4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    /// First byte, from the start of the section.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

/// One dispatch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Words of codes to decode.
    pub words: u32,
    /// Index of the part with the codes.
    pub part: usize,
    /// Window of the codes in that part.
    pub codes: Window,
    /// Window in the scales section: the fixed part of a `dq8` table.
    pub head: Window,
    /// Window in the scales section: the super-scales of `dq8`.
    pub supers: Window,
    /// Window in the scales section: one entry per block.
    pub scales: Window,
    /// Window of the output.
    pub out: Window,
    /// Index of the first word in `codes`.
    pub codes_first: u32,
    /// Offset of the first word in its block, in words.
    pub block_phase: u32,
    /// Index of its scale in `scales`.
    pub scales_first: u32,
    /// Index of its scale, from the first scale of the first super-scale in `supers`.
    pub supers_first: u32,
    /// Index of its first 16 bytes in `out`.
    pub out_first: u32,
}

/// The window of bytes `start..end`, and the offset of `start` in it.
fn window(start: u64, end: u64) -> (Window, u64) {
    let offset = start / ALIGN * ALIGN;
    (Window { offset, size: end.next_multiple_of(4) - offset }, start - offset)
}

/// Converts a number that the caller has shown to be small.
fn small(x: u64) -> u32 {
    debug_assert!(x < 1 << 31, "{x} is no index within a chunk");
    x as u32
}

/// A placeholder for a table that the kernel does not use.
const UNUSED: Window = Window { offset: 0, size: 4 };

impl Job {
    /// The dispatches, in order.
    pub fn chunks(&self) -> impl Iterator<Item = Chunk> + '_ {
        // The output is by far the largest window. If it is in the limit, the others are too.
        let max = ((self.binding - ALIGN) / self.out_bytes).min(MAX_WORDS);
        let mut at = self.words.start;
        std::iter::from_fn(move || {
            let part_end = (at / self.part_words).saturating_add(1).saturating_mul(self.part_words);
            let end = self.words.end.min(part_end).min(at.saturating_add(max));
            let chunk = (at < end).then(|| self.chunk(at..end));
            at = end;
            chunk
        })
    }

    /// The dispatch for `words`, all in the same part.
    pub fn chunk(&self, words: Range<u64>) -> Chunk {
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

    /// The windows for the scales of `blocks`. The rest of the chunk is left empty.
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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::format::nf4::{BLOCK_SIZES, block_count, codes_len, scales_len};

    const SCALE_TYPES: [ScaleType; 3] = [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8];

    fn job(elements: u64, block_size: u32, scale_type: ScaleType, out_bytes: u64, part: u64, binding: u64) -> Job {
        Job {
            words: 0..elements.div_ceil(8),
            block_words: u64::from(block_size) / 8,
            blocks: block_count(elements, block_size),
            scale_type,
            part_words: part / 4,
            out_bytes,
            binding,
        }
    }

    /// Offset and length of the scale and of the super-scale of a word, in the scales section.
    fn scale_bytes(job: &Job, word: u64) -> [(u64, u64); 2] {
        let block = word / job.block_words;
        match job.scale_type {
            ScaleType::F32 => [(4 * block, 4), (0, 4)],
            ScaleType::Bf16 => [(2 * block, 2), (0, 4)],
            ScaleType::Dq8 => [(1028 + 4 * job.blocks.div_ceil(256) + block, 1), (1028 + block / 256 * 4, 4)],
        }
    }

    /// What the shaders access for word `i` of a chunk, by their formulas in 32 bits: the byte in
    /// the part of the codes, in the scales section (scale, super-scale) and in the output. Checks
    /// that each is in its window.
    fn shader_bytes(job: &Job, chunk: &Chunk, i: u32) -> (u64, [u64; 2], u64) {
        let within = |window: Window, byte: u64, len: u64| {
            assert!(byte + len <= window.size, "byte {byte} of {window:?}");
            window.offset + byte
        };
        let code = 4 * u64::from(chunk.codes_first.checked_add(i).unwrap());
        let block = chunk.block_phase.checked_add(i).unwrap() >> job.block_words.ilog2();
        let scale = chunk.scales_first.checked_add(block).unwrap();
        let (bytes, group) = match job.scale_type {
            ScaleType::F32 => (4, 256),
            ScaleType::Bf16 => (2, 256),
            ScaleType::Dq8 => (1, 256),
        };
        // The shader reads the u32 that contains a scale.
        within(chunk.scales, u64::from(scale) * bytes / 4 * 4, 4);
        let super_scale = match job.scale_type {
            ScaleType::Dq8 => within(chunk.supers, u64::from(chunk.supers_first.checked_add(block).unwrap() / group) * 4, 4),
            _ => 0,
        };
        let vec4s = (job.out_bytes / 16) as u32;
        let out = 16 * u64::from(chunk.out_first.checked_add(i.checked_mul(vec4s).unwrap()).unwrap());
        (
            within(chunk.codes, code, 4),
            [within(chunk.scales, u64::from(scale) * bytes, bytes), super_scale],
            within(chunk.out, out, job.out_bytes),
        )
    }

    /// Checks every chunk: all words occur once, in order; windows are aligned, in their sections
    /// and in the limit; the first, second, middle and last word of each chunk are at the right
    /// place.
    fn check(job: &Job, codes_bytes: u64, scales_bytes: u64) -> usize {
        let mut next = job.words.start;
        let mut count = 0;
        for chunk in job.chunks() {
            let windows = [chunk.codes, chunk.head, chunk.supers, chunk.scales, chunk.out];
            assert!(windows.iter().all(|w| w.offset % ALIGN == 0 && w.size % 4 == 0), "{chunk:?}");
            assert!(windows.iter().all(|w| w.size > 0 && w.size <= job.binding), "{chunk:?} of {job:?}");
            for tables in [chunk.head, chunk.supers, chunk.scales] {
                assert!(tables.offset + tables.size <= scales_bytes.next_multiple_of(4), "{chunk:?}");
            }
            let part_start = chunk.part as u64 * job.part_words * 4;
            let part_bytes = (codes_bytes - part_start).min(4 * job.part_words);
            assert!(chunk.codes.offset + chunk.codes.size <= part_bytes, "{chunk:?}");
            assert_eq!(chunk.out.offset + chunk.out.size, job.out_bytes * (next + u64::from(chunk.words) - job.words.start));
            for i in [0, 1, chunk.words / 2, chunk.words - 1].into_iter().filter(|&i| i < chunk.words) {
                let word = next + u64::from(i);
                let (code, [scale, super_scale], out) = shader_bytes(job, &chunk, i);
                assert_eq!(part_start + code, 4 * word);
                assert_eq!([scale, super_scale], scale_bytes(job, word).map(|(at, _)| at), "word {word} of {job:?}");
                assert_eq!(out, job.out_bytes * (word - job.words.start));
            }
            next += u64::from(chunk.words);
            count += 1;
        }
        assert_eq!(next, job.words.end);
        count
    }

    #[test]
    fn tensors_above_2_to_the_32_elements() {
        for elements in [(1 << 33) - 3, (1_u64 << 33) + 12_345] {
            for (block_size, scale_type) in BLOCK_SIZES.into_iter().flat_map(|b| SCALE_TYPES.map(|s| (b, s))) {
                for (out_bytes, binding, part) in [
                    (32, 128 << 20, 1 << 40),
                    (16, 128 << 20, (1 << 31) / 2048 * 2048),
                    (32, (2 << 30) - 4, (2 << 30) - 2048),
                    (16, (2 << 30) - 4, 1 << 30),
                    (16, (4 << 30) - 4, 4 << 30),
                ] {
                    let codes = codes_len(elements, block_size).unwrap();
                    let scales = scales_len(block_count(elements, block_size), scale_type).unwrap();
                    let job = job(elements, block_size, scale_type, out_bytes, part, binding);
                    let count = check(&job, codes, scales) as u64;
                    let min = (elements.div_ceil(8) * out_bytes).div_ceil(binding);
                    assert!(count >= min && count <= min + elements / 2 / part + 9, "{count} chunks, at least {min}");
                }
            }
        }
    }

    #[test]
    fn small_bindings_parts_and_ranges_that_start_anywhere() {
        let mut state = 1_u64;
        let mut random = |end: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % end
        };
        let mut chunks = 0;
        for _ in 0..4000 {
            let block_size = BLOCK_SIZES[random(8) as usize];
            let scale_type = SCALE_TYPES[random(3) as usize];
            let elements = 1 + random(100_000);
            let (out_bytes, part) = (16 << random(2), 2048 * (1 + random(20)));
            let mut job = job(elements, block_size, scale_type, out_bytes, part, MIN_BINDING + random(40_000));
            let start = random(job.words.end + 1);
            job.words = start..start + random(job.words.end - start + 1);
            let codes = codes_len(elements, block_size).unwrap();
            let scales = scales_len(block_count(elements, block_size), scale_type).unwrap();
            chunks += check(&job, codes, scales);
        }
        assert!(chunks > 10_000, "{chunks}");
    }

    #[test]
    fn nothing_is_no_dispatch() {
        let job = Job { words: 5..5, ..job(100, 64, ScaleType::Dq8, 32, 2048, MIN_BINDING) };
        assert_eq!(job.chunks().count(), 0);
    }
}

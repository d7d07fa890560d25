//! The memory of the f16 operands, and of what belongs to them.

use std::sync::{Arc, Mutex, PoisonError};

use super::shape::AttentionShape;
use super::size::{BLOCK, HeadSize};
use crate::gpu::{BufferRange, Gpu, GpuError};
use crate::ops::heads::Heads;

/// Alignment of bound ranges.
const ALIGN: u64 = 256;
/// A round of keys or queries starts at any token, and has at most this number of rows.
const MAX_ROUND: u64 = 32;

/// The parts, as the shaders name them. The copies are last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Maxima,
    RowMaxima,
    Exponents,
    OfQueries,
    Queries,
    Keys,
    Values,
    DOut,
}

/// Where the parts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    /// Blocks of rows of each head of keys and values.
    pub blocks: u32,
    /// Blocks of rows of each head of queries.
    pub query_blocks: u32,
    /// The end of each part. Sizes saturate: no device has that much memory.
    ends: [u64; 8],
}

impl Layout {
    /// The parts for `queries` queries of `tokens` tokens. Only the backward pass has the last
    /// copy, and what belongs to queries.
    pub fn new(queries: u32, tokens: u32, heads: &Heads, backward: bool) -> Self {
        let blocks = |rows: u32| (u64::from(rows) + MAX_ROUND - 1).div_ceil(BLOCK.into());
        let (query_blocks, blocks) = (blocks(queries), blocks(tokens));
        let (query_rows, rows) = (query_blocks * u64::from(BLOCK), blocks * u64::from(BLOCK));
        let (of_queries, of_keys) = (u64::from(heads.heads), u64::from(heads.kv_heads));
        let of_backward = if backward { of_queries } else { 0 };
        let row_bytes = 16 * u64::from(HeadSize::new(heads.head_dim).vecs());
        let sizes = [
            (4 * of_queries, blocks * 4),
            (of_queries, query_rows * 4),
            (4 * of_keys, 4),
            (of_backward, query_rows * 16),
            (of_queries, query_rows * row_bytes),
            (of_keys, rows * row_bytes),
            (of_keys, rows * row_bytes),
            (of_backward, query_rows * row_bytes),
        ];
        let mut end = 0_u64;
        let ends = sizes.map(|(heads, bytes)| {
            let bytes = heads.saturating_mul(bytes).checked_next_multiple_of(ALIGN).unwrap_or(u64::MAX);
            end = end.saturating_add(bytes);
            end
        });
        let count = |blocks: u64| u32::try_from(blocks).unwrap_or(u32::MAX);
        Self { blocks: count(blocks), query_blocks: count(query_blocks), ends }
    }

    /// Rows of each head of keys and values.
    pub fn rows(&self) -> u32 {
        self.blocks.saturating_mul(BLOCK)
    }

    /// Rows of each head of queries.
    pub fn query_rows(&self) -> u32 {
        self.query_blocks.saturating_mul(BLOCK)
    }

    /// All bytes.
    pub fn bytes(&self) -> u64 {
        self.ends[Part::DOut as usize]
    }

    /// Bytes of the largest range that a kernel binds: the copies of queries, keys and values.
    pub fn largest_binding(&self) -> u64 {
        self.ends[Part::Values as usize] - self.start(Part::Queries)
    }

    fn start(&self, part: Part) -> u64 {
        (part as usize).checked_sub(1).map_or(0, |before| self.ends[before])
    }

    /// The range from one part to another in the memory.
    fn range(&self, memory: &BufferRange, first: Part, last: Part) -> BufferRange {
        let start = self.start(first);
        memory.slice(start, self.ends[last as usize] - start)
    }
}

/// Memory that grows to the largest pass. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Scratch {
    gpu: Gpu,
    memory: Arc<Mutex<Option<BufferRange>>>,
}

/// The memory of a pass.
#[derive(Debug)]
pub(super) struct Parts {
    pub layout: Layout,
    memory: BufferRange,
}

impl Scratch {
    pub fn new(gpu: &Gpu) -> Self {
        Self { gpu: gpu.clone(), memory: Arc::default() }
    }

    /// The memory of a pass. Passes share it: they run one after another.
    ///
    /// # Errors
    /// [`GpuError::TooLarge`], [`GpuError::OutOfMemory`].
    pub fn parts(&self, shape: &AttentionShape, backward: bool) -> Result<Parts, GpuError> {
        let layout = Layout::new(shape.queries(), shape.tokens, &shape.heads, backward);
        Ok(Parts { layout, memory: self.reserve(&layout)? })
    }

    /// Memory for this layout.
    ///
    /// # Errors
    /// [`GpuError::TooLarge`], [`GpuError::OutOfMemory`].
    pub fn reserve(&self, layout: &Layout) -> Result<BufferRange, GpuError> {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let enough = memory.take().filter(|memory| memory.size >= layout.bytes());
        let enough = match enough {
            Some(enough) => enough,
            // Recorded commands keep the memory before.
            None => BufferRange::whole(self.gpu.storage("operands of attention", layout.bytes())?),
        };
        *memory = Some(enough.clone());
        Ok(enough)
    }
}

impl Parts {
    /// The range of a part.
    pub fn of(&self, part: Part) -> BufferRange {
        self.layout.range(&self.memory, part, part)
    }

    /// The copies of queries, keys and values, one after another.
    pub fn copies(&self) -> BufferRange {
        self.layout.range(&self.memory, Part::Queries, Part::Values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads(heads: u32, kv_heads: u32, head_dim: u32) -> Heads {
        Heads { heads, kv_heads, head_dim, scale: 1.0, window: None }
    }

    #[test]
    fn parts_follow_one_another_and_copies_have_no_gaps() {
        // The last round of keys may start at the last token.
        for (tokens, blocks) in [(1, 1), (33, 1), (34, 2), (64, 2), (97, 2), (98, 3)] {
            let layout = Layout::new(tokens, tokens, &heads(6, 2, 80), true);
            assert_eq!((layout.blocks, layout.query_blocks), (blocks, blocks), "{tokens}");
            assert!(layout.ends.is_sorted() && layout.ends.iter().all(|end| end.is_multiple_of(ALIGN)));
            let copy = u64::from(layout.rows()) * 160;
            let sizes: Vec<u64> = layout.ends.windows(2).map(|ends| ends[1] - ends[0]).collect();
            assert_eq!(sizes[3..], [6 * copy, 2 * copy, 2 * copy, 6 * copy]);
            let forward = Layout::new(tokens, tokens, &heads(6, 2, 80), false);
            assert_eq!(layout.bytes() - forward.bytes(), 6 * copy + 6 * 16 * u64::from(layout.rows()));
        }
        // A window of queries has keys of all tokens.
        let (whole, window) = (Layout::new(640, 640, &heads(6, 2, 80), true), Layout::new(64, 640, &heads(6, 2, 80), true));
        assert_eq!((window.rows(), window.query_rows()), (whole.rows(), 128));
        assert_eq!(whole.bytes() - window.bytes(), 6 * (704 - 128) * (4 + 16 + 2 * 160));
        assert_eq!(window.largest_binding(), (6 * 128 + 4 * 704) * 160);
        assert_eq!(Layout::new(u32::MAX, u32::MAX, &heads(u32::MAX, u32::MAX, 256), true).bytes(), u64::MAX);
    }
}

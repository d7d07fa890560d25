//! The buffers of the sections that are loaded together.

use std::ops::Range;

use crate::format::{Index, Section, SectionKind, check};
use crate::gpu::{Buffer, BufferRange, GpuError};

use super::error::StreamError;

/// Spare bytes after the last section of a buffer. A binding of any section can then be rounded up.
pub(super) const SLACK: u64 = 16;
/// A section in several buffers is cut at multiples of this. It is a whole number of blocks for
/// every block size, and a valid binding offset.
const CUT_ALIGN: u64 = 4096;
/// The sections of a layer or of the global tensors, and their buffers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    /// Section numbers, ascending.
    pub(super) sections: Vec<usize>,
    /// The file range in each buffer. Nearly always one buffer.
    pub(super) buffers: Vec<Range<u64>>,
}

impl Group {
    /// Cuts between sections if a buffer would exceed `max_buffer` bytes. Cuts inside a section
    /// only if that section alone exceeds it.
    pub(super) fn new(index: &Index, sections: Vec<usize>, max_buffer: u64) -> Result<Self, StreamError> {
        let max_part = (max_buffer.saturating_sub(SLACK) / CUT_ALIGN * CUT_ALIGN).max(CUT_ALIGN);
        let mut buffers: Vec<Range<u64>> = Vec::new();
        let (mut open, mut next) = (false, 0);
        for &number in &sections {
            let Some(section) = index.sections().get(number) else { continue };
            let follows = number == next;
            next = number + 1;
            match buffers.last_mut() {
                Some(last) if open && follows && section.end() - last.start <= max_part => last.end = section.end(),
                _ if section.kind == Some(SectionKind::Scales) && section.length > max_part => {
                    let what = check::describe(index, section);
                    return Err(GpuError::TooLarge {
                        what,
                        requested: section.length,
                        limit: max_part,
                        limit_name: "maxBufferSize",
                    }
                    .into());
                }
                _ => {
                    let parts = section.length.div_ceil(max_part).max(1);
                    let part = |i| section.offset + i * max_part..section.offset + section.length.min((i + 1) * max_part);
                    buffers.extend((0..parts).map(part));
                    // No other section shares a buffer with the last part of a cut section.
                    open = parts == 1;
                }
            }
        }
        Ok(Self { sections, buffers })
    }

    /// Size of buffer `number` in bytes.
    pub(super) fn buffer_len(&self, number: usize) -> u64 {
        self.buffers.get(number).map_or(0, |range| (range.end - range.start).next_multiple_of(SLACK) + SLACK)
    }

    /// The ranges of a section of the group: one range, or one per buffer.
    pub(super) fn place(&self, section: &Section, buffers: &[Buffer]) -> Vec<BufferRange> {
        let overlap = |(range, buffer): (&Range<u64>, &Buffer)| {
            let (start, end) = (section.offset.max(range.start), section.end().min(range.end));
            let part = || BufferRange { buffer: buffer.clone(), offset: start - range.start, size: end - start };
            (start < end).then(part)
        };
        self.buffers.iter().zip(buffers).filter_map(overlap).collect()
    }

    pub(super) fn bytes(&self) -> u64 {
        (0..self.buffers.len()).map(|i| self.buffer_len(i)).sum()
    }
}

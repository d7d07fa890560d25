//! What goes where in GPU memory, and whether it fits: pure arithmetic over an index.

use std::ops::{Range, RangeInclusive};

use crate::format::{Index, Section, SectionKind, check};
use crate::gpu::{Buffer, BufferRange, GpuError};

use super::error::StreamError;

/// Bytes after the last section of a buffer, so that a binding of any section can be rounded up.
const SLACK: u64 = 16;
/// A section that is cut over several buffers is cut at multiples of this: whole blocks of codes of any block size, and a
/// binding may start there.
const CUT_ALIGN: u64 = 4096;
/// Staging is cut into this many buffers of these sizes (or more of the largest): while the device copies out of some, the host fills
/// others.
const CHUNKS: u64 = 4;
const CHUNK: RangeInclusive<u64> = 2 << 20..=16 << 20;
/// Staging memory is as large as a layer, within these: then one can be read in full while the device works on the one before.
const STAGING: RangeInclusive<u64> = 64 << 20..=256 << 20;
/// A ring of fewer layers would have nowhere to load the next one.
const MIN_SLOTS: u32 = 2;

/// The sections of a layer (or the global tensors), and the buffers that hold them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    /// Numbers of its sections.
    pub(super) sections: Range<usize>,
    /// What each of its buffers holds: a range of the file. Nearly always one buffer.
    pub(super) buffers: Vec<Range<u64>>,
}

impl Group {
    /// Cuts between sections where a buffer would pass `max_buffer` bytes, and inside a section only where it alone does.
    fn new(index: &Index, sections: Range<usize>, max_buffer: u64) -> Result<Self, StreamError> {
        let most = (max_buffer.saturating_sub(SLACK) / CUT_ALIGN * CUT_ALIGN).max(CUT_ALIGN);
        let mut buffers: Vec<Range<u64>> = Vec::new();
        let mut open = false;
        for section in index.sections().get(sections.clone()).unwrap_or_default() {
            match buffers.last_mut() {
                Some(last) if open && section.end() - last.start <= most => last.end = section.end(),
                _ if section.kind == Some(SectionKind::Scales) && section.length > most => {
                    let what = check::describe(index, section);
                    return Err(GpuError::TooLarge {
                        what,
                        asked: section.length,
                        limit: most,
                        limit_name: "maxBufferSize",
                    }
                    .into());
                }
                _ => {
                    let parts = section.length.div_ceil(most).max(1);
                    let part = |i| section.offset + i * most..section.offset + section.length.min((i + 1) * most);
                    buffers.extend((0..parts).map(part));
                    // What follows the last part of a cut section would be hard to find.
                    open = parts == 1;
                }
            }
        }
        Ok(Self { sections, buffers })
    }

    /// Bytes of GPU memory that its buffer `number` takes.
    pub(super) fn buffer_len(&self, number: usize) -> u64 {
        self.buffers.get(number).map_or(0, |range| (range.end - range.start).next_multiple_of(SLACK) + SLACK)
    }

    /// Where a section of the group lies: in one buffer, or cut over several.
    pub(super) fn place(&self, section: &Section, buffers: &[Buffer]) -> Vec<BufferRange> {
        let overlap = |(range, buffer): (&Range<u64>, &Buffer)| {
            let (start, end) = (section.offset.max(range.start), section.end().min(range.end));
            let part = || BufferRange { buffer: buffer.clone(), offset: start - range.start, size: end - start };
            (start < end).then(part)
        };
        self.buffers.iter().zip(buffers).filter_map(overlap).collect()
    }

    fn bytes(&self) -> u64 {
        (0..self.buffers.len()).map(|i| self.buffer_len(i)).sum()
    }
}

/// How a pack goes through GPU memory.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamPlan {
    /// Whether every layer has a place of its own.
    pub resident: bool,
    /// Layers that are in GPU memory at a time.
    pub slots: u32,
    /// Layers of the pack.
    pub layers: u32,
    /// GPU bytes of the largest layer.
    pub layer_bytes: u64,
    /// GPU bytes of all layers.
    pub weights_bytes: u64,
    /// GPU bytes of the tensors of no layer; 0 where they are not asked for.
    pub globals_bytes: u64,
    /// Bytes of the staging buffers (on some devices in GPU memory).
    pub staging_bytes: u64,
    /// Bytes of this plan: layers, globals and staging.
    pub needed_bytes: u64,
    /// Bytes of the smallest plan there is: a ring of two layers.
    pub minimum_bytes: u64,
    pub(super) groups: Vec<Group>,
    pub(super) globals: Option<Group>,
    pub(super) chunk: u64,
    pub(super) slot_buffers: Vec<u64>,
}

impl StreamPlan {
    /// Plans for buffers of at most `max_buffer` bytes and for `budget` bytes in all (`None`: as many as it takes); with `globals`
    /// the tensors of no layer (embedding, final norm, lm_head) have a place, too.
    ///
    /// # Errors
    /// [`StreamError::Budget`] where not even a ring of two layers fits.
    pub fn new(index: &Index, max_buffer: u64, budget: Option<u64>, globals: bool) -> Result<Self, StreamError> {
        let group = |sections| Group::new(index, sections, max_buffer);
        let groups = index.layers().iter().cloned().map(group).collect::<Result<Vec<_>, _>>()?;
        let globals = globals.then(|| group(global_sections(index))).transpose()?;
        let slot_buffers = largest_buffers(&groups);
        let layer_bytes: u64 = slot_buffers.iter().sum();
        let weights_bytes: u64 = groups.iter().map(Group::bytes).sum();
        let globals_bytes = globals.as_ref().map_or(0, Group::bytes);
        let layers = index.header().layer_count;
        let least = layers.min(MIN_SLOTS);
        // A ring whose slots all have the largest layer's size may take more than the layers themselves.
        let ring = |slots: u32| (u64::from(slots) * layer_bytes).min(weights_bytes);
        let least_staging = CHUNKS * CHUNK.start().min(&max_buffer);
        let minimum_bytes = ring(least) + globals_bytes + least_staging;
        let budget = budget.unwrap_or(u64::MAX);
        if minimum_bytes > budget {
            return Err(StreamError::Budget { budget, needed: minimum_bytes, layer: layer_bytes, globals: globals_bytes });
        }
        let spare = budget - (ring(least) + globals_bytes);
        let whole = weights_bytes.max(globals_bytes).max(least_staging);
        let staging_bytes = layer_bytes.clamp(*STAGING.start(), *STAGING.end()).min(spare).min(whole);
        let for_layers = budget - globals_bytes - staging_bytes;
        let slots =
            if weights_bytes <= for_layers { layers } else { (for_layers / layer_bytes.max(1)).min(layers.into()) as u32 };
        let needed_bytes = ring(slots) + globals_bytes + staging_bytes;
        let chunk = (staging_bytes / CHUNKS).clamp(*CHUNK.start(), *CHUNK.end()).min(max_buffer);
        Ok(Self {
            resident: slots == layers,
            slots,
            layers,
            layer_bytes,
            weights_bytes,
            globals_bytes,
            staging_bytes,
            needed_bytes,
            minimum_bytes,
            groups,
            globals,
            chunk,
            slot_buffers,
        })
    }

    /// Staging buffers of [`StreamPlan::chunk`] bytes.
    pub(super) fn chunks(&self) -> usize {
        (self.staging_bytes / self.chunk.max(1)) as usize
    }

    /// Sizes of the buffers of slot `slot`: those of its layer where all are resident, else those that any layer fits in.
    pub(super) fn slot_buffers(&self, slot: usize) -> Vec<u64> {
        match self.groups.get(slot) {
            Some(group) if self.resident => (0..group.buffers.len()).map(|i| group.buffer_len(i)).collect(),
            _ => self.slot_buffers.clone(),
        }
    }
}

/// For each buffer number the size of the largest of all layers.
fn largest_buffers(groups: &[Group]) -> Vec<u64> {
    let count = groups.iter().map(|g| g.buffers.len()).max().unwrap_or(0);
    (0..count).map(|i| groups.iter().map(|g| g.buffer_len(i)).max().unwrap_or(0)).collect()
}

/// The sections of tensors that belong to no layer; in the file they stand together, after the embedded files.
fn global_sections(index: &Index) -> Range<usize> {
    let is_global = |s: &Section| s.layer.is_none() && s.kind.is_some_and(|kind| kind != SectionKind::File);
    let sections = index.sections();
    match (sections.iter().position(is_global), sections.iter().rposition(is_global)) {
        (Some(first), Some(last)) => first..last + 1,
        _ => 0..0,
    }
}

//! Plans the placement of layers in GPU memory. This is pure arithmetic over an index.

use std::ops::RangeInclusive;

use crate::format::Index;

use super::error::StreamError;
use super::globals::{self, Globals, HeadParts};
use super::group::Group;

/// Number and size limits of the staging buffers (more buffers if the largest size is not enough).
/// While the device copies from some buffers, the host fills the others.
const CHUNKS: u64 = 4;
const CHUNK: RangeInclusive<u64> = 2 << 20..=16 << 20;
/// Limits of staging memory. Within them it has the size of a layer, so that the next layer can be
/// read in full while the device works on the present one.
const STAGING: RangeInclusive<u64> = 64 << 20..=256 << 20;
/// With fewer slots, there would be no room for the next layer.
const MIN_SLOTS: u32 = 2;

/// The memory plan of a layer stream.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StreamPlan {
    /// Whether every layer has its own slot.
    pub resident: bool,
    /// Slots: layers in GPU memory at a time.
    pub slots: u32,
    /// Layers of the pack.
    pub layers: u32,
    /// GPU bytes of the largest layer.
    pub layer_bytes: u64,
    /// GPU bytes of all layers.
    pub weights_bytes: u64,
    /// GPU bytes of the global tensors that stay in GPU memory. 0 if they were not requested.
    pub globals_bytes: u64,
    /// Whether the requested embedding table is not in GPU memory. Its rows are then read from the
    /// pack.
    pub embedding_on_host: bool,
    /// GPU bytes of the parts of an output projection that passes through GPU memory.
    pub head_bytes: u64,
    /// Bytes of the staging buffers (on some devices in GPU memory).
    pub staging_bytes: u64,
    /// Total bytes of this plan: layers, globals, parts of the output projection, and staging.
    pub needed_bytes: u64,
    /// Total bytes of the smallest plan: a ring of two layers.
    pub minimum_bytes: u64,
    pub(super) groups: Vec<Group>,
    pub(super) globals: Option<Group>,
    pub(super) head: Option<HeadParts>,
    pub(super) chunk: u64,
    pub(super) slot_buffers: Vec<u64>,
}

impl StreamPlan {
    /// Plans with buffers of at most `max_buffer` bytes and a total of `budget` bytes (`None`: no
    /// limit). `globals` are the global tensors (embedding, final norm, lm_head) in the plan.
    ///
    /// # Errors
    /// [`StreamError::Budget`] if a ring of two layers does not fit.
    pub fn new(index: &Index, max_buffer: u64, budget: Option<u64>, globals: Globals) -> Result<Self, StreamError> {
        let group = |sections| Group::new(index, sections, max_buffer);
        let groups = index.layers().iter().map(|layer| group(layer.clone().collect())).collect::<Result<Vec<_>, _>>()?;
        let head = HeadParts::of(index, globals).filter(|head| head.part_bytes() <= max_buffer);
        let sections = globals.resident(index, head.as_ref());
        let embedding_on_host =
            globals != Globals::None && globals::embedding(index).is_some_and(|n| !sections.contains(&n));
        let globals = (globals != Globals::None).then(|| group(sections)).transpose()?;
        let head_bytes = head.as_ref().map_or(0, HeadParts::bytes);
        let slot_buffers = largest_buffers(&groups);
        let layer_bytes: u64 = slot_buffers.iter().sum();
        let weights_bytes: u64 = groups.iter().map(Group::bytes).sum();
        let globals_bytes = globals.as_ref().map_or(0, Group::bytes);
        let outside = globals_bytes + head_bytes;
        let layers = index.header().layer_count;
        let min_slots = layers.min(MIN_SLOTS);
        // All slots of a ring have the size of the largest layer. So a ring may need more memory
        // than all layers.
        let ring = |slots: u32| (u64::from(slots) * layer_bytes).min(weights_bytes);
        let min_staging = CHUNKS * CHUNK.start().min(&max_buffer);
        let minimum_bytes = ring(min_slots) + outside + min_staging;
        let budget = budget.unwrap_or(u64::MAX);
        if minimum_bytes > budget {
            return Err(StreamError::Budget { budget, needed: minimum_bytes, layer: layer_bytes, globals: outside });
        }
        let spare = budget - (ring(min_slots) + outside);
        let whole = weights_bytes.max(globals_bytes).max(min_staging);
        let staging_bytes = layer_bytes.clamp(*STAGING.start(), *STAGING.end()).min(spare).min(whole);
        let for_layers = budget - outside - staging_bytes;
        let slots =
            if weights_bytes <= for_layers { layers } else { (for_layers / layer_bytes.max(1)).min(layers.into()) as u32 };
        let needed_bytes = ring(slots) + outside + staging_bytes;
        let chunk = (staging_bytes / CHUNKS).clamp(*CHUNK.start(), *CHUNK.end()).min(max_buffer);
        Ok(Self {
            resident: slots == layers,
            slots,
            layers,
            layer_bytes,
            weights_bytes,
            globals_bytes,
            embedding_on_host,
            head_bytes,
            staging_bytes,
            needed_bytes,
            minimum_bytes,
            groups,
            globals,
            head,
            chunk,
            slot_buffers,
        })
    }

    /// The output projection, if it passes through GPU memory in parts.
    pub fn head(&self) -> Option<&HeadParts> {
        self.head.as_ref()
    }

    /// Staging buffers of [`StreamPlan::chunk`] bytes.
    pub(super) fn chunks(&self) -> usize {
        (self.staging_bytes / self.chunk.max(1)) as usize
    }

    /// Buffer sizes of slot `slot`: the sizes of its layer if all are resident, else sizes that fit
    /// every layer.
    pub(super) fn slot_buffers(&self, slot: usize) -> Vec<u64> {
        match self.groups.get(slot) {
            Some(group) if self.resident => (0..group.buffers.len()).map(|i| group.buffer_len(i)).collect(),
            _ => self.slot_buffers.clone(),
        }
    }
}

/// For each buffer number, the maximum size over all layers.
fn largest_buffers(groups: &[Group]) -> Vec<u64> {
    let count = groups.iter().map(|g| g.buffers.len()).max().unwrap_or(0);
    (0..count).map(|i| groups.iter().map(|g| g.buffer_len(i)).max().unwrap_or(0)).collect()
}

//! The parameters of kernels: one kept uniform buffer, in which each dispatch has an offset.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Bytes of the buffer, at least: the parameters of a few thousand dispatches.
const MIN_BYTES: u64 = 256 << 10;
/// Sizes of bindings are multiples of this, so that most dispatches share a bind group.
const WINDOW: u64 = 256;

/// The parameters of the lists of a device.
#[derive(Debug)]
pub(super) struct Params {
    layout: wgpu::BindGroupLayout,
    kept: Mutex<Option<Kept>>,
}

#[derive(Debug)]
struct Kept {
    buffer: wgpu::Buffer,
    /// By the size of the binding.
    groups: HashMap<u64, wgpu::BindGroup>,
}

/// The parameters of a list that is submitted before this is dropped. Until then no other list can
/// write parameters. A later list may overwrite them: the device has one queue.
#[derive(Debug)]
pub(super) struct Written<'a> {
    layout: &'a wgpu::BindGroupLayout,
    kept: MutexGuard<'a, Option<Kept>>,
}

impl Params {
    pub(super) fn new(device: &wgpu::Device) -> Self {
        let entry = wgpu::BindGroupLayoutEntry {
            binding: 0,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Uniform,
                has_dynamic_offset: true,
                min_binding_size: None,
            },
            count: None,
        };
        let descriptor = wgpu::BindGroupLayoutDescriptor { label: Some("parameters"), entries: &[entry] };
        Self { layout: device.create_bind_group_layout(&descriptor), kept: Mutex::default() }
    }

    /// The layout of the bind group of parameters, the same for all kernels.
    pub(super) fn layout(&self) -> &wgpu::BindGroupLayout {
        &self.layout
    }

    /// Writes the parameters of a list. `largest` is the maximum bytes of one dispatch.
    pub(super) fn write(&self, device: &wgpu::Device, queue: &wgpu::Queue, bytes: &[u8], largest: u64) -> Written<'_> {
        let mut kept = self.lock();
        let needed = Self::needed(bytes, largest);
        let fitting = kept.take().filter(|kept| kept.buffer.size() >= needed);
        let Kept { buffer, .. } = kept.insert(fitting.unwrap_or_else(|| Kept::new(device, needed)));
        queue.write_buffer(buffer, 0, bytes);
        Written { layout: &self.layout, kept }
    }

    /// The bytes of a buffer for the parameters of a list.
    pub(super) fn needed(bytes: &[u8], largest: u64) -> u64 {
        bytes.len() as u64 + largest.next_multiple_of(WINDOW)
    }

    /// Drops the buffer, after an error that may have made it invalid.
    pub(super) fn clear(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn new(device: &wgpu::Device, bytes: u64) -> Self {
        let size = bytes.next_power_of_two().max(MIN_BYTES).min(device.limits().max_buffer_size).max(bytes);
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let descriptor = wgpu::BufferDescriptor { label: Some("parameters"), size, usage, mapped_at_creation: false };
        Self { buffer: device.create_buffer(&descriptor), groups: HashMap::new() }
    }
}

impl Written<'_> {
    /// The bind group for a dispatch with `bytes` bytes of parameters. It takes a dynamic offset.
    pub(super) fn group(&mut self, device: &wgpu::Device, bytes: u64) -> Option<&wgpu::BindGroup> {
        let Kept { buffer, groups } = self.kept.as_mut()?;
        let window = bytes.next_multiple_of(WINDOW);
        Some(groups.entry(window).or_insert_with(|| {
            let size = std::num::NonZeroU64::new(window);
            let resource = wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer, offset: 0, size });
            let entries = &[wgpu::BindGroupEntry { binding: 0, resource }];
            device.create_bind_group(&wgpu::BindGroupDescriptor { label: Some("parameters"), layout: self.layout, entries })
        }))
    }
}

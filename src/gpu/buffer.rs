//! Buffers within the device's limits, and ranges of them.

use super::device::Gpu;
use super::error::GpuError;

/// A part of a buffer that can be bound: it starts on a multiple of 256.
#[derive(Debug, Clone)]
pub struct BufferRange {
    /// The buffer.
    pub buffer: wgpu::Buffer,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

impl BufferRange {
    /// The whole of a buffer.
    pub fn whole(buffer: wgpu::Buffer) -> Self {
        Self { offset: 0, size: buffer.size(), buffer }
    }

    /// The part of this range that starts `offset` bytes into it.
    pub fn slice(&self, offset: u64, size: u64) -> Self {
        Self { buffer: self.buffer.clone(), offset: self.offset + offset, size }
    }

    pub(super) fn binding(&self) -> wgpu::BindingResource<'_> {
        let size = std::num::NonZeroU64::new(self.size);
        wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer: &self.buffer, offset: self.offset, size })
    }
}

impl Gpu {
    /// A buffer that kernels read and write, and that can be copied from and to: `size` bytes, rounded up to a multiple of 16.
    ///
    /// # Errors
    /// [`GpuError::TooLarge`], [`GpuError::OutOfMemory`].
    pub fn storage(&self, label: &str, size: u64) -> Result<wgpu::Buffer, GpuError> {
        use wgpu::BufferUsages as Usage;
        self.buffer(label, size, Usage::STORAGE | Usage::COPY_SRC | Usage::COPY_DST)
    }

    /// A buffer of `size` bytes, rounded up to a multiple of 16.
    ///
    /// # Errors
    /// [`GpuError::TooLarge`], [`GpuError::OutOfMemory`].
    pub fn buffer(&self, label: &str, size: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer, GpuError> {
        self.make_buffer(label, size, usage, false)
    }

    /// As [`Gpu::buffer`], and mapped.
    pub(super) fn mapped_buffer(&self, label: &str, size: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer, GpuError> {
        self.make_buffer(label, size, usage, true)
    }

    fn make_buffer(
        &self,
        label: &str,
        size: u64,
        usage: wgpu::BufferUsages,
        mapped_at_creation: bool,
    ) -> Result<wgpu::Buffer, GpuError> {
        let size = size.max(1).next_multiple_of(16);
        let limit = self.limits().max_buffer_size;
        if size > limit {
            return Err(GpuError::TooLarge { what: label.to_owned(), asked: size, limit, limit_name: "maxBufferSize" });
        }
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation };
        self.guarded(label, |device| device.create_buffer(&descriptor))
    }

    /// A storage buffer with these bytes (for small ones: tables, parameters, tests).
    ///
    /// # Errors
    /// As [`Gpu::storage`].
    pub fn storage_with(&self, label: &str, bytes: &[u8]) -> Result<wgpu::Buffer, GpuError> {
        let buffer = self.storage(label, bytes.len() as u64)?;
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().next_multiple_of(4), 0);
        self.guarded(label, |_| self.queue().write_buffer(&buffer, 0, &padded))?;
        Ok(buffer)
    }
}

//! Creates buffers within the limits of the device.

use std::borrow::Cow;

use super::device::Gpu;
use super::error::GpuError;
use super::lease::Buffer;

impl Gpu {
    /// Creates a buffer for kernels and copies to read and write. `size` is rounded up to a
    /// multiple of 16.
    ///
    /// # Errors
    /// [`GpuError::TooLarge`], [`GpuError::OutOfMemory`].
    pub fn storage(&self, label: &str, size: u64) -> Result<Buffer, GpuError> {
        use wgpu::BufferUsages as Usage;
        self.buffer(label, size, Usage::STORAGE | Usage::COPY_SRC | Usage::COPY_DST)
    }

    /// Creates a buffer. `size` is rounded up to a multiple of 16.
    ///
    /// # Errors
    /// [`GpuError::TooLarge`], [`GpuError::OutOfMemory`].
    pub fn buffer(&self, label: &str, size: u64, usage: wgpu::BufferUsages) -> Result<Buffer, GpuError> {
        self.make_buffer(label, size, usage, false)
    }

    /// As [`Gpu::buffer`], but mapped at creation.
    pub(super) fn mapped_buffer(&self, label: &str, size: u64, usage: wgpu::BufferUsages) -> Result<Buffer, GpuError> {
        self.make_buffer(label, size, usage, true)
    }

    /// Creates a buffer in host memory, which the device copies to and from. `size` is rounded up
    /// to a multiple of 16.
    ///
    /// # Errors
    /// As [`Gpu::buffer`]; [`GpuError::NoFeature`] if [`Gpu::has_host_buffers`] is false.
    pub fn host_buffer(&self, label: &str, size: u64) -> Result<Buffer, GpuError> {
        use wgpu::BufferUsages as Usage;
        if !self.has_host_buffers() {
            return Err(GpuError::NoFeature { what: "buffers in host memory", feature: "MAPPABLE_PRIMARY_BUFFERS" });
        }
        self.buffer(label, size, Usage::MAP_READ | Usage::COPY_SRC | Usage::COPY_DST)
    }

    /// Whether the device has buffers in host memory that it copies to and from.
    pub fn has_host_buffers(&self) -> bool {
        self.features().contains(wgpu::Features::MAPPABLE_PRIMARY_BUFFERS)
    }

    fn make_buffer(
        &self,
        label: &str,
        size: u64,
        usage: wgpu::BufferUsages,
        mapped_at_creation: bool,
    ) -> Result<Buffer, GpuError> {
        let limit = self.limits().max_buffer_size;
        let too_large =
            || GpuError::TooLarge { what: label.to_owned(), requested: size, limit, limit_name: "maxBufferSize" };
        let size = size.max(1).checked_next_multiple_of(16).filter(|&size| size <= limit).ok_or_else(too_large)?;
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation };
        self.guarded_taking(size, label, |device| device.create_buffer(&descriptor).into())
    }

    /// Creates a storage buffer with these bytes. For small contents: tables, parameters, tests.
    ///
    /// # Errors
    /// As [`Gpu::storage`].
    pub fn storage_with(&self, label: &str, bytes: &[u8]) -> Result<Buffer, GpuError> {
        let buffer = self.storage(label, bytes.len() as u64)?;
        let mut padded = Cow::Borrowed(bytes);
        if !bytes.len().is_multiple_of(4) {
            padded.to_mut().resize(bytes.len().next_multiple_of(4), 0);
        }
        self.guarded_taking(padded.len() as u64, label, |_| self.queue().write_buffer(&buffer, 0, &padded))?;
        Ok(buffer)
    }
}

//! Ranges of buffers.

use super::error::GpuError;
use super::lease::Buffer;

/// A range of a buffer. To be bound, its offset is a multiple of 256.
#[derive(Debug, Clone)]
pub struct BufferRange {
    /// The buffer.
    pub buffer: Buffer,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

impl BufferRange {
    /// The whole buffer.
    pub fn whole(buffer: Buffer) -> Self {
        Self { offset: 0, size: buffer.size(), buffer }
    }

    /// `size` bytes of this range, from `offset` on. A use of the result checks it against the end
    /// of the buffer.
    pub fn slice(&self, offset: u64, size: u64) -> Self {
        Self { buffer: self.buffer.clone(), offset: self.offset.saturating_add(offset), size }
    }

    /// Checks that the range lies in its buffer, and that offset and size are multiples of the
    /// given numbers.
    pub(super) fn check(&self, what: impl Fn() -> String, offset: u64, size: u64) -> Result<(), GpuError> {
        let fail = |reason| Err(GpuError::invalid(what(), reason));
        if self.offset.checked_add(self.size).is_none_or(|end| end > self.buffer.size()) {
            return fail(format!(
                "{} bytes at offset {} exceed a buffer of {} bytes",
                self.size,
                self.offset,
                self.buffer.size()
            ));
        }
        if !self.offset.is_multiple_of(offset) {
            return fail(format!("has offset {}, which is not a multiple of {offset}", self.offset));
        }
        if !self.size.is_multiple_of(size) {
            return fail(format!("has {} bytes, which is not a multiple of {size}", self.size));
        }
        Ok(())
    }

    /// The range as a resource, with `size` bytes.
    pub(super) fn binding(&self, size: u64) -> wgpu::BindingResource<'_> {
        let size = std::num::NonZeroU64::new(size);
        wgpu::BindingResource::Buffer(wgpu::BufferBinding { buffer: &self.buffer, offset: self.offset, size })
    }
}

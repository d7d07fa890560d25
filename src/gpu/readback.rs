//! Reads bytes from the device.

use std::sync::mpsc;

use super::device::{Gpu, PATIENCE};
use super::error::GpuError;
use super::range::BufferRange;

/// Bytes of one read.
const CHUNK: u64 = 64 << 20;

impl Gpu {
    /// Waits for all submitted work, then returns the bytes of a range. Offset and size are
    /// multiples of 4.
    ///
    /// # Errors
    /// [`GpuError::Invalid`] for a misaligned range; any device error.
    pub fn read(&self, range: &BufferRange) -> Result<Vec<u8>, GpuError> {
        range.check(|| "readback".to_owned(), 4, 4)?;
        let mut bytes = vec![0; usize::try_from(range.size).map_err(|e| GpuError::invalid("readback", e.to_string()))?];
        self.read_into(range, &mut bytes)?;
        Ok(bytes)
    }

    /// As [`Gpu::read`], into `bytes`, which has the size of the range.
    ///
    /// # Errors
    /// As [`Gpu::read`].
    pub fn read_into(&self, range: &BufferRange, bytes: &mut [u8]) -> Result<(), GpuError> {
        range.check(|| "readback".to_owned(), 4, 4)?;
        if bytes.len() as u64 != range.size {
            let reason = format!("{} bytes into memory for {}", range.size, bytes.len());
            return Err(GpuError::invalid("readback", reason));
        }
        if bytes.is_empty() {
            return Ok(());
        }
        let chunk = range.size.min(CHUNK).min(self.limits().max_buffer_size / 16 * 16);
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let staging = BufferRange::whole(self.buffer("readback", chunk, usage)?);
        let mut offset = 0;
        for part in bytes.chunks_mut(chunk as usize) {
            let size = part.len() as u64;
            self.read_part(&range.slice(offset, size), &staging.slice(0, size), part)?;
            offset += size;
        }
        Ok(())
    }

    fn read_part(&self, range: &BufferRange, staging: &BufferRange, bytes: &mut [u8]) -> Result<(), GpuError> {
        let mut commands = self.commands("readback");
        commands.copy(range, staging);
        let submission = commands.submit()?;
        let (sender, receiver) = mpsc::channel();
        self.guarded("readback", |_| {
            staging.buffer.map_async(wgpu::MapMode::Read, ..staging.size, move |result| drop(sender.send(result)));
        })?;
        self.wait_for(&submission)?;
        // Another thread may have polled first and may not have run the callback yet. A lost device
        // drops the sender.
        let mapped = receiver.recv_timeout(PATIENCE).map_err(|e| e.to_string()).and_then(|r| r.map_err(|e| e.to_string()));
        let failed = |reason: String| self.lost_or(GpuError::not_mapped("readback", reason));
        mapped.map_err(failed)?;
        let view = staging.buffer.get_mapped_range(..staging.size).map_err(|e| failed(e.to_string()))?;
        bytes.copy_from_slice(&view);
        drop(view);
        self.guarded("readback", |_| staging.buffer.unmap())
    }
}

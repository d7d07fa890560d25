//! Reads bytes from the device.

use std::sync::mpsc;

use super::device::{Gpu, PATIENCE, Submission};
use super::dispatch::Commands;
use super::error::GpuError;
use super::range::BufferRange;

/// Bytes of one read.
const CHUNK: u64 = 64 << 20;

/// A read that is submitted and not yet awaited.
#[derive(Debug)]
pub struct PendingRead {
    gpu: Gpu,
    staging: BufferRange,
    submission: Submission,
    mapped: mpsc::Receiver<Result<(), wgpu::BufferAsyncError>>,
}

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
        let staging = self.read_staging(range.size.min(CHUNK).min(self.limits().max_buffer_size / 16 * 16))?;
        let mut offset = 0;
        for part in bytes.chunks_mut(staging.size as usize) {
            let size = part.len() as u64;
            let commands = self.commands("readback");
            commands.submit_reading_to(&range.slice(offset, size), staging.slice(0, size))?.finish(part)?;
            offset += size;
        }
        Ok(())
    }

    fn read_staging(&self, size: u64) -> Result<BufferRange, GpuError> {
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        Ok(BufferRange { size, ..BufferRange::whole(self.buffer("readback", size, usage)?) })
    }
}

impl Commands {
    /// Submits the list, and a read of a small range after it. [`PendingRead::finish`] waits for
    /// the bytes; until then, other work can be submitted.
    ///
    /// # Errors
    /// As [`Commands::submit`].
    pub fn submit_reading(self, range: &BufferRange) -> Result<PendingRead, GpuError> {
        let staging = self.gpu().read_staging(range.size)?;
        self.submit_reading_to(range, staging)
    }

    fn submit_reading_to(mut self, range: &BufferRange, staging: BufferRange) -> Result<PendingRead, GpuError> {
        let gpu = self.gpu().clone();
        self.copy(range, &staging);
        let submission = self.submit()?;
        let (sender, mapped) = mpsc::channel();
        let bytes = staging.offset..staging.offset + staging.size;
        gpu.guarded("readback", |_| {
            staging.buffer.map_async(wgpu::MapMode::Read, bytes, move |result| drop(sender.send(result)));
        })?;
        Ok(PendingRead { gpu, staging, submission, mapped })
    }
}

impl PendingRead {
    /// Waits for the submission, then copies what was read to `bytes`, which has the size of the
    /// range.
    ///
    /// # Errors
    /// Any device error.
    pub fn finish(self, bytes: &mut [u8]) -> Result<(), GpuError> {
        let Self { gpu, staging, submission, mapped } = self;
        gpu.wait_for(&submission)?;
        // Another thread may have polled first and may not have run the callback yet. A lost device
        // drops the sender.
        let mapped = mapped.recv_timeout(PATIENCE).map_err(|e| e.to_string()).and_then(|r| r.map_err(|e| e.to_string()));
        let failed = |reason: String| gpu.lost_or(GpuError::not_mapped("readback", reason));
        mapped.map_err(failed)?;
        let range = staging.offset..staging.offset + staging.size;
        let view = staging.buffer.get_mapped_range(range).map_err(|e| failed(e.to_string()))?;
        if view.len() == bytes.len() {
            bytes.copy_from_slice(&view);
        }
        drop(view);
        gpu.guarded("readback", |_| staging.buffer.unmap())
    }
}

//! Bulk upload: a ring of mapped staging buffers. While the device copies out of one, the host
//! fills the next.
//!
//! `Queue::write_buffer` would be simpler, but is several times slower: it copies on one thread,
//! through its own memory.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::device::{Gpu, Submission};
use super::error::GpuError;
use super::lease::Buffer;
use super::range::BufferRange;

/// A mapped staging buffer. Threads may write different parts of it concurrently.
#[derive(Debug)]
pub struct StagingArea<'a> {
    buffer: &'a Buffer,
    size: u64,
}

impl StagingArea<'_> {
    /// Writes `bytes` at `offset`, a multiple of 8. Zero bytes pad them to a multiple of 4.
    ///
    /// # Errors
    /// [`GpuError::Invalid`] if they exceed the area, or if another thread is writing the same
    /// bytes.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), GpuError> {
        let len = bytes.len();
        let invalid = |reason| GpuError::Invalid { what: "a write to staging memory".to_owned(), reason };
        let end = offset.checked_add(len as u64).and_then(|end| end.checked_next_multiple_of(4));
        let Some(end) = end.filter(|&end| end <= self.size) else {
            return Err(invalid(format!("{len} bytes at {offset} of {}", self.size)));
        };
        let mut view = self.buffer.get_mapped_range_mut(offset..end).map_err(|e| invalid(e.to_string()))?;
        let mut view = view.slice(..);
        view.slice(..len).copy_from_slice(bytes);
        view.slice(len..).fill(0);
        Ok(())
    }
}

/// Sizes of staging buffers are multiples of this. It exceeds the alignment of every copy and
/// buffer.
const CHUNK_ALIGN: u64 = 256;

/// Fills staging buffers and submits their copies.
#[derive(Debug)]
pub struct Uploader {
    gpu: Gpu,
    chunk: u64,
    chunks: usize,
    /// Staging buffers in use, oldest first.
    ring: VecDeque<Staging>,
}

/// A staging buffer with a submitted copy. The driver maps it again after the copy.
#[derive(Debug)]
struct Staging {
    buffer: Buffer,
    last: Option<Submission>,
    mapped: Arc<AtomicU8>,
}

/// States of [`Staging::mapped`].
const PENDING: u8 = 0;
const MAPPED: u8 = 1;
const FAILED: u8 = 2;

impl Uploader {
    /// An uploader with at most `chunks` staging buffers of `chunk` bytes (fewer bytes if the
    /// maximum buffer size of the device is smaller). They are created on first use.
    pub fn new(gpu: &Gpu, chunk: u64, chunks: usize) -> Self {
        let chunk = chunk.min(gpu.limits().max_buffer_size).max(CHUNK_ALIGN) / CHUNK_ALIGN * CHUNK_ALIGN;
        Self { gpu: gpu.clone(), chunk, chunks: chunks.max(1), ring: VecDeque::new() }
    }

    /// Maximum bytes of one [`Uploader::copy`].
    pub fn chunk(&self) -> u64 {
        self.chunk
    }

    /// Calls `fill` to write the bytes of `target` into mapped memory, and submits their copy.
    /// `target` has at most [`Uploader::chunk`] bytes; its offset and size are multiples of 4.
    /// Bytes that `fill` does not write are unspecified.
    ///
    /// # Errors
    /// The error of `fill` (nothing is copied), or [`GpuError`].
    pub fn copy<E: From<GpuError>>(
        &mut self,
        target: &BufferRange,
        fill: impl FnOnce(&StagingArea<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut staging = self.take(target.size)?;
        let filled = fill(&StagingArea { buffer: &staging.buffer, size: target.size });
        if filled.is_ok() {
            staging.send(&self.gpu, target)?;
        }
        self.ring.push_back(staging);
        // A lost device unmaps the memory, so the write to it fails first.
        filled.map_err(|error| self.gpu.loss().map_or(error, E::from))
    }

    /// A mapped staging buffer: a new one if the ring is not full, else the oldest after its copy.
    fn take(&mut self, size: u64) -> Result<Staging, GpuError> {
        if size > self.chunk {
            let what = "a staged copy".to_owned();
            return Err(GpuError::TooLarge { what, requested: size, limit: self.chunk, limit_name: "staging chunk" });
        }
        let oldest_is_ready = self.ring.front().is_some_and(|s| s.mapped.load(Ordering::Acquire) == MAPPED);
        if self.ring.len() < self.chunks && !oldest_is_ready {
            match Staging::new(&self.gpu, self.chunk) {
                // Mappable memory is scarce on some cards. A shorter ring also works.
                Err(GpuError::OutOfMemory { .. }) if !self.ring.is_empty() => self.chunks = self.ring.len(),
                made => return made,
            }
        }
        match self.ring.pop_front() {
            Some(staging) => staging.wait(&self.gpu),
            None => Staging::new(&self.gpu, self.chunk),
        }
    }
}

impl Staging {
    fn new(gpu: &Gpu, size: u64) -> Result<Self, GpuError> {
        let buffer = gpu.mapped_buffer("staging", size, wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC)?;
        Ok(Self { buffer, last: None, mapped: Arc::new(AtomicU8::new(MAPPED)) })
    }

    /// Waits until the buffer is mapped.
    fn wait(self, gpu: &Gpu) -> Result<Self, GpuError> {
        let failed = || gpu.lost_or(GpuError::not_mapped("staging memory", "the driver refuses it"));
        while self.mapped.load(Ordering::Acquire) == PENDING {
            match &self.last {
                Some(last) => gpu.wait_for(last)?,
                None => return Err(failed()),
            }
            // The copy is done. The callback may still be pending in another polling thread.
            std::thread::yield_now();
        }
        if self.mapped.load(Ordering::Acquire) == MAPPED { Ok(self) } else { Err(failed()) }
    }

    /// Unmaps, submits the copy and requests the next mapping.
    fn send(&mut self, gpu: &Gpu, target: &BufferRange) -> Result<(), GpuError> {
        gpu.guarded("staging memory", |_| self.buffer.unmap())?;
        let mut commands = gpu.commands("upload");
        commands.copy(&BufferRange { buffer: self.buffer.clone(), offset: 0, size: target.size }, target);
        self.last = Some(commands.submit()?);
        gpu.guarded("staging memory", |_| self.request_mapping())
    }

    fn request_mapping(&self) {
        self.mapped.store(PENDING, Ordering::Release);
        let mapped = self.mapped.clone();
        self.buffer.map_async(wgpu::MapMode::Write, .., move |result| {
            mapped.store(if result.is_ok() { MAPPED } else { FAILED }, Ordering::Release);
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::gpu::Options;

    #[test]
    fn a_mapping_that_fails_is_not_a_lost_device() {
        let Ok(gpu) = Gpu::open(&Options { cache: None, ..Options::from_env() }) else {
            eprintln!("SKIPPED: no GPU, not even a software one");
            return;
        };
        let target = BufferRange::whole(gpu.storage("target", 256).unwrap());
        let mut uploader = Uploader::new(&gpu, 256, 1);
        uploader.copy::<GpuError>(&target, |area| area.write(0, &[7; 256])).unwrap();
        // The mapping may be finished already: request another one, and cancel it.
        gpu.wait().unwrap();
        uploader.ring[0].buffer.unmap();
        uploader.ring[0].request_mapping();
        uploader.ring[0].buffer.unmap();
        let error = uploader.copy::<GpuError>(&target, |area| area.write(0, &[8; 256])).unwrap_err();
        assert!(matches!(error, GpuError::NotMapped { .. }), "{error}");
        // The device still works, and the next copy takes another buffer.
        uploader.copy::<GpuError>(&target, |area| area.write(0, &[9; 256])).unwrap();
        assert_eq!(gpu.read(&target).unwrap(), [9; 256]);
    }
}

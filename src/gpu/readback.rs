//! Bytes back from the device.

use std::sync::mpsc;

use super::buffer::BufferRange;
use super::device::Gpu;
use super::error::GpuError;

impl Gpu {
    /// The bytes of a range (offset and size multiples of 4), once all that was submitted before is done.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn read(&self, range: &BufferRange) -> Result<Vec<u8>, GpuError> {
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let staging = self.buffer("readback", range.size, usage)?;
        let mut commands = self.commands("readback");
        commands.copy(range, &BufferRange { buffer: staging.clone(), offset: 0, size: range.size });
        let submission = commands.submit()?;
        let (sender, receiver) = mpsc::channel();
        staging.map_async(wgpu::MapMode::Read, .., move |result| drop(sender.send(result)));
        self.wait_for(&submission)?;
        let lost = |reason: String| GpuError::DeviceLost { reason };
        receiver.recv().map_err(|e| lost(e.to_string()))?.map_err(|e| lost(e.to_string()))?;
        let view = staging.get_mapped_range(..range.size).map_err(|e| lost(format!("{e:?}")))?;
        Ok(view.to_vec())
    }
}

//! Commands: recorded one after the other, submitted at once.

use super::buffer::BufferRange;
use super::device::Gpu;
use super::error::GpuError;
use super::pipeline::Kernel;

/// Where the parameters of a dispatch are bound: a uniform buffer of their own group.
const PARAMS_GROUP: u32 = 1;
/// Parameters start on multiples of this (WebGPU's largest `minUniformBufferOffsetAlignment`).
const PARAMS_ALIGN: usize = 256;

/// A list of GPU work. Each command sees what the ones before it wrote.
#[derive(Debug)]
pub struct Commands {
    gpu: Gpu,
    label: &'static str,
    work: Vec<Work>,
    params: Vec<u8>,
}

#[derive(Debug)]
enum Work {
    Dispatch(Dispatch),
    Copy { from: BufferRange, to: BufferRange },
    Clear(BufferRange),
}

#[derive(Debug)]
struct Dispatch {
    kernel: Kernel,
    bindings: Vec<BufferRange>,
    /// Start and size in `Commands::params`.
    params: (u64, u64),
    groups: [u32; 3],
    /// Bytes that it must at least move, for the profiler.
    bytes: u64,
}

/// Work that was handed to the device.
#[derive(Debug, Clone)]
pub struct Submission(wgpu::SubmissionIndex);

impl Gpu {
    /// An empty list of commands.
    pub fn commands(&self, label: &'static str) -> Commands {
        Commands { gpu: self.clone(), label, work: Vec::new(), params: Vec::new() }
    }

    /// A grid of at least `groups` workgroups, in two dimensions where one would pass the device's limit: the kernel's number is
    /// `workgroup_id.x + workgroup_id.y * num_workgroups.x`, and it must ignore numbers past the end.
    pub fn grid(&self, groups: u64) -> [u32; 3] {
        let most = u64::from(self.limits().max_compute_workgroups_per_dimension);
        let rows = groups.div_ceil(most).max(1);
        let columns = groups.div_ceil(rows);
        [u32::try_from(columns).unwrap_or(u32::MAX), u32::try_from(rows).unwrap_or(u32::MAX), 1]
    }

    /// Waits until a submission is done.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn wait_for(&self, submission: &Submission) -> Result<(), GpuError> {
        let wait = wgpu::PollType::Wait { submission_index: Some(submission.0.clone()), timeout: None };
        let polled = self.device().poll(wait);
        self.fault()?;
        polled.map(drop).map_err(|e| GpuError::DeviceLost { reason: e.to_string() })
    }
}

impl Commands {
    /// Runs `kernel` on `groups` workgroups. `bindings` are its bindings of group 0, in order; `params` are its uniform parameters
    /// at `@group(1) @binding(0)`, a multiple of 16 bytes. `bytes` is what it must at least move, for the profiler.
    pub fn dispatch(
        &mut self,
        kernel: &Kernel,
        bindings: &[BufferRange],
        params: &[u8],
        groups: [u32; 3],
        bytes: u64,
    ) -> &mut Self {
        let start = self.params.len();
        self.params.extend_from_slice(params);
        self.params.resize(self.params.len().next_multiple_of(PARAMS_ALIGN), 0);
        self.work.push(Work::Dispatch(Dispatch {
            kernel: kernel.clone(),
            bindings: bindings.to_vec(),
            params: (start as u64, params.len() as u64),
            groups,
            bytes,
        }));
        self
    }

    /// Copies `from` to `to`, which has the same size: a multiple of 4.
    pub fn copy(&mut self, from: &BufferRange, to: &BufferRange) -> &mut Self {
        self.work.push(Work::Copy { from: from.clone(), to: to.clone() });
        self
    }

    /// Sets a range to zero.
    pub fn clear(&mut self, range: &BufferRange) -> &mut Self {
        self.work.push(Work::Clear(range.clone()));
        self
    }

    /// Hands all of it to the device.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::OutOfMemory`], [`GpuError::DeviceLost`].
    pub fn submit(self) -> Result<Submission, GpuError> {
        let gpu = self.gpu.clone();
        let params = gpu.uniform(&self.params)?;
        gpu.guarded(self.label, |device| {
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some(self.label) });
            for work in &self.work {
                match work {
                    Work::Dispatch(dispatch) => dispatch.encode(device, &mut encoder, &params),
                    Work::Copy { from, to } => {
                        encoder.copy_buffer_to_buffer(&from.buffer, from.offset, &to.buffer, to.offset, Some(from.size));
                    }
                    Work::Clear(range) => encoder.clear_buffer(&range.buffer, range.offset, Some(range.size)),
                }
            }
            Submission(gpu.queue().submit([encoder.finish()]))
        })
    }
}

impl Gpu {
    fn uniform(&self, bytes: &[u8]) -> Result<wgpu::Buffer, GpuError> {
        let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
        let buffer = self.buffer("parameters", bytes.len() as u64, usage)?;
        self.queue().write_buffer(&buffer, 0, bytes);
        Ok(buffer)
    }
}

impl Dispatch {
    fn encode(&self, device: &wgpu::Device, encoder: &mut wgpu::CommandEncoder, params: &wgpu::Buffer) {
        let entry = |(i, range): (usize, &BufferRange)| (i as u32, range.clone());
        let bindings: Vec<_> = self.bindings.iter().enumerate().map(entry).collect();
        let entries: Vec<_> =
            bindings.iter().map(|(i, range)| wgpu::BindGroupEntry { binding: *i, resource: range.binding() }).collect();
        let group = |index, entries: &[wgpu::BindGroupEntry<'_>]| {
            let layout = self.kernel.pipeline.get_bind_group_layout(index);
            device.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout: &layout, entries })
        };
        let buffers = group(0, &entries);
        let range = BufferRange { buffer: params.clone(), offset: self.params.0, size: self.params.1 };
        let uniform =
            (range.size > 0).then(|| group(PARAMS_GROUP, &[wgpu::BindGroupEntry { binding: 0, resource: range.binding() }]));
        let mut pass = encoder
            .begin_compute_pass(&wgpu::ComputePassDescriptor { label: Some(&self.kernel.name), timestamp_writes: None });
        pass.set_pipeline(&self.kernel.pipeline);
        pass.set_bind_group(0, &buffers, &[]);
        if let Some(uniform) = &uniform {
            pass.set_bind_group(PARAMS_GROUP, uniform, &[]);
        }
        let [x, y, z] = self.groups;
        let _ = self.bytes;
        pass.dispatch_workgroups(x, y, z);
    }
}

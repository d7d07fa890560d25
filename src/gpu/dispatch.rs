//! Commands: recorded in order, submitted together.

use std::sync::Arc;
use std::time::Instant;

use super::device::{Gpu, Submission};
use super::error::GpuError;
use super::lease::Lease;
use super::needs::{BUFFERS_GROUP, Bound, PARAMS_GROUP};
use super::params::{Params, Written};
use super::pipeline::Kernel;
use super::range::BufferRange;
use super::timing::{Stamps, Timed};

/// With more workgroups in one dimension, the linear workgroup index of a kernel would exceed u32.
const MAX_COLUMNS: u32 = 65_535;

/// Floating-point operations of a submission, after which the list is cut. A small integrated GPU
/// takes a second for them. Windows resets a device after two seconds in one submission.
const TARGET_OPERATIONS: u64 = 1 << 38;

/// A list of GPU work. Each command sees the writes of the commands before it.
#[derive(Debug)]
pub struct Commands {
    gpu: Gpu,
    label: &'static str,
    work: Vec<Work>,
    params: Vec<u8>,
    /// Floating-point operations since the last cut, by [`Commands::add_operations`].
    operations: u64,
    /// Indices at which the list is cut into submissions.
    cuts: Vec<usize>,
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
    /// Offset and size in `Commands::params`.
    params: (u64, u64),
    groups: [u32; 3],
    /// Minimum memory traffic in bytes, for the profiler.
    bytes: u64,
}

impl Gpu {
    /// An empty list of commands.
    pub fn commands(&self, label: &'static str) -> Commands {
        Commands { gpu: self.clone(), label, work: Vec::new(), params: Vec::new(), operations: 0, cuts: Vec::new() }
    }

    /// A grid of at least `groups` workgroups. It has two dimensions if one dimension would exceed
    /// the device limit. The linear index of a workgroup is `workgroup_id.x + workgroup_id.y *
    /// num_workgroups.x`, and a kernel must ignore indices past `groups`. If two dimensions cannot
    /// hold `groups` (above 2^32 - 2^17 on common devices), [`Commands::submit`] refuses the grid.
    pub fn grid(&self, groups: u64) -> [u32; 3] {
        let max = u64::from(self.limits().max_compute_workgroups_per_dimension.min(MAX_COLUMNS));
        let rows = groups.div_ceil(max).max(1);
        let columns = groups.div_ceil(rows);
        [u32::try_from(columns).unwrap_or(u32::MAX), u32::try_from(rows).unwrap_or(u32::MAX), 1]
    }
}

impl Commands {
    /// Runs `kernel` on `groups` workgroups. `bindings[i]` is its `@group(0) @binding(i)`. Bindings
    /// that the entry point does not use are ignored. `params` are its uniform parameters at
    /// `@group(1) @binding(0)`, a multiple of 16 bytes. `bytes` is the minimum memory traffic, for
    /// the profiler.
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
        // The alignment of the device, and of a write to the buffer.
        let align = self.gpu.limits().min_uniform_buffer_offset_alignment.max(16) as usize;
        self.params.resize(self.params.len().next_multiple_of(align), 0);
        self.work.push(Work::Dispatch(Dispatch {
            kernel: kernel.clone(),
            bindings: bindings.to_vec(),
            params: (start as u64, params.len() as u64),
            groups,
            bytes,
        }));
        self
    }

    /// Copies `from` to `to`. Both have the same size, a multiple of 4.
    pub fn copy(&mut self, from: &BufferRange, to: &BufferRange) -> &mut Self {
        self.work.push(Work::Copy { from: from.clone(), to: to.clone() });
        self
    }

    /// Sets a range to zero. Offset and size are multiples of 4.
    pub fn clear(&mut self, range: &BufferRange) -> &mut Self {
        self.work.push(Work::Clear(range.clone()));
        self
    }

    pub(super) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Counts the floating-point operations of the last dispatches. A list with many of them is
    /// submitted in several parts.
    pub fn add_operations(&mut self, operations: u64) {
        self.operations = self.operations.saturating_add(operations);
        if self.operations >= TARGET_OPERATIONS {
            self.cuts.push(self.work.len());
            self.operations = 0;
        }
    }

    /// Submits the list.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::TooLarge`], [`GpuError::KernelLimit`],
    /// [`GpuError::OutOfMemory`], [`GpuError::DeviceLost`]; [`GpuError::Overwritten`] if the
    /// [lease](super::Lease) of a buffer has ended.
    pub fn submit(self) -> Result<Submission, GpuError> {
        let stamps = self.gpu.0.profiler.is_some().then(|| self.stamps(true)).transpose()?.flatten();
        self.hand_over(stamps.as_ref())
    }

    /// Submits the list, and measures the time from the start of the first dispatch to the end of
    /// the last.
    ///
    /// # Errors
    /// As [`Commands::submit`].
    pub fn submit_timed(self) -> Result<Timed, GpuError> {
        let stamps = self.stamps(self.gpu.0.profiler.is_some())?;
        let started = Instant::now();
        let submission = self.hand_over(stamps.as_ref())?;
        Ok(Timed::new(submission, stamps, started))
    }

    /// The work of each submission. An empty list has one empty submission.
    fn parts(&self) -> impl Iterator<Item = &[Work]> {
        let starts = [0].into_iter().chain(self.cuts.iter().copied());
        let ends = self.cuts.iter().copied().chain([self.work.len()]);
        let parts = starts.zip(ends).map(|(start, end)| self.work.get(start..end).unwrap_or_default());
        parts.enumerate().filter(|(number, part)| *number == 0 || !part.is_empty()).map(|(_, part)| part)
    }

    /// The distinct leases of the buffers in use, in a fixed order. The order prevents a deadlock
    /// between two lists.
    fn leases(&self) -> Vec<&Lease> {
        let ranges = self.work.iter().flat_map(Work::ranges);
        let mut leases: Vec<&Lease> = ranges.filter_map(|range| range.buffer.lease()).collect();
        leases.sort_unstable_by_key(|lease| lease.id());
        leases.dedup_by_key(|lease| lease.id());
        leases
    }

    fn stamps(&self, each: bool) -> Result<Option<Stamps>, GpuError> {
        let passes =
            self.parts().flat_map(|part| runs(part, each)).filter(|run| matches!(run, [Work::Dispatch(_), ..])).count();
        Stamps::new(&self.gpu, passes, each)
    }

    /// The names of the kernels, and all ranges that the list may write.
    #[cfg(all(test, feature = "train"))]
    pub(super) fn writes(&self) -> (std::collections::BTreeSet<&str>, Vec<&BufferRange>) {
        let (mut names, mut ranges) = (std::collections::BTreeSet::new(), Vec::new());
        for work in &self.work {
            match work {
                Work::Dispatch(Dispatch { kernel, bindings, .. }) => {
                    names.insert(kernel.name());
                    let writable = kernel.0.needs.buffers.iter().filter(|bound| bound.writable);
                    ranges.extend(writable.filter_map(|bound| bindings.get(bound.binding as usize)));
                }
                Work::Copy { to: range, .. } | Work::Clear(range) => ranges.push(range),
            }
        }
        (names, ranges)
    }

    fn hand_over(&self, stamps: Option<&Stamps>) -> Result<Submission, GpuError> {
        self.work.iter().try_for_each(|work| work.check(&self.gpu, self.label))?;
        // The leases are held until everything is submitted. So a replacement of the contents is
        // submitted later.
        let leases = self.leases();
        let held = leases.iter().map(|lease| lease.hold()).collect::<Option<Vec<_>>>();
        let _held = held.ok_or_else(|| GpuError::Overwritten { what: self.label.to_owned() })?;
        let (mut parts, mut pass) = (self.parts(), 0);
        let mut part = parts.next().unwrap_or_default();
        let submission = loop {
            let next = parts.next();
            let submission = self.submit_part(part, stamps, &mut pass, next.is_none())?;
            self.gpu.pace(&submission.0)?;
            match next {
                Some(next) => part = next,
                None => break submission,
            }
        };
        if let Some(stamps) = stamps.filter(|_| self.gpu.0.profiler.is_some()) {
            let dispatches = self.work.iter().filter_map(Work::as_dispatch);
            let calls = dispatches.map(|dispatch| (dispatch.kernel.name().to_owned(), dispatch.bytes)).collect();
            self.gpu.add_to_profile(stamps, calls)?;
        }
        Ok(submission)
    }

    /// Submits a part of the list. Its passes are numbered from `pass`. The `last` part resolves
    /// the timestamps of the whole list.
    fn submit_part(
        &self,
        part: &[Work],
        stamps: Option<&Stamps>,
        pass: &mut usize,
        last: bool,
    ) -> Result<Submission, GpuError> {
        let params = self.params_of(part)?;
        let submitted = self.gpu.guarded(self.label, |device| {
            let mut params = params.map(|PartBytes { first, bytes, largest }| {
                let written = self.gpu.0.params.write(device, self.gpu.queue(), bytes, largest);
                PartParams { first, written }
            });
            let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some(self.label) });
            for run in runs(part, stamps.is_some_and(Stamps::of_each)) {
                match run {
                    [Work::Copy { from, to }] => {
                        encoder.copy_buffer_to_buffer(&from.buffer, from.offset, &to.buffer, to.offset, Some(from.size));
                    }
                    [Work::Clear(range)] => encoder.clear_buffer(&range.buffer, range.offset, Some(range.size)),
                    dispatches => {
                        let timestamp_writes = stamps.and_then(|stamps| stamps.writes(*pass));
                        let label = Some(self.label);
                        let descriptor = wgpu::ComputePassDescriptor { label, timestamp_writes };
                        let encoding = Encoding::new(&self.gpu, encoder.begin_compute_pass(&descriptor), params.as_mut());
                        encoding.encode(dispatches.iter().filter_map(Work::as_dispatch));
                        *pass += 1;
                    }
                }
            }
            if let Some(stamps) = stamps.filter(|_| last) {
                stamps.resolve(&mut encoder);
            }
            Submission(self.gpu.queue().submit([encoder.finish()]))
        });
        if submitted.is_err() {
            // They may be invalid now.
            self.gpu.0.bind_groups.clear();
            self.gpu.0.params.clear();
        }
        submitted
    }

    /// The parameters of a part of the list. `None` without parameters.
    fn params_of(&self, part: &[Work]) -> Result<Option<PartBytes<'_>>, GpuError> {
        let used = || part.iter().filter_map(Work::as_dispatch).map(|d| d.params).filter(|(_, size)| *size > 0);
        let (Some((first, _)), Some((last, size))) = (used().next(), used().next_back()) else { return Ok(None) };
        let bytes = self.params.get(first as usize..(last + size) as usize).unwrap_or_default();
        let largest = used().map(|(_, size)| size).max().unwrap_or(size);
        let (requested, limit) = (Params::needed(bytes, largest), self.gpu.limits().max_buffer_size);
        if requested > limit {
            let what = format!("parameters of {}", self.label);
            return Err(GpuError::TooLarge { what, requested, limit, limit_name: "maxBufferSize" });
        }
        Ok(Some(PartBytes { first, bytes, largest }))
    }
}

/// The bytes of the parameters of a part of a list.
struct PartBytes<'a> {
    /// Offset of the part in `Commands::params`.
    first: u64,
    bytes: &'a [u8],
    /// Maximum bytes of one dispatch.
    largest: u64,
}

/// The parameters of a part of a list in the device's buffer.
struct PartParams<'a> {
    /// Offset of the part in `Commands::params`.
    first: u64,
    written: Written<'a>,
}

/// The encoding of a compute pass.
struct Encoding<'a, 'p> {
    gpu: &'a Gpu,
    pass: wgpu::ComputePass<'a>,
    params: Option<&'a mut PartParams<'p>>,
    /// The key of a bind group, in memory that is used again.
    key: Vec<u64>,
}

/// Consecutive dispatches that share a pass (one dispatch if each is timed), or one copy or clear.
fn runs(work: &[Work], each: bool) -> impl Iterator<Item = &[Work]> {
    let dispatch = |work: &Work| matches!(work, Work::Dispatch(_));
    work.chunk_by(move |a, b| !each && dispatch(a) && dispatch(b))
}

impl Work {
    fn as_dispatch(&self) -> Option<&Dispatch> {
        match self {
            Self::Dispatch(dispatch) => Some(dispatch),
            Self::Copy { .. } | Self::Clear(_) => None,
        }
    }

    /// All ranges that it reads or writes, except parameters.
    fn ranges(&self) -> impl Iterator<Item = &BufferRange> {
        let (bindings, ranges) = match self {
            Self::Dispatch(dispatch) => (dispatch.bindings.as_slice(), [None, None]),
            Self::Copy { from, to } => (Default::default(), [Some(from), Some(to)]),
            Self::Clear(range) => (Default::default(), [Some(range), None]),
        };
        bindings.iter().chain(ranges.into_iter().flatten())
    }

    fn check(&self, gpu: &Gpu, label: &str) -> Result<(), GpuError> {
        match self {
            Self::Dispatch(dispatch) => dispatch.check(gpu.limits()),
            Self::Copy { from, to } => {
                from.check(|| format!("{label}: source of a copy"), 4, 4)?;
                to.check(|| format!("{label}: target of a copy"), 4, 4)?;
                let sizes = || format!("a copy of {} bytes to {}", from.size, to.size);
                if from.size == to.size { Ok(()) } else { Err(GpuError::invalid(label, sizes())) }
            }
            Self::Clear(range) => range.check(|| format!("{label}: range to clear"), 4, 4),
        }
    }
}

impl Dispatch {
    /// Checks everything that needs no driver, so that the error names kernel and binding.
    fn check(&self, limits: &wgpu::Limits) -> Result<(), GpuError> {
        let kernel = self.kernel.name();
        let needs = &self.kernel.0.needs;
        let invalid = |reason: String| Err(GpuError::invalid(format!("kernel {kernel}"), reason));
        if self.bindings.len() > needs.declared {
            return invalid(format!("{} bindings are given, but it has {}", self.bindings.len(), needs.declared));
        }
        for bound in &needs.buffers {
            match self.bindings.get(bound.binding as usize) {
                Some(range) => bound.check(kernel, range, limits)?,
                None => return invalid(format!("binding {} is not given", bound.binding)),
            }
        }
        let min_size = needs.params.as_ref().map_or(0, |bound| bound.min_size);
        let given = self.params.1;
        if given < min_size || !given.is_multiple_of(16) || (given > 0 && needs.params.is_none()) {
            return invalid(format!("{given} bytes of parameters are given, but it takes {min_size}"));
        }
        let limit = limits.max_uniform_buffer_binding_size;
        if given > limit {
            let what = format!("parameters of kernel {kernel}");
            return Err(GpuError::TooLarge { what, requested: given, limit, limit_name: "maxUniformBufferBindingSize" });
        }
        let limit = limits.max_compute_workgroups_per_dimension;
        match self.groups.into_iter().find(|&groups| groups > limit) {
            None => Ok(()),
            Some(groups) => Err(GpuError::KernelLimit {
                kernel: kernel.to_owned(),
                needed: groups.into(),
                limit: limit.into(),
                limit_name: "maxComputeWorkgroupsPerDimension",
            }),
        }
    }

    /// The size of a binding. A kernel without runtime checks does not depend on it. So it gets the
    /// rest of the buffer, and batches of different sizes share a bind group.
    fn bound_size(&self, bound: &Bound, range: &BufferRange, limits: &wgpu::Limits) -> u64 {
        if !self.kernel.0.unchecked || bound.uniform {
            return range.size;
        }
        let limit = limits.max_storage_buffer_binding_size / 16 * 16;
        range.buffer.size().saturating_sub(range.offset).min(limit).max(range.size)
    }

    /// The present ranges of its kernel's buffers, and their bound sizes.
    fn bound<'a>(&'a self, limits: &'a wgpu::Limits) -> impl Iterator<Item = (u32, &'a BufferRange, u64)> {
        self.kernel.0.needs.buffers.iter().filter_map(move |bound| {
            let range = self.bindings.get(bound.binding as usize)?;
            Some((bound.binding, range, self.bound_size(bound, range, limits)))
        })
    }
}

impl<'a, 'p> Encoding<'a, 'p> {
    fn new(gpu: &'a Gpu, pass: wgpu::ComputePass<'a>, params: Option<&'a mut PartParams<'p>>) -> Self {
        Self { gpu, pass, params, key: Vec::new() }
    }

    fn encode<'b>(mut self, dispatches: impl Iterator<Item = &'b Dispatch>) {
        dispatches.for_each(|dispatch| self.dispatch(dispatch));
    }

    fn dispatch(&mut self, dispatch: &Dispatch) {
        let kernel = &dispatch.kernel.0;
        self.pass.set_pipeline(&kernel.pipeline);
        if let Some(layout) = &kernel.buffers {
            let group = self.group(dispatch, layout);
            self.pass.set_bind_group(BUFFERS_GROUP, &group, &[]);
        }
        if let (Some(_), Some(params)) = (&kernel.needs.params, &mut self.params) {
            let (offset, size) = dispatch.params;
            // The buffer of a list has fewer than 2^32 bytes.
            let offset = (offset - params.first) as u32;
            let group = params.written.group(self.gpu.device(), size);
            self.pass.set_bind_group(PARAMS_GROUP, group, &[offset]);
        }
        let [x, y, z] = dispatch.groups;
        self.pass.dispatch_workgroups(x, y, z);
    }

    /// The bind group of the buffers of a dispatch: kept, or a new one that is then kept.
    fn group(&mut self, dispatch: &Dispatch, layout: &wgpu::BindGroupLayout) -> wgpu::BindGroup {
        let kernel = &dispatch.kernel.0;
        let (limits, groups) = (self.gpu.limits(), &self.gpu.0.bind_groups);
        self.key.clear();
        // The device keeps all its kernels, so no two of them ever have one address.
        self.key.push(Arc::as_ptr(kernel).addr() as u64);
        dispatch.bound(limits).for_each(|(_, range, size)| self.key.extend([range.buffer.id(), range.offset, size]));
        groups.get_or_make(&self.key, || {
            dispatch.bound(limits).for_each(|(_, range, _)| range.buffer.bound_in(groups));
            let bound = dispatch.bound(limits);
            let entries: Vec<_> = bound
                .map(|(binding, range, size)| wgpu::BindGroupEntry { binding, resource: range.binding(size) })
                .collect();
            let descriptor = wgpu::BindGroupDescriptor { label: Some(&kernel.name), layout, entries: &entries };
            self.gpu.device().create_bind_group(&descriptor)
        })
    }
}

impl Bound {
    fn check(&self, kernel: &str, range: &BufferRange, limits: &wgpu::Limits) -> Result<(), GpuError> {
        let what = || format!("kernel {kernel}, binding {}", self.binding);
        let (align, limit, limit_name) = if self.uniform {
            let align = limits.min_uniform_buffer_offset_alignment;
            (align, limits.max_uniform_buffer_binding_size, "maxUniformBufferBindingSize")
        } else {
            let align = limits.min_storage_buffer_offset_alignment;
            (align, limits.max_storage_buffer_binding_size, "maxStorageBufferBindingSize")
        };
        if range.size > limit {
            return Err(GpuError::TooLarge { what: what(), requested: range.size, limit, limit_name });
        }
        if range.size < self.min_size {
            return Err(GpuError::invalid(what(), format!("has {} bytes, but {} are needed", range.size, self.min_size)));
        }
        range.check(what, align.into(), 4)
    }
}

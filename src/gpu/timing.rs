//! Kernel times, from timestamps that the device writes between kernels.

use std::time::{Duration, Instant};

use super::device::{Gpu, Submission};
use super::error::GpuError;
use super::profile::{ProfileTable, Profiler};
use super::range::BufferRange;

/// Queries of one set. Each has `wgpu::QUERY_SIZE` bytes.
const SET: usize = wgpu::QUERY_SET_MAX_QUERIES as usize;

/// The timestamps of one submission: around all passes, or around each pass.
#[derive(Debug)]
pub(super) struct Stamps {
    sets: Vec<(wgpu::QuerySet, u32)>,
    passes: usize,
    each: bool,
    resolved: BufferRange,
}

impl Stamps {
    /// `None` without passes or on a device without timestamps.
    pub(super) fn new(gpu: &Gpu, passes: usize, each: bool) -> Result<Option<Self>, GpuError> {
        if passes == 0 || !gpu.features().contains(wgpu::Features::TIMESTAMP_QUERY) {
            return Ok(None);
        }
        let queries = if each { 2 * passes } else { 2 };
        let bytes = queries as u64 * u64::from(wgpu::QUERY_SIZE);
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let resolved = BufferRange::whole(gpu.buffer("timestamps", bytes, usage)?).slice(0, bytes);
        let counts = (0..queries).step_by(SET).map(|start| SET.min(queries - start) as u32);
        let sets = gpu.guarded_taking(bytes, "timestamps", |device| {
            let set = |count| {
                let ty = wgpu::QueryType::Timestamp;
                (device.create_query_set(&wgpu::QuerySetDescriptor { label: Some("timestamps"), ty, count }), count)
            };
            counts.map(set).collect()
        })?;
        Ok(Some(Self { sets, passes, each, resolved }))
    }

    /// Whether each dispatch has its own pass and times.
    pub(super) fn of_each(&self) -> bool {
        self.each
    }

    /// The timestamp writes of pass `pass`.
    pub(super) fn writes(&self, pass: usize) -> Option<wgpu::ComputePassTimestampWrites<'_>> {
        let (begin, end) = match self.each {
            true => (Some(2 * pass), Some(2 * pass + 1)),
            false => ((pass == 0).then_some(0), (pass + 1 == self.passes).then_some(1)),
        };
        // The size of a set is even, so both times of a pass are in the same set.
        let (query_set, _) = self.sets.get(begin.or(end)? / SET)?;
        let place = |query: Option<usize>| query.map(|query| (query % SET) as u32);
        Some(wgpu::ComputePassTimestampWrites {
            query_set,
            beginning_of_pass_write_index: place(begin),
            end_of_pass_write_index: place(end),
        })
    }

    /// Resolves the queries into a buffer.
    pub(super) fn resolve(&self, encoder: &mut wgpu::CommandEncoder) {
        for (i, (set, count)) in self.sets.iter().enumerate() {
            let offset = (i * SET) as u64 * u64::from(wgpu::QUERY_SIZE);
            encoder.resolve_query_set(set, 0..*count, &self.resolved.buffer, offset);
        }
    }
}

/// Seconds between both timestamps of each pair.
fn seconds(gpu: &Gpu, stamps: &BufferRange) -> Result<Vec<f64>, GpuError> {
    let period = f64::from(gpu.queue().get_timestamp_period()) * 1e-9;
    let bytes = gpu.read(stamps)?;
    let (words, _) = bytes.as_chunks().0.as_chunks::<2>();
    let ticks = |&[begin, end]: &[[u8; 8]; 2]| u64::from_le_bytes(end).saturating_sub(u64::from_le_bytes(begin));
    Ok(words.iter().map(|pair| ticks(pair) as f64 * period).collect())
}

/// A timed submission.
#[derive(Debug)]
pub struct Timed {
    /// The submission, for [`Gpu::wait_for`].
    pub submission: Submission,
    /// Whether the device measures the time. If not (no timestamps, or no dispatch), the time is
    /// the wall-clock time from the submission until [`Timed::elapsed`] has waited for its end.
    pub by_timestamps: bool,
    /// Start of the first dispatch and end of the last.
    ends: Option<[BufferRange; 2]>,
    started: Instant,
}

impl Timed {
    pub(super) fn new(submission: Submission, stamps: Option<Stamps>, started: Instant) -> Self {
        let word = u64::from(wgpu::QUERY_SIZE);
        let ends = stamps.map(|s| [s.resolved.slice(0, word), s.resolved.slice(s.resolved.size - word, word)]);
        Self { submission, by_timestamps: ends.is_some(), ends, started }
    }

    /// Waits for the end. Returns the time from the start of the first dispatch to the end of the
    /// last.
    ///
    /// # Errors
    /// Any device error.
    pub fn elapsed(&self, gpu: &Gpu) -> Result<Duration, GpuError> {
        gpu.wait_for(&self.submission)?;
        let Some([begin, end]) = &self.ends else { return Ok(self.started.elapsed()) };
        let tick = |range| Ok(gpu.read(range)?.first_chunk().map_or(0, |word| u64::from_le_bytes(*word)));
        let ticks = tick(end)?.saturating_sub(tick(begin)?);
        Ok(Duration::from_nanos((ticks as f64 * f64::from(gpu.queue().get_timestamp_period())) as u64))
    }
}

impl Gpu {
    /// Adds the times of the dispatches of a submission to the profile, each a kernel and its
    /// bytes. If too many times are unread, it waits for the earlier submissions and reads them.
    pub(super) fn add_to_profile(&self, stamps: &Stamps, dispatches: Vec<(String, u64)>) -> Result<(), GpuError> {
        let Some(profiler) = &self.0.profiler else { return Ok(()) };
        let full = profiler.add(stamps.resolved.clone(), dispatches);
        if full { self.collect(profiler) } else { Ok(()) }
    }

    fn collect(&self, profiler: &Profiler) -> Result<(), GpuError> {
        for pending in profiler.take_pending() {
            let times = seconds(self, &pending.stamps)?;
            profiler.add_times(pending, times);
        }
        Ok(())
    }

    /// Waits for all submitted work. Returns the cost of each kernel since the device was opened.
    /// Empty unless [`Options::profile`](super::Options::profile) is set.
    ///
    /// # Errors
    /// Any device error.
    pub fn profile(&self) -> Result<ProfileTable, GpuError> {
        let Some(profiler) = &self.0.profiler else { return Ok(ProfileTable::default()) };
        self.collect(profiler)?;
        Ok(profiler.table())
    }
}

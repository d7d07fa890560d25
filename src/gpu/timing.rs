//! How long kernels take, by timestamps that the device writes between them.

use std::collections::HashMap;
use std::fmt;
use std::mem;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::buffer::BufferRange;
use super::device::Gpu;
use super::dispatch::{Dispatch, Submission};
use super::error::GpuError;

/// Queries of one set; each has `wgpu::QUERY_SIZE` bytes.
const SET: usize = wgpu::QUERY_SET_MAX_QUERIES as usize;
/// Submissions whose times are not read yet.
const MAX_PENDING: usize = 256;

/// The timestamps of one submission: before the first pass and after the last, or before and after each.
#[derive(Debug)]
pub(super) struct Stamps {
    sets: Vec<(wgpu::QuerySet, u32)>,
    passes: usize,
    each: bool,
    resolved: BufferRange,
}

impl Stamps {
    /// `None` without passes, and on a device without timestamps.
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

    /// Whether each dispatch has a pass, and times, of its own.
    pub(super) fn of_each(&self) -> bool {
        self.each
    }

    /// What pass number `pass` writes.
    pub(super) fn writes(&self, pass: usize) -> Option<wgpu::ComputePassTimestampWrites<'_>> {
        let (begin, end) = match self.each {
            true => (Some(2 * pass), Some(2 * pass + 1)),
            false => ((pass == 0).then_some(0), (pass + 1 == self.passes).then_some(1)),
        };
        // A pass has both of its times in one set, whose size is even.
        let (query_set, _) = self.sets.get(begin.or(end)? / SET)?;
        let place = |query: Option<usize>| query.map(|query| (query % SET) as u32);
        Some(wgpu::ComputePassTimestampWrites {
            query_set,
            beginning_of_pass_write_index: place(begin),
            end_of_pass_write_index: place(end),
        })
    }

    /// Turns the queries into numbers that can be read.
    pub(super) fn resolve(&self, encoder: &mut wgpu::CommandEncoder) {
        for (i, (set, count)) in self.sets.iter().enumerate() {
            let offset = (i * SET) as u64 * u64::from(wgpu::QUERY_SIZE);
            encoder.resolve_query_set(set, 0..*count, &self.resolved.buffer, offset);
        }
    }
}

/// Seconds between the two timestamps of each pair.
fn seconds(gpu: &Gpu, stamps: &BufferRange) -> Result<Vec<f64>, GpuError> {
    let period = f64::from(gpu.queue().get_timestamp_period()) * 1e-9;
    let bytes = gpu.read(stamps)?;
    let (words, _) = bytes.as_chunks().0.as_chunks::<2>();
    let ticks = |&[begin, end]: &[[u8; 8]; 2]| u64::from_le_bytes(end).saturating_sub(u64::from_le_bytes(begin));
    Ok(words.iter().map(|pair| ticks(pair) as f64 * period).collect())
}

/// A submission whose time is taken.
#[derive(Debug)]
pub struct Timed {
    /// The submission, for [`Gpu::wait_for`].
    pub submission: Submission,
    /// Whether the device takes the time. If not, it has no timestamps (or nothing was dispatched), and the time is the wall
    /// clock's, from the submission until [`Timed::elapsed`] has waited for its end.
    pub by_timestamps: bool,
    /// Start of the first dispatch, end of the last.
    ends: Option<[BufferRange; 2]>,
    started: Instant,
}

impl Timed {
    pub(super) fn new(submission: Submission, stamps: Option<Stamps>, started: Instant) -> Self {
        let word = u64::from(wgpu::QUERY_SIZE);
        let ends = stamps.map(|s| [s.resolved.slice(0, word), s.resolved.slice(s.resolved.size - word, word)]);
        Self { submission, by_timestamps: ends.is_some(), ends, started }
    }

    /// Waits for the end; the time from before the first to after the last dispatch.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn elapsed(&self, gpu: &Gpu) -> Result<Duration, GpuError> {
        gpu.wait_for(&self.submission)?;
        let Some([begin, end]) = &self.ends else { return Ok(self.started.elapsed()) };
        let tick = |range| Ok(gpu.read(range)?.first_chunk().map_or(0, |word| u64::from_le_bytes(*word)));
        let ticks = tick(end)?.saturating_sub(tick(begin)?);
        Ok(Duration::from_nanos((ticks as f64 * f64::from(gpu.queue().get_timestamp_period())) as u64))
    }
}

/// What one kernel took.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelTime {
    /// `shader:entry`.
    pub kernel: String,
    /// Dispatches.
    pub calls: u64,
    /// Time on the device.
    pub seconds: f64,
    /// Bytes that it had at least to move.
    pub bytes: u64,
}

/// What each kernel took; the longest first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ProfileTable(pub Vec<KernelTime>);

impl ProfileTable {
    /// All kernels together.
    pub fn total(&self) -> KernelTime {
        let mut total = KernelTime { kernel: "total".to_owned(), calls: 0, seconds: 0.0, bytes: 0 };
        self.0.iter().for_each(|row| total.add(row.calls, row.seconds, row.bytes));
        total
    }
}

impl KernelTime {
    fn add(&mut self, calls: u64, seconds: f64, bytes: u64) {
        self.calls += calls;
        self.seconds += seconds;
        self.bytes = self.bytes.saturating_add(bytes);
    }
}

impl fmt::Display for ProfileTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total = self.total();
        let rows = || self.0.iter().chain([&total]);
        let width = rows().map(|row| row.kernel.chars().count()).max().unwrap_or(0);
        write!(f, "{:width$}  {:>9}  {:>11}  {:>8}", "kernel", "calls", "ms", "GB/s")?;
        for KernelTime { kernel, calls, seconds, bytes } in rows() {
            let rate = if *seconds > 0.0 { *bytes as f64 / seconds / 1e9 } else { 0.0 };
            write!(f, "\n{kernel:width$}  {calls:>9}  {:>11.3}  {rate:>8.1}", seconds * 1e3)?;
        }
        Ok(())
    }
}

/// Times of all dispatches since the device was opened.
#[derive(Debug, Default)]
pub(super) struct Profiler {
    pending: Mutex<Vec<Pending>>,
    totals: Mutex<HashMap<String, KernelTime>>,
}

#[derive(Debug)]
struct Pending {
    stamps: BufferRange,
    /// Kernel and bytes of each dispatch.
    calls: Vec<(String, u64)>,
}

impl Profiler {
    /// Notes the dispatches of a submission. Every now and then it waits for the times of earlier ones, to keep few of them.
    pub(super) fn add<'a>(
        &self,
        gpu: &Gpu,
        stamps: &Stamps,
        dispatches: impl Iterator<Item = &'a Dispatch>,
    ) -> Result<(), GpuError> {
        let calls = dispatches.map(|d| (d.kernel.name().to_owned(), d.bytes)).collect();
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.push(Pending { stamps: stamps.resolved.clone(), calls });
        let full = pending.len() >= MAX_PENDING;
        drop(pending);
        if full { self.collect(gpu) } else { Ok(()) }
    }

    fn collect(&self, gpu: &Gpu) -> Result<(), GpuError> {
        // Reading submits commands of its own, so no lock is held meanwhile.
        let pending = mem::take(&mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner));
        for Pending { stamps, calls } in pending {
            let times = seconds(gpu, &stamps)?;
            let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
            for ((kernel, bytes), seconds) in calls.into_iter().zip(times) {
                let new = || KernelTime { kernel: kernel.clone(), calls: 0, seconds: 0.0, bytes: 0 };
                totals.entry(kernel.clone()).or_insert_with(new).add(1, seconds, bytes);
            }
        }
        Ok(())
    }
}

impl Gpu {
    /// Waits for all that was submitted; what each kernel took since the device was opened. Empty unless
    /// [`Options::profile`](super::Options::profile) is set.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn profile(&self) -> Result<ProfileTable, GpuError> {
        let Some(profiler) = &self.0.profiler else { return Ok(ProfileTable::default()) };
        profiler.collect(self)?;
        let totals = profiler.totals.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rows: Vec<_> = totals.values().cloned().collect();
        rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds).then_with(|| a.kernel.cmp(&b.kernel)));
        Ok(ProfileTable(rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_row_per_kernel_and_their_total() {
        let row = |kernel: &str, calls, seconds, bytes| KernelTime { kernel: kernel.to_owned(), calls, seconds, bytes };
        let table = ProfileTable(vec![row("dequant:f16", 36, 0.0125, 50_000_000_000), row("copy", 2, 0.0, 0)]);
        let text = "\
kernel           calls           ms      GB/s
dequant:f16         36       12.500    4000.0
copy                 2        0.000       0.0
total               38       12.500    4000.0";
        assert_eq!(table.to_string(), text);
    }
}

//! The cost of each kernel: times of dispatches, summed up.

use std::collections::HashMap;
use std::fmt;
use std::mem;
use std::sync::{Mutex, PoisonError};

use super::range::BufferRange;

/// Maximum submissions with unread times.
const MAX_PENDING: usize = 256;

/// The cost of one kernel.
#[derive(Debug, Clone, PartialEq)]
pub struct KernelTime {
    /// `shader:entry`.
    pub kernel: String,
    /// Number of dispatches.
    pub calls: u64,
    /// Time on the device.
    pub seconds: f64,
    /// Minimum memory traffic in bytes.
    pub bytes: u64,
}

/// The cost of each kernel, longest time first.
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

/// A submission with unread times.
#[derive(Debug)]
pub(super) struct Pending {
    /// Two timestamps of each dispatch.
    pub(super) stamps: BufferRange,
    /// Kernel and bytes of each dispatch.
    calls: Vec<(String, u64)>,
}

impl Profiler {
    /// Adds the dispatches of a submission. Returns whether too many times are unread.
    pub(super) fn add(&self, stamps: BufferRange, calls: Vec<(String, u64)>) -> bool {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.push(Pending { stamps, calls });
        pending.len() >= MAX_PENDING
    }

    /// Takes the submissions with unread times.
    pub(super) fn take_pending(&self) -> Vec<Pending> {
        mem::take(&mut *self.pending.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Adds the seconds of each dispatch of a submission.
    pub(super) fn add_times(&self, pending: Pending, seconds: Vec<f64>) {
        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        for ((kernel, bytes), seconds) in pending.calls.into_iter().zip(seconds) {
            let new = || KernelTime { kernel: kernel.clone(), calls: 0, seconds: 0.0, bytes: 0 };
            totals.entry(kernel.clone()).or_insert_with(new).add(1, seconds, bytes);
        }
    }

    /// The cost of each kernel so far.
    pub(super) fn table(&self) -> ProfileTable {
        let totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rows: Vec<_> = totals.values().cloned().collect();
        rows.sort_by(|a, b| b.seconds.total_cmp(&a.seconds).then_with(|| a.kernel.cmp(&b.kernel)));
        ProfileTable(rows)
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

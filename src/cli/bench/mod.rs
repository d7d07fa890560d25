//! `nf4pack bench`: the whole of a thing, and what bounds it, measured in one run.

pub mod convert;
pub mod dequant;
pub mod gpu;
pub mod stream;
pub mod train;
pub mod upload;

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::ui;
use crate::convert::ConvertError;

/// The middle one, or the mean of the middle two.
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let upper = values.len() / 2;
    match (values.get(upper), values.len().is_multiple_of(2)) {
        (Some(a), true) => (a + values[upper - 1]) / 2.0,
        (Some(a), false) => *a,
        (None, _) => 0.0,
    }
}

pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// Ends the benchmark where Ctrl-C was pressed.
pub fn not_interrupted() -> Result<()> {
    if ui::interrupted() { Err(ConvertError::Cancelled.into()) } else { Ok(()) }
}

/// A folder in `dir` that is gone at the end.
fn temporary_folder(dir: &Path) -> Result<TempDir> {
    let failed = || format!("cannot make a folder in {} (--dir names another place)", dir.display());
    tempfile::Builder::new().prefix("nf4pack-bench-").tempdir_in(dir).with_context(failed)
}

/// Seconds that `work` takes.
fn seconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}

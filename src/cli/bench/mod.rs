//! `nf4pack bench`: measures a command and its baselines in one run.

pub mod convert;
pub mod dequant;
pub mod dispatch;
pub mod generate;
pub mod gpu;
pub mod longest;
pub mod matmul;
pub mod stream;
pub mod train;
pub mod upload;

use std::io;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::ui::{self, Cancelled, Ui, Unit};
use crate::convert::synth::{self, Shape};

pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, |n| n.get())
}

/// A temporary folder in `dir`.
fn temporary_folder(dir: &Path) -> Result<TempDir> {
    let failed = || format!("cannot create a folder in {} (--dir names another one)", dir.display());
    tempfile::Builder::new().prefix("nf4pack-bench-").tempdir_in(dir).with_context(failed)
}

/// Seconds that `work` takes.
fn seconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let started = Instant::now();
    work()?;
    Ok(started.elapsed().as_secs_f64())
}

/// Writes a checkpoint of random weights into `folder`, which must not exist; returns its bytes.
fn write_checkpoint(folder: &Path, shape: &str, ui: Ui) -> Result<u64> {
    let sizes = Shape::from_name(shape).with_context(|| format!("no shape {shape}"))?;
    ui.stage(&format!("writing random weights in the shape of {shape} to {}", folder.display()));
    let written = synth::write(folder, &sizes, 0, None, &ui.meter("writing", Unit::Bytes));
    with_context(written, folder)
}

/// The result of writing to `path`, with context; [`Cancelled`] after Ctrl-C.
fn with_context(written: io::Result<u64>, path: &Path) -> Result<u64> {
    match written {
        Err(_) if ui::interrupted() => Err(Cancelled.into()),
        result => result.with_context(|| format!("cannot write {} (--dir names another folder)", path.display())),
    }
}

/// The median of the runs; there is at least one.
fn median(seconds: &[f64]) -> f64 {
    ui::median(seconds).unwrap_or_default()
}

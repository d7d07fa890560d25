//! The cost of a dispatch: what a list of many small ones takes.

use std::time::Instant;

use anyhow::Result;
use serde::Serialize;

use super::median;
use crate::cli::ui;
use crate::dequant::copy_baseline::CopyKernel;
use crate::gpu::{BufferRange, Gpu, GpuError};

/// Dispatches of a list.
const DISPATCHES: usize = 1_500;
/// Buffers that the dispatches copy between. Each depends on the dispatch before it.
const BUFFERS: usize = 48;
/// Bytes of a buffer: 16 workgroups.
const BYTES: u64 = 64 << 10;

/// Seconds per dispatch of a list.
#[derive(Debug, Serialize)]
pub struct DispatchFigures {
    pub dispatches: usize,
    /// Recording and submission, on the host.
    pub host_seconds: f64,
    /// On the device, or until it is done if it has no timestamps.
    pub device_seconds: f64,
    /// From the start of the recording to the end of the last dispatch.
    pub seconds: f64,
}

/// Measures `runs` lists after a first one, which creates what is then kept.
pub fn measure(gpu: &Gpu, runs: u16) -> Result<DispatchFigures> {
    let copy = CopyKernel::new(gpu)?;
    let buffer = |_| Ok::<_, GpuError>(BufferRange::whole(gpu.storage("dispatches", BYTES)?));
    let buffers: Vec<BufferRange> = (0..BUFFERS).map(buffer).collect::<Result<_, _>>()?;
    let (mut host, mut device, mut both) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..=runs {
        ui::not_interrupted()?;
        gpu.wait()?;
        let started = Instant::now();
        let mut commands = gpu.commands("dispatches");
        let targets = buffers.iter().cycle().skip(1);
        for (from, to) in buffers.iter().cycle().zip(targets).take(DISPATCHES) {
            copy.record(&mut commands, from, to)?;
        }
        let timed = commands.submit_timed()?;
        let submitted = started.elapsed();
        let on_device = timed.elapsed(gpu)?;
        if run > 0 {
            host.push(submitted.as_secs_f64());
            device.push(on_device.as_secs_f64());
            both.push(started.elapsed().as_secs_f64());
        }
    }
    let of = |seconds: &[f64]| median(seconds) / DISPATCHES as f64;
    Ok(DispatchFigures { dispatches: DISPATCHES, host_seconds: of(&host), device_seconds: of(&device), seconds: of(&both) })
}

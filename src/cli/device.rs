//! Shared by the GPU commands: opens a GPU, describes it, times work on it.

use std::fmt;

use anyhow::Result;
use serde::Serialize;

use super::args::{GpuArg, PrecisionArg};
use super::ui::Ui;
use crate::dequant::DequantError;
use crate::gpu::{self, AdapterSummary, Commands, Gpu, GpuError, MatrixUnits};
use crate::model::ModelError;
use crate::model::precision::MixedKernels;

/// An adapter in JSON.
#[derive(Debug, Serialize)]
pub struct AdapterEntry {
    pub index: usize,
    pub name: String,
    pub kind: &'static str,
    pub backend: String,
    pub driver: String,
}

impl From<&AdapterSummary> for AdapterEntry {
    fn from(a: &AdapterSummary) -> Self {
        let (name, backend, driver) = (a.name.clone(), a.backend.clone(), a.driver.clone());
        Self { index: a.index, name, kind: a.kind, backend, driver }
    }
}

impl fmt::Display for AdapterEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {}, {})", self.name, self.kind, self.backend, self.driver)
    }
}

/// Runs `work` with the requested GPU. With `NF4PACK_PROFILE=1` it prints the time of every kernel
/// at the end, also if the work failed.
pub fn with<T>(args: &GpuArg, ui: Ui, work: impl FnOnce(&Gpu) -> Result<T>) -> Result<T> {
    profiled(&Gpu::open(&args.options())?, ui, work)
}

/// As [`with`], for a command that runs a model, with these kernels for matrix units, in the
/// requested precision. Prints the precision.
pub fn with_precision<T>(
    args: &GpuArg,
    precision: Option<PrecisionArg>,
    kernels: &MixedKernels,
    ui: Ui,
    work: impl FnOnce(&Gpu) -> Result<T>,
) -> Result<T> {
    let gpu = open(args, precision.unwrap_or_default(), kernels)?;
    ui.stage(&format!("precision: {}", PrecisionEntry::from(&gpu)));
    profiled(&gpu, ui, work)
}

/// Opens the GPU for a model in the requested precision.
fn open(args: &GpuArg, precision: PrecisionArg, kernels: &MixedKernels) -> Result<Gpu> {
    let options = args.options();
    let options = gpu::Options { matrix_units: precision.matrix_units(options.matrix_units), ..options };
    if precision == PrecisionArg::F32 {
        return Ok(Gpu::open_without_matrix_units(&options, "--precision, or that of the resumed run")?);
    }
    let gpu = Gpu::open(&options)?;
    match gpu.matrix_units() {
        Err(reason) if precision == PrecisionArg::Mixed => Err(GpuError::NoMatrixUnits { reason: reason.to_owned() }.into()),
        Ok(_) if precision == PrecisionArg::Mixed => {
            kernels.check(&gpu).map_err(ModelError::from)?;
            Ok(gpu)
        }
        _ => Ok(kernels.fallback(gpu, &options).map_err(ModelError::from)?),
    }
}

/// The precision of a run in JSON, and the reason.
#[derive(Debug, Clone, Serialize)]
pub struct PrecisionEntry {
    /// `mixed` or `f32`.
    pub precision: &'static str,
    pub precision_reason: String,
}

impl fmt::Display for PrecisionEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.precision, self.precision_reason)
    }
}

impl From<&Gpu> for PrecisionEntry {
    fn from(gpu: &Gpu) -> Self {
        let reason = gpu.matrix_units().map_or_else(str::to_owned, |units| {
            let place = match units {
                MatrixUnits::Hardware => "on matrix units",
                MatrixUnits::Loops => "in loops in place of matrix units",
            };
            format!("f16 operands and float32 sums, {place}; the kernels give the values of the CPU")
        });
        Self { precision: MatrixUnits::precision(gpu.matrix_units().ok()), precision_reason: reason }
    }
}

fn profiled<T>(gpu: &Gpu, ui: Ui, work: impl FnOnce(&Gpu) -> Result<T>) -> Result<T> {
    let result = work(gpu);
    match gpu.profile() {
        Ok(profile) if profile.0.is_empty() => {}
        Ok(profile) => ui.block(&format!("\n{profile}")),
        // A failed profile must not hide the result.
        Err(e) => ui.warning(&format!("the kernels' times are unknown: {e}")),
    }
    result
}

/// Whether the GPU is software; benchmarks are then small.
pub fn is_software(gpu: &Gpu) -> bool {
    gpu.adapter().kind == SOFTWARE
}

/// As [`is_software`], before the GPU is opened.
pub fn selects_software(args: &GpuArg) -> Result<bool> {
    Ok(gpu::adapter(args.options().adapter.as_deref())?.kind == SOFTWARE)
}

const SOFTWARE: &str = "software";

/// Seconds of a submission: long enough to hide its overhead, short enough for every driver's
/// watchdog.
const SUBMISSION_SECONDS: f64 = 0.02;
/// Maximum calls in a submission; each takes driver memory.
const MAX_CALLS: u32 = 256;

/// Records the call with this number.
type Record<'a> = dyn Fn(&mut Commands, u32) -> Result<(), DequantError> + 'a;

/// Work that is timed repeatedly.
pub struct Load<'a> {
    label: &'static str,
    record: Box<Record<'a>>,
    calls: u32,
    /// Of one call: one figure a run.
    pub seconds: Vec<f64>,
    /// Whether the device measured the time (otherwise the host's clock).
    pub by_timestamps: bool,
}

impl<'a> Load<'a> {
    /// `record` records one call, whose number it gets. It is called once to warm up, and to see
    /// how many calls fill a submission.
    pub fn new(
        gpu: &Gpu,
        label: &'static str,
        record: impl Fn(&mut Commands, u32) -> Result<(), DequantError> + 'a,
    ) -> Result<Self> {
        let mut load = Self { label, record: Box::new(record), calls: 1, seconds: Vec::new(), by_timestamps: false };
        // The first call also compiles; only the second is timed.
        for _ in 0..2 {
            load.run(gpu)?;
        }
        let once = load.seconds.pop().unwrap_or(SUBMISSION_SECONDS);
        load.calls = ((SUBMISSION_SECONDS / once.max(1e-9)) as u32).clamp(1, MAX_CALLS);
        load.seconds.clear();
        Ok(load)
    }

    /// One more run: many calls in one submission.
    pub fn run(&mut self, gpu: &Gpu) -> Result<()> {
        let mut commands = gpu.commands(self.label);
        (0..self.calls).try_for_each(|call| (self.record)(&mut commands, call))?;
        let timed = commands.submit_timed()?;
        self.seconds.push(timed.elapsed(gpu)?.as_secs_f64() / f64::from(self.calls));
        self.by_timestamps = timed.by_timestamps;
        Ok(())
    }
}

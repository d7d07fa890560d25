//! `nf4pack bench dequant`.

use std::fmt::Write as _;

use anyhow::Result;
use serde::Serialize;

use super::dispatch::{self, DispatchFigures};
use super::gpu::{Figures, Task, warm_up};
use crate::cli::args::{BenchDequantArgs, Matrices, parse_matrices};
use crate::cli::device::{self, AdapterEntry};
use crate::cli::outcome::Outcome;
use crate::cli::ui::{self, Table, Ui};
use crate::dequant::Dequantizer;
use crate::gpu::Gpu;

/// Half a billion weights: the overhead of a call is negligible.
const LARGE: &str = "32768x16384";
/// For devices with smaller buffers, and for those that share the machine's memory.
const MEDIUM: &str = "8192x8192";
/// More bytes than any GPU cache holds.
const BEYOND_CACHES: u64 = 512 << 20;
/// The same for a software GPU.
const BEYOND_CPU_CACHES: u64 = 16 << 20;
/// For a software GPU.
const SMALL: &str = "1024x1024";

#[derive(Serialize)]
struct Bench {
    gpu: AdapterEntry,
    shape: String,
    /// Rows and columns of each tensor.
    tensors: Vec<[u64; 2]>,
    /// Of all tensors.
    weights: u64,
    block_size: u32,
    runs: u16,
    /// Whether kernels run with wgpu's runtime checks (`NF4PACK_CHECKED=1`).
    checked: bool,
    #[serde(flatten)]
    figures: Figures,
    dispatch: DispatchFigures,
}

pub fn run(args: &BenchDequantArgs) -> Result<Outcome> {
    let ui = Ui::new(args.common.json);
    ui::handle_interrupts()?;
    let bench = device::with(&args.common.gpu, ui, |gpu| measure(args, ui, gpu))?;
    ui.result(&bench, || bench.text())?;
    Ok(Outcome::Good)
}

fn measure(args: &BenchDequantArgs, ui: Ui, gpu: &Gpu) -> Result<Bench> {
    let Matrices { name, shapes } = match &args.shape {
        Some(shape) => shape.clone(),
        None => parse_matrices(default_shape(gpu)).map_err(anyhow::Error::msg)?,
    };
    ui.stage(&format!("measuring {name} on {}", gpu.adapter()));
    let tensors: Vec<u64> = shapes.iter().map(|[rows, columns]| rows * columns).collect();
    let (block_size, runs) = (args.block_size, args.common.runs);
    let beyond_caches = if device::is_software(gpu) { BEYOND_CPU_CACHES } else { BEYOND_CACHES };
    let task = Task { tensors: &tensors, block_size, runs, beyond_caches, wanted: |_| true };
    warm_up(gpu, beyond_caches)?;
    let figures = task.measure(gpu, &Dequantizer::new(gpu)?)?;
    let dispatch = dispatch::measure(gpu, runs)?;
    let (weights, checked) = (tensors.iter().sum(), gpu.is_checked());
    let gpu = gpu.adapter().into();
    Ok(Bench { gpu, shape: name, tensors: shapes, weights, block_size, runs, checked, figures, dispatch })
}

fn default_shape(gpu: &Gpu) -> &'static str {
    match gpu.adapter().kind {
        "software" => SMALL,
        "discrete" if gpu.limits().max_buffer_size >= 2 << 30 => LARGE,
        _ => MEDIUM,
    }
}

impl Bench {
    fn text(&self) -> String {
        let (figures, copy) = (&self.figures, &self.figures.copy);
        let mut table = Table::new(&["output", "scales", "kernel", ">µs", ">min", ">GB/s", ">weights/s", ">of copy"]);
        for k in &figures.kernels {
            let micros = |seconds: f64| format!("{:.1}", 1e6 * seconds);
            let (median, min) = (micros(k.median_seconds), micros(k.min_seconds));
            let (rate, weights) = (gigabytes(k.bytes_per_second), ui::count(k.weights_per_second));
            let kernel = if k.fast { "fast" } else { "plain" };
            table.row([&k.output, &k.scales, &kernel, &median, &min, &rate, &weights, &percent(k.of_copy)]);
        }
        table.rule();
        let size = ui::bytes(copy.buffer_bytes as f64);
        for (what, rate) in [("kernel", copy.kernel_bytes_per_second), ("driver", copy.driver_bytes_per_second)] {
            let micros = format!("{:.1}", 2e6 * copy.buffer_bytes as f64 / rate);
            let of_copy = percent(rate / copy.kernel_bytes_per_second);
            table.row([&"copy", &size, &what, &micros, &"", &gigabytes(rate), &"", &of_copy]);
        }
        let mut text = format!("\n{}\n{}, {} weights", self.gpu, self.shape, ui::count(self.weights as f64));
        let (tensors, runs) = (self.tensors.len() as u64, ui::plural(u64::from(self.runs), "run"));
        let _ = write!(text, " in {}, block size {}, median of {runs}", ui::plural(tensors, "tensor"), self.block_size);
        let by = if figures.timed_by == "clock" { "the clock (no timestamps)" } else { "the device's timestamps" };
        let turns = if figures.sets > 1 { format!(", {} sets alternate", figures.sets) } else { String::new() };
        let checks = if self.checked { ", with runtime checks" } else { "" };
        let _ = writeln!(text, ", by {by}{turns}{checks}\n");
        let _ =
            writeln!(text, "{table}(GB/s: codes and scales read once, output written once; of a copy, read and written)");
        let DispatchFigures { dispatches, host_seconds, device_seconds, seconds } = self.dispatch;
        let [host, device, both] = [host_seconds, device_seconds, seconds].map(|seconds| format!("{:.2}", 1e6 * seconds));
        let _ = writeln!(
            text,
            "a small dispatch in a list of {}: {host} µs on the host, {device} on the device, {both} one after the other",
            ui::grouped(dispatches as u64),
        );
        text
    }
}

/// `3,912` or `4.1`: billions of bytes per second.
pub fn gigabytes(per_second: f64) -> String {
    let value = per_second / 1e9;
    if value < 99.95 { format!("{value:.1}") } else { ui::grouped(value.round() as u64) }
}

pub fn percent(of: f64) -> String {
    format!("{:.0} %", 100.0 * of)
}

//! `nf4pack bench stream`.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

use super::dequant::{gigabytes, percent};
use super::{cores, median, seconds, temporary_folder, upload, with_context};
use crate::cli::args::{BenchStreamArgs, Matrices, ShapeArg, parse_matrices};
use crate::cli::device::{self, AdapterEntry, is_software};
use crate::cli::open;
use crate::cli::outcome::Outcome;
use crate::cli::ui::{self, Table, Ui, Unit};
use crate::convert::synth::{self, Shape};
use crate::dequant::stream::{Direction, Globals, LayerStream, PackSource, StreamOptions, StreamPlan};
use crate::gpu::Gpu;

/// Layers of a pack of one matrix each, more than a ring of two holds.
const MATRICES: u32 = 8;

#[derive(Serialize)]
struct Bench {
    gpu: AdapterEntry,
    shape: String,
    dir: String,
    pack_bytes: u64,
    layers: u32,
    /// Bytes of GPU memory that all layers take.
    layers_bytes: u64,
    /// 0 is one per core, at most eight.
    threads: u16,
    runs: u16,
    /// The baseline: an upload from memory with the same threads.
    upload: upload::UploadFigures,
    measurements: Vec<Measurement>,
}

/// The measurement of one way of loading.
#[derive(Serialize)]
struct Measurement {
    /// `mapped` or `read`.
    source: &'static str,
    /// Whether the checksum of every payload was checked.
    verified: bool,
    /// Layers in GPU memory at a time.
    slots: u32,
    resident: bool,
    /// GPU bytes that the plan takes, staging included.
    needed_bytes: u64,
    /// Uploaded bytes: each layer once if all are resident, otherwise of a pass forward and back.
    bytes: u64,
    /// One figure per run, from opening the file to the last byte in the GPU's memory.
    seconds: Vec<f64>,
    median_seconds: f64,
    bytes_per_second: f64,
    /// Share of the speed of an upload from memory.
    of_upload: f64,
}

pub fn run(args: &BenchStreamArgs) -> Result<Outcome> {
    let ui = Ui::new(args.common.json);
    ui::handle_interrupts()?;
    let bench = device::with(&args.common.gpu, ui, |gpu| measure(args, ui, gpu))?;
    ui.result(&bench, || bench.text())?;
    Ok(Outcome::Good)
}

fn measure(args: &BenchStreamArgs, ui: Ui, gpu: &Gpu) -> Result<Bench> {
    let default = if is_software(gpu) { ShapeArg::Tiny } else { ShapeArg::Qwen3_4b };
    let shape = args.shape.clone().map_or_else(|| parse_matrices(default.name()), Ok).map_err(anyhow::Error::msg)?;
    let dir = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let folder = temporary_folder(&dir)?;
    let pack = folder.path().join("layers.nf4pack");
    let pack_bytes = write_pack(&pack, &shape, ui)?;
    ui.stage(&format!("streaming {} to {}", ui::bytes(pack_bytes as f64), gpu.adapter()));
    let plan = StreamPlan::new(PackSource::open(&pack)?.index(), gpu.limits().max_buffer_size, None, Globals::None)?;
    let mut measurements = Vec::new();
    for map in [true, false].into_iter().filter(|&map| !(map && args.no_mmap)) {
        for verify in [false, true].into_iter().filter(|&verify| verify || !args.verify_on_load) {
            for budget in [args.budget, Some(2 * plan.layer_bytes + plan.staging_bytes)] {
                let threads = args.threads.map_or(0, usize::from);
                let options = StreamOptions { budget, verify, threads, ..StreamOptions::default() };
                measurements.push(Measurement::new(gpu, &pack, map, &options, args.common.runs)?);
            }
        }
    }
    let upload = from_memory(args, gpu)?;
    for m in &mut measurements {
        m.of_upload = m.bytes_per_second / upload.bytes_per_second;
    }
    Ok(Bench {
        gpu: gpu.adapter().into(),
        shape: shape.name,
        dir: dir.display().to_string(),
        pack_bytes,
        layers: plan.layers,
        layers_bytes: plan.weights_bytes,
        threads: args.threads.unwrap_or(0),
        runs: args.common.runs,
        upload,
        measurements,
    })
}

/// Measures an upload from memory, without a file. It runs last, so that its buffers do not reduce
/// the free memory of the other measurements.
fn from_memory(args: &BenchStreamArgs, gpu: &Gpu) -> Result<upload::UploadFigures> {
    let bytes = if is_software(gpu) { upload::SOFTWARE_BYTES } else { upload::BYTES };
    let bytes = bytes.min(args.budget.unwrap_or(u64::MAX));
    let threads = args.threads.unwrap_or(cores().min(8) as u16);
    upload::Task::new(gpu, bytes)?.measure(threads, args.common.runs)
}

fn write_pack(path: &Path, shape: &Matrices, ui: Ui) -> Result<u64> {
    ui.stage(&format!("writing a random pack of the layers of {} to {}", shape.name, path.display()));
    let meter = ui.meter("writing", Unit::Bytes);
    let written = match (Shape::from_name(&shape.name), shape.shapes.first()) {
        (None, Some(&matrix)) => synth::write_matrices(path, matrix, MATRICES, 0, &meter),
        (sizes, _) => {
            let sizes = sizes.with_context(|| format!("no shape {}", shape.name))?;
            synth::write_pack(path, &sizes, 0, &meter)
        }
    };
    with_context(written, path)
}

impl Measurement {
    /// Measures one way of loading; the first time does not count.
    fn new(gpu: &Gpu, pack: &Path, map: bool, options: &StreamOptions, runs: u16) -> Result<Self> {
        let open = || -> Result<LayerStream> {
            let source = if map { open::mapped(pack)? } else { PackSource::open(pack)? };
            let source = if options.verify { source } else { source.unverified() };
            Ok(LayerStream::of(gpu, source, options)?)
        };
        let mut stream = open()?;
        let plan = stream.plan().clone();
        let mut all = Vec::new();
        for _ in 0..=runs {
            ui::not_interrupted()?;
            all.push(if plan.resident {
                // Closing the previous stream does not count.
                drop(stream);
                let started = Instant::now();
                stream = open()?;
                stream.wait_loaded()?;
                started.elapsed().as_secs_f64()
            } else {
                seconds(|| there_and_back(&mut stream))?
            });
        }
        let seconds = all.split_off(1);
        let median_seconds = median(&seconds);
        // The layers in the ring at the turn of a pass are not loaded again.
        let loads = if plan.resident { plan.layers } else { 2 * (plan.layers - plan.slots) };
        let bytes = plan.weights_bytes / u64::from(plan.layers.max(1)) * u64::from(loads);
        Ok(Self {
            source: if map { "mapped" } else { "read" },
            verified: options.verify,
            slots: plan.slots,
            resident: plan.resident,
            needed_bytes: plan.needed_bytes,
            bytes,
            seconds,
            median_seconds,
            bytes_per_second: bytes as f64 / median_seconds.max(1e-9),
            of_upload: 0.0,
        })
    }
}

/// A pass over all layers forward, and one backward.
fn there_and_back(stream: &mut LayerStream) -> Result<()> {
    for number in 0..stream.layer_count() {
        stream.layer(number, Direction::Forward)?;
    }
    for number in (0..stream.layer_count()).rev() {
        stream.layer(number, Direction::Backward)?;
    }
    Ok(stream.wait_loaded()?)
}

impl Bench {
    fn text(&self) -> String {
        let titles =
            ["file", "checksums", "layers in memory", ">GPU memory", ">moved", ">seconds", ">min", ">GB/s", ">of upload"];
        let mut table = Table::new(&titles);
        for m in &self.measurements {
            let checked = if m.verified { "checked" } else { "-" };
            let slots = if m.resident { "all".to_owned() } else { format!("ring of {}, there and back", m.slots) };
            let (memory, moved) = (ui::bytes(m.needed_bytes as f64), ui::bytes(m.bytes as f64));
            let min = m.seconds.iter().copied().fold(f64::INFINITY, f64::min);
            let [median, min] = [m.median_seconds, min].map(|seconds| format!("{seconds:.4}"));
            let (rate, share) = (gigabytes(m.bytes_per_second), percent(m.of_upload));
            table.row([&m.source, &checked, &slots, &memory, &moved, &median, &min, &rate, &share]);
        }
        let threads = match self.threads {
            0 => "a thread per core, at most 8".to_owned(),
            n => ui::plural(u64::from(n), "thread"),
        };
        let upload_threads = ui::plural(self.upload.threads.into(), "thread");
        let [upload, memcpy] = [self.upload.bytes_per_second, self.upload.memcpy_bytes_per_second].map(gigabytes);
        format!(
            "\n{}\n{}: {} of {}, {threads}, median of {}, in {}\n\n{table}(upload from memory in the same run, {upload_threads}: \
             {upload} GB/s; memcpy: {memcpy} GB/s)\n",
            self.gpu,
            self.shape,
            ui::plural(u64::from(self.layers), "layer"),
            ui::bytes(self.layers_bytes as f64 / f64::from(self.layers.max(1))),
            ui::plural(u64::from(self.runs), "run"),
            self.dir,
        )
    }
}

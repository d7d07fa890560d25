//! `nf4pack bench upload`.

use anyhow::{Context, Result};
use rayon::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};
use serde::Serialize;

use super::dequant::gigabytes;
use super::gpu::stored_bytes;
use super::{cores, median, seconds};
use crate::cli::args::{BenchUploadArgs, Matrices};
use crate::cli::device::{self, AdapterEntry, is_software};
use crate::cli::outcome::Outcome;
use crate::cli::ui::{self, Table, Ui};
use crate::convert::synth::{Shape, random_bytes};
use crate::format::nf4::{DEFAULT_BLOCK_SIZE, ScaleType};
use crate::gpu::{BufferRange, Gpu, GpuError, StagingArea, Uploader};

/// Numbers of threads to measure.
const THREADS: [u16; 4] = [1, 2, 4, 8];
/// Bytes of a run: more than any cache holds.
pub const BYTES: u64 = 1 << 30;
pub const SOFTWARE_BYTES: u64 = 64 << 20;
/// Staging buffers, the same as those of a layer stream.
const CHUNK: u64 = 16 << 20;
const CHUNKS: usize = 4;
/// Bytes that a thread copies at a time.
const PIECE: usize = 256 << 10;

#[derive(Serialize)]
struct Bench {
    gpu: AdapterEntry,
    bytes: u64,
    staging_buffers: usize,
    staging_buffer_bytes: u64,
    runs: u16,
    cores: usize,
    threads: Vec<UploadFigures>,
}

/// The speed with one number of threads.
#[derive(Debug, Serialize)]
pub struct UploadFigures {
    pub threads: u16,
    /// One figure per run, until the last byte is in the device's memory.
    seconds: Vec<f64>,
    pub bytes_per_second: f64,
    /// memcpy from the same memory with the same threads; bytes are counted once.
    pub memcpy_bytes_per_second: f64,
}

pub fn run(args: &BenchUploadArgs) -> Result<Outcome> {
    let ui = Ui::new(args.common.json);
    ui::handle_interrupts()?;
    let bench = device::with(&args.common.gpu, ui, |gpu| measure(args, ui, gpu))?;
    ui.result(&bench, || bench.text())?;
    Ok(Outcome::Good)
}

fn measure(args: &BenchUploadArgs, ui: Ui, gpu: &Gpu) -> Result<Bench> {
    let requested = args.bytes.or_else(|| args.shape.as_ref().map(nf4_bytes));
    let bytes = requested.unwrap_or(if is_software(gpu) { SOFTWARE_BYTES } else { BYTES });
    ui.stage(&format!("uploading {} to {}", ui::bytes(bytes as f64), gpu.adapter()));
    let task = Task::new(gpu, bytes)?;
    let counts = args.threads.map_or(THREADS.to_vec(), |one| vec![one]);
    let threads = counts.into_iter().map(|threads| task.measure(threads, args.common.runs)).collect::<Result<_>>()?;
    Ok(Bench {
        gpu: gpu.adapter().into(),
        bytes: task.source.len() as u64,
        staging_buffers: CHUNKS,
        staging_buffer_bytes: CHUNK.min(gpu.limits().max_buffer_size),
        runs: args.common.runs,
        cores: cores(),
        threads,
    })
}

/// Codes and bfloat16 scales of a matrix, or of the projections of all layers of a model.
fn nf4_bytes(matrices: &Matrices) -> u64 {
    let layers = Shape::from_name(&matrices.name).map_or(1, |shape| shape.layers);
    let of = |[rows, columns]: &[u64; 2]| stored_bytes(rows * columns, DEFAULT_BLOCK_SIZE, ScaleType::Bf16);
    layers * matrices.shapes.iter().map(of).sum::<u64>()
}

/// The source and the target of an upload.
pub struct Task<'a> {
    gpu: &'a Gpu,
    source: Vec<u8>,
    target: BufferRange,
}

impl<'a> Task<'a> {
    /// An upload of about `bytes` bytes.
    pub fn new(gpu: &'a Gpu, bytes: u64) -> Result<Self> {
        // Copies are multiples of 4. If the target is smaller than the source, it is overwritten
        // repeatedly, in whole chunks.
        let bytes = bytes.next_multiple_of(16);
        let mut source = zeros(bytes)?;
        random_bytes(&mut source, bytes);
        let target = bytes.min(gpu.limits().max_buffer_size / CHUNK.max(1) * CHUNK);
        Ok(Self { gpu, source, target: BufferRange::whole(gpu.storage("target", target)?) })
    }

    /// Uploads and copies by `threads` threads, in turn; the first time is not counted.
    pub fn measure(&self, threads: u16, runs: u16) -> Result<UploadFigures> {
        let pool = ThreadPoolBuilder::new().num_threads(threads.into()).build()?;
        let mut uploader = Uploader::new(self.gpu, CHUNK, CHUNKS);
        let mut memory = zeros(self.source.len() as u64)?;
        let (mut uploads, mut copies) = (Vec::new(), Vec::new());
        for _ in 0..=runs {
            ui::not_interrupted()?;
            uploads.push(seconds(|| self.upload(&mut uploader, &pool))?);
            copies.push(seconds(|| {
                copy(&pool, &self.source, &mut memory);
                Ok(())
            })?);
        }
        let seconds = uploads.split_off(1);
        let rate = |seconds: &[f64]| self.source.len() as f64 / median(seconds).max(1e-9);
        let memcpy_bytes_per_second = rate(&copies.split_off(1));
        Ok(UploadFigures { threads, bytes_per_second: rate(&seconds), seconds, memcpy_bytes_per_second })
    }

    fn upload(&self, uploader: &mut Uploader, pool: &ThreadPool) -> Result<()> {
        for (i, chunk) in self.source.chunks(uploader.chunk() as usize).enumerate() {
            let offset = i as u64 * uploader.chunk() % self.target.size;
            let part = self.target.slice(offset, chunk.len() as u64);
            uploader.copy(&part, |area| pool.install(|| fill(area, chunk)))?;
        }
        Ok(self.gpu.wait()?)
    }
}

fn fill(area: &StagingArea<'_>, bytes: &[u8]) -> Result<(), GpuError> {
    let pieces = bytes.par_chunks(PIECE).enumerate();
    pieces.try_for_each(|(i, piece)| area.write((i * PIECE) as u64, piece))
}

fn copy(pool: &ThreadPool, from: &[u8], to: &mut [u8]) {
    pool.install(|| to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from)));
}

impl Bench {
    fn text(&self) -> String {
        let mut table = Table::new(&[">threads", ">ms", ">GB/s", ">memcpy GB/s", ">of memcpy"]);
        for t in &self.threads {
            let millis = format!("{:.1}", 1e3 * median(&t.seconds));
            let (upload, memcpy) = (gigabytes(t.bytes_per_second), gigabytes(t.memcpy_bytes_per_second));
            let share = super::dequant::percent(t.bytes_per_second / t.memcpy_bytes_per_second);
            table.row([&t.threads, &millis, &upload, &memcpy, &share]);
        }
        format!(
            "\n{}\n{} from memory through {} of {}, {}, median of {}\n\n{table}",
            self.gpu,
            ui::bytes(self.bytes as f64),
            ui::plural(self.staging_buffers as u64, "staging buffer"),
            ui::bytes(self.staging_buffer_bytes as f64),
            ui::plural(self.cores as u64, "core"),
            ui::plural(u64::from(self.runs), "run"),
        )
    }
}

/// Memory for `bytes` bytes, if the machine has it.
fn zeros(bytes: u64) -> Result<Vec<u8>> {
    let missing = || format!("{} exceed this machine's memory (take a smaller --bytes)", ui::bytes(bytes as f64));
    let len = usize::try_from(bytes).with_context(missing)?;
    let mut memory = Vec::new();
    memory.try_reserve_exact(len).with_context(missing)?;
    memory.resize(len, 0);
    Ok(memory)
}

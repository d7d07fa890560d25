//! Tensors of random codes in GPU memory, and a copy as the baseline of their decoding.

use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use super::median;
use crate::cli::device::{Load, is_software};
use crate::cli::ui;
use crate::convert::plan::scale_type_name;
use crate::convert::synth::{random_bytes, random_scales};
use crate::dequant::copy_baseline::CopyKernel;
use crate::dequant::{Codec, Dequantizer, GpuWeights, KernelChoice, Output};
use crate::format::nf4::{Nf4Tensor, SUPER_BLOCK, ScaleType, Scales, block_count, codes_len, scales_len};
use crate::gpu::{BufferRange, Commands, Gpu, GpuError};

/// Maximum seconds of [`warm_up`].
const MAX_WARM_UP: u32 = 5;
/// Maximum number of sets, for tiny tensors.
const MAX_SETS: u64 = 128;

/// The measurement of a kernel.
#[derive(Debug, Serialize)]
pub struct KernelFigures {
    pub output: String,
    pub scales: &'static str,
    /// Whether it is the fast kernel; `nf4pack doctor` says why not.
    pub fast: bool,
    /// Codes and scales read once, output written once.
    pub bytes: u64,
    /// Seconds to decode every tensor once.
    pub median_seconds: f64,
    pub min_seconds: f64,
    pub bytes_per_second: f64,
    pub weights_per_second: f64,
    /// Share of the speed of the copy kernel.
    pub of_copy: f64,
}

/// Copies within the device's memory; bytes are counted twice, read and written.
#[derive(Debug, Serialize)]
pub struct CopyFigures {
    pub buffer_bytes: u64,
    pub kernel_bytes_per_second: f64,
    pub driver_bytes_per_second: f64,
}

#[derive(Debug, Serialize)]
pub struct Figures {
    /// Sets of tensors that alternate, so that none stays in a cache.
    pub sets: usize,
    /// `timestamps` of the device, or the `clock` if it has none.
    pub timed_by: &'static str,
    pub copy: CopyFigures,
    pub kernels: Vec<KernelFigures>,
}

/// A tensor with each scale type, and a buffer for its floats.
pub struct Tensor {
    weights: Vec<GpuWeights>,
    out: BufferRange,
}

impl Tensor {
    pub fn new(gpu: &Gpu, elements: u64, block_size: u32) -> Result<Self> {
        let (blocks, mut state) = (block_count(elements, block_size), elements);
        let mut codes = vec![0; codes_len(elements, block_size).unwrap_or(0) as usize];
        state = random_bytes(&mut codes, state);
        let table = random_table(ScaleType::F32, blocks, &mut state);
        let projection = Nf4Tensor { codes: &codes, scales: Scales::F32(&table), block_size, elements };
        let mut weights = vec![GpuWeights::upload(gpu, &projection)?];
        for scale_type in [ScaleType::Bf16, ScaleType::Dq8] {
            let table = random_table(scale_type, blocks, &mut state);
            let scales = BufferRange::whole(gpu.storage_with("scales", &table)?).slice(0, table.len() as u64);
            weights.push(GpuWeights { scales, codec: Codec::Nf4(scale_type), ..weights[0].clone() });
        }
        let out = BufferRange::whole(gpu.storage("floats", Output::F32.bytes(elements))?);
        Ok(Self { weights, out })
    }

    pub fn under(&self, scale_type: ScaleType) -> Option<&GpuWeights> {
        self.weights.iter().find(|w| w.codec.scale_type() == scale_type)
    }
}

/// A table of `blocks` scales.
fn random_table(scale_type: ScaleType, blocks: u64, state: &mut u64) -> Vec<u8> {
    let mut table = vec![0; scales_len(blocks, scale_type).unwrap_or(0) as usize];
    let floats = match scale_type {
        ScaleType::F32 | ScaleType::Bf16 => table.len(),
        ScaleType::Dq8 => Scales::DQ8_FIXED_LEN + 4 * (blocks as usize).div_ceil(SUPER_BLOCK),
    };
    let (floats, codes) = table.split_at_mut(floats);
    *state = random_bytes(codes, random_scales(floats, *state));
    table
}

/// Bytes of codes and scales.
pub fn stored_bytes(elements: u64, block_size: u32, scale_type: ScaleType) -> u64 {
    let scales = scales_len(block_count(elements, block_size), scale_type);
    codes_len(elements, block_size).unwrap_or(0) + scales.unwrap_or(0)
}

/// Bytes that decoding must move: codes and scales in, floats out.
fn bytes_of(elements: u64, block_size: u32, choice: &KernelChoice) -> u64 {
    stored_bytes(elements, block_size, choice.scale_type) + elements * choice.output.element_bytes()
}

/// Two buffers to copy between.
struct Copy {
    kernel: CopyKernel,
    from: BufferRange,
    to: BufferRange,
}

impl Copy {
    fn new(gpu: &Gpu, bytes: u64) -> Result<Self> {
        let size = bytes.min(gpu.limits().max_buffer_size) / 256 * 256;
        let buffer = |label| Ok::<_, GpuError>(BufferRange::whole(gpu.storage(label, size)?));
        Ok(Self { kernel: CopyKernel::new(gpu)?, from: buffer("source")?, to: buffer("target")? })
    }

    fn bytes(&self) -> u64 {
        2 * self.from.size
    }
}

/// Copies until a second of copies is no faster than the second before it. An idle GPU raises its
/// clock only under load. A software GPU has no clock of its own.
pub fn warm_up(gpu: &Gpu, bytes: u64) -> Result<()> {
    if is_software(gpu) {
        return Ok(());
    }
    let copy = Copy::new(gpu, bytes)?;
    let mut load = Load::new(gpu, "copy kernel", |commands, _| Ok(copy.kernel.record(commands, &copy.from, &copy.to)?))?;
    let mut before = f64::INFINITY;
    for _ in 0..MAX_WARM_UP {
        let start = Instant::now();
        load.seconds.clear();
        while start.elapsed() < Duration::from_secs(1) {
            ui::not_interrupted()?;
            load.run(gpu)?;
        }
        let now = median(&load.seconds);
        if now > 0.98 * before {
            break;
        }
        before = now;
    }
    Ok(())
}

/// Bytes read and written per second by the copy kernel: the median of `runs` copies of `bytes`.
pub fn copy_speed(gpu: &Gpu, bytes: u64, runs: u16) -> Result<f64> {
    let copy = Copy::new(gpu, bytes)?;
    let record = |commands: &mut Commands, _| Ok(copy.kernel.record(commands, &copy.from, &copy.to)?);
    let mut load = Load::new(gpu, "copy kernel", record)?;
    for _ in 0..runs {
        ui::not_interrupted()?;
        load.run(gpu)?;
    }
    Ok(copy.bytes() as f64 / median(&load.seconds).max(1e-12))
}

/// What to measure.
pub struct Task<'a> {
    /// Weights of each tensor.
    pub tensors: &'a [u64],
    pub block_size: u32,
    pub runs: u16,
    /// More bytes than a cache of the device holds: smaller sets of tensors alternate with others,
    /// and this is the size of a copy.
    pub beyond_caches: u64,
    /// The kernels to measure.
    pub wanted: fn(&KernelChoice) -> bool,
}

impl Task<'_> {
    /// Measures the kernels and the copy alternately, so a device that slows down affects both.
    pub fn measure(&self, gpu: &Gpu, kernels: &Dequantizer) -> Result<Figures> {
        let choices: Vec<KernelChoice> = kernels.choices().into_iter().filter(self.wanted).collect();
        let sets = self.sets(gpu)?;
        let copy = Copy::new(gpu, self.beyond_caches)?;
        let mut loads = vec![
            Load::new(gpu, "copy kernel", |commands, _| Ok(copy.kernel.record(commands, &copy.from, &copy.to)?))?,
            Load::new(gpu, "driver copy", |commands, _| {
                commands.copy(&copy.from, &copy.to);
                Ok(())
            })?,
        ];
        for choice in &choices {
            let decode = |commands: &mut Commands, call: u32| {
                let set = sets.get(call as usize % sets.len().max(1)).map_or(&[][..], Vec::as_slice);
                set.iter().try_for_each(|tensor| match tensor.under(choice.scale_type) {
                    Some(weights) => kernels.record(commands, weights, 0..weights.elements, choice.output, &tensor.out),
                    None => Ok(()),
                })
            };
            loads.push(Load::new(gpu, "dequantise", decode)?);
        }
        for _ in 0..self.runs {
            for load in &mut loads {
                ui::not_interrupted()?;
                load.run(gpu)?;
            }
        }
        Ok(self.figures(sets.len(), copy.bytes(), &choices, &loads))
    }

    /// Enough sets to exceed the caches.
    fn sets(&self, gpu: &Gpu) -> Result<Vec<Vec<Tensor>>> {
        let smallest: u64 = self.tensors.iter().map(|n| n / 2 + Output::F16.bytes(*n)).sum();
        let count = self.beyond_caches.div_ceil(smallest.max(1)).min(MAX_SETS);
        let set = |_| self.tensors.iter().map(|&elements| Tensor::new(gpu, elements, self.block_size)).collect();
        (0..count).map(set).collect()
    }

    fn figures(&self, sets: usize, copied: u64, choices: &[KernelChoice], loads: &[Load<'_>]) -> Figures {
        let seconds: Vec<f64> = loads.iter().map(|load| median(&load.seconds).max(1e-12)).collect();
        let copy = CopyFigures {
            buffer_bytes: copied / 2,
            kernel_bytes_per_second: copied as f64 / seconds[0],
            driver_bytes_per_second: copied as f64 / seconds[1],
        };
        let figures = |((choice, load), &median_seconds): ((&KernelChoice, &Load<'_>), &f64)| {
            let bytes = self.tensors.iter().map(|&n| bytes_of(n, self.block_size, choice)).sum::<u64>();
            let bytes_per_second = bytes as f64 / median_seconds;
            KernelFigures {
                output: choice.output.to_string(),
                scales: scale_type_name(choice.scale_type),
                fast: choice.fast,
                bytes,
                median_seconds,
                min_seconds: load.seconds.iter().copied().fold(f64::INFINITY, f64::min),
                bytes_per_second,
                weights_per_second: self.tensors.iter().sum::<u64>() as f64 / median_seconds,
                of_copy: bytes_per_second / copy.kernel_bytes_per_second,
            }
        };
        let kernels = choices.iter().zip(&loads[2..]).zip(&seconds[2..]).map(figures).collect();
        let by_timestamps = loads[2..].iter().all(|load| load.by_timestamps);
        Figures { sets, timed_by: if by_timestamps { "timestamps" } else { "clock" }, copy, kernels }
    }
}

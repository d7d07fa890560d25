//! The kernels that decode codes and scales to floats.
//!
//! float32 outputs equal [`dequantize`](super::dequantize) bit for bit. 16-bit outputs are those
//! values, rounded to nearest, ties to even. Vulkan permits one exception: a driver may flush a
//! float32 below 2^-126 in magnitude (a scale or a product) to zero of the same sign. Mesa's
//! software Vulkan does not flush.
//!
//! No kernel uses subgroup operations, so no kernel depends on the subgroup size.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::codec::scales_constant;
use super::error::DequantError;
use super::output::Output;
use super::plan::{self, Chunk, Job, Window};
use super::weights::GpuWeights;
use crate::format::nf4::{self, CODES_PER_WORD, ScaleType};
use crate::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// Bytes of one write of a thread in a fast kernel, and number of writes.
const ITEM_BYTES: u64 = 16;
const ITEMS: u64 = 4;

/// Settings of a [`Dequantizer`](super::Dequantizer). Only tests change them.
#[doc(hidden)]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Setup {
    /// Threads per workgroup of the fast kernels. Of 64, 128 and 256, 64 was fastest.
    pub workgroup: u32,
    /// The fast kernels.
    pub fast: Fast,
}

/// Source of the fast kernels.
#[doc(hidden)]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Fast {
    /// The kernels of this crate, without runtime checks.
    Own,
    /// No fast kernels: the plain kernel does everything.
    Off,
    /// Other WGSL, with runtime checks.
    Other(String),
}

impl Default for Setup {
    fn default() -> Self {
        Self { workgroup: 64, fast: Fast::Own }
    }
}

impl Fast {
    fn shader(&self) -> Option<Shader> {
        match self {
            // SAFETY: `Kernels::record` checks the buffers' sizes and dispatches what `plan`
            // cuts, whose windows hold every index of a chunk; the loops end with their item
            // counts; the tables are written before the barrier. The shader is private to this
            // module.
            Self::Own => Some(unsafe { Shader::trusted("nf4_fast", FAST_SOURCE) }),
            Self::Off => None,
            Self::Other(source) => Some(Shader::checked("nf4_fast", source.clone())),
        }
    }
}

macro_rules! shaders {
    ($($file:literal),*) => { concat!($(include_str!(concat!("../../shaders/", $file, ".wgsl"))),*) };
}

const FAST_SOURCE: &str = shaders!("nf4_params", "nf4_bindings", "codec_nf4", "nf4_fast");
const PLAIN_SOURCE: &str = shaders!("nf4_params", "nf4_bindings", "nf4_plain");

/// Each output has both kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    Fast,
    Plain,
}

/// The dequantisation kernels of a device, without a verdict on them.
#[derive(Debug, Clone)]
pub(super) struct Kernels {
    gpu: Gpu,
    setup: Setup,
}

/// Parameters of a dispatch: `struct Params` of the shaders.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    words: u32,
    codes_first: u32,
    block_phase: u32,
    block_shift: u32,
    scales_first: u32,
    supers_first: u32,
    out_first: u32,
    zero: u32,
    codebook: [f32; 16],
}

impl Kernels {
    /// # Errors
    /// [`DequantError::Binding`] if the device cannot bind a chunk.
    pub(super) fn new(gpu: &Gpu, setup: Setup) -> Result<Self, DequantError> {
        let limit = gpu.limits().max_storage_buffer_binding_size;
        if limit < plan::MIN_BINDING {
            return Err(DequantError::Binding { limit, needed: plan::MIN_BINDING });
        }
        Ok(Self { gpu: gpu.clone(), setup })
    }

    /// The device.
    pub(super) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The settings of the kernels.
    pub(super) fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Everything that the result of a self-test depends on.
    pub(super) fn sources(&self) -> impl std::hash::Hash + '_ {
        (&self.setup, FAST_SOURCE, PLAIN_SOURCE)
    }

    /// As [`Dequantizer::record`](super::Dequantizer::record), with the kernel of `path`.
    pub(super) fn record(
        &self,
        path: Path,
        commands: &mut Commands,
        weights: &GpuWeights,
        range: Range<u64>,
        output: Output,
        out: &BufferRange,
    ) -> Result<(), DequantError> {
        let job = self.job(weights, range.clone(), output)?;
        let needed = output.bytes(range.end - range.start);
        if out.size < needed || !out.offset.is_multiple_of(plan::ALIGN) {
            return Err(DequantError::OutputRange { offset: out.offset, size: out.size, needed });
        }
        let (kernel, words_per_group) = self.kernel(path, output, weights.codec.scale_type())?;
        let codebook = weights.codec.codebook();
        let cut = |range: &BufferRange, window: Window| range.slice(window.offset, window.size);
        for chunk in job.chunks() {
            let parts = weights.codes.len() as u64;
            let missing = DequantError::Weights { what: "the number of parts", found: parts, expected: parts + 1 };
            let part = weights.codes.get(chunk.part).ok_or(missing)?;
            let bindings = [
                cut(part, chunk.codes),
                cut(&weights.scales, chunk.head),
                cut(&weights.scales, chunk.supers),
                cut(&weights.scales, chunk.scales),
                cut(out, chunk.out),
            ];
            let bytes = bindings.iter().map(|b| b.size).sum();
            let groups = self.gpu.grid(u64::from(chunk.words).div_ceil(words_per_group));
            commands.dispatch(&kernel, &bindings, bytemuck::bytes_of(&params(&chunk, &job, codebook)), groups, bytes);
        }
        Ok(())
    }

    /// Plans a valid call.
    fn job(&self, weights: &GpuWeights, range: Range<u64>, output: Output) -> Result<Job, DequantError> {
        let part_words = weights.part_words()?;
        let (elements, per_word) = (weights.elements, CODES_PER_WORD as u64);
        if !range.start.is_multiple_of(per_word) || range.start > range.end || range.end > elements {
            return Err(DequantError::Range { start: range.start, end: range.end, elements });
        }
        Ok(Job {
            words: range.start / per_word..range.end.div_ceil(per_word),
            block_words: u64::from(weights.block_size) / per_word,
            blocks: nf4::block_count(elements, weights.block_size),
            scale_type: weights.codec.scale_type(),
            part_words,
            out_bytes: output.word_bytes(),
            binding: self.gpu.limits().max_storage_buffer_binding_size,
        })
    }

    /// A kernel, and the number of words that one workgroup decodes.
    fn kernel(&self, path: Path, output: Output, scale_type: ScaleType) -> Result<(Kernel, u64), GpuError> {
        let scales = scales_constant(scale_type);
        let flag = |set: bool| f64::from(u8::from(set));
        let workgroup = self.setup.workgroup;
        match (self.setup.fast.shader(), path) {
            (Some(fast), Path::Fast) => {
                let spec = KernelSpec {
                    shader: fast,
                    entry: if output == Output::F32 { "to_f32" } else { "to_16" },
                    constants: vec![
                        ("WORKGROUP", workgroup.into()),
                        ("SCALES", scales),
                        ("BF16", flag(output == Output::Bf16)),
                    ],
                };
                let bytes = ITEM_BYTES * ITEMS * u64::from(workgroup);
                Ok((self.gpu.kernel(&spec)?, bytes / output.word_bytes()))
            }
            _ => {
                let spec = KernelSpec {
                    shader: Shader::checked("nf4_plain", PLAIN_SOURCE),
                    entry: "main",
                    constants: vec![("SCALES", scales), ("OUTPUT", f64::from(output as u8))],
                };
                Ok((self.gpu.kernel(&spec)?, 64))
            }
        }
    }
}

fn params(chunk: &Chunk, job: &Job, codebook: [f32; 16]) -> Params {
    Params {
        words: chunk.words,
        codes_first: chunk.codes_first,
        block_phase: chunk.block_phase,
        block_shift: job.block_words.ilog2(),
        scales_first: chunk.scales_first,
        supers_first: chunk.supers_first,
        out_first: chunk.out_first,
        zero: 0,
        codebook,
    }
}

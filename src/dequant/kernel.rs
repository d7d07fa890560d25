//! Decodes codes and scales to floats on the GPU.
//!
//! float32 outputs equal [`dequantize`](super::dequantize) bit for bit. 16-bit outputs are those
//! values, rounded to nearest, ties to even. Vulkan permits one exception: a driver may flush a
//! float32 below 2^-126 in magnitude (a scale or a product) to zero of the same sign. Mesa's
//! software Vulkan does not flush.
//!
//! No kernel uses subgroup operations, so no kernel depends on the subgroup size.

use std::fmt;
use std::ops::Range;

use bytemuck::{Pod, Zeroable};

use super::error::DequantError;
use super::plan::{self, Chunk, Job, Window};
use super::selftest::{self, Verdicts};
use crate::format::nf4::{self, CODEBOOK, CODES_PER_WORD, Nf4Tensor, ScaleType, Scales};
use crate::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// Output type of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Output {
    /// 4 bytes per element.
    F32,
    /// binary16, two per u32. Element `2 * i` is in the low half.
    F16,
    /// bfloat16, packed in the same way.
    Bf16,
}

impl Output {
    /// All output types.
    pub const ALL: [Self; 3] = [Self::F32, Self::F16, Self::Bf16];

    /// Bytes of one element.
    pub fn element_bytes(self) -> u64 {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Bytes of output for one word of codes.
    fn word_bytes(self) -> u64 {
        self.element_bytes() * CODES_PER_WORD as u64
    }

    /// Size of an output of `elements` in bytes. Kernels write whole words of codes, 8 elements
    /// each.
    pub fn bytes(self, elements: u64) -> u64 {
        elements.div_ceil(CODES_PER_WORD as u64).saturating_mul(self.word_bytes())
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        })
    }
}

/// A quantised tensor in GPU memory: the buffers of an [`Nf4Tensor`]. The offset of each range is a
/// multiple of 256 bytes.
#[derive(Debug, Clone)]
pub struct GpuWeights {
    /// The codes section in one range, or in several if it exceeds the largest buffer of the
    /// device. All ranges except the last have the same size, a multiple of 2048 bytes. So each of
    /// them ends at the end of a block, for every block size.
    pub codes: Vec<BufferRange>,
    /// The scales section as stored in the file (spec section 7.2). Its size may be any number, but
    /// the buffer must extend to the next multiple of 4: bindings are rounded up.
    pub scales: BufferRange,
    /// Storage type of the scales.
    pub scale_type: ScaleType,
    /// Elements per block, one of [`nf4::BLOCK_SIZES`].
    pub block_size: u32,
    /// Number of weights, without the padding of the last block.
    pub elements: u64,
}

/// The size of each part of the codes, except the last, is a multiple of this: the codes of the
/// largest block.
const PART_ALIGN: u64 = 2048;

impl GpuWeights {
    /// Copies one tensor to the device through the queue. For tests and small programs.
    ///
    /// # Errors
    /// [`GpuError::TooLarge`] if the scales exceed the largest buffer, [`GpuError::OutOfMemory`].
    pub fn upload(gpu: &Gpu, projection: &Nf4Tensor<'_>) -> Result<Self, GpuError> {
        let part = (gpu.limits().max_buffer_size / PART_ALIGN * PART_ALIGN).max(PART_ALIGN);
        let part = usize::try_from(part).unwrap_or(usize::MAX);
        let buffer = |bytes: &[u8]| {
            let buffer = gpu.storage_with("weights", bytes)?;
            Ok(BufferRange { buffer, offset: 0, size: bytes.len() as u64 })
        };
        Ok(Self {
            codes: projection.codes.chunks(part).map(buffer).collect::<Result<_, GpuError>>()?,
            scales: buffer(&payload(&projection.scales))?,
            scale_type: projection.scales.scale_type(),
            block_size: projection.block_size,
            elements: projection.elements,
        })
    }

    /// Checks all sizes. Returns the words in each part of the codes, except the last.
    pub(super) fn part_words(&self) -> Result<u64, DequantError> {
        let wrong = |what, found, expected| Err(DequantError::Weights { what, found, expected });
        if !nf4::BLOCK_SIZES.contains(&self.block_size) {
            return wrong("the block size", self.block_size.into(), nf4::DEFAULT_BLOCK_SIZE.into());
        }
        let scales = nf4::scales_len(nf4::block_count(self.elements, self.block_size), self.scale_type);
        if scales != Some(self.scales.size) {
            return wrong("the size of the scales", self.scales.size, scales.unwrap_or(u64::MAX));
        }
        let codes = nf4::codes_len(self.elements, self.block_size);
        let found = self.codes.iter().fold(0_u64, |sum, part| sum.saturating_add(part.size));
        if codes != Some(found) {
            return wrong("the size of the codes", found, codes.unwrap_or(u64::MAX));
        }
        let part = self.codes.first().map_or(PART_ALIGN, |part| part.size);
        if let [parts @ .., last] = self.codes.as_slice() {
            if let Some(uneven) = parts.iter().find(|p| p.size != part || !part.is_multiple_of(PART_ALIGN)) {
                return wrong("the size of a part of the codes", uneven.size, part.next_multiple_of(PART_ALIGN));
            }
            if last.size > part {
                return wrong("the size of the last part of the codes", last.size, part);
            }
        }
        if let Some(range) = self.codes.iter().chain([&self.scales]).find(|r| !r.offset.is_multiple_of(plan::ALIGN)) {
            return wrong("the offset of a range", range.offset, range.offset.next_multiple_of(plan::ALIGN));
        }
        Ok((part / 4).max(1))
    }
}

/// A scale table as stored in the file.
fn payload(scales: &Scales<'_>) -> Vec<u8> {
    match *scales {
        Scales::F32(bytes) | Scales::Bf16(bytes) => bytes.to_vec(),
        Scales::Dq8 { offset, map, super_scales, codes } => {
            [offset.to_le_bytes().as_slice(), map, super_scales, codes].concat()
        }
    }
}

/// Bytes of one write of a thread in a fast kernel, and number of writes.
const ITEM_BYTES: u64 = 16;
const ITEMS: u64 = 4;

/// Settings of a [`Dequantizer`]. Only tests change them.
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
            // SAFETY: `Dequantizer::record` checks the buffers' sizes and dispatches what `plan`
            // cuts, whose windows hold every index of a chunk; the loops end with their item
            // counts; the tables are written before the barrier. The shader is private to this
            // module.
            Self::Own => Some(unsafe { Shader::trusted("nf4_fast", FAST_SOURCE) }),
            Self::Off => None,
            Self::Other(source) => Some(Shader::checked("nf4_fast", source.clone())),
        }
    }
}

const FAST_SOURCE: &str = concat!(include_str!("../../shaders/codec_nf4.wgsl"), include_str!("../../shaders/nf4_fast.wgsl"));
const PLAIN_SOURCE: &str = include_str!("../../shaders/nf4_plain.wgsl");

/// The kernel for an output type and a scale type, and the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelChoice {
    /// Output type.
    pub output: Output,
    /// Scale type.
    pub scale_type: ScaleType,
    /// Whether the fast kernel is used.
    pub fast: bool,
    /// Why the fast kernel is not used.
    pub reason: Option<String>,
}

/// Each output has both kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    Fast,
    Plain,
}

/// The dequantisation kernels of a device.
#[derive(Debug, Clone)]
pub struct Dequantizer {
    gpu: Gpu,
    setup: Setup,
    verdicts: Verdicts,
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

impl Dequantizer {
    /// Compiles the kernels of `gpu` and tests each one against the CPU. If a fast kernel fails,
    /// the plain kernel replaces it. The results are stored for later runs on the same adapter and
    /// driver ([`Options::cache`](crate::gpu::Options::cache)).
    ///
    /// # Errors
    /// [`DequantError::Unfit`] if the plain kernel also fails; [`DequantError::Binding`],
    /// [`DequantError::Gpu`].
    pub fn new(gpu: &Gpu) -> Result<Self, DequantError> {
        Self::with(gpu, Setup::default())
    }

    /// As [`Dequantizer::new`], with other settings.
    #[doc(hidden)]
    pub fn with(gpu: &Gpu, setup: Setup) -> Result<Self, DequantError> {
        let limit = gpu.limits().max_storage_buffer_binding_size;
        if limit < plan::MIN_BINDING {
            return Err(DequantError::Binding { limit, needed: plan::MIN_BINDING });
        }
        let mut dequantizer = Self { gpu: gpu.clone(), setup, verdicts: Verdicts::default() };
        dequantizer.verdicts = selftest::recall_or_run(&dequantizer)?;
        Ok(dequantizer)
    }

    /// The kernel for each output type and scale type, and the reason.
    pub fn choices(&self) -> Vec<KernelChoice> {
        let choice = |(output, scale_type)| {
            let reason = self.verdicts.refusal(output, scale_type).map(str::to_owned);
            KernelChoice { output, scale_type, fast: reason.is_none(), reason }
        };
        selftest::every_kernel().map(choice).collect()
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

    /// Records the dequantisation of the elements in `range` into `out`. The start of `range` is a
    /// multiple of 8. `out` holds at least [`Output::bytes`] of the length of `range`, in another
    /// buffer than the weights. The rest of `out` is unchanged.
    ///
    /// # Errors
    /// [`DequantError::Weights`], [`DequantError::Range`], [`DequantError::OutputRange`]; nothing
    /// is then recorded. [`DequantError::Gpu`] if the kernel does not compile.
    pub fn record(
        &self,
        commands: &mut Commands,
        weights: &GpuWeights,
        range: Range<u64>,
        output: Output,
        out: &BufferRange,
    ) -> Result<(), DequantError> {
        let refused = self.verdicts.refusal(output, weights.scale_type).is_some();
        let path = if refused { Path::Plain } else { Path::Fast };
        self.record_on(path, commands, weights, range, output, out)
    }

    /// As [`Dequantizer::record`], with a given kernel.
    pub(super) fn record_on(
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
        let (kernel, words_per_group) = self.kernel(path, output, weights.scale_type)?;
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
            commands.dispatch(&kernel, &bindings, bytemuck::bytes_of(&params(&chunk, &job)), groups, bytes);
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
            scale_type: weights.scale_type,
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

    /// Decodes the elements in `range`, waits, and returns them as little-endian bytes. The start
    /// of `range` is a multiple of 8. For tests and small programs.
    ///
    /// # Errors
    /// As [`Dequantizer::record`]; any device error.
    pub fn read(&self, weights: &GpuWeights, range: Range<u64>, output: Output) -> Result<Vec<u8>, DequantError> {
        let per_buffer = self.gpu.limits().max_buffer_size / output.word_bytes() * CODES_PER_WORD as u64;
        let mut bytes = Vec::new();
        let mut at = range.start;
        loop {
            let end = range.end.min(at.saturating_add(per_buffer.max(1)));
            let count = end.saturating_sub(at);
            let out = BufferRange::whole(self.gpu.storage("floats", output.bytes(count))?);
            let mut commands = self.gpu.commands("dequantise");
            self.record(&mut commands, weights, at..end, output, &out)?;
            commands.submit()?;
            let found = self.gpu.read(&out)?;
            let wanted = (count * output.element_bytes()) as usize;
            bytes.extend_from_slice(found.get(..wanted).unwrap_or(&found));
            at = end;
            if at >= range.end {
                return Ok(bytes);
            }
        }
    }
}

/// The constant `SCALES` of the shaders.
pub(super) fn scales_constant(scale_type: ScaleType) -> f64 {
    match scale_type {
        ScaleType::F32 => 0.0,
        ScaleType::Bf16 => 1.0,
        ScaleType::Dq8 => 2.0,
    }
}

fn params(chunk: &Chunk, job: &Job) -> Params {
    Params {
        words: chunk.words,
        codes_first: chunk.codes_first,
        block_phase: chunk.block_phase,
        block_shift: job.block_words.ilog2(),
        scales_first: chunk.scales_first,
        supers_first: chunk.supers_first,
        out_first: chunk.out_first,
        zero: 0,
        codebook: CODEBOOK,
    }
}

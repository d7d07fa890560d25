//! Products of few rows with weights of whole vectors: the decode loop of generated texts, where
//! reading the weights is all of the work.
//!
//! A thread multiplies four columns, and reads 16 bytes of each at a time. The inputs pass through
//! workgroup memory. Several weights that share their inputs and a buffer, such as those of a
//! layer's q, k and v, are one dispatch. So are the norm before them, and the activation after gate
//! and up.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use std::borrow::Cow;

use bytemuck::{Pod, Zeroable};

use super::kernels::{flag, shaders};
use super::weight::{Elements, Stored, Weight, floats_constant};
use crate::dequant::GpuWeights;
use crate::dequant::operand::ALIGN;
use crate::format::FloatType;
use crate::format::nf4::{SUPER_BLOCK, ScaleType, Scales, block_count};
use crate::gpu::{BufferRange, Commands, Gpu, Kernel, KernelSpec, Shader};
use crate::ops::trial::Tried;
use crate::ops::{Mat, OpError};

#[cfg(test)]
mod tests;

/// Maximum rows.
pub const MAX_ROWS: u32 = 8;
/// Columns of a thread.
const QUAD: u32 = 4;
/// Threads per workgroup. It is small, so that every core gets its share of the workgroups.
const WORKGROUP: u32 = 128;
/// Threads that keep the memory of a large GPU busy, of a few loads each.
const TARGET_THREADS: u32 = 1 << 16;
/// Maximum threads per four columns, of all rows of a product.
const MAX_LANES: u32 = 64;
/// Maximum sums of all rows in workgroup memory.
const MAX_SUMS: u32 = 512;
/// Maximum vec4s of inputs that a thread loads ahead. As in the shader.
const MAX_AHEAD: u32 = 4;
/// Maximum weights of a product.
const MAX_WEIGHTS: usize = 3;

/// The shader files before and after the codec.
const WIDE: &str = shaders!("matmul_wide");
const QUANTIZED: &str = shaders!("matmul_wide_quantized");

/// What follows the sums of several weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Join {
    /// The outputs of each weight follow those of the weight before it.
    Concat,
    /// The outputs are silu(gate) * up of two weights, gate and up.
    Gated,
}

/// A product of few rows: `out = factor * (r * x W^T (+ bias)) (+ addend)`, with the factor r of a
/// norm.
#[derive(Debug, Clone, Copy)]
pub struct Wide<'a> {
    /// One to three weights with the same inputs, storage and factor.
    pub weights: &'a [&'a Weight<'a>],
    /// What becomes of their outputs.
    pub join: Join,
    /// The gamma [1, inputs] and the epsilon of an RMS norm of each row of x before the product.
    pub norm: Option<(&'a Mat, f32)>,
    /// [1, outputs], for a single weight.
    pub bias: Option<&'a Mat>,
    /// Added to the product; of the same shape, and not `out`.
    pub addend: Option<&'a Mat>,
}

impl<'a> Wide<'a> {
    /// The products with these weights, one after another.
    pub fn of(weights: &'a [&'a Weight<'a>]) -> Self {
        Self { weights, join: Join::Concat, norm: None, bias: None, addend: None }
    }
}

/// The properties that select a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Variant {
    pub stored: Stored,
    /// A power of two.
    pub rows: u32,
    /// Threads of four columns, a power of two.
    pub lanes: u32,
    /// Four columns per workgroup, a power of two.
    pub quads: u32,
    /// Rounds of chunks between two barriers.
    pub rounds: u32,
    /// Whether inputs are loaded a round ahead.
    pub ahead: bool,
    pub norm: bool,
    pub gated: bool,
}

impl Stored {
    /// Terms per vec4.
    pub(super) fn chunk(self) -> u32 {
        match self {
            Self::Quantized(_) => 32,
            Self::Raw(_) => 8,
        }
    }

    fn codebook(self) -> [f32; 16] {
        match self {
            Self::Quantized(codec) => codec.codebook(),
            Self::Raw(_) => [0.0; 16],
        }
    }
}

/// Parameters of a dispatch: `struct Params` of matmul_wide.wgsl.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    m: u32,
    n: u32,
    k: u32,
    chunks: u32,
    groups: u32,
    x_first: u32,
    x_row: u32,
    out_first: u32,
    out_row: u32,
    has_bias: u32,
    add: u32,
    block_bits: u32,
    scale: f32,
    epsilon: f32,
    zero: u32,
    pad: u32,
    places: [[u32; 4]; MAX_WEIGHTS],
    ends: [[u32; 4]; MAX_WEIGHTS],
    codebook: [f32; 16],
}

/// The bound weights of a product, and their places in the bindings.
#[derive(Debug)]
pub(super) struct Bound {
    stored: Stored,
    /// The vec4s, and the words of scales.
    bindings: [BufferRange; 2],
    block_bits: u32,
    places: [[u32; 4]; MAX_WEIGHTS],
    ends: [[u32; 4]; MAX_WEIGHTS],
}

impl Variant {
    /// The kernel for products of `rows` rows and `n` columns. Rows share the workgroup memory.
    pub fn new(stored: Stored, rows: u32, n: u32, norm: bool, gated: bool) -> Self {
        let rows = rows.next_power_of_two();
        // Lanes read neighbouring chunks. Fewer lanes read short pieces of many rows of a weight.
        let (min_lanes, rounds) = match stored {
            Stored::Quantized(_) => (16, 1),
            Stored::Raw(_) => (32, 4),
        };
        let max_lanes = MAX_LANES / rows.min(MAX_ROWS);
        // The power of two that is nearest to the wanted number.
        let wanted = (3 * TARGET_THREADS / 4 / n.div_ceil(QUAD).max(1)).max(1).next_power_of_two();
        let lanes = wanted.clamp(min_lanes.min(max_lanes), max_lanes);
        let quads = (WORKGROUP.min(MAX_SUMS / rows.min(MAX_ROWS)) / lanes).max(1);
        // Many workgroups hide these loads from each other, and have no registers to spare.
        let is_small = n.div_ceil(QUAD).saturating_mul(lanes) < TARGET_THREADS;
        let variant = Self { stored, rows, lanes, quads, rounds, ahead: false, norm, gated };
        Self { ahead: is_small && rows == 1 && variant.copies() <= MAX_AHEAD, ..variant }
    }

    /// vec4s of a row of inputs that a thread copies in a round.
    fn copies(self) -> u32 {
        (self.stored.chunk() / 4 * self.rounds).div_ceil(self.quads)
    }

    /// Columns per workgroup.
    pub fn columns(self) -> u32 {
        QUAD * self.quads
    }

    pub fn spec(self) -> KernelSpec {
        let sums = self.rows * self.quads * self.lanes;
        let slab_row = self.stored.chunk() / 4 * (self.lanes * self.rounds + 1);
        let mut constants = vec![
            ("M", self.rows.into()),
            ("LANES", self.lanes.into()),
            ("QUADS", self.quads.into()),
            ("ROUNDS", self.rounds.into()),
            ("NORM", flag(self.norm)),
            ("GATED", flag(self.gated)),
            ("SLAB_ROW", slab_row.into()),
            ("SHARED", sums.max(self.rows * slab_row).into()),
            ("SQUARES", if self.norm { sums.into() } else { 1.0 }),
            ("COPIES", self.copies().into()),
            ("AHEAD", flag(self.ahead)),
        ];
        let (name, source) = match self.stored {
            Stored::Quantized(codec) => {
                constants.extend(codec.joined_constants());
                ("matmul_wide_quantized", Cow::Owned([WIDE, codec.joined_source(), QUANTIZED].concat()))
            }
            Stored::Raw(float_type) => {
                constants.push(("FLOATS", floats_constant(float_type)));
                ("matmul_wide_raw", Cow::Borrowed(shaders!("matmul_wide", "matmul_wide_raw")))
            }
        };
        // SAFETY: `dispatch` binds weights that hold all rows of whole vec4s and the words of all
        // scales, `x`, `gamma`, `bias`, `addend` and `out` of the shapes of the product; rows and
        // columns are clamped to their numbers before loads and compared with them before stores;
        // vec4s of x are compared with their number; loops count up to `chunks` or to constants, or
        // halve; `SHARED` is the larger of its two uses; workgroup memory is written, with a
        // barrier after it, before it is read.
        let shader = unsafe { Shader::trusted(name, source) };
        KernelSpec { shader, entry: "main", constants }
    }
}

/// Describes the difference of a kernel from the CPU, if there is one.
pub(super) type Trial = fn(&WideKernels, Variant, &Kernel) -> Result<Option<String>, OpError>;

/// The kernels of a device, which are compiled and tested on first use.
#[derive(Debug)]
pub(super) struct WideKernels {
    gpu: Gpu,
    kernels: Tried<Variant>,
    trial: Trial,
}

impl WideKernels {
    pub fn new(gpu: &Gpu, kernels: Tried<Variant>, trial: Trial) -> Self {
        Self { gpu: gpu.clone(), kernels, trial }
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Records a product of few rows, or returns `false` if these weights, rows or matrices do not
    /// permit it.
    pub fn record(&self, commands: &mut Commands, x: &Mat, wide: &Wide<'_>, out: &Mat) -> Result<bool, OpError> {
        let Some(bound) = self.bind(x, wide)? else { return Ok(false) };
        let (rows, outputs) = (x.rows, outputs(wide.weights));
        let gated = wide.join == Join::Gated;
        let columns = if gated { outputs / 2 } else { outputs };
        out.check(OPERATION, rows, columns)?;
        wide.addend.map_or(Ok(()), |addend| addend.check(OPERATION, rows, columns))?;
        wide.bias.map_or(Ok(()), |bias| bias.check(OPERATION, 1, outputs))?;
        wide.norm.map_or(Ok(()), |(gamma, _)| gamma.check(OPERATION, 1, x.cols))?;
        if rows == 0 || outputs == 0 {
            return Ok(true);
        }
        let variant = Variant::new(bound.stored, rows, outputs, wide.norm.is_some(), gated);
        let kernel = self.kernels.get(variant, || variant.spec(), |kernel| (self.trial)(self, variant, kernel))?;
        self.dispatch(commands, &kernel, variant, x, wide, &bound, out);
        commands.add_operations(2 * u64::from(x.rows) * u64::from(outputs) * u64::from(x.cols));
        Ok(true)
    }

    /// Whether the product can be one dispatch, and its weights.
    pub fn bind(&self, x: &Mat, wide: &Wide<'_>) -> Result<Option<Bound>, OpError> {
        let Some(first) = wide.weights.first().filter(|_| wide.weights.len() <= MAX_WEIGHTS) else { return Ok(None) };
        let inputs = first.inputs();
        x.check(OPERATION, x.rows, inputs)?;
        let same = |w: &&Weight<'_>| w.inputs() == inputs && w.factor() == first.factor();
        let pair = wide.weights.len() == 2 && wide.weights.iter().all(|w| w.outputs() == first.outputs());
        if x.rows > MAX_ROWS
            || !wide.weights.iter().all(same)
            || (wide.join == Join::Gated && (!pair || wide.bias.is_some()))
            || (wide.bias.is_some() && wide.weights.len() > 1)
        {
            return Ok(None);
        }
        let binding = self.gpu.limits().max_storage_buffer_binding_size;
        wide.weights.iter().try_for_each(|w| w.check(OPERATION, binding))?;
        let mut parts = Vec::new();
        for weight in wide.weights {
            match Part::of(weight) {
                Some(part) => parts.push(part),
                None => return Ok(None),
            }
        }
        Ok(Bound::of(&parts, inputs, binding))
    }

    #[expect(clippy::too_many_arguments, reason = "what a dispatch consists of")]
    pub fn dispatch(
        &self,
        commands: &mut Commands,
        kernel: &Kernel,
        variant: Variant,
        x: &Mat,
        wide: &Wide<'_>,
        bound: &Bound,
        out: &Mat,
    ) {
        let n = outputs(wide.weights);
        let groups = u64::from(n.div_ceil(variant.columns()));
        let factor = wide.weights.first().map_or(1.0, |w| w.factor());
        let params = Params {
            m: x.rows,
            n,
            k: x.cols,
            chunks: x.cols / variant.stored.chunk(),
            groups: groups as u32,
            x_first: 0,
            x_row: x.cols / 4,
            out_first: 0,
            out_row: out.cols,
            has_bias: wide.bias.is_some().into(),
            add: wide.addend.is_some().into(),
            block_bits: bound.block_bits,
            scale: factor,
            epsilon: wide.norm.map_or(0.0, |(_, epsilon)| epsilon),
            zero: 0,
            pad: 0,
            places: bound.places,
            ends: bound.ends,
            codebook: bound.stored.codebook(),
        };
        let [weights, words] = &bound.bindings;
        let gamma = wide.norm.map_or(x, |(gamma, _)| gamma);
        let [bias, addend] = [wide.bias, wide.addend].map(|mat| mat.unwrap_or(x).range.clone());
        let bindings =
            [weights.clone(), words.clone(), x.range.clone(), gamma.range.clone(), bias, out.range.clone(), addend];
        let bytes = wide.weights.iter().map(|w| stored_bytes(w)).sum::<u64>() + x.range.size + out.range.size;
        commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), self.gpu.grid(groups), bytes);
    }
}

const OPERATION: &str = "x W^T of few rows";

/// Rows of all weights.
fn outputs(weights: &[&Weight<'_>]) -> u32 {
    weights.iter().fold(0, |sum, w| sum.saturating_add(w.outputs()))
}

/// Bytes of a weight, without its scales.
fn stored_bytes(weight: &Weight<'_>) -> u64 {
    let elements = u64::from(weight.outputs()) * u64::from(weight.inputs());
    match weight.elements() {
        Elements::Quantized(_) => elements / 2,
        Elements::Raw { float_type, .. } => elements * float_type.size() as u64,
    }
}

/// One weight: its ranges, and the places in them.
#[derive(Debug)]
struct Part {
    stored: Stored,
    block_size: u32,
    /// Rows, and the element at the start of the first.
    rows: u32,
    first: u64,
    /// All vec4s of the tensor.
    weights: BufferRange,
    scales: BufferRange,
    /// Words from the start of the scales to the scales, super-scales and head.
    words: [u64; 3],
}

impl Part {
    /// `None` if the weight has several parts, or other blocks or floats than the kernels.
    fn of(weight: &Weight<'_>) -> Option<Self> {
        let (rows, inputs) = (weight.outputs(), u64::from(weight.inputs()));
        let first = u64::from(weight.first_row()) * inputs;
        match *weight.elements() {
            Elements::Quantized(GpuWeights { codes, scales, codec, block_size, elements }) => {
                let [codes] = codes.as_slice() else { return None };
                let supers = block_count(*elements, *block_size).div_ceil(SUPER_BLOCK as u64);
                let head = Scales::DQ8_FIXED_LEN as u64 / 4;
                let words = if codec.scale_type() == ScaleType::Dq8 { [head + supers, head, 0] } else { [0; 3] };
                let (stored, weights, scales) = (Stored::Quantized(*codec), codes.clone(), scales.clone());
                Some(Self { stored, block_size: *block_size, rows, first, weights, scales, words })
            }
            Elements::Raw { float_type, parts } => {
                let [part] = parts else { return None };
                let stored = (float_type != FloatType::F32).then_some(Stored::Raw(float_type))?;
                let (weights, scales) = (part.clone(), part.clone());
                Some(Self { stored, block_size: 1, rows, first, weights, scales, words: [0; 3] })
            }
        }
    }

    /// Whether every row is whole vec4s.
    fn is_whole(&self, inputs: u32) -> bool {
        let chunk = self.stored.chunk();
        inputs > 0
            && inputs.is_multiple_of(chunk)
            && (self.block_size == 1 || self.block_size.is_multiple_of(chunk))
            && self.first + u64::from(self.rows) * u64::from(inputs) <= u32::MAX.into()
    }
}

impl Bound {
    fn of(parts: &[Part], inputs: u32, binding: u64) -> Option<Self> {
        let first = parts.first()?;
        let same = |part: &Part| part.stored == first.stored && part.block_size == first.block_size;
        if !parts.iter().all(|part| same(part) && part.is_whole(inputs)) {
            return None;
        }
        let bindings = [hull(parts.iter().map(|part| &part.weights))?, hull(parts.iter().map(|part| &part.scales))?];
        let [weights, words] = &bindings;
        if weights.size > binding || words.size > binding {
            return None;
        }
        let (mut places, mut ends, mut end) = ([[0; 4]; MAX_WEIGHTS], [[0; 4]; MAX_WEIGHTS], 0_u32);
        for ((place, end_of), part) in places.iter_mut().zip(&mut ends).zip(parts) {
            end = end.checked_add(part.rows)?;
            let vectors = (part.weights.offset - weights.offset) / 16 + part.first / u64::from(part.stored.chunk());
            let word = |at: u64| u32::try_from((part.scales.offset - words.offset) / 4 + at).ok();
            let [scales, supers, head] = part.words;
            *place = [u32::try_from(vectors).ok()?, word(scales)?, word(supers)?, word(head)?];
            *end_of = [end, part.first as u32, 0, 0];
        }
        // The columns of an absent weight are past the last.
        ends.iter_mut().skip(parts.len()).for_each(|absent| absent[0] = end);
        let block_bits = first.block_size.ilog2();
        Some(Self { stored: first.stored, bindings, block_bits, places, ends })
    }
}

/// The smallest range of whole words with all of these, at a valid binding offset, if they are in
/// one buffer. The buffer of scales extends to a whole word.
fn hull<'a>(mut ranges: impl Iterator<Item = &'a BufferRange>) -> Option<BufferRange> {
    let first = ranges.next()?;
    let (mut start, mut end) = (first.offset, first.offset + first.size);
    for range in ranges {
        if *range.buffer != *first.buffer {
            return None;
        }
        (start, end) = (start.min(range.offset), end.max(range.offset + range.size));
    }
    let offset = start / ALIGN * ALIGN;
    Some(BufferRange { buffer: first.buffer.clone(), offset, size: (end - offset).next_multiple_of(4) })
}

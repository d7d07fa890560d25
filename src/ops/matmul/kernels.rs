//! One dispatch of a product: its kernel, its workgroups and its parameters.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use std::borrow::Cow;

use bytemuck::{Pod, Zeroable};

use super::product::{Product, Target, View};
use super::rows::FewRows;
use super::weight::{Right, floats_constant};
use crate::dequant::Codec;
use crate::format::FloatType;
use crate::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};
use crate::ops::OpError;
use crate::ops::trial::Tried;

/// Terms in workgroup memory; `TK` in the shader.
pub(super) const TERMS: u32 = 16;
/// Number of workgroups from which on a product is not cut along its sums. It is a multiple of the
/// cores of a large GPU, so that idle cores in the last wave cost little.
const TARGET_WORKGROUPS: u64 = 2048;
/// Minimum terms per workgroup.
const MIN_TERMS: u32 = 256;
/// Scratch memory for the partial sums of one product, in bytes.
pub(super) const SCRATCH_BYTES: u64 = 64 << 20;
/// Threads per workgroup of the kernel that adds the partial sums.
const SUM_WORKGROUP: u64 = 256;

/// Threads per workgroup along n and m. Each thread has 8 x 8 sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Tile {
    pub x: u32,
    pub y: u32,
}

/// The first tile is the default. The others waste less if a side is short, such as the rank of an
/// adapter.
const TILES: [Tile; 3] = [Tile { x: 8, y: 16 }, Tile { x: 4, y: 16 }, Tile { x: 16, y: 4 }];

/// Up to this number of rows of the left operand, the tile of few rows has fewer idle threads.
const FEW_TILE_ROWS: u32 = 64;

impl Tile {
    fn constants(self) -> Vec<(&'static str, f64)> {
        let fours = |threads: u32| (TERMS * (2 * threads + 1)).into();
        vec![("TX", self.x.into()), ("TY", self.y.into()), ("A_FOURS", fours(self.y)), ("B_FOURS", fours(self.x))]
    }

    /// Workgroups that cover a matrix.
    pub fn groups(self, m: u32, n: u32) -> u64 {
        u64::from(m.div_ceil(8 * self.y)) * u64::from(n.div_ceil(8 * self.x))
    }

    /// The tile with the fewest unused sums.
    fn of(product: &Product) -> Self {
        let sums = |tile: &Self| tile.groups(product.m, product.n) * u64::from(tile.x * tile.y);
        match product.b {
            Right::Raw { float_type: FloatType::F32, .. } => TILES.into_iter().min_by_key(sums).unwrap_or(TILES[0]),
            // Frozen weights are large and are decoded again for each tile of rows.
            _ if product.m <= FEW_TILE_ROWS => TILES[2],
            _ => TILES[0],
        }
    }
}

/// The properties that select a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Variant {
    pub form: Form,
    pub b: RightKind,
}

/// The tiling of a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Form {
    Tiles { tile: Tile, a_by_term: bool, b_by_term: bool },
    Rows(FewRows),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum RightKind {
    Quantized { codec: Codec, whole_words: bool },
    Raw(FloatType),
}

impl Variant {
    fn of(product: &Product) -> Self {
        let b = match product.b {
            Right::Quantized { codec, whole_words, .. } => RightKind::Quantized { codec, whole_words },
            Right::Raw { float_type, .. } => RightKind::Raw(float_type),
        };
        let tiles = || Form::Tiles {
            tile: Tile::of(product),
            a_by_term: product.a.column == 1,
            b_by_term: product.b_strides.1 == 1,
        };
        Self { form: FewRows::of(product).map_or_else(tiles, Form::Rows), b }
    }

    fn spec(self) -> KernelSpec {
        let (mut constants, by_rows) = match self.form {
            Form::Rows(rows) => (rows.constants(), true),
            Form::Tiles { tile, a_by_term, b_by_term } => {
                let mut constants = tile.constants();
                constants.extend([("A_BY_TERM", flag(a_by_term)), ("B_BY_TERM", flag(b_by_term))]);
                (constants, false)
            }
        };
        let (name, source) = match self.b {
            RightKind::Quantized { codec, whole_words } => {
                constants.extend(codec.constants());
                let [start, end] = if by_rows { [ROWS, ROWS_QUANTIZED] } else { [TILED, QUANTIZED] };
                if !by_rows {
                    constants.push(("WHOLE", flag(whole_words)));
                }
                let name = if by_rows { "matmul_rows_quantized" } else { "matmul_quantized" };
                (name, Cow::Owned([start, codec.source(), end].concat()))
            }
            RightKind::Raw(float_type) => {
                constants.push(("FLOATS", floats_constant(float_type)));
                if by_rows { ("matmul_rows_raw", ROWS_RAW.into()) } else { ("matmul_raw", RAW.into()) }
            }
        };
        // SAFETY: `record` gets products whose views and operands contain all of their rows,
        // columns and terms; the shaders keep row, column and term of every access below their
        // numbers. Their loops count up to constants or to `k`, and a barrier separates the writes
        // and the reads of workgroup memory.
        let shader = unsafe { Shader::trusted(name, source) };
        KernelSpec { shader, entry: "main", constants }
    }
}

macro_rules! shaders {
    ($($file:literal),*) => { concat!($(include_str!(concat!("../../../shaders/", $file, ".wgsl"))),*) };
}

pub(super) use shaders;

const RAW: &str = shaders!("matmul_params", "matmul", "matmul_floats", "matmul_raw");
const ROWS_RAW: &str = shaders!("matmul_params", "matmul_rows", "matmul_floats", "matmul_rows_raw");
/// The shader files before and after the codec.
const TILED: &str = shaders!("matmul_params", "matmul");
const QUANTIZED: &str = shaders!("matmul_quantized");
const ROWS: &str = shaders!("matmul_params", "matmul_rows");
const ROWS_QUANTIZED: &str = shaders!("matmul_rows_quantized");

/// Parameters of a dispatch: `struct Params` of matmul_params.wgsl.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    m: u32,
    n: u32,
    k: u32,
    chunk: u32,
    groups: u32,
    a_first: u32,
    a_row: u32,
    a_term: u32,
    b_first: u32,
    b_column: u32,
    b_term: u32,
    out_first: u32,
    out_row: u32,
    out_chunk: u32,
    bias_first: u32,
    has_bias: u32,
    add: u32,
    scale: f32,
    block_first: u32,
    block_bits: u32,
    scales_first: u32,
    supers_first: u32,
    zero: u32,
    pad: u32,
    codebook: [f32; 16],
}

/// Parameters of a dispatch: `struct Params` of matmul_sum.wgsl.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct SumParams {
    count: u32,
    chunks: u32,
    n: u32,
    out_first: u32,
    out_row: u32,
    bias_first: u32,
    has_bias: u32,
    add: u32,
    scale: f32,
    out_column: u32,
    pad: [u32; 2],
}

pub(super) fn flag(set: bool) -> f64 {
    u8::from(set).into()
}

/// Describes the difference of a kernel from the CPU, if there is one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trials {
    pub product: fn(&Kernels, Variant, &Kernel) -> Result<Option<String>, OpError>,
    pub sum: fn(&Kernels, &Kernel) -> Result<Option<String>, OpError>,
}

/// The kernels of a device, which are compiled and tested on first use, and the scratch memory for
/// partial sums.
#[derive(Debug)]
pub(super) struct Kernels {
    gpu: Gpu,
    scratch: BufferRange,
    products: Tried<Variant>,
    sum: Tried<()>,
    trials: Trials,
}

impl Kernels {
    pub fn new(gpu: &Gpu, products: Tried<Variant>, sum: Tried<()>, trials: Trials) -> Result<Self, GpuError> {
        let limits = gpu.limits();
        let bytes = SCRATCH_BYTES.min(limits.max_storage_buffer_binding_size).min(limits.max_buffer_size) / 16 * 16;
        let scratch = BufferRange::whole(gpu.storage("sums of chunks", bytes)?);
        Ok(Self { gpu: gpu.clone(), scratch, products, sum, trials })
    }

    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Scratch memory for the partial sums.
    pub fn scratch(&self) -> &BufferRange {
        &self.scratch
    }

    fn kernel(&self, variant: Variant) -> Result<Kernel, OpError> {
        self.products.get(variant, || variant.spec(), |kernel| (self.trials.product)(self, variant, kernel))
    }

    pub fn sum_kernel(&self) -> Result<Kernel, OpError> {
        let spec = || {
            // SAFETY: `sum` passes a count for which `parts` holds all chunks and `out` all rows;
            // the loop counts the chunks.
            let shader = unsafe { Shader::trusted("matmul_sum", shaders!("matmul_sum")) };
            KernelSpec { shader, entry: "main", constants: Vec::new() }
        };
        self.sum.get((), spec, |kernel| (self.trials.sum)(self, kernel))
    }

    /// The number of terms per chunk, and the number of chunks. They depend only on the sizes, so
    /// the same product always has the same order of sums.
    fn chunks(&self, product: &Product, tile: Tile) -> (u32, u32) {
        let by_groups = TARGET_WORKGROUPS / tile.groups(product.m, product.n);
        let by_memory = self.scratch.size / (4 * u64::from(product.m) * u64::from(product.n));
        let by_terms = product.k.div_ceil(MIN_TERMS);
        let max_chunks = u64::from(by_terms).min(by_groups).min(by_memory).max(1) as u32;
        let chunk = product.k.div_ceil(max_chunks).next_multiple_of(TERMS);
        (chunk, product.k.div_ceil(chunk))
    }

    pub fn record(&self, commands: &mut Commands, product: &Product) -> Result<(), OpError> {
        if product.k == 0 {
            // A product without terms has no chunks.
            self.sum(commands, &self.sum_kernel()?, product.target(), 0);
            return Ok(());
        }
        let variant = Variant::of(product);
        let kernel = self.kernel(variant)?;
        let (groups, chunk, chunks) = match variant.form {
            Form::Rows(rows) => (rows.groups(product.n), product.k, 1),
            Form::Tiles { tile, .. } => {
                let (chunk, chunks) = self.chunks(product, tile);
                (tile.groups(product.m, product.n) * u64::from(chunks), chunk, chunks)
            }
        };
        if chunks == 1 {
            self.multiply(commands, &kernel, product, groups, chunk);
        } else {
            let out = View { range: self.scratch.clone(), first: 0, row: product.n, column: 1 };
            let parts = Product { out, scale: 1.0, add: false, bias: None, ..product.clone() };
            self.multiply(commands, &kernel, &parts, groups, chunk);
            self.sum(commands, &self.sum_kernel()?, product.target(), chunks);
        }
        commands.add_operations(2 * u64::from(product.m) * u64::from(product.n) * u64::from(product.k));
        Ok(())
    }

    /// Dispatches the sums of `chunk` terms each.
    pub fn multiply(&self, commands: &mut Commands, kernel: &Kernel, product: &Product, groups: u64, chunk: u32) {
        let a = &product.a;
        let [b0, b1, b2, b3] = product.b.bindings();
        let (bias, bias_first) = product.bias.clone().unwrap_or_else(|| (a.range.clone(), 0));
        let bindings = [b0, b1, b2, b3, a.range.clone(), bias, product.out.range.clone()];
        let bytes = bindings.iter().enumerate().filter(|(i, _)| *i != 5).map(|(_, b)| b.size).sum();
        let params = Params {
            m: product.m,
            n: product.n,
            k: product.k,
            chunk,
            groups: u32::try_from(groups).unwrap_or(u32::MAX),
            a_first: a.first,
            a_row: a.row,
            a_term: a.column,
            b_column: product.b_strides.0,
            b_term: product.b_strides.1,
            out_first: product.out.first,
            out_row: product.out.row,
            // Used only with several chunks. All of them are in the scratch memory.
            out_chunk: product.m.wrapping_mul(product.n),
            bias_first,
            has_bias: product.bias.is_some().into(),
            add: product.add.into(),
            scale: product.scale,
            ..Params::of(&product.b)
        };
        commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), self.gpu.grid(groups), bytes);
    }

    /// Dispatches the sum of `chunks` partial products in the scratch memory.
    pub fn sum(&self, commands: &mut Commands, kernel: &Kernel, target: Target<'_>, chunks: u32) {
        let count = target.m * target.n;
        let out = target.out;
        let (bias, bias_first) = target.bias.cloned().unwrap_or_else(|| (self.scratch.clone(), 0));
        // A binding must not be empty.
        let parts = self.scratch.slice(0, 4 * u64::from(count) * u64::from(chunks.max(1)));
        let bytes = parts.size + 4 * u64::from(count);
        let params = SumParams {
            count,
            chunks,
            n: target.n,
            out_first: out.first,
            out_row: out.row,
            bias_first,
            has_bias: target.bias.is_some().into(),
            add: target.add.into(),
            scale: target.scale,
            out_column: out.column,
            pad: [0; 2],
        };
        let groups = self.gpu.grid(u64::from(count).div_ceil(SUM_WORKGROUP));
        commands.dispatch(kernel, &[parts, bias, out.range.clone()], bytemuck::bytes_of(&params), groups, bytes);
    }
}

impl Params {
    /// The constants that depend only on the right operand.
    fn of(b: &Right) -> Self {
        match b {
            Right::Quantized { operand, codec, .. } => Self {
                b_first: b.first(),
                block_first: operand.block_first,
                block_bits: operand.block_bits,
                scales_first: operand.scales_first,
                supers_first: operand.supers_first,
                codebook: codec.codebook(),
                ..Self::zeroed()
            },
            Right::Raw { .. } => Self { b_first: b.first(), ..Self::zeroed() },
        }
    }
}

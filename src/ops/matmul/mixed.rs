//! Products on matrix units: f16 operands, float32 sums.
//!
//! Both operands are first written as f16 to scratch memory, in [panels](super::panels), and then
//! multiplied:
//!
//! ```text
//! activations, gradients  -> pack: a power of two for each row   -> left panels
//! weights, dense matrices -> extent: the largest magnitude       -> extents
//!                            decode: one power of two            -> right panels
//! panels                  -> product (-> sum of chunks)          -> out
//! ```
//!
//! The product with a frozen weight has the terms of its adapter, too ([`low_rank`]).
//!
//! Powers of two cost no precision, and keep every number in the range of f16: the largest
//! magnitude of a row becomes 512..1024. What is not finite stays so, and shows in the result.
//!
//! One right operand exists at a time, and one packed operand in each [`Place`]. A packed operand
//! that was overwritten is refused.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

mod gradient;
mod low_rank;
mod memory;
mod source;
mod terms;
#[cfg(test)]
mod tests;
pub(super) mod trial;
pub(super) mod used;

use std::sync::atomic::{AtomicU64, Ordering};

use bytemuck::{Pod, Zeroable};

use super::kernels::{Kernels, flag, shaders};
use super::panels::{Exponents, Panels, Size, Terms, WIDTH};
use super::product::{Target, View};
use super::weight::{Largest, Right, Stored, floats_constant};
use crate::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, MatrixUnits, Shader};
use crate::ops::trial::Tried;
use crate::ops::{OpError, mat_bytes};
pub(super) use gradient::MAX_RANK;
pub use memory::Place;
use memory::Scratch;
pub(super) use memory::{MIN_ROWS, Memory, rows_at_once};
use source::{Form, Tile};
pub use terms::{Adapter, Low};
pub(super) use terms::{LowRank, fits};

/// Rows from which on a packed operand serves products with dense matrices.
pub(super) const MIN_DENSE_ROWS: u32 = 1024;
/// Workgroups of `extent`; `EXTENTS` in the shader.
const EXTENTS: u32 = 256;
/// Rows and columns per workgroup of `decode`.
const DECODED_TILE: u32 = 128;
/// Cores of a large GPU. A product with few tiles is cut along its sums, so that each core has
/// work.
const CORES: u64 = 132;
/// Minimum terms of a cut product, and of one with few columns.
const MIN_TERMS: u32 = 512;
const MIN_NARROW_TERMS: u32 = 128;
/// Maximum cuts of a product, and of one with few columns.
const MAX_CUTS: u32 = 4;
const MAX_NARROW_CUTS: u32 = 32;
/// The places of the exponents of right operands: `right`, then x A^T or dy B, and B or A.
const EXPONENTS: u64 = 16;
const OTHER: u32 = 2;

/// Describes the difference of a kernel from the CPU, if there is one.
type Trial = fn(&Mixed, Kind, &Kernel) -> Result<Option<String>, OpError>;

/// The properties that select a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// Whether every row starts on a multiple of four elements.
    Pack {
        whole: bool,
    },
    Extent(Stored),
    /// The largest extent.
    Measure,
    /// Whether every row starts on a multiple of eight elements, and whether the largest magnitude
    /// is known.
    Decode {
        stored: Stored,
        whole: bool,
        known: bool,
    },
    Product(Form),
    LowRank,
    AlignExtent,
    Align,
}

/// One side of a product: a matrix in panels, and its first used element.
#[derive(Debug, Clone, Copy)]
pub(super) struct Side<'a> {
    pub panels: &'a Panels,
    /// The side of the matrix over which the sums run.
    pub terms: Terms,
    /// Row and column of the first element. Along the sums, it is a multiple of 32, else of 128.
    pub first: (u32, u32),
}

/// Products on the matrix units of a device.
#[derive(Debug)]
pub(super) struct Mixed {
    gpu: Gpu,
    units: MatrixUnits,
    kernels: Tried<Kind>,
    trial: Trial,
    memory: Memory,
    /// An i32 for each of [`EXPONENTS`].
    right_exponents: BufferRange,
    extents: BufferRange,
    /// Number of packed operands so far, and the present one of each place.
    packed: AtomicU64,
    present: [AtomicU64; 2],
    /// Number of products x A^T and dy B so far.
    lows: AtomicU64,
}

/// Parameters of a dispatch: `struct Params` of pack.wgsl.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct PackParams {
    rows: u32,
    cols: u32,
    first: u32,
    row: u32,
    panel_rows: u32,
    panel_cols: u32,
    pad: [u32; 2],
}

/// Parameters of a dispatch: `struct Params` of panels_decode.wgsl.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct DecodeParams {
    rows: u32,
    cols: u32,
    row: u32,
    items: u32,
    b_first: u32,
    block_first: u32,
    block_bits: u32,
    scales_first: u32,
    supers_first: u32,
    zero: u32,
    panel_rows: u32,
    panel_cols: u32,
    exponent_at: u32,
    extent_at: u32,
    pad: [u32; 2],
    codebook: [f32; 16],
}

/// Parameters of a dispatch: `struct Params` of the product's source.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct ProductParams {
    m: u32,
    n: u32,
    terms: u32,
    chunk: u32,
    groups: u32,
    left_first: u32,
    left_rows: u32,
    right_first: u32,
    right_rows: u32,
    left_exponent: u32,
    left_by_row: u32,
    out_first: u32,
    out_row: u32,
    out_chunk: u32,
    bias_first: u32,
    has_bias: u32,
    add: u32,
    scale: f32,
    low_first: u32,
    low_rows: u32,
    other_first: u32,
    other_rows: u32,
    rank: u32,
    ratio: f32,
}

impl Stored {
    fn shader(self) -> (&'static str, String, Vec<(&'static str, f64)>) {
        match self {
            Self::Quantized(codec) => {
                let source = [DECODE, codec.source(), shaders!("panels_quantized")].concat();
                ("panels_quantized", source, codec.constants().to_vec())
            }
            Self::Raw(float_type) => {
                let source = [DECODE, shaders!("matmul_floats", "panels_raw")].concat();
                ("panels_raw", source, vec![("FLOATS", floats_constant(float_type))])
            }
        }
    }
}

const DECODE: &str = shaders!("panels", "panels_decode");

impl Kind {
    fn spec(self, units: MatrixUnits) -> KernelSpec {
        // SAFETY: for all shaders, `Mixed` binds ranges that contain all rows and columns of its
        // parameters, and panels with their padding. The shaders keep rows and columns below their
        // numbers; tiles and rows of padding lie in the panels, whose sides are multiples of every
        // tile's. Loops count up to constants or parameters. Barriers separate the writes and the
        // reads of workgroup memory.
        let trusted = |name, source| unsafe { Shader::trusted(name, source) };
        match self {
            Self::Pack { whole } => KernelSpec {
                shader: trusted("pack", shaders!("panels", "pack").to_owned()),
                entry: "main",
                constants: vec![("WHOLE", flag(whole))],
            },
            Self::Extent(stored) => {
                let (name, source, constants) = stored.shader();
                KernelSpec { shader: trusted(name, source), entry: "extent", constants }
            }
            Self::Measure => KernelSpec {
                shader: trusted("panels_measure", shaders!("panels", "panels_measure").to_owned()),
                entry: "main",
                constants: Vec::new(),
            },
            Self::Decode { stored, whole, known } => {
                let (name, source, mut constants) = stored.shader();
                constants.extend([("WHOLE", flag(whole)), ("KNOWN", flag(known))]);
                KernelSpec { shader: trusted(name, source), entry: "decode", constants }
            }
            Self::Product(form) => KernelSpec {
                shader: trusted("matmul_panels", units.source(&form.source())),
                entry: "main",
                constants: Vec::new(),
            },
            Self::LowRank => KernelSpec {
                shader: trusted("low_rank", shaders!("panels", "low_rank").to_owned()),
                entry: "main",
                constants: Vec::new(),
            },
            Self::AlignExtent | Self::Align => KernelSpec {
                shader: trusted("align", shaders!("panels", "align").to_owned()),
                entry: if self == Self::Align { "align" } else { "extent" },
                constants: Vec::new(),
            },
        }
    }
}

impl Mixed {
    pub fn new(gpu: &Gpu, units: MatrixUnits, kernels: Tried<Kind>, trial: Trial) -> Result<Self, GpuError> {
        Ok(Self {
            gpu: gpu.clone(),
            units,
            kernels,
            trial,
            memory: Memory::default(),
            right_exponents: BufferRange::whole(gpu.storage("exponents", EXPONENTS)?),
            extents: BufferRange::whole(gpu.storage("extents", 4 * u64::from(EXTENTS))?),
            packed: AtomicU64::new(0),
            present: [AtomicU64::new(0), AtomicU64::new(0)],
            lows: AtomicU64::new(0),
        })
    }

    /// The memory of all operands.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    fn kernel(&self, kind: Kind) -> Result<Kernel, OpError> {
        self.kernels.get(kind, || kind.spec(self.units), |kernel| (self.trial)(self, kind, kernel))
    }

    /// The number of the present operand in a place.
    pub fn present(&self, place: Place) -> u64 {
        self.present[place as usize].load(Ordering::Relaxed)
    }

    /// Whether a matrix can be bound, in float32 and in panels. Others stay in float32.
    pub fn binds(&self, size: Size) -> bool {
        let bytes = size.bytes().max(mat_bytes(size.rows, size.cols));
        bytes <= self.gpu.limits().max_storage_buffer_binding_size
    }

    /// The memory for a matrix [tokens, terms] as the left operand, and its number. From now on it
    /// is the present operand of this place.
    pub fn panels_for(&self, tokens: u32, terms: u32, place: Place) -> Result<(Panels, u64), OpError> {
        let size = Size { rows: tokens, cols: terms };
        let range = self.memory.packed[place as usize].get(&self.gpu, size.bytes())?;
        let exponents_range = self.memory.exponents[place as usize].get(&self.gpu, size.exponent_bytes())?;
        let number = self.next_number();
        self.present[place as usize].store(number, Ordering::Relaxed);
        Ok((Panels { size, range, exponents: Exponents::ByRow, exponents_range }, number))
    }

    /// The number of another packed operand.
    pub fn next_number(&self) -> u64 {
        self.packed.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Records the packing of a matrix into the memory of [`Mixed::panels_for`]. Its elements in a
    /// row are adjacent.
    pub fn pack(&self, commands: &mut Commands, x: &View, panels: &Panels) -> Result<(), OpError> {
        let whole = [x.first, x.row, panels.size.cols].iter().all(|at| at.is_multiple_of(4));
        self.dispatch_pack(commands, &self.kernel(Kind::Pack { whole })?, x, panels);
        Ok(())
    }

    fn dispatch_pack(&self, commands: &mut Commands, kernel: &Kernel, x: &View, panels: &Panels) {
        let size = panels.size;
        let params = PackParams {
            rows: size.rows,
            cols: size.cols,
            first: x.first,
            row: x.row,
            panel_rows: size.padded_rows(),
            panel_cols: size.padded_cols(),
            pad: [0; 2],
        };
        let bindings = [x.range.clone(), x.range.clone(), panels.range.clone(), panels.exponents_range.clone()];
        let groups = self.gpu.grid(size.padded_rows().into());
        let bytes = 4 * u64::from(size.rows) * u64::from(size.cols) + panels.range.size;
        commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), groups, bytes);
    }

    /// Records the decoding of a matrix [rows, cols] as the right operand. Its rows are `row`
    /// elements apart. Unless its largest magnitude is known, it is measured first.
    pub fn decode(
        &self,
        commands: &mut Commands,
        b: &Right,
        size: Size,
        row: u32,
        largest: Option<&Largest>,
    ) -> Result<Panels, OpError> {
        self.decode_to(commands, (b, size, row), largest, (&self.memory.right, 0))
    }

    /// As [`Mixed::decode`], to this memory, with the exponent at this place.
    fn decode_to(
        &self,
        commands: &mut Commands,
        (b, size, row): (&Right, Size, u32),
        largest: Option<&Largest>,
        (scratch, exponent_at): (&Scratch, u32),
    ) -> Result<Panels, OpError> {
        let stored = b.stored();
        let whole = match b {
            Right::Quantized { whole_words, .. } => *whole_words,
            Right::Raw { first, .. } => [*first, row, size.cols].iter().all(|at| at.is_multiple_of(8)),
        };
        let decode = self.kernel(Kind::Decode { stored, whole, known: largest.is_some() })?;
        let range = scratch.get(&self.gpu, size.bytes())?;
        let panels = Panels { size, range, exponents: Exponents::One, exponents_range: self.right_exponents.clone() };
        if largest.is_none() {
            self.dispatch_extent(commands, &self.kernel(Kind::Extent(stored))?, b, (size, row));
        }
        self.dispatch_decode(commands, &decode, (b, row), &panels, largest, exponent_at);
        Ok(panels)
    }

    /// Records the measurement of a matrix: the larger one of its largest magnitude and of
    /// `largest` is then there.
    pub fn measure(
        &self,
        commands: &mut Commands,
        b: &Right,
        size: Size,
        row: u32,
        largest: &Largest,
    ) -> Result<(), OpError> {
        let (extent, measure) = (self.kernel(Kind::Extent(b.stored()))?, self.kernel(Kind::Measure)?);
        self.dispatch_extent(commands, &extent, b, (size, row));
        self.dispatch_measure(commands, &measure, largest);
        Ok(())
    }

    fn dispatch_extent(&self, commands: &mut Commands, kernel: &Kernel, b: &Right, (size, row): (Size, u32)) {
        let params = DecodeParams::of(b, size, row);
        let [b0, b1, b2, b3] = b.bindings();
        let bytes = if let Right::Quantized { .. } = b { b3.size } else { b0.size };
        let bindings = [b0, b1, b2, b3, self.extents.clone()];
        commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), [EXTENTS, 1, 1], bytes);
    }

    fn dispatch_measure(&self, commands: &mut Commands, kernel: &Kernel, largest: &Largest) {
        let bindings = [self.extents.clone(), largest.range.clone()];
        let params = [largest.at, 0, 0, 0];
        commands.dispatch(kernel, &bindings, bytemuck::cast_slice(&params), [1, 1, 1], self.extents.size);
    }

    fn dispatch_decode(
        &self,
        commands: &mut Commands,
        kernel: &Kernel,
        (b, row): (&Right, u32),
        panels: &Panels,
        largest: Option<&Largest>,
        exponent_at: u32,
    ) {
        let size = panels.size;
        let extent_at = largest.map_or(0, |largest| largest.at);
        let params = DecodeParams { exponent_at, extent_at, ..DecodeParams::of(b, size, row) };
        let [b0, b1, b2, b3] = b.bindings();
        let bytes = b0.size + panels.range.size;
        // `decode` does not use binding 4.
        let unused = self.extents.clone();
        let extents = largest.map_or(&self.extents, |largest| &largest.range).clone();
        let bindings = [b0, b1, b2, b3, unused, extents, panels.range.clone(), panels.exponents_range.clone()];
        let tiles = |padded: u32| u64::from(padded / DECODED_TILE);
        let groups = self.gpu.grid(tiles(size.padded_rows()) * tiles(size.padded_cols()));
        commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), groups, bytes);
    }

    /// Records `target.out = target.scale * (left right (+ adapter) (+ bias)) (+ out)`, with sums
    /// of `k` terms.
    pub fn multiply(
        &self,
        kernels: &Kernels,
        commands: &mut Commands,
        [left, right]: [Side<'_>; 2],
        k: u32,
        adapter: Option<LowRank<'_>>,
        target: Target<'_>,
    ) -> Result<(), OpError> {
        let form = Form::of(left, right, adapter.is_some(), target);
        if cuts(form.tile, target, k, kernels.scratch().size) == 1 {
            let kernel = self.kernel(Kind::Product(form))?;
            let chunk = k.next_multiple_of(WIDTH);
            self.dispatch_product(commands, &kernel, form.tile, [left, right], (k, chunk), adapter, target);
        } else {
            let out = View { range: kernels.scratch().clone(), first: 0, row: target.n, column: 1 };
            let parts = Target { out: &out, scale: 1.0, add: false, bias: None, ..target };
            let chunks = self.multiply_parts(kernels, commands, [left, right], k, adapter, parts)?;
            kernels.sum(commands, &kernels.sum_kernel()?, target, chunks);
        }
        commands.add_operations(2 * u64::from(target.m) * u64::from(target.n) * u64::from(k) / SPEED);
        Ok(())
    }

    /// Records the sums of `k` terms in chunks, which lie one after another in `parts.out`. Returns
    /// the number of chunks.
    fn multiply_parts(
        &self,
        kernels: &Kernels,
        commands: &mut Commands,
        [left, right]: [Side<'_>; 2],
        k: u32,
        adapter: Option<LowRank<'_>>,
        parts: Target<'_>,
    ) -> Result<u32, OpError> {
        let form = Form::of(left, right, adapter.is_some(), parts);
        let kernel = self.kernel(Kind::Product(form))?;
        let chunk = k.div_ceil(cuts(form.tile, parts, k, kernels.scratch().size)).next_multiple_of(WIDTH);
        self.dispatch_product(commands, &kernel, form.tile, [left, right], (k, chunk), adapter, parts);
        // Rounding up may need fewer chunks.
        Ok(k.div_ceil(chunk))
    }

    /// Dispatches the sums of `k` terms, in chunks of `chunk`. The first one has the adapter.
    #[expect(clippy::too_many_arguments, reason = "operands, and how")]
    fn dispatch_product(
        &self,
        commands: &mut Commands,
        kernel: &Kernel,
        tile: Tile,
        [left, right]: [Side<'_>; 2],
        (k, chunk): (u32, u32),
        adapter: Option<LowRank<'_>>,
        target: Target<'_>,
    ) {
        let groups = tile.groups(target.m, target.n) * u64::from(k.div_ceil(chunk));
        let (bias, bias_first) = target.bias.cloned().unwrap_or_else(|| (left.panels.exponents_range.clone(), 0));
        let by_row = left.terms == Terms::Columns;
        let params = ProductParams {
            m: target.m,
            n: target.n,
            terms: k.next_multiple_of(WIDTH),
            chunk,
            groups: u32::try_from(groups).unwrap_or(u32::MAX),
            left_first: left.start(),
            left_rows: left.panels.size.padded_rows(),
            right_first: right.start(),
            right_rows: right.panels.size.padded_rows(),
            left_exponent: if by_row { left.first.0 } else { 0 },
            left_by_row: by_row.into(),
            out_first: target.out.first,
            out_row: target.out.row,
            // Used only with several chunks. All of them are in the scratch memory.
            out_chunk: target.m.wrapping_mul(target.n),
            bias_first,
            has_bias: target.bias.is_some().into(),
            add: target.add.into(),
            scale: target.scale,
            low_first: left.first.0 * (WIDTH / 8),
            low_rows: adapter.map_or(0, |adapter| adapter.low.size.padded_rows()),
            other_first: 0,
            other_rows: adapter.map_or(0, |adapter| adapter.other.size.padded_rows()),
            rank: adapter.map_or(0, |adapter| adapter.low.size.cols),
            ratio: adapter.map_or(1.0, |adapter| adapter.ratio),
        };
        let mut bindings = vec![
            left.panels.range.clone(),
            right.panels.range.clone(),
            left.panels.exponents_range.clone(),
            right.panels.exponents_range.clone(),
            bias,
            target.out.range.clone(),
        ];
        let bytes = left.panels.range.size + right.panels.range.size + target.out.range.size;
        bindings.extend(adapter.iter().flat_map(|adapter| [adapter.low.range.clone(), adapter.other.range.clone()]));
        commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), self.gpu.grid(groups), bytes);
    }
}

/// Operations of matrix units in the time of one in float32, at least: a list of commands is cut by
/// its operations.
const SPEED: u64 = 4;

/// The number of cuts along the sums. It depends only on the sizes, so the same product always has
/// the same order of sums.
fn cuts(tile: Tile, target: Target<'_>, k: u32, scratch: u64) -> u32 {
    let tiles = tile.groups(target.m, target.n);
    let by_memory = scratch / (4 * u64::from(target.m) * u64::from(target.n));
    let [max_cuts, min_terms] =
        if tile == Tile::LARGE { [MAX_CUTS, MIN_TERMS] } else { [MAX_NARROW_CUTS, MIN_NARROW_TERMS] };
    let max = u64::from(k.div_ceil(min_terms).min(max_cuts)).min(by_memory).max(1) as u32;
    // Time in units of a tenth of the time in which each core computes one term of two tiles. One
    // tile alone takes six tenths of it. The sum of the chunks reads and writes each element again.
    let time = |cuts: &u32| {
        let of_core = (tiles * u64::from(*cuts)).div_ceil(CORES);
        let products = (of_core / 2 * 10 + of_core % 2 * 6) * u64::from(k.div_ceil(*cuts));
        let sums = if *cuts == 1 { 0 } else { 1500 + u64::from(*cuts) * tiles * u64::from(tile.n) / 10 };
        products + sums
    };
    (1..=max).min_by_key(time).unwrap_or(1)
}

impl Form {
    /// The form for a product.
    fn of(left: Side<'_>, right: Side<'_>, adapted: bool, target: Target<'_>) -> Self {
        let fours = [target.n, target.out.first, target.out.row].iter().all(|at| at.is_multiple_of(4));
        Self { tile: Tile::of(target.n), left: left.terms, right: right.terms, adapted, fours }
    }
}

impl Side<'_> {
    /// The index of the 16 bytes that start with its first element.
    fn start(&self) -> u32 {
        let (row, column) = self.first;
        (column / WIDTH * self.panels.size.padded_rows() + row) * (WIDTH / 8)
    }
}

impl DecodeParams {
    fn of(b: &Right, size: Size, row: u32) -> Self {
        let elements = size.rows.saturating_sub(1) * row + size.cols;
        let shape = Self {
            rows: size.rows,
            cols: size.cols,
            row,
            items: elements,
            b_first: b.first(),
            panel_rows: size.padded_rows(),
            panel_cols: size.padded_cols(),
            ..Self::zeroed()
        };
        match b {
            Right::Raw { .. } => shape,
            Right::Quantized { operand, codec, .. } => Self {
                items: ((operand.block_first + elements - 1) >> operand.block_bits) + 1,
                block_first: operand.block_first,
                block_bits: operand.block_bits,
                scales_first: operand.scales_first,
                supers_first: operand.supers_first,
                codebook: codec.codebook(),
                ..shape
            },
        }
    }
}

//! Gathers rows of frozen tensors as float32: rows of an embedding table, and whole small tensors
//! (norms, biases). The kernels decode quantised tensors on the fly.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use std::borrow::Cow;

use bytemuck::{Pod, Zeroable};

use super::matmul::weight::{Elements, Rectangle, Right, Stored, Weight, floats_constant};
use super::pieces::{Piece, ROWS, pieces};
use super::trial::{Tried, difference, stored};
use super::{Mat, OpError};
use crate::dequant::sample::Random;
use crate::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// Threads per workgroup, one element per thread.
const WORKGROUP: u64 = 256;
/// Maximum row length.
const WIDEST: u64 = 1 << 29;

impl Stored {
    /// The kernel that gathers rows of such a table.
    fn gather(self) -> KernelSpec {
        let (name, source, constants) = match self {
            Self::Quantized(codec) => {
                let source = [GATHER, codec.source(), QUANTIZED].concat();
                ("gather_quantized", Cow::Owned(source), codec.constants().to_vec())
            }
            Self::Raw(float_type) => ("gather_raw", RAW.into(), vec![("FLOATS", floats_constant(float_type))]),
        };
        // SAFETY: `dispatch` binds a window with all of its elements, at most 2^30, an id for every
        // token of a piece, and their rows of at most 2^29 floats together. The only loop fills the
        // tables of a codec, before the barrier that precedes their use.
        let shader = unsafe { Shader::trusted(name, source) };
        KernelSpec { shader, entry: "gather", constants }
    }
}

macro_rules! shader {
    ($file:literal) => {
        include_str!(concat!("../../shaders/", $file, ".wgsl"))
    };
}

const RAW: &str = concat!(shader!("gather"), shader!("gather_raw"));
/// The shader files before and after the codec.
const GATHER: &str = shader!("gather");
const QUANTIZED: &str = shader!("gather_quantized");

/// Copies rows of a frozen tensor to float32, bit for bit as on the CPU.
#[derive(Debug)]
pub struct Gather {
    gpu: Gpu,
    kernels: Tried<Stored>,
    /// The id 0.
    zero: BufferRange,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tokens: u32,
    width: u32,
    rows: u32,
    count: u32,
    first_row: u32,
    first_column: u32,
    poison: u32,
    first: u32,
    block_first: u32,
    block_bits: u32,
    scales_first: u32,
    supers_first: u32,
    zero: u32,
    pad: [u32; 3],
    codebook: [f32; 16],
}

impl Gather {
    /// Compiles the kernels for `gpu`.
    ///
    /// # Errors
    /// [`GpuError::OutOfMemory`].
    pub fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        Self::with(gpu, Tried::new(gpu))
    }

    fn with(gpu: &Gpu, kernels: Tried<Stored>) -> Result<Self, GpuError> {
        let zero = BufferRange { buffer: gpu.storage_with("id", &[0; 4])?, offset: 0, size: 4 };
        Ok(Self { gpu: gpu.clone(), kernels, zero })
    }

    /// Records the embedding of tokens: row `ids[t]` of `table` [vocabulary, hidden] to row t of
    /// `out` [tokens, hidden]. `ids` holds one u32 per token. The caller checks ids against the
    /// vocabulary, to name the wrong token. Here, an id past the table gives a row of NaN, so that
    /// the error stays visible.
    ///
    /// # Errors
    /// [`OpError::Shape`], [`OpError::Weights`]; [`OpError::Unfit`] if the kernel gives wrong
    /// values on this device.
    pub fn embed(&self, commands: &mut Commands, table: &Weight<'_>, ids: &BufferRange, out: &Mat) -> Result<(), OpError> {
        let expected = 4 * u64::from(out.rows);
        if ids.size < expected {
            let (what, found) = ("the size of the ids", ids.size);
            return Err(OpError::Shape { operation: "gather", what, expected, found });
        }
        out.check("gather", out.rows, table.inputs())?;
        self.dispatch(commands, table, ids, out)
    }

    /// Records the copy of a whole tensor (a norm or a bias) to `out`, which has the same number of
    /// elements.
    ///
    /// # Errors
    /// As [`Gather::embed`].
    pub fn to_f32(&self, commands: &mut Commands, elements: Elements<'_>, out: &Mat) -> Result<(), OpError> {
        let cols = u32::try_from(out.elements()).unwrap_or(u32::MAX);
        let flat = Mat { range: out.range.clone(), rows: 1, cols };
        flat.check("gather", 1, cols)?;
        self.dispatch(commands, &Weight::new(elements, 1, cols), &self.zero, &flat)
    }

    fn dispatch(&self, commands: &mut Commands, table: &Weight<'_>, ids: &BufferRange, out: &Mat) -> Result<(), OpError> {
        let width = u64::from(table.inputs());
        if width > WIDEST {
            return Err(OpError::Shape { operation: "gather", what: "the row's length", expected: WIDEST, found: width });
        }
        let windows = table.pieces("gather", self.gpu.limits().max_storage_buffer_binding_size)?;
        for piece in pieces(&self.gpu, out.rows.into(), 4 * width, ROWS)? {
            for (number, (rectangle, window)) in windows.iter().enumerate() {
                let kind = window.stored();
                let kernel = self.kernels.get(kind, || kind.gather(), |kernel| self.trial(kind, kernel))?;
                let out = piece.of(&out.range, 4 * width);
                let params = Params { poison: (number == 0).into(), ..Params::of(table, piece, rectangle, window) };
                let (bytes, groups) = (2 * out.size, self.gpu.grid((out.size / 4).div_ceil(WORKGROUP)));
                let [b0, b1, b2, b3] = window.bindings();
                let bindings = [b0, b1, b2, b3, piece.of(ids, 4), out];
                commands.dispatch(&kernel, &bindings, bytemuck::bytes_of(&params), groups, bytes);
            }
        }
        Ok(())
    }

    /// Tests a kernel on a small table. Describes the difference from the CPU, if there is one. One
    /// id is past the table.
    fn trial(&self, kind: Stored, kernel: &Kernel) -> Result<Option<String>, OpError> {
        const SIZE: [u32; 2] = [401, 21];
        let [rows, cols] = SIZE;
        let (quantized, parts, values);
        let elements = match kind {
            Stored::Quantized(codec) => {
                (quantized, values) = codec.sample(&self.gpu, u64::from(rows * cols))?;
                Elements::Quantized(&quantized)
            }
            Stored::Raw(float_type) => {
                let mut random = Random::default();
                let floats: Vec<f32> = (0..rows * cols).map(|_| random.uniform()).collect();
                let (bytes, widened) = stored(float_type, &floats);
                values = widened.into_owned();
                let buffer = self.gpu.storage_with("trial", &bytes)?;
                parts = [BufferRange { buffer, offset: 0, size: bytes.len() as u64 }];
                Elements::Raw { float_type, parts: &parts }
            }
        };
        let ids: Vec<u32> = (0..24).map(|i| if i == 7 { rows } else { (i * 173 + 400) % rows }).collect();
        let out = Mat::new(&self.gpu, "trial", ids.len() as u32, cols)?;
        let ids_range = BufferRange::whole(self.gpu.storage_with("trial", bytemuck::cast_slice(&ids))?);
        let mut commands = self.gpu.commands("a test of a gather");
        let table = Weight::new(elements, rows, cols);
        let piece = Piece { first: 0, count: out.rows };
        for (rectangle, window) in table.pieces("a trial", self.gpu.limits().max_storage_buffer_binding_size)? {
            let params = Params { poison: 1, ..Params::of(&table, piece, &rectangle, &window) };
            let [b0, b1, b2, b3] = window.bindings();
            let bindings = [b0, b1, b2, b3, ids_range.clone(), out.range.clone()];
            let groups = self.gpu.grid(out.elements().div_ceil(WORKGROUP));
            commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), groups, out.range.size);
        }
        commands.submit()?;
        let element = |&id: &u32, column: u32| values.get((id * cols + column) as usize).map_or(f64::NAN, |&x| x.into());
        let expected = ids.iter().flat_map(|id| (0..cols).map(move |column| (element(id, column), 0.0)));
        Ok(difference(&out.read(&self.gpu)?, expected))
    }
}

impl Params {
    /// Dispatches the rows of `piece`, from the part of `table` in `window`.
    fn of(table: &Weight<'_>, piece: Piece, rectangle: &Rectangle, window: &Right) -> Self {
        let Rectangle { rows, columns } = rectangle;
        let count = (rows.end - rows.start).saturating_mul(columns.end - columns.start);
        let common = Self {
            tokens: piece.count,
            width: table.inputs(),
            rows: table.outputs(),
            // At most 2^30, the limit of a binding.
            count,
            first_row: rows.start,
            first_column: columns.start,
            first: window.first(),
            ..Self::zeroed()
        };
        match window {
            Right::Quantized { operand, codec, .. } => Self {
                block_first: operand.block_first,
                block_bits: operand.block_bits,
                scales_first: operand.scales_first,
                supers_first: operand.supers_first,
                codebook: codec.codebook(),
                ..common
            },
            Right::Raw { .. } => common,
        }
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::dequant::{Codec, Dequantizer, Fast, GpuWeights, Output, Setup, dequantize};
    use crate::format::FloatType;
    use crate::format::nf4::{self, Nf4Tensor, ScaleType, Scales};
    use crate::ops::testing::{assert_untouched, gpu, gpu_with, poisoned, random};

    const TYPES: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::Bf16];

    const SCALES: [ScaleType; 3] = [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8];

    /// A raw table in parts of `part` bytes, and its values.
    fn table(gpu: &Gpu, float_type: FloatType, values: &[f32], part: usize) -> (Vec<BufferRange>, Vec<f32>) {
        let (bytes, values) = stored(float_type, values);
        let range = |bytes: &[u8]| {
            let buffer = gpu.storage_with("table", bytes).unwrap();
            BufferRange { buffer, offset: 0, size: bytes.len() as u64 }
        };
        (bytes.chunks(part).map(range).collect(), values.into_owned())
    }

    /// A quantised table, and its values as the CPU decodes them.
    fn quantized(gpu: &Gpu, elements: u32, block_size: u32, scale_type: ScaleType) -> (GpuWeights, Vec<f32>) {
        let blocks = nf4::block_count(elements.into(), block_size);
        let codes_len = nf4::codes_len(elements.into(), block_size).unwrap() as usize;
        let codes: Vec<u8> = random(7, codes_len).into_iter().map(|x| (x.abs() * 255.9) as u8).collect();
        let floats = |seed, count: u64| random(seed, count as usize).into_iter().flat_map(f32::to_le_bytes);
        let payload: Vec<u8> = match scale_type {
            ScaleType::F32 => floats(8, blocks).collect(),
            ScaleType::Bf16 => stored(FloatType::Bf16, &random(8, blocks as usize)).0,
            ScaleType::Dq8 => {
                let codes = random(9, blocks as usize).into_iter().map(|x| (x.abs() * 255.9) as u8);
                floats(10, 1 + 256 + blocks.div_ceil(256)).chain(codes).collect()
            }
        };
        let scales = Scales::from_payload(&payload, scale_type, blocks as usize).unwrap();
        let projection = Nf4Tensor { codes: &codes, scales, block_size, elements: elements.into() };
        let mut values = vec![0.0; elements as usize];
        dequantize(&projection, 0, &mut values).unwrap();
        (GpuWeights::upload(gpu, &projection).unwrap(), values)
    }

    fn ids(rows: u32, tokens: u32) -> Vec<u32> {
        let id = |x: f32| (((x + 1.0) / 2.0 * rows as f32) as u32).min(rows - 1);
        let mut ids: Vec<u32> = random(3, tokens as usize).into_iter().map(id).collect();
        ids[0] = rows - 1;
        ids
    }

    /// Compares the rows of `elements` with `values`, bit for bit.
    fn check_rows(gpu: &Gpu, what: &str, elements: Elements<'_>, values: &[f32], [rows, cols]: [u32; 2], tokens: u32) {
        let ids = ids(rows, tokens);
        let range = BufferRange::whole(gpu.storage_with("ids", bytemuck::cast_slice(&ids)).unwrap());
        let out = poisoned(gpu, tokens, cols);
        let mut commands = gpu.commands("embed");
        let table = Weight::new(elements, rows, cols);
        Gather::new(gpu).unwrap().embed(&mut commands, &table, &range, &out).unwrap();
        commands.submit().unwrap();
        assert_untouched(gpu, &out);
        let row = |&id: &u32| values[(id * cols) as usize..((id + 1) * cols) as usize].to_vec();
        let expected: Vec<f32> = ids.iter().flat_map(row).collect();
        assert!(out.read(gpu).unwrap() == expected, "{what}, {rows} x {cols}, {tokens} tokens");
    }

    fn check(gpu: &Gpu, shape: [u32; 2], tokens: u32, part: usize) {
        for float_type in TYPES {
            let (parts, values) = table(gpu, float_type, &random(1, (shape[0] * shape[1]) as usize), part);
            let what = format!("{float_type:?} in parts of {part}");
            check_rows(gpu, &what, Elements::Raw { float_type, parts: &parts }, &values, shape, tokens);
        }
    }

    fn check_quantized(gpu: &Gpu, shape: [u32; 2], tokens: u32, block_size: u32) {
        for scale_type in SCALES {
            let (weights, values) = quantized(gpu, shape[0] * shape[1], block_size, scale_type);
            let what = format!("{scale_type:?} in blocks of {block_size}");
            check_rows(gpu, &what, Elements::Quantized(&weights), &values, shape, tokens);
        }
    }

    #[test]
    fn embeds() {
        let Some(gpu) = gpu() else { return };
        for (shape, tokens) in [([1, 1], 1), ([7, 65], 9), ([1000, 3], 65), ([33, 1000], 7), ([9, 3], 70_000)] {
            check(&gpu, shape, tokens, 1 << 30);
        }
    }

    #[test]
    fn embeds_quantised_tables_of_every_kind() {
        let Some(gpu) = gpu() else { return };
        let shapes = [([1, 1], 1), ([7, 65], 9), ([1000, 37], 65), ([33, 1000], 7), ([9, 3], 70_000), ([520, 64], 33)];
        for (i, (shape, tokens)) in shapes.into_iter().enumerate() {
            check_quantized(&gpu, shape, tokens, nf4::BLOCK_SIZES[i]);
        }
    }

    /// The sample of a codec is what the kernels are compared with.
    #[test]
    fn decoders_take_the_codebook_of_the_codec() {
        let Some(gpu) = gpu() else { return };
        for fast in [Fast::Own, Fast::Off] {
            let kernels = Dequantizer::with(&gpu, Setup { fast, ..Setup::default() }).unwrap();
            for codec in SCALES.map(Codec::Linear).into_iter().chain(Codec::ALL) {
                let (weights, values) = codec.sample(&gpu, 1000).unwrap();
                let bytes = kernels.read(&weights, 0..1000, Output::F32).unwrap();
                assert!(bytes == values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>(), "{codec:?}");
            }
        }
    }

    #[test]
    fn embeds_tables_of_a_second_codec() {
        let Some(gpu) = gpu() else { return };
        for scale_type in SCALES {
            let (weights, values) = Codec::Linear(scale_type).sample(&gpu, 33 * 100).unwrap();
            check_rows(&gpu, "linear codes", Elements::Quantized(&weights), &values, [33, 100], 9);
        }
    }

    #[test]
    fn quantised_tables_of_many_parts_windows_and_groups() {
        let limits = |options: &mut crate::gpu::Options| {
            options.max_binding = Some(1 << 14);
            options.max_buffer = Some(1 << 15);
            options.max_groups = Some(7);
        };
        let Some(gpu) = gpu_with(limits) else { return };
        // Windows and parts end inside rows.
        check_quantized(&gpu, [301, 777], 5, 32);
        check_quantized(&gpu, [3000, 40], 129, 4096);
    }

    #[test]
    fn a_wrong_kernel_is_named_before_its_first_use() {
        let Some(gpu) = gpu() else { return };
        let refusal = |elements: Elements<'_>, patch: [&'static str; 2]| {
            let gather = Gather::with(&gpu, Tried::patched(&gpu, patch)).unwrap();
            let out = Mat::new(&gpu, "out", 1, 64).unwrap();
            let error = gather.to_f32(&mut gpu.commands("a wrong kernel"), elements, &out).unwrap_err();
            assert!(matches!(error, OpError::Unfit { .. }), "{error}");
            error.to_string()
        };
        let device = gpu.adapter().to_string();
        for float_type in TYPES {
            let (parts, _) = table(&gpu, float_type, &random(1, 64), 1 << 20);
            let text =
                refusal(Elements::Raw { float_type, parts: &parts }, ["let i = params.first + at", "let i = at + at"]);
            assert!(text.contains("gather_raw:gather") && text.contains(&device), "{text}");
        }
        for scale_type in SCALES {
            let (weights, _) = quantized(&gpu, 64, 32, scale_type);
            let text = refusal(Elements::Quantized(&weights), ["4u * (at & 7u)", "4u * (at & 3u)"]);
            assert!(text.contains("gather_quantized:gather") && text.contains(&device), "{text}");
        }
    }

    #[test]
    fn more_groups_than_a_dimension_has() {
        let Some(gpu) = gpu_with(|options| options.max_groups = Some(7)) else { return };
        check(&gpu, [33, 101], 77, 1 << 30);
    }

    #[test]
    fn parts_and_bindings_may_cut_rows() {
        let Some(gpu) = gpu() else { return };
        for part in [256, 260, 1024, 4000] {
            check(&gpu, [7, 333], 9, part);
        }
        // A table of one row is longer than any window.
        let Some(gpu) = gpu_with(|options| options.max_binding = Some(1 << 15)) else { return };
        check(&gpu, [301, 77], 129, 1 << 30);
        check(&gpu, [301, 77], 129, 40_000);
    }

    #[test]
    fn an_id_past_the_table_gives_nan_and_nothing_else() {
        let Some(gpu) = gpu() else { return };
        let (parts, values) = table(&gpu, FloatType::Bf16, &random(1, 3 * 200), 256);
        for wrong in [3, u32::MAX] {
            let range = BufferRange::whole(gpu.storage_with("ids", bytemuck::cast_slice(&[2, wrong, 0])).unwrap());
            let out = Mat::from_slice(&gpu, "out", 3, 200, &[5.0; 600]).unwrap();
            let mut commands = gpu.commands("embed");
            let tensor = Weight::new(Elements::Raw { float_type: FloatType::Bf16, parts: &parts }, 3, 200);
            Gather::new(&gpu).unwrap().embed(&mut commands, &tensor, &range, &out).unwrap();
            commands.submit().unwrap();
            let found = out.read(&gpu).unwrap();
            assert_eq!((&found[..200], &found[400..]), (&values[400..], &values[..200]));
            assert!(found[200..400].iter().all(|x| x.is_nan()));
        }
    }

    #[test]
    fn an_id_past_a_quantised_table_gives_nan_and_nothing_else() {
        let Some(gpu) = gpu() else { return };
        let (weights, values) = quantized(&gpu, 3 * 200, 32, ScaleType::Dq8);
        for wrong in [3, u32::MAX] {
            let range = BufferRange::whole(gpu.storage_with("ids", bytemuck::cast_slice(&[2, wrong, 0])).unwrap());
            let out = poisoned(&gpu, 3, 200);
            let mut commands = gpu.commands("embed");
            let table = Weight::new(Elements::Quantized(&weights), 3, 200);
            Gather::new(&gpu).unwrap().embed(&mut commands, &table, &range, &out).unwrap();
            commands.submit().unwrap();
            assert_untouched(&gpu, &out);
            let found = out.read(&gpu).unwrap();
            assert_eq!((&found[..200], &found[400..]), (&values[400..], &values[..200]));
            assert!(found[200..400].iter().all(|x| x.is_nan()));
        }
    }

    /// The float32 bits of the whole tensor.
    fn converted(gpu: &Gpu, float_type: FloatType, bytes: &[u8], elements: u32) -> Vec<u32> {
        let buffer = gpu.storage_with("norm", bytes).unwrap();
        let parts = [BufferRange { buffer, offset: 0, size: bytes.len() as u64 }];
        let out = poisoned(gpu, 1, elements);
        let mut commands = gpu.commands("to_f32");
        let tensor = Elements::Raw { float_type, parts: &parts };
        Gather::new(gpu).unwrap().to_f32(&mut commands, tensor, &out).unwrap();
        commands.submit().unwrap();
        out.read(gpu).unwrap().into_iter().map(f32::to_bits).collect()
    }

    #[test]
    fn every_16_bit_float_is_converted_exactly() {
        let Some(gpu) = gpu() else { return };
        let all: Vec<u16> = (0..=u16::MAX).collect();
        let found = converted(&gpu, FloatType::Bf16, bytemuck::cast_slice(&all), 1 << 16);
        assert!(found.iter().zip(&all).all(|(&found, &bits)| found == u32::from(bits) << 16));
        let found = converted(&gpu, FloatType::F16, bytemuck::cast_slice(&all), 1 << 16);
        for (&found, &bits) in found.iter().zip(&all) {
            let expected = f16::from_bits(bits);
            match expected.is_nan() {
                true => assert!(f32::from_bits(found).is_nan(), "{bits:#x}"),
                false => assert_eq!(found, expected.to_f32().to_bits(), "{bits:#x}"),
            }
        }
    }

    #[test]
    fn odd_sizes_are_converted_whole() {
        let Some(gpu) = gpu() else { return };
        for (float_type, count) in TYPES.into_iter().flat_map(|t| [1_u16, 7, 65, 1001].map(|n| (t, n))) {
            let floats = random(1, count.into());
            let (bytes, values) = stored(float_type, &floats);
            let found = converted(&gpu, float_type, &bytes, count.into());
            assert_eq!(found, values.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn sizes_must_agree() {
        let Some(gpu) = gpu() else { return };
        let gather = Gather::new(&gpu).unwrap();
        let (parts, _) = table(&gpu, FloatType::Bf16, &random(1, 12), 1 << 20);
        let raw = |float_type, parts| Elements::Raw { float_type, parts };
        let bf16 = raw(FloatType::Bf16, &parts);
        let ids = BufferRange::whole(gpu.storage("ids", 16).unwrap());
        let mut commands = gpu.commands("embed");
        let mut refused = |elements, rows, ids: &BufferRange, cols| {
            let table = Weight::new(elements, rows, 4);
            let result = gather.embed(&mut commands, &table, ids, &poisoned(&gpu, 4, cols));
            assert!(matches!(result, Err(OpError::Shape { operation: "gather", .. })), "{result:?}");
        };
        refused(bf16, 4, &ids, 4);
        refused(raw(FloatType::F32, &parts), 3, &ids, 4);
        refused(bf16, 3, &ids.slice(0, 12), 4);
        refused(bf16, 3, &ids, 5);
        let short = [BufferRange { size: 22, ..parts[0].clone() }];
        refused(raw(FloatType::Bf16, &short), 3, &ids, 4);
        let (weights, _) = quantized(&gpu, 12, 32, ScaleType::F32);
        refused(Elements::Quantized(&weights), 4, &ids, 4);
        let result = gather.to_f32(&mut commands, bf16, &poisoned(&gpu, 1, 13));
        assert!(matches!(result, Err(OpError::Shape { expected: 13, .. })), "{result:?}");
    }
}

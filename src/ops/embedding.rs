//! Frozen tensors in their own float type: rows of an embedding table, and small ones (norms, biases) whole, as float32.

use bytemuck::{Pod, Zeroable};

use super::pieces::{Piece, ROWS, pieces};
use super::{Mat, OpError};
use crate::dequant::stream::StreamedTensor;
use crate::format::FloatType;
use crate::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// Threads of a workgroup, an element each.
const WORKGROUP: u64 = 256;
/// Elements in one window of a table: keeps indices within 32 bits.
const WINDOW: u64 = 1 << 30;
/// Bytes that bindings start on multiples of.
const ALIGN: u64 = 256;
/// The longest row.
const WIDEST: u64 = 1 << 29;

/// A tensor [rows, cols] in GPU memory.
#[derive(Debug, Clone, Copy)]
pub struct RawTensor<'a> {
    /// Type of the elements.
    pub float_type: FloatType,
    /// Little-endian elements, row-major, cut anywhere between two elements. A part starts on a multiple of 256 bytes, and its
    /// buffer reaches to the next multiple of 4 after its end.
    pub parts: &'a [BufferRange],
    /// Rows: the vocabulary.
    pub rows: u32,
    /// Elements of a row.
    pub cols: u32,
}

/// Consecutive elements of a tensor, in one binding.
#[derive(Debug, Clone)]
struct Window {
    /// The first element, within the tensor.
    first: u64,
    count: u64,
    range: BufferRange,
}

impl<'a> RawTensor<'a> {
    /// A tensor of one dimension (a single row) or two, as the layer stream has it.
    ///
    /// # Errors
    /// [`OpError::Shape`] for one of more dimensions, or with one past 2^32.
    pub fn of(tensor: &'a StreamedTensor) -> Result<Self, OpError> {
        let dim = |dim: u64| {
            let (expected, what) = (u32::MAX.into(), "a dimension of the tensor");
            u32::try_from(dim).map_err(|_| OpError::Shape { operation: "gather", what, expected, found: dim })
        };
        let (rows, cols) = match *tensor.shape.dims() {
            [cols] => (1, dim(cols)?),
            [rows, cols] => (dim(rows)?, dim(cols)?),
            ref dims => {
                let (what, found) = ("the number of dimensions", dims.len() as u64);
                return Err(OpError::Shape { operation: "gather", what, expected: 2, found });
            }
        };
        Ok(Self { float_type: tensor.float_type, parts: &tensor.parts, rows, cols })
    }

    /// The tensor in windows that can be bound.
    fn windows(&self, limit: u64) -> Result<Vec<Window>, OpError> {
        let shape = |what, expected, found| OpError::Shape { operation: "gather", what, expected, found };
        let size = self.float_type.size() as u64;
        let most = (limit / ALIGN * ALIGN).min(WINDOW * size);
        let mut windows = Vec::new();
        let mut first = 0;
        for part in self.parts {
            if !part.size.is_multiple_of(size) {
                return Err(shape("the size of a part", part.size.next_multiple_of(size), part.size));
            }
            let mut at = 0;
            while at < part.size && most > 0 {
                let bytes = most.min(part.size - at);
                let range = part.slice(at, bytes.next_multiple_of(4));
                windows.push(Window { first, count: bytes / size, range });
                first += bytes / size;
                at += bytes;
            }
        }
        let elements = u64::from(self.rows) * u64::from(self.cols);
        if first == elements { Ok(windows) } else { Err(shape("the number of elements", elements, first)) }
    }
}

/// Copies what is asked of a frozen tensor to float32, exactly.
#[derive(Debug, Clone)]
pub struct Gather {
    gpu: Gpu,
    kernels: [Kernel; 3],
    /// The id 0.
    zero: BufferRange,
}

/// `struct Params` of the shader.
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
    pad: u32,
}

impl Gather {
    /// The kernels of `gpu`.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::KernelLimit`], [`GpuError::OutOfMemory`].
    pub fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        // SAFETY: `dispatch` binds a window with all of its elements, at most 2^30, an id for every token of a piece, and their rows
        // of at most 2^29 floats together; there are no loops and no workgroup memory.
        let shader = unsafe { Shader::trusted("gather", include_str!("../../shaders/gather.wgsl")) };
        let kernel = |float_type: u32| {
            let constants = vec![("TYPE", float_type.into())];
            gpu.kernel(&KernelSpec { shader: shader.clone(), entry: "gather", constants })
        };
        let zero = BufferRange { buffer: gpu.storage_with("id", &[0; 4])?, offset: 0, size: 4 };
        Ok(Self { gpu: gpu.clone(), kernels: [kernel(0)?, kernel(1)?, kernel(2)?], zero })
    }

    /// Records the embedding of tokens: row `ids[t]` of `table` [vocabulary, hidden] to row t of `out` [tokens, hidden]. `ids` holds a
    /// u32 for each token. Who makes them holds them against the vocabulary, which names the token that is wrong; here, an id past
    /// the table gives a row of NaN, so that the error is not lost.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn embed(
        &self,
        commands: &mut Commands,
        table: &RawTensor<'_>,
        ids: &BufferRange,
        out: &Mat,
    ) -> Result<(), OpError> {
        let expected = 4 * u64::from(out.rows);
        if ids.size < expected {
            let (what, found) = ("the size of the ids", ids.size);
            return Err(OpError::Shape { operation: "gather", what, expected, found });
        }
        out.check("gather", out.rows, table.cols)?;
        self.dispatch(commands, table, ids, out)
    }

    /// Records the copy of a whole tensor to `out`, which has as many elements: norms, biases.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn to_f32(&self, commands: &mut Commands, tensor: &RawTensor<'_>, out: &Mat) -> Result<(), OpError> {
        let elements = u64::from(tensor.rows) * u64::from(tensor.cols);
        let cols = u32::try_from(elements).unwrap_or(u32::MAX);
        let flat = Mat { range: out.range.clone(), rows: 1, cols: out.rows.saturating_mul(out.cols) };
        flat.check("gather", 1, cols)?;
        self.dispatch(commands, &RawTensor { rows: 1, cols, ..*tensor }, &self.zero, &flat)
    }

    fn dispatch(&self, commands: &mut Commands, table: &RawTensor<'_>, ids: &BufferRange, out: &Mat) -> Result<(), OpError> {
        let width = u64::from(table.cols);
        if width > WIDEST {
            return Err(OpError::Shape { operation: "gather", what: "the row's length", expected: WIDEST, found: width });
        }
        let [f32, f16, bf16] = &self.kernels;
        let kernel = match table.float_type {
            FloatType::F32 => f32,
            FloatType::F16 => f16,
            FloatType::Bf16 => bf16,
        };
        let windows = table.windows(self.gpu.limits().max_storage_buffer_binding_size)?;
        for piece in pieces(&self.gpu, out.rows.into(), 4 * width, ROWS)? {
            for window in &windows {
                let out = piece.of(&out.range, 4 * width);
                let params = params(table, piece, window);
                let (bytes, groups) = (2 * out.size, self.gpu.grid((out.size / 4).div_ceil(WORKGROUP)));
                let bindings = [piece.of(ids, 4), window.range.clone(), out];
                commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), groups, bytes);
            }
        }
        Ok(())
    }
}

fn params(table: &RawTensor<'_>, piece: Piece, window: &Window) -> Params {
    let width = u64::from(table.cols).max(1);
    Params {
        tokens: piece.count,
        width: table.cols,
        rows: table.rows,
        // At most 2^30.
        count: window.count as u32,
        // Below the table's rows and width.
        first_row: (window.first / width) as u32,
        first_column: (window.first % width) as u32,
        poison: (window.first == 0).into(),
        pad: 0,
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;
    use crate::format::{Role, Shape};
    use crate::ops::testing::{assert_untouched, gpu, gpu_with, poisoned, random};

    const TYPES: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::Bf16];

    /// A value as the type stores it, and as float32 again.
    fn stored(float_type: FloatType, x: f32) -> (Vec<u8>, f32) {
        match float_type {
            FloatType::F32 => (x.to_le_bytes().to_vec(), x),
            FloatType::F16 => (f16::from_f32(x).to_le_bytes().to_vec(), f16::from_f32(x).to_f32()),
            FloatType::Bf16 => (bf16::from_f32(x).to_le_bytes().to_vec(), bf16::from_f32(x).to_f32()),
        }
    }

    /// A table in parts of `part` bytes, and its values.
    fn table(gpu: &Gpu, float_type: FloatType, values: &[f32], part: usize) -> (Vec<BufferRange>, Vec<f32>) {
        let (bytes, values): (Vec<_>, Vec<_>) = values.iter().map(|&x| stored(float_type, x)).unzip();
        let range = |bytes: &[u8]| {
            let buffer = gpu.storage_with("table", bytes).unwrap();
            BufferRange { buffer, offset: 0, size: bytes.len() as u64 }
        };
        (bytes.concat().chunks(part).map(range).collect(), values)
    }

    fn ids(rows: u32, tokens: u32) -> Vec<u32> {
        let id = |x: f32| (((x + 1.0) / 2.0 * rows as f32) as u32).min(rows - 1);
        let mut ids: Vec<u32> = random(3, tokens as usize).into_iter().map(id).collect();
        ids[0] = rows - 1;
        ids
    }

    fn check(gpu: &Gpu, [rows, cols]: [u32; 2], tokens: u32, part: usize) {
        for float_type in TYPES {
            let (parts, values) = table(gpu, float_type, &random(1, (rows * cols) as usize), part);
            let ids = ids(rows, tokens);
            let range = BufferRange::whole(gpu.storage_with("ids", bytemuck::cast_slice(&ids)).unwrap());
            let out = poisoned(gpu, tokens, cols);
            let mut commands = gpu.commands("embed");
            let tensor = RawTensor { float_type, parts: &parts, rows, cols };
            Gather::new(gpu).unwrap().embed(&mut commands, &tensor, &range, &out).unwrap();
            commands.submit().unwrap();
            assert_untouched(gpu, &out);
            let row = |&id: &u32| values[(id * cols) as usize..((id + 1) * cols) as usize].to_vec();
            let expected: Vec<f32> = ids.iter().flat_map(row).collect();
            assert!(out.read(gpu).unwrap() == expected, "{float_type:?}, {rows} x {cols}, {tokens} tokens, parts of {part}");
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
            let tensor = RawTensor { float_type: FloatType::Bf16, parts: &parts, rows: 3, cols: 200 };
            Gather::new(&gpu).unwrap().embed(&mut commands, &tensor, &range, &out).unwrap();
            commands.submit().unwrap();
            let found = out.read(&gpu).unwrap();
            assert_eq!((&found[..200], &found[400..]), (&values[400..], &values[..200]));
            assert!(found[200..400].iter().all(|x| x.is_nan()));
        }
    }

    /// Bits of the whole tensor as float32.
    fn converted(gpu: &Gpu, float_type: FloatType, bytes: &[u8], elements: u32) -> Vec<u32> {
        let buffer = gpu.storage_with("norm", bytes).unwrap();
        let parts = [BufferRange { buffer, offset: 0, size: bytes.len() as u64 }];
        let out = poisoned(gpu, 1, elements);
        let mut commands = gpu.commands("to_f32");
        let tensor = RawTensor { float_type, parts: &parts, rows: elements, cols: 1 };
        Gather::new(gpu).unwrap().to_f32(&mut commands, &tensor, &out).unwrap();
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
            let (bytes, values): (Vec<_>, Vec<_>) =
                random(1, count.into()).into_iter().map(|x| stored(float_type, x)).unzip();
            let found = converted(&gpu, float_type, &bytes.concat(), count.into());
            assert_eq!(found, values.into_iter().map(f32::to_bits).collect::<Vec<_>>());
        }
    }

    #[test]
    fn streamed_tensors_have_one_dimension_or_two() {
        let dims_of = |dims: &[u64]| {
            let shape = Shape::new(dims).unwrap();
            let float_type = FloatType::F16;
            let tensor = StreamedTensor {
                name: String::new(),
                role: Role::InputNorm,
                expert: None,
                shape,
                float_type,
                parts: Vec::new(),
            };
            RawTensor::of(&tensor).map(|raw| [raw.rows, raw.cols]).map_err(|e| e.to_string())
        };
        assert_eq!(dims_of(&[7]), Ok([1, 7]));
        assert_eq!(dims_of(&[7, 5]), Ok([7, 5]));
        assert!(dims_of(&[7, 5, 3]).unwrap_err().contains("the number of dimensions is 3"));
        assert!(dims_of(&[1 << 32]).unwrap_err().contains("a dimension of the tensor is 4294967296"));
    }

    #[test]
    fn sizes_must_agree() {
        let Some(gpu) = gpu() else { return };
        let gather = Gather::new(&gpu).unwrap();
        let (parts, _) = table(&gpu, FloatType::Bf16, &random(1, 12), 1 << 20);
        let tensor = RawTensor { float_type: FloatType::Bf16, parts: &parts, rows: 3, cols: 4 };
        let ids = BufferRange::whole(gpu.storage("ids", 16).unwrap());
        let mut commands = gpu.commands("embed");
        let mut refused = |tensor: RawTensor<'_>, ids: &BufferRange, cols| {
            let result = gather.embed(&mut commands, &tensor, ids, &poisoned(&gpu, 4, cols));
            assert!(matches!(result, Err(OpError::Shape { operation: "gather", .. })), "{result:?}");
        };
        refused(RawTensor { rows: 4, ..tensor }, &ids, 4);
        refused(RawTensor { float_type: FloatType::F32, ..tensor }, &ids, 4);
        refused(tensor, &ids.slice(0, 12), 4);
        refused(tensor, &ids, 5);
        let odd = [BufferRange { size: 23, ..parts[0].clone() }];
        refused(RawTensor { parts: &odd, ..tensor }, &ids, 4);
        let result = gather.to_f32(&mut commands, &tensor, &poisoned(&gpu, 1, 11));
        assert!(matches!(result, Err(OpError::Shape { expected: 12, found: 11, .. })), "{result:?}");
    }
}

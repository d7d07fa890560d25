//! Root-mean-square normalisation, packed.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::super::mixed::Place;
use super::super::{Matmul, Packed, PackedMemory};
use super::{NORM, bindings, groups_of_tiles};
use crate::gpu::{Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};
use crate::ops::{Mat, OpError};

/// Rows of at most this width are summed by fewer threads, as in `RmsNorm`.
const NARROW: u32 = 256;
/// Rows of a workgroup that measures them; `ROWS` in the shader.
const ROWS: u32 = 8;

/// `RmsNorm::forward`, and the packing of its result.
#[derive(Debug, Clone)]
pub struct PackedNorm {
    pub(super) gpu: Gpu,
    measure: Kernel,
    measure_narrow: Kernel,
    write: Kernel,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    rows: u32,
    cols: u32,
    padded_rows: u32,
    padded_cols: u32,
    epsilon: f32,
    pad: [u32; 3],
}

impl PackedNorm {
    /// The kernels, before they are compared with the CPU.
    pub(super) fn untried(gpu: &Gpu, [measure, measure_narrow, write]: &[KernelSpec; 3]) -> Result<Self, GpuError> {
        Ok(Self {
            gpu: gpu.clone(),
            measure: gpu.kernel(measure)?,
            measure_narrow: gpu.kernel(measure_narrow)?,
            write: gpu.kernel(write)?,
        })
    }

    pub(super) fn specs() -> [KernelSpec; 3] {
        // SAFETY: `dispatch` binds `rows * cols` floats of `x`, whose columns are in groups of
        // four, `cols` of `gamma`, a factor for each row, and panels with their padding. Rows and
        // columns past the last one are not read. Tiles lie in the panels, whose sides are
        // multiples of their side. Barriers separate the writes and the reads of workgroup memory.
        let shader = unsafe { Shader::trusted("norm_panels", NORM) };
        let spec = |entry, narrow| KernelSpec { shader: shader.clone(), entry, constants: vec![("NARROW", narrow)] };
        [spec("measure", 0.0), spec("measure", 1.0), spec("write", 0.0)]
    }

    /// Records y = x * r * gamma as `RmsNorm::forward` does, and returns y, packed to `place` as
    /// [`Matmul::pack`] does. `y` has the shape of x; the start of its memory is overwritten.
    /// `None`, with nothing recorded, if such a matrix is not packed.
    ///
    /// # Errors
    /// [`OpError::Shape`], [`OpError::Gpu`].
    #[expect(clippy::too_many_arguments, reason = "operands, and where")]
    pub fn forward(
        &self,
        commands: &mut Commands,
        matmul: &Matmul,
        x: &Mat,
        gamma: &Mat,
        epsilon: f32,
        y: &Mat,
        place: Place,
    ) -> Result<Option<Packed>, OpError> {
        gamma.check("RMSNorm", 1, x.cols)?;
        [x, y].into_iter().try_for_each(|mat| mat.check("RMSNorm", x.rows, x.cols))?;
        if !x.cols.is_multiple_of(4) {
            return Ok(None);
        }
        let Some((packed, memory)) = matmul.operand(y, place)? else { return Ok(None) };
        self.dispatch(commands, [x, gamma, y], epsilon, &memory);
        Ok(Some(packed))
    }

    /// Records both kernels. `factors` has a float for each row at its start.
    pub(super) fn dispatch(
        &self,
        commands: &mut Commands,
        [x, gamma, factors]: [&Mat; 3],
        epsilon: f32,
        memory: &PackedMemory,
    ) {
        let params = Params {
            rows: x.rows,
            cols: x.cols,
            padded_rows: memory.padded_rows,
            padded_cols: memory.padded_cols,
            epsilon,
            pad: [0; 3],
        };
        let [exponents, out] = bindings(memory);
        let (read, written) = (4 * x.elements(), out.size);
        let factors = factors.range.slice(0, 4 * u64::from(x.rows));
        let bindings = [x.range.clone(), x.range.clone(), gamma.range.clone(), factors, exponents, out];
        let measure = if x.cols <= NARROW { &self.measure_narrow } else { &self.measure };
        let params = bytemuck::bytes_of(&params);
        commands.dispatch(measure, &bindings, params, self.gpu.grid((memory.padded_rows / ROWS).into()), read);
        commands.dispatch(&self.write, &bindings, params, groups_of_tiles(&self.gpu, memory), read + written);
    }
}

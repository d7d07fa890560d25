//! Matrices in f16, packed.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use super::super::mixed::Place;
use super::super::{Matmul, Packed, PackedMemory};
use super::{HALVES, bindings, groups_of_tiles};
use crate::gpu::{Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};
use crate::ops::{Halves, Mat, OpError};

/// Packs what `Halves` stored: the elements and the powers of two of the rows stay as they are.
#[derive(Debug, Clone)]
pub struct PackedHalves {
    pub(super) gpu: Gpu,
    kernel: Kernel,
}

impl PackedHalves {
    /// The kernel, before it is compared with the CPU.
    pub(super) fn untried(gpu: &Gpu, spec: &KernelSpec) -> Result<Self, GpuError> {
        Ok(Self { gpu: gpu.clone(), kernel: gpu.kernel(spec)? })
    }

    pub(super) fn spec() -> KernelSpec {
        // SAFETY: `dispatch` binds all rows of the stored matrix, and panels with their padding.
        // Rows past the last one, and what is past the end of a stored row, are not read. Tiles lie
        // in the panels, whose sides are multiples of their side. A barrier separates the writes
        // and the reads of workgroup memory.
        let shader = unsafe { Shader::trusted("halves_panels", HALVES) };
        KernelSpec { shader, entry: "main", constants: Vec::new() }
    }

    /// Records the packing of what [`Halves::keep`] stored of a matrix of the shape of `x`, to
    /// `place`. `None`, with nothing recorded, if such a matrix is not packed.
    ///
    /// # Errors
    /// [`OpError::Shape`], [`OpError::Gpu`].
    pub fn pack(
        &self,
        commands: &mut Commands,
        matmul: &Matmul,
        stored: &Mat,
        x: &Mat,
        place: Place,
    ) -> Result<Option<Packed>, OpError> {
        stored.check("f16", x.rows, Halves::words(x.cols))?;
        let Some((packed, memory)) = matmul.operand(x, place)? else { return Ok(None) };
        self.dispatch(commands, stored, &memory);
        Ok(Some(packed))
    }

    pub(super) fn dispatch(&self, commands: &mut Commands, stored: &Mat, memory: &PackedMemory) {
        let params = [stored.rows, stored.cols / 2, memory.padded_rows, memory.padded_cols];
        let [exponents, out] = bindings(memory);
        let bytes = stored.range.size + out.size;
        let bindings = [stored.range.clone(), exponents, out];
        commands.dispatch(&self.kernel, &bindings, bytemuck::cast_slice(&params), groups_of_tiles(&self.gpu, memory), bytes);
    }
}

//! Operations that write the packed operand of the next product on matrix units, in place of a
//! float32 matrix that [`Matmul::pack`] reads again.
//!
//! The power of two of a row is known when all of the row is. So one kernel measures rows and
//! another one writes tiles of panels, each with a pass over the inputs that no cache could hold
//! for both. The operands have the bits that the operation in float32 and [`Matmul::pack`] give.
//! Gated activations that are computed again keep the exponents of the forward pass instead.

mod glu;
mod halves;
mod norm;
#[cfg(test)]
mod tests;
mod trial;

pub use glu::PackedGlu;
pub use halves::PackedHalves;
pub use norm::PackedNorm;

use super::kernels::shaders;
use super::mixed::Place;
use super::panels::{Exponents, Panels, Size};
use super::{Matmul, Packed, PackedMemory, packs};
use crate::gpu::{BufferRange, Gpu};
use crate::ops::{Mat, OpError};

const HALVES: &str = shaders!("panels", "panels_tile", "halves_panels");
const NORM: &str = shaders!("panels", "panels_tile", "norm_panels");
const GLU: &str = shaders!("panels", "panels_tile", "glu_function", "glu_fours", "glu_panels");
/// Rows and columns of a workgroup; `TILE` in panels_tile.wgsl.
const TILE: u32 = 64;

impl Matmul {
    /// As [`Matmul::panels_for`], for a kernel that writes only the packed form. `None` if products
    /// of such a matrix have float32 operands.
    fn operand(&self, x: &Mat, place: Place) -> Result<Option<(Packed, PackedMemory)>, OpError> {
        let packed = self.panels_for(x, place)?;
        Ok(packed.memory().map(|memory| (Packed { in_floats: false, ..packed }, memory)))
    }

    /// As [`Matmul::operand`], in the memory of `x` itself. `None` also if it does not fit. It is
    /// valid until that memory is written.
    fn operand_in(&self, x: &Mat) -> Option<(Packed, PackedMemory)> {
        let mixed = self.mixed.as_ref().filter(|mixed| packs(mixed, x))?;
        let size = Size { rows: x.rows, cols: x.cols };
        let (bytes, exponents) = (size.bytes(), size.exponent_bytes());
        if bytes.checked_add(exponents)? > x.range.size {
            return None;
        }
        let (range, exponents_range) = (x.range.slice(0, bytes), x.range.slice(bytes, exponents));
        let panels = Panels { size, range, exponents: Exponents::ByRow, exponents_range };
        let panels = Some((panels, mixed.next_number()));
        let packed = Packed { mat: x.clone(), in_floats: false, panels, place: None };
        packed.memory().map(|memory| (packed, memory))
    }
}

/// Workgroups for the padded rows of an operand, one for each.
fn groups_of_rows(gpu: &Gpu, memory: &PackedMemory) -> [u32; 3] {
    gpu.grid(memory.padded_rows.into())
}

/// Workgroups for the tiles of an operand.
fn groups_of_tiles(gpu: &Gpu, memory: &PackedMemory) -> [u32; 3] {
    gpu.grid(u64::from(memory.padded_rows / TILE) * u64::from(memory.padded_cols / TILE))
}

/// Exponents and elements, as a kernel binds them.
fn bindings(memory: &PackedMemory) -> [BufferRange; 2] {
    [memory.exponents.clone(), memory.elements.clone()]
}

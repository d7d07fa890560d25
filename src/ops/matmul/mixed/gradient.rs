//! Products whose sums run over the rows of two matrices: the gradients of an adapter, dB = dy^T u
//! and dA = du^T x.
//!
//! The wide matrix (dy or x) is packed for other products, or for several of these, with an
//! exponent for each row. The narrow one (u or du) has few columns. Its rows are multiplied by
//! these exponents when it is packed, with one exponent for all.
//!
//! ```text
//! narrow, exponents of rows -> extent, align -> right panels
//! wide panels, right panels -> product in chunks -> sum of chunks, transposed for dA -> out
//! ```

#[cfg(test)]
mod tests;

use bytemuck::{Pod, Zeroable};

use super::{EXTENTS, Kind, Mixed, SPEED, Side};
use crate::gpu::{Commands, Kernel};
use crate::ops::matmul::kernels::Kernels;
use crate::ops::matmul::panels::{Exponents, Panels, Size, Terms, WIDTH};
use crate::ops::matmul::product::{Target, View};
use crate::ops::{Mat, OpError, mat_bytes};

/// Maximum columns of the narrow matrix.
pub(in crate::ops::matmul) const MAX_RANK: u32 = 2 * WIDTH;
/// Elements of a workgroup of `align`.
const ELEMENTS: u64 = 1024;

/// Parameters of a dispatch: `struct Params` of align.wgsl.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    rows: u32,
    cols: u32,
    panel_rows: u32,
    panels: u32,
}

impl Mixed {
    /// Whether [`Mixed::over_rows`] computes a product.
    pub fn sums_rows(&self, kernels: &Kernels, wide: &Panels, narrow: &Mat) -> bool {
        let narrow_size = Size { rows: narrow.rows, cols: narrow.cols };
        let fits = kernels.scratch().size >= mat_bytes(wide.size.cols, narrow.cols);
        // Its tile is that of narrow matrices.
        fits && narrow.elements() > 0 && narrow.cols <= MAX_RANK && self.binds(narrow_size)
    }

    /// Records `out = scale * wide^T narrow (+ out)`. `out` has a row for each column of `wide`.
    pub fn over_rows(
        &self,
        kernels: &Kernels,
        commands: &mut Commands,
        (wide, narrow): (&Panels, &Mat),
        (scale, add): (f32, bool),
        out: &View,
    ) -> Result<(), OpError> {
        let (m, n, k) = (wide.size.cols, narrow.cols, narrow.rows);
        let (extent, align) = (self.kernel(Kind::AlignExtent)?, self.kernel(Kind::Align)?);
        let size = Size { rows: k, cols: n };
        let range = self.memory.right.get(&self.gpu, size.bytes())?;
        let exponents_range = self.right_exponents.clone();
        let right = Panels { size, range, exponents: Exponents::One, exponents_range };
        self.dispatch_align(commands, &extent, narrow, wide, &right, [EXTENTS, 1, 1]);
        let elements = u64::from(size.padded_rows()) * u64::from(size.padded_cols());
        self.dispatch_align(commands, &align, narrow, wide, &right, self.gpu.grid(elements.div_ceil(ELEMENTS)));
        let side = |panels| Side { panels, terms: Terms::Rows, first: (0, 0) };
        let parts = View { range: kernels.scratch().clone(), first: 0, row: n, column: 1 };
        let sums = Target { m, n, out: &parts, scale: 1.0, add: false, bias: None };
        let chunks = self.multiply_parts(kernels, commands, [side(wide), side(&right)], k, None, sums)?;
        kernels.sum(commands, &kernels.sum_kernel()?, Target { out, scale, add, ..sums }, chunks);
        commands.add_operations(2 * u64::from(m) * u64::from(n) * u64::from(k) / SPEED);
        Ok(())
    }

    /// Dispatches `extent` or `align`.
    pub(super) fn dispatch_align(
        &self,
        commands: &mut Commands,
        kernel: &Kernel,
        narrow: &Mat,
        wide: &Panels,
        out: &Panels,
        groups: [u32; 3],
    ) {
        let size = out.size;
        let params =
            Params { rows: size.rows, cols: size.cols, panel_rows: size.padded_rows(), panels: size.padded_cols() / WIDTH };
        let of_align = kernel.name().ends_with(":align");
        let bytes = narrow.range.size + if of_align { out.range.size } else { 0 };
        // `extent` writes binding 2, and `align` reads it as binding 3.
        let unused = &narrow.range;
        let [new_extents, extents] = if of_align { [unused, &self.extents] } else { [&self.extents, unused] };
        let bindings = [
            narrow.range.clone(),
            wide.exponents_range.clone(),
            new_extents.clone(),
            extents.clone(),
            out.exponents_range.clone(),
            out.range.clone(),
        ];
        commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), groups, bytes);
    }
}

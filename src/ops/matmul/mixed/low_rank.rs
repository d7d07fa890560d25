//! The terms of an adapter in a product with a frozen weight: y = x W^T + ratio * u B^T with u = x
//! A^T, or dx = dy W + ratio * du A with du = dy B.
//!
//! u and du are sums over the same packed operand as the product. They go to panels of their own,
//! each row with the exponent of the packed row, plus one that is common to all rows. So the
//! product takes them as further terms: it brings its sums to their scale first.
//!
//! ```text
//! packed operand, A  -> product in chunks -> sum of chunks -> u, in float32 and in panels
//! packed operand, W, u, B                 -> product       -> y
//! ```

#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;

use bytemuck::{Pod, Zeroable};

use super::terms::Low;
use super::{Kind, Mixed, OTHER, Side};
use crate::gpu::{BufferRange, Commands, Kernel};
use crate::ops::matmul::kernels::Kernels;
use crate::ops::matmul::panels::{Exponents, PADDING, Panels, Size, Terms, WIDTH};
use crate::ops::matmul::product::{Target, View};
use crate::ops::matmul::weight::Right;
use crate::ops::{Mat, OpError, mat_bytes};

/// log2 of the largest magnitude in panels.
const LARGEST: i32 = 10;
/// Elements of a workgroup of low_rank.wgsl.
const ELEMENTS: u64 = 1024;

/// Parameters of a dispatch: `struct Params` of low_rank.wgsl.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    rows: u32,
    rank: u32,
    chunks: u32,
    panel_rows: u32,
    panels: u32,
    shift: i32,
    scale: f32,
    pad: u32,
}

/// The exponent of sums of `terms` products of magnitudes in panels, above that of the operands.
pub(super) fn shift(terms: u32) -> i32 {
    LARGEST + terms.max(1).next_power_of_two().trailing_zeros() as i32
}

impl Mixed {
    /// Records `out = scale * left right`, [rows, rank], and its panels. `terms` is the side of
    /// `right` over which the sums run. `None` if the scratch memory does not hold the sums.
    pub fn low_rank(
        &self,
        kernels: &Kernels,
        commands: &mut Commands,
        (left, number): (&Panels, u64),
        (right, size, terms): (&Right, Size, Terms),
        scale: f32,
        out: &Mat,
    ) -> Result<Option<Low>, OpError> {
        let (m, n, k) = (out.rows, out.cols, left.size.cols);
        let of_low = Size { rows: m, cols: n };
        if kernels.scratch().size < mat_bytes(m, n) || !self.binds(of_low) || !self.binds(size) {
            return Ok(None);
        }
        let right = self.decode(commands, right, size, size.cols, None)?;
        let sides =
            [Side { panels: left, terms: Terms::Columns, first: (0, 0) }, Side { panels: &right, terms, first: (0, 0) }];
        let parts = View { range: kernels.scratch().clone(), first: 0, row: n, column: 1 };
        let target = Target { m, n, out: &parts, scale: 1.0, add: false, bias: None };
        let chunks = self.multiply_parts(kernels, commands, sides, k, None, target)?;
        let kernel = self.kernel(Kind::LowRank)?;
        let range = self.memory.low.get(&self.gpu, of_low.bytes())?;
        let exponents_range = self.right_exponents.clone();
        let panels = Panels { size: of_low, range, exponents: Exponents::ByRow, exponents_range };
        self.dispatch_low_rank(commands, kernels.scratch(), &kernel, left, &panels, (k, chunks), scale, out);
        let own = self.lows.fetch_add(1, Ordering::Relaxed) + 1;
        Ok(Some(Low { mat: out.clone(), panels: Some((panels, number, own)) }))
    }

    /// The panels of `low`, for a product of `left`. `None` if it has none.
    ///
    /// # Errors
    /// [`OpError::Shape`] if they were overwritten, or are those of another operand.
    pub fn panels_of<'a>(&self, low: &'a Low, left: Option<u64>) -> Result<Option<&'a Panels>, OpError> {
        let (Some((panels, number, own)), Some(present)) = (&low.panels, left) else { return Ok(None) };
        let stale = |what, expected, found| Err(OpError::Shape { operation: "an adapter", what, expected, found });
        let last = self.lows.load(Ordering::Relaxed);
        match (*number == present, *own == last) {
            (true, true) => Ok(Some(panels)),
            (false, _) => stale("the number of its operand", present, *number),
            (_, false) => stale("its number", last, *own),
        }
    }

    /// Decodes B or A for the terms of an adapter.
    pub fn decode_other(&self, commands: &mut Commands, other: &Right, size: Size) -> Result<Panels, OpError> {
        self.decode_to(commands, (other, size, size.cols), None, (&self.memory.other, OTHER))
    }

    #[expect(clippy::too_many_arguments, reason = "operands, and how")]
    pub(super) fn dispatch_low_rank(
        &self,
        commands: &mut Commands,
        scratch: &BufferRange,
        kernel: &Kernel,
        left: &Panels,
        panels: &Panels,
        (terms, chunks): (u32, u32),
        scale: f32,
        out: &Mat,
    ) {
        let size = panels.size;
        let params = Params {
            rows: size.rows,
            rank: size.cols,
            chunks,
            panel_rows: size.padded_rows(),
            panels: size.padded_cols() / WIDTH,
            shift: shift(terms),
            scale,
            pad: 0,
        };
        let parts = scratch.slice(0, mat_bytes(size.rows, size.cols) * u64::from(chunks));
        let bytes = parts.size + out.range.size + panels.range.size;
        let bindings =
            [parts, left.exponents_range.clone(), self.right_exponents.clone(), out.range.clone(), panels.range.clone()];
        let elements = u64::from(size.padded_rows()) * u64::from(size.cols.next_multiple_of(PADDING));
        let groups = self.gpu.grid(elements.div_ceil(ELEMENTS));
        commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), groups, bytes);
    }
}

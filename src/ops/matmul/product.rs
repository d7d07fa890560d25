//! One product: its operands as bound to a kernel.

use std::ops::Range;

use super::weight::{Largest, Right, bound};
use crate::format::FloatType;
use crate::gpu::BufferRange;
use crate::ops::Mat;

/// The bound part of a float32 matrix. Element (i, j) is at `first + i * row + j * column`.
#[derive(Debug, Clone)]
pub(super) struct View {
    pub range: BufferRange,
    pub first: u32,
    pub row: u32,
    pub column: u32,
}

/// `out[m, n] = scale * (a[m, k] b[k, n] (+ bias)) (+ out)`. `m` and `n` are not 0.
#[derive(Debug, Clone)]
pub(super) struct Product {
    pub m: u32,
    pub n: u32,
    pub k: u32,
    /// [m, k]. One of its strides is 1.
    pub a: View,
    /// The right operand. Its first element is b[0, 0].
    pub b: Right,
    /// The largest magnitude of the tensor of b, if it was measured.
    pub b_largest: Option<Largest>,
    /// Strides of b in elements, between columns and between terms. One of them is 1.
    pub b_strides: (u32, u32),
    /// [m, n]. Its `column` is 1.
    pub out: View,
    pub scale: f32,
    pub add: bool,
    /// Its range, and the index of the element for the first column.
    pub bias: Option<(BufferRange, u32)>,
}

/// What becomes of the sums of a product: `out[m, n] = scale * (sums (+ bias)) (+ out)`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Target<'a> {
    pub m: u32,
    pub n: u32,
    pub out: &'a View,
    pub scale: f32,
    pub add: bool,
    pub bias: Option<&'a (BufferRange, u32)>,
}

impl Product {
    pub fn target(&self) -> Target<'_> {
        let Self { m, n, ref out, scale, add, ref bias, .. } = *self;
        Target { m, n, out, scale, add, bias: bias.as_ref() }
    }
}

/// A product of float32 matrices. The right one has `b_rows` rows. The caller sets `k`, `scale` and
/// `add`.
pub(super) fn dense(a: View, (b, b_rows): (&Mat, Range<u32>), b_strides: (u32, u32), out: &Mat) -> Product {
    let cols = u64::from(b.cols);
    let (range, first) = bound(&b.range, u64::from(b_rows.start) * cols, u64::from(b_rows.end) * cols, 4);
    let b = Right::Raw { range, first, float_type: FloatType::F32 };
    let (m, n, out) = (out.rows, out.cols, View::of(out));
    Product { m, n, k: 0, a, b, b_largest: None, b_strides, out, scale: 1.0, add: false, bias: None }
}

impl View {
    /// A whole matrix.
    pub fn of(mat: &Mat) -> Self {
        Self { range: mat.range.clone(), first: 0, row: mat.cols, column: 1 }
    }

    /// The columns from `column` on.
    pub fn shifted(self, column: u32) -> Self {
        Self { first: self.first + column, ..self }
    }

    /// The transposed view.
    pub fn transposed(self) -> Self {
        Self { row: self.column, column: self.row, ..self }
    }

    /// The view of the first `columns` columns of these rows, in the smallest range that contains
    /// them.
    pub fn window(&self, rows: Range<u32>, columns: u32) -> Self {
        let [row, column] = [self.row, self.column].map(u64::from);
        let start = u64::from(self.first) + u64::from(rows.start) * row;
        let end = start + u64::from(rows.end - rows.start - 1) * row + u64::from(columns.max(1) - 1) * column + 1;
        let (range, first) = bound(&self.range, start, end, 4);
        Self { range, first, ..*self }
    }
}

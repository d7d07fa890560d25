//! Products of matrices: dense ones, and those with frozen weights, whose tiles are decoded inside the kernel.
//!
//! Each kernel is tried against the CPU before its first use on a device.
//!
//! Float32, in an order that depends on the sizes only: the same product gives the same bits each time. Matrices that pass the
//! device's largest binding are cut: the left operand and the result by rows, weights by rectangles, and both operands of `tn` along
//! the sums. A dense right operand of `nt` and `nn`, the result of `tn`, and every single row have to fit.

mod kernels;
mod rows;
#[cfg(test)]
mod tests;
mod trial;
pub(in crate::ops) mod weight;

use std::ops::Range;

use kernels::{Kernels, Product, View};
pub use weight::{Elements, Weight};
use weight::{Right, bound};

use super::Mat;
use crate::dequant::operand::ALIGN;
use crate::format::FloatType;
use crate::gpu::{Commands, Gpu};
use crate::ops::error::OpError;
use crate::ops::trial::Tried;

/// The products of a device.
#[derive(Debug)]
pub struct Matmul {
    kernels: Kernels,
}

impl Matmul {
    /// GPU memory that every `Matmul` takes for itself.
    pub const SCRATCH_BYTES: u64 = kernels::SCRATCH_BYTES;

    /// The products of `gpu`.
    ///
    /// # Errors
    /// [`OpError::Gpu`] where there is no memory, or a kernel does not compile.
    pub fn new(gpu: &Gpu) -> Result<Self, OpError> {
        Ok(Self { kernels: Kernels::new(gpu, Tried::new(gpu), Tried::new(gpu), trial::TRIALS)? })
    }

    /// `out[m, n] = scale * a[m, k] b[n, k]^T`, added to what `out` holds where `add`.
    ///
    /// # Errors
    /// [`OpError::Shape`], [`OpError::Gpu`]; nothing of use is then recorded.
    pub fn nt(&self, commands: &mut Commands, a: &Mat, b: &Mat, scale: f32, add: bool, out: &Mat) -> Result<(), OpError> {
        a.check("a b^T", out.rows, b.cols)?;
        b.check("a b^T", out.cols, b.cols)?;
        out.check("a b^T", out.rows, out.cols)?;
        let product = dense(View::of(a), (b, 0..b.rows), (b.cols, 1), out);
        self.record(commands, &Product { k: b.cols, scale, add, ..product })
    }

    /// `out[m, n] = scale * a[m, k] b[k, n]`, added to what `out` holds where `add`.
    ///
    /// # Errors
    /// As [`Matmul::nt`].
    pub fn nn(&self, commands: &mut Commands, a: &Mat, b: &Mat, scale: f32, add: bool, out: &Mat) -> Result<(), OpError> {
        a.check("a b", out.rows, b.rows)?;
        b.check("a b", b.rows, out.cols)?;
        out.check("a b", out.rows, out.cols)?;
        let product = dense(View::of(a), (b, 0..b.rows), (1, b.cols), out);
        self.record(commands, &Product { k: b.rows, scale, add, ..product })
    }

    /// `out[m, n] = scale * a[k, m]^T b[k, n]`, added to what `out` holds where `add`.
    ///
    /// # Errors
    /// As [`Matmul::nt`].
    pub fn tn(&self, commands: &mut Commands, a: &Mat, b: &Mat, scale: f32, add: bool, out: &Mat) -> Result<(), OpError> {
        a.check("a^T b", b.rows, out.rows)?;
        b.check("a^T b", b.rows, out.cols)?;
        out.check("a^T b", out.rows, out.cols)?;
        if b.rows == 0 {
            let product = dense(View::of(a), (b, 0..0), (1, b.cols), out);
            return self.record(commands, &Product { scale, add, ..product });
        }
        let most = self.rows_within_binding(a.cols.max(b.cols));
        for first in (0..b.rows).step_by(most as usize) {
            let k = most.min(b.rows - first);
            let a = View::of(a).window(first..first + k, a.cols).transposed();
            let product = dense(a, (b, first..first + k), (1, b.cols), out);
            self.record(commands, &Product { k, scale, add: add || first > 0, ..product })?;
        }
        Ok(())
    }

    /// `y[m, outputs] = factor * (x[m, inputs] w^T (+ bias[1, outputs]))` with the factor of [`Weight::times`], added to what `y` holds
    /// where `add`.
    ///
    /// # Errors
    /// [`OpError::Shape`], [`OpError::Weights`], [`OpError::Gpu`]; nothing of use is then recorded.
    pub fn forward(
        &self,
        commands: &mut Commands,
        x: &Mat,
        w: &Weight<'_>,
        bias: Option<&Mat>,
        add: bool,
        y: &Mat,
    ) -> Result<(), OpError> {
        x.check("x W^T", x.rows, w.inputs())?;
        y.check("x W^T", x.rows, w.outputs())?;
        bias.map_or(Ok(()), |bias| bias.check("x W^T", 1, w.outputs()))?;
        if w.inputs() == 0 {
            let product = dense(View::of(x), (x, 0..0), (0, 1), y);
            let bias = bias.map(|bias| (bias.range.clone(), 0));
            return self.record(commands, &Product { scale: w.factor(), add, bias, ..product });
        }
        for (rectangle, b) in w.pieces("x W^T", self.binding())? {
            let (rows, columns) = (&rectangle.rows, &rectangle.columns);
            // The rest of a row that was cut adds to what its start gave.
            let starts = columns.start == 0;
            let product = Product {
                m: x.rows,
                n: rows.end - rows.start,
                k: columns.end - columns.start,
                a: View::of(x).shifted(columns.start),
                b,
                b_strides: (w.inputs(), 1),
                out: View::of(y).shifted(rows.start),
                scale: w.factor(),
                add: add || !starts,
                bias: bias.filter(|_| starts).map(|bias| (bias.range.clone(), rows.start)),
            };
            self.record(commands, &product)?;
        }
        Ok(())
    }

    /// `dx[m, inputs] = factor * dy[m, outputs] w` with the factor of [`Weight::times`], added to what `dx` holds where `add`.
    ///
    /// # Errors
    /// As [`Matmul::forward`].
    pub fn backward(&self, commands: &mut Commands, dy: &Mat, w: &Weight<'_>, add: bool, dx: &Mat) -> Result<(), OpError> {
        dy.check("dy W", dy.rows, w.outputs())?;
        dx.check("dy W", dy.rows, w.inputs())?;
        let pieces = w.pieces("dy W", self.binding())?;
        let many = pieces.len() != 1;
        if many && !add {
            commands.clear(&dx.range.slice(0, 4 * u64::from(dx.rows) * u64::from(dx.cols)));
        }
        for (rectangle, b) in pieces {
            let (rows, columns) = (&rectangle.rows, &rectangle.columns);
            let product = Product {
                m: dy.rows,
                n: columns.end - columns.start,
                k: rows.end - rows.start,
                a: View::of(dy).shifted(rows.start),
                b,
                b_strides: (1, w.inputs()),
                out: View::of(dx).shifted(columns.start),
                scale: w.factor(),
                add: add || many,
                bias: None,
            };
            self.record(commands, &product)?;
        }
        Ok(())
    }

    /// Bytes that a binding may have.
    fn binding(&self) -> u64 {
        self.kernels.gpu().limits().max_storage_buffer_binding_size
    }

    /// Rows of so many elements that can be bound at once, at least one.
    fn rows_within_binding(&self, elements: u32) -> u32 {
        let most = self.binding().saturating_sub(ALIGN).min(1 << 32) / (4 * u64::from(elements.max(1)));
        u32::try_from(most).unwrap_or(u32::MAX).max(1)
    }

    /// Records a product whose left operand and result may pass the largest binding.
    fn record(&self, commands: &mut Commands, product: &Product) -> Result<(), OpError> {
        let Product { m, n, k, a, out, .. } = product;
        if *m == 0 || *n == 0 {
            return Ok(());
        }
        // A transposed operand was cut before, along the sums.
        let most = if a.column == 1 { self.rows_within_binding(a.row.max(out.row)) } else { *m };
        for first in (0..*m).step_by(most as usize) {
            let rows = first..first + most.min(m - first);
            let (a, out) = (a.window(rows.clone(), *k), out.window(rows.clone(), *n));
            self.kernels.record(commands, &Product { m: rows.end - first, a, out, ..product.clone() })?;
        }
        Ok(())
    }
}

/// A product of float32 matrices of which the right one has `b_rows` of its rows; its caller sets `k`, `scale` and `add`.
fn dense(a: View, (b, b_rows): (&Mat, Range<u32>), b_strides: (u32, u32), out: &Mat) -> Product {
    let cols = u64::from(b.cols);
    let (range, first) = bound(&b.range, u64::from(b_rows.start) * cols, u64::from(b_rows.end) * cols, 4);
    let b = Right::Raw { range, first, float_type: FloatType::F32 };
    Product { m: out.rows, n: out.cols, k: 0, a, b, b_strides, out: View::of(out), scale: 1.0, add: false, bias: None }
}

impl View {
    /// A whole matrix.
    fn of(mat: &Mat) -> Self {
        Self { range: mat.range.clone(), first: 0, row: mat.cols, column: 1 }
    }

    /// The columns from `column` on.
    fn shifted(self, column: u32) -> Self {
        Self { first: self.first + column, ..self }
    }

    /// Its rows as columns.
    fn transposed(self) -> Self {
        Self { row: self.column, column: self.row, ..self }
    }

    /// As much of the range as holds the first `columns` columns of these rows, and in it from the first of the rows on.
    fn window(&self, rows: Range<u32>, columns: u32) -> Self {
        let [row, column] = [self.row, self.column].map(u64::from);
        let start = u64::from(self.first) + u64::from(rows.start) * row;
        let end = start + u64::from(rows.end - rows.start - 1) * row + u64::from(columns.max(1) - 1) * column + 1;
        let (range, first) = bound(&self.range, start, end, 4);
        Self { range, first, ..*self }
    }
}

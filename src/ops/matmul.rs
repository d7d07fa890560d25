//! Matrix products: of two dense matrices, and with frozen weights, which the kernel decodes tile
//! by tile.
//!
//! Each kernel is tested against the CPU before its first use on a device.
//!
//! Sums are in float32. Their order depends only on the sizes, so the same product gives the same
//! bits each time. Matrices that exceed the binding limit of the device are cut: the left operand
//! and the result by rows, weights by rectangles, and both operands of `tn` along the sums. These
//! must fit in a binding: a dense right operand of `nt` and `nn`, the result of `tn`, and every
//! single row.

mod kernels;
mod product;
mod rows;
#[cfg(test)]
mod tests;
mod trial;
pub(in crate::ops) mod weight;
mod wide;

use kernels::Kernels;
use product::{Product, View, dense};
pub use weight::{Elements, Weight};
use wide::WideKernels;
pub use wide::{Join, MAX_ROWS, Wide};

use super::Mat;
use crate::dequant::operand::ALIGN;
use crate::gpu::{Commands, Gpu};
use crate::ops::error::OpError;
use crate::ops::trial::Tried;

/// Matrix products on a device.
#[derive(Debug)]
pub struct Matmul {
    kernels: Kernels,
    wide: WideKernels,
}

impl Matmul {
    /// GPU memory of a `Matmul` in bytes.
    pub const SCRATCH_BYTES: u64 = kernels::SCRATCH_BYTES;

    /// Prepares the products on `gpu`.
    ///
    /// # Errors
    /// [`OpError::Gpu`] if memory is exhausted or a kernel does not compile.
    pub fn new(gpu: &Gpu) -> Result<Self, OpError> {
        let kernels = Kernels::new(gpu, Tried::new(gpu), Tried::new(gpu), trial::TRIALS)?;
        Ok(Self { kernels, wide: WideKernels::new(gpu, Tried::new(gpu), trial::of_wide) })
    }

    /// Records a product of few rows, or returns `false` if these rows and weights need other
    /// kernels: more than [`MAX_ROWS`] rows, rows of weights that are no whole vectors, several
    /// weights in different buffers, or a weight in several parts.
    ///
    /// # Errors
    /// As [`Matmul::forward`].
    pub fn wide(&self, commands: &mut Commands, x: &Mat, wide: &Wide<'_>, out: &Mat) -> Result<bool, OpError> {
        self.wide.record(commands, x, wide, out)
    }

    /// Records `out[m, n] = scale * a[m, k] b[n, k]^T`, added to `out` if `add` is set.
    ///
    /// # Errors
    /// [`OpError::Shape`], [`OpError::Gpu`]; the recorded commands are then incomplete.
    pub fn nt(&self, commands: &mut Commands, a: &Mat, b: &Mat, scale: f32, add: bool, out: &Mat) -> Result<(), OpError> {
        a.check("a b^T", out.rows, b.cols)?;
        b.check("a b^T", out.cols, b.cols)?;
        out.check("a b^T", out.rows, out.cols)?;
        let product = dense(View::of(a), (b, 0..b.rows), (b.cols, 1), out);
        self.record(commands, &Product { k: b.cols, scale, add, ..product })
    }

    /// Records `out[m, n] = scale * a[m, k] b[k, n]`, added to `out` if `add` is set.
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

    /// Records `out[m, n] = scale * a[k, m]^T b[k, n]`, added to `out` if `add` is set.
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
        let max_rows = self.rows_within_binding(a.cols.max(b.cols));
        for first in (0..b.rows).step_by(max_rows as usize) {
            let k = max_rows.min(b.rows - first);
            let a = View::of(a).window(first..first + k, a.cols).transposed();
            let product = dense(a, (b, first..first + k), (1, b.cols), out);
            self.record(commands, &Product { k, scale, add: add || first > 0, ..product })?;
        }
        Ok(())
    }

    /// Records `y[m, outputs] = factor * (x[m, inputs] w^T (+ bias[1, outputs]))`, added to `y` if
    /// `add` is set. `factor` is set by [`Weight::times`].
    ///
    /// # Errors
    /// [`OpError::Shape`], [`OpError::Weights`], [`OpError::Gpu`]; the recorded commands are then
    /// incomplete.
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
        let weights = [w];
        let wide = Wide { bias, ..Wide::of(&weights) };
        if !add && self.wide(commands, x, &wide, y)? {
            return Ok(());
        }
        for (rectangle, b) in w.pieces("x W^T", self.binding())? {
            let (rows, columns) = (&rectangle.rows, &rectangle.columns);
            // A later part of a cut row is added to the result of its first part.
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

    /// Records `dx[m, inputs] = factor * dy[m, outputs] w`, added to `dx` if `add` is set. `factor`
    /// is set by [`Weight::times`].
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

    /// Maximum bytes of a binding.
    fn binding(&self) -> u64 {
        self.kernels.gpu().limits().max_storage_buffer_binding_size
    }

    /// Maximum rows of `elements` elements in a binding, at least one.
    fn rows_within_binding(&self, elements: u32) -> u32 {
        let max_rows = self.binding().saturating_sub(ALIGN).min(1 << 32) / (4 * u64::from(elements.max(1)));
        u32::try_from(max_rows).unwrap_or(u32::MAX).max(1)
    }

    /// Records a product. Its left operand and its result may exceed the binding limit.
    fn record(&self, commands: &mut Commands, product: &Product) -> Result<(), OpError> {
        let Product { m, n, k, a, out, .. } = product;
        if *m == 0 || *n == 0 {
            return Ok(());
        }
        // A transposed operand was already cut along the sums.
        let max_rows = if a.column == 1 { self.rows_within_binding(a.row.max(out.row)) } else { *m };
        for first in (0..*m).step_by(max_rows as usize) {
            let rows = first..first + max_rows.min(m - first);
            let (a, out) = (a.window(rows.clone(), *k), out.window(rows.clone(), *n));
            self.kernels.record(commands, &Product { m: rows.end - first, a, out, ..product.clone() })?;
        }
        Ok(())
    }
}

//! Products with frozen weights and the terms of their adapters: in one product on matrix units,
//! else in a second one.

use std::ops::Range;

use super::mixed::{self, Adapter, Low, Mixed};
use super::panels::{self, Panels, Size, Terms};
use super::product::{Product, View, dense};
use super::weight::{Rectangle, Right};
use super::{Matmul, Packed, Weight};
use crate::gpu::Commands;
use crate::ops::{Mat, OpError, mat_bytes};

impl Matmul {
    /// Records `out = x a^T` as [`Matmul::nt`] does, for [`Matmul::forward_adapted`].
    ///
    /// # Errors
    /// As [`Matmul::nt`].
    pub fn low_nt(&self, commands: &mut Commands, x: &Packed, a: &Mat, out: &Mat) -> Result<Low, OpError> {
        x.mat.check("x A^T", out.rows, a.cols)?;
        a.check("x A^T", out.cols, a.cols)?;
        out.check("x A^T", out.rows, out.cols)?;
        let low = self.low_rank(commands, x, (a, Terms::Columns), 1.0, out)?;
        low.map_or_else(|| self.nt(commands, x, a, 1.0, false, out).map(|()| Low::plain(out)), Ok)
    }

    /// Records `out = scale * dy b` as [`Matmul::nn`] does, for [`Matmul::backward_adapted`].
    ///
    /// # Errors
    /// As [`Matmul::nt`].
    pub fn low_nn(&self, commands: &mut Commands, dy: &Packed, b: &Mat, scale: f32, out: &Mat) -> Result<Low, OpError> {
        dy.mat.check("dy B", out.rows, b.rows)?;
        b.check("dy B", b.rows, out.cols)?;
        out.check("dy B", out.rows, out.cols)?;
        let low = self.low_rank(commands, dy, (b, Terms::Rows), scale, out)?;
        low.map_or_else(|| self.nn(commands, dy, b, scale, false, out).map(|()| Low::plain(out)), Ok)
    }

    /// Records the product of a packed operand with one side of an adapter, on matrix units. `None`
    /// if they do not multiply it.
    fn low_rank(
        &self,
        commands: &mut Commands,
        left: &Packed,
        (b, terms): (&Mat, Terms),
        scale: f32,
        out: &Mat,
    ) -> Result<Option<Low>, OpError> {
        let (Some(mixed), Some((panels, number))) = (&self.mixed, &left.panels) else { return Ok(None) };
        if b.elements() == 0 {
            return Ok(None);
        }
        self.pack(commands, left)?;
        let right = dense(View::of(&left.mat), (b, 0..b.rows), (1, 1), out).b;
        let size = Size { rows: b.rows, cols: b.cols };
        mixed.low_rank(&self.kernels, commands, (panels, *number), (&right, size, terms), scale, out)
    }

    /// As [`Matmul::forward`], plus `scale * u B^T` with u from [`Matmul::low_nt`] of `x`.
    ///
    /// # Errors
    /// As [`Matmul::forward`].
    #[expect(clippy::too_many_arguments, reason = "operands, and how")]
    pub fn forward_adapted(
        &self,
        commands: &mut Commands,
        x: &Packed,
        w: &Weight<'_>,
        bias: Option<&Mat>,
        adapter: Adapter<'_>,
        add: bool,
        y: &Mat,
    ) -> Result<(), OpError> {
        let Adapter { low, other, scale } = adapter;
        other.check("u B^T", w.outputs(), low.mat().cols)?;
        if self.fuses(x, w, adapter)? {
            return self.forward_with(commands, x.into(), w, bias, Some(adapter), add, y);
        }
        self.forward(commands, x, w, bias, add, y)?;
        self.nt(commands, low.mat(), other, scale, true, y)
    }

    /// As [`Matmul::backward`], plus `du A` with du from [`Matmul::low_nn`] of `dy`, which has the
    /// factor `scale` already.
    ///
    /// # Errors
    /// As [`Matmul::forward`].
    pub fn backward_adapted(
        &self,
        commands: &mut Commands,
        dy: &Packed,
        w: &Weight<'_>,
        adapter: Adapter<'_>,
        add: bool,
        dx: &Mat,
    ) -> Result<(), OpError> {
        let Adapter { low, other, .. } = adapter;
        other.check("du A", low.mat().cols, w.inputs())?;
        if self.fuses(dy, w, adapter)? {
            return self.backward_with(commands, dy.into(), w, Some(adapter), add, dx);
        }
        self.backward(commands, dy, w, add, dx)?;
        self.nn(commands, low.mat(), other, 1.0, true, dx)
    }

    /// Whether the product of a packed operand with a weight has the terms of an adapter: all parts
    /// of the weight are multiplied on matrix units.
    fn fuses(&self, left: &Packed, w: &Weight<'_>, adapter: Adapter<'_>) -> Result<bool, OpError> {
        let Some(mixed) = &self.mixed else { return Ok(false) };
        if mixed.panels_of(adapter.low, left.number())?.is_none() || !mixed::fits(adapter.scale / w.factor()) {
            return Ok(false);
        }
        let on_units = |(rectangle, _): &(Rectangle, Right)| is_on_units(mixed, rectangle, w);
        let other = Size { rows: adapter.other.rows, cols: adapter.other.cols };
        Ok(mixed.binds(other) && self.pieces("an adapter", left, w)?.iter().all(on_units))
    }

    /// Whether every product of a packed operand of `rows` rows with this weight and its adapter of
    /// `rank` (0: none) runs on matrix units, forward and backward: none needs it in float32.
    ///
    /// # Errors
    /// As [`Matmul::forward`].
    pub fn only_packed(&self, rows: u32, w: &Weight<'_>, rank: u32) -> Result<bool, OpError> {
        let Some(mixed) = &self.mixed else { return Ok(false) };
        let (outputs, inputs) = (w.outputs(), w.inputs());
        let pieces = w.pieces_of_rows("a packed operand", self.binding(), mixed::rows_at_once(inputs))?;
        let fits = |rows| mat_bytes(rows, rank) <= self.kernels.scratch().size && mixed.binds(Size { rows, cols: rank });
        let of_adapter = rank <= mixed::MAX_RANK && [rows, outputs, inputs].into_iter().all(fits);
        Ok((rank == 0 || of_adapter) && pieces.iter().all(|(rectangle, _)| is_on_units(mixed, rectangle, w)))
    }

    /// Decodes the second operand of an adapter, some of its rows. Returns the panels of both, and
    /// the factor of their product.
    pub(super) fn terms_of<'a>(
        &self,
        commands: &mut Commands,
        mixed: &Mixed,
        left: &Packed,
        adapter: Adapter<'a>,
        rows: Range<u32>,
        product: &Product,
    ) -> Result<(Panels, Panels, f32), OpError> {
        let Adapter { low, other, scale } = adapter;
        let size = Size { rows: rows.end - rows.start, cols: other.cols };
        let right = dense(View::of(low.mat()), (other, rows), (1, 1), other).b;
        let missing = OpError::Shape { operation: "an adapter", what: "the number of its panels", expected: 1, found: 0 };
        let low = mixed.panels_of(low, left.number())?.ok_or(missing)?.clone();
        Ok((low, mixed.decode_other(commands, &right, size)?, scale / product.scale))
    }
}

/// Whether the product with a rectangle of a weight runs on matrix units.
fn is_on_units(mixed: &Mixed, rectangle: &Rectangle, w: &Weight<'_>) -> bool {
    let aligned = rectangle.rows.start.is_multiple_of(panels::WIDTH);
    aligned && rectangle.columns == (0..w.inputs()) && mixed.binds(rectangle.size())
}

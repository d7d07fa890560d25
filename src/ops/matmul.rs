//! Matrix products: of two dense matrices, and with frozen weights, which the kernel decodes tile
//! by tile.
//!
//! Each kernel is tested against the CPU before its first use on a device.
//!
//! Products of many rows with frozen weights run on matrix units, if the device has them and the
//! caller wants them: with f16 operands ([`mixed`]). So do other products of a left operand that
//! was packed for these. All other products have float32 operands.
//!
//! Sums are in float32. Their order depends only on the sizes, so the same product gives the same
//! bits each time. Matrices that exceed the binding limit of the device are cut: the left operand
//! and the result by rows, weights by rectangles, and both operands of `tn` along the sums. These
//! must fit in a binding: a dense right operand of `nt` and `nn`, the result of `tn`, and every
//! single row.

mod adapted;
mod kernels;
mod mixed;
mod packed;
mod panels;
mod product;
mod rows;
#[cfg(test)]
mod tests;
mod trial;
pub(in crate::ops) mod weight;
mod wide;

use kernels::Kernels;
pub use mixed::used::ProductKernels;
pub use mixed::{Adapter, Place};
use mixed::{LowRank, Memory, Mixed, Side};
pub use packed::{PackedGlu, PackedHalves, PackedNorm};
use panels::{Panels, Size, Terms};
use product::{Product, View, dense};
pub use weight::{Elements, Largest, Stored, Weight};
use weight::{Rectangle, Right};
use wide::WideKernels;
pub use wide::{Join, MAX_ROWS, Wide};

use std::ops::Range;

use super::Mat;
use crate::dequant::operand::ALIGN;
use crate::gpu::{BufferRange, Commands, Gpu, MatrixUnits};
use crate::ops::error::OpError;
use crate::ops::trial::Tried;

/// Matrix products on a device.
#[derive(Debug)]
pub struct Matmul {
    kernels: Kernels,
    wide: WideKernels,
    /// Products on matrix units.
    mixed: Option<Mixed>,
}

/// The left operand of products. [`Matmul::pack`] prepares it once for several
/// products; a plain matrix is prepared for each.
#[derive(Debug, Clone)]
pub struct Packed {
    mat: Mat,
    /// Whether the elements of the matrix are in `mat`, too: not if a kernel wrote only panels.
    in_floats: bool,
    /// The matrix for matrix units, and its number among all of them.
    panels: Option<(Panels, u64)>,
    /// Where the panels are, or `None` if the caller keeps their memory.
    place: Option<Place>,
}

/// The memory of a packed matrix [rows, cols], which kernels fill: tokens by terms of the sums.
///
/// Elements are f16 in [panels]: x * 2^-e, where e, an i32 for each padded token, is `exponent_of`
/// the largest magnitude of the token. All padding is written: elements are 0, and exponents those
/// of 0.
#[derive(Debug, Clone)]
pub struct PackedMemory {
    pub elements: BufferRange,
    pub exponents: BufferRange,
    /// Terms with padding.
    pub padded_cols: u32,
    /// Tokens with padding.
    pub padded_rows: u32,
}

/// Whether a left operand is packed. Others stay in float32.
fn packs(mixed: &Mixed, x: &Mat) -> bool {
    x.rows >= mixed::MIN_ROWS && x.cols > 0 && mixed.binds(Size { rows: x.rows, cols: x.cols })
}

/// The left operand of a product: a matrix, packed or not.
#[derive(Debug, Clone, Copy)]
pub enum Left<'a> {
    /// Only for this product.
    Mat(&'a Mat),
    /// For several products.
    Packed(&'a Packed),
}

impl Packed {
    /// The matrix: its elements are in its memory unless a kernel wrote only the packed form.
    pub fn mat(&self) -> &Mat {
        &self.mat
    }

    /// The memory for matrix units, if it is there.
    pub fn memory(&self) -> Option<PackedMemory> {
        let (panels, _) = self.panels.as_ref()?;
        Some(PackedMemory {
            elements: panels.range.clone(),
            exponents: panels.exponents_range.clone(),
            padded_cols: panels.size.padded_cols(),
            padded_rows: panels.size.padded_rows(),
        })
    }

    /// Its number among the operands for matrix units.
    fn number(&self) -> Option<u64> {
        self.panels.as_ref().map(|(_, number)| *number)
    }
}

impl<'a> From<&'a Mat> for Left<'a> {
    fn from(mat: &'a Mat) -> Self {
        Self::Mat(mat)
    }
}

impl<'a> From<&'a Packed> for Left<'a> {
    fn from(packed: &'a Packed) -> Self {
        Self::Packed(packed)
    }
}

impl<'a> Left<'a> {
    /// The matrix: its elements are in its memory unless a kernel wrote only the packed form.
    pub fn mat(self) -> &'a Mat {
        match self {
            Self::Mat(mat) => mat,
            Self::Packed(packed) => &packed.mat,
        }
    }

    /// Checks that the elements are in float32.
    fn in_floats(self) -> Result<(), OpError> {
        match self {
            Self::Packed(Packed { in_floats: false, .. }) => {
                let (operation, what) = ("a packed operand", "its copies in float32");
                Err(OpError::Shape { operation, what, expected: 1, found: 0 })
            }
            _ => Ok(()),
        }
    }
}

impl Matmul {
    /// GPU memory of a `Matmul` in bytes, for products of at most `rows` rows with weights of these
    /// shapes [outputs, inputs] and adapters of `rank`, forward and backward.
    pub fn scratch_bytes(units: Option<MatrixUnits>, rows: u32, weights: &[(u32, u32)], rank: u32) -> u64 {
        let mixed = units.map_or(0, |_| Memory::bytes(rows, weights, rank));
        kernels::SCRATCH_BYTES.saturating_add(mixed)
    }

    /// Reserves the memory of [`Matmul::scratch_bytes`]. Without this call, it grows on demand.
    ///
    /// # Errors
    /// [`OpError::Gpu`] if memory is exhausted.
    pub fn reserve(&self, rows: u32, weights: &[(u32, u32)], rank: u32) -> Result<(), OpError> {
        let gpu = self.kernels.gpu();
        self.mixed.as_ref().map_or(Ok(()), |mixed| mixed.memory().reserve(gpu, rows, weights, rank))
    }

    /// Prepares the products on `gpu`. With `units`, large products with frozen weights run on
    /// matrix units.
    ///
    /// # Errors
    /// [`OpError::Gpu`] if memory is exhausted or a kernel does not compile.
    pub fn new(gpu: &Gpu, units: Option<MatrixUnits>) -> Result<Self, OpError> {
        let kernels = Kernels::new(gpu, Tried::new(gpu), Tried::new(gpu), trial::TRIALS)?;
        let mixed = units.map(|units| Mixed::new(gpu, units, Tried::new(gpu), mixed::trial::of)).transpose()?;
        Ok(Self { kernels, wide: WideKernels::new(gpu, Tried::new(gpu), trial::of_wide), mixed })
    }

    /// Records the measurement of a weight for matrix units: its largest magnitude is then in
    /// `largest`, which was 0 before. Without it, each product measures the weight.
    ///
    /// # Errors
    /// As [`Matmul::forward`].
    pub fn measure(&self, commands: &mut Commands, w: &Weight<'_>, largest: &Largest) -> Result<(), OpError> {
        let Some(mixed) = &self.mixed else { return Ok(()) };
        for (rectangle, b) in w.pieces("the magnitude of a weight", self.binding())? {
            mixed.measure(commands, &b, rectangle.size(), w.inputs(), largest)?;
        }
        Ok(())
    }

    /// Names of the kernels on matrix units that were used, for tests.
    #[cfg(test)]
    pub fn used_mixed_kernels(&self) -> Vec<String> {
        self.mixed.as_ref().map_or_else(Vec::new, Mixed::used)
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

    /// Records the preparation of a left operand for several products. It is valid until the next
    /// preparation, also of a plain matrix. An operand that is packed stays so.
    ///
    /// # Errors
    /// [`OpError::Shape`] if a packed operand is no longer valid; as [`Matmul::nt`].
    pub fn pack<'a>(&self, commands: &mut Commands, x: impl Into<Left<'a>>) -> Result<Packed, OpError> {
        self.pack_to(commands, x, Place::Left)
    }

    /// As [`Matmul::pack`], to a place. It stays valid while operands are prepared in the other
    /// place.
    ///
    /// # Errors
    /// As [`Matmul::pack`].
    pub fn pack_to<'a>(&self, commands: &mut Commands, x: impl Into<Left<'a>>, place: Place) -> Result<Packed, OpError> {
        let x = match x.into() {
            Left::Mat(mat) => mat,
            Left::Packed(packed) => {
                let present = |mixed: &Mixed| packed.place.map(|place| mixed.present(place));
                let (expected, found) = (self.mixed.as_ref().and_then(present), packed.panels.as_ref());
                return match found.map(|(_, number)| *number).zip(expected).filter(|(found, expected)| found != expected) {
                    Some((found, expected)) => {
                        Err(OpError::Shape { operation: "a packed operand", what: "its number", expected, found })
                    }
                    None => Ok(packed.clone()),
                };
            }
        };
        x.check("pack", x.rows, x.cols)?;
        let packed = self.panels_for(x, place)?;
        if let (Some(mixed), Some((panels, _))) = (&self.mixed, &packed.panels) {
            mixed.pack(commands, &View::of(x), panels)?;
        }
        Ok(packed)
    }

    /// The memory of a packed operand for a kernel of the caller that writes it instead of
    /// [`Matmul::pack_to`]: see [`Packed::memory`]. If that is `None`, the products of `x` are in
    /// float32, and read `x` itself.
    ///
    /// What was packed in this place before is no longer valid. The elements of `x` itself are read
    /// only by products that do not run on matrix units: [`Matmul::only_packed`] says for which
    /// weights.
    ///
    /// # Errors
    /// [`OpError::Shape`], or [`OpError::Gpu`] if memory is exhausted.
    fn panels_for(&self, x: &Mat, place: Place) -> Result<Packed, OpError> {
        x.check("pack", x.rows, x.cols)?;
        let mixed = self.mixed.as_ref().filter(|mixed| packs(mixed, x));
        let panels = mixed.map(|mixed| mixed.panels_for(x.rows, x.cols, place)).transpose()?;
        Ok(Packed { mat: x.clone(), in_floats: true, panels, place: Some(place) })
    }

    /// Records `out[m, n] = scale * a[m, k] b[n, k]^T`, added to `out` if `add` is set.
    ///
    /// # Errors
    /// [`OpError::Shape`], [`OpError::Gpu`]; the recorded commands are then incomplete.
    pub fn nt<'a>(
        &self,
        commands: &mut Commands,
        a: impl Into<Left<'a>>,
        b: &Mat,
        scale: f32,
        add: bool,
        out: &Mat,
    ) -> Result<(), OpError> {
        let left = a.into();
        let a = left.mat();
        a.check("a b^T", out.rows, b.cols)?;
        b.check("a b^T", out.cols, b.cols)?;
        out.check("a b^T", out.rows, out.cols)?;
        let product = dense(View::of(a), (b, 0..b.rows), (b.cols, 1), out);
        self.record_dense(commands, left, Terms::Columns, b, &Product { k: b.cols, scale, add, ..product })
    }

    /// Records `out[m, n] = scale * a[m, k] b[k, n]`, added to `out` if `add` is set.
    ///
    /// # Errors
    /// As [`Matmul::nt`].
    pub fn nn<'a>(
        &self,
        commands: &mut Commands,
        a: impl Into<Left<'a>>,
        b: &Mat,
        scale: f32,
        add: bool,
        out: &Mat,
    ) -> Result<(), OpError> {
        let left = a.into();
        let a = left.mat();
        a.check("a b", out.rows, b.rows)?;
        b.check("a b", b.rows, out.cols)?;
        out.check("a b", out.rows, out.cols)?;
        let product = dense(View::of(a), (b, 0..b.rows), (1, b.cols), out);
        self.record_dense(commands, left, Terms::Rows, b, &Product { k: b.rows, scale, add, ..product })
    }

    /// Records `out[m, n] = scale * a[k, m]^T b[k, n]`, added to `out` if `add` is set. If one of
    /// them is packed and the other one has few columns, on matrix units.
    ///
    /// # Errors
    /// As [`Matmul::nt`].
    pub fn tn<'a>(
        &self,
        commands: &mut Commands,
        a: impl Into<Left<'a>>,
        b: impl Into<Left<'a>>,
        scale: f32,
        add: bool,
        out: &Mat,
    ) -> Result<(), OpError> {
        let (left, right) = (a.into(), b.into());
        let (a, b) = (left.mat(), right.mat());
        a.check("a^T b", b.rows, out.rows)?;
        b.check("a^T b", b.rows, out.cols)?;
        out.check("a^T b", out.rows, out.cols)?;
        if b.rows == 0 {
            let product = dense(View::of(a), (b, 0..0), (1, b.cols), out);
            return self.record(commands, &Product { scale, add, ..product });
        }
        let of_columns = View::of(out);
        let sides = match (left, right) {
            (Left::Packed(wide), _) => Some((wide, b, of_columns)),
            (_, Left::Packed(wide)) => Some((wide, a, of_columns.transposed())),
            _ => None,
        };
        if let Some((wide, narrow, out)) = sides
            && let (Some(mixed), Some((panels, _))) = (&self.mixed, &wide.panels)
            && mixed.sums_rows(&self.kernels, panels, narrow)
        {
            self.pack(commands, wide)?;
            return mixed.over_rows(&self.kernels, commands, (panels, narrow), (scale, add), &out);
        }
        [left, right].into_iter().try_for_each(Left::in_floats)?;
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
    pub fn forward<'a>(
        &self,
        commands: &mut Commands,
        x: impl Into<Left<'a>>,
        w: &Weight<'_>,
        bias: Option<&Mat>,
        add: bool,
        y: &Mat,
    ) -> Result<(), OpError> {
        self.forward_with(commands, x.into(), w, bias, None, add, y)
    }

    /// As [`Matmul::forward`], with the terms of an adapter if [`Matmul::fuses`] permits it.
    #[expect(clippy::too_many_arguments, reason = "operands, and how")]
    fn forward_with(
        &self,
        commands: &mut Commands,
        left: Left<'_>,
        w: &Weight<'_>,
        bias: Option<&Mat>,
        adapter: Option<Adapter<'_>>,
        add: bool,
        y: &Mat,
    ) -> Result<(), OpError> {
        let x = left.mat();
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
        let packed = self.pack(commands, left)?;
        for (rectangle, b) in self.pieces("x W^T", &packed, w)? {
            let (rows, columns) = (&rectangle.rows, &rectangle.columns);
            // A later part of a cut row is added to the result of its first part.
            let starts = columns.start == 0;
            let product = Product {
                m: x.rows,
                n: rows.end - rows.start,
                k: columns.end - columns.start,
                a: View::of(x).shifted(columns.start),
                b,
                b_largest: w.largest().cloned(),
                b_strides: (w.inputs(), 1),
                out: View::of(y).shifted(rows.start),
                scale: w.factor(),
                add: add || !starts,
                bias: bias.filter(|_| starts).map(|bias| (bias.range.clone(), rows.start)),
            };
            let of_rows = |adapter| (adapter, rows.clone());
            self.record_frozen(commands, &packed, Terms::Columns, &rectangle, adapter.map(of_rows), &product)?;
        }
        Ok(())
    }

    /// Records `dx[m, inputs] = factor * dy[m, outputs] w`, added to `dx` if `add` is set. `factor`
    /// is set by [`Weight::times`].
    ///
    /// # Errors
    /// As [`Matmul::forward`].
    pub fn backward<'a>(
        &self,
        commands: &mut Commands,
        dy: impl Into<Left<'a>>,
        w: &Weight<'_>,
        add: bool,
        dx: &Mat,
    ) -> Result<(), OpError> {
        self.backward_with(commands, dy.into(), w, None, add, dx)
    }

    /// As [`Matmul::backward`], with the terms of an adapter if [`Matmul::fuses`] permits it.
    fn backward_with(
        &self,
        commands: &mut Commands,
        left: Left<'_>,
        w: &Weight<'_>,
        adapter: Option<Adapter<'_>>,
        add: bool,
        dx: &Mat,
    ) -> Result<(), OpError> {
        let dy = left.mat();
        dy.check("dy W", dy.rows, w.outputs())?;
        dx.check("dy W", dy.rows, w.inputs())?;
        let packed = self.pack(commands, left)?;
        let pieces = self.pieces("dy W", &packed, w)?;
        // The first piece of whole rows writes every element; the others are added.
        let whole = |(rectangle, _): &(Rectangle, Right)| rectangle.columns == (0..w.inputs());
        let written = pieces.first().is_some_and(whole);
        if !written && !add {
            commands.clear(&dx.range.slice(0, 4 * u64::from(dx.rows) * u64::from(dx.cols)));
        }
        for (i, (rectangle, b)) in pieces.into_iter().enumerate() {
            let (rows, columns) = (&rectangle.rows, &rectangle.columns);
            let product = Product {
                m: dy.rows,
                n: columns.end - columns.start,
                k: rows.end - rows.start,
                a: View::of(dy).shifted(rows.start),
                b,
                b_largest: w.largest().cloned(),
                b_strides: (1, w.inputs()),
                out: View::of(dx).shifted(columns.start),
                scale: w.factor(),
                add: add || i > 0 || !written,
                bias: None,
            };
            // The sums run over the rows. The first piece has the terms of the adapter.
            let whole = adapter.filter(|_| i == 0).map(|adapter| (adapter, 0..adapter.other.rows));
            self.record_frozen(commands, &packed, Terms::Rows, &rectangle, whole, &product)?;
        }
        Ok(())
    }

    /// The rectangles of a weight for products with `left`.
    fn pieces(&self, operation: &'static str, left: &Packed, w: &Weight<'_>) -> Result<Vec<(Rectangle, Right)>, OpError> {
        match left.panels {
            Some(_) => w.pieces_of_rows(operation, self.binding(), mixed::rows_at_once(w.inputs())),
            None => w.pieces(operation, self.binding()),
        }
    }

    /// Records a product with a whole dense matrix: on matrix units if the left operand was packed
    /// for other products, too, and has enough rows. Packing for this product alone costs more
    /// than it saves: one side of these products is short.
    fn record_dense(
        &self,
        commands: &mut Commands,
        left: Left<'_>,
        terms: Terms,
        b: &Mat,
        product: &Product,
    ) -> Result<(), OpError> {
        match left {
            Left::Packed(packed) if product.m >= mixed::MIN_DENSE_ROWS && product.n > 0 && product.k > 0 => {
                let packed = self.pack(commands, packed)?;
                let rectangle = Rectangle { rows: 0..b.rows, columns: 0..b.cols };
                self.record_frozen(commands, &packed, terms, &rectangle, None, product)
            }
            _ => {
                left.in_floats()?;
                self.record(commands, product)
            }
        }
    }

    /// Records a product with a rectangle of a frozen weight: on matrix units if the left operand
    /// is in panels and the rectangle has whole rows. `terms` is the side of the weight over which
    /// the sums run. An adapter comes with the rows of its second operand.
    fn record_frozen(
        &self,
        commands: &mut Commands,
        left: &Packed,
        terms: Terms,
        rectangle: &Rectangle,
        adapter: Option<(Adapter<'_>, Range<u32>)>,
        product: &Product,
    ) -> Result<(), OpError> {
        let in_floats = |commands: &mut Commands| {
            Left::from(left).in_floats()?;
            self.record(commands, product)
        };
        let (Some(mixed), Some((panels, _))) = (&self.mixed, &left.panels) else { return in_floats(commands) };
        let first = if terms == Terms::Rows { rectangle.rows.start } else { rectangle.columns.start };
        let size = rectangle.size();
        let inputs = product.b_strides.0.max(product.b_strides.1);
        if size.cols != inputs || !first.is_multiple_of(panels::WIDTH) || !mixed.binds(size) {
            return in_floats(commands);
        }
        let adapter =
            adapter.map(|(adapter, rows)| self.terms_of(commands, mixed, left, adapter, rows, product)).transpose()?;
        let adapter = adapter.as_ref().map(|(low, other, ratio)| LowRank { low, other, ratio: *ratio });
        let right = mixed.decode(commands, &product.b, size, inputs, product.b_largest.as_ref())?;
        let right = Side { panels: &right, terms, first: (0, 0) };
        // The first row of a side is a multiple of the padding.
        let max_rows = (self.rows_within_binding(product.out.row) / panels::PADDING).max(1) * panels::PADDING;
        for row in (0..product.m).step_by(max_rows as usize) {
            let m = max_rows.min(product.m - row);
            let out = product.out.window(row..row + m, product.n);
            let left = Side { panels, terms: Terms::Columns, first: (row, first) };
            let target = product::Target { m, out: &out, ..product.target() };
            mixed.multiply(&self.kernels, commands, [left, right], product.k, adapter, target)?;
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

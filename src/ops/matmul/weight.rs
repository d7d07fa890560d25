//! Frozen weights, and their rectangles that fit a binding, for products and gathers.

use std::ops::Range;

use super::panels::Size;
use crate::dequant::operand::{ALIGN, Operand};
use crate::dequant::{Codec, GpuWeights};
use crate::format::{FloatType, Section};
use crate::gpu::BufferRange;
use crate::ops::error::OpError;

/// A frozen weight [outputs, inputs], row-major, or some of its rows.
#[derive(Debug, Clone)]
pub struct Weight<'a> {
    elements: Elements<'a>,
    outputs: u32,
    inputs: u32,
    rows: Range<u32>,
    factor: f32,
    largest: Option<Largest>,
}

/// Where the device keeps the largest magnitude of a weight, once it was measured: element `at`.
#[derive(Debug, Clone)]
pub struct Largest {
    /// A u32 for each of some weights.
    pub range: BufferRange,
    /// The index.
    pub at: u32,
}

/// Storage of a weight.
#[derive(Debug, Clone, Copy)]
pub enum Elements<'a> {
    /// Codes and scales, which kernels decode on the fly.
    Quantized(&'a GpuWeights),
    /// Raw floats.
    Raw {
        /// Element type.
        float_type: FloatType,
        /// All elements, little-endian. All parts except the last have the same size.
        parts: &'a [BufferRange],
    },
}

/// How the elements of a frozen matrix are stored. Selects the kernels of its products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Stored {
    /// Codes and scales of this codec.
    Quantized(Codec),
    /// Floats.
    Raw(FloatType),
}

impl Stored {
    /// All that a pack may have.
    pub fn all() -> impl Iterator<Item = Self> {
        let types = [FloatType::F32, FloatType::F16, FloatType::Bf16];
        Codec::ALL.into_iter().map(Self::Quantized).chain(types.map(Self::Raw))
    }

    /// How the elements of a tensor are stored, by its first section.
    pub fn of(section: &Section) -> Option<Self> {
        let codec = Codec::of(section.element_type, section.scale_type).map(Self::Quantized);
        codec.or_else(|| section.element_type.float_type().map(Self::Raw))
    }
}

/// Some rows and columns of a weight, in one part: whole rows, or a piece of one row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::ops) struct Rectangle {
    pub rows: Range<u32>,
    pub columns: Range<u32>,
}

impl Rectangle {
    /// Its size as a matrix.
    pub(super) fn size(&self) -> Size {
        Size { rows: self.rows.end - self.rows.start, cols: self.columns.end - self.columns.start }
    }
}

/// The bound elements of a rectangle: the right operand of a product, or a window of a table.
#[derive(Debug, Clone)]
pub(in crate::ops) enum Right {
    Quantized { operand: Operand, codec: Codec, whole_words: bool },
    Raw { range: BufferRange, first: u32, float_type: FloatType },
}

impl Right {
    /// Index of its first element in the binding.
    pub fn first(&self) -> u32 {
        match self {
            Self::Quantized { operand, .. } => operand.first,
            Self::Raw { first, .. } => *first,
        }
    }

    /// How its elements are stored.
    pub fn stored(&self) -> Stored {
        match *self {
            Self::Quantized { codec, .. } => Stored::Quantized(codec),
            Self::Raw { float_type, .. } => Stored::Raw(float_type),
        }
    }

    /// Bindings 0 to 3.
    pub fn bindings(&self) -> [BufferRange; 4] {
        match self {
            Self::Quantized { operand, .. } => operand.bindings.clone(),
            // Raw floats need only the first.
            Self::Raw { range, .. } => [range.clone(), range.clone(), range.clone(), range.clone()],
        }
    }
}

/// The constant `FLOATS` of the shaders.
pub(in crate::ops) fn floats_constant(float_type: FloatType) -> f64 {
    match float_type {
        FloatType::F32 => 0.0,
        FloatType::F16 => 1.0,
        FloatType::Bf16 => 2.0,
    }
}

impl<'a> Weight<'a> {
    /// All rows of a weight.
    pub fn new(elements: Elements<'a>, outputs: u32, inputs: u32) -> Self {
        Self { elements, outputs, inputs, rows: 0..outputs, factor: 1.0, largest: None }
    }

    /// The same weight with a factor for its products, forward and backward, and for the bias.
    #[must_use]
    pub fn times(self, factor: f32) -> Self {
        Self { factor, ..self }
    }

    /// The same weight. [`Matmul::measure`](super::Matmul::measure) wrote its largest magnitude
    /// here.
    #[must_use]
    pub fn measured(self, largest: Largest) -> Self {
        Self { largest: Some(largest), ..self }
    }

    /// Where its largest magnitude is.
    pub(super) fn largest(&self) -> Option<&Largest> {
        self.largest.as_ref()
    }

    /// The factor of its products.
    pub fn factor(&self) -> f32 {
        self.factor
    }

    /// Only the rows (outputs) in `rows`, from the first row of this weight on.
    #[must_use]
    pub fn rows(&self, rows: Range<u32>) -> Self {
        let from = self.rows.start;
        Self { rows: from.saturating_add(rows.start)..from.saturating_add(rows.end), ..self.clone() }
    }

    /// Number of rows.
    pub fn outputs(&self) -> u32 {
        self.rows.end.saturating_sub(self.rows.start)
    }

    /// Number of columns.
    pub fn inputs(&self) -> u32 {
        self.inputs
    }

    /// Its storage.
    pub(super) fn elements(&self) -> &Elements<'a> {
        &self.elements
    }

    /// The row of the whole weight that is its first.
    pub(super) fn first_row(&self) -> u32 {
        self.rows.start
    }

    /// Checks that the buffers hold the weight.
    ///
    /// # Errors
    /// As [`Weight::pieces`].
    pub(super) fn check(&self, operation: &'static str, binding: u64) -> Result<(), OpError> {
        self.part_and_max(operation, binding).map(drop)
    }

    /// The rectangles to bind in order, each with its elements. Rows count from the first row of
    /// this weight.
    ///
    /// # Errors
    /// [`OpError::Shape`] and [`OpError::Weights`] if the buffers are too small for the weight.
    pub(in crate::ops) fn pieces(&self, operation: &'static str, binding: u64) -> Result<Vec<(Rectangle, Right)>, OpError> {
        self.pieces_of_rows(operation, binding, u32::MAX)
    }

    /// As [`Weight::pieces`], with at most `rows` rows each.
    ///
    /// # Errors
    /// As [`Weight::pieces`].
    pub(in crate::ops) fn pieces_of_rows(
        &self,
        operation: &'static str,
        binding: u64,
        rows: u32,
    ) -> Result<Vec<(Rectangle, Right)>, OpError> {
        let (part, max) = self.part_and_max(operation, binding)?;
        let inputs = u64::from(self.inputs);
        let max = max.min(inputs.saturating_mul(rows.into()));
        rectangles(&self.rows, self.inputs, part, max)
            .map(|rectangle| {
                let first = u64::from(rectangle.rows.start) * inputs + u64::from(rectangle.columns.start);
                let last = u64::from(rectangle.rows.end - 1) * inputs + u64::from(rectangle.columns.end);
                let right = self.right(first..last, part)?;
                let from = self.rows.start;
                Ok((Rectangle { rows: rectangle.rows.start - from..rectangle.rows.end - from, ..rectangle }, right))
            })
            .collect()
    }

    /// Checks that the buffers hold the weight. Returns the elements in each part except the last,
    /// and the maximum elements of a binding.
    fn part_and_max(&self, operation: &'static str, binding: u64) -> Result<(u64, u64), OpError> {
        let shape = |what, expected: u64, found: u64| Err(OpError::Shape { operation, what, expected, found });
        let elements = u64::from(self.outputs) * u64::from(self.inputs);
        if self.rows.start > self.rows.end || self.rows.end > self.outputs {
            return shape("the end of the rows", self.outputs.into(), self.rows.end.into());
        }
        match self.elements {
            Elements::Quantized(weights) if weights.elements != elements => {
                shape("the number of weights", elements, weights.elements)
            }
            Elements::Quantized(weights) => Ok((weights.part_elements()?, GpuWeights::operand_elements(binding))),
            Elements::Raw { float_type, parts } => {
                let size = float_type.size() as u64;
                let part = parts.first().map_or(0, |part| part.size) / size;
                let needed = |i: usize| elements.saturating_sub(part.saturating_mul(i as u64)).min(part) * size;
                if let Some((i, wrong)) = parts.iter().enumerate().find(|&(i, range)| range.size < needed(i)) {
                    return shape("the size of a part of the weights", needed(i), wrong.size);
                }
                let held = part.saturating_mul(parts.len() as u64);
                if held < elements {
                    return shape("the number of weights", elements, held);
                }
                Ok((part.max(1), (binding.saturating_sub(ALIGN) / size).clamp(8, 1 << 30) / 8 * 8))
            }
        }
    }

    /// The elements in `range`, all in the same part.
    fn right(&self, range: Range<u64>, part: u64) -> Result<Right, OpError> {
        match self.elements {
            Elements::Quantized(weights) => {
                let whole_words = [u64::from(self.inputs), range.start, range.end].iter().all(|at| at.is_multiple_of(8));
                let operand = weights.operand(range)?;
                Ok(Right::Quantized { operand, codec: weights.codec, whole_words })
            }
            Elements::Raw { float_type, parts } => {
                let missing = || OpError::Shape {
                    operation: "a weight",
                    what: "the number of parts",
                    expected: range.start / part + 1,
                    found: parts.len() as u64,
                };
                let within = parts.get((range.start / part) as usize).ok_or_else(missing)?;
                let (start, end) = (range.start % part, range.start % part + (range.end - range.start));
                let (range, first) = bound(within, start, end, float_type.size() as u64);
                Ok(Right::Raw { range, first, float_type })
            }
        }
    }
}

/// The range of whole words with elements `start..end` of `size` bytes, at a valid binding offset,
/// and the index of the first element in it.
pub(super) fn bound(range: &BufferRange, start: u64, end: u64, size: u64) -> (BufferRange, u32) {
    let from = start * size / ALIGN * ALIGN;
    let first = (start - from / size) as u32;
    (range.slice(from, (end * size).next_multiple_of(4) - from), first)
}

/// Cuts the rows at the ends of parts, and after at most `max` elements.
fn rectangles(rows: &Range<u32>, columns: u32, part: u64, max: u64) -> impl Iterator<Item = Rectangle> {
    let width = u64::from(columns);
    let (mut at, end) = (u64::from(rows.start) * width, u64::from(rows.end) * width);
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let limit = end.min((at / part + 1).saturating_mul(part)).min(at + max);
        // Both are at most the number of rows or columns.
        let (row, column) = ((at / width) as u32, (at % width) as u32);
        let whole = ((limit - at) / width) as u32;
        if column == 0 && whole > 0 {
            at += u64::from(whole) * width;
            return Some(Rectangle { rows: row..row + whole, columns: 0..columns });
        }
        let count = (limit - at).min(width - u64::from(column)) as u32;
        at += u64::from(count);
        Some(Rectangle { rows: row..row + 1, columns: column..column + count })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rectangles_cover_every_element_once_in_order() {
        for (columns, rows, part, max) in [
            (7, 3..11, 1000, 1000),
            (7, 0..9, 10, 64),
            (7, 1..9, 64, 5),
            (100, 0..4, 24, 1000),
            (1, 0..70, 64, 8),
            (8, 2..2, 9, 9),
        ] {
            let mut next = u64::from(rows.start) * columns;
            for Rectangle { rows, columns: c } in rectangles(&rows, columns as u32, part, max) {
                let start = u64::from(rows.start) * columns + u64::from(c.start);
                let end = u64::from(rows.end - 1) * columns + u64::from(c.end);
                assert_eq!(start, next);
                assert!(end > start && end - start <= max, "{rows:?} {c:?}");
                assert_eq!(start / part, (end - 1) / part);
                assert!(rows.len() == 1 || (u64::from(c.start), u64::from(c.end)) == (0, columns));
                next = end;
            }
            assert_eq!(next, u64::from(rows.end) * columns);
        }
    }

    #[test]
    fn rows_of_rows() {
        let weight = Weight::new(Elements::Raw { float_type: FloatType::F32, parts: &[] }, 100, 3).rows(10..50).rows(5..9);
        assert_eq!((weight.rows.clone(), weight.outputs()), (15..19, 4));
    }
}

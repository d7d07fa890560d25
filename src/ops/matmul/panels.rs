//! Panels: the layout of operands of products on matrix units.
//!
//! A matrix [rows, cols] is a list of panels of 32 columns each. A panel has its rows one after
//! another, 32 f16 each:
//!
//! ```text
//! element (i, j) is at ((j / 32) * R + i) * 32 + j % 32     R: rows, padded
//! ```
//!
//! So a tile of 32 columns is one piece of memory, and a tile of 32 rows and 128 columns is four.
//! One layout serves every operand: the sums of a product run over the columns of a matrix in
//! panels ([`Terms::Columns`]: x and W of x W^T) or over its rows ([`Terms::Rows`]: W of dy W).
//!
//! Rows and columns are padded with zeros to a multiple of 128, so kernels read whole tiles.
//!
//! Elements are scaled: element x is stored as x * 2^-e. Each row has its own exponent e, or the
//! matrix has one. A sum over the columns is multiplied by 2^e afterwards. If sums run over the
//! rows, one exponent for the product is needed: the other operand has those of its rows, too.

use crate::gpu::BufferRange;

/// Columns of a panel, and the step of a product along its sums.
pub(super) const WIDTH: u32 = 32;
/// Rows and columns are padded to a multiple of this, the side of the largest tile.
pub(super) const PADDING: u32 = 128;
/// Bytes of an element.
const ELEMENT: u64 = 2;

/// The size of a matrix in panels, without padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Size {
    pub rows: u32,
    pub cols: u32,
}

/// The side of a matrix over which the sums of a product run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Terms {
    Columns,
    Rows,
}

/// The exponents of a matrix in panels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Exponents {
    ByRow,
    One,
}

/// A matrix in panels.
#[derive(Debug, Clone)]
pub(super) struct Panels {
    pub size: Size,
    /// The elements.
    pub range: BufferRange,
    pub exponents: Exponents,
    /// An i32 for each padded row, or one.
    pub exponents_range: BufferRange,
}

impl Size {
    pub fn padded_rows(self) -> u32 {
        self.rows.next_multiple_of(PADDING)
    }

    pub fn padded_cols(self) -> u32 {
        self.cols.next_multiple_of(PADDING)
    }

    /// Bytes of the elements, with padding. It saturates for sizes that no buffer has.
    pub fn bytes(self) -> u64 {
        let padded = |count: u32| u64::from(count).next_multiple_of(PADDING.into());
        padded(self.rows).saturating_mul(padded(self.cols)).saturating_mul(ELEMENT)
    }

    /// Bytes of the exponents of the rows.
    pub fn exponent_bytes(self) -> u64 {
        4 * u64::from(self.rows).next_multiple_of(PADDING.into())
    }

    /// The index of an element.
    pub fn at(self, row: u32, column: u32) -> usize {
        let panel = u64::from(column / WIDTH) * u64::from(self.padded_rows());
        ((panel + u64::from(row)) * u64::from(WIDTH) + u64::from(column % WIDTH)) as usize
    }
}

/// The exponent of numbers of at most this magnitude, as the kernels compute it.
pub(super) fn exponent(largest: f32) -> i32 {
    match largest.is_finite() {
        true => ((largest.to_bits() >> 23) as i32 - 136).max(-126),
        false => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_has_its_place_and_padding_fills_the_rest() {
        let size = Size { rows: 130, cols: 37 };
        let mut used = vec![false; (size.bytes() / ELEMENT) as usize];
        for (i, j) in (0..256).flat_map(|i| (0..128).map(move |j| (i, j))) {
            assert!(!std::mem::replace(&mut used[size.at(i, j)], true));
        }
        assert!(used.into_iter().all(|used| used));
        assert_eq!((size.padded_rows(), size.padded_cols(), size.exponent_bytes()), (256, 128, 1024));
        assert_eq!(Size { rows: u32::MAX, cols: u32::MAX }.bytes(), u64::MAX);
    }

    #[test]
    fn scaled_magnitudes_lie_between_512_and_1024() {
        for x in [1e-30_f32, 6e-5, 0.75, 1.0, 1e6, f32::MAX] {
            let scaled = f64::from(x) * 2_f64.powi(-exponent(x));
            assert!((512.0..1024.0).contains(&scaled), "{x}: {scaled}");
        }
        assert_eq!([0.0, f32::INFINITY, f32::NAN].map(exponent), [-126, 0, 0]);
        assert_eq!(exponent(f32::from_bits(1)), -126);
    }
}

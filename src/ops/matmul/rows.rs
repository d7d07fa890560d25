//! The tiling of a product with few rows. Square tiles would be mostly empty, and reading the
//! weights dominates the time.

use super::product::Product;

/// Maximum rows that are computed together.
const MAX_ROWS: u32 = 8;
/// Threads per workgroup.
const WORKGROUP: u32 = 256;
/// Below this number of columns, each column takes a whole workgroup, to use the whole GPU.
const FEW_COLUMNS: u32 = 512;
/// Threads per column, if there are many columns.
const LANES: u32 = 32;

/// The properties that select a kernel of matmul_rows.wgsl, besides the type of its right operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FewRows {
    /// A power of two.
    pub rows: u32,
    /// Threads that share a column.
    pub lanes: u32,
    /// Whether every column of the right operand starts and ends on a group of eight elements.
    pub whole: bool,
}

impl FewRows {
    /// The kernel for a product with few rows, if terms are adjacent in both operands.
    pub fn of(product: &Product) -> Option<Self> {
        let (column, term) = product.b_strides;
        let fits = product.m <= MAX_ROWS && term == 1 && product.a.column == 1 && product.k > 0;
        let whole = [product.b.first(), column, product.k].iter().all(|at| at.is_multiple_of(8));
        let lanes = if product.n < FEW_COLUMNS { WORKGROUP } else { LANES };
        fits.then_some(Self { rows: product.m.next_power_of_two(), lanes, whole })
    }

    /// Columns per workgroup.
    pub fn columns(self) -> u32 {
        WORKGROUP / self.lanes
    }

    /// Number of workgroups for `columns` columns.
    pub fn groups(self, columns: u32) -> u64 {
        columns.div_ceil(self.columns()).into()
    }

    pub fn constants(self) -> Vec<(&'static str, f64)> {
        vec![
            ("M", self.rows.into()),
            ("LANES", self.lanes.into()),
            ("COLUMNS", self.columns().into()),
            ("WHOLE", u8::from(self.whole).into()),
            ("PARTIAL", (self.rows * WORKGROUP).into()),
        ]
    }
}

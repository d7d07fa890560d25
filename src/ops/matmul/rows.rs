//! How a product of a few rows is cut: tiles would be empty for the most part, and the weights are what takes the time.

use super::kernels::{Product, flag};

/// The most rows that are computed together.
const MAX_ROWS: u32 = 8;
/// Threads of a workgroup.
const WORKGROUP: u32 = 256;
/// Columns below which each takes a whole workgroup: else most of a GPU were idle.
const FEW_COLUMNS: u32 = 512;
/// Threads of a column where there are many.
const LANES: u32 = 32;

/// What makes a kernel of matmul_rows.wgsl, apart from the type of its right operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FewRows {
    /// A power of two.
    pub rows: u32,
    /// Threads that share a column.
    pub lanes: u32,
    /// Every column of the right operand starts and ends with an eight of elements.
    pub whole: bool,
}

impl FewRows {
    /// The form of a product that has few rows, and whose terms are neighbours in both operands.
    pub fn of(product: &Product) -> Option<Self> {
        let (column, term) = product.b_strides;
        let fits = product.m <= MAX_ROWS && term == 1 && product.a.column == 1 && product.k > 0;
        let whole = [product.b.first(), column, product.k].iter().all(|at| at.is_multiple_of(8));
        let lanes = if product.n < FEW_COLUMNS { WORKGROUP } else { LANES };
        fits.then_some(Self { rows: product.m.next_power_of_two(), lanes, whole })
    }

    /// Columns of a workgroup.
    pub fn columns(self) -> u32 {
        WORKGROUP / self.lanes
    }

    /// Workgroups that cover so many columns.
    pub fn groups(self, columns: u32) -> u64 {
        columns.div_ceil(self.columns()).into()
    }

    pub fn constants(self) -> Vec<(&'static str, f64)> {
        vec![
            ("M", self.rows.into()),
            ("LANES", self.lanes.into()),
            ("COLUMNS", self.columns().into()),
            ("WHOLE", flag(self.whole)),
            ("PARTIAL", (self.rows * WORKGROUP).into()),
        ]
    }
}

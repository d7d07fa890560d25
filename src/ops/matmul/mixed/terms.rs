//! The operands of an adapter in a product with a frozen weight.

use crate::ops::Mat;
use crate::ops::matmul::panels::Panels;

/// The largest factor of an adapter between the products, and the inverse of the smallest. Others
/// are added by a product of their own.
const MAX_RATIO: f32 = (1 << 20) as f32;

/// The terms of an adapter in a product with a frozen weight: `scale * low other`.
#[derive(Debug, Clone, Copy)]
pub struct Adapter<'a> {
    /// x A^T or dy B, [rows, rank].
    pub low: &'a Low,
    /// B [outputs, rank] after x A^T, A [rank, inputs] after dy B.
    pub other: &'a Mat,
    /// The factor of the product.
    pub scale: f32,
}

/// x A^T of a left operand x, or dy B: as a matrix [rows, rank], and for the product with the
/// frozen weight.
#[derive(Debug, Clone)]
pub struct Low {
    pub(super) mat: Mat,
    /// The panels, the number of the left operand and their own number.
    pub(super) panels: Option<(Panels, u64, u64)>,
}

/// The terms of an adapter in a product.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// [rows, rank].
    pub low: &'a Panels,
    /// [outputs, rank] or [rank, inputs].
    pub other: &'a Panels,
    /// The factor of its terms.
    pub ratio: f32,
}

/// Whether a product may have the terms of an adapter with this factor.
pub fn fits(ratio: f32) -> bool {
    (1.0 / MAX_RATIO..=MAX_RATIO).contains(&ratio.abs())
}

impl Low {
    /// A matrix that only a product of its own adds.
    pub fn plain(mat: &Mat) -> Self {
        Self { mat: mat.clone(), panels: None }
    }

    /// The matrix.
    pub fn mat(&self) -> &Mat {
        &self.mat
    }
}

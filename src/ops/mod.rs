//! The operations of a transformer on the GPU, with forward and backward kernels: float32,
//! row-major.
//!
//! Operations record into a list of commands and read nothing back. Each checks on the host that
//! its tensors contain every index of its kernels. So the kernels run without runtime checks.

mod attention;
mod cached_attention;
mod dropout;
mod embedding;
pub mod error;
mod finite;
mod glu;
mod glu_halves;
mod halves;
mod heads;
#[cfg(test)]
mod limits;
mod loss;
pub mod matmul;
pub mod mixed_test;
mod norm_rotary;
mod optimizer;
mod pieces;
#[cfg(test)]
mod poison;
mod rms_norm;
mod rotary;
mod sample;
mod scale;
mod split_heads;

#[cfg(test)]
pub(crate) mod testing;
mod trial;

pub use attention::{Attention, AttentionShape};
pub use cached_attention::{CachedAttention, CachedAttentionShape};
pub use dropout::{Dropout, DropoutKey};
pub use embedding::Gather;
pub use finite::FiniteCheck;
pub use glu::Glu;
pub use glu_halves::StoredGlu;
pub use halves::Halves;
pub use heads::Heads;
pub use loss::{ChunkedLoss, IGNORE_INDEX};
pub use norm_rotary::{NormRotary, Turn};
pub use optimizer::{AdamW, AdamWState, AdamWStep};
pub use rms_norm::RmsNorm;
pub use rotary::{Rotary, inverse_frequencies};
pub use sample::{Choice, Sample, SampleRules};
pub use scale::Scale;
pub use split_heads::{JoinedHeads, SplitHeads};

use crate::gpu::{BufferRange, Gpu, GpuError};

pub use error::OpError;

/// Compares a size of an operation with its expected value.
fn same(operation: &'static str, what: &'static str, expected: u64, found: u64) -> Result<(), OpError> {
    match found == expected {
        true => Ok(()),
        false => Err(OpError::Shape { operation, what, expected, found }),
    }
}

/// A float32 matrix in GPU memory, row-major, without padding between rows.
#[derive(Debug, Clone)]
pub struct Mat {
    /// Its bytes: at least `4 * rows * cols`.
    pub range: BufferRange,
    /// Rows: tokens, or outputs of a weight.
    pub rows: u32,
    /// Columns: features.
    pub cols: u32,
}

/// Bytes of a matrix. It saturates: no buffer has that many bytes, so a size that a u64 cannot hold
/// is an error when the buffer is created, and never a small buffer.
pub(crate) fn mat_bytes(rows: u32, cols: u32) -> u64 {
    u64::from(rows).saturating_mul(cols.into()).saturating_mul(4)
}

impl Mat {
    /// Creates a matrix of zeros in its own buffer. WebGPU clears new buffers before their first
    /// use.
    ///
    /// # Errors
    /// [`GpuError::TooLarge`], [`GpuError::OutOfMemory`].
    pub fn new(gpu: &Gpu, label: &str, rows: u32, cols: u32) -> Result<Self, GpuError> {
        let bytes = mat_bytes(rows, cols);
        let buffer = gpu.storage(label, bytes)?;
        Ok(Self { range: BufferRange { buffer, offset: 0, size: bytes }, rows, cols })
    }

    /// Creates a matrix with these elements.
    ///
    /// # Errors
    /// [`OpError::Shape`] if their number is not `rows * cols`; [`OpError::Gpu`].
    pub fn from_slice(gpu: &Gpu, label: &str, rows: u32, cols: u32, elements: &[f32]) -> Result<Self, OpError> {
        let expected = u64::from(rows) * u64::from(cols);
        let found = elements.len() as u64;
        if found != expected {
            return Err(OpError::Shape { operation: "upload", what: "the number of elements", expected, found });
        }
        let buffer = gpu.storage_with(label, bytemuck::cast_slice(elements))?;
        Ok(Self { range: BufferRange { buffer, offset: 0, size: 4 * expected }, rows, cols })
    }

    /// Waits for all submitted work and returns the elements.
    ///
    /// # Errors
    /// Any device error.
    pub fn read(&self, gpu: &Gpu) -> Result<Vec<f32>, GpuError> {
        let mut elements = vec![0.0; self.rows as usize * self.cols as usize];
        gpu.read_into(&self.range, bytemuck::cast_slice_mut(&mut elements))?;
        Ok(elements)
    }

    /// A matrix of this shape, over the first `rows * cols` elements of the same memory.
    pub(crate) fn narrow(&self, rows: u32, cols: u32) -> Self {
        Self { range: self.range.slice(0, mat_bytes(rows, cols)), rows, cols }
    }

    /// Some rows.
    pub(crate) fn window(&self, first: u32, rows: u32) -> Self {
        let range = self.range.slice(mat_bytes(first, self.cols), mat_bytes(rows, self.cols));
        Self { range, rows, cols: self.cols }
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        u64::from(self.rows) * u64::from(self.cols)
    }

    /// Checks the matrix against the shape that an operation requires.
    pub(super) fn check(&self, operation: &'static str, rows: u32, cols: u32) -> Result<(), OpError> {
        same(operation, "the number of rows", rows.into(), self.rows.into())?;
        same(operation, "the number of columns", cols.into(), self.cols.into())?;
        let bytes = mat_bytes(rows, cols);
        if self.range.size < bytes {
            return Err(OpError::Shape {
                operation,
                what: "the size of the buffer",
                expected: bytes,
                found: self.range.size,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::testing::gpu;
    use super::*;

    #[test]
    fn a_new_matrix_is_zero_in_memory_that_was_used_before() {
        let Some(gpu) = gpu() else { return };
        let (rows, cols) = (257, 129);
        for _ in 0..4 {
            let used = Mat::from_slice(&gpu, "used", rows, cols, &vec![f32::NAN; (rows * cols) as usize]).unwrap();
            assert!(used.read(&gpu).unwrap().iter().all(|x| x.is_nan()));
            drop(used);
            gpu.wait().unwrap();
            let new = Mat::new(&gpu, "new", rows, cols).unwrap();
            assert!(new.read(&gpu).unwrap().iter().all(|x| x.to_bits() == 0));
        }
    }
}

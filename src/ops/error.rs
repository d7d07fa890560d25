//! Why an operation could not be recorded or run.

use thiserror::Error;

use crate::dequant::DequantError;
use crate::gpu::GpuError;

/// Why an operation could not be recorded or run.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpError {
    /// The GPU could not do it.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// Quantised weights are not what they have to be.
    #[error(transparent)]
    Weights(#[from] DequantError),
    /// A kernel gives wrong values here: the device's driver cannot be trusted to train or run a model.
    #[error("kernel {kernel} gives wrong values on {device}: {reason}")]
    Unfit {
        /// The kernel, and the constants that it was compiled with.
        kernel: String,
        /// The device and its driver.
        device: String,
        /// How its values differ from the CPU's.
        reason: String,
    },
    /// An operation was given tensors whose sizes do not fit together: a defect of this program.
    #[error("{operation}: {what} is {found}, and must be {expected}")]
    Shape {
        /// The operation.
        operation: &'static str,
        /// What does not fit.
        what: &'static str,
        /// What it must be.
        expected: u64,
        /// What it is.
        found: u64,
    },
    /// An operation was given a number that it cannot work with.
    #[error("{operation}: {what} is {found}, and must be {expected}")]
    Value {
        /// The operation.
        operation: &'static str,
        /// What the number is for.
        what: &'static str,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        found: f64,
    },
}

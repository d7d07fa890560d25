//! Errors of operations.

use thiserror::Error;

use crate::dequant::DequantError;
use crate::gpu::GpuError;

/// An error of recording or running an operation.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpError {
    /// An error of the GPU.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// Quantised weights are inconsistent.
    #[error(transparent)]
    Weights(#[from] DequantError),
    /// A kernel gives wrong values: the driver of the device is broken for training and inference.
    #[error("kernel {kernel} gives wrong values on {device}: {reason}")]
    Unfit {
        /// The kernel and its constants.
        kernel: String,
        /// The device and its driver.
        device: String,
        /// The difference from the CPU.
        reason: String,
    },
    /// The tensors of an operation have inconsistent sizes. This is a bug in this program.
    #[error("{operation}: {what} is {found}, but must be {expected}")]
    Shape {
        /// The operation.
        operation: &'static str,
        /// The inconsistent quantity.
        what: &'static str,
        /// Expected value.
        expected: u64,
        /// Found value.
        found: u64,
    },
    /// A parameter of an operation is out of range.
    #[error("{operation}: {what} is {found}, but must be {expected}")]
    Value {
        /// The operation.
        operation: &'static str,
        /// The parameter.
        what: &'static str,
        /// Expected value.
        expected: &'static str,
        /// Found value.
        found: f64,
    },
}

//! Why a tensor could not be dequantised on the GPU.

use super::kernel::Output;
use crate::gpu::GpuError;

/// Why a tensor could not be dequantised on the GPU.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum DequantError {
    /// The device.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// The weights' buffers have not the sizes that their element count, block size and scale type call for, or do not start on
    /// multiples of 256 bytes.
    #[error("the buffers of the weights are inconsistent: {what} has {found}, and {expected} is needed")]
    Weights {
        /// What is wrong.
        what: &'static str,
        /// As it is.
        found: u64,
        /// As it has to be.
        expected: u64,
    },
    /// The elements asked for are not all there, or do not start on a multiple of 8.
    #[error("elements {start}..{end} are not a range that starts on a multiple of 8 within the {elements} of the tensor")]
    Range {
        /// The first element asked for.
        start: u64,
        /// One past the last.
        end: u64,
        /// Elements of the tensor.
        elements: u64,
    },
    /// The output is too small, or does not start on a multiple of 256 bytes.
    #[error("the output has {size} bytes from {offset}, and {needed} from a multiple of 256 are needed")]
    OutputRange {
        /// First byte.
        offset: u64,
        /// Bytes.
        size: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// The device's bindings are too small for any kernel.
    #[error("the device binds {limit} bytes, and the kernels need {needed}")]
    Binding {
        /// What it allows.
        limit: u64,
        /// What is needed.
        needed: u64,
    },
    /// Neither kernel gives the right values: the driver cannot be trusted with this output.
    #[error("the device fails the self-test of NF4 to {output}: {reason}")]
    Unfit {
        /// The output.
        output: Output,
        /// How it fails.
        reason: String,
    },
}

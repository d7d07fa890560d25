//! Errors of dequantisation on the GPU.

use super::output::Output;
use crate::gpu::GpuError;

/// An error of dequantisation on the GPU.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum DequantError {
    /// An error of the device.
    #[error(transparent)]
    Gpu(#[from] GpuError),
    /// The buffers of the weights do not match their element count, block size and scale type, or
    /// their offsets are not multiples of 256 bytes.
    #[error("the buffers of the weights are inconsistent: {what} is {found}, but {expected} is expected")]
    Weights {
        /// The inconsistent quantity.
        what: &'static str,
        /// Found value.
        found: u64,
        /// Expected value.
        expected: u64,
    },
    /// The requested elements are out of range, or their start is not a multiple of 8.
    #[error("elements {start}..{end} must start on a multiple of 8 and lie in a tensor of {elements} elements")]
    Range {
        /// First requested element.
        start: u64,
        /// End of the range.
        end: u64,
        /// Elements of the tensor.
        elements: u64,
    },
    /// The output is too small, or its offset is not a multiple of 256 bytes.
    #[error("the output has {size} bytes at offset {offset}, but needs {needed} bytes at a multiple of 256")]
    OutputRange {
        /// Offset of the output.
        offset: u64,
        /// Size of the output.
        size: u64,
        /// Needed bytes.
        needed: u64,
    },
    /// The binding limit of the device is too small for every kernel.
    #[error("the device binds at most {limit} bytes, but the kernels need {needed}")]
    Binding {
        /// Device limit in bytes.
        limit: u64,
        /// Needed bytes.
        needed: u64,
    },
    /// Both kernels give wrong values: the driver is broken for this output.
    #[error("the device fails the self-test of NF4 to {output}: {reason}")]
    Unfit {
        /// The output.
        output: Output,
        /// How the kernel fails.
        reason: String,
    },
}

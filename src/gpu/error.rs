//! Errors of a GPU, by cause.

use thiserror::Error;

/// An error of a GPU.
#[derive(Debug, Clone, Error)]
#[non_exhaustive]
pub enum GpuError {
    /// No adapter: no driver is installed, or no driver finds a GPU
    /// ([`DRIVER_HINT`](super::DRIVER_HINT)).
    #[error("no GPU found, not even a software one")]
    NoAdapter,
    /// No adapter has the requested name or index.
    #[error("no GPU {requested:?}; there are: {}", present.join(", "))]
    NoSuchAdapter {
        /// Requested name or index.
        requested: String,
        /// Names of the present adapters, by index.
        present: Vec<String>,
    },
    /// The adapter could not open a device.
    #[error("cannot open a device on {adapter}: {reason}")]
    NoDevice {
        /// Name of the adapter.
        adapter: String,
        /// Message of the driver.
        reason: String,
    },
    /// The device lacks a required feature.
    #[error("{what} needs {feature}, but the device does not have it")]
    NoFeature {
        /// The operation that needs the feature.
        what: &'static str,
        /// Name of the feature in wgpu.
        feature: &'static str,
    },
    /// The device has no matrix units that kernels for mixed precision can use.
    #[error("mixed precision needs matrix units, and this GPU is used without them: {reason}")]
    NoMatrixUnits {
        /// Why.
        reason: String,
    },
    /// A buffer or binding exceeds the device limit.
    #[error("{what} takes {requested} bytes, but the device allows {limit} ({limit_name})")]
    TooLarge {
        /// The object to create.
        what: String,
        /// Requested bytes.
        requested: u64,
        /// Allowed bytes.
        limit: u64,
        /// Name of the limit in WebGPU.
        limit_name: &'static str,
    },
    /// The device is out of memory.
    #[error("out of GPU memory: {what}{}", sizes(*requested, *in_use))]
    OutOfMemory {
        /// The object to create.
        what: String,
        /// Requested bytes. 0 for objects without a size, such as a list of commands.
        requested: u64,
        /// Bytes in use on this device before the request, if the backend reports it.
        in_use: Option<u64>,
    },
    /// A kernel needs more workgroup memory, threads, groups or bindings than the device has.
    #[error("kernel {kernel} needs {needed} of {limit_name}, but the device has {limit}")]
    KernelLimit {
        /// The kernel.
        kernel: String,
        /// Needed amount.
        needed: u64,
        /// Device limit.
        limit: u64,
        /// Name of the limit in WebGPU.
        limit_name: &'static str,
    },
    /// The shader or its use breaks a rule of WebGPU. This is a bug in this program or in the
    /// driver.
    #[error("{what}: {reason}")]
    Invalid {
        /// The operation.
        what: String,
        /// Message of wgpu or of this crate.
        reason: String,
    },
    /// The driver could not map memory for the host. The device itself may still work.
    #[error("{what} cannot be mapped: {reason}")]
    NotMapped {
        /// The memory to map.
        what: String,
        /// Message of wgpu.
        reason: String,
    },
    /// Work uses a buffer whose contents were replaced after recording, such as a slot of a
    /// streamed layer. This is a bug in this program. Nothing was submitted.
    #[error("{what} uses a buffer whose contents were replaced after recording")]
    Overwritten {
        /// The list of commands.
        what: String,
    },
    /// The device is lost: a driver reset, a removed device, or a submission that took too long.
    #[error("the GPU was lost: {reason}")]
    DeviceLost {
        /// Message of the driver.
        reason: String,
    },
    /// The device did not finish within the time limit.
    #[error("the GPU did not finish within {seconds} s")]
    Timeout {
        /// Seconds of waiting.
        seconds: u64,
    },
}

fn sizes(requested: u64, in_use: Option<u64>) -> String {
    let takes = if requested > 0 { format!(" takes {requested} bytes") } else { String::new() };
    in_use.map_or(takes.clone(), |bytes| format!("{takes}, with {bytes} bytes in use"))
}

impl GpuError {
    pub(super) fn invalid(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { what: what.into(), reason: reason.into() }
    }

    pub(super) fn not_mapped(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::NotMapped { what: what.into(), reason: reason.into() }
    }
}

//! What can go wrong on a GPU, by culprit.

use thiserror::Error;

/// Why a GPU could not be used.
#[derive(Debug, Clone, Error)]
#[non_exhaustive]
pub enum GpuError {
    /// No adapter at all: no driver is installed, or none reaches a GPU ([`DRIVER_HINT`](super::DRIVER_HINT)).
    #[error("no GPU found, not even a software one")]
    NoAdapter,
    /// No adapter has the name or index asked for.
    #[error("no GPU {asked:?}; there are: {}", present.join(", "))]
    NoSuchAdapter {
        /// Name or index asked for.
        asked: String,
        /// Names of those that are there, by index.
        present: Vec<String>,
    },
    /// The adapter gives no device.
    #[error("{adapter} gives no device: {reason}")]
    NoDevice {
        /// The adapter's name.
        adapter: String,
        /// The driver's words.
        reason: String,
    },
    /// The device lacks a feature that was asked for.
    #[error("{what} needs {feature}, which the device does not have")]
    NoFeature {
        /// What was to be done.
        what: &'static str,
        /// The feature, as wgpu names it.
        feature: &'static str,
    },
    /// More bytes than the device allows in one buffer or binding.
    #[error("{what} takes {asked} bytes, and the device allows {limit} ({limit_name})")]
    TooLarge {
        /// What was to be made.
        what: String,
        /// Bytes it takes.
        asked: u64,
        /// Bytes allowed.
        limit: u64,
        /// Name of the limit, as WebGPU has it.
        limit_name: &'static str,
    },
    /// The device has no memory left.
    #[error("out of GPU memory: {what}{}", sizes(*asked, *in_use))]
    OutOfMemory {
        /// What was to be made.
        what: String,
        /// Bytes it takes (0 for what has no size of its own, such as a list of commands).
        asked: u64,
        /// Bytes that this device had handed out before, where the backend tells.
        in_use: Option<u64>,
    },
    /// A kernel needs more workgroup memory, threads, groups or bindings than the device has.
    #[error("kernel {kernel} needs {needed} of {limit_name}, and the device has {limit}")]
    KernelLimit {
        /// The kernel.
        kernel: String,
        /// What it needs.
        needed: u64,
        /// What there is.
        limit: u64,
        /// Name of the limit, as WebGPU has it.
        limit_name: &'static str,
    },
    /// The shader or its use breaks a rule of WebGPU: a defect of this program, or of the driver.
    #[error("{what}: {reason}")]
    Invalid {
        /// What was being done.
        what: String,
        /// wgpu's words, or ours.
        reason: String,
    },
    /// The driver does not give the host memory that both sides see. The device itself may be well.
    #[error("{what} cannot be mapped: {reason}")]
    NotMapped {
        /// What was to be mapped.
        what: String,
        /// Why, as far as wgpu says.
        reason: String,
    },
    /// Work uses a buffer whose contents have been replaced since, such as those of a streamed layer: a defect of this
    /// program. Nothing was submitted.
    #[error("{what} uses what has been replaced since it was recorded")]
    Overwritten {
        /// The list of commands.
        what: String,
    },
    /// The device is gone: driver reset, removed, or a submission that took too long.
    #[error("the GPU was lost: {reason}")]
    DeviceLost {
        /// The driver's words.
        reason: String,
    },
    /// The device has not finished in a time that no sensible work takes.
    #[error("the GPU has not finished after {seconds} s")]
    Timeout {
        /// Seconds waited.
        seconds: u64,
    },
}

fn sizes(asked: u64, in_use: Option<u64>) -> String {
    let takes = if asked > 0 { format!(" takes {asked} bytes") } else { String::new() };
    in_use.map_or(takes.clone(), |bytes| format!("{takes}, beside {bytes} bytes in use"))
}

impl GpuError {
    pub(super) fn invalid(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid { what: what.into(), reason: reason.into() }
    }

    pub(super) fn not_mapped(what: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::NotMapped { what: what.into(), reason: reason.into() }
    }
}

//! The device layer: adapters, buffers, kernels, dispatch, upload and readback on any GPU that wgpu
//! supports. It knows nothing of NF4: its inputs are bytes and WGSL, its outputs are bytes.
//!
//! ```no_run
//! use nf4pack::gpu::{Gpu, Options};
//!
//! # fn main() -> Result<(), nf4pack::gpu::GpuError> {
//! let gpu = Gpu::open(&Options::from_env())?;
//! println!("{}", gpu.adapter());
//! # Ok(())
//! # }
//! ```

mod adapter;
mod bind_groups;
mod buffer;
mod cache;
mod compile;
mod device;
mod dispatch;
mod error;
mod lease;
mod matrix_units;
mod memory;
mod needs;
mod params;
mod pipeline;
#[cfg(all(test, feature = "train"))]
pub(crate) mod poison;
mod profile;
mod range;
mod readback;
mod shader;
mod timing;
mod upload;
mod verdict;

pub use adapter::{AdapterSummary, DRIVER_HINT, adapter, adapters};
pub use device::{Gpu, Options, Submission};
pub use dispatch::Commands;
pub use error::GpuError;
pub use lease::{Buffer, Lease};
pub use matrix_units::{MatrixUnits, UseMatrixUnits};
pub use memory::{AllocatedMemory, DeviceMemory};
pub use pipeline::Kernel;
pub use profile::{KernelTime, ProfileTable};
pub use range::BufferRange;
pub use readback::PendingRead;
pub use shader::{KernelSpec, Shader};
pub use timing::Timed;
pub use upload::{StagingArea, Uploader};
pub use wgpu;

//! A model that runs: the layers of a pack as they are streamed, the head and its loss, and text
//! from it.

mod constants;
pub(crate) mod decoder;
pub(crate) mod error;
pub(crate) mod generate;
mod host_embedding;
mod kv_cache;
mod layer;
mod linear;
pub(crate) mod open;
mod pass;
pub(crate) mod plan;
pub(crate) mod precision;
pub(crate) mod residual;
pub(crate) mod session;
mod sizes;
mod weights;
pub(crate) mod workspace;

pub use crate::ops::OpError;
pub use error::{ModelError, NonFiniteAt};
pub use generate::sampling::SamplingError;
pub use generate::{GenerateError, TextGenerator};
pub use plan::{MemoryError, MemoryPlan, Remedy};
pub use session::Session;

/// What [`TextGenerator`] takes and gives.
pub mod text {
    pub use super::generate::sampling::{Sampler, SamplerOptions};
    pub use super::generate::{Ending, Event, Generated};
}

/// The kernels on matrix units that a model uses, and their tests on a device.
pub mod kernels {
    pub use super::precision::MixedKernels;
    pub use crate::ops::mixed_test::MixedTest;
}

/// Choices of a [`MemoryPlan`].
pub mod memory {
    pub use super::plan::{KeepActivations, MicroBatch, OffloadActivations, OffloadVocabulary, Slower};
}

// The labels of a batch are what the loss reads.
const _: () = assert!(crate::data::pack::IGNORE_INDEX == crate::ops::IGNORE_INDEX);

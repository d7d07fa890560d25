//! A model that runs: the layers of a pack as they are streamed, the head and its loss, and text
//! from it.

mod constants;
pub(crate) mod decoder;
pub(crate) mod error;
pub(crate) mod generate;
mod host_embedding;
pub(crate) mod host_memory;
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
pub use crate::ops::mixed_test::MixedTest;
pub use error::{ModelError, NonFiniteAt};
pub use generate::sampling::{Sampler, SamplerOptions, SamplingError};
pub use generate::{Ending, Event, GenerateError, Generated, TextGenerator};
pub use plan::{
    KeepActivations, MemoryError, MemoryPlan, MicroBatch, OffloadActivations, OffloadVocabulary, Remedy, Slower,
};
pub use precision::MixedKernels;
pub use session::Session;

// The labels of a batch are what the loss reads.
const _: () = assert!(crate::data::pack::IGNORE_INDEX == crate::ops::IGNORE_INDEX);

//! Errors of training and running a model.

use thiserror::Error;

use crate::arch::Obstacle;
use crate::arch::config::ConfigError;
use crate::data::DataError;
use crate::dequant::DequantError;
use crate::dequant::stream::StreamError;
use crate::format::Role;
use crate::gpu::GpuError;
use crate::lora::adapter::AdapterError;
use crate::lora::config::LoraError;
use crate::ops::error::OpError;
use crate::source::ReadError;

/// An error of training or running a model.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ModelError {
    /// An operation of the model could not be recorded or run.
    #[error(transparent)]
    Op(#[from] OpError),
    /// The pack cannot be streamed.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// The pack's config.json does not describe a model that can be run.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The kernels cannot run such a model.
    #[error("this model cannot be run: {0}")]
    Obstacle(#[from] Obstacle),
    /// The settings of the adapter are invalid.
    #[error(transparent)]
    Lora(#[from] LoraError),
    /// The adapter cannot be read or written.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The data cannot be trained on.
    #[error(transparent)]
    Data(#[from] DataError),
    /// The pack lacks a file that a model needs.
    #[error("the pack has no {name}")]
    MissingFile {
        /// Name of the file.
        name: &'static str,
    },
    /// The pack lacks a tensor that its config.json requires.
    #[error("{} has no {role}", place(*.layer))]
    MissingTensor {
        /// The layer. `None` for a tensor outside of the layers.
        layer: Option<u32>,
        /// The role of the tensor.
        role: Role,
    },
    /// The shape of a tensor contradicts config.json.
    #[error("{}: {role} has the shape {found:?}, by config.json it should have {expected:?}", place(*.layer))]
    TensorShape {
        /// The layer. `None` for a tensor outside of the layers.
        layer: Option<u32>,
        /// The role of the tensor.
        role: Role,
        /// Shape by config.json.
        expected: Vec<u64>,
        /// Shape in the pack.
        found: Vec<u64>,
    },
    /// The loss or the gradient is not finite.
    #[error("{}{what} is not finite; {}", of_step(*.step), origin(*.layer))]
    NotFinite {
        /// The step, from 1. `None` outside of training.
        step: Option<u64>,
        /// The loss, or the norm of the gradient.
        what: &'static str,
        /// The origin of the first non-finite number.
        layer: Option<NonFiniteAt>,
    },
}

impl From<ReadError> for ModelError {
    fn from(error: ReadError) -> Self {
        Self::Stream(error.into())
    }
}

impl From<GpuError> for ModelError {
    fn from(error: GpuError) -> Self {
        Self::Op(error.into())
    }
}

impl From<DequantError> for ModelError {
    fn from(error: DequantError) -> Self {
        Self::Op(error.into())
    }
}

/// The origin of the first non-finite number of a pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NonFiniteAt {
    /// The embeddings.
    Embedding,
    /// The output of this layer.
    Layer(u32),
    /// The gradients of this layer. All outputs are finite.
    Gradient(u32),
}

fn place(layer: Option<u32>) -> String {
    layer.map_or_else(|| "the pack".to_owned(), |number| format!("layer {number} of the pack"))
}

fn of_step(step: Option<u64>) -> String {
    step.map_or_else(String::new, |step| format!("step {step}: "))
}

fn origin(at: Option<NonFiniteAt>) -> String {
    match at {
        Some(NonFiniteAt::Embedding) => "it comes from the embeddings".to_owned(),
        Some(NonFiniteAt::Layer(number)) => format!("it arose first in layer {number}"),
        Some(NonFiniteAt::Gradient(number)) => {
            format!("all layers' outputs are finite: it arose first in the gradients of layer {number}")
        }
        None => "the outputs of all layers are finite".to_owned(),
    }
}

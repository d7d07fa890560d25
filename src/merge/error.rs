//! Why an adapter could not be merged.

use std::path::PathBuf;

use thiserror::Error;

use crate::convert::source::SourceError;
use crate::export::WriteError;
use crate::format::Role;
use crate::lora::adapter::AdapterError;
use crate::model::ModelError;
use crate::verify::{Mismatch, VerifyError};

/// Why an adapter could not be merged. No files remain.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MergeError {
    /// The pack cannot be checked, or is damaged.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// The pack's config.json is missing, invalid or of an unsupported model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The adapter cannot be read, or belongs to another model.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The base cannot be read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The base is not the checkpoint that the pack was made from.
    #[error("{} is not the checkpoint that the pack was made from: {mismatch}", path.display())]
    OtherBase {
        /// The base.
        path: PathBuf,
        /// The first mismatch.
        mismatch: Mismatch,
    },
    /// The pack lacks a projection that the adapter changes, or has it in another shape.
    #[error("the adapter changes {role} of layer {layer}, but the pack has no such matrix of {outputs} x {inputs}")]
    NoProjection {
        /// The layer.
        layer: u32,
        /// The projection.
        role: Role,
        /// Rows that it should have.
        outputs: u32,
        /// Columns that it should have.
        inputs: u32,
    },
    /// A weight is NaN or too large for bfloat16.
    #[error("tensor {tensor}: the value at flat index {index} is {value}, which is not a finite bfloat16")]
    NotFinite {
        /// The tensor.
        tensor: String,
        /// Index into the flattened tensor.
        index: u64,
        /// The value before it was rounded.
        value: f64,
    },
    /// The snapshot cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

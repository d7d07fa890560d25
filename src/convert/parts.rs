//! The tensors of a checkpoint as the parts of its model: [`crate::arch`] finds their places; here stands what becomes of the rest.

use super::notice::Notice;
use super::source::{Checkpoint, SourceError, TensorInfo};
use crate::arch::{self, ArchError, Model, Stray, StrayKind, TensorShape};
use crate::format::Role;

/// Finds the place of every tensor. What is no part of the model is kept as [`Role::Other`], unless it looks like a part.
///
/// # Errors
/// An [`ArchError`] that names the key or the tensor.
pub fn place(checkpoint: &Checkpoint) -> Result<Model, ArchError> {
    let shapes: Vec<_> = checkpoint.tensors.iter().map(shape).collect();
    let mut model = arch::place(&checkpoint.config, &shapes)?;
    let strays = std::mem::take(&mut model.strays);
    for stray in &strays {
        if let Some(tensor) = checkpoint.tensors.get(stray.tensor) {
            check_stray(&model, stray, tensor)?;
        }
    }
    model.keep(strays);
    Ok(model)
}

/// Name and shape, for [`arch::place`].
pub(super) fn shape(tensor: &TensorInfo) -> TensorShape<'_> {
    TensorShape { name: &tensor.name, shape: &tensor.shape }
}

/// Refuses what looks like a part of the model.
fn check_stray(model: &Model, stray: &Stray, tensor: &TensorInfo) -> Result<(), ArchError> {
    let looks_like_a_projection = tensor.name.split('.').any(|word| word.ends_with("_proj"));
    let tensor = tensor.name.clone();
    match stray.why {
        StrayKind::BeyondLayers => Err(ArchError::ExtraLayer { tensor, layers: model.config.layers }),
        StrayKind::NotInThisModel => Err(ArchError::UnexpectedTensor { tensor, model_type: model.config.family.model_type }),
        StrayKind::Unknown if looks_like_a_projection => {
            Err(ArchError::UnexpectedTensor { tensor, model_type: model.config.family.model_type })
        }
        StrayKind::Unknown => Ok(()),
    }
}

/// Settles what becomes of an output projection that config.json ties to the embedding. One that has the embedding's
/// values, in any float type, is dropped from `model`; one that differs stays, and the model is not tied. Reads both
/// tensors.
///
/// # Errors
///
/// [`SourceError::Io`] where the tensors cannot be read.
pub fn resolve_tied(model: &mut Model, checkpoint: &Checkpoint) -> Result<Option<Notice>, SourceError> {
    let tensor = |role| {
        let placed = model.tensors.iter().find(|placed| placed.role == role)?;
        checkpoint.tensors.get(placed.tensor)
    };
    let (true, Some(embedding), Some(head)) = (model.config.tied, tensor(Role::Embedding), tensor(Role::LmHead)) else {
        return Ok(None);
    };
    if !checkpoint.same_values(embedding, head)? {
        // The stored projection counts, as in transformers 5.
        model.config.tied = false;
        return Ok(Some(Notice::TiedHeadDiffers));
    }
    model.tensors.retain(|placed| placed.role != Role::LmHead);
    Ok(Some(Notice::TiedHeadDropped))
}

#[cfg(test)]
mod tests;

//! The tensors of a checkpoint as the parts of its model. [`crate::arch`] finds their places; this
//! module decides about the other tensors.
//!
//! transformers loads a checkpoint with tensors that the model does not have, and names them. So
//! does a conversion. It keeps the tensors that a pack can store, so that an export returns them.
//! It leaves out the others, and layers that the model does not have, usually for multi-token
//! prediction.

use std::collections::HashSet;

use serde_json::Value;

use super::notice::{LeftOut, Notice};
use super::source::{Checkpoint, Quantised, SourceError, TensorInfo, Unstorable, UnstorableTensor};
use crate::arch::names::has_module_of;
use crate::arch::place::{Model, Stray, StrayKind, TensorShape};
use crate::arch::{self, ArchError};
use crate::format::Role;

/// Why the tensors of a checkpoint are not the parts of a model that can be stored.
#[derive(Debug, thiserror::Error)]
pub enum PartsError {
    /// The checkpoint lacks a part, or has one that no pack can hold.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The tensors are not those that config.json promises.
    #[error(transparent)]
    Arch(#[from] ArchError),
}

/// The model of a checkpoint, and what is no part of it.
#[derive(Debug)]
pub struct Parts {
    /// The model; its tensors are all that a pack holds.
    pub model: Model,
    /// What a pack does not hold, in the order of the checkpoint.
    pub left_out: Vec<LeftOut>,
    /// What a pack holds although the model does not use it.
    pub kept_unused: Vec<String>,
    /// What the user should know.
    pub notices: Vec<Notice>,
}

/// Finds the place of every tensor.
///
/// # Errors
/// A [`PartsError`] that names the key or the tensor.
pub fn place(checkpoint: &Checkpoint) -> Result<Parts, PartsError> {
    let shapes: Vec<_> = checkpoint.tensors.iter().map(shape).collect();
    let mut model = arch::place::place(&checkpoint.config, &shapes).map_err(|error| true_reason(checkpoint, error))?;
    check_head(&model, checkpoint)?;
    let strays = std::mem::take(&mut model.strays);
    let sorted = Sorted::new(checkpoint, &model, &strays);
    let left_out: HashSet<usize> = sorted.left_out.iter().chain(&sorted.beyond).map(|stray| stray.tensor).collect();
    model.keep(strays.iter().filter(|stray| !left_out.contains(&stray.tensor)).copied());
    Ok(sorted.report(checkpoint, model))
}

/// Name and shape, for [`arch::place`].
pub(super) fn shape(tensor: &TensorInfo) -> TensorShape<'_> {
    TensorShape { name: &tensor.name, shape: &tensor.shape }
}

/// An error of [`arch::place`] as what it comes from: it has seen only the tensors that a pack can
/// hold.
fn true_reason(checkpoint: &Checkpoint, error: ArchError) -> PartsError {
    let ArchError::MissingTensor { tensor, .. } = &error else { return error.into() };
    if let Some(found) = checkpoint.unstorable.iter().find(|found| found.name == *tensor) {
        return unstorable(checkpoint, found).into();
    }
    if let Some((_, shard)) = checkpoint.absent.iter().find(|(name, _)| name == tensor) {
        return SourceError::NotInShard { tensor: tensor.clone(), shard: shard.clone() }.into();
    }
    if let Some(found) = under_adapter(checkpoint, tensor) {
        return SourceError::Unmerged { tensor: found }.into();
    }
    match &checkpoint.claimed_quantisation {
        Some(source) if has_other_forms(checkpoint, tensor) => quantised(checkpoint, source).into(),
        _ => error.into(),
    }
}

fn unstorable(checkpoint: &Checkpoint, tensor: &UnstorableTensor) -> SourceError {
    let path = checkpoint.files.get(tensor.file).map(|file| file.path.clone()).unwrap_or_default();
    SourceError::Unstorable { tensor: tensor.name.clone(), path, source: tensor.why.clone() }
}

fn quantised(checkpoint: &Checkpoint, source: &Quantised) -> SourceError {
    SourceError::Quantised { path: checkpoint.config_path.clone(), source: source.clone() }
}

/// The name of the weights `tensor` in a model that PEFT has wrapped with an adapter.
fn under_adapter(checkpoint: &Checkpoint, tensor: &str) -> Option<String> {
    let (module, parameter) = tensor.rsplit_once('.')?;
    let wrapped = format!("{module}.base_layer.{parameter}");
    checkpoint.tensors.iter().any(|tensor| tensor.name == wrapped).then_some(wrapped)
}

/// Whether the checkpoint has something else instead of the weights `tensor`: `x.codes` for
/// `x.weight`.
fn has_other_forms(checkpoint: &Checkpoint, tensor: &str) -> bool {
    let Some(stem) = tensor.strip_suffix("weight") else { return false };
    let names = checkpoint.tensors.iter().map(|t| t.name.as_str());
    let mut names = names.chain(checkpoint.unstorable.iter().map(|t| t.name.as_str()));
    names.any(|name| name.strip_prefix(stem).is_some_and(|rest| rest != "bias"))
}

/// An output projection counts if it is present, tied or not; so one that cannot be stored is an
/// error. Other programs leave one without elements as a mark that the embedding takes its place,
/// and one with the embedding's values in float64 is not needed.
fn check_head(model: &Model, checkpoint: &Checkpoint) -> Result<(), SourceError> {
    let head = model.prefix.part(model.config.family, Role::LmHead);
    let is_head = |tensor: &&UnstorableTensor| Some(&tensor.name) == head.as_ref();
    let Some(found) = checkpoint.unstorable.iter().find(is_head) else { return Ok(()) };
    let embedding = model.tensors.iter().find(|placed| placed.role == Role::Embedding && model.config.tied);
    match embedding.and_then(|placed| checkpoint.tensors.get(placed.tensor)) {
        _ if matches!(found.why, Unstorable::Empty { .. }) => Ok(()),
        Some(embedding) if checkpoint.same_values_in_f64(embedding, found)? => Ok(()),
        _ => Err(unstorable(checkpoint, found)),
    }
}

/// The strays of a checkpoint by what becomes of them.
#[derive(Default)]
struct Sorted<'a> {
    /// For multi-token prediction.
    left_out: Vec<&'a Stray>,
    /// Of layers beyond those of config.json.
    beyond: Vec<&'a Stray>,
    /// Kept, with a warning.
    unexpected: Vec<&'a Stray>,
    /// Kept.
    kept: Vec<&'a Stray>,
}

impl<'a> Sorted<'a> {
    fn new(checkpoint: &Checkpoint, model: &Model, strays: &'a [Stray]) -> Self {
        let name = |stray: &Stray| checkpoint.tensors.get(stray.tensor).map_or("", |tensor| tensor.name.as_str());
        let beyond = |stray: &&Stray| stray.why == StrayKind::BeyondLayers;
        let predicts = says_prediction(checkpoint) || strays.iter().filter(beyond).any(|s| is_prediction_part(name(s)));
        let mut sorted = Self::default();
        for stray in strays {
            let name = name(stray);
            let in_decoder = name.starts_with(model.prefix.decoder);
            let to = match stray.why {
                StrayKind::BeyondLayers if predicts => &mut sorted.left_out,
                StrayKind::BeyondLayers => &mut sorted.beyond,
                _ if is_prediction(name) => &mut sorted.left_out,
                StrayKind::NotInThisModel => &mut sorted.unexpected,
                StrayKind::Unknown if in_decoder && is_weight_of_a_layer(name, stray) => &mut sorted.unexpected,
                StrayKind::Unknown => &mut sorted.kept,
            };
            to.push(stray);
        }
        sorted
    }

    fn report(self, checkpoint: &Checkpoint, model: Model) -> Parts {
        let name = |stray: &&Stray| checkpoint.tensors.get(stray.tensor).map_or_else(String::new, |t| t.name.clone());
        let names = |strays: &[&Stray]| strays.iter().map(name).collect::<Vec<String>>();
        let (beyond, unexpected, kept) = (names(&self.beyond), names(&self.unexpected), names(&self.kept));
        let mut left_out: Vec<LeftOut> =
            names(&self.left_out).into_iter().map(|name| LeftOut::new(name, PREDICTION)).collect();
        let head = model.prefix.part(model.config.family, Role::LmHead);
        let why = |t: &UnstorableTensor| match &t.why {
            // Only such a head has come as far as this.
            Unstorable::Type { .. } if Some(&t.name) == head.as_ref() => "the values of the tied embedding".to_owned(),
            why => why.in_short(),
        };
        left_out.extend(checkpoint.unstorable.iter().map(|t| LeftOut::new(t.name.clone(), &why(t))));
        let claim = match &checkpoint.claimed_quantisation {
            Some(Quantised::Config { method }) => Some(Notice::QuantisationIgnored { method: method.clone() }),
            _ => None,
        };
        let notices = [
            (!left_out.is_empty()).then(|| Notice::LeftOut { tensors: left_out.clone() }),
            (!beyond.is_empty()).then(|| Notice::BeyondLayers { layers: model.config.layers, tensors: beyond.clone() }),
            (!unexpected.is_empty()).then(|| Notice::Unexpected { tensors: unexpected.clone() }),
            (!kept.is_empty()).then(|| Notice::KeptUnused { tensors: kept.clone() }),
            claim,
        ];
        left_out.extend(beyond.into_iter().map(|name| LeftOut::new(name, "layer beyond those of config.json")));
        Parts { model, left_out, kept_unused: [unexpected, kept].concat(), notices: notices.into_iter().flatten().collect() }
    }
}

/// Why layers that predict further tokens are left out.
const PREDICTION: &str = "multi-token prediction";

/// Keys of config.json that number the layers for multi-token prediction.
const PREDICTION_LAYERS: [&str; 4] =
    ["num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules"];

/// Whether config.json says that the model has layers for multi-token prediction.
fn says_prediction(checkpoint: &Checkpoint) -> bool {
    let config = &checkpoint.config;
    let text = config.get("text_config").and_then(Value::as_object);
    let value = |key: &str| config.get(key).or_else(|| text?.get(key)).and_then(Value::as_u64);
    PREDICTION_LAYERS.iter().any(|key| value(key).is_some_and(|layers| layers > 0))
}

/// Whether a name is that of a part outside the layers that predicts further tokens.
fn is_prediction(name: &str) -> bool {
    let is_word =
        |word: &str| matches!(word, "mtp" | "nextn" | "mtp_layers" | "nextn_predict_layers") || word.starts_with("mtp_");
    name.split('.').any(is_word)
}

/// Whether a name in a layer is one that only layers for multi-token prediction have.
fn is_prediction_part(name: &str) -> bool {
    let is_part = |word: &str| matches!(word, "eh_proj" | "enorm" | "hnorm" | "shared_head");
    is_prediction(name) || name.split('.').any(is_part) || has_module_of(name, Role::Embedding)
}

/// Whether a tensor in the decoder looks like weights that a layer would compute with, rather than
/// like a buffer.
fn is_weight_of_a_layer(name: &str, stray: &Stray) -> bool {
    let is_weight = name.ends_with(".weight") || name.ends_with(".bias");
    name.split('.').any(|word| word.ends_with("_proj")) || (stray.layer.is_some() && is_weight)
}

/// Settles what becomes of an output projection that config.json ties to the embedding. One that
/// has the embedding's values, in any float type, is dropped from `model`; one that differs stays,
/// and the model is not tied. Reads both tensors.
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

//! Finds the tensor of each part of a model in a checkpoint: config.json gives the sizes, and the
//! names and shapes of the tensors must fit them.

use std::collections::HashMap;

use serde_json::{Map, Value};
use thiserror::Error;

use super::config::{ConfigError, ModelConfig};
use super::family::{PROJECTION_TENSORS, Part, Scope, When};
use super::names::{Prefix, layer_of};
use crate::format::Role;

/// Name and shape of a tensor of a checkpoint. Names are those of
/// [`Naming::stored`](super::Naming::stored).
#[derive(Debug, Clone, Copy)]
pub struct TensorShape<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its shape.
    pub shape: &'a [u64],
}

/// An error of config.json, or of tensors that do not fit it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ArchError {
    /// config.json does not describe a supported model.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The checkpoint lacks a part of the model.
    #[error("tensor {tensor:?} is missing in the checkpoint{}", .similar.as_ref().map_or_else(String::new, |name| format!(", which has {name:?}")))]
    MissingTensor {
        /// Its expected name.
        tensor: String,
        /// A tensor whose name ends in the same way.
        similar: Option<String>,
    },
    /// A tensor has another shape than config.json requires.
    #[error("tensor {tensor:?} has the shape {found:?}, by config.json it should have {expected:?}")]
    Shape {
        /// The tensor.
        tensor: String,
        /// Shape by config.json.
        expected: Vec<u64>,
        /// Shape in the checkpoint.
        found: Vec<u64>,
    },
}

/// The model of a checkpoint: each tensor with its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// The configuration in config.json.
    pub config: ModelConfig,
    /// The prefixes of the names of its parts.
    pub prefix: Prefix,
    /// The tensors that are a part of the model, in the order of the checkpoint. Of the parts only
    /// [`Role::LmHead`] may be absent, if config.json ties it to the embedding.
    pub tensors: Vec<Placed>,
    /// The other tensors, in the order of the checkpoint. They are no error here: the caller
    /// decides what to do with them.
    pub strays: Vec<Stray>,
}

/// One tensor and its place in the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// Index into the checkpoint's tensors.
    pub tensor: usize,
    /// Its role; [`Role::Other`] if the architecture does not name it.
    pub role: Role,
    /// Its layer.
    pub layer: Option<u32>,
    /// Its expert in a mixture of experts; no supported family has any yet.
    pub expert: Option<u32>,
    /// Whether it is one of [`PROJECTION_TENSORS`], which are quantised.
    pub quantise: bool,
}

/// A tensor that is not a part of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stray {
    /// Index into the checkpoint's tensors.
    pub tensor: usize,
    /// The layer of the model that its name gives.
    pub layer: Option<u32>,
    /// Why it is not.
    pub why: StrayKind,
}

/// Why a tensor is not a part of the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StrayKind {
    /// It has the name of a part in a layer beyond those of config.json: a layer for multi-token
    /// prediction, or config.json belongs to a smaller model.
    BeyondLayers,
    /// It has the name of a part that the family has, but not with this config.json, such as a
    /// bias.
    NotInThisModel,
    /// No family names it: a buffer, a vision tower, heads for other tasks.
    Unknown,
}

/// Finds the place of every tensor, by names and shapes alone.
///
/// # Errors
/// An [`ArchError`] that names the key or the tensor: a part that is missing, or that has another
/// shape.
pub fn place(config: &Map<String, Value>, tensors: &[TensorShape<'_>]) -> Result<Model, ArchError> {
    let config = ModelConfig::read(config, None)?;
    let prefix = Prefix::of(tensors.iter().map(|tensor| tensor.name));
    let mut places = Places {
        config: &config,
        prefix,
        tensors,
        by_name: tensors.iter().enumerate().map(|(i, tensor)| (tensor.name, i)).collect(),
        placed: vec![None; tensors.len()],
    };
    // The only optional part. If the embedding is missing, it is the embedding, too: transformers
    // ties either of the two to the other.
    let head = config.family.parts.iter().find(|part| part.when == When::Head && config.tied);
    for (part, layer) in config.parts() {
        match head.filter(|_| part.role == Role::Embedding) {
            Some(head) => places.take_tied(part, head)?,
            None => places.take(part, layer)?,
        }
    }
    let placed = places.placed;
    let none = placed.iter().enumerate().filter(|(_, placed)| placed.is_none());
    let strays = none.filter_map(|(i, _)| Some(stray(&config, prefix, i, tensors.get(i)?.name))).collect();
    Ok(Model { prefix, tensors: placed.into_iter().flatten().collect(), strays, config })
}

/// The search for the parts of a model among its tensors.
struct Places<'a> {
    config: &'a ModelConfig,
    prefix: Prefix,
    tensors: &'a [TensorShape<'a>],
    by_name: HashMap<&'a str, usize>,
    /// The place of each tensor, once it is found.
    placed: Vec<Option<Placed>>,
}

impl Places<'_> {
    /// Finds the tensor of `part`, checks its shape and notes its place.
    fn take(&mut self, part: &Part, layer: Option<u32>) -> Result<(), ArchError> {
        match self.take_if_present(part, layer)? {
            true => Ok(()),
            false => Err(self.missing(part, layer)),
        }
    }

    fn missing(&self, part: &Part, layer: Option<u32>) -> ArchError {
        let tensor = self.prefix.name(part.scope, layer, part.name);
        let own = Prefix { decoder: "", head: "" }.name(part.scope, layer, part.name);
        let ends_alike = |name: &&str| name.strip_suffix(own.as_str()).is_some_and(|rest| rest.ends_with('.'));
        let similar = self.tensors.iter().map(|tensor| tensor.name).find(ends_alike).map(str::to_owned);
        ArchError::MissingTensor { tensor, similar }
    }

    /// Takes the embedding and the output projection of a tied model. If one of them is missing,
    /// the other one is the embedding.
    fn take_tied(&mut self, embedding: &Part, head: &Part) -> Result<(), ArchError> {
        let has_head = self.take_if_present(head, None)?;
        if has_head && !self.is_present(embedding) {
            let is_head = |placed: &&mut Placed| placed.role == head.role;
            self.placed.iter_mut().flatten().filter(is_head).for_each(|placed| placed.role = embedding.role);
            return Ok(());
        }
        self.take(embedding, None)
    }

    fn is_present(&self, part: &Part) -> bool {
        self.by_name.contains_key(self.prefix.name(part.scope, None, part.name).as_str())
    }

    /// The same; `false` if there is no such tensor.
    fn take_if_present(&mut self, part: &Part, layer: Option<u32>) -> Result<bool, ArchError> {
        let name = self.prefix.name(part.scope, layer, part.name);
        let found = self.by_name.get(name.as_str()).and_then(|&i| Some((i, self.tensors.get(i)?)));
        let Some((i, tensor)) = found else { return Ok(false) };
        let expected = self.config.shape(part);
        if tensor.shape != expected {
            return Err(ArchError::Shape { tensor: name, expected, found: tensor.shape.to_vec() });
        }
        if let Some(slot) = self.placed.get_mut(i) {
            let quantise = PROJECTION_TENSORS.contains(&part.role);
            *slot = Some(Placed { tensor: i, role: part.role, layer, expert: None, quantise });
        }
        Ok(true)
    }
}

fn stray(config: &ModelConfig, prefix: Prefix, tensor: usize, name: &str) -> Stray {
    let parts = config.family.parts.iter();
    let layer = name.strip_prefix(prefix.decoder).and_then(layer_of);
    let why = match layer {
        Some((layer, _)) if layer >= u64::from(config.layers) => StrayKind::BeyondLayers,
        Some((_, rest)) if parts.clone().any(|part| part.scope == Scope::Layer && part.name == rest) => {
            StrayKind::NotInThisModel
        }
        _ => StrayKind::Unknown,
    };
    let layer = layer.and_then(|(layer, _)| u32::try_from(layer).ok()).filter(|&layer| layer < config.layers);
    Stray { tensor, layer, why }
}

impl Model {
    /// Takes strays among the tensors, as [`Role::Other`].
    pub fn keep(&mut self, strays: impl IntoIterator<Item = Stray>) {
        let other = |Stray { tensor, layer, .. }| Placed { tensor, role: Role::Other, layer, expert: None, quantise: false };
        self.tensors.extend(strays.into_iter().map(other));
        self.tensors.sort_unstable_by_key(|placed| placed.tensor);
    }
}

#[cfg(test)]
mod tests;

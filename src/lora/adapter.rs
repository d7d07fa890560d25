//! Adapters as PEFT keeps them: a folder with `adapter_model.safetensors` and
//! `adapter_config.json`.

mod peft;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde_json::Value;
use thiserror::Error;

use crate::arch::config::{ConfigError, ModelConfig};
use crate::arch::family::Family;
use crate::arch::family::Scope;
use crate::arch::names::{Naming, Prefix, has_module_of};
use crate::format::Role;
use crate::io::folder::publish;
use crate::lora::config::{AdapterLayout, LoraConfig, LoraError};

/// The file of the matrices.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// The file of the settings.
pub const CONFIG: &str = "adapter_config.json";

/// Why an adapter could not be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A file of the adapter cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The folder cannot be written.
    #[error("cannot write the adapter {}: {source}", path.display())]
    Write {
        /// The folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The matrices are not a safetensors file.
    #[error("{WEIGHTS}: {0}")]
    Safetensors(#[from] SafeTensorError),
    /// The settings are not a JSON object.
    #[error("{CONFIG} is not a JSON object: {0}")]
    Json(serde_json::Error),
    /// A setting with an invalid value.
    #[error(transparent)]
    Settings(#[from] ConfigError),
    /// A setting that changes the computation to something other than B (A x) on some projections.
    #[error("{CONFIG}: adapters with {key:?} are not supported, found {found}")]
    Unsupported {
        /// The key.
        key: &'static str,
        /// Its value.
        found: Value,
    },
    /// `target_modules` or `exclude_modules` is a pattern that cannot be parsed.
    #[error("{CONFIG}: {key} {pattern:?} is not a pattern: {source}")]
    Pattern {
        /// The key.
        key: &'static str,
        /// The pattern.
        pattern: String,
        /// The parser's error.
        source: Box<fancy_regex::Error>,
    },
    /// A projection is adapted in some layers only.
    #[error("{CONFIG}: {role} is adapted in some layers and not in others, which is not supported")]
    SomeLayers {
        /// The projection.
        role: Role,
    },
    /// Invalid settings.
    #[error("{CONFIG}: {0}")]
    Lora(#[from] LoraError),
    /// No tensor has a name that PEFT writes.
    #[error("{WEIGHTS}: no tensor is named as PEFT names the matrices of LoRA, the first one is {tensor:?}")]
    NoMatrices {
        /// The first tensor; empty if there is none.
        tensor: String,
    },
    /// A missing matrix.
    #[error("{WEIGHTS} has no tensor {tensor:?}")]
    MissingTensor {
        /// Its name.
        tensor: String,
    },
    /// A tensor that is not a matrix of this adapter on this model.
    #[error("{WEIGHTS}: tensor {tensor:?} has no place in an adapter with these settings on this model")]
    UnexpectedTensor {
        /// Its name.
        tensor: String,
    },
    /// The adapter has trained the vocabulary, or was saved with it.
    #[error(
        "{WEIGHTS}: tensor {tensor:?} belongs to the embedding or the output projection, and only projections of layers can be adapted"
    )]
    Vocabulary {
        /// Its name.
        tensor: String,
    },
    /// Two tensors for one matrix, for example of two adapters in one file.
    #[error("{WEIGHTS}: tensors {first:?} and {second:?} are the same matrix of the model")]
    SameMatrix {
        /// The name of one.
        first: String,
        /// The name of the other.
        second: String,
    },
    /// A matrix with a shape that does not fit the model or the settings.
    #[error("{WEIGHTS}: tensor {tensor:?} has the shape {found:?}, for this model it should have {expected:?}")]
    Shape {
        /// Its name.
        tensor: String,
        /// The expected shape.
        expected: Vec<u64>,
        /// Its shape.
        found: Vec<u64>,
    },
    /// A matrix of a number type that is not supported.
    #[error("{WEIGHTS}: tensor {tensor:?} has the type {found:?}; F64, F32, F16 and BF16 are supported")]
    Type {
        /// Its name.
        tensor: String,
        /// Its type.
        found: Dtype,
    },
    /// A vector whose length is not that of the adapter's layout: a defect of this program.
    #[error("the adapter has {found} floats, by its layout it should have {expected}")]
    Length {
        /// By the layout.
        expected: u64,
        /// In the vector.
        found: u64,
    },
}

/// An adapter in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Adapter {
    /// Its settings.
    pub(crate) config: LoraConfig,
    /// Name or path of its base model, as PEFT would load it.
    pub base: Option<String>,
    /// The places of the matrices in the vector.
    pub(crate) layout: AdapterLayout,
    /// All matrices.
    pub(crate) vector: Vec<f32>,
}

impl Adapter {
    /// An adapter before training, which does not change the model: see [`AdapterLayout::initial`].
    ///
    /// # Errors
    /// Invalid settings.
    pub(crate) fn new(config: LoraConfig, base: Option<String>, model: &ModelConfig, seed: u64) -> Result<Self, LoraError> {
        let layout = AdapterLayout::new(&config, model)?;
        let vector = layout.initial(seed);
        Ok(Self { config, base, layout, vector })
    }

    /// Reads a folder that this program or PEFT wrote, for `model`.
    ///
    /// # Errors
    /// See [`AdapterError`].
    pub fn read(folder: &Path, model: &ModelConfig) -> Result<Self, AdapterError> {
        let read = |name: &str| {
            let path = folder.join(name);
            fs::read(&path).map_err(|source| AdapterError::Read { path, source })
        };
        let (config, base) = peft::parse(&read(CONFIG)?, model)?;
        let layout = AdapterLayout::new(&config, model)?;
        let vector = read_vector(&read(WEIGHTS)?, &layout)?;
        Ok(Self { config, base, layout, vector })
    }

    /// Whether it does not change the model: every B is zero, as before training.
    pub fn changes_nothing(&self) -> bool {
        let zero = |range: Range<usize>| self.vector.get(range).unwrap_or_default().iter().all(|&x| x == 0.0);
        self.layout.places().all(|(_, _, place)| zero(place.b))
    }

    /// Writes the adapter as PEFT would, and `more` files (name, bytes) into the same folder.
    /// Everything is durable under another name before anything in `folder` changes. Other files of
    /// the folder stay.
    ///
    /// # Errors
    /// [`AdapterError::Length`], [`AdapterError::Write`].
    pub fn write(&self, folder: &Path, more: &[(&str, &[u8])]) -> Result<(), AdapterError> {
        let (expected, found) = (self.layout.len() as u64, self.vector.len() as u64);
        if expected != found {
            return Err(AdapterError::Length { expected, found });
        }
        let config = peft::render(&self.config, self.base.as_deref());
        let weights = self.safetensors()?;
        let files = [more, &[(WEIGHTS, weights.as_slice()), (CONFIG, config.as_bytes())]].concat();
        publish(folder, &files).map_err(|source| AdapterError::Write { path: folder.to_owned(), source })
    }

    fn safetensors(&self) -> Result<Vec<u8>, AdapterError> {
        let bytes = le_bytes(&self.vector);
        let tensors = matrices(&self.layout).map(|matrix| Ok((matrix.peft_name(), matrix.view(&bytes)?)));
        serialize(tensors.collect::<Result<_, SafeTensorError>>()?).map_err(AdapterError::from)
    }
}

/// The floats as little-endian bytes, as in safetensors.
pub(crate) fn le_bytes(vector: &[f32]) -> Vec<u8> {
    vector.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// A safetensors file with the metadata that transformers requires.
pub(crate) fn serialize(tensors: Vec<(String, TensorView<'_>)>) -> Result<Vec<u8>, SafeTensorError> {
    safetensors::serialize(tensors, Some([("format".to_owned(), "pt".to_owned())].into()))
}

/// The words for the two matrices of a projection.
const MATRICES: [&str; 2] = ["lora_A", "lora_B"];

/// PEFT's prefix of the names of the model.
const PREFIX: &str = "base_model.model.";

/// One matrix of an adapter.
pub(crate) struct Matrix {
    /// Its name without [`PREFIX`].
    name: String,
    /// Rows, columns.
    pub(crate) shape: [u32; 2],
    /// Its floats in the adapter's vector.
    pub(crate) range: Range<usize>,
}

impl Matrix {
    /// Its name in PEFT's files.
    pub(crate) fn peft_name(&self) -> String {
        format!("{PREFIX}{}", self.name)
    }

    /// Its part of `bytes`, a vector of the adapter's layout.
    pub(crate) fn view<'a>(&self, bytes: &'a [u8]) -> Result<TensorView<'a>, SafeTensorError> {
        let data = bytes.get(4 * self.range.start..4 * self.range.end).unwrap_or_default();
        TensorView::new(Dtype::F32, self.shape.map(|n| n as usize).to_vec(), data)
    }
}

pub(crate) fn matrices(layout: &AdapterLayout) -> impl Iterator<Item = Matrix> {
    layout.places().flat_map(|(layer, role, place)| {
        let module = module(layout.family(), layer, role);
        let (a, b) = ([layout.rank(), place.inputs], [place.outputs, layout.rank()]);
        let [name_a, name_b] = MATRICES;
        [(name_a, a, place.a), (name_b, b, place.b)].map(|(which, shape, range)| Matrix {
            name: format!("{module}.{which}.weight"),
            shape,
            range,
        })
    })
}

/// The name of a projection in the model.
fn module(family: &Family, layer: u32, role: Role) -> String {
    let tensor = family.part(role).map_or(role.name(), |part| part.name);
    let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
    Prefix::PLAIN.name(Scope::Layer, Some(layer), module)
}

/// The names in a file of matrices.
struct Names {
    naming: Naming,
    prefix: Prefix,
}

impl Names {
    fn of(names: &[&str]) -> Self {
        let naming = Naming::of(names.iter().copied());
        let stored: Vec<String> = names.iter().map(|name| naming.stored(name)).collect();
        let prefix = Prefix::of(stored.iter().map(String::as_str));
        Self { naming, prefix }
    }

    /// The name that [`matrices`] gives a tensor: without what PEFT and other wrappers put around
    /// it, with `model.` before the layers, without the adapter's name, as versions of PEFT and
    /// adapters of the model without its head have them.
    fn canonical(&self, name: &str) -> String {
        let name = self.naming.stored(name);
        let name =
            name.strip_prefix(self.prefix.decoder).map_or(name.clone(), |rest| format!("{}{rest}", Prefix::PLAIN.decoder));
        let mut words: Vec<&str> = name.split('.').collect();
        if let [.., "lora_A" | "lora_B", _, "weight"] = words[..] {
            words.remove(words.len() - 2);
        }
        words.join(".")
    }
}

/// Whether a tensor belongs to the embedding or the output projection.
fn is_vocabulary(name: &str) -> bool {
    [Role::Embedding, Role::LmHead].into_iter().any(|role| has_module_of(name, role))
}

fn read_vector(bytes: &[u8], layout: &AdapterLayout) -> Result<Vec<f32>, AdapterError> {
    let file = SafeTensors::deserialize(bytes)?;
    let names: Vec<&str> = file.names().into_iter().collect();
    let names = Names::of(&names);
    let unexpected = |tensor: &str| match is_vocabulary(tensor) {
        true => AdapterError::Vocabulary { tensor: tensor.to_owned() },
        false => AdapterError::UnexpectedTensor { tensor: tensor.to_owned() },
    };
    let mut tensors = BTreeMap::new();
    for (name, view) in file.iter() {
        if let Some((first, _)) = tensors.insert(names.canonical(name), (name, view)) {
            return Err(AdapterError::SameMatrix { first: first.to_owned(), second: name.to_owned() });
        }
    }
    if !tensors.keys().any(|name| MATRICES.iter().any(|which| name.ends_with(&format!(".{which}.weight")))) {
        let tensor = tensors.values().next().map_or_else(String::new, |(name, _)| (*name).to_owned());
        return Err(AdapterError::NoMatrices { tensor });
    }
    let mut vector = vec![0.0; layout.len()];
    for matrix in matrices(layout) {
        let missing = || AdapterError::MissingTensor { tensor: matrix.peft_name() };
        let (name, view) = tensors.remove(&matrix.name).ok_or_else(missing)?;
        let expected = matrix.shape.map(u64::from).to_vec();
        let found: Vec<u64> = view.shape().iter().map(|&n| n as u64).collect();
        if found != expected {
            return Err(AdapterError::Shape { tensor: name.to_owned(), expected, found });
        }
        decode(name, &view, vector.get_mut(matrix.range).unwrap_or_default())?;
    }
    tensors.values().next().map_or(Ok(vector), |(name, _)| Err(unexpected(name)))
}

fn decode(name: &str, view: &TensorView<'_>, out: &mut [f32]) -> Result<(), AdapterError> {
    let bytes = view.data();
    let halves = bytes.as_chunks::<2>().0.iter();
    match view.dtype() {
        Dtype::F64 => out.iter_mut().zip(bytes.as_chunks::<8>().0).for_each(|(x, &b)| *x = f64::from_le_bytes(b) as f32),
        Dtype::F32 => out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(x, &b)| *x = f32::from_le_bytes(b)),
        Dtype::F16 => out.iter_mut().zip(halves).for_each(|(x, &b)| *x = f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => out.iter_mut().zip(halves).for_each(|(x, &b)| *x = bf16::from_le_bytes(b).to_f32()),
        found => return Err(AdapterError::Type { tensor: name.to_owned(), found }),
    }
    Ok(())
}

#[cfg(test)]
mod tests;

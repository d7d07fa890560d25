//! Adapters as PEFT keeps them: a folder with `adapter_model.safetensors` and
//! `adapter_config.json`.

mod peft;
mod tensors;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use safetensors::tensor::{TensorInfo, TensorView};
use safetensors::{Dtype, SafeTensorError};
use serde_json::Value;
use thiserror::Error;

use crate::arch::config::{ConfigError, ModelConfig};
use crate::arch::family::Family;
use crate::arch::family::Scope;
use crate::arch::names::{Naming, Prefix, has_module_of};
use crate::format::Role;
use crate::io::folder::publish;
use crate::io::read::{self, FileError, Links};
pub use crate::lora::adapter::tensors::TensorsError;
pub(crate) use crate::lora::adapter::tensors::{ReadFloats, TensorFile};
use crate::lora::config::{AdapterLayout, LoraConfig, LoraError};

/// The file of the matrices.
pub const WEIGHTS: &str = "adapter_model.safetensors";
/// The file of the settings.
pub const CONFIG: &str = "adapter_config.json";
/// Bytes that the settings may have: PEFT writes about a thousand, and the names of all modules of
/// a large model take less than a tenth of this.
const MAX_CONFIG_LEN: u64 = 1 << 20;

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
    /// A file of the adapter is not a regular file of a usual size.
    #[error(transparent)]
    File(FileError),
    /// The matrices are not a safetensors file.
    #[error("{WEIGHTS}: {0}")]
    Safetensors(TensorsError),
    /// The model has more layers than the file has tensors.
    #[error("{WEIGHTS} has {found} tensors, and an adapter of this model has at least two for each of its {layers} layers")]
    Layers {
        /// Layers of the model.
        layers: u32,
        /// Tensors of the file.
        found: u64,
    },
    /// The settings are not a JSON object.
    #[error("{CONFIG} is not a JSON object: {0}")]
    Json(serde_json::Error),
    /// A setting with an invalid value.
    #[error(transparent)]
    Settings(#[from] ConfigError),
    /// A setting that changes the computation to something other than B (A x) on some projections.
    #[error("{CONFIG}: adapters with {key:?} are not supported, found {}", brief(&found.to_string()))]
    Unsupported {
        /// The key.
        key: &'static str,
        /// Its value.
        found: Value,
    },
    /// `target_modules` or `exclude_modules` is a pattern that cannot be parsed.
    #[error("{CONFIG}: {key} {:?} is not a pattern: {source}", brief(pattern))]
    Pattern {
        /// The key.
        key: &'static str,
        /// The pattern.
        pattern: String,
        /// The parser's error.
        source: Box<fancy_regex::Error>,
    },
    /// A pattern that takes too long on the name of a module.
    #[error("{CONFIG}: {key} {:?} takes too long on the name {module:?}", brief(pattern))]
    SlowPattern {
        /// The key.
        key: &'static str,
        /// The pattern.
        pattern: String,
        /// The module.
        module: String,
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

/// The start of a long text.
fn brief(text: &str) -> String {
    const LEN: usize = 200;
    match text.char_indices().nth(LEN) {
        Some((end, _)) => format!("{} ...", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

impl From<FileError> for AdapterError {
    fn from(error: FileError) -> Self {
        match error {
            FileError::Io { path, source } => Self::Read { path, source },
            error => Self::File(error),
        }
    }
}

impl From<TensorsError> for AdapterError {
    fn from(error: TensorsError) -> Self {
        match error {
            TensorsError::File(error) => error.into(),
            error => Self::Safetensors(error),
        }
    }
}

impl From<SafeTensorError> for AdapterError {
    fn from(error: SafeTensorError) -> Self {
        Self::Safetensors(error.into())
    }
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
        // Of all targets, those of the model.
        let config = LoraConfig { targets: layout.roles().collect(), ..config };
        let vector = layout.initial(seed);
        Ok(Self { config, base, layout, vector })
    }

    /// Reads a folder that this program or PEFT wrote, for `model`. A link to a file is followed:
    /// the hub's cache is made of links.
    ///
    /// Nothing is allocated by the settings alone: the file must have a tensor of the right shape
    /// for each matrix.
    ///
    /// # Errors
    /// See [`AdapterError`].
    pub fn read(folder: &Path, model: &ModelConfig) -> Result<Self, AdapterError> {
        Self::read_with(folder, model, Links::Follow)
    }

    /// [`Adapter::read`], which follows no links if `links` says so.
    ///
    /// # Errors
    /// See [`AdapterError`].
    pub(crate) fn read_with(folder: &Path, model: &ModelConfig, links: Links) -> Result<Self, AdapterError> {
        let settings = peft::Settings::parse(&read::read(&folder.join(CONFIG), links, MAX_CONFIG_LEN)?)?;
        let file = TensorFile::open(&folder.join(WEIGHTS), links)?;
        let tensors = named(&file)?;
        let found = tensors.len() as u64;
        // The settings are compared with each layer, so there must not be more than the file has.
        if found < u64::from(model.layers) {
            return Err(AdapterError::Layers { layers: model.layers, found });
        }
        let (config, base) = settings.of(model)?;
        let layout = AdapterLayout::new(&config, model)?;
        let vector = read_vector(&file, tensors, &layout)?;
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

/// The settings as text, without the name of the base model.
pub(crate) fn settings(config: &LoraConfig) -> String {
    peft::render(config, None)
}

/// The floats as little-endian bytes, as in safetensors.
pub(crate) fn le_bytes(vector: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; 4 * vector.len()];
    bytes.as_chunks_mut::<4>().0.iter_mut().zip(vector).for_each(|(to, x)| *to = x.to_le_bytes());
    bytes
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

/// The tensors of a file by the names that [`matrices`] gives them, each with its own name.
fn named(file: &TensorFile) -> Result<BTreeMap<String, (&str, &TensorInfo)>, AdapterError> {
    let names: Vec<&str> = file.tensors.keys().map(String::as_str).collect();
    let names = Names::of(&names);
    let mut tensors = BTreeMap::new();
    for (name, info) in &file.tensors {
        if let Some((first, _)) = tensors.insert(names.canonical(name), (name.as_str(), info)) {
            return Err(AdapterError::SameMatrix { first: first.to_owned(), second: name.clone() });
        }
    }
    if !tensors.keys().any(|name| MATRICES.iter().any(|which| name.ends_with(&format!(".{which}.weight")))) {
        let tensor = tensors.values().next().map_or_else(String::new, |(name, _)| (*name).to_owned());
        return Err(AdapterError::NoMatrices { tensor });
    }
    Ok(tensors)
}

/// Reads all matrices, after all of their shapes are checked.
fn read_vector(
    file: &TensorFile,
    mut tensors: BTreeMap<String, (&str, &TensorInfo)>,
    layout: &AdapterLayout,
) -> Result<Vec<f32>, AdapterError> {
    let mut found = Vec::new();
    for matrix in matrices(layout) {
        let missing = || AdapterError::MissingTensor { tensor: matrix.peft_name() };
        let (name, info) = tensors.remove(&matrix.name).ok_or_else(missing)?;
        let expected = matrix.shape.map(u64::from).to_vec();
        let shape: Vec<u64> = info.shape.iter().map(|&n| n as u64).collect();
        if shape != expected {
            return Err(AdapterError::Shape { tensor: name.to_owned(), expected, found: shape });
        }
        found.push((matrix.range, name, info));
    }
    if let Some((name, _)) = tensors.into_values().next() {
        let tensor = name.to_owned();
        let of_vocabulary = is_vocabulary(name);
        return Err(if of_vocabulary {
            AdapterError::Vocabulary { tensor }
        } else {
            AdapterError::UnexpectedTensor { tensor }
        });
    }
    let mut vector = vec![0.0; layout.len()];
    for (range, name, info) in found {
        file.read(info, vector.get_mut(range).unwrap_or_default()).map_err(|error| match error {
            ReadFloats::Type(found) => AdapterError::Type { tensor: name.to_owned(), found },
            ReadFloats::File(error) => error.into(),
        })?;
    }
    Ok(vector)
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;

//! Writes a snapshot folder, tensor by tensor; for export and merge.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};
use safetensors::{Dtype, SafeTensorError};
use serde::Serialize;
use thiserror::Error;

use super::config;
use crate::arch::family::Family;
use crate::arch::names::Prefix;
use crate::convert::Progress;
use crate::format::{FloatType, Provenance, Role, files};
use crate::io::access::Readers;
use crate::io::folder::restrict;
use crate::io::leftovers::remove_leftovers;
use crate::io::step::{Output, create_dir};
use crate::io::{publish_folder, sync_dir, temporary_folder};
use crate::source::{PackSource, ReadError};

/// Bytes of tensors in one file of the snapshot, as transformers cuts them.
pub const MAX_SHARD_LEN: u64 = 5_000_000_000;

/// The name that a tensor of a safetensors file cannot have.
const RESERVED_NAME: &str = "__metadata__";

/// Why a snapshot folder could not be written. After [`WriteError::NotDurable`] it is complete;
/// after any other error no files remain.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The target exists and is not an empty folder.
    #[error("{} exists already and is not an empty folder", path.display())]
    TargetExists {
        /// The target.
        path: PathBuf,
    },
    /// The snapshot would not fit.
    #[error("{} has {available} bytes free, the snapshot needs {needed}", path.display())]
    NoSpace {
        /// The folder.
        path: PathBuf,
        /// Bytes of all files.
        needed: u64,
        /// Free bytes.
        available: u64,
    },
    /// A tensor has the name that safetensors reserves for its metadata.
    #[error("a tensor has the name {name:?}, which safetensors reserves")]
    TensorName {
        /// The name.
        name: String,
    },
    /// The permissions of a source cannot be read.
    #[error("cannot read the permissions of {}: {source}", path.display())]
    Source {
        /// The source.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file of the snapshot cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Target {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A weights file cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// The library's error.
        source: SafeTensorError,
    },
    /// The snapshot is whole and has its name, but its folder cannot be made durable: a loss of
    /// power may undo the renaming.
    #[error("{} is written and whole, but its folder cannot be made durable: {source}", path.display())]
    NotDurable {
        /// The snapshot.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The pack cannot be read.
    #[error(transparent)]
    Pack(#[from] ReadError),
    /// A tensor does not fit in memory.
    #[error("no memory for tensor {name} of {bytes} bytes", name = tensor.escape_debug())]
    Memory {
        /// The tensor.
        tensor: String,
        /// Its bytes.
        bytes: u64,
    },
    /// The caller asked to stop.
    #[error("stopped before the end")]
    Cancelled,
}

/// The bytes of a tensor, zero.
///
/// # Errors
/// [`WriteError::Memory`].
pub(crate) fn zeros(tensor: &str, elements: u64, float_type: FloatType) -> Result<Vec<u8>, WriteError> {
    let bytes = elements.saturating_mul(float_type.size() as u64);
    let fits = |len: &usize| Vec::<u8>::new().try_reserve_exact(*len).is_ok();
    let len = usize::try_from(bytes).ok().filter(fits);
    // Allocated anew: pages that the system clears are faster, and all threads touch them.
    Ok(vec![0; len.ok_or_else(|| WriteError::Memory { tensor: tensor.to_owned(), bytes })?])
}

/// What was written.
#[derive(Debug, Clone, Serialize)]
pub struct Written {
    /// The weights files.
    pub weights_files: Vec<String>,
    /// The other files.
    pub files: Vec<String>,
    /// Tensors written.
    pub tensors: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Tensors of the checkpoint that are missing here, since the conversion left them out as no
    /// part of the model.
    pub left_out: Vec<String>,
}

/// The tensors that the conversion of `pack` left out, by its own record, except the model's output
/// projection: if it was left out, it is tied to the embedding. A merge takes some of them from the
/// checkpoint: these are among `written`.
fn left_out<'a>(pack: &PackSource, written: impl Iterator<Item = &'a str>) -> Vec<String> {
    let Ok(provenance) = Provenance::from_json(pack.index().metadata()) else { return Vec::new() };
    let names: Vec<&str> = pack.index().tensors().map(|(_, section)| pack.index().name(section)).collect();
    let prefix = Prefix::of(names.iter().copied());
    let head = Family::find(&provenance.model_type).and_then(|family| prefix.part(family, Role::LmHead));
    let written: HashSet<&str> = written.collect();
    let missing = |name: &String| Some(name) != head.as_ref() && !written.contains(name.as_str());
    provenance.dropped.into_iter().filter(missing).collect()
}

/// Makes the little-endian elements of a tensor.
pub(crate) type Make<'a, E> = Box<dyn Fn() -> Result<Cow<'a, [u8]>, E> + 'a>;

/// A tensor of a snapshot; its bytes are made when they are written.
pub(crate) struct Tensor<'a, E> {
    pub(crate) name: &'a str,
    pub(crate) float_type: FloatType,
    pub(crate) dims: &'a [u64],
    pub(crate) make: Make<'a, E>,
}

impl<E> Tensor<'_, E> {
    fn elements(&self) -> u64 {
        self.dims.iter().product()
    }

    fn len(&self) -> u64 {
        self.elements().saturating_mul(self.float_type.size() as u64)
    }

    fn dtype(&self) -> Dtype {
        match self.float_type {
            FloatType::F32 => Dtype::F32,
            FloatType::F16 => Dtype::F16,
            FloatType::Bf16 => Dtype::BF16,
        }
    }
}

/// Those who may read the pack.
pub(crate) fn readers(pack: &PackSource) -> Result<Readers, WriteError> {
    let mut readers = Readers::default();
    readers.add(&pack.metadata()?);
    Ok(readers)
}

/// Fails unless `target` is missing or an empty folder.
pub(crate) fn refuse_existing(target: &Path) -> Result<(), WriteError> {
    // Only a folder of its own can be replaced: not a link to one, and not `.`.
    let replaceable = |m: fs::Metadata| m.is_dir() && target.file_name().is_some();
    let empty = || fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
    if target.symlink_metadata().is_ok_and(|m| !replaceable(m) || !empty()) {
        return Err(WriteError::TargetExists { path: target.to_owned() });
    }
    Ok(())
}

/// Writes `tensors` and the checkpoint files of `pack` ([`files::place_of`]) as the folder
/// `target`, which appears only when it is complete. The dtype of its config.json can represent all
/// tensors, and `tie_word_embeddings` says whether the pack has no output projection. A weights
/// file has at most `shard_len` bytes of tensors (or one longer tensor). Only one tensor at a time
/// is in memory. Its files are no wider readable than `readers` allow. First, what dead processes
/// left next to it is removed. Progress is counted in weights.
///
/// # Errors
/// A [`WriteError`], or what a tensor's `make` says.
pub(crate) fn write<E: From<WriteError>>(
    target: &Path,
    pack: &PackSource,
    tensors: &[Tensor<'_, E>],
    shard_len: u64,
    readers: &Readers,
    progress: &dyn Progress,
) -> Result<Written, E> {
    if let Some(tensor) = tensors.iter().find(|t| t.name == RESERVED_NAME) {
        return Err(WriteError::TensorName { name: tensor.name.to_owned() }.into());
    }
    let bytes = tensors.iter().map(Tensor::len).fold(0, u64::saturating_add);
    let folder = crate::io::folder_of(target);
    let error = |source| WriteError::Target { path: target.to_owned(), source };
    remove_leftovers(folder);
    let available = fs4::available_space(folder).map_err(error)?;
    if available < bytes {
        return Err(WriteError::NoSpace { path: folder.to_owned(), needed: bytes, available }.into());
    }
    // Open the folder before the work: it is synced at the end.
    sync_dir(folder).map_err(error)?;
    let temporary = temporary_folder(folder).map_err(error)?;
    restrict(temporary.path(), readers).map_err(error)?;
    let total = tensors.iter().map(Tensor::elements).fold(0, u64::saturating_add);
    let mut job = Job { progress, readers, total, done: 0 };
    let weights_files = job.write_weights(temporary.path(), tensors, shard_len)?;
    let files = write_files(temporary.path(), pack, config::common(tensors.iter().map(|t| t.float_type)), readers)?;
    sync_dir(temporary.path()).map_err(error)?;
    publish_folder(temporary, target).map_err(error)?;
    sync_dir(folder).map_err(|source| WriteError::NotDurable { path: target.to_owned(), source })?;
    let left_out = left_out(pack, tensors.iter().map(|t| t.name));
    Ok(Written { weights_files, files, tensors: tensors.len() as u64, bytes, left_out })
}

fn write_files(
    folder: &Path,
    pack: &PackSource,
    float_type: Option<FloatType>,
    readers: &Readers,
) -> Result<Vec<String>, WriteError> {
    let mut names = Vec::new();
    let tied = !pack.index().has(Role::LmHead);
    for packed in pack.file_names() {
        let Some((inner, name)) = files::place_of(packed) else { continue };
        let bytes = pack.file(packed)?.unwrap_or_default();
        let parent = inner.map_or_else(|| folder.to_owned(), |inner| folder.join(inner));
        let error = |source| WriteError::Target { path: parent.clone(), source };
        if !parent.exists() {
            create_dir(&parent).and_then(|()| restrict(&parent, readers)).map_err(error)?;
        }
        match packed {
            files::CONFIG => {
                write_synced(&parent.join(name), &config::of_snapshot(&bytes, float_type, tied), readers)?;
            }
            _ => write_synced(&parent.join(name), &bytes, readers)?,
        }
        sync_dir(&parent).map_err(error)?;
        names.push(inner.map_or_else(|| name.to_owned(), |inner| format!("{inner}/{name}")));
    }
    Ok(names)
}

struct Job<'a> {
    progress: &'a dyn Progress,
    readers: &'a Readers,
    /// Weights of all tensors.
    total: u64,
    /// Weights that are written.
    done: u64,
}

impl Job<'_> {
    /// One file, or shards and their index.
    fn write_weights<E: From<WriteError>>(
        &mut self,
        folder: &Path,
        tensors: &[Tensor<'_, E>],
        shard_len: u64,
    ) -> Result<Vec<String>, E> {
        let shards = shards(tensors, shard_len);
        let count = shards.len();
        let name = |i: usize| match count {
            0 | 1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let mut weight_map = BTreeMap::new();
        for (i, shard) in shards.into_iter().enumerate() {
            weight_map.extend(shard.iter().map(|t| (t.name.to_owned(), name(i))));
            self.write_shard(&folder.join(name(i)), shard)?;
        }
        if count > 1 {
            let total_size = tensors.iter().map(Tensor::len).fold(0, u64::saturating_add);
            let index = serde_json::json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
            let path = folder.join("model.safetensors.index.json");
            write_synced(&path, format!("{index:#}\n").as_bytes(), self.readers)?;
        }
        Ok((0..count).map(name).collect())
    }

    /// Writes a safetensors file, tensor by tensor: the crate's own function cannot pass on a
    /// tensor's error.
    fn write_shard<E: From<WriteError>>(&mut self, path: &Path, mut shard: Vec<&Tensor<'_, E>>) -> Result<(), E> {
        // The crate's order: the largest elements first, so that each tensor is aligned.
        shard.sort_by(|a, b| b.dtype().cmp(&a.dtype()).then(a.name.cmp(b.name)));
        let error = |source| WriteError::Target { path: path.to_owned(), source };
        let head = head(&shard).map_err(|source| WriteError::Safetensors { path: path.to_owned(), source })?;
        let file = Output::create_new(path).map_err(error)?;
        file.restrict(self.readers).map_err(error)?;
        file.write_at(&head, 0).map_err(error)?;
        let mut offset = head.len() as u64;
        for tensor in shard {
            if self.progress.cancelled() {
                return Err(WriteError::Cancelled.into());
            }
            let bytes = (tensor.make)()?;
            file.write_at(&bytes, offset).map_err(error)?;
            offset += bytes.len() as u64;
            self.done += tensor.elements();
            self.progress.advance(self.done, self.total);
        }
        Ok(file.sync_all().map_err(error)?)
    }
}

/// The part of a safetensors file before its tensors: the length of the header, and the header,
/// padded to a multiple of 8 bytes.
fn head<E>(shard: &[&Tensor<'_, E>]) -> Result<Vec<u8>, SafeTensorError> {
    let mut end = 0;
    let infos = shard.iter().map(|tensor| {
        let (start, shape) = (end, tensor.dims.iter().map(|&d| d as usize).collect());
        end += tensor.len() as usize;
        (tensor.name.to_owned(), TensorInfo { dtype: tensor.dtype(), shape, data_offsets: (start, end) })
    });
    // transformers refuses a file without this entry.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut header = serde_json::to_vec(&Metadata::new(Some(metadata), infos.collect())?)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    Ok([&(header.len() as u64).to_le_bytes(), header.as_slice()].concat())
}

/// Splits tensors, in order, into runs of at most `shard_len` bytes.
fn shards<'a, 'b, E>(tensors: &'a [Tensor<'b, E>], shard_len: u64) -> Vec<Vec<&'a Tensor<'b, E>>> {
    let mut shards: Vec<Vec<&Tensor<'_, E>>> = Vec::new();
    let mut len = 0;
    for tensor in tensors {
        match shards.last_mut() {
            Some(shard) if tensor.len() <= shard_len.saturating_sub(len) => shard.push(tensor),
            _ => {
                shards.push(vec![tensor]);
                len = 0;
            }
        }
        len = len.saturating_add(tensor.len());
    }
    shards
}

fn write_synced(path: &Path, bytes: &[u8], readers: &Readers) -> Result<(), WriteError> {
    crate::io::write_synced(path, bytes, readers).map_err(|source| WriteError::Target { path: path.to_owned(), source })
}

#[cfg(all(test, feature = "train"))]
pub(crate) mod tests;

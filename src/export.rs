//! A pack back into a snapshot folder that transformers loads.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Instant;

use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::{Dtype, SafeTensorError, View};
use serde::Serialize;
use thiserror::Error;

use crate::convert::Progress;
use crate::convert::source::SIDE_FILES;
use crate::dequant;
use crate::format::{FloatType, FormatError, Pack, Projection, RawTensor};
use crate::io::{publish_folder, sync_dir, temporary_folder};
use crate::verify::{VerifyError, verify};
use crate::{MappedPack, OpenError};

/// Bytes of tensors in one file of the snapshot, as transformers cuts them.
pub const MAX_SHARD_LEN: u64 = 5_000_000_000;

/// The name that a tensor of a safetensors file cannot have.
const RESERVED_NAME: &str = "__metadata__";

/// Weights that a thread decodes at a time.
const PIECE_WEIGHTS: usize = 1 << 17;

/// Why a pack could not be exported. Nothing is left behind.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ExportError {
    /// The pack cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The pack cannot be checked.
    #[error(transparent)]
    Verify(#[from] VerifyError),
    /// The pack is damaged.
    #[error("{} is damaged: {first}", path.display())]
    Damaged {
        /// The pack.
        path: PathBuf,
        /// The first fault.
        first: FormatError,
    },
    /// Something stands where the snapshot should go.
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
    /// A weight is too large for the type asked for.
    #[error("tensor {tensor} has a weight that {dtype} cannot hold")]
    Overflow {
        /// The tensor.
        tensor: String,
        /// The type asked for.
        dtype: FloatType,
    },
    /// A tensor has the name under which safetensors files keep their own strings.
    #[error("the pack holds a tensor named {name:?}, which a safetensors file cannot")]
    TensorName {
        /// The name.
        name: String,
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
    /// The caller asked to stop.
    #[error("stopped before the end; nothing was written")]
    Cancelled,
}

/// What an export did.
#[derive(Debug, Clone, Serialize)]
pub struct ExportReport {
    /// The weights files.
    pub weights_files: Vec<String>,
    /// The other files.
    pub files: Vec<String>,
    /// Tensors written.
    pub tensors: u64,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// Wall-clock seconds.
    pub seconds: f64,
}

/// Writes the pack at `path` as a snapshot folder `target`: quantised tensors decoded to `dtype`, raw ones in their own type
/// byte for byte, those embedded files that checkpoints have ([`SIDE_FILES`]) verbatim. The folder appears under its name once
/// it is whole.
///
/// # Errors
/// See [`ExportError`]; a pack whose payloads are damaged is refused.
pub fn export(path: &Path, target: &Path, dtype: FloatType, progress: &dyn Progress) -> Result<ExportReport, ExportError> {
    export_sharded(path, target, dtype, MAX_SHARD_LEN, progress)
}

/// [`export`] with weights files of at most `shard_len` bytes of tensors each (or one tensor, where that is longer).
///
/// # Errors
/// As [`export`].
pub fn export_sharded(
    path: &Path,
    target: &Path,
    dtype: FloatType,
    shard_len: u64,
    progress: &dyn Progress,
) -> Result<ExportReport, ExportError> {
    let started = Instant::now();
    refuse_existing(target)?;
    let checked = verify(path, 0, &Stoppable(progress))?;
    if let Some(first) = checked.faults.into_iter().next() {
        return Err(ExportError::Damaged { path: path.to_owned(), first });
    }
    let mapped = MappedPack::open(path)?;
    let job = Job { pack: mapped.pack(), dtype, progress, state: Mutex::default() };
    let report = job.write(target, shard_len)?;
    Ok(ExportReport { seconds: started.elapsed().as_secs_f64(), ..report })
}

/// Passes on the wish to stop, and keeps the progress of the check to itself.
struct Stoppable<'a>(&'a dyn Progress);

impl Progress for Stoppable<'_> {
    fn cancelled(&self) -> bool {
        self.0.cancelled()
    }
}

fn refuse_existing(target: &Path) -> Result<(), ExportError> {
    // Only a folder of its own can be replaced: not a link to one, and not `.`.
    let replaceable = |m: fs::Metadata| m.is_dir() && target.file_name().is_some();
    let empty = || fs::read_dir(target).is_ok_and(|mut entries| entries.next().is_none());
    if target.symlink_metadata().is_ok_and(|m| !replaceable(m) || !empty()) {
        return Err(ExportError::TargetExists { path: target.to_owned() });
    }
    Ok(())
}

/// What went wrong or was done while safetensors asked for one tensor after the other: its interface has no errors.
#[derive(Debug, Default)]
struct JobState {
    done: u64,
    error: Option<ExportError>,
}

struct Job<'a> {
    pack: Pack<'a>,
    dtype: FloatType,
    progress: &'a dyn Progress,
    state: Mutex<JobState>,
}

/// A tensor of the snapshot; its bytes are made when they are written.
enum Tensor<'a> {
    Decoded(&'a Job<'a>, Projection<'a>),
    Raw(&'a Job<'a>, RawTensor<'a>),
}

fn dtype_of(float_type: FloatType) -> Dtype {
    match float_type {
        FloatType::F32 => Dtype::F32,
        FloatType::F16 => Dtype::F16,
        FloatType::Bf16 => Dtype::BF16,
    }
}

impl Tensor<'_> {
    fn name(&self) -> &str {
        match self {
            Self::Decoded(_, p) => p.name,
            Self::Raw(_, t) => t.name,
        }
    }

    fn float_type(&self) -> FloatType {
        match self {
            Self::Decoded(job, _) => job.dtype,
            Self::Raw(_, t) => t.float_type,
        }
    }

    fn dims(&self) -> &[u64] {
        match self {
            Self::Decoded(_, p) => p.shape.dims(),
            Self::Raw(_, t) => t.shape.dims(),
        }
    }

    fn len(&self) -> u64 {
        self.dims().iter().product::<u64>() * self.float_type().size() as u64
    }
}

/// What safetensors asks a tensor for.
struct TensorView<'a> {
    tensor: &'a Tensor<'a>,
    shape: Vec<usize>,
}

impl View for TensorView<'_> {
    fn dtype(&self) -> Dtype {
        dtype_of(self.tensor.float_type())
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self.tensor {
            Tensor::Decoded(job, projection) => Cow::Owned(job.decode(projection)),
            Tensor::Raw(job, tensor) => Cow::Borrowed(if job.stopped() { &[] } else { tensor.bytes }),
        }
    }

    fn data_len(&self) -> usize {
        self.tensor.len() as usize
    }
}

impl<'a> Job<'a> {
    fn write(&'a self, target: &Path, shard_len: u64) -> Result<ExportReport, ExportError> {
        let decoded = self.pack.projections().map(|p| Tensor::Decoded(self, p));
        if let Some(tensor) = self.pack.raw_tensor(RESERVED_NAME) {
            return Err(ExportError::TensorName { name: tensor.name.to_owned() });
        }
        let tensors: Vec<Tensor<'_>> = decoded.chain(self.pack.raw_tensors().map(|t| Tensor::Raw(self, t))).collect();
        let bytes: u64 = tensors.iter().map(Tensor::len).sum();
        let folder = crate::io::folder_of(target);
        let error = |source| ExportError::Target { path: target.to_owned(), source };
        let available = fs4::available_space(folder).map_err(error)?;
        if available < bytes {
            return Err(ExportError::NoSpace { path: folder.to_owned(), needed: bytes, available });
        }
        // Asked for now, not after the work: the folder is made durable at the end.
        sync_dir(folder).map_err(error)?;
        let temporary = temporary_folder(folder).map_err(error)?;
        let weights_files = self.write_weights(temporary.path(), &tensors, shard_len)?;
        let files = self.write_files(temporary.path())?;
        sync_dir(temporary.path()).map_err(error)?;
        publish_folder(temporary, target).map_err(error)?;
        Ok(ExportReport { weights_files, files, tensors: tensors.len() as u64, bytes, seconds: 0.0 })
    }

    fn write_files(&self, folder: &Path) -> Result<Vec<String>, ExportError> {
        let mut names = Vec::new();
        // Only the files that checkpoints have: a pack of unknown origin must not bring others, code least of all.
        for file in self.pack.files().filter(|f| SIDE_FILES.contains(&f.name)) {
            write_synced(&folder.join(file.name), file.bytes)?;
            names.push(file.name.to_owned());
        }
        Ok(names)
    }

    /// One file, or shards and their index.
    fn write_weights(&self, folder: &Path, tensors: &[Tensor<'_>], shard_len: u64) -> Result<Vec<String>, ExportError> {
        let shards = shards(tensors, shard_len);
        let count = shards.len();
        let name = |i: usize| match count {
            0 | 1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        let mut weight_map = BTreeMap::new();
        for (i, shard) in shards.iter().enumerate() {
            self.write_shard(&folder.join(name(i)), shard)?;
            weight_map.extend(shard.iter().map(|t| (t.name().to_owned(), name(i))));
        }
        if count > 1 {
            let total_size: u64 = tensors.iter().map(Tensor::len).sum();
            let index = serde_json::json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map });
            write_synced(&folder.join("model.safetensors.index.json"), format!("{index:#}\n").as_bytes())?;
        }
        Ok((0..count).map(name).collect())
    }

    fn write_shard(&self, path: &Path, shard: &[&Tensor<'_>]) -> Result<(), ExportError> {
        let views = shard.iter().map(|&tensor| {
            let shape = tensor.dims().iter().map(|&d| d as usize).collect();
            (tensor.name(), TensorView { tensor, shape })
        });
        // transformers refuses a file without this entry.
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let error = |source| ExportError::Target { path: path.to_owned(), source };
        // safetensors makes a file that only its owner may read; it shall have the permissions of any new file.
        let permissions = File::create_new(path).and_then(|f| f.metadata()).map_err(error)?.permissions();
        let written = safetensors::serialize_to_file(views, Some(metadata), path);
        let state = self.state.lock().map(|mut s| s.error.take());
        if let Ok(Some(error)) = state {
            return Err(error);
        }
        written.map_err(|source| ExportError::Safetensors { path: path.to_owned(), source })?;
        fs::set_permissions(path, permissions).map_err(error)?;
        File::options().write(true).open(path).and_then(|f| f.sync_all()).map_err(error)
    }

    /// Whether to write nothing more: after an error, or where the caller asked to stop. What is written then means nothing.
    fn stopped(&self) -> bool {
        let Ok(mut state) = self.state.lock() else { return true };
        if state.error.is_none() && self.progress.cancelled() {
            state.error = Some(ExportError::Cancelled);
        }
        state.error.is_some()
    }

    /// The bytes of a decoded tensor; all threads work on it.
    fn decode(&self, projection: &Projection<'_>) -> Vec<u8> {
        if self.stopped() {
            return Vec::new();
        }
        let mut out = vec![0; projection.data.elements as usize * self.dtype.size()];
        let pieces = out.par_chunks_mut(PIECE_WEIGHTS * self.dtype.size()).enumerate();
        let result = pieces.try_for_each(|(i, bytes)| {
            if self.progress.cancelled() {
                return Err(ExportError::Cancelled);
            }
            self.decode_piece(projection, (i * PIECE_WEIGHTS) as u64, bytes)
        });
        if let Ok(mut state) = self.state.lock() {
            state.error = result.err();
            state.done += projection.data.elements;
            let total = self.pack.projections().map(|p| p.data.elements).sum();
            self.progress.advance(state.done, total);
        }
        out
    }

    fn decode_piece(&self, projection: &Projection<'_>, first: u64, bytes: &mut [u8]) -> Result<(), ExportError> {
        let overflow = || ExportError::Overflow { tensor: projection.name.to_owned(), dtype: self.dtype };
        let len = bytes.len() / self.dtype.size();
        let data = &projection.data;
        // A validated pack always decodes: the only error of these calls is a range outside the tensor.
        match self.dtype {
            FloatType::F32 => {
                let mut values = vec![0.0_f32; len];
                dequant::dequantize(data, first, &mut values).map_err(|_| overflow())?;
                put(bytes, values.iter().map(|v| v.to_le_bytes()));
                values.iter().all(|v| v.is_finite())
            }
            FloatType::Bf16 => {
                let mut values = vec![bf16::ZERO; len];
                dequant::dequantize_bf16(data, first, &mut values).map_err(|_| overflow())?;
                put(bytes, values.iter().map(|v| v.to_le_bytes()));
                values.iter().all(|v| v.is_finite())
            }
            FloatType::F16 => {
                let mut values = vec![f16::ZERO; len];
                dequant::dequantize_f16(data, first, &mut values).map_err(|_| overflow())?;
                put(bytes, values.iter().map(|v| v.to_le_bytes()));
                values.iter().all(|v| v.is_finite())
            }
        }
        .then_some(())
        .ok_or_else(overflow)
    }
}

fn put<const N: usize>(bytes: &mut [u8], values: impl Iterator<Item = [u8; N]>) {
    bytes.as_chunks_mut::<N>().0.iter_mut().zip(values).for_each(|(to, from)| *to = from);
}

/// Cuts tensors, in their order, into runs of at most `shard_len` bytes.
fn shards<'a, 'b>(tensors: &'a [Tensor<'b>], shard_len: u64) -> Vec<Vec<&'a Tensor<'b>>> {
    let mut shards: Vec<Vec<&Tensor<'_>>> = Vec::new();
    let mut len = 0;
    for tensor in tensors {
        match shards.last_mut() {
            Some(shard) if len + tensor.len() <= shard_len => shard.push(tensor),
            _ => {
                shards.push(vec![tensor]);
                len = 0;
            }
        }
        len += tensor.len();
    }
    shards
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), ExportError> {
    crate::io::write_synced(path, bytes).map_err(|source| ExportError::Target { path: path.to_owned(), source })
}

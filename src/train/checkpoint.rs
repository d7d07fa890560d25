//! Checkpoints: a run that resumes from one computes the same numbers as a run that never stopped,
//! bit for bit on the same device. A checkpoint stores no generator of random numbers: each number
//! is a function of the seed, its use and a counter ([`random`](crate::random),
//! [`DropoutKey`](crate::ops::DropoutKey)), and [`State`] has the counters.
//!
//! A checkpoint is a folder `checkpoint-STEP` of the output folder: an adapter that PEFT loads, the
//! optimiser's moments, and the state.

mod fingerprint;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensorError};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::arch::config::ModelConfig;
use crate::format::{PieceCrc, crc32};
use crate::io::read::{self, FileError, Links};
use crate::io::{is_temporary, step, temporary_folder};
use crate::lora::adapter::{self, Adapter, AdapterError, Matrix, ReadFloats, TensorFile, TensorsError, le_bytes, matrices};
use crate::lora::config::AdapterLayout;
pub use fingerprint::{Difference, Fingerprint, Inputs, data_identity, pack_identity};

/// The file of the optimiser's moments: two tensors for each of the adapter's, under its name and a
/// suffix.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// The file of the state.
pub const STATE: &str = "trainer_state.json";

/// The name of a checkpoint's folder before the step.
const FOLDER_PREFIX: &str = "checkpoint-";
/// The new name of a later checkpoint begins with this.
const ASIDE_PREFIX: &str = "aside-";
/// Suffixes of the moments' names, as in PyTorch's AdamW.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];
/// Bytes that [`STATE`] may have; it has about two thousand.
const MAX_STATE_LEN: u64 = 1 << 20;
/// The format of [`STATE`]; a change of its meaning gets another number.
const FORMAT: u32 = 3;

/// Why a checkpoint could not be written, found or read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// A file or folder cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A file is not a regular file of a usual size.
    #[error(transparent)]
    File(FileError),
    /// An old checkpoint cannot be removed.
    #[error("cannot remove the old checkpoint {}: {source}", path.display())]
    Remove {
        /// The folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A checkpoint of a later step than the resumed one cannot be renamed.
    #[error("cannot rename the later checkpoint {}: {source}", path.display())]
    SetAside {
        /// The folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The adapter of a checkpoint cannot be read or written.
    #[error("the checkpoint {}: {source}", path.display())]
    Adapter {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        source: AdapterError,
    },
    /// The state is damaged, or from another program.
    #[error("{} is damaged: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where it is broken.
        source: serde_json::Error,
    },
    /// The moments are not a safetensors file.
    #[error("{} is damaged: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: TensorsError,
    },
    /// The state is from another version of this program.
    #[error("{}: the format is {found}, this version reads {expected}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The format that this version reads.
        expected: u32,
        /// The format of the file.
        found: u32,
    },
    /// A tensor of the moments differs in type or shape from the adapter's.
    #[error("{}: tensor {tensor:?} should be {expected}, found {found}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// The adapter's type and shape.
        expected: String,
        /// The tensor's type and shape.
        found: String,
    },
    /// The files are damaged, or from different checkpoints.
    #[error("{} is damaged: the checksum of its numbers is {found:08x}, and should be {expected:08x}", path.display())]
    Checksum {
        /// The folder.
        path: PathBuf,
        /// The checksum in the state.
        expected: u32,
        /// The checksum of adapter and moments.
        found: u32,
    },
    /// The moments do not have the adapter's layout: a defect of this program.
    #[error("the optimiser has moments of {found} floats, the adapter has {expected}")]
    Length {
        /// Floats of the adapter.
        expected: u64,
        /// Floats of the moments.
        found: u64,
    },
}

impl From<FileError> for CheckpointError {
    fn from(error: FileError) -> Self {
        match error {
            FileError::Io { path, source } => Self::Read { path, source },
            error => Self::File(error),
        }
    }
}

/// Where a run is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Optimiser steps so far.
    pub step: u64,
    /// Optimiser steps of the whole run.
    pub total_steps: u64,
    /// The epoch, from 0.
    pub epoch: u32,
    /// Rows of that epoch that are used.
    pub row: u64,
    /// Forward passes of training so far: the counter of dropout's masks.
    pub micro_batches: u64,
    /// Tokens with a loss so far, in all epochs together.
    #[serde(rename = "trained_tokens")]
    pub loss_tokens: u64,
    /// Seconds of training so far.
    pub seconds: f64,
    /// The date that chat templates print, in seconds since 1970: it affects the tokens.
    pub now: i64,
    /// The lowest loss of an evaluation so far.
    pub best_eval: Option<f64>,
    /// The step of that evaluation.
    pub best_step: u64,
    /// CRC-32 of that step's adapter, if the folder of the run keeps the best one.
    pub best_adapter: Option<u32>,
    /// Evaluations since then.
    pub evals_without_gain: u32,
    /// Whether this step's evaluation is still due.
    pub eval_due: bool,
    /// The settings and inputs that a resumed run must share.
    pub fingerprint: Fingerprint,
}

impl State {
    /// Before the first step.
    pub fn new(total_steps: u64, now: i64, fingerprint: Fingerprint) -> Self {
        Self {
            step: 0,
            total_steps,
            epoch: 0,
            row: 0,
            micro_batches: 0,
            loss_tokens: 0,
            seconds: 0.0,
            now,
            best_eval: None,
            best_step: 0,
            best_adapter: None,
            evals_without_gain: 0,
            eval_due: false,
            fingerprint,
        }
    }

    /// Makes the present adapter the best one so far; its evaluation is due.
    pub fn forget_best(&mut self) {
        (self.best_eval, self.best_step, self.best_adapter) = (None, self.step, None);
        (self.evals_without_gain, self.eval_due) = (0, true);
    }
}

/// The contents of [`STATE`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFile<S> {
    /// First, so that the state of another version is recognised.
    format: u32,
    /// CRC-32 of the adapter's matrices and of both moments: the files belong together.
    checksum: u32,
    state: S,
}

/// The part that every format of [`STATE`] has.
#[derive(Deserialize)]
struct AnyState {
    format: u32,
}

/// A run that can be resumed.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// The adapter.
    pub adapter: Adapter,
    /// AdamW's mean of the gradients, in the adapter's layout.
    pub exp_avg: Vec<f32>,
    /// AdamW's mean of their squares, in the adapter's layout.
    pub exp_avg_sq: Vec<f32>,
    /// Where the run is.
    pub state: State,
}

impl Checkpoint {
    /// Writes the folder `checkpoint-STEP` in `out`, and returns its path. The folder appears only
    /// when it is complete.
    ///
    /// If the step already has a checkpoint with the same numbers, its files are replaced one by
    /// one: it is complete at all times, because the numbers are the same bytes. This happens if an
    /// evaluation changed the state after it was saved. Anything else with that name is renamed
    /// first, as [`Checkpoint::set_aside`] does.
    ///
    /// # Errors
    /// [`CheckpointError::Length`], [`CheckpointError::Adapter`], [`CheckpointError::SetAside`].
    pub fn write(&self, out: &Path) -> Result<PathBuf, CheckpointError> {
        let folder = out.join(format!("{FOLDER_PREFIX}{}", self.state.step));
        let layout = &self.adapter.layout;
        let expected = layout.len() as u64;
        if let Some(found) =
            [&self.exp_avg, &self.exp_avg_sq].map(|m| m.len() as u64).into_iter().find(|&len| len != expected)
        {
            return Err(CheckpointError::Length { expected, found });
        }
        let moments = [&self.exp_avg, &self.exp_avg_sq].map(|moment| le_bytes(moment));
        let failed = |source| CheckpointError::Adapter { path: folder.clone(), source };
        let optimizer = optimizer_file(layout, &moments).map_err(|e| failed(e.into()))?;
        let file = StateFile { format: FORMAT, checksum: self.checksum(), state: &self.state };
        let json = |source| CheckpointError::Json { path: folder.join(STATE), source };
        let state = serde_json::to_vec_pretty(&file).map_err(json)?;
        let more = [(OPTIMIZER, optimizer.as_slice()), (STATE, state.as_slice())];
        let has_same_numbers = || read_state(&folder).is_ok_and(|there| there.checksum == file.checksum);
        if fs::symlink_metadata(&folder).is_ok() && !has_same_numbers() {
            rename_aside(out, &folder)?;
        }
        self.adapter.write(&folder, &more).map_err(failed)?;
        Ok(folder)
    }

    /// Reads a folder that [`Checkpoint::write`] wrote, for `model`.
    ///
    /// # Errors
    /// See [`CheckpointError`]. Files of different checkpoints and damaged numbers are errors.
    pub fn read(folder: &Path, model: &ModelConfig) -> Result<Self, CheckpointError> {
        let file = read_state(folder)?;
        let of_adapter = |source| CheckpointError::Adapter { path: folder.to_owned(), source };
        let adapter = Adapter::read_with(folder, model, Links::Refuse).map_err(of_adapter)?;
        let [exp_avg, exp_avg_sq] = read_moments(&folder.join(OPTIMIZER), &adapter.layout)?;
        let checkpoint = Self { adapter, exp_avg, exp_avg_sq, state: file.state };
        let (expected, found) = (file.checksum, checkpoint.checksum());
        if found != expected {
            return Err(CheckpointError::Checksum { path: folder.to_owned(), expected, found });
        }
        Ok(checkpoint)
    }

    /// The latest checkpoint of `out`; `None` if it has none or does not exist.
    ///
    /// # Errors
    /// [`CheckpointError::Read`].
    pub fn latest(out: &Path) -> Result<Option<PathBuf>, CheckpointError> {
        Ok(list(out)?.pop())
    }

    /// Whether `out` has folders or files that are named like checkpoints, but are not from this
    /// program.
    ///
    /// # Errors
    /// [`CheckpointError::Read`].
    pub fn foreign(out: &Path) -> Result<bool, CheckpointError> {
        Ok(named(out)?.iter().any(|(_, entry)| !is_ours(entry)))
    }

    /// Removes the oldest checkpoints of `out` up to `step`, and keeps the newest `keep` (at least
    /// one) and everything that is not a checkpoint. Each vanishes at once. A later call tries
    /// again what this one cannot remove.
    ///
    /// Returns what cannot be removed ([`CheckpointError::Read`], [`CheckpointError::Remove`]); a
    /// run does not depend on it.
    pub fn prune(out: &Path, step: u64, keep: u32) -> Vec<CheckpointError> {
        Self::prune_with(out, step, keep, step::remove_dir_all)
    }

    /// [`Checkpoint::prune`] with a function that removes a folder.
    fn prune_with(out: &Path, step: u64, keep: u32, remove_all: impl Fn(&Path) -> io::Result<()>) -> Vec<CheckpointError> {
        let mut failed = Vec::new();
        let mut check = |path: PathBuf, removed: io::Result<()>| {
            failed.extend(removed.err().map(|source| CheckpointError::Remove { path, source }));
        };
        for path in remains(out) {
            let removed = remove_all(&path);
            check(path, removed);
        }
        match list(out) {
            Ok(mut checkpoints) => {
                // A later checkpoint that could not be renamed is not part of the run.
                checkpoints.retain(|path| !is_after(path, step));
                let old = checkpoints.len().saturating_sub(keep.max(1) as usize);
                for path in checkpoints.into_iter().take(old) {
                    let removed = take_name(out, &path).and_then(|path| remove_all(&path));
                    check(path, removed);
                }
            }
            Err(error) => failed.push(error),
        }
        failed
    }

    /// Renames the checkpoints of `out` after `step`, which are not part of a run that resumes
    /// there, to `aside-1-checkpoint-STEP`, or the next free number. Returns the new names, and
    /// what cannot be renamed ([`CheckpointError::SetAside`]).
    ///
    /// # Errors
    /// [`CheckpointError::Read`].
    pub fn set_aside(out: &Path, step: u64) -> Result<(Vec<PathBuf>, Vec<CheckpointError>), CheckpointError> {
        let (mut renamed, mut failed) = (Vec::new(), Vec::new());
        for path in list(out)?.into_iter().filter(|path| is_after(path, step)) {
            match rename_aside(out, &path) {
                Ok(target) => renamed.push(target),
                Err(error) => failed.push(error),
            }
        }
        Ok((renamed, failed))
    }

    fn checksum(&self) -> u32 {
        checksum(&self.adapter.layout, &[&self.adapter.vector, &self.exp_avg, &self.exp_avg_sq])
    }
}

/// CRC-32 of the matrices of an adapter.
pub fn adapter_checksum(adapter: &Adapter) -> u32 {
    checksum(&adapter.layout, &[&adapter.vector])
}

/// CRC-32 of matrices in this layout, vector after vector.
fn checksum(layout: &AdapterLayout, vectors: &[&[f32]]) -> u32 {
    let mut crc = PieceCrc::default();
    for vector in vectors {
        for matrix in matrices(layout) {
            let bytes = le_bytes(vector.get(matrix.range).unwrap_or_default());
            crc.push(crc32(&bytes), bytes.len() as u64);
        }
    }
    crc.value()
}

fn read_state(folder: &Path) -> Result<StateFile<State>, CheckpointError> {
    let path = folder.join(STATE);
    let bytes = read::read(&path, Links::Refuse, MAX_STATE_LEN)?;
    let json = |source| CheckpointError::Json { path: path.clone(), source };
    // Another format may differ in everything else.
    let found = serde_json::from_slice::<AnyState>(&bytes).map_err(json)?.format;
    if found != FORMAT {
        return Err(CheckpointError::Format { path, expected: FORMAT, found });
    }
    serde_json::from_slice(&bytes).map_err(json)
}

/// The name of a matrix's moment.
fn moment_name(matrix: &Matrix, moment: &str) -> String {
    format!("{}.{moment}", matrix.peft_name())
}

/// `moments` are the bytes of two vectors in the adapter's layout.
fn optimizer_file(layout: &AdapterLayout, moments: &[Vec<u8>; 2]) -> Result<Vec<u8>, SafeTensorError> {
    let mut tensors = Vec::new();
    for (moment, bytes) in MOMENTS.iter().zip(moments) {
        for matrix in matrices(layout) {
            tensors.push((moment_name(&matrix, moment), matrix.view(bytes)?));
        }
    }
    adapter::serialize(tensors)
}

/// Reads both moments, after the types and shapes of all tensors are checked.
fn read_moments(path: &Path, layout: &AdapterLayout) -> Result<[Vec<f32>; 2], CheckpointError> {
    let damaged = |source| match source {
        TensorsError::File(error) => error.into(),
        source => CheckpointError::Safetensors { path: path.to_owned(), source },
    };
    let mut file = TensorFile::open(path, Links::Refuse).map_err(damaged)?;
    let mut tensors = std::mem::take(&mut file.tensors);
    let wrong = |tensor, expected, found| CheckpointError::Tensor { path: path.to_owned(), tensor, expected, found };
    let mut found = [Vec::new(), Vec::new()];
    for (moment, found) in MOMENTS.iter().zip(&mut found) {
        for matrix in matrices(layout) {
            let tensor = moment_name(&matrix, moment);
            let missing = || damaged(SafeTensorError::TensorNotFound(tensor.clone()).into());
            let info = tensors.remove(&tensor).ok_or_else(missing)?;
            let shape = matrix.shape.map(|n| n as usize);
            if info.dtype != Dtype::F32 || info.shape != shape {
                return Err(wrong(tensor, format!("F32 of {shape:?}"), format!("{:?} of {:?}", info.dtype, info.shape)));
            }
            found.push((matrix.range, info));
        }
    }
    if let Some((tensor, info)) = tensors.pop_first() {
        return Err(wrong(tensor, "absent".to_owned(), format!("{:?} of {:?}", info.dtype, info.shape)));
    }
    let mut moments = [vec![0.0; layout.len()], vec![0.0; layout.len()]];
    for (vector, found) in moments.iter_mut().zip(found) {
        for (range, info) in found {
            file.read(&info, vector.get_mut(range).unwrap_or_default()).map_err(|error| match error {
                ReadFloats::File(error) => error.into(),
                // Every tensor is F32.
                ReadFloats::Type(_) => damaged(SafeTensorError::TensorInvalidInfo.into()),
            })?;
        }
    }
    Ok(moments)
}

/// The checkpoints of `out`, the oldest first, without those of other programs, which use the same
/// names.
fn list(out: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    Ok(named(out)?.into_iter().filter(|(_, entry)| is_ours(entry)).map(|(_, entry)| entry.path()).collect())
}

/// The entries of `out` with the name of a checkpoint, in the order of their steps.
fn named(out: &Path) -> Result<Vec<(u64, fs::DirEntry)>, CheckpointError> {
    let failed = |source| CheckpointError::Read { path: out.to_owned(), source };
    let entries = match fs::read_dir(out) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed)?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        let step = entry.file_name().to_str().and_then(step_of);
        found.extend(step.map(|step| (step, entry)));
    }
    found.sort_by_key(|(step, _)| *step);
    Ok(found)
}

/// The step in a folder's name, spelled exactly as [`Checkpoint::write`] does.
fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix(FOLDER_PREFIX)?;
    step.parse().ok().filter(|number: &u64| number.to_string() == step)
}

/// Whether it is the checkpoint of a later step.
fn is_after(path: &Path, step: u64) -> bool {
    path.file_name().and_then(|name| step_of(name.to_str()?)).is_some_and(|found| found > step)
}

/// Gives a checkpoint of `out` another kind of name, and returns the new path.
fn rename_aside(out: &Path, path: &Path) -> Result<PathBuf, CheckpointError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let free = |number: u32| Some(out.join(format!("{ASIDE_PREFIX}{number}-{name}"))).filter(|path| !path.exists());
    let target = (1..=u32::MAX).find_map(free).unwrap_or_default();
    match step::rename(path, &target) {
        Ok(()) => Ok(target),
        Err(source) => Err(CheckpointError::SetAside { path: path.to_owned(), source }),
    }
}

/// Whether it is a folder (not a link) with a file that PEFT and transformers do not write.
fn is_ours(entry: &fs::DirEntry) -> bool {
    entry.file_type().is_ok_and(|kind| kind.is_dir()) && entry.path().join(OPTIMIZER).is_file()
}

/// The name of a checkpoint that is being removed, in a temporary folder.
const REMOVED: &str = "removed";

/// Moves a checkpoint into a temporary folder to be removed, and returns that folder: no partial
/// checkpoint is ever visible.
fn take_name(out: &Path, checkpoint: &Path) -> io::Result<PathBuf> {
    let temporary = temporary_folder(out)?;
    step::rename(checkpoint, &temporary.path().join(REMOVED))?;
    Ok(temporary.keep())
}

/// Temporary folders of `out` with a checkpoint that could be moved there, but not removed.
fn remains(out: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(out).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| is_temporary(path) && path.join(REMOVED).is_dir()).collect()
}

#[cfg(test)]
mod tests;

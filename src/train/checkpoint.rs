//! Checkpoints: all that a run needs to go on as if it had never stopped, bit for bit on the same device. Random numbers need
//! no bytes of their own: each is a function of the seed, of what it is for, and of a counter ([`random`](super::random);
//! [`DropoutKey`](crate::ops::DropoutKey)), and [`State`] has all the counters.
//!
//! A checkpoint is a folder `checkpoint-STEP` of the output folder: an adapter that PEFT loads, the optimiser's moments, and
//! the state.

mod fingerprint;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensorError, SafeTensors};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::arch::config::ModelConfig;
use crate::format::{PieceCrc, crc32};
use crate::io::{is_temporary, temporary_folder};
use crate::lora::adapter::{self, Adapter, AdapterError, Matrix, le_bytes, matrices};
use crate::lora::config::AdapterLayout;
pub use fingerprint::{Difference, Fingerprint, Inputs, data_identity, pack_identity};

/// The file of the optimiser's moments: two tensors for each of the adapter's, under its name and a suffix.
pub const OPTIMIZER: &str = "optimizer.safetensors";
/// The file of the state.
pub const STATE: &str = "trainer_state.json";

/// What comes before the step in the name of a checkpoint's folder.
const FOLDER_PREFIX: &str = "checkpoint-";
/// What comes before the name of a checkpoint that the run went back behind.
const ASIDE_PREFIX: &str = "aside-";
/// Suffixes of the moments' names; AdamW's words in PyTorch.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];
/// What [`STATE`] is: a change of its meaning is another number.
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
    /// An old checkpoint cannot be removed.
    #[error("cannot remove the old checkpoint {}: {source}", path.display())]
    Remove {
        /// The folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A checkpoint that the run goes back behind cannot get another name.
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
    /// The state is not what this program writes.
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
        source: SafeTensorError,
    },
    /// A state of another version of this program.
    #[error("{}: the format is {found}, this version reads {expected}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What this version reads.
        expected: u32,
        /// What it is.
        found: u32,
    },
    /// A tensor of the moments that is not what the adapter has.
    #[error("{}: tensor {tensor:?} should be {expected}, found {found}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// Its name.
        tensor: String,
        /// Type and shape that it should have.
        expected: String,
        /// What it has.
        found: String,
    },
    /// Files that are damaged, or not of one checkpoint.
    #[error("{} is damaged: its numbers have the checksum {found:08x}, written were {expected:08x}", path.display())]
    Checksum {
        /// The folder.
        path: PathBuf,
        /// By the state.
        expected: u32,
        /// Of the adapter and the moments.
        found: u32,
    },
    /// Moments that are not of the adapter's layout: a defect of this program.
    #[error("the optimiser has moments of {found} floats, the adapter has {expected}")]
    Length {
        /// In the adapter.
        expected: u64,
        /// In the moments.
        found: u64,
    },
}

/// Where a run is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Optimiser steps that are done.
    pub step: u64,
    /// Optimiser steps of the whole run.
    pub total_steps: u64,
    /// The epoch, from 0.
    pub epoch: u32,
    /// Rows of that epoch that are used.
    pub row: u64,
    /// Forward passes of training that are done: the counter of dropout's masks.
    pub micro_batches: u64,
    /// Tokens that were learned from, repetitions counted.
    pub trained_tokens: u64,
    /// Seconds that were trained.
    pub seconds: f64,
    /// The date that chat templates are told, in seconds since 1970: it is in the tokens.
    pub now: i64,
    /// The least loss of an evaluation so far.
    pub best_eval: Option<f64>,
    /// The step of that evaluation.
    pub best_step: u64,
    /// CRC-32 of that step's adapter, where it was put into the folder of the run.
    pub best_adapter: Option<u32>,
    /// Evaluations since then.
    pub evals_without_gain: u32,
    /// Whether this step's evaluation is still to be made.
    pub eval_due: bool,
    /// What must be the same for the run to be the same.
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
            trained_tokens: 0,
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

    /// Takes the present adapter for the best one, whatever was better: it is to be evaluated.
    pub fn forget_best(&mut self) {
        (self.best_eval, self.best_step, self.best_adapter) = (None, self.step, None);
        (self.evals_without_gain, self.eval_due) = (0, true);
    }
}

/// What [`STATE`] holds.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StateFile<S> {
    /// Before the rest, so that another version's state is known as such.
    format: u32,
    /// CRC-32 of the adapter's matrices, then of both moments': it ties the files together.
    checksum: u32,
    state: S,
}

/// What every format of [`STATE`] has.
#[derive(Deserialize)]
struct AnyState {
    format: u32,
}

/// A run that can go on.
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
    /// Writes the folder `checkpoint-STEP` in `out`, and returns its path. It appears whole, or not at all.
    ///
    /// Where the step has a checkpoint already, one with the same numbers is replaced in place, file by file: it is whole all the
    /// time, because the numbers are the same bytes. That is so where an evaluation has changed the state after it was saved. What
    /// else has that name is renamed first, as [`Checkpoint::set_aside`] does.
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
        let has_these_numbers = || read_state(&folder).is_ok_and(|there| there.checksum == file.checksum);
        if fs::symlink_metadata(&folder).is_ok() && !has_these_numbers() {
            rename_aside(out, &folder)?;
        }
        self.adapter.write(&folder, &more).map_err(failed)?;
        Ok(folder)
    }

    /// Whether `out` has something with the name of this step's checkpoint.
    pub fn is_there(out: &Path, step: u64) -> bool {
        fs::symlink_metadata(out.join(format!("{FOLDER_PREFIX}{step}"))).is_ok()
    }

    /// Reads a folder that [`Checkpoint::write`] wrote, for `model`.
    ///
    /// # Errors
    /// See [`CheckpointError`]; files of different checkpoints, and any damage to the numbers, are errors.
    pub fn read(folder: &Path, model: &ModelConfig) -> Result<Self, CheckpointError> {
        let file = read_state(folder)?;
        let of_adapter = |source| CheckpointError::Adapter { path: folder.to_owned(), source };
        let adapter = Adapter::read(folder, model).map_err(of_adapter)?;
        let path = folder.join(OPTIMIZER);
        let [exp_avg, exp_avg_sq] = read_moments(&path, &read(&path)?, &adapter.layout)?;
        let checkpoint = Self { adapter, exp_avg, exp_avg_sq, state: file.state };
        let (expected, found) = (file.checksum, checkpoint.checksum());
        if found != expected {
            return Err(CheckpointError::Checksum { path: folder.to_owned(), expected, found });
        }
        Ok(checkpoint)
    }

    /// The checkpoint of `out` with the most steps; `None` where there is none, or no such folder.
    ///
    /// # Errors
    /// [`CheckpointError::Read`].
    pub fn latest(out: &Path) -> Result<Option<PathBuf>, CheckpointError> {
        Ok(list(out)?.pop())
    }

    /// Whether `out` has folders or files that are named as checkpoints are, and are none of this program's.
    ///
    /// # Errors
    /// [`CheckpointError::Read`].
    pub fn foreign(out: &Path) -> Result<bool, CheckpointError> {
        Ok(named(out)?.iter().any(|(_, entry)| !is_ours(entry)))
    }

    /// Removes the oldest checkpoints of `out` up to `step` until `keep` are left; the newest always stays, and so does everything
    /// that is not such a folder. Each vanishes at once. What an earlier call could not remove is tried again.
    ///
    /// Returns what cannot be removed ([`CheckpointError::Read`], [`CheckpointError::Remove`]): nothing that a run has learned depends
    /// on it.
    pub fn prune(out: &Path, step: u64, keep: u32) -> Vec<CheckpointError> {
        Self::prune_with(out, step, keep, |path| fs::remove_dir_all(path))
    }

    /// [`Checkpoint::prune`] with a way to remove a folder.
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
                // A later one, which could not be set aside, is not counted: what is kept are checkpoints of the run as it is.
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

    /// Renames the checkpoints of `out` after `step`, which a run that goes on from there does not have: `aside-1-checkpoint-STEP`, or
    /// the next number that is free. Returns the new names, and what cannot be renamed ([`CheckpointError::SetAside`]).
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

/// CRC-32 of matrices in this layout, those of one vector behind those of the other.
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

fn read(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    fs::read(path).map_err(|source| CheckpointError::Read { path: path.to_owned(), source })
}

fn read_state(folder: &Path) -> Result<StateFile<State>, CheckpointError> {
    let path = folder.join(STATE);
    let bytes = read(&path)?;
    let json = |source| CheckpointError::Json { path: path.clone(), source };
    // Of another format, only that number is understood.
    let found = serde_json::from_slice::<AnyState>(&bytes).map_err(json)?.format;
    if found != FORMAT {
        return Err(CheckpointError::Format { path, expected: FORMAT, found });
    }
    serde_json::from_slice(&bytes).map_err(json)
}

/// The moments' name of a matrix.
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

fn read_moments(path: &Path, bytes: &[u8], layout: &AdapterLayout) -> Result<[Vec<f32>; 2], CheckpointError> {
    let damaged = |source| CheckpointError::Safetensors { path: path.to_owned(), source };
    let file = SafeTensors::deserialize(bytes).map_err(damaged)?;
    let mut moments = [vec![0.0; layout.len()], vec![0.0; layout.len()]];
    for (moment, vector) in MOMENTS.iter().zip(&mut moments) {
        for matrix in matrices(layout) {
            let tensor = moment_name(&matrix, moment);
            let view = file.tensor(&tensor).map_err(damaged)?;
            let shape = matrix.shape.map(|n| n as usize);
            if view.dtype() != Dtype::F32 || view.shape() != shape {
                let expected = format!("F32 of {shape:?}");
                let found = format!("{:?} of {:?}", view.dtype(), view.shape());
                return Err(CheckpointError::Tensor { path: path.to_owned(), tensor, expected, found });
            }
            let floats = view.data().as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b));
            vector.get_mut(matrix.range).unwrap_or_default().iter_mut().zip(floats).for_each(|(x, value)| *x = value);
        }
    }
    Ok(moments)
}

/// The checkpoints of `out`, the oldest first. Trainers of others name their folders like this, too.
fn list(out: &Path) -> Result<Vec<PathBuf>, CheckpointError> {
    Ok(named(out)?.into_iter().filter(|(_, entry)| is_ours(entry)).map(|(_, entry)| entry.path()).collect())
}

/// What in `out` has the name of a checkpoint, by its step.
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

/// The step of a folder's name, in the one way in which [`Checkpoint::write`] spells it.
fn step_of(name: &str) -> Option<u64> {
    let step = name.strip_prefix(FOLDER_PREFIX)?;
    step.parse().ok().filter(|number: &u64| number.to_string() == step)
}

/// Whether it is the checkpoint of a later step.
fn is_after(path: &Path, step: u64) -> bool {
    path.file_name().and_then(|name| step_of(name.to_str()?)).is_some_and(|found| found > step)
}

/// Gives a checkpoint of `out` a name that is none of a checkpoint's, and returns it.
fn rename_aside(out: &Path, path: &Path) -> Result<PathBuf, CheckpointError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let free = |number: u32| Some(out.join(format!("{ASIDE_PREFIX}{number}-{name}"))).filter(|path| !path.exists());
    let target = (1..=u32::MAX).find_map(free).unwrap_or_default();
    match fs::rename(path, &target) {
        Ok(()) => Ok(target),
        Err(source) => Err(CheckpointError::SetAside { path: path.to_owned(), source }),
    }
}

/// Whether it is a folder, not a link to one, with what PEFT and transformers write none of.
fn is_ours(entry: &fs::DirEntry) -> bool {
    entry.file_type().is_ok_and(|kind| kind.is_dir()) && entry.path().join(OPTIMIZER).is_file()
}

/// The name of a checkpoint that is being removed, in a temporary folder.
const REMOVED: &str = "removed";

/// Moves a checkpoint that is to be removed into a temporary folder, and returns that: no checkpoint is ever seen in part.
fn take_name(out: &Path, checkpoint: &Path) -> io::Result<PathBuf> {
    let temporary = temporary_folder(out)?;
    fs::rename(checkpoint, temporary.path().join(REMOVED))?;
    Ok(temporary.keep())
}

/// Temporary folders of `out` with a checkpoint that could be renamed, and not removed.
fn remains(out: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(out).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| is_temporary(path) && path.join(REMOVED).is_dir()).collect()
}

#[cfg(test)]
mod tests;

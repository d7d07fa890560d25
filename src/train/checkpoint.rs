//! Checkpoints: a run that resumes from one computes the same numbers as a run that never stopped,
//! bit for bit on the same device. A checkpoint stores no generator of random numbers: each number
//! is a function of the seed, its use and a counter ([`random`](crate::random),
//! [`DropoutKey`](crate::ops::DropoutKey)), and [`State`] has the counters.
//!
//! A checkpoint is a folder `checkpoint-STEP` of the output folder: an adapter that PEFT loads, the
//! optimiser's moments, and the state.

mod error;
mod fingerprint;
mod state;

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensorError};

use crate::arch::config::ModelConfig;
use crate::format::{PieceCrc, crc32};
use crate::io::read::Links;
use crate::io::{is_temporary, step, temporary_folder};
use crate::lora::adapter::{self, Adapter, Matrix, ReadFloats, TensorFile, TensorsError, le_bytes, matrices};
use crate::lora::config::AdapterLayout;
pub use error::CheckpointError;
pub use fingerprint::{Difference, Fingerprint, Inputs, data_identity, pack_identity};
#[cfg(all(any(fuzzing, test), feature = "convert"))]
pub use state::state_checksum;
pub use state::{STATE, State};
use state::{read_state, state_file};

/// The file of the optimiser's moments: two tensors for each of the adapter's, under its name and a
/// suffix.
pub const OPTIMIZER: &str = "optimizer.safetensors";

/// The name of a checkpoint's folder before the step.
const FOLDER_PREFIX: &str = "checkpoint-";
/// The new name of a later checkpoint begins with this.
const ASIDE_PREFIX: &str = "aside-";
/// Suffixes of the moments' names, as in PyTorch's AdamW.
const MOMENTS: [&str; 2] = ["exp_avg", "exp_avg_sq"];

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
        let checksum = self.checksum();
        let json = |source| CheckpointError::Json { path: folder.join(STATE), source };
        let state = state_file(&self.state, checksum).map_err(json)?;
        let more = [(OPTIMIZER, optimizer.as_slice()), (STATE, state.as_slice())];
        let has_same_numbers = || read_state(&folder).is_ok_and(|(_, there)| there == checksum);
        if fs::symlink_metadata(&folder).is_ok() && !has_same_numbers() {
            rename_aside(out, &folder)?;
        }
        self.adapter.write(&folder, &more).map_err(failed)?;
        Ok(folder)
    }

    /// Reads a folder that [`Checkpoint::write`] wrote, for `model`.
    ///
    /// # Errors
    /// See [`CheckpointError`]. Files of different checkpoints, damaged numbers, and a state that
    /// was changed or is that of another step than the folder's name says are errors.
    pub fn read(folder: &Path, model: &ModelConfig) -> Result<Self, CheckpointError> {
        let (state, expected) = read_state(folder)?;
        if let Some(expected) = step_by_name(folder).filter(|&step| step != state.step) {
            return Err(CheckpointError::Step { path: folder.to_owned(), expected, found: state.step });
        }
        let of_adapter = |source| CheckpointError::Adapter { path: folder.to_owned(), source };
        let adapter = Adapter::read_with(folder, model, Links::Refuse).map_err(of_adapter)?;
        let [exp_avg, exp_avg_sq] = read_moments(&folder.join(OPTIMIZER), &adapter.layout)?;
        let checkpoint = Self { adapter, exp_avg, exp_avg_sq, state };
        let found = checkpoint.checksum();
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
        let again = |path: PathBuf| remove_all(&path).map_err(|source| CheckpointError::Remove { path, source }).err();
        let mut failed: Vec<_> = remains(out).into_iter().filter_map(again).collect();
        match list(out) {
            Ok(mut checkpoints) => {
                // A later checkpoint that could not be renamed is not part of the run.
                checkpoints.retain(|path| !is_after(path, step));
                let old = checkpoints.len().saturating_sub(keep.max(1) as usize);
                failed.extend(checkpoints.iter().take(old).filter_map(|path| remove_with(out, path, &remove_all).err()));
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
        let Adapter { config, layout, vector, .. } = &self.adapter;
        let mut crc = crc_of(layout, &[vector, &self.exp_avg, &self.exp_avg_sq]);
        let settings = adapter::settings(config);
        crc.push(crc32(settings.as_bytes()), settings.len() as u64);
        crc.value()
    }
}

/// CRC-32 of the matrices of an adapter.
pub fn adapter_checksum(adapter: &Adapter) -> u32 {
    crc_of(&adapter.layout, &[&adapter.vector]).value()
}

/// CRC-32 of matrices in this layout, vector after vector.
fn crc_of(layout: &AdapterLayout, vectors: &[&[f32]]) -> PieceCrc {
    let mut crc = PieceCrc::default();
    for vector in vectors {
        for matrix in matrices(layout) {
            let bytes = le_bytes(vector.get(matrix.range).unwrap_or_default());
            crc.push(crc32(&bytes), bytes.len() as u64);
        }
    }
    crc
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

/// The checkpoints of `out`; none where it cannot be read.
pub(super) fn folders(out: &Path) -> Vec<PathBuf> {
    list(out).unwrap_or_default()
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
    step_in_digits(name.strip_prefix(FOLDER_PREFIX)?)
}

/// A step, spelled as this program does.
pub(super) fn step_in_digits(digits: &str) -> Option<u64> {
    digits.parse().ok().filter(|number: &u64| number.to_string() == digits)
}

/// Steps and checksums of the best adapters that the checkpoints of `out` need, also those that
/// were set aside.
///
/// # Errors
/// See [`CheckpointError`]: nothing is known about what a checkpoint needs whose state cannot be
/// read.
pub(super) fn best_of_all(out: &Path) -> Result<BTreeSet<(u64, u32)>, CheckpointError> {
    let failed = |source| CheckpointError::Read { path: out.to_owned(), source };
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(out).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if is_ours(&entry) {
            let (state, _) = read_state(&entry.path())?;
            found.extend(state.best_key());
        }
    }
    Ok(found)
}

/// The step that the name of a checkpoint says, also after it was set aside; `None` for a folder
/// with another name.
fn step_by_name(folder: &Path) -> Option<u64> {
    let folder = folder.canonicalize().ok()?;
    let name = folder.file_name()?.to_str()?;
    let aside = name.strip_prefix(ASIDE_PREFIX).and_then(|rest| rest.split_once('-'));
    step_of(aside.map_or(name, |(_, name)| name))
}

/// Whether it is the checkpoint of a later step.
fn is_after(path: &Path, step: u64) -> bool {
    path.file_name().and_then(|name| step_of(name.to_str()?)).is_some_and(|found| found > step)
}

/// Gives a checkpoint of `out` another kind of name, and returns the new path.
pub(super) fn rename_aside(out: &Path, path: &Path) -> Result<PathBuf, CheckpointError> {
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

/// The name of a folder that is being removed, in a temporary folder.
const REMOVED: &str = "removed";

/// Moves a folder into a temporary folder to be removed, and returns the latter: no part of a
/// checkpoint or an adapter is ever visible.
fn take_name(out: &Path, folder: &Path) -> io::Result<PathBuf> {
    let temporary = temporary_folder(out)?;
    step::rename(folder, &temporary.path().join(REMOVED))?;
    Ok(temporary.keep())
}

/// Removes a folder of `out`, which vanishes at once.
pub(super) fn remove_at_once(out: &Path, folder: &Path) -> Result<(), CheckpointError> {
    remove_with(out, folder, step::remove_dir_all)
}

/// [`remove_at_once`] with a function that removes a folder.
fn remove_with(out: &Path, folder: &Path, remove_all: impl Fn(&Path) -> io::Result<()>) -> Result<(), CheckpointError> {
    let removed = take_name(out, folder).and_then(|path| remove_all(&path));
    removed.map_err(|source| CheckpointError::Remove { path: folder.to_owned(), source })
}

/// Temporary folders of `out` with a folder that could be moved there, but not removed.
fn remains(out: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(out).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.filter(|path| is_temporary(path) && path.join(REMOVED).is_dir()).collect()
}

#[cfg(test)]
mod hostile;
#[cfg(test)]
mod tests;

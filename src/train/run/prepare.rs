//! The part of a run that needs no GPU: its folder, pack and data.

use std::path::{Path, PathBuf};

use super::lock::RunLock;
use super::{Leftover, RunError};
use crate::arch::config::ModelConfig;
use crate::data::memory;
use crate::data::options::Options;
use crate::data::pack::{epoch_order, rows};
use crate::data::sample::Dataset;
use crate::data::{DataFile, Tokenizer};
use crate::dequant::stream::{PackSource, default_budget};
use crate::gpu::{Gpu, MatrixUnits};
use crate::lora::adapter::{self, Adapter};
use crate::lora::config::{AdapterLayout, targets_in};
use crate::model::error::ModelError;
use crate::model::plan::{Demand, MemoryPlan, MicroBatch, Remedy};
use crate::train::best;
use crate::train::checkpoint::{Checkpoint, Fingerprint, Inputs, data_identity, pack_identity};
use crate::train::record::METRICS;
use crate::train::settings::Settings;

/// The inputs of a run.
#[derive(Debug, Clone, Copy)]
pub struct Task<'a> {
    /// The settings.
    pub settings: &'a Settings,
    /// The training data.
    pub data: &'a DataFile,
    /// The evaluation data, if it is not split from the training data.
    pub eval_data: Option<&'a DataFile>,
    /// The folder of adapter, checkpoints and records.
    pub out: &'a Path,
    /// Name or path of the base, for the adapter's settings; `None`: that of the checkpoint.
    pub base: Option<&'a str>,
    /// Further files for the folder: names and bytes.
    pub files: &'a [(&'a str, &'a [u8])],
    /// The date that chat templates show, in seconds since the Unix epoch; a resumed run keeps its
    /// own.
    pub now: i64,
}

/// A pack and the tokenised data for it.
#[derive(Debug)]
pub struct Prepared {
    /// The pack.
    pub pack: PackSource,
    /// Its model.
    pub model: ModelConfig,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// The training data.
    pub(crate) data: Dataset,
    /// The evaluation data.
    pub(crate) held_out: Option<Dataset>,
    pub(super) checkpoint: Option<(PathBuf, Checkpoint)>,
    pub(super) now: i64,
}

impl Prepared {
    /// Reads pack and data. `resume` is the checkpoint to resume from. `progress` gets the number
    /// of lines that are tokenised, and of all; if it returns `false`, reading stops with
    /// [`DataError::Cancelled`](crate::data::DataError::Cancelled).
    ///
    /// # Errors
    /// See [`RunError`].
    pub fn new(
        pack: PackSource,
        task: &Task<'_>,
        resume: Option<&Path>,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Self, RunError> {
        let settings = task.settings;
        settings.check()?;
        let model = ModelConfig::of_pack(&pack)?;
        model.check_runnable().map_err(ModelError::from)?;
        let checkpoint =
            resume.map(|path| Ok::<_, RunError>((path.to_owned(), Checkpoint::read(path, &model)?))).transpose()?;
        let now = checkpoint.as_ref().map_or(task.now, |(_, checkpoint)| checkpoint.state.now);
        let tokenizer = Tokenizer::of_pack(&pack, &model, now)?;
        let Settings { train_on, max_length, strict, .. } = *settings;
        let options = Options { train_on, max_length, strict, memory: memory::limit() };
        let mut data = task.data.samples(&tokenizer, options, progress)?;
        let left = options.memory.saturating_sub(data.memory());
        let held_out = match task.eval_data {
            Some(file) => Some(file.samples(&tokenizer, Options { memory: left, ..options }, progress)?),
            None if settings.eval_split > 0.0 => Some(data.hold_out(settings.eval_split, settings.seed)?),
            None => None,
        };
        Ok(Self { pack, model, tokenizer, data, held_out, checkpoint, now })
    }

    /// The precision of the run that is resumed: `mixed` or `f32`.
    pub fn precision(&self) -> Option<&str> {
        self.checkpoint.as_ref().and_then(|(_, checkpoint)| checkpoint.state.fingerprint.precision())
    }

    /// Tokens of the longest sample.
    fn positions(&self) -> u32 {
        self.data.longest().max(self.held_out.as_ref().map_or(0, Dataset::longest))
    }

    /// Tokens of a row, at most those of the data.
    fn row_length(&self, settings: &Settings) -> u32 {
        let tokens = |data: &Dataset| u32::try_from(data.tokens()).unwrap_or(u32::MAX);
        let tokens = tokens(&self.data).max(self.held_out.as_ref().map_or(0, tokens));
        settings.max_length.min(tokens.max(1))
    }

    /// The rows of an epoch: the samples of each.
    pub(crate) fn epoch(&self, settings: &Settings, epoch: u32) -> Vec<Vec<usize>> {
        epoch_rows(&self.data, settings, self.row_length(settings), epoch)
    }

    /// The steps of a run with this many rows per forward pass.
    pub(super) fn total_steps(&self, settings: &Settings, micro_batch: u32) -> u64 {
        let rows_per_step = u64::from(micro_batch) * u64::from(settings.accumulate);
        let of_epoch = |epoch| (self.epoch(settings, epoch).len() as u64).div_ceil(rows_per_step);
        settings.steps.unwrap_or_else(|| (0..settings.epochs).map(of_epoch).sum())
    }

    /// The fingerprint that all checkpoints of the run have.
    pub(super) fn fingerprint(&self, task: &Task<'_>, plan: &MemoryPlan, total_steps: u64) -> Fingerprint {
        let inputs = Inputs {
            pack: pack_identity(self.pack.index()),
            data: data_identity(self.data.checksum),
            eval_data: task.eval_data.and(self.held_out.as_ref()).map(|data| data_identity(data.checksum)),
            micro_batch: plan.micro_batch,
            precision: MatrixUnits::precision(plan.units),
            total_steps,
        };
        // All targets are those of the model.
        let targets = targets_in(&self.model, &task.settings.targets);
        Fingerprint::new(&Settings { targets, ..task.settings.clone() }, &inputs)
    }

    /// Plans the memory of the run on a device.
    ///
    /// # Errors
    /// [`RunError::Plan`], [`ModelError::Lora`].
    pub fn plan(&self, gpu: &Gpu, settings: &Settings) -> Result<MemoryPlan, RunError> {
        let lora = settings.lora();
        let layout = AdapterLayout::new(&lora, &self.model).map_err(ModelError::from)?;
        let demand = Demand {
            index: self.pack.index(),
            model: &self.model,
            max_buffer: gpu.limits().max_buffer_size,
            max_binding: gpu.limits().max_storage_buffer_binding_size,
            budget: settings.vram_budget.or_else(|| default_budget(gpu)),
            adapter: layout.len() as u64,
            rank: lora.rank,
            dropout: lora.dropout > 0.0,
            training: true,
            keep_activations: settings.keep_activations,
            offload_activations: settings.offload_activations,
            offload_vocabulary: settings.offload_vocabulary,
            host_buffers: gpu.has_host_buffers(),
            length: self.row_length(settings),
            positions: self.positions(),
            rows: self.epoch(settings, 0).len() as u64,
            reserved: 0,
            units: gpu.matrix_units().ok(),
        };
        let resumed = self.checkpoint.as_ref().and_then(|(_, checkpoint)| checkpoint.state.fingerprint.micro_batch());
        let micro_batch = match (settings.micro_batch, resumed) {
            (MicroBatch::Auto, Some(rows)) => MicroBatch::Rows(rows),
            (micro_batch, _) => micro_batch,
        };
        let planned = MemoryPlan::new(&demand, micro_batch);
        // A resumed run keeps its rows, their length and its rank.
        let possible = |remedy: &Remedy| resumed.is_none() || matches!(remedy, Remedy::Keep(_));
        Ok(planned.map_err(|error| {
            let remedy = error.remedy().filter(possible);
            error.with(remedy)
        })?)
    }
}

/// See [`Run::check_folder`](super::Run::check_folder).
pub(super) fn check_folder(out: &Path, resume: Option<&Path>, model: &ModelConfig) -> Result<(), RunError> {
    RunLock::check(out)?;
    check_results(out, resume, model)
}

/// The part of [`check_folder`] that is repeated under the lock.
pub(super) fn check_results(out: &Path, resume: Option<&Path>, model: &ModelConfig) -> Result<(), RunError> {
    let same = |a: &Path, b: &Path| a.canonicalize().ok().zip(b.canonicalize().ok()).is_some_and(|(a, b)| a == b);
    let found = match (Checkpoint::foreign(out)?, resume) {
        (true, _) => Some(Leftover::Foreign),
        // A missing one is reported when it is read.
        (false, Some(checkpoint)) if !checkpoint.exists() || same(crate::io::folder_of(checkpoint), out) => None,
        (false, Some(checkpoint)) => {
            return Err(RunError::Elsewhere { checkpoint: checkpoint.to_owned(), out: out.to_owned() });
        }
        (false, None) => leftover(out, model)?,
    };
    found.map_or(Ok(()), |found| Err(RunError::Occupied { out: out.to_owned(), found }))
}

/// The results that a new run in `out` would replace. A run that ended before its first checkpoint
/// has left an adapter that changes nothing, so that one may be replaced.
fn leftover(out: &Path, model: &ModelConfig) -> Result<Option<Leftover>, RunError> {
    let has = |name: &str| out.join(name).exists();
    let untrained = || Adapter::read(out, model).is_ok_and(|adapter| adapter.changes_nothing());
    Ok(match Checkpoint::latest(out)? {
        Some(_) => Some(Leftover::Checkpoints),
        None if best::is_any_trained(out) => Some(Leftover::Adapter),
        None if has(adapter::WEIGHTS) && untrained() => None,
        None if has(adapter::WEIGHTS) || has(adapter::CONFIG) => Some(Leftover::Adapter),
        None if has(METRICS) => Some(Leftover::Records),
        None => None,
    })
}

pub(super) fn epoch_rows(data: &Dataset, settings: &Settings, row_length: u32, epoch: u32) -> Vec<Vec<usize>> {
    rows(&data.samples, &epoch_order(data.samples.len(), settings.seed, epoch), row_length)
}

#[cfg(test)]
mod tests;

//! What a run needs before it takes a GPU: its folder, pack and data.

use std::path::{Path, PathBuf};

use super::{Leftover, RunError};
use crate::arch::config::ModelConfig;
use crate::data::{Batch, DataFile, Dataset, Options, Tokenizer, batch, epoch_order, rows};
use crate::dequant::stream::{PackSource, default_budget};
use crate::gpu::Gpu;
use crate::lora::adapter::{self, Adapter};
use crate::lora::config::AdapterLayout;
use crate::model::decoder::{read_config, read_tokenizer};
use crate::model::error::ModelError;
use crate::model::plan::MicroBatch;
use crate::model::plan::{Demand, MemoryPlan};
use crate::train::checkpoint::{Checkpoint, Fingerprint, Inputs, data_identity, pack_identity};
use crate::train::record::METRICS;
use crate::train::settings::Settings;

/// What a run is made of.
#[derive(Debug, Clone, Copy)]
pub struct Task<'a> {
    /// The settings.
    pub settings: &'a Settings,
    /// What is learned.
    pub data: DataFile<'a>,
    /// What is evaluated on, if it is not a part of the data.
    pub eval_data: Option<DataFile<'a>>,
    /// The folder of adapter, checkpoints and records.
    pub out: &'a Path,
    /// Name or path of the base, for the adapter's settings; `None`: that of the checkpoint.
    pub base: Option<&'a str>,
    /// Further files for the folder: names and bytes.
    pub files: &'a [(&'a str, &'a [u8])],
    /// The date that chat templates show, in seconds since the Unix epoch; a resumed run keeps its own.
    pub now: i64,
}

/// A pack and the data for it, tokenised: what can be known without a GPU.
#[derive(Debug)]
pub struct Prepared {
    /// The pack.
    pub pack: PackSource,
    /// Its model.
    pub model: ModelConfig,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// What is learned.
    pub data: Dataset,
    /// What is evaluated on.
    pub held_out: Option<Dataset>,
    pub(super) checkpoint: Option<(PathBuf, Checkpoint)>,
    pub(super) now: i64,
}

impl Prepared {
    /// Reads pack and data. `resume` is the checkpoint to go on from; `progress` is that of [`DataFile::samples`].
    ///
    /// # Errors
    /// What is wrong with settings, pack, data or checkpoint.
    pub fn new(
        pack: PackSource,
        task: &Task<'_>,
        resume: Option<&Path>,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Self, RunError> {
        let settings = task.settings;
        settings.check()?;
        let model = read_config(&pack)?;
        model.check_runnable().map_err(ModelError::from)?;
        let checkpoint =
            resume.map(|path| Ok::<_, RunError>((path.to_owned(), Checkpoint::read(path, &model)?))).transpose()?;
        let now = checkpoint.as_ref().map_or(task.now, |(_, checkpoint)| checkpoint.state.now);
        let tokenizer = read_tokenizer(&pack, &model, now)?;
        let options = Options { train_on: settings.train_on, max_length: settings.max_length, strict: settings.strict };
        let mut data = task.data.samples(&tokenizer, options, progress)?;
        let held_out = match task.eval_data {
            Some(file) => Some(file.samples(&tokenizer, options, progress)?),
            None if settings.eval_split > 0.0 => Some(data.hold_out(settings.eval_split, settings.seed)?),
            None => None,
        };
        Ok(Self { pack, model, tokenizer, data, held_out, checkpoint, now })
    }

    /// Tokens of the longest sample.
    fn positions(&self) -> u32 {
        self.data.longest().max(self.held_out.as_ref().map_or(0, Dataset::longest))
    }

    /// Tokens of a row: no more than there are.
    fn row_length(&self, settings: &Settings) -> u32 {
        let most = |data: &Dataset| u32::try_from(data.tokens()).unwrap_or(u32::MAX);
        let most = most(&self.data).max(self.held_out.as_ref().map_or(0, most));
        settings.max_length.min(most.max(1))
    }

    /// The first batch, as the run will see it.
    pub fn first_batch(&self, settings: &Settings, rows_at_a_time: u32) -> Batch {
        let rows = self.epoch(settings, 0);
        let first: Vec<Vec<usize>> = rows.into_iter().take(rows_at_a_time as usize).collect();
        batch(&self.data.samples, &first)
    }

    fn epoch(&self, settings: &Settings, epoch: u32) -> Vec<Vec<usize>> {
        epoch_rows(&self.data, settings, self.row_length(settings), epoch)
    }

    /// The steps of a run with so many rows at a time.
    pub(super) fn total_steps(&self, settings: &Settings, micro_batch: u32) -> u64 {
        let rows_a_step = u64::from(micro_batch) * u64::from(settings.accumulate);
        let of_epoch = |epoch| (self.epoch(settings, epoch).len() as u64).div_ceil(rows_a_step);
        settings.steps.unwrap_or_else(|| (0..settings.epochs).map(of_epoch).sum())
    }

    /// What a checkpoint of the run must have been made with.
    pub(super) fn fingerprint(&self, task: &Task<'_>, micro_batch: u32, total_steps: u64) -> Fingerprint {
        let inputs = Inputs {
            pack: pack_identity(self.pack.index()),
            data: data_identity(task.data.bytes),
            eval_data: task.eval_data.map(|file| data_identity(file.bytes)),
            micro_batch,
            total_steps,
        };
        Fingerprint::new(task.settings, &inputs)
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
            length: self.row_length(settings),
            positions: self.positions(),
            rows: self.epoch(settings, 0).len() as u64,
            reserved: 0,
        };
        let resumed = self.checkpoint.as_ref().and_then(|(_, checkpoint)| checkpoint.state.fingerprint.micro_batch());
        let micro_batch = match (settings.micro_batch, resumed) {
            (MicroBatch::Auto, Some(rows)) => MicroBatch::Rows(rows),
            (micro_batch, _) => micro_batch,
        };
        let planned = MemoryPlan::new(&demand, micro_batch);
        // A run that goes on keeps its rows, their length and its rank.
        Ok(planned.map_err(|error| if resumed.is_some() { error.with(None) } else { error })?)
    }
}

/// Holds the folder of a run of `model` against what it is to begin, or to go on with: nothing of worth is replaced.
///
/// # Errors
/// [`RunError::Occupied`], [`RunError::Elsewhere`], [`RunError::Checkpoint`].
pub fn check_folder(out: &Path, resume: Option<&Path>, model: &ModelConfig) -> Result<(), RunError> {
    let same = |a: &Path, b: &Path| a.canonicalize().ok().zip(b.canonicalize().ok()).is_some_and(|(a, b)| a == b);
    let found = match (Checkpoint::foreign(out)?, resume) {
        (true, _) => Some(Leftover::OfOthers),
        // One that is not there is told when it is read.
        (false, Some(checkpoint)) if !checkpoint.exists() || same(crate::io::folder_of(checkpoint), out) => None,
        (false, Some(checkpoint)) => {
            return Err(RunError::Elsewhere { checkpoint: checkpoint.to_owned(), out: out.to_owned() });
        }
        (false, None) => leftover(out, model)?,
    };
    found.map_or(Ok(()), |found| Err(RunError::Occupied { out: out.to_owned(), found }))
}

/// What a new run in `out` would replace. A run that ended before its first checkpoint has left nothing that it had learned.
fn leftover(out: &Path, model: &ModelConfig) -> Result<Option<Leftover>, RunError> {
    let has = |name: &str| out.join(name).exists();
    let learned_nothing = || Adapter::read(out, model).is_ok_and(|adapter| adapter.changes_nothing());
    Ok(match Checkpoint::latest(out)? {
        Some(_) => Some(Leftover::Checkpoints),
        None if has(adapter::WEIGHTS) && learned_nothing() => None,
        None if has(adapter::WEIGHTS) || has(adapter::CONFIG) => Some(Leftover::Adapter),
        None if has(METRICS) => Some(Leftover::Records),
        None => None,
    })
}

pub(super) fn epoch_rows(data: &Dataset, settings: &Settings, row_length: u32, epoch: u32) -> Vec<Vec<usize>> {
    rows(&data.samples, &epoch_order(data.samples.len(), settings.seed, epoch), row_length)
}

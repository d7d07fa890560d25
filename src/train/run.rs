//! A training from its first step to its last: data, steps, evaluations, checkpoints, records.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;
use thiserror::Error;

use super::adapter::{Adapter, WEIGHTS};
use super::checkpoint::{Checkpoint, CheckpointError, Difference, Fingerprint, Inputs, State, data_identity, pack_identity};
use super::config::ModelConfig;
use super::data::{Batch, DataError, DataFile, Dataset, Options, Tokenizer, batch, epoch_order, rows};
use super::error::TrainError;
use super::folder::publish;
use super::gpu_adapter::GpuAdapter;
use super::model::{read_config, read_tokenizer};
use super::plan::{Demand, MemoryError, MemoryPlan};
use super::record::{EvalRecord, METRICS, Record, RecordError, Recorder, Report, StepRecord};
use super::schedule::Schedule;
use super::settings::{MicroBatch, Settings, SettingsError};
use super::step::{Hyperparameters, Trainer};
use crate::dequant::stream::{PackSource, default_budget};
use crate::gpu::Gpu;

/// Why a run could not begin, or did not reach its end.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RunError {
    /// Settings that cannot be.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// The model, the data or the device.
    #[error(transparent)]
    Train(#[from] TrainError),
    /// The memory does not suffice.
    #[error(transparent)]
    Plan(#[from] MemoryError),
    /// A checkpoint cannot be read or written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// What is resumed was started with other settings.
    #[error("cannot go on from {}: {source}", checkpoint.display())]
    OtherRun {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// What differs.
        source: Difference,
    },
    /// A new run would replace what is there.
    #[error("{} has {found} of an earlier run", out.display())]
    Occupied {
        /// The folder.
        out: PathBuf,
        /// What it has.
        found: Leftover,
    },
    /// A checkpoint of another run.
    #[error("{} is not in {}, where the run that goes on is", checkpoint.display(), out.display())]
    Elsewhere {
        /// The checkpoint.
        checkpoint: PathBuf,
        /// The folder.
        out: PathBuf,
    },
    /// Nothing to resume.
    #[error("{} has no checkpoint to go on from", out.display())]
    NoCheckpoint {
        /// The folder.
        out: PathBuf,
    },
    /// Records cannot be written.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// A loss or a gradient that is not finite.
    #[error("{source}{}", last_good(.checkpoint.as_deref()))]
    Diverged {
        /// Where.
        source: Box<TrainError>,
        /// The last checkpoint before.
        checkpoint: Option<PathBuf>,
    },
}

/// What an earlier run has left in a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leftover {
    /// Checkpoints: it can go on.
    Checkpoints,
    /// An adapter without checkpoints.
    Adapter,
    /// Nothing but records.
    Records,
}

impl fmt::Display for Leftover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Checkpoints => "checkpoints",
            Self::Adapter => "the adapter",
            Self::Records => "the records",
        })
    }
}

fn last_good(checkpoint: Option<&Path>) -> String {
    checkpoint.map_or_else(String::new, |path| format!("; the last good checkpoint is {}", path.display()))
}

impl From<DataError> for RunError {
    fn from(error: DataError) -> Self {
        Self::Train(error.into())
    }
}

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

/// What a run tells while it goes on.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A step is done, of so many.
    Step(&'a StepRecord, u64),
    /// So many rows of the held-out samples, of all, are evaluated.
    Evaluating(u64, u64),
    /// The held-out samples were evaluated.
    Eval(&'a EvalRecord),
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum End {
    /// All steps are done.
    Complete,
    /// No evaluation was better for as many as were allowed.
    #[serde(rename = "early stop")]
    EarlyStop,
    /// The caller asked for it; it can be resumed.
    Stopped,
}

/// A training that is ready to go on.
#[derive(Debug)]
pub struct Run {
    settings: Settings,
    out: PathBuf,
    /// What is learned.
    pub data: Dataset,
    /// What is evaluated on.
    pub held_out: Option<Dataset>,
    /// The memory that it takes.
    pub plan: MemoryPlan,
    trainer: Trainer,
    adapter: Adapter,
    schedule: Schedule,
    state: State,
    /// Rows of the epoch that [`State::epoch`] is in.
    rows: Vec<Vec<usize>>,
    recorder: Recorder,
    /// All records, those before a resumption too.
    pub records: Vec<Record>,
    /// Later checkpoints than the one that the run goes on from, by the names that they have now.
    pub set_aside: Vec<PathBuf>,
    last_checkpoint: Option<PathBuf>,
    /// The state in it, if this part of the run has written it.
    saved: Option<State>,
    /// Seconds of earlier parts of the run, and when this one began.
    clock: (f64, Instant),
    /// A batch of the last step.
    last_batch: Option<Batch>,
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
    checkpoint: Option<(PathBuf, Checkpoint)>,
    now: i64,
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
        model.check_length(settings.max_length).map_err(TrainError::from)?;
        let checkpoint =
            resume.map(|path| Ok::<_, RunError>((path.to_owned(), Checkpoint::read(path, &model)?))).transpose()?;
        let now = checkpoint.as_ref().map_or(task.now, |(_, checkpoint)| checkpoint.state.now);
        let tokenizer = read_tokenizer(&pack, &model, now)?;
        let options = Options { train_on: settings.train_on, max_length: settings.max_length };
        let mut data = task.data.samples(&tokenizer, options, progress)?;
        let held_out = match task.eval_data {
            Some(file) => Some(file.samples(&tokenizer, options, progress)?),
            None if settings.eval_split > 0.0 => Some(data.hold_out(settings.eval_split, settings.seed)?),
            None => None,
        };
        Ok(Self { pack, model, tokenizer, data, held_out, checkpoint, now })
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
    fn total_steps(&self, settings: &Settings, micro_batch: u32) -> u64 {
        let rows_a_step = u64::from(micro_batch) * u64::from(settings.accumulate);
        let of_epoch = |epoch| (self.epoch(settings, epoch).len() as u64).div_ceil(rows_a_step);
        settings.steps.unwrap_or_else(|| (0..settings.epochs).map(of_epoch).sum())
    }

    /// What a checkpoint of the run must have been made with.
    fn fingerprint(&self, task: &Task<'_>, micro_batch: u32, total_steps: u64) -> Fingerprint {
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
    /// [`RunError::Plan`], [`TrainError::Lora`].
    pub fn plan(&self, gpu: &Gpu, settings: &Settings) -> Result<MemoryPlan, RunError> {
        let lora = settings.lora();
        let layout = super::lora::AdapterLayout::new(&lora, &self.model).map_err(TrainError::from)?;
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
            rows: self.epoch(settings, 0).len() as u64,
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

/// Holds the folder of a run against what it is to begin, or to go on with: nothing that is there is replaced.
///
/// # Errors
/// [`RunError::Occupied`], [`RunError::Elsewhere`], [`RunError::Checkpoint`].
pub fn check_folder(out: &Path, resume: Option<&Path>) -> Result<(), RunError> {
    let same = |a: &Path, b: &Path| a.canonicalize().ok().zip(b.canonicalize().ok()).is_some_and(|(a, b)| a == b);
    match resume {
        // One that is not there is told when it is read.
        Some(checkpoint) if !checkpoint.exists() || same(crate::io::folder_of(checkpoint), out) => Ok(()),
        Some(checkpoint) => Err(RunError::Elsewhere { checkpoint: checkpoint.to_owned(), out: out.to_owned() }),
        None => {
            let found = match Checkpoint::latest(out)? {
                Some(_) => Some(Leftover::Checkpoints),
                None if out.join(WEIGHTS).exists() => Some(Leftover::Adapter),
                None if out.join(METRICS).exists() => Some(Leftover::Records),
                None => None,
            };
            found.map_or(Ok(()), |found| Err(RunError::Occupied { out: out.to_owned(), found }))
        }
    }
}

fn epoch_rows(data: &Dataset, settings: &Settings, row_length: u32, epoch: u32) -> Vec<Vec<usize>> {
    rows(&data.samples, &epoch_order(data.samples.len(), settings.seed, epoch), row_length)
}

impl Run {
    /// The checkpoint that `out` can be resumed from.
    ///
    /// # Errors
    /// [`RunError::NoCheckpoint`], [`RunError::Checkpoint`].
    pub fn latest(out: &Path) -> Result<PathBuf, RunError> {
        Checkpoint::latest(out)?.ok_or_else(|| RunError::NoCheckpoint { out: out.to_owned() })
    }

    /// Loads the model, then writes the adapter as it is before the first step, so that a folder that cannot be written is known before
    /// the training. Checkpoints after the one that is resumed are renamed.
    ///
    /// # Errors
    /// See [`RunError`].
    pub fn start(gpu: &Gpu, prepared: Prepared, task: &Task<'_>, plan: MemoryPlan) -> Result<Self, RunError> {
        check_folder(task.out, prepared.checkpoint.as_ref().map(|(path, _)| path.as_path()))?;
        let settings = task.settings.clone();
        let total_steps = prepared.total_steps(&settings, plan.micro_batch);
        let fingerprint = prepared.fingerprint(task, plan.micro_batch, total_steps);
        let Prepared { pack, model, data, held_out, checkpoint, now, .. } = prepared;
        let out = task.out.to_owned();
        let (adapter, state, moments, last_checkpoint) = match checkpoint {
            Some((path, checkpoint)) => {
                let differs = |source| RunError::OtherRun { checkpoint: path.clone(), source };
                checkpoint.state.fingerprint.check(&fingerprint).map_err(differs)?;
                let Checkpoint { mut adapter, mean, square, state } = checkpoint;
                adapter.base = task.base.map(str::to_owned).or(adapter.base);
                (adapter, State { total_steps, fingerprint, ..state }, Some((mean, square)), Some(path))
            }
            None => {
                let base = task.base.map(str::to_owned);
                let adapter = Adapter::new(settings.lora(), base, &model, settings.seed).map_err(TrainError::from)?;
                (adapter, new_state(total_steps, now, fingerprint), None, None)
            }
        };
        let mut trainer = trainer(gpu, pack, &settings, &adapter, &plan)?;
        if let Some((mean, square)) = &moments {
            trainer.restore(mean, square, state.step, state.micro_batches)?;
        }
        let resumed = moments.is_some();
        let set_aside = if resumed { Checkpoint::set_aside(&out, state.step)? } else { Vec::new() };
        // With an early stop, the best adapter is there, which need not be that of the checkpoint.
        let keeps = resumed && settings.early_stop.is_some();
        if !keeps {
            adapter.write(&out, task.files).map_err(TrainError::from)?;
        }
        let (recorder, records) = if resumed {
            Recorder::resume(&out, state.step, state.eval_due)?
        } else {
            (Recorder::create(&out)?, Vec::new())
        };
        let schedule = Schedule::new(settings.schedule, settings.lr, settings.warmup, total_steps);
        let rows = epoch_rows(&data, &settings, plan.length, state.epoch);
        let clock = (state.seconds, Instant::now());
        Ok(Self {
            settings,
            out,
            data,
            held_out,
            plan,
            trainer,
            adapter,
            schedule,
            state,
            rows,
            recorder,
            records,
            set_aside,
            last_checkpoint,
            saved: None,
            clock,
            last_batch: None,
        })
    }

    /// Runs to the end, or until `observe` answers `false`. In the end the last adapter is in its folder or, with an early stop, the
    /// best one.
    ///
    /// # Errors
    /// See [`RunError`]; what was saved before stays.
    pub fn train(&mut self, mut observe: impl FnMut(Event<'_>) -> bool) -> Result<End, RunError> {
        self.clock = (self.state.seconds, Instant::now());
        if self.state.step == 0 {
            // What the model can without having learned: what all later losses are held against.
            self.state.eval_due = self.held_out.is_some();
        }
        let mut wanted = self.evaluate(&mut observe)?;
        while wanted && self.state.step < self.state.total_steps && !self.stops_early() {
            let (record, epoch_ends) = self.step()?;
            let last = self.state.step == self.state.total_steps;
            wanted = observe(Event::Step(&record, self.state.total_steps));
            self.state.eval_due = self.held_out.is_some() && self.is_due(self.settings.eval_every, epoch_ends, last);
            // Before the evaluation: nothing that happens there loses what was learned.
            if !wanted || self.is_due(self.settings.save_every, epoch_ends, last) {
                wanted &= self.save(&mut observe)?;
            }
            if wanted {
                wanted = self.evaluate(&mut observe)?;
            }
        }
        self.end(&mut observe)
    }

    /// Saves what was not, and says why the run ended.
    fn end(&mut self, observe: &mut impl FnMut(Event<'_>) -> bool) -> Result<End, RunError> {
        let end = match self.stops_early() {
            true => End::EarlyStop,
            false if self.state.step == self.state.total_steps && !self.state.eval_due => End::Complete,
            false => End::Stopped,
        };
        // What an evaluation after the last checkpoint has changed, too: a run that is resumed does not make it again.
        if self.saved.as_ref() != Some(&self.state) {
            self.save(observe)?;
        }
        Ok(end)
    }

    /// Whether as many evaluations as are allowed were no better than the best one.
    fn stops_early(&self) -> bool {
        self.settings.early_stop.is_some_and(|most| self.state.evals_without_gain >= most)
    }

    /// The step whose adapter is in the folder.
    pub fn adapter_step(&self) -> u64 {
        if self.keeps_best() { self.state.best_step } else { self.state.step }
    }

    fn keeps_best(&self) -> bool {
        self.settings.early_stop.is_some() && self.held_out.is_some()
    }

    /// Name or path of the base, as the adapter has it.
    pub fn base(&self) -> Option<&str> {
        self.adapter.base.as_deref()
    }

    /// Steps that are done, and of how many.
    pub fn steps(&self) -> (u64, u64) {
        (self.state.step, self.state.total_steps)
    }

    /// Seconds that the run took, earlier parts of a resumed one included.
    pub fn seconds(&self) -> f64 {
        self.state.seconds
    }

    /// Tokens that were learned from, repeated ones counted again.
    pub fn trained_tokens(&self) -> u64 {
        self.state.trained_tokens
    }

    /// Writes `report.html` beside the adapter.
    ///
    /// # Errors
    /// [`RunError::Record`].
    pub fn write_report(&self, report: &Report) -> Result<PathBuf, RunError> {
        const NAME: &str = "report.html";
        let path = self.out.join(NAME);
        let text = super::record::report(report);
        let written = publish(&self.out, &[(NAME, text.as_bytes())]);
        written.map_err(|source| RecordError::Write { path: path.clone(), source })?;
        Ok(path)
    }

    /// Every so many steps or at the end of an epoch, and at the end of all.
    fn is_due(&self, every: Option<u64>, epoch_ends: bool, last: bool) -> bool {
        last || every.map_or(epoch_ends, |every| self.state.step.is_multiple_of(every.max(1)))
    }

    fn step(&mut self) -> Result<(StepRecord, bool), RunError> {
        let began = Instant::now();
        let batches = self.next_batches();
        let lr = self.schedule.learning_rate(self.state.step);
        let result = self.trainer.step(&batches, lr).map_err(|source| self.failed(source))?;
        let sum = |of: fn(&Batch) -> u64| batches.iter().map(of).sum::<u64>();
        let (tokens, trained_tokens) = (sum(|batch| batch.tokens.len() as u64), sum(|batch| batch.trained));
        self.state.step += 1;
        self.state.trained_tokens += trained_tokens;
        self.state.seconds = self.seconds_now();
        (_, self.state.micro_batches) = self.trainer.counts();
        let allocated = self.trainer.session().model.gpu().allocated();
        let record = StepRecord {
            step: self.state.step,
            epoch: f64::from(self.state.epoch) + self.state.row as f64 / self.rows.len().max(1) as f64,
            loss: result.loss,
            lr,
            grad_norm: result.grad_norm,
            clip: self.settings.clip.unwrap_or_default() as f32,
            trained_tokens,
            tokens,
            tokens_per_second: tokens as f64 / began.elapsed().as_secs_f64().max(1e-9),
            gpu_bytes: allocated.map_or(self.plan.total(), |allocated| allocated.reserved),
            seconds: self.state.seconds,
        };
        self.recorder.record(&Record::Step(record))?;
        self.records.push(Record::Step(record));
        self.last_batch = batches.into_iter().next_back();
        Ok((record, self.state.row as usize >= self.rows.len()))
    }

    /// The batches of the next step: an epoch's last step may have fewer.
    fn next_batches(&mut self) -> Vec<Batch> {
        if self.state.row as usize >= self.rows.len() {
            self.state.epoch += 1;
            self.state.row = 0;
            self.rows = epoch_rows(&self.data, &self.settings, self.plan.length, self.state.epoch);
        }
        let rows = self.rows.get(self.state.row as usize..).unwrap_or_default();
        let micro_batches = rows.chunks(self.plan.micro_batch.max(1) as usize).take(self.settings.accumulate as usize);
        let batches: Vec<Batch> = micro_batches.map(|rows| batch(&self.data.samples, rows)).collect();
        self.state.row += batches.iter().map(|batch| u64::from(batch.rows)).sum::<u64>();
        batches
    }

    fn seconds_now(&self) -> f64 {
        self.clock.0 + self.clock.1.elapsed().as_secs_f64()
    }

    fn failed(&self, source: TrainError) -> RunError {
        match source {
            TrainError::NotFinite { .. } => {
                RunError::Diverged { source: Box::new(source), checkpoint: self.last_checkpoint.clone() }
            }
            source => source.into(),
        }
    }

    /// Evaluates where that is due and there is something to evaluate on; whether the run is to go on. Where the caller does not want it
    /// to, the evaluation stays due.
    fn evaluate(&mut self, observe: &mut impl FnMut(Event<'_>) -> bool) -> Result<bool, RunError> {
        let Some(held_out) = self.held_out.as_ref().filter(|_| self.state.eval_due) else { return Ok(true) };
        let progress = |done, total| observe(Event::Evaluating(done, total));
        let found = self.trainer.session().mean_loss(&held_out.samples, self.plan.length, progress)?;
        let Some((loss, tokens)) = found else { return Ok(false) };
        if !loss.is_finite() {
            let (what, layer) = ("the held-out loss", None);
            return Err(self.failed(TrainError::NotFinite { step: self.state.step, what, layer }));
        }
        self.state.eval_due = false;
        self.state.seconds = self.seconds_now();
        let record = EvalRecord { step: self.state.step, loss, perplexity: loss.exp(), tokens, seconds: self.state.seconds };
        self.recorder.record(&Record::Eval(record))?;
        self.records.push(Record::Eval(record));
        if self.state.best_eval.is_none_or(|best| loss < best) {
            (self.state.best_eval, self.state.best_step) = (Some(loss), self.state.step);
            self.state.evals_without_gain = 0;
            if self.keeps_best() {
                self.publish()?;
            }
        } else {
            self.state.evals_without_gain += 1;
        }
        Ok(observe(Event::Eval(&record)))
    }

    /// Writes the present adapter into the folder of the run.
    fn publish(&mut self) -> Result<(), RunError> {
        let [vector, ..] = self.trainer.read()?;
        self.adapter.vector = vector;
        self.adapter.write(&self.out, &[]).map_err(TrainError::from)?;
        Ok(())
    }

    /// Writes a checkpoint and, unless the best adapter is kept there, the adapter of the run, then removes old checkpoints; whether the
    /// run is to go on.
    fn save(&mut self, observe: &mut impl FnMut(Event<'_>) -> bool) -> Result<bool, RunError> {
        if let Some(batch) = &self.last_batch {
            // No checkpoint is one that cannot be gone on from.
            self.trainer.check(batch).map_err(|source| self.failed(source))?;
        }
        let [vector, mean, square] = self.trainer.read()?;
        self.adapter.vector = vector;
        let checkpoint = Checkpoint { adapter: self.adapter.clone(), mean, square, state: self.state.clone() };
        let path = checkpoint.write(&self.out)?;
        if !self.keeps_best() {
            self.adapter.write(&self.out, &[]).map_err(TrainError::from)?;
        }
        Checkpoint::prune(&self.out, self.settings.keep)?;
        let again = self.last_checkpoint.as_ref() == Some(&path);
        self.last_checkpoint = Some(path.clone());
        self.saved = Some(checkpoint.state);
        Ok(again || observe(Event::Saved(&path)))
    }
}

fn new_state(total_steps: u64, now: i64, fingerprint: Fingerprint) -> State {
    State {
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
        evals_without_gain: 0,
        eval_due: false,
        fingerprint,
    }
}

/// The trainer of a new run, its moments at zero.
fn trainer(
    gpu: &Gpu,
    pack: PackSource,
    settings: &Settings,
    adapter: &Adapter,
    plan: &MemoryPlan,
) -> Result<Trainer, TrainError> {
    let (model, memory) = plan.reserve(gpu, pack)?;
    let on_gpu = GpuAdapter::new(gpu, &adapter.config, &adapter.layout, &adapter.vector, true)?;
    let hyperparameters = Hyperparameters {
        weight_decay: settings.weight_decay,
        clip: settings.clip,
        seed: settings.seed,
        ..Hyperparameters::default()
    };
    Trainer::new(model, on_gpu, memory, hyperparameters)
}

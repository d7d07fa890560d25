//! A training from its first step to its last: data, steps, evaluations, checkpoints, records.

mod error;
mod lock;
mod prepare;
mod start;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::arch::config::ModelConfig;
use crate::data::pack::{Batch, batch};
use crate::data::sample::Dataset;
use crate::gpu::Gpu;
use crate::io::leftovers::remove_leftovers;
use crate::lora::adapter::{self, Adapter};
use crate::model::error::ModelError;
use crate::model::plan::MemoryPlan;
use crate::train::best;
use crate::train::checkpoint::{self, Checkpoint, CheckpointError, State};
use crate::train::record::{EvalRecord, Record, Recorder, StepRecord};
use crate::train::schedule::Schedule;
use crate::train::settings::Settings;
use crate::train::trainer::Trainer;
pub use error::{Leftover, RunError};
use lock::RunLock;
pub use prepare::{Prepared, Task};
use prepare::{check_folder, check_results, epoch_rows};
use start::Start;

/// A checkpoint is written after this time at the latest, also within an epoch.
const SAVE_AFTER: Duration = Duration::from_secs(600);

/// Progress of a run.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// A step is done; the number of all steps.
    Step(&'a StepRecord, u64),
    /// Rows of the held-out samples that are evaluated, and all of them.
    Evaluating(u64, u64),
    /// The held-out samples were evaluated.
    Eval(&'a EvalRecord),
    /// A checkpoint was written.
    Saved(&'a Path),
    /// A file cannot be removed or written that the training does not depend on. The run tries
    /// again; it reports the same warning once.
    Warning(&'a RunError),
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// All steps are done.
    Complete,
    /// Too many evaluations in a row were no better than the best one ([`Settings::early_stop`]).
    EarlyStop,
    /// The caller stopped it; it can be resumed.
    Stopped,
}

/// A run, ready for its next step.
#[derive(Debug)]
pub struct Run {
    settings: Settings,
    out: PathBuf,
    /// The training data.
    pub(crate) data: Dataset,
    /// The evaluation data.
    pub(crate) held_out: Option<Dataset>,
    /// Its plan of GPU memory.
    pub plan: MemoryPlan,
    trainer: Trainer,
    adapter: Adapter,
    schedule: Schedule,
    state: State,
    /// Rows of the epoch that [`State::epoch`] is in.
    rows: Vec<Vec<usize>>,
    recorder: Recorder,
    /// Warnings that are not yet reported, and the texts of all warnings so far.
    warnings: Vec<RunError>,
    warned: BTreeSet<String>,
    /// All records, including those before a resumption.
    pub(crate) records: Vec<Record>,
    /// Checkpoints after the one that the run resumed from, by their present names.
    pub set_aside: Vec<PathBuf>,
    last_checkpoint: Option<PathBuf>,
    /// Files of a new run that it has written before its first step, until one of them is trained.
    untrained: Vec<PathBuf>,
    /// The state in that checkpoint, if this process wrote it.
    saved: Option<State>,
    /// When this process wrote it, or started.
    saved_at: Instant,
    /// Seconds of the run before this process, and when this process started.
    clock: (f64, Instant),
    /// A batch of the last step.
    last_batch: Option<Batch>,
    /// Keeps other runs out of the folder. Released last.
    lock: RunLock,
}

impl Run {
    /// The checkpoint that `out` can be resumed from.
    ///
    /// # Errors
    /// [`RunError::NoCheckpoint`], [`RunError::Checkpoint`].
    pub fn latest(out: &Path) -> Result<PathBuf, RunError> {
        Checkpoint::latest(out)?.ok_or_else(|| RunError::NoCheckpoint { out: out.to_owned() })
    }

    /// Checks that a run of `model`, new or resumed, replaces no other results in the folder, and
    /// that no other run trains there. [`Run::start`] checks it again; this is for an early error.
    ///
    /// # Errors
    /// [`RunError::Locked`], [`RunError::Occupied`], [`RunError::Elsewhere`],
    /// [`RunError::Checkpoint`].
    pub fn check_folder(out: &Path, resume: Option<&Path>, model: &ModelConfig) -> Result<(), RunError> {
        check_folder(out, resume, model)
    }

    /// Locks the folder, loads the model and writes the adapter, so that a folder that cannot be
    /// written is an error before the first step. Checkpoints after the one that the run resumes
    /// from are renamed.
    ///
    /// # Errors
    /// See [`RunError`].
    pub fn start(gpu: &Gpu, prepared: Prepared, task: &Task<'_>, plan: MemoryPlan) -> Result<Self, RunError> {
        let lock = RunLock::take(task.out)?;
        remove_leftovers_of_runs(task.out);
        check_results(task.out, prepared.checkpoint.as_ref().map(|(path, _)| path.as_path()), &prepared.model)?;
        let settings = task.settings.clone();
        let total_steps = prepared.total_steps(&settings, plan.micro_batch);
        let fingerprint = prepared.fingerprint(task, &plan, total_steps);
        let Prepared { pack, model, data, held_out, checkpoint, now, .. } = prepared;
        let mut start = match checkpoint {
            Some((path, checkpoint)) => Start::resumed(task, path, checkpoint, total_steps, fingerprint)?,
            None => {
                // The loss before training is the baseline of all later losses.
                let state = State { eval_due: held_out.is_some(), ..State::new(total_steps, now, fingerprint) };
                Start::fresh(task, &model, state)?
            }
        };
        let trainer = start.trainer(gpu, pack, &settings, &plan)?;
        let out = task.out.to_owned();
        let (set_aside, stuck) =
            if start.is_fresh() { Default::default() } else { Checkpoint::set_aside(&out, start.state.step)? };
        let keeps_best = settings.early_stop.is_some() && held_out.is_some();
        let files = task.files.iter().map(|(name, _)| *name).chain([adapter::WEIGHTS, adapter::CONFIG]);
        let untrained = files.filter(|_| start.is_fresh()).map(|name| out.join(name)).collect();
        let lost = start.write_adapter(task, &model, keeps_best)?;
        let unneeded = best::prune(&out, start.state.best_key());
        let (mut recorder, records) = start.records(&out)?;
        let unrecorded = recorder.flush();
        let Start { adapter, state, checkpoint: last_checkpoint, .. } = start;
        let schedule = Schedule::new(settings.schedule, settings.lr, settings.warmup, total_steps);
        let rows = epoch_rows(&data, &settings, plan.length, state.epoch);
        let clock = (state.seconds, Instant::now());
        let mut run = Self {
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
            warnings: Vec::new(),
            warned: BTreeSet::new(),
            records,
            set_aside,
            last_checkpoint,
            untrained,
            saved: None,
            saved_at: Instant::now(),
            clock,
            last_batch: None,
            lock,
        };
        let unlocked = run.lock.warning.take();
        run.warn(unlocked);
        run.warn(lost);
        run.warn(unneeded);
        run.warn(stuck);
        run.warn(unrecorded);
        Ok(run)
    }

    /// Keeps new warnings for the caller; drops repeated ones.
    fn warn<E: Into<RunError>>(&mut self, errors: impl IntoIterator<Item = E>) {
        for error in errors.into_iter().map(Into::into) {
            if self.warned.insert(error.to_string()) {
                self.warnings.push(error);
            }
        }
    }

    /// Reports the warnings; returns whether the run continues.
    fn report_warnings(&mut self, observe: &mut impl FnMut(Event<'_>) -> bool) -> bool {
        let mut continues = true;
        for warning in self.warnings.drain(..) {
            // Every warning is reported, also after `observe` has answered `false`.
            continues &= observe(Event::Warning(&warning));
        }
        continues
    }

    /// Files of the run that lack records because they could not be written: the name of each
    /// file, and the number of records that it lacks.
    pub fn lost_records(&self) -> Vec<(&'static str, u64)> {
        self.recorder.missing()
    }

    /// Runs to the end, or until `observe` answers `false`. At the end the folder has the last
    /// adapter or, with an early stop, the best one. A new run that fails before its first
    /// checkpoint leaves no adapter and no records: [`Run::left_nothing`].
    ///
    /// # Errors
    /// See [`RunError`]; earlier checkpoints remain.
    pub fn train(&mut self, observe: impl FnMut(Event<'_>) -> bool) -> Result<End, RunError> {
        let end = self.train_to_end(observe);
        if end.is_err() && !self.untrained.is_empty() {
            // What cannot be removed may be replaced by another run.
            self.untrained.iter().for_each(|path| drop(std::fs::remove_file(path)));
            drop((self.recorder.remove(), best::prune(&self.out, None)));
        }
        end
    }

    /// Whether a run that failed has nothing in its folder.
    pub fn left_nothing(&self) -> bool {
        !self.untrained.is_empty()
    }

    fn train_to_end(&mut self, mut observe: impl FnMut(Event<'_>) -> bool) -> Result<End, RunError> {
        self.clock = (self.state.seconds, Instant::now());
        let mut continues = self.evaluate(&mut observe)? && self.report_warnings(&mut observe);
        while continues && self.state.step < self.state.total_steps && !self.stops_early() {
            let (record, epoch_ends) = self.step()?;
            let last = self.state.step >= self.state.total_steps;
            continues = observe(Event::Step(&record, self.state.total_steps)) && self.report_warnings(&mut observe);
            self.state.eval_due = self.held_out.is_some() && (last || self.is_due(self.settings.eval_every, epoch_ends));
            // Before the evaluation, so that a failure there does not lose the step.
            let in_time = self.settings.save_every.is_none() && self.saved_at.elapsed() >= SAVE_AFTER;
            if !continues || last || in_time || self.is_due(self.settings.save_every, epoch_ends) {
                continues &= self.save(&mut observe)?;
            }
            if continues {
                continues = self.evaluate(&mut observe)?;
            }
            continues &= self.report_warnings(&mut observe);
        }
        self.end(&mut observe)
    }

    /// Saves the state if it is not saved, and returns why the run ended.
    fn end(&mut self, observe: &mut impl FnMut(Event<'_>) -> bool) -> Result<End, RunError> {
        let end = match self.stops_early() {
            true => End::EarlyStop,
            false if self.state.step >= self.state.total_steps && !self.state.eval_due => End::Complete,
            false => End::Stopped,
        };
        // An evaluation after the last checkpoint also changes the state: a resumed run does not
        // repeat it.
        if self.saved.as_ref() != Some(&self.state) {
            self.save(observe)?;
        }
        let unrecorded = self.recorder.flush();
        self.warn(unrecorded);
        self.report_warnings(observe);
        Ok(end)
    }

    /// Whether the last [`Settings::early_stop`] evaluations were no better than the best one.
    fn stops_early(&self) -> bool {
        self.settings.early_stop.is_some_and(|limit| self.state.evals_without_gain >= limit)
    }

    /// The step whose adapter is in the folder.
    pub fn adapter_step(&self) -> u64 {
        if self.keeps_best() { self.state.best_step } else { self.state.step }
    }

    fn keeps_best(&self) -> bool {
        self.settings.early_stop.is_some() && self.held_out.is_some()
    }

    /// Name or path of the base model, as in the adapter's settings.
    pub fn base(&self) -> Option<&str> {
        self.adapter.base.as_deref()
    }

    /// Steps that are done, and all steps.
    pub fn steps(&self) -> (u64, u64) {
        (self.state.step, self.state.total_steps)
    }

    /// Seconds of training, including those before a resumption.
    pub fn seconds(&self) -> f64 {
        self.state.seconds
    }

    /// Tokens with a loss, in all epochs together.
    pub fn loss_tokens(&self) -> u64 {
        self.state.loss_tokens
    }

    /// Whether the step is a multiple of `every`; without `every`, whether the epoch ends.
    fn is_due(&self, every: Option<u64>, epoch_ends: bool) -> bool {
        every.map_or(epoch_ends, |every| self.state.step.is_multiple_of(every.max(1)))
    }

    fn step(&mut self) -> Result<(StepRecord, bool), RunError> {
        let began = Instant::now();
        let batches = self.next_batches();
        let lr = self.schedule.learning_rate(self.state.step);
        let result = self.trainer.step(&batches, lr).map_err(|source| self.failed(source))?;
        let sum = |of: fn(&Batch) -> u64| batches.iter().map(of).sum::<u64>();
        let (tokens, loss_tokens) = (sum(|batch| batch.tokens.len() as u64), sum(|batch| batch.loss_tokens));
        self.state.step += 1;
        self.state.loss_tokens += loss_tokens;
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
            loss_tokens,
            tokens,
            tokens_per_second: tokens as f64 / began.elapsed().as_secs_f64().max(1e-9),
            gpu_bytes: allocated.map_or(self.plan.total(), |allocated| allocated.reserved),
            seconds: self.state.seconds,
        };
        let unrecorded = self.recorder.record(&Record::Step(record));
        self.warn(unrecorded);
        self.records.push(Record::Step(record));
        self.last_batch = batches.into_iter().next_back();
        Ok((record, self.state.row as usize >= self.rows.len()))
    }

    /// The batches of the next step; the last step of an epoch may have fewer.
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

    fn failed(&self, source: ModelError) -> RunError {
        match source {
            ModelError::NotFinite { .. } => {
                RunError::Diverged { source: Box::new(source), checkpoint: self.last_checkpoint.clone() }
            }
            source => source.into(),
        }
    }

    /// Evaluates if an evaluation is due. Returns whether the run continues; if the caller stops
    /// it, the evaluation remains due.
    fn evaluate(&mut self, observe: &mut impl FnMut(Event<'_>) -> bool) -> Result<bool, RunError> {
        let Some(held_out) = self.held_out.as_ref().filter(|_| self.state.eval_due) else { return Ok(true) };
        let progress = |done, total| observe(Event::Evaluating(done, total));
        let found = self.trainer.session().mean_loss(&held_out.samples, self.plan.length, progress);
        let found = found.map_err(|error| match error {
            ModelError::NotFinite { layer, .. } => {
                self.failed(ModelError::NotFinite { step: Some(self.state.step), what: "the held-out loss", layer })
            }
            error => error.into(),
        })?;
        let Some((loss, tokens)) = found else { return Ok(false) };
        self.state.eval_due = false;
        self.state.seconds = self.seconds_now();
        let record = EvalRecord { step: self.state.step, loss, perplexity: loss.exp(), tokens, seconds: self.state.seconds };
        let unrecorded = self.recorder.record(&Record::Eval(record));
        self.warn(unrecorded);
        self.records.push(Record::Eval(record));
        if self.state.best_eval.is_none_or(|best| loss < best) {
            (self.state.best_eval, self.state.best_step) = (Some(loss), self.state.step);
            self.state.evals_without_gain = 0;
            self.state.best_adapter = if self.keeps_best() { Some(self.publish_best()?) } else { None };
        } else {
            self.state.evals_without_gain += 1;
        }
        Ok(observe(Event::Eval(&record)))
    }

    /// Removes old checkpoints and best adapters that none needs, and renames checkpoints of later
    /// steps that could not be renamed at the start. The next call tries again what fails.
    fn tidy(&mut self) {
        let step = self.state.step;
        self.warn(Checkpoint::prune(&self.out, step, self.settings.keep));
        match Checkpoint::set_aside(&self.out, step) {
            Ok((renamed, stuck)) => {
                self.set_aside.extend(renamed);
                self.warn(stuck);
            }
            Err(error) => self.warn([error]),
        }
        self.warn(best::prune(&self.out, self.state.best_key()));
    }

    /// Writes the present adapter into a folder of its own, then into the folder of the run.
    /// Returns its checksum.
    fn publish_best(&mut self) -> Result<u32, RunError> {
        let [vector, ..] = self.trainer.read()?;
        self.adapter.vector = vector;
        let (_, checksum) = best::write(&self.out, self.state.step, &self.adapter)?;
        if self.state.step > 0 {
            self.untrained.clear();
        }
        self.adapter.write(&self.out, &[]).map_err(ModelError::from)?;
        Ok(checksum)
    }

    /// Writes a checkpoint and, unless the folder keeps the best adapter, the present one, then
    /// removes old checkpoints. Returns whether the run continues.
    fn save(&mut self, observe: &mut impl FnMut(Event<'_>) -> bool) -> Result<bool, RunError> {
        if let Some(batch) = &self.last_batch {
            // A checkpoint with a NaN could not be resumed.
            self.trainer.check(batch).map_err(|source| self.failed(source))?;
        }
        let [vector, exp_avg, exp_avg_sq] = self.trainer.read()?;
        self.adapter.vector = vector;
        let checkpoint = Checkpoint { adapter: self.adapter.clone(), exp_avg, exp_avg_sq, state: self.state.clone() };
        // A checkpoint must not survive a power failure without its records.
        let unsynced = self.recorder.sync();
        self.warn(unsynced);
        let written = checkpoint.write(&self.out);
        // The run can be resumed, or its adapter is trained.
        if written.is_ok() || !self.keeps_best() {
            self.untrained.clear();
        }
        if !self.keeps_best() {
            self.adapter.write(&self.out, &[]).map_err(ModelError::from)?;
        }
        let path = match written {
            Ok(path) => path,
            // An old folder has the name and cannot be renamed. The run continues without this
            // checkpoint; the earlier ones remain.
            Err(error @ CheckpointError::SetAside { .. }) => {
                self.warn([error]);
                self.saved_at = Instant::now();
                return Ok(true);
            }
            Err(error) => return Err(error.into()),
        };
        self.tidy();
        let rewritten = self.last_checkpoint.as_ref() == Some(&path);
        self.last_checkpoint = Some(path.clone());
        (self.saved, self.saved_at) = (Some(checkpoint.state), Instant::now());
        Ok(rewritten || observe(Event::Saved(&path)))
    }
}

/// Removes what dead runs left in the folder of the run, and in the folders that they wrote there.
fn remove_leftovers_of_runs(out: &Path) {
    remove_leftovers(out);
    checkpoint::folders(out).iter().chain(&best::folders(out)).for_each(|folder| remove_leftovers(folder));
}

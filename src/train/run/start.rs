//! The start of a run: a new one, or one from a checkpoint.

use std::path::{Path, PathBuf};

use super::{RunError, Task};
use crate::arch::config::ModelConfig;
use crate::dequant::stream::PackSource;
use crate::gpu::Gpu;
use crate::lora::adapter::Adapter;
use crate::lora::gpu::GpuAdapter;
use crate::model::error::ModelError;
use crate::model::plan::MemoryPlan;
use crate::train::best;
use crate::train::checkpoint::{Checkpoint, CheckpointError, Fingerprint, State, adapter_checksum};
use crate::train::record::{Record, Recorder};
use crate::train::settings::Settings;
use crate::train::trainer::{Hyperparameters, Trainer};

/// What a run starts with.
pub(super) struct Start {
    pub adapter: Adapter,
    pub state: State,
    /// The checkpoint that it resumes from.
    pub checkpoint: Option<PathBuf>,
    /// The moments of that checkpoint.
    moments: Option<[Vec<f32>; 2]>,
}

impl Start {
    /// A new adapter, which changes nothing yet.
    pub fn fresh(task: &Task<'_>, model: &ModelConfig, state: State) -> Result<Self, RunError> {
        let (lora, base) = (task.settings.lora(), task.base.map(str::to_owned));
        let adapter = Adapter::new(lora, base, model, task.settings.seed).map_err(ModelError::from)?;
        Ok(Self { adapter, state, checkpoint: None, moments: None })
    }

    /// A checkpoint of the same run.
    pub fn resumed(
        task: &Task<'_>,
        path: PathBuf,
        checkpoint: Checkpoint,
        total_steps: u64,
        fingerprint: Fingerprint,
    ) -> Result<Self, RunError> {
        let differs = |source| RunError::OtherRun { checkpoint: path.clone(), source };
        checkpoint.state.fingerprint.check(&fingerprint).map_err(differs)?;
        let Checkpoint { mut adapter, exp_avg, exp_avg_sq, state } = checkpoint;
        adapter.base = task.base.map(str::to_owned).or(adapter.base);
        let state = State { total_steps, fingerprint, ..state };
        Ok(Self { adapter, state, checkpoint: Some(path), moments: Some([exp_avg, exp_avg_sq]) })
    }

    pub fn is_fresh(&self) -> bool {
        self.checkpoint.is_none()
    }

    /// The trainer, with the moments of the checkpoint.
    pub fn trainer(
        &self,
        gpu: &Gpu,
        pack: PackSource,
        settings: &Settings,
        plan: &MemoryPlan,
    ) -> Result<Trainer, ModelError> {
        let (model, memory) = plan.reserve(gpu, pack)?;
        let Adapter { config, layout, vector, .. } = &self.adapter;
        let on_gpu = GpuAdapter::new(gpu, config, layout, vector, true)?;
        let &Settings { weight_decay, clip, seed, .. } = settings;
        let hyperparameters = Hyperparameters { weight_decay, clip, seed, ..Hyperparameters::default() };
        let mut trainer = Trainer::new(model, on_gpu, memory, hyperparameters)?;
        if let Some([exp_avg, exp_avg_sq]) = &self.moments {
            trainer.restore(exp_avg, exp_avg_sq, self.state.step, self.state.micro_batches)?;
        }
        Ok(trainer)
    }

    /// Writes the adapter into the folder of the run before the first step. With an early stop that
    /// is the best adapter so far. If it cannot be found, the search for the best one starts again,
    /// and a warning is returned.
    pub fn write_adapter(
        &mut self,
        task: &Task<'_>,
        model: &ModelConfig,
        keeps_best: bool,
    ) -> Result<Option<RunError>, RunError> {
        let (best, warning) = match self.state.best_key().filter(|_| keeps_best) {
            Some(key) => match best_adapter(task.out, key, model) {
                Ok(best) => (Some(best), None),
                Err(source) => (None, Some(RunError::BestLost { source })),
            },
            None => (None, None),
        };
        if keeps_best && best.is_none() {
            self.state.forget_best();
        }
        let best = best.map(|best| Adapter { base: self.adapter.base.clone(), ..best });
        let adapter = best.as_ref().unwrap_or(&self.adapter);
        adapter.write(task.out, task.files).map_err(ModelError::from)?;
        Ok(warning)
    }

    /// The recorder of the run, and the records so far.
    pub fn records(&self, out: &Path) -> Result<(Recorder, Vec<Record>), RunError> {
        match self.checkpoint {
            Some(_) => Ok(Recorder::resume(out, self.state.step, self.state.eval_due)?),
            None => Ok((Recorder::create(out), Vec::new())),
        }
    }
}

/// The best adapter so far: from its own folder, or else from the folder of the run.
fn best_adapter(out: &Path, key: best::Key, model: &ModelConfig) -> Result<Adapter, CheckpointError> {
    best::read(out, key, model).or_else(|lost| {
        let is_best = |adapter: &Adapter| adapter_checksum(adapter) == key.1;
        let adapter = Adapter::read(out, model).ok().filter(is_best).ok_or(lost)?;
        best::write(out, key.0, &adapter)?;
        Ok(adapter)
    })
}

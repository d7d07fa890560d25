//! The training step.

use super::data::Batch;
use super::error::TrainError;
use super::gpu_adapter::{GpuAdapter, Mask};
use super::model::Model;
use super::ops::{AdamW, AdamWState, AdamWStep, Mat};
use super::session::Session;
use super::workspace::Memory;

/// What does not change from step to step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hyperparameters {
    /// Decay of AdamW's first and of its second moment.
    pub betas: [f64; 2],
    /// What AdamW adds to the root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Gradients of a larger norm are scaled down to it.
    pub clip: Option<f64>,
    /// Of the dropped inputs.
    pub seed: u64,
}

impl Default for Hyperparameters {
    fn default() -> Self {
        Self { betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.0, clip: None, seed: 0 }
    }
}

/// What came of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepResult {
    /// Mean loss over the trained tokens, before the step.
    pub loss: f32,
    /// Norm of the gradient, before it was clipped.
    pub grad_norm: f32,
    /// What the gradient was multiplied by.
    pub clip: f32,
}

/// A part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Embedding and layers.
    Forward,
    /// Head, loss, and their gradient.
    Loss,
    /// Layers, recomputed and backward.
    Backward,
    /// AdamW.
    Optimizer,
}

/// Hears which phase of a step was submitted.
type Observer<'a> = &'a mut dyn FnMut(Phase) -> Result<(), TrainError>;

/// An adapter in training.
#[derive(Debug)]
pub struct Trainer {
    session: Session,
    optimizer: AdamW,
    state: AdamWState,
    hyperparameters: Hyperparameters,
    /// Steps that are done.
    steps: u64,
    /// Micro-batches that are done.
    micro_batches: u64,
}

impl Trainer {
    /// Puts `adapter`, which must have room for its gradient, on `model`; moments start at zero.
    ///
    /// # Errors
    /// [`TrainError::Shape`] where the adapter or the memory has no room for gradients; [`TrainError::Gpu`].
    pub fn new(
        model: Model,
        adapter: GpuAdapter,
        memory: Memory,
        hyperparameters: Hyperparameters,
    ) -> Result<Self, TrainError> {
        let (expected, found, what) = (1, 0, "the room for gradients");
        let no_room = || TrainError::Shape { operation: "training", what, expected, found };
        let gradient = adapter.gradient.clone().filter(|_| memory.sizes().training).ok_or_else(no_room)?;
        let gpu = model.gpu();
        let count = gradient.cols;
        let optimizer = AdamW::new(gpu, count)?;
        // New buffers are zero.
        let (mean, square) = (Mat::new(gpu, "first moments", 1, count)?, Mat::new(gpu, "second moments", 1, count)?);
        let state = AdamWState { parameters: adapter.parameters.clone(), gradient, mean, square };
        let session = Session { model, adapter: Some(adapter), memory };
        Ok(Self { session, optimizer, state, hyperparameters, steps: 0, micro_batches: 0 })
    }

    /// A step: the gradient of the mean loss over all trained tokens of `batches`, one batch after the other, then AdamW. Where the loss
    /// or the gradient is not finite, the parameters stay as they are.
    ///
    /// # Errors
    /// [`TrainError::NotFinite`] with the layer; what went wrong on the device.
    pub fn step(&mut self, batches: &[Batch], learning_rate: f64) -> Result<StepResult, TrainError> {
        self.observed_step(batches, learning_rate, &mut |_| Ok(()))
    }

    /// As [`Trainer::step`]; `observe` is called after each phase was submitted (for each micro-batch), to take times.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn observed_step(
        &mut self,
        batches: &[Batch],
        learning_rate: f64,
        observe: Observer<'_>,
    ) -> Result<StepResult, TrainError> {
        let trained = batches.iter().map(|batch| batch.trained).sum();
        self.clear()?;
        for batch in batches {
            self.accumulate(batch, trained, observe)?;
        }
        self.update(learning_rate)?;
        observe(Phase::Optimizer)?;
        let result = self.result()?;
        if !result.loss.is_finite() || !result.grad_norm.is_finite() {
            return Err(self.explain(batches, result));
        }
        self.steps += 1;
        Ok(result)
    }

    fn clear(&self) -> Result<(), TrainError> {
        let mut commands = self.session.model.gpu().commands("clear");
        commands.clear(&self.state.gradient.range);
        commands.clear(&self.session.memory.workspace(self.session.model.config(), 0)?.loss.range);
        commands.submit()?;
        Ok(())
    }

    /// Adds the gradient of a micro-batch.
    fn accumulate(&mut self, batch: &Batch, trained: u64, observe: Observer<'_>) -> Result<(), TrainError> {
        let Session { model, adapter, memory } = &mut self.session;
        let mask = Some(Mask { seed: self.hyperparameters.seed, micro_batch: self.micro_batches });
        let (work, batch) = model.begin(memory, batch)?;
        model.forward(&work, &batch, adapter.as_ref(), mask)?;
        observe(Phase::Forward)?;
        model.loss(&work, &batch, trained)?;
        if let (Some(gradients), Some(adapter)) = (&work.backward, adapter) {
            model.loss_gradient(&work, gradients, &batch, trained)?;
            observe(Phase::Loss)?;
            model.backward(&work, &batch, adapter, mask)?;
            observe(Phase::Backward)?;
        }
        self.micro_batches += 1;
        Ok(())
    }

    fn update(&self, learning_rate: f64) -> Result<(), TrainError> {
        let Hyperparameters { betas, epsilon, weight_decay, clip, .. } = self.hyperparameters;
        let step = AdamWStep { step: self.steps + 1, learning_rate, betas, epsilon, weight_decay, clip };
        let mut commands = self.session.model.gpu().commands("optimizer");
        self.optimizer.record(&mut commands, &self.state, &step)?;
        commands.submit()?;
        Ok(())
    }

    /// All that comes back from the device.
    fn result(&self) -> Result<StepResult, TrainError> {
        let Session { model, memory, .. } = &self.session;
        let report = self.optimizer.read_report()?;
        let loss = memory.workspace(model.config(), 0)?.loss.read(model.gpu())?;
        let loss = loss.first().copied().unwrap_or(f32::NAN);
        Ok(StepResult { loss, grad_norm: report.norm, clip: report.clip })
    }

    /// Runs the batches forward once more, to say where the first number arose that is not finite.
    fn explain(&mut self, batches: &[Batch], result: StepResult) -> TrainError {
        let what = if result.loss.is_finite() { "the norm of the gradient" } else { "the loss" };
        let first = self.micro_batches.saturating_sub(batches.len() as u64);
        for (batch, micro_batch) in batches.iter().zip(first..) {
            let mask = Some(Mask { seed: self.hyperparameters.seed, micro_batch });
            match self.session.first_non_finite(batch, mask) {
                Ok(None) => {}
                Ok(layer) => return TrainError::NotFinite { step: self.steps + 1, what, layer },
                Err(error) => return error,
            }
        }
        TrainError::NotFinite { step: self.steps + 1, what, layer: None }
    }

    /// Looks whether the parameters still give a finite loss: a step is judged by the loss before it.
    ///
    /// # Errors
    /// [`TrainError::NotFinite`] with the layer; what went wrong on the device.
    pub fn check(&mut self, batch: &Batch) -> Result<(), TrainError> {
        if self.session.loss(batch)?.is_finite() {
            return Ok(());
        }
        let layer = self.session.first_non_finite(batch, None)?;
        Err(TrainError::NotFinite { step: self.steps, what: "the loss after the step", layer })
    }

    /// The model with its adapter, to evaluate.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Steps that are done, and micro-batches.
    pub fn counts(&self) -> (u64, u64) {
        (self.steps, self.micro_batches)
    }

    /// The gradient of the last step, before clipping, in the adapter's layout.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn gradient(&self) -> Result<Vec<f32>, TrainError> {
        Ok(self.state.gradient.read(self.session.model.gpu())?)
    }

    /// Parameters, first and second moments, in the adapter's layout.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn read(&self) -> Result<[Vec<f32>; 3], TrainError> {
        let AdamWState { parameters, mean, square, .. } = &self.state;
        let gpu = self.session.model.gpu();
        Ok([parameters.read(gpu)?, mean.read(gpu)?, square.read(gpu)?])
    }

    /// Goes on where another trainer stopped: its moments, steps and micro-batches. Its parameters are those of the adapter given to
    /// [`Trainer::new`].
    ///
    /// # Errors
    /// [`TrainError::Shape`], [`TrainError::Gpu`].
    pub fn restore(&mut self, mean: &[f32], square: &[f32], steps: u64, micro_batches: u64) -> Result<(), TrainError> {
        let gpu = self.session.model.gpu();
        let count = self.state.gradient.cols;
        self.state.mean = Mat::from_slice(gpu, "first moments", 1, count, mean)?;
        self.state.square = Mat::from_slice(gpu, "second moments", 1, count, square)?;
        (self.steps, self.micro_batches) = (steps, micro_batches);
        Ok(())
    }
}

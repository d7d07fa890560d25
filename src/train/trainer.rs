//! An adapter in training, and its optimiser.

use crate::data::pack::Batch;
use crate::lora::gpu::GpuAdapter;
use crate::model::decoder::Model;
use crate::model::error::ModelError;
use crate::model::session::Session;
use crate::model::workspace::Memory;
use crate::ops::{AdamW, AdamWState, Mat, OpError};

/// The constants of all steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hyperparameters {
    /// AdamW's decay rates of the first and second moment.
    pub betas: [f64; 2],
    /// AdamW's epsilon: added to the square root of the second moment.
    pub epsilon: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// The maximum norm of the gradient; a larger one is scaled down to it.
    pub clip: Option<f64>,
    /// Seed of dropout.
    pub seed: u64,
}

impl Default for Hyperparameters {
    fn default() -> Self {
        Self { betas: [0.9, 0.999], epsilon: 1e-8, weight_decay: 0.0, clip: None, seed: 0 }
    }
}

/// An adapter in training.
#[derive(Debug)]
pub struct Trainer {
    pub(super) session: Session,
    pub(super) optimizer: AdamW,
    pub(super) state: AdamWState,
    pub(super) hyperparameters: Hyperparameters,
    /// Steps so far.
    pub(super) steps: u64,
    /// Micro-batches so far.
    pub(super) micro_batches: u64,
}

impl Trainer {
    /// A trainer of `adapter`, which must have a buffer for its gradient. Moments start at zero.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the adapter or the memory has no buffers for gradients;
    /// [`OpError::Gpu`].
    pub fn new(
        model: Model,
        adapter: GpuAdapter,
        memory: Memory,
        hyperparameters: Hyperparameters,
    ) -> Result<Self, ModelError> {
        let (expected, found, what) = (1, 0, "the buffers for gradients");
        let no_buffers = || OpError::Shape { operation: "training", what, expected, found };
        let gradient = adapter.gradient.clone().filter(|_| memory.sizes().training).ok_or_else(no_buffers)?;
        let gpu = model.gpu();
        let count = gradient.cols;
        let optimizer = AdamW::new(gpu, count)?;
        let loss = memory.workspace(model.config(), 0)?.loss;
        let (exp_avg, exp_avg_sq) = (Mat::new(gpu, "first moments", 1, count)?, Mat::new(gpu, "second moments", 1, count)?);
        let state = AdamWState { parameters: adapter.parameters.clone(), gradient, loss, exp_avg, exp_avg_sq };
        let session = Session { model, adapter: Some(adapter), memory };
        Ok(Self { session, optimizer, state, hyperparameters, steps: 0, micro_batches: 0 })
    }

    /// Checks that the loss is finite with the present parameters. [`Trainer::step`] only sees the
    /// loss before it changes them.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`] with the layer, [`ModelError::Op`], [`ModelError::Stream`].
    pub fn check(&mut self, batch: &Batch) -> Result<(), ModelError> {
        if self.session.loss(batch)?.is_finite() {
            return Ok(());
        }
        let layer = self.session.first_non_finite(batch, None)?;
        Err(ModelError::NotFinite { step: Some(self.steps), what: "the loss after the step", layer })
    }

    /// The model with its adapter, to evaluate.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// The model with its adapter, after training.
    #[cfg(test)]
    pub fn into_session(self) -> Session {
        self.session
    }

    /// Steps and micro-batches so far.
    pub fn counts(&self) -> (u64, u64) {
        (self.steps, self.micro_batches)
    }

    /// The gradient of the last step, before clipping, in the adapter's layout.
    ///
    /// # Errors
    /// [`ModelError::Op`].
    pub fn gradient(&self) -> Result<Vec<f32>, ModelError> {
        Ok(self.state.gradient.read(self.session.model.gpu())?)
    }

    /// Parameters, first and second moments, in the adapter's layout.
    ///
    /// # Errors
    /// [`ModelError::Op`].
    pub fn read(&self) -> Result<[Vec<f32>; 3], ModelError> {
        let AdamWState { parameters, exp_avg, exp_avg_sq, .. } = &self.state;
        let gpu = self.session.model.gpu();
        Ok([parameters.read(gpu)?, exp_avg.read(gpu)?, exp_avg_sq.read(gpu)?])
    }

    /// Continues another trainer: takes its moments, steps and micro-batches. The parameters are
    /// those of the adapter given to [`Trainer::new`].
    ///
    /// # Errors
    /// [`OpError::Shape`], [`OpError::Gpu`].
    pub fn restore(
        &mut self,
        exp_avg: &[f32],
        exp_avg_sq: &[f32],
        steps: u64,
        micro_batches: u64,
    ) -> Result<(), ModelError> {
        let gpu = self.session.model.gpu();
        let count = self.state.gradient.cols;
        self.state.exp_avg = Mat::from_slice(gpu, "first moments", 1, count, exp_avg)?;
        self.state.exp_avg_sq = Mat::from_slice(gpu, "second moments", 1, count, exp_avg_sq)?;
        (self.steps, self.micro_batches) = (steps, micro_batches);
        Ok(())
    }
}

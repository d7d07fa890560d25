//! An adapter in training, and its optimiser.

use std::ops::Range;

use crate::data::Batch;
use crate::lora::gpu::{GpuAdapter, Mask};
use crate::model::decoder::Model;
use crate::model::error::{ModelError, NonFiniteAt};
use crate::model::session::Session;
use crate::model::workspace::Memory;
use crate::ops::{AdamW, AdamWState, Mat, OpError};
use crate::train::step::StepResult;

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

/// An adapter in training.
#[derive(Debug)]
pub struct Trainer {
    pub(super) session: Session,
    pub(super) optimizer: AdamW,
    pub(super) state: AdamWState,
    pub(super) hyperparameters: Hyperparameters,
    /// Steps that are done.
    pub(super) steps: u64,
    /// Micro-batches that are done.
    pub(super) micro_batches: u64,
}

impl Trainer {
    /// Puts `adapter`, which must have room for its gradient, on `model`; moments start at zero.
    ///
    /// # Errors
    /// [`OpError::Shape`] where the adapter or the memory has no room for gradients;
    /// [`OpError::Gpu`].
    pub fn new(
        model: Model,
        adapter: GpuAdapter,
        memory: Memory,
        hyperparameters: Hyperparameters,
    ) -> Result<Self, ModelError> {
        let (expected, found, what) = (1, 0, "the room for gradients");
        let no_room = || OpError::Shape { operation: "training", what, expected, found };
        let gradient = adapter.gradient.clone().filter(|_| memory.sizes().training).ok_or_else(no_room)?;
        let gpu = model.gpu();
        let count = gradient.cols;
        let optimizer = AdamW::new(gpu, count)?;
        let loss = memory.workspace(model.config(), 0)?.loss;
        let (exp_avg, exp_avg_sq) = (Mat::new(gpu, "first moments", 1, count)?, Mat::new(gpu, "second moments", 1, count)?);
        let state = AdamWState { parameters: adapter.parameters.clone(), gradient, loss, exp_avg, exp_avg_sq };
        let session = Session { model, adapter: Some(adapter), memory };
        Ok(Self { session, optimizer, state, hyperparameters, steps: 0, micro_batches: 0 })
    }

    /// Runs the batches forward once more, to say where the first number arose that is not finite.
    pub(super) fn explain(&mut self, batches: &[Batch], result: StepResult) -> ModelError {
        let (step, what) =
            (Some(self.steps + 1), if result.loss.is_finite() { "the norm of the gradient" } else { "the loss" });
        let first = self.micro_batches.saturating_sub(batches.len() as u64);
        for (batch, micro_batch) in batches.iter().zip(first..) {
            let mask = Some(Mask { seed: self.hyperparameters.seed, micro_batch });
            match self.session.first_non_finite(batch, mask) {
                Ok(None) => {}
                Ok(layer) => return ModelError::NotFinite { step, what, layer },
                Err(error) => return error,
            }
        }
        match self.non_finite_gradient() {
            Ok(layer) => ModelError::NotFinite { step, what, layer },
            Err(error) => error,
        }
    }

    /// The last layer whose gradient is not finite: the first one on the way back.
    fn non_finite_gradient(&self) -> Result<Option<NonFiniteAt>, ModelError> {
        let gradient = self.gradient()?;
        let finite = |range| gradient.get::<Range<usize>>(range).unwrap_or_default().iter().all(|x| x.is_finite());
        let places = self.session.adapter.iter().flat_map(|adapter| adapter.layout.places());
        let layers = places.filter(|(_, _, place)| !finite(place.a.clone()) || !finite(place.b.clone()));
        Ok(layers.map(|(layer, ..)| NonFiniteAt::Gradient(layer)).last())
    }

    /// Looks whether the parameters still give a finite loss: a step is judged by the loss before
    /// it.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`] with the layer; what went wrong on the device.
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

    /// The model with its adapter, when there is nothing more to learn.
    pub fn into_session(self) -> Session {
        self.session
    }

    /// Steps that are done, and micro-batches.
    pub fn counts(&self) -> (u64, u64) {
        (self.steps, self.micro_batches)
    }

    /// The gradient of the last step, before clipping, in the adapter's layout.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn gradient(&self) -> Result<Vec<f32>, ModelError> {
        Ok(self.state.gradient.read(self.session.model.gpu())?)
    }

    /// Parameters, first and second moments, in the adapter's layout.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn read(&self) -> Result<[Vec<f32>; 3], ModelError> {
        let AdamWState { parameters, exp_avg, exp_avg_sq, .. } = &self.state;
        let gpu = self.session.model.gpu();
        Ok([parameters.read(gpu)?, exp_avg.read(gpu)?, exp_avg_sq.read(gpu)?])
    }

    /// Goes on where another trainer stopped: its moments, steps and micro-batches. Its parameters
    /// are those of the adapter given to [`Trainer::new`].
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

//! The training step.

use std::ops::Range;

use crate::data::pack::Batch;
use crate::lora::gpu::Mask;
use crate::model::error::{ModelError, NonFiniteAt};
use crate::model::session::Session;
use crate::ops::AdamWStep;
use crate::train::trainer::{Hyperparameters, Trainer};

impl Trainer {
    /// A step: the gradient of the mean loss over all loss tokens of `batches`, one batch after the
    /// other, then AdamW. If the loss or the gradient is not finite, the parameters do not change.
    ///
    /// # Errors
    /// [`ModelError::NotFinite`] with the layer, [`ModelError::Op`], [`ModelError::Stream`].
    pub fn step(&mut self, batches: &[Batch], learning_rate: f64) -> Result<StepResult, ModelError> {
        self.observed_step(batches, learning_rate, &mut |_| Ok(()))
    }

    /// As [`Trainer::step`]; `observe` is called after each phase of each micro-batch was
    /// submitted, to measure times.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn observed_step(
        &mut self,
        batches: &[Batch],
        learning_rate: f64,
        observe: Observer<'_>,
    ) -> Result<StepResult, ModelError> {
        let loss_tokens = batches.iter().map(|batch| batch.loss_tokens).sum();
        self.clear()?;
        for batch in batches {
            self.accumulate(batch, loss_tokens, observe)?;
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

    fn clear(&self) -> Result<(), ModelError> {
        let mut commands = self.session.model.gpu().commands("clear");
        commands.clear(&self.state.gradient.range);
        commands.clear(&self.state.loss.range);
        commands.submit()?;
        Ok(())
    }

    /// Adds the gradient of a micro-batch.
    fn accumulate(&mut self, batch: &Batch, loss_tokens: u64, observe: Observer<'_>) -> Result<(), ModelError> {
        let Session { model, adapter, memory } = &mut self.session;
        let mask = Some(Mask { seed: self.hyperparameters.seed, micro_batch: self.micro_batches });
        let inputs = model.begin(memory, batch, adapter.as_ref())?.masked(mask);
        model.forward(&inputs)?;
        observe(Phase::Forward)?;
        let gradients = inputs.work.backward.as_ref().filter(|_| inputs.adapter.is_some());
        model.loss(&inputs, gradients, loss_tokens)?;
        if gradients.is_some() {
            observe(Phase::Loss)?;
            model.backward(&inputs)?;
            observe(Phase::Backward)?;
        }
        self.micro_batches += 1;
        Ok(())
    }

    fn update(&self, learning_rate: f64) -> Result<(), ModelError> {
        let Hyperparameters { betas, epsilon, weight_decay, clip, .. } = self.hyperparameters;
        let step = AdamWStep { step: self.steps + 1, learning_rate, betas, epsilon, weight_decay, clip };
        let mut commands = self.session.model.gpu().commands("optimizer");
        self.optimizer.record(&mut commands, &self.state, &step)?;
        commands.submit()?;
        Ok(())
    }

    /// Reads the results from the device.
    fn result(&self) -> Result<StepResult, ModelError> {
        let report = self.optimizer.read_report()?;
        let loss = self.state.loss.read(self.session.model.gpu())?;
        let loss = loss.first().copied().unwrap_or(f32::NAN);
        Ok(StepResult { loss, grad_norm: report.norm, clip: report.clip })
    }

    /// Runs the batches forward again to find the layer of the first number that is not finite.
    fn explain(&mut self, batches: &[Batch], result: StepResult) -> ModelError {
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

    /// The last layer whose gradient is not finite: the backward pass reaches it first.
    fn non_finite_gradient(&self) -> Result<Option<NonFiniteAt>, ModelError> {
        let gradient = self.gradient()?;
        let finite = |range| gradient.get::<Range<usize>>(range).unwrap_or_default().iter().all(|x| x.is_finite());
        let places = self.session.adapter.iter().flat_map(|adapter| adapter.layout.places());
        let layers = places.filter(|(_, _, place)| !finite(place.a.clone()) || !finite(place.b.clone()));
        Ok(layers.map(|(layer, ..)| NonFiniteAt::Gradient(layer)).last())
    }
}

/// The result of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepResult {
    /// Mean loss over the loss tokens, before the step.
    pub loss: f32,
    /// Norm of the gradient before clipping.
    pub grad_norm: f32,
    /// The factor by which clipping multiplied the gradient.
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

/// Called with each phase that was submitted.
type Observer<'a> = &'a mut dyn FnMut(Phase) -> Result<(), ModelError>;

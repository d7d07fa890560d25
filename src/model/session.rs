//! A model, an adapter and the memory to run them on batches.

use crate::arch::config::ModelConfig;
use crate::data::pack::{Batch, IGNORE_INDEX, batch, rows};
use crate::data::sample::Sample;
use crate::gpu::{BufferRange, Commands};
use crate::lora::gpu::{GpuAdapter, Mask};
use crate::model::decoder::Model;
use crate::model::error::{ModelError, NonFiniteAt};
use crate::model::kv_cache::Past;
use crate::model::workspace::Memory;
use crate::ops::Mat;

/// Passes of more new tokens are submitted layer by layer: drivers end a submission that takes
/// seconds, and a wait for the passes in flight must be short when a user interrupts a prompt.
const MAX_TOGETHER: usize = 64;

/// A model, its adapter and its memory.
#[derive(Debug)]
pub struct Session {
    /// The model.
    pub(crate) model: Model,
    /// An adapter of this model.
    pub(crate) adapter: Option<GpuAdapter>,
    /// The memory of passes. It limits the tokens of a batch.
    pub(crate) memory: Memory,
}

impl Session {
    /// The configuration of the model.
    pub fn config(&self) -> &ModelConfig {
        self.model.config()
    }

    /// The mean loss over the loss tokens of a batch: negative log-likelihood, in nats per token.
    ///
    /// # Errors
    /// [`OpError::Value`](crate::ops::OpError::Value) if the batch has no loss token; any device
    /// error.
    pub(crate) fn loss(&mut self, batch: &Batch) -> Result<f32, ModelError> {
        let inputs = self.model.begin(&self.memory, batch, self.adapter.as_ref())?;
        let mut commands = self.model.gpu().commands("loss");
        commands.clear(&inputs.work.loss.range);
        commands.submit()?;
        self.model.forward(&inputs)?;
        self.model.loss(&inputs, None, batch.loss_tokens)?;
        let loss = inputs.work.loss.read(self.model.gpu())?;
        Ok(loss.first().copied().unwrap_or(f32::NAN))
    }

    /// The first layer whose output of a batch is not finite.
    pub(crate) fn first_non_finite(&mut self, batch: &Batch, mask: Option<Mask>) -> Result<Option<NonFiniteAt>, ModelError> {
        let inputs = self.model.begin(&self.memory, batch, self.adapter.as_ref())?.masked(mask);
        self.model.first_non_finite(&inputs)
    }

    /// The mean loss over the loss tokens of all samples, and the number of these tokens. Samples
    /// are packed into rows of `length` tokens. A pass has the maximum rows that the memory
    /// permits. `progress` gets the finished rows and all rows; if it returns `false`, the result
    /// is `None`.
    ///
    /// # Errors
    /// As [`Session::loss`]; [`ModelError::NotFinite`].
    pub(crate) fn mean_loss(
        &mut self,
        samples: &[Sample],
        length: u32,
        mut progress: impl FnMut(u64, u64) -> bool,
    ) -> Result<Option<(f64, u64)>, ModelError> {
        let order: Vec<usize> = (0..samples.len()).collect();
        let rows = rows(samples, &order, length);
        let at_a_time = (self.memory.sizes().tokens / length.max(1)).max(1) as usize;
        let (mut sum, mut tokens, mut done) = (0.0, 0, 0);
        for some in rows.chunks(at_a_time) {
            let batch = batch(samples, some);
            let loss = self.loss(&batch)?;
            if !loss.is_finite() {
                let layer = self.first_non_finite(&batch, None)?;
                return Err(ModelError::NotFinite { step: None, what: "the loss", layer });
            }
            sum += f64::from(loss) * batch.loss_tokens as f64;
            tokens += batch.loss_tokens;
            done += some.len() as u64;
            if !progress(done, rows.len() as u64) {
                return Ok(None);
            }
        }
        Ok(Some((sum / tokens.max(1) as f64, tokens)))
    }

    /// The logits of every token of one sample, [tokens, vocabulary], row-major.
    ///
    /// # Errors
    /// Any device error.
    pub fn logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, ModelError> {
        let inputs = self.model.begin(&self.memory, &sample(tokens), self.adapter.as_ref())?;
        self.model.forward(&inputs)?;
        self.model.logits(&inputs.work)
    }

    /// Records a pass over new tokens of a text, which follow the cached tokens of `past`. Their
    /// keys and values are added to the cache. `length` is the number of known tokens of the text,
    /// including tokens after the new ones: dynamic scaling rotates all of a prompt by the length
    /// of the prompt. With `logits` [1, vocabulary], the pass ends with the logits of the last
    /// token. Returns the end of the pass: all of it, if all layers are resident and the new tokens
    /// are few.
    ///
    /// # Errors
    /// [`OpError::Shape`](crate::ops::OpError::Shape) if the cache or the memory is too small; any
    /// device error.
    pub(crate) fn extend(
        &mut self,
        tokens: NewTokens<'_>,
        past: Past<'_>,
        length: u32,
        logits: Option<&Mat>,
    ) -> Result<Commands, ModelError> {
        let Self { model, adapter, memory } = self;
        let inputs = match tokens {
            NewTokens::Known(tokens) => model.begin_after(memory, &sample(tokens), past, length, adapter.as_ref())?,
            NewTokens::Chosen(id) => model.begin_token(memory, id, past, length, adapter.as_ref())?,
        };
        let together = tokens.count() <= MAX_TOGETHER;
        let mut commands = model.record_forward(&inputs, together, &|_, _, _| Ok(()))?;
        if let Some(logits) = logits {
            let last = memory.workspace(model.config(), 1)?;
            model.record_last_logits(&mut commands, &inputs.work, &last, logits)?;
        }
        Ok(commands)
    }

    /// The error of a pass of [`Session::extend`] with logits that are not finite. It runs the pass
    /// again to name the layer.
    pub(crate) fn not_finite(&mut self, tokens: &[u32], past: Past<'_>, length: u32) -> ModelError {
        let inputs = self.model.begin_after(&self.memory, &sample(tokens), past, length, self.adapter.as_ref());
        match inputs.and_then(|inputs| self.model.first_non_finite(&inputs)) {
            Ok(layer) => ModelError::NotFinite { step: None, what: "a score of the next token", layer },
            Err(error) => error,
        }
    }

    /// The residual streams of one sample before each layer and after the last layer, [tokens,
    /// hidden] each. Only memory for training keeps all of them.
    ///
    /// # Errors
    /// Any device error.
    pub fn hidden_states(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, ModelError> {
        let inputs = self.model.begin(&self.memory, &sample(tokens), self.adapter.as_ref())?;
        self.model.forward(&inputs)?;
        inputs.work.residual.iter().map(|x| Ok(x.read(self.model.gpu())?)).collect()
    }
}

/// New tokens of a text, at least one.
#[derive(Debug, Clone, Copy)]
pub(crate) enum NewTokens<'a> {
    /// Tokens that the host knows.
    Known(&'a [u32]),
    /// One token, whose id the device has chosen.
    Chosen(&'a BufferRange),
}

impl NewTokens<'_> {
    pub fn count(self) -> usize {
        match self {
            Self::Known(tokens) => tokens.len(),
            Self::Chosen(_) => 1,
        }
    }
}

/// A batch of one sample without loss tokens.
fn sample(tokens: &[u32]) -> Batch {
    let length = tokens.len();
    let (labels, starts) = (vec![IGNORE_INDEX; length], vec![0; length]);
    Batch { rows: 1, tokens: tokens.to_vec(), labels, starts, loss_tokens: 0 }
}

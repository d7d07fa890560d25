//! What is recorded: steps and evaluations.

use serde::{Deserialize, Deserializer, Serialize};

/// One optimiser step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// The number of the step, from 1 on.
    pub step: u64,
    /// Passes over the data so far.
    #[serde(deserialize_with = "nan_or_f64")]
    pub epoch: f64,
    /// Mean cross-entropy over the loss tokens of the step, in nats.
    #[serde(deserialize_with = "nan_or_f32")]
    pub loss: f32,
    /// Learning rate.
    #[serde(deserialize_with = "nan_or_f64")]
    pub lr: f64,
    /// Norm of the gradient of all adapters, before clipping.
    #[serde(deserialize_with = "nan_or_f32")]
    pub grad_norm: f32,
    /// The norm that gradients are clipped to; 0 for none.
    #[serde(deserialize_with = "nan_or_f32")]
    pub clip: f32,
    /// Tokens of the step with a loss.
    #[serde(rename = "trained_tokens")]
    pub loss_tokens: u64,
    /// All tokens of the step.
    pub tokens: u64,
    /// All tokens of the step over its seconds.
    #[serde(deserialize_with = "nan_or_f64")]
    pub tokens_per_second: f64,
    /// Bytes of GPU memory that the run takes: allocated, or planned if the backend does not report
    /// them.
    pub gpu_bytes: u64,
    /// Seconds of training, including those before a resumption.
    #[serde(deserialize_with = "nan_or_f64")]
    pub seconds: f64,
}

/// One evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Steps before it; 0 for the untrained adapter.
    pub step: u64,
    /// Mean cross-entropy over the tokens, in nats.
    #[serde(deserialize_with = "nan_or_f64")]
    pub loss: f64,
    /// exp(loss).
    #[serde(deserialize_with = "nan_or_f64")]
    pub perplexity: f64,
    /// Tokens with a loss.
    pub tokens: u64,
    /// Seconds of training, including those before a resumption.
    #[serde(deserialize_with = "nan_or_f64")]
    pub seconds: f64,
}

/// A line of `metrics.jsonl`. A number that is not finite is null there, and NaN when it is read.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// An optimiser step.
    Step(StepRecord),
    /// An evaluation.
    Eval(EvalRecord),
}

impl Record {
    /// The step that the record belongs to.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(step) => step.step,
            Self::Eval(eval) => eval.step,
        }
    }
}

fn nan_or_f32<'de, D: Deserializer<'de>>(from: D) -> Result<f32, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f32::NAN))
}

fn nan_or_f64<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

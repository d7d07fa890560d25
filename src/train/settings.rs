//! The settings of a training, except the pack, the data and the output folder.

use std::fmt::Display;

use thiserror::Error;

use crate::data::TrainOn;
use crate::format::Role;
use crate::lora::config::{LoraConfig, LoraError, TARGETS};
use crate::model::plan::{KeepActivations, MicroBatch, OffloadActivations, OffloadVocabulary};
use crate::train::schedule::{Shape, Warmup};

/// Why settings are invalid. Flags are named as on the command line.
#[derive(Debug, Clone, PartialEq, Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// An invalid value.
    #[error("{flag} should be {expected}, found {found}")]
    Value {
        /// The flag.
        flag: &'static str,
        /// What it must be.
        expected: &'static str,
        /// The value.
        found: String,
    },
    /// An invalid value for the adapter.
    #[error("{flag}: {source}")]
    Lora {
        /// The flag.
        flag: &'static str,
        /// Why.
        source: LoraError,
    },
}

/// The settings of a training. [`Settings::default`] has the usual defaults of LoRA trainers.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Rank of the adapter.
    pub rank: u32,
    /// The adapter's scale is alpha / rank.
    pub alpha: f64,
    /// Share of an adapter's inputs that is dropped: at least 0, below 1.
    pub dropout: f64,
    /// The adapted projections. All nine (`all-linear`) are those that the model has.
    pub targets: Vec<Role>,
    /// Whether the scale is alpha / sqrt(rank).
    pub rslora: bool,
    /// The highest learning rate.
    pub lr: f64,
    /// The learning rate after the warm-up.
    pub schedule: Shape,
    /// The length of the warm-up.
    pub warmup: Warmup,
    /// Passes over all samples.
    pub epochs: u32,
    /// Optimiser steps, instead of `epochs`.
    pub steps: Option<u64>,
    /// Rows of a forward pass.
    pub micro_batch: MicroBatch,
    /// Layers that are not computed again in the backward pass. It does not change the results.
    pub keep_activations: KeepActivations,
    /// Whether residual streams are in host memory between the forward and the backward pass. It
    /// does not change the results.
    pub offload_activations: OffloadActivations,
    /// The tensors of the vocabulary that are not in GPU memory. It does not change the results.
    pub offload_vocabulary: OffloadVocabulary,
    /// Forward passes of an optimiser step.
    pub accumulate: u32,
    /// Tokens of a row; longer samples are cut.
    pub max_length: u32,
    /// The maximum norm of the gradient; a larger one is scaled down to it. `None`: no limit.
    pub clip: Option<f64>,
    /// Weight decay of AdamW.
    pub weight_decay: f64,
    /// The seed of all random numbers.
    pub seed: u64,
    /// The tokens of a sample that are learned.
    pub train_on: TrainOn,
    /// Whether a sample without a token to learn is an error; otherwise it is dropped and counted.
    pub strict: bool,
    /// Share of the samples that is held out for evaluation; 0: none.
    pub eval_split: f64,
    /// Optimiser steps between two evaluations; `None`: one at the end of each epoch.
    pub eval_every: Option<u64>,
    /// The run ends after this many evaluations in a row without a lower loss; `None`: never.
    pub early_stop: Option<u32>,
    /// Optimiser steps between two checkpoints; `None`: one at the end of each epoch.
    pub save_every: Option<u64>,
    /// Number of newest checkpoints to keep.
    pub keep: u32,
    /// Maximum GPU memory in bytes; `None`: 90 % of the free memory.
    pub vram_budget: Option<u64>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            dropout: 0.0,
            targets: TARGETS.to_vec(),
            rslora: false,
            lr: 2e-4,
            schedule: Shape::Cosine,
            warmup: Warmup::Fraction(0.03),
            epochs: 1,
            steps: None,
            micro_batch: MicroBatch::Auto,
            keep_activations: KeepActivations::Auto,
            offload_activations: OffloadActivations::Auto,
            offload_vocabulary: OffloadVocabulary::Auto,
            accumulate: 1,
            max_length: 2048,
            clip: Some(1.0),
            weight_decay: 0.0,
            seed: 0,
            train_on: TrainOn::Completions,
            strict: false,
            eval_split: 0.0,
            eval_every: None,
            early_stop: None,
            save_every: None,
            keep: 2,
            vram_budget: None,
        }
    }
}

const FROM_1: &str = "at least 1";
const ABOVE_0: &str = "a number above 0";
const SHARE: &str = "at least 0 and below 1";

impl Settings {
    /// # Errors
    /// The first invalid setting.
    pub fn check(&self) -> Result<(), SettingsError> {
        self.lora().check().map_err(|source| SettingsError::Lora { flag: lora_flag(&source), source })?;
        let positive = |x: f64| x.is_finite() && x > 0.0;
        let share = |x: f64| (0.0..1.0).contains(&x);
        demand("--lr", ABOVE_0, self.lr, positive)?;
        if let Warmup::Fraction(warmup) = self.warmup {
            demand("--warmup", "a share (at least 0, below 1) or a number of steps", warmup, share)?;
        }
        demand("--epochs", "from 1 to 10000", self.epochs, |n| (1..=10_000).contains(&n))?;
        if let MicroBatch::Rows(rows) = self.micro_batch {
            demand("--micro-batch", "auto or at least 1", rows, |n| n > 0)?;
        }
        demand("--accumulate", FROM_1, self.accumulate, |n| n > 0)?;
        demand("--max-length", "at least 2, because the first token of a sample is not predicted", self.max_length, |n| {
            n > 1
        })?;
        demand_if("--clip", "a number above 0 (`None`, or 0 on the command line, disables clipping)", self.clip, positive)?;
        demand("--weight-decay", "a number of at least 0", self.weight_decay, |x| x.is_finite() && x >= 0.0)?;
        demand("--eval-split", SHARE, self.eval_split, share)?;
        demand("--keep", FROM_1, self.keep, |n| n > 0)?;
        demand_if("--early-stop", FROM_1, self.early_stop, |n| n > 0)?;
        for (flag, steps) in [("--steps", self.steps), ("--eval-every", self.eval_every), ("--save-every", self.save_every)]
        {
            demand_if(flag, FROM_1, steps, |n| n > 0)?;
        }
        Ok(())
    }

    /// The settings of the adapter.
    pub(crate) fn lora(&self) -> LoraConfig {
        LoraConfig {
            rank: self.rank,
            alpha: self.alpha,
            dropout: self.dropout,
            targets: self.targets.clone(),
            rslora: self.rslora,
        }
    }
}

fn demand<T: Display + Copy>(
    flag: &'static str,
    expected: &'static str,
    value: T,
    good: impl Fn(T) -> bool,
) -> Result<(), SettingsError> {
    if good(value) { Ok(()) } else { Err(SettingsError::Value { flag, expected, found: value.to_string() }) }
}

/// [`demand`] for an optional value.
fn demand_if<T: Display + Copy>(
    flag: &'static str,
    expected: &'static str,
    value: Option<T>,
    good: impl Fn(T) -> bool,
) -> Result<(), SettingsError> {
    value.map_or(Ok(()), |value| demand(flag, expected, value, good))
}

fn lora_flag(error: &LoraError) -> &'static str {
    match error {
        LoraError::Rank | LoraError::TooLarge { .. } => "--rank",
        LoraError::Alpha { .. } => "--alpha",
        LoraError::Dropout { .. } => "--dropout",
        LoraError::NoTarget | LoraError::Target { .. } | LoraError::NotInModel { .. } => "--targets",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_can_be_trained_with() {
        let settings = Settings::default();
        assert_eq!(settings.check(), Ok(()));
        assert_eq!(settings.lora().scale(), 2.0);
        assert_eq!(settings.lora().targets, TARGETS);
    }

    #[test]
    fn a_value_that_cannot_be_is_named() {
        type Change = fn(&mut Settings);
        let wrong: [(&str, Change); 27] = [
            ("--rank", |s| s.rank = 0),
            ("--alpha", |s| s.alpha = f64::INFINITY),
            ("--dropout", |s| s.dropout = 1.0),
            ("--targets", |s| s.targets.clear()),
            ("--targets", |s| s.targets.push(Role::LmHead)),
            ("--lr", |s| s.lr = 0.0),
            ("--lr", |s| s.lr = f64::NAN),
            ("--epochs", |s| s.epochs = 10_001),
            ("--lr", |s| s.lr = f64::INFINITY),
            ("--warmup", |s| s.warmup = Warmup::Fraction(1.0)),
            ("--warmup", |s| s.warmup = Warmup::Fraction(-0.1)),
            ("--epochs", |s| s.epochs = 0),
            ("--steps", |s| s.steps = Some(0)),
            ("--micro-batch", |s| s.micro_batch = MicroBatch::Rows(0)),
            ("--accumulate", |s| s.accumulate = 0),
            ("--max-length", |s| s.max_length = 1),
            ("--clip", |s| s.clip = Some(-1.0)),
            ("--clip", |s| s.clip = Some(0.0)),
            ("--clip", |s| s.clip = Some(f64::NAN)),
            ("--weight-decay", |s| s.weight_decay = -0.1),
            ("--weight-decay", |s| s.weight_decay = f64::INFINITY),
            ("--eval-split", |s| s.eval_split = 1.0),
            ("--eval-split", |s| s.eval_split = f64::NAN),
            ("--eval-every", |s| s.eval_every = Some(0)),
            ("--early-stop", |s| s.early_stop = Some(0)),
            ("--save-every", |s| s.save_every = Some(0)),
            ("--keep", |s| s.keep = 0),
        ];
        for (flag, change) in wrong {
            let mut settings = Settings::default();
            change(&mut settings);
            let error = settings.check().unwrap_err().to_string();
            assert!(error.starts_with(flag) && !error.ends_with(flag), "{flag}: {error}");
        }
    }

    #[test]
    fn values_at_the_edge_are_good() {
        let settings = Settings {
            warmup: Warmup::Fraction(0.0),
            micro_batch: MicroBatch::Rows(1),
            max_length: 2,
            clip: None,
            steps: Some(1),
            seed: u64::MAX,
            ..Settings::default()
        };
        assert_eq!(settings.check(), Ok(()));
        assert_eq!(Settings { warmup: Warmup::Steps(u64::MAX), ..settings }.check(), Ok(()));
    }
}

//! The settings and inputs that a resumed run must share with its checkpoint.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::data::TrainOn;
use crate::data::checksum::FileChecksum;
use crate::format::Index;
use crate::train::schedule::{Shape, Warmup};
use crate::train::settings::Settings;

/// Why a run cannot resume from a checkpoint: it would be another run.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{setting} is {found} now, and was {expected} in the run of the checkpoint")]
pub struct Difference {
    /// The flag or argument.
    pub setting: String,
    /// What the checkpoint has.
    pub expected: String,
    /// The requested value.
    pub found: String,
}

/// The inputs of a run that its settings do not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inputs {
    /// [`pack_identity`].
    pub pack: String,
    /// [`data_identity`].
    pub data: String,
    /// [`data_identity`] of a file for evaluation.
    pub eval_data: Option<String>,
    /// Rows of a forward pass, also with `--micro-batch auto`.
    pub micro_batch: u32,
    /// `mixed` or `f32`, also with `--precision auto`.
    pub precision: &'static str,
    /// Optimiser steps of the whole run.
    pub total_steps: u64,
}

/// Names and values of everything that determines the numbers of a run. Names are those of flags
/// and arguments; different numbers have different texts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fingerprint(BTreeMap<String, String>);

impl Fingerprint {
    /// The fingerprint of a run with these settings and inputs.
    pub fn new(settings: &Settings, inputs: &Inputs) -> Self {
        let s = settings;
        // In the order of a layer: the order on the command line does not affect the run.
        let mut targets = s.targets.clone();
        targets.sort_unstable();
        targets.dedup();
        let mut entries = vec![
            ("PACK", inputs.pack.clone()),
            ("--data", inputs.data.clone()),
            ("--eval-data", inputs.eval_data.clone().unwrap_or_else(|| ABSENT.to_owned())),
            ("--rank", s.rank.to_string()),
            ("--alpha", s.alpha.to_string()),
            ("--dropout", s.dropout.to_string()),
            ("--targets", targets.iter().map(|role| role.name()).collect::<Vec<_>>().join(",")),
            ("--rslora", s.rslora.to_string()),
            ("--lr", s.lr.to_string()),
            ("--schedule", shape_name(s.schedule).to_owned()),
            ("--warmup", warmup_name(s.warmup)),
            ("--micro-batch", inputs.micro_batch.to_string()),
            (PRECISION, inputs.precision.to_owned()),
            ("--accumulate", s.accumulate.to_string()),
            ("--max-length", s.max_length.to_string()),
            ("--clip", s.clip.unwrap_or_default().to_string()),
            ("--weight-decay", s.weight_decay.to_string()),
            ("--seed", s.seed.to_string()),
            ("--train-on", train_on_name(s.train_on).to_owned()),
            ("--eval-split", s.eval_split.to_string()),
        ];
        // If the learning rate does not depend on the number of steps, a run may be extended.
        if s.schedule != Shape::Constant || matches!(s.warmup, Warmup::Fraction(_)) {
            entries.push(("--steps", inputs.total_steps.to_string()));
        }
        Self(entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }

    /// Rows of a forward pass, which `--micro-batch auto` keeps on resume; `None` if the
    /// fingerprint is damaged.
    pub fn micro_batch(&self) -> Option<u32> {
        self.value("--micro-batch")?.parse().ok()
    }

    /// The precision, which `--precision auto` keeps on resume.
    pub fn precision(&self) -> Option<&str> {
        self.value(PRECISION)
    }

    /// The value of a setting, if it has one.
    fn value(&self, name: &str) -> Option<&str> {
        // Checkpoints from before there was a choice have no precision: they are in float32.
        let default = (name == PRECISION).then_some("f32");
        self.0.get(name).map(String::as_str).or(default)
    }

    /// Compares the requested run with that of the checkpoint, `self`.
    ///
    /// # Errors
    /// The first setting, by name, that differs.
    pub fn check(&self, requested: &Self) -> Result<(), Difference> {
        let value = |of: &Self, name: &String| of.value(name).unwrap_or(ABSENT).to_owned();
        let differs = |name: &&String| self.value(name) != requested.value(name);
        match self.0.keys().chain(requested.0.keys()).filter(differs).min() {
            None => Ok(()),
            Some(name) => {
                Err(Difference { setting: name.clone(), expected: value(self, name), found: value(requested, name) })
            }
        }
    }
}

const PRECISION: &str = "--precision";
/// The value of a missing setting.
const ABSENT: &str = "none";

/// Identifies a pack: its index has the checksum of every section.
pub fn pack_identity(index: &Index) -> String {
    format!("{:08x}-{:08x}", index.header().index_crc, index.header().metadata_crc)
}

/// Identifies a file of data: CRC-32 and length.
pub fn data_identity(checksum: FileChecksum) -> String {
    format!("{:08x} ({} bytes)", checksum.crc32, checksum.len)
}

fn shape_name(shape: Shape) -> &'static str {
    match shape {
        Shape::Constant => "constant",
        Shape::Linear => "linear",
        Shape::Cosine => "cosine",
    }
}

fn warmup_name(warmup: Warmup) -> String {
    match warmup {
        Warmup::Steps(steps) => format!("{steps} steps"),
        Warmup::Fraction(share) => format!("a share of {share}"),
    }
}

fn train_on_name(train_on: TrainOn) -> &'static str {
    match train_on {
        TrainOn::Completions => "completions",
        TrainOn::All => "all",
    }
}

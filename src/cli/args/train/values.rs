//! Values of flags that are not plain numbers, read from a flag's text or from a TOML file.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use clap::ValueEnum;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::super::common::parse_size;
use crate::data::TrainOn;
use crate::format::Role;
use crate::lora::config::TARGETS;
use crate::model::plan::{KeepActivations, MicroBatch, OffloadActivations, OffloadVocabulary};
use crate::train::schedule::{Shape, Warmup};

/// All projections of a model.
const ALL_LINEAR: &str = "all-linear";

/// The adapted projections.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetsArg(pub Vec<Role>);

impl FromStr for TargetsArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == ALL_LINEAR {
            return Ok(Self(TARGETS.to_vec()));
        }
        let role = |name: &str| {
            let name = name.trim();
            TARGETS.into_iter().find(|role| role.name() == name).ok_or_else(|| {
                let names = TARGETS.map(Role::name).join(", ");
                format!("{name:?} is not a target: give {ALL_LINEAR}, or some of {names}, separated by commas")
            })
        };
        text.split(',').map(role).collect::<Result<_, _>>().map(Self)
    }
}

impl Serialize for TargetsArg {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.0 == TARGETS {
            return serializer.serialize_str(ALL_LINEAR);
        }
        serializer.collect_seq(self.0.iter().map(|role| role.name()))
    }
}

/// [`Warmup`]: a share below 1, or a whole number of steps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WarmupArg(pub Warmup);

impl FromStr for WarmupArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(steps) = text.parse() {
            return Ok(Self(Warmup::Steps(steps)));
        }
        match text.parse() {
            Ok(share) if (0.0..1.0).contains(&share) => Ok(Self(Warmup::Fraction(share))),
            _ => Err("a share of all steps below 1, such as 0.03, or a number of steps".to_owned()),
        }
    }
}

impl Serialize for WarmupArg {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Warmup::Steps(steps) => serializer.serialize_u64(steps),
            Warmup::Fraction(share) => serializer.serialize_f64(share),
        }
    }
}

/// [`MicroBatch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MicroBatchArg(pub MicroBatch);

impl FromStr for MicroBatchArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(rows) if rows > 0 => Ok(Self(MicroBatch::Rows(rows))),
            _ if text == "auto" => Ok(Self(MicroBatch::Auto)),
            _ => Err("auto, or a number of rows of at least 1".to_owned()),
        }
    }
}

impl Serialize for MicroBatchArg {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            MicroBatch::Auto => serializer.serialize_str("auto"),
            MicroBatch::Rows(rows) => serializer.serialize_u32(rows),
        }
    }
}

/// [`KeepActivations`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeepActivationsArg(pub KeepActivations);

impl FromStr for KeepActivationsArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(Self(match (text, text.parse()) {
            (_, Ok(layers)) => KeepActivations::Layers(layers),
            ("auto", _) => KeepActivations::Auto,
            ("none", _) => KeepActivations::None,
            ("all", _) => KeepActivations::All,
            _ => return Err("auto, none, all, or a number of layers".to_owned()),
        }))
    }
}

impl Serialize for KeepActivationsArg {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            KeepActivations::Auto => serializer.serialize_str("auto"),
            KeepActivations::None => serializer.serialize_str("none"),
            KeepActivations::All => serializer.serialize_str("all"),
            KeepActivations::Layers(layers) => serializer.serialize_u32(layers),
        }
    }
}

/// Where a run resumes from.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(from = "FlagOrPath")]
pub enum ResumeArg {
    /// Not at all: a new run.
    No,
    /// The newest checkpoint of its folder.
    Newest,
    /// This checkpoint.
    Checkpoint(PathBuf),
}

impl From<PathBuf> for ResumeArg {
    fn from(path: PathBuf) -> Self {
        match path.to_str() {
            Some("true") => Self::Newest,
            Some("false") => Self::No,
            _ => Self::Checkpoint(path),
        }
    }
}

/// [`ResumeArg`] in a TOML file.
#[derive(Deserialize)]
#[serde(untagged, expecting = "true, false or the path of a checkpoint")]
enum FlagOrPath {
    Flag(bool),
    Path(PathBuf),
}

impl From<FlagOrPath> for ResumeArg {
    fn from(value: FlagOrPath) -> Self {
        match value {
            FlagOrPath::Flag(true) => Self::Newest,
            FlagOrPath::Flag(false) => Self::No,
            FlagOrPath::Path(path) => path.into(),
        }
    }
}

/// A number of bytes, with or without a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct SizeArg(pub u64);

impl FromStr for SizeArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        parse_size(text).map(Self)
    }
}

/// [`Shape`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleArg {
    /// Stays at the peak
    Constant,
    /// Falls linearly to zero
    Linear,
    /// Falls to zero as half a cosine wave
    Cosine,
}

impl From<ScheduleArg> for Shape {
    fn from(arg: ScheduleArg) -> Self {
        match arg {
            ScheduleArg::Constant => Self::Constant,
            ScheduleArg::Linear => Self::Linear,
            ScheduleArg::Cosine => Self::Cosine,
        }
    }
}

impl From<Shape> for ScheduleArg {
    fn from(shape: Shape) -> Self {
        match shape {
            Shape::Constant => Self::Constant,
            Shape::Linear => Self::Linear,
            Shape::Cosine => Self::Cosine,
        }
    }
}

/// [`TrainOn`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrainOnArg {
    /// Completions and the assistant's messages; all of a plain text
    Completions,
    /// Every token
    All,
}

impl From<TrainOnArg> for TrainOn {
    fn from(arg: TrainOnArg) -> Self {
        match arg {
            TrainOnArg::Completions => Self::Completions,
            TrainOnArg::All => Self::All,
        }
    }
}

impl From<TrainOn> for TrainOnArg {
    fn from(train_on: TrainOn) -> Self {
        match train_on {
            TrainOn::Completions => Self::Completions,
            TrainOn::All => Self::All,
        }
    }
}

/// [`OffloadActivations`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OffloadArg {
    Auto,
    Off,
    On,
}

impl From<OffloadArg> for OffloadActivations {
    fn from(arg: OffloadArg) -> Self {
        match arg {
            OffloadArg::Auto => Self::Auto,
            OffloadArg::Off => Self::Off,
            OffloadArg::On => Self::On,
        }
    }
}

impl From<OffloadActivations> for OffloadArg {
    fn from(offload: OffloadActivations) -> Self {
        match offload {
            OffloadActivations::Auto => Self::Auto,
            OffloadActivations::Off => Self::Off,
            OffloadActivations::On => Self::On,
        }
    }
}

/// [`OffloadVocabulary`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OffloadVocabularyArg {
    Auto,
    Off,
    Embedding,
    All,
}

impl From<OffloadVocabularyArg> for OffloadVocabulary {
    fn from(arg: OffloadVocabularyArg) -> Self {
        match arg {
            OffloadVocabularyArg::Auto => Self::Auto,
            OffloadVocabularyArg::Off => Self::Off,
            OffloadVocabularyArg::Embedding => Self::Embedding,
            OffloadVocabularyArg::All => Self::All,
        }
    }
}

impl From<OffloadVocabulary> for OffloadVocabularyArg {
    fn from(offload: OffloadVocabulary) -> Self {
        match offload {
            OffloadVocabulary::Auto => Self::Auto,
            OffloadVocabulary::Off => Self::Off,
            OffloadVocabulary::Embedding => Self::Embedding,
            OffloadVocabulary::All => Self::All,
        }
    }
}

/// A value of a TOML file that a flag's text may also express.
#[derive(Deserialize)]
#[serde(untagged, expecting = "a text, a number or a list of texts")]
enum Loose {
    Whole(i64),
    Number(f64),
    Text(String),
    List(Vec<String>),
}

impl fmt::Display for Loose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Whole(number) => number.fmt(f),
            // With a point: 0.0 is a share, and 0 a number of steps.
            Self::Number(number) => write!(f, "{number:?}"),
            Self::Text(text) => f.write_str(text),
            Self::List(list) => f.write_str(&list.join(",")),
        }
    }
}

/// Reads a TOML value like a flag's text.
pub fn as_flag<'de, D: Deserializer<'de>, T: FromStr<Err = String>>(deserializer: D) -> Result<Option<T>, D::Error> {
    let text = Loose::deserialize(deserializer)?.to_string();
    text.parse().map(Some).map_err(serde::de::Error::custom)
}

//! `nf4pack train` as data: flags, and the same names in a TOML file.

pub mod values;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::builder::{PathBufValueParser, TypedValueParser};
use clap::{Args, ValueHint};
use serde::{Deserialize, Serialize};

use super::common::{GpuArg, LoadArgs, PrecisionArg, Usage};
use crate::arch::config::ModelConfig;
use crate::io::read::read_any;
use crate::train::settings::Settings;
use values::{
    KeepActivationsArg, MicroBatchArg, OffloadArg, OffloadVocabularyArg, ResumeArg, ScheduleArg, SizeArg, TargetsArg,
    TrainOnArg, WarmupArg, as_flag,
};

/// Bytes that a file for --config may have.
const MAX_CONFIG_LEN: u64 = 1 << 20;

const EXAMPLES: &str = "\
Examples:
  nf4pack train q.nf4pack --data chat.jsonl --show-batch                # show what is learned
  nf4pack train q.nf4pack --data chat.jsonl --out adapter
  nf4pack train q.nf4pack --data chat.jsonl --out adapter --resume      # continue after Ctrl-C
  nf4pack train q.nf4pack --data chat.jsonl --out adapter --epochs 9 --eval-split 0.1 --early-stop 2
  nf4pack train q.nf4pack --config adapter/nf4pack-train.toml --lr 1e-4 --out other    # flags override the file

FILE is JSON Lines, one sample per line: {\"messages\": [{\"role\", \"content\"}]}, {\"prompt\", \"completion\"} \
(strings, or lists of messages), {\"text\"}, {\"instruction\", \"input\", \"output\"} or {\"conversations\"}. A \
message with \"weight\": 0 or \"train\": false is in the text but not learned. \"system\", \"tools\", \"history\" \
([[question, answer], ..]) and \"chat_template_kwargs\" are extra keys of the forms that support them. A system prompt \
precedes a prompt, with an empty line between them. In plain text, CR LF is a line end. Samples are packed into rows \
of --max-length tokens, and attention never crosses samples. An optimiser step uses --micro-batch times --accumulate \
rows.

DIR gets an adapter that PEFT and `nf4pack generate --adapter` load, checkpoints, metrics.jsonl, TensorBoard events, \
report.html, and nf4pack-train.toml, the settings for --config. Such a file has the flags' names, and its paths are relative \
to the current folder:
  data = \"chat.jsonl\"
  lr = 1e-4
  targets = [\"q_proj\", \"v_proj\"]";

/// Train a LoRA adapter on a pack
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct TrainArgs {
    /// The pack; training does not change its weights
    #[arg(value_name = "PACK", value_hint = ValueHint::FilePath)]
    pub pack: PathBuf,

    #[command(flatten)]
    pub load: LoadArgs,

    #[command(flatten)]
    pub options: TrainOptions,

    /// A TOML file with any flags except --config, --show-batch, --gpu and --json; flags override
    /// it
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,

    /// Print the first batch with the learned tokens marked, and do not train
    #[arg(long)]
    pub show_batch: bool,

    #[command(flatten)]
    pub gpu: GpuArg,

    /// Print one JSON document on stdout (numbers are exact); all else goes to stderr
    #[arg(long)]
    pub json: bool,
}

/// The options of both the command line and a TOML file. `None`: not set.
#[derive(Debug, Clone, Default, PartialEq, Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct TrainOptions {
    /// The training data: JSON Lines (.jsonl, .json, .ndjson), or plain text (.txt, .md). A file of
    /// another name is JSON Lines if it begins with { or [; without an ending it is text otherwise
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, required_unless_present = "config")]
    pub data: Option<PathBuf>,
    /// The folder for the adapter; created if it is missing
    #[arg(
        long,
        aliases = ["output", "output-dir"],
        value_name = "DIR",
        value_hint = ValueHint::DirPath,
        required_unless_present_any = ["config", "show_batch"]
    )]
    pub out: Option<PathBuf>,
    /// Continue from the newest checkpoint of --out, or from CHECKPOINT, with the same settings:
    /// the losses are the same bit for bit
    #[arg(
        long,
        value_name = "CHECKPOINT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        value_parser = PathBufValueParser::new().map(ResumeArg::from),
        value_hint = ValueHint::DirPath
    )]
    // A saved settings file must not make a later run resume.
    #[serde(skip_serializing)]
    pub resume: Option<ResumeArg>,

    /// The base model for PEFT: its name on the hub, or its folder [default: the pack's name]
    #[arg(long, value_name = "NAME", help_heading = "Adapter")]
    pub base_model: Option<String>,
    /// Rank of the adapter: a higher rank can learn more and needs more memory [default: 16]
    #[arg(long, value_name = "N", help_heading = "Adapter")]
    pub rank: Option<u32>,
    /// The adapter's scale is alpha / rank [default: 32]
    #[arg(long, allow_negative_numbers = true, value_name = "X", help_heading = "Adapter")]
    pub alpha: Option<f64>,
    /// Dropout of the adapter's inputs in training, against overfitting [default: 0]
    #[arg(long, allow_negative_numbers = true, value_name = "SHARE", help_heading = "Adapter")]
    pub dropout: Option<f64>,
    /// Adapted projections: all-linear, or comma-separated names such as q_proj,v_proj [default:
    /// all-linear]
    #[arg(long, value_name = "NAMES", help_heading = "Adapter")]
    #[serde(deserialize_with = "as_flag")]
    pub targets: Option<TargetsArg>,
    /// Use the scale alpha / sqrt(rank), for high ranks
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        hide_possible_values = true,
        help_heading = "Adapter"
    )]
    pub rslora: Option<bool>,

    /// The highest learning rate [default: 0.0002]
    #[arg(long, alias = "learning-rate", allow_negative_numbers = true, value_name = "X", help_heading = "Optimiser")]
    pub lr: Option<f64>,
    /// The learning rate after the warm-up [default: cosine]
    #[arg(long, value_enum, help_heading = "Optimiser")]
    pub schedule: Option<ScheduleArg>,
    /// Length of the warm-up: a share of all steps (below 1), or a number of steps [default: 0.03]
    #[arg(long, allow_negative_numbers = true, value_name = "SHARE|STEPS", help_heading = "Optimiser")]
    #[serde(deserialize_with = "as_flag")]
    pub warmup: Option<WarmupArg>,
    /// Maximum norm of the gradient; larger gradients are scaled down. 0 disables clipping
    /// [default: 1]
    #[arg(long, allow_negative_numbers = true, value_name = "NORM", help_heading = "Optimiser")]
    pub clip: Option<f64>,
    /// Weight decay of AdamW [default: 0]
    #[arg(long, allow_negative_numbers = true, value_name = "X", help_heading = "Optimiser")]
    pub weight_decay: Option<f64>,
    /// Seed of all random numbers: adapter initialisation, sample order, dropout, evaluation split
    /// [default: 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64), help_heading = "Optimiser")]
    pub seed: Option<u64>,

    /// Passes over all samples [default: 1]
    #[arg(long, alias = "num-train-epochs", value_name = "N", help_heading = "Length and batches")]
    pub epochs: Option<u32>,
    /// Optimiser steps, instead of --epochs
    #[arg(long, value_name = "N", help_heading = "Length and batches")]
    pub steps: Option<u64>,
    /// Rows of a forward pass: more rows are faster and need more memory; auto takes what is
    /// estimated to be fastest of what fits, up to 8 [default: auto]
    #[arg(long, value_name = "N|auto", help_heading = "Length and batches")]
    #[serde(deserialize_with = "as_flag")]
    pub micro_batch: Option<MicroBatchArg>,
    /// Layers that keep their activations, so that the backward pass does not compute them again:
    /// faster, with more memory and the same results; auto keeps what fits [default: auto]
    #[arg(long, value_name = "auto|none|all|N", help_heading = "Length and batches")]
    #[serde(deserialize_with = "as_flag")]
    pub keep_activations: Option<KeepActivationsArg>,
    /// Whether activations between layers are in host memory from the forward to the backward pass:
    /// less GPU memory for long rows, and the same results; auto offloads what does not fit
    /// [default: auto]
    #[arg(long, value_enum, value_name = "auto|off|on", hide_possible_values = true, help_heading = "Length and batches")]
    pub offload_activations: Option<OffloadArg>,
    /// The tensors of the vocabulary that are not in GPU memory: the embedding, whose rows the host
    /// gathers, or all, with an output projection that passes through GPU memory in parts; less GPU
    /// memory, and the same results; auto offloads what does not fit [default: auto]
    #[arg(
        long,
        value_enum,
        value_name = "auto|off|embedding|all",
        hide_possible_values = true,
        help_heading = "Length and batches"
    )]
    pub offload_vocabulary: Option<OffloadVocabularyArg>,
    /// Forward passes per optimiser step: a larger batch in the same memory [default: 1]
    #[arg(long, value_name = "N", help_heading = "Length and batches")]
    pub accumulate: Option<u32>,
    /// Tokens of a row; longer samples are cut and counted [default: 2048, or the model's maximum
    /// if that is less]
    #[arg(long, value_name = "TOKENS", help_heading = "Length and batches")]
    pub max_length: Option<u32>,
    /// What is learned of a sample [default: completions]
    #[arg(long, value_enum, help_heading = "Length and batches")]
    pub train_on: Option<TrainOnArg>,
    /// Fail on a sample without anything to learn; by default it is dropped and counted
    #[arg(
        long,
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "true",
        hide_possible_values = true,
        help_heading = "Length and batches"
    )]
    pub strict: Option<bool>,
    /// The arithmetic of the layers: f32, or mixed (products of f16 on matrix units; sums, norms,
    /// losses and the adapter in float32), or auto: mixed where the GPU has matrix units. A resumed
    /// run keeps its own [default: auto]
    #[arg(
        long,
        value_enum,
        value_name = "auto|f32|mixed",
        hide_possible_values = true,
        help_heading = "Length and batches"
    )]
    pub precision: Option<PrecisionArg>,
    /// GPU memory to plan within, such as 6GiB; drivers allocate in blocks, which takes a little
    /// more [default: 90 % of the free GPU memory]
    #[arg(long, value_name = "SIZE", help_heading = "Length and batches")]
    #[serde(deserialize_with = "as_flag")]
    pub vram_budget: Option<SizeArg>,

    /// The evaluation data, in the forms of --data
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = "Evaluation and checkpoints")]
    pub eval_data: Option<PathBuf>,
    /// Share of --data that is held out for evaluation, instead of --eval-data [default: 0]
    #[arg(long, allow_negative_numbers = true, value_name = "SHARE", help_heading = "Evaluation and checkpoints")]
    pub eval_split: Option<f64>,
    /// Optimiser steps between two evaluations [default: once an epoch]
    #[arg(long, value_name = "STEPS", help_heading = "Evaluation and checkpoints")]
    pub eval_every: Option<u64>,
    /// Stop after N evaluations in a row without a lower loss, and keep the best adapter in DIR
    /// [default: off]
    #[arg(long, value_name = "N", help_heading = "Evaluation and checkpoints")]
    pub early_stop: Option<u32>,
    /// Optimiser steps between two checkpoints [default: once an epoch, and every ten minutes]
    #[arg(long, value_name = "STEPS", help_heading = "Evaluation and checkpoints")]
    pub save_every: Option<u64>,
    /// Number of newest checkpoints to keep [default: 2]
    #[arg(long, value_name = "N", help_heading = "Evaluation and checkpoints")]
    pub keep: Option<u32>,
}

impl TrainArgs {
    /// The flags, completed by the file of `--config`.
    ///
    /// # Errors
    /// A file that cannot be read; [`Usage`] for unknown names and invalid values, with the file's
    /// name if they are in it.
    pub fn merged(&self) -> Result<TrainOptions> {
        let flags = self.options.clone();
        let Some(path) = &self.config else {
            flags.settings()?;
            return Ok(flags);
        };
        let of_flags = flags.settings().err();
        let merged = flags.or(TrainOptions::read(path)?);
        match merged.settings().err() {
            None => Ok(merged),
            Some(error) if of_flags.as_ref() == Some(&error) => Err(error.into()),
            Some(error) => Err(Usage(format!("{}: {error}", path.display())).into()),
        }
    }
}

impl TrainOptions {
    /// # Errors
    /// See [`TrainArgs::merged`].
    fn read(path: &Path) -> Result<Self> {
        let bytes = read_any(path, MAX_CONFIG_LEN)?;
        let text = String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8", path.display()))?;
        let wrong = |e: toml::de::Error| {
            let before = e.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let number = before.matches('\n').count() + 1;
            let line = text.lines().nth(number - 1).unwrap_or_default().trim();
            Usage(format!("{} is not a file for --config: line {number}, `{line}`: {}", path.display(), e.message()))
        };
        Ok(toml::from_str(&text).map_err(wrong)?)
    }

    /// The options of `self`, completed by those of `other`.
    fn or(self, other: Self) -> Self {
        Self {
            data: self.data.or(other.data),
            out: self.out.or(other.out),
            resume: self.resume.or(other.resume),
            base_model: self.base_model.or(other.base_model),
            rank: self.rank.or(other.rank),
            alpha: self.alpha.or(other.alpha),
            dropout: self.dropout.or(other.dropout),
            targets: self.targets.or(other.targets),
            rslora: self.rslora.or(other.rslora),
            lr: self.lr.or(other.lr),
            schedule: self.schedule.or(other.schedule),
            warmup: self.warmup.or(other.warmup),
            clip: self.clip.or(other.clip),
            weight_decay: self.weight_decay.or(other.weight_decay),
            seed: self.seed.or(other.seed),
            epochs: self.epochs.or(other.epochs),
            // --epochs of `self` wins over --steps of `other`.
            steps: self.steps.or(other.steps.filter(|_| self.epochs.is_none())),
            micro_batch: self.micro_batch.or(other.micro_batch),
            keep_activations: self.keep_activations.or(other.keep_activations),
            offload_activations: self.offload_activations.or(other.offload_activations),
            offload_vocabulary: self.offload_vocabulary.or(other.offload_vocabulary),
            accumulate: self.accumulate.or(other.accumulate),
            max_length: self.max_length.or(other.max_length),
            train_on: self.train_on.or(other.train_on),
            strict: self.strict.or(other.strict),
            precision: self.precision.or(other.precision),
            vram_budget: self.vram_budget.or(other.vram_budget),
            eval_data: self.eval_data.or(other.eval_data),
            eval_split: self.eval_split.or(other.eval_split),
            eval_every: self.eval_every.or(other.eval_every),
            early_stop: self.early_stop.or(other.early_stop),
            save_every: self.save_every.or(other.save_every),
            keep: self.keep.or(other.keep),
        }
    }

    /// The training data.
    ///
    /// # Errors
    /// If neither a flag nor the file of `--config` names it.
    pub fn data(&self) -> Result<&Path, Usage> {
        let missing = || Usage("neither --data nor the file of --config names the training data".to_owned());
        self.data.as_deref().ok_or_else(missing)
    }

    /// The folder for the adapter.
    ///
    /// # Errors
    /// As [`TrainOptions::data`].
    pub fn out(&self) -> Result<&Path, Usage> {
        let missing = || Usage("neither --out nor the file of --config names the folder for the adapter".to_owned());
        self.out.as_deref().ok_or_else(missing)
    }

    /// With the default `--max-length` of this model, if none is set.
    #[must_use]
    pub fn for_model(self, model: &ModelConfig) -> Self {
        Self { max_length: self.max_length.or(Some(default_max_length(model))), ..self }
    }

    /// The settings, with the library's defaults for options that are not set.
    ///
    /// # Errors
    /// Settings that are invalid or have no effect, by the names of their flags.
    pub fn settings(&self) -> Result<Settings, Usage> {
        let default = Settings::default();
        let settings = Settings {
            rank: self.rank.unwrap_or(default.rank),
            alpha: self.alpha.unwrap_or(default.alpha),
            dropout: self.dropout.unwrap_or(default.dropout),
            targets: self.targets.clone().map_or(default.targets, |targets| targets.0),
            rslora: self.rslora.unwrap_or(default.rslora),
            lr: self.lr.unwrap_or(default.lr),
            schedule: self.schedule.map_or(default.schedule, Into::into),
            warmup: self.warmup.map_or(default.warmup, |warmup| warmup.0),
            epochs: self.epochs.unwrap_or(default.epochs),
            steps: self.steps.or(default.steps),
            micro_batch: self.micro_batch.map_or(default.micro_batch, |rows| rows.0),
            keep_activations: self.keep_activations.map_or(default.keep_activations, |keep| keep.0),
            offload_activations: self.offload_activations.map_or(default.offload_activations, Into::into),
            offload_vocabulary: self.offload_vocabulary.map_or(default.offload_vocabulary, Into::into),
            accumulate: self.accumulate.unwrap_or(default.accumulate),
            max_length: self.max_length.unwrap_or(default.max_length),
            clip: self.clip.map_or(default.clip, |norm| (norm != 0.0).then_some(norm)),
            weight_decay: self.weight_decay.unwrap_or(default.weight_decay),
            seed: self.seed.unwrap_or(default.seed),
            train_on: self.train_on.map_or(default.train_on, Into::into),
            strict: self.strict.unwrap_or(default.strict),
            eval_split: self.eval_split.unwrap_or(default.eval_split),
            eval_every: self.eval_every.or(default.eval_every),
            early_stop: self.early_stop.or(default.early_stop),
            save_every: self.save_every.or(default.save_every),
            keep: self.keep.unwrap_or(default.keep),
            vram_budget: self.vram_budget.map(|size| size.0).or(default.vram_budget),
        };
        settings.check().map_err(|error| Usage(error.to_string()))?;
        self.check_evaluation(&settings)?;
        Ok(settings)
    }

    fn check_evaluation(&self, settings: &Settings) -> Result<(), Usage> {
        let splits = settings.eval_split > 0.0;
        if splits && self.eval_data.is_some() {
            let both = "--eval-data and --eval-split are both given: give one of them (--eval-split 0 is off)";
            return Err(Usage(both.to_owned()));
        }
        if splits || self.eval_data.is_some() {
            return Ok(());
        }
        let given = [("--eval-every", settings.eval_every.is_some()), ("--early-stop", settings.early_stop.is_some())];
        match given.into_iter().find(|(_, given)| *given) {
            Some((flag, _)) => Err(Usage(format!("{flag} needs evaluation data: --eval-data FILE, or --eval-split SHARE"))),
            None => Ok(()),
        }
    }

    /// A file for `--config` with these options and the library's defaults.
    ///
    /// # Errors
    /// Paths that are not UTF-8.
    pub fn to_toml(&self) -> Result<String> {
        let all = self.clone().or(Self::from(&self.settings()?));
        let text = toml::to_string(&all).context("the settings cannot be written as TOML")?;
        Ok(format!("# The settings of this adapter, for nf4pack train PACK --config FILE.\n{text}"))
    }
}

/// Tokens of a row by default: at most the model's maximum.
pub fn default_max_length(model: &ModelConfig) -> u32 {
    Settings::default().max_length.min(model.max_position_embeddings)
}

impl From<&Settings> for TrainOptions {
    fn from(settings: &Settings) -> Self {
        Self {
            rank: Some(settings.rank),
            alpha: Some(settings.alpha),
            dropout: Some(settings.dropout),
            targets: Some(TargetsArg(settings.targets.clone())),
            rslora: Some(settings.rslora),
            lr: Some(settings.lr),
            schedule: Some(settings.schedule.into()),
            warmup: Some(WarmupArg(settings.warmup)),
            clip: Some(settings.clip.unwrap_or(0.0)),
            weight_decay: Some(settings.weight_decay),
            seed: Some(settings.seed),
            epochs: Some(settings.epochs),
            steps: settings.steps,
            micro_batch: Some(MicroBatchArg(settings.micro_batch)),
            keep_activations: Some(KeepActivationsArg(settings.keep_activations)),
            offload_activations: Some(settings.offload_activations.into()),
            offload_vocabulary: Some(settings.offload_vocabulary.into()),
            accumulate: Some(settings.accumulate),
            max_length: Some(settings.max_length),
            train_on: Some(settings.train_on.into()),
            strict: Some(settings.strict),
            vram_budget: settings.vram_budget.map(SizeArg),
            eval_split: Some(settings.eval_split),
            eval_every: settings.eval_every,
            early_stop: settings.early_stop,
            save_every: settings.save_every,
            keep: Some(settings.keep),
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests;

//! `nf4pack eval` as data.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::common::{ComputeArgs, GpuArg, LoadArgs};
use super::train::default_max_length;
use super::train::values::{MicroBatchArg, SizeArg, TrainOnArg};
use crate::arch::config::ModelConfig;
use crate::model::plan::MicroBatch;

const EXAMPLES: &str = "\
Examples:
  nf4pack eval qwen3.nf4pack --data test.jsonl                     # the base
  nf4pack eval qwen3.nf4pack --data test.jsonl --adapter adapter   # with the adapter
  nf4pack eval qwen3.nf4pack --data book.txt --max-length 4096

Loss is the mean of -log p over the tokens that --train-on selects; perplexity is exp(loss). FILE is JSON Lines in the forms \
of `nf4pack train`, or plain text, which is cut into pieces of --max-length tokens. To compare two models, use the same FILE, \
--max-length and --train-on.";

/// Measure how well a pack, with or without an adapter, predicts a text
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct EvalArgs {
    /// The pack
    #[arg(value_name = "PACK", value_hint = ValueHint::FilePath)]
    pub pack: PathBuf,

    #[command(flatten)]
    pub load: LoadArgs,

    /// A LoRA adapter: a folder that `nf4pack train` or PEFT wrote, or a checkpoint in one
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub adapter: Option<PathBuf>,

    /// The evaluation data: JSON Lines or plain text, as for `nf4pack train --data`
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub data: PathBuf,

    /// The tokens of a sample that count
    #[arg(long, value_enum, default_value_t = TrainOnArg::Completions)]
    pub train_on: TrainOnArg,

    /// Fail on a sample without anything to predict; by default it is dropped and counted
    #[arg(long)]
    pub strict: bool,

    /// Tokens of a row; longer samples are cut and counted [default: 2048, or the model's maximum
    /// if that is less]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(2..))]
    pub max_length: Option<u32>,

    /// Rows of a forward pass; auto takes the most that fit, up to 8 [default: auto]
    #[arg(long, value_name = "N|auto")]
    pub micro_batch: Option<MicroBatchArg>,

    /// Maximum GPU memory, such as 6GiB [default: 90 % of the free GPU memory]
    #[arg(long, value_name = "SIZE")]
    pub vram_budget: Option<SizeArg>,

    #[command(flatten)]
    pub compute: ComputeArgs,

    #[command(flatten)]
    pub gpu: GpuArg,

    /// Print one JSON document on stdout (numbers are exact); all else goes to stderr
    #[arg(long)]
    pub json: bool,
}

impl EvalArgs {
    /// The value of `--max-length`, with the default of `nf4pack train`.
    pub fn max_length(&self, model: &ModelConfig) -> u32 {
        self.max_length.unwrap_or_else(|| default_max_length(model))
    }

    /// The value for [`Settings::micro_batch`](crate::train::settings::Settings::micro_batch).
    pub fn micro_batch(&self) -> MicroBatch {
        self.micro_batch.map_or(MicroBatch::Auto, |rows| rows.0)
    }
}

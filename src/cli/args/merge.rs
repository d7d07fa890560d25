//! `nf4pack merge`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};

use super::common::{ComputeArgs, GpuArg, OutputArgs, Usage, WeightsArgs};
use crate::merge::Base;

const EXAMPLES: &str = "\
Examples:
  nf4pack merge q.nf4pack --adapter my-adapter --base ./Qwen3-0.6B --out ./tuned
  nf4pack merge q.nf4pack --adapter my-adapter --base dequant --out ./tuned

DIR gets the model's weights in bfloat16 with the adapter added, and the pack's config and tokenizer files. transformers loads it \
without PEFT, and `nf4pack convert` converts it. --base SNAPSHOT adds the change to the original weights, which are more accurate; \
--base dequant adds it to the pack's 4-bit values, which the adapter was trained on. The summary says how much of the change \
rounding to bfloat16 removed. DIR appears only when it is complete. Then the GPU computes the logits of a sample with pack and \
adapter and with the merged weights, and compares them; with --base SNAPSHOT they also differ by the error of 4 bits.";

const SAMPLE: &str = "The quick brown fox jumps over the lazy dog, and the dog asks why.";

/// Add an adapter to the weights, and write a folder that transformers loads
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct MergeArgs {
    /// The pack that the adapter was trained on
    #[arg(value_name = "PACK", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,

    #[command(flatten)]
    pub weights: WeightsArgs,

    /// The adapter's folder, written by this program or by PEFT
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub adapter: PathBuf,

    /// The weights to add it to: the checkpoint that the pack was made from, or `dequant`, the
    /// pack's own weights
    #[arg(long, value_name = "SNAPSHOT|dequant", value_hint = ValueHint::AnyPath)]
    pub base: PathBuf,

    /// The folder to write; it must be new or empty
    #[arg(long, alias = "output", value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub out: PathBuf,

    /// A config.json to use instead of the one in SNAPSHOT
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,

    /// The text whose logits are compared (its first 128 tokens)
    #[arg(long, value_name = "TEXT", default_value = SAMPLE)]
    pub sample: String,

    /// Do not compare logits, which needs a GPU and temporary disk space as large as the snapshot
    #[arg(long, conflicts_with = "sample")]
    pub no_compare: bool,

    #[command(flatten)]
    pub compute: ComputeArgs,

    #[command(flatten)]
    pub gpu: GpuArg,

    #[command(flatten)]
    pub output: OutputArgs,
}

impl MergeArgs {
    /// A folder of that name is `./dequant`.
    ///
    /// # Errors
    /// `--config` for the pack's own weights, whose config.json is in the pack.
    pub fn base(&self) -> Result<Base<'_>, Usage> {
        match &self.config {
            config if self.base != Path::new("dequant") => {
                Ok(Base::Checkpoint { path: &self.base, config: config.as_deref() })
            }
            None => Ok(Base::Dequantised),
            Some(_) => Err(Usage("--config needs --base SNAPSHOT: --base dequant does not read it".to_owned())),
        }
    }
}

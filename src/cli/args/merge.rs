//! `nf4pack merge`.

use std::path::{Path, PathBuf};

use clap::{Args, ValueHint};

use super::{GpuArg, OutputArgs, Usage};
use crate::merge::Base;

const EXAMPLES: &str = "\
Examples:
  nf4pack merge q.nf4pack --adapter my-adapter --base ./Qwen3-0.6B --out ./tuned
  nf4pack merge q.nf4pack --adapter my-adapter --base dequant --out ./tuned

DIR gets the model's weights in bfloat16 with the adapter added, and the pack's config and tokenizer files: transformers loads it \
without PEFT, and `nf4pack convert` makes a pack of it. With --base SNAPSHOT the change goes into the weights that the pack was made \
from, which are the better ones; with --base dequant into the pack's 4-bit values, which are the ones that it was trained on. How much \
of the change bfloat16 is too coarse for is said at the end. DIR appears under its name only when it is whole. Then the logits of a \
sample by the pack with its adapter and by the merged weights are compared on the GPU; with --base SNAPSHOT they differ by what 4 bits \
cost, too.";

const SAMPLE: &str = "The quick brown fox jumps over the lazy dog, and the dog asks why.";

/// Add an adapter to the weights, and write them as a folder that transformers loads
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct MergeArgs {
    /// The pack that the adapter was trained on
    #[arg(value_name = "PACK", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,

    /// The adapter's folder, by this program or by PEFT
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub adapter: PathBuf,

    /// What it is added to: the checkpoint that the pack was made from, or `dequant`, the pack's own weights
    #[arg(long, value_name = "SNAPSHOT|dequant", value_hint = ValueHint::AnyPath)]
    pub base: PathBuf,

    /// The folder to write: a new or an empty one
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub out: PathBuf,

    /// A config.json to read in place of the one in SNAPSHOT
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,

    /// The text whose logits before and after are compared (its first 128 tokens)
    #[arg(long, value_name = "TEXT", default_value = SAMPLE)]
    pub sample: String,

    /// Compare no logits: it takes a GPU and, for a while, the space of the snapshot again
    #[arg(long, conflicts_with = "sample")]
    pub no_compare: bool,

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
            Some(_) => Err(Usage("--config belongs to --base SNAPSHOT: with --base dequant nothing reads it".to_owned())),
        }
    }
}

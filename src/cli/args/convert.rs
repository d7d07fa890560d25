//! `nf4pack convert` as data.

use std::path::PathBuf;

use clap::{Args, ValueHint};
use regex::Regex;

use super::common::{EncoderArg, OutputArgs, ScalesArg, ThreadsArg, block_size_parser};
use crate::convert::Options;

const EXAMPLES: &str = "\
Examples:
  nf4pack convert Qwen3-4B q.nf4pack
  nf4pack convert Qwen3-4B q.nf4pack --scales dq8           # 4.13 bits per weight
  nf4pack convert Qwen3-4B q.nf4pack --keep 'layers\\.0\\.'   # do not quantise layer 0
  nf4pack convert Llama-3-8B l.nf4pack --quantize ^lm_head  # lm_head, too
  nf4pack convert Qwen3-4B q.nf4pack --resume               # if interrupted, the same command continues
  nf4pack convert Qwen3-4B q.nf4pack --dry-run              # the plan and the size

OUT appears only when it is complete and on disk: after Ctrl-C, an error or a full disk there is no OUT and, without --resume, no other file. (If \
only its folder cannot be synced at the end, that is an error, and OUT exists.) A process that is killed leaves nothing, or on a \
file system without unnamed files a hidden .nf4pack-*.tmp next to OUT, which the next conversion there removes. OUT is no wider \
readable than the files of SRC; with --force it keeps the permissions of the old OUT. Tensors outside the model are named, and left out if a pack cannot store them. The same checkpoint and \
options give the same bytes with any number of threads.";

/// Convert a checkpoint into a pack
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ConvertArgs {
    /// The checkpoint: a folder with model.safetensors or its shards (a hub snapshot), or one
    /// .safetensors file
    #[arg(value_name = "SRC", value_hint = ValueHint::AnyPath)]
    pub source: PathBuf,

    /// The pack to write
    #[arg(value_name = "OUT.nf4pack", value_hint = ValueHint::FilePath)]
    pub target: PathBuf,

    #[command(flatten)]
    pub quality: QualityArgs,

    /// Do not quantise projections whose name matches; overrides --quantize
    ///
    /// Names are those of the checkpoint, such as model.layers.0.mlp.down_proj.weight. The
    /// expression may match any part.
    #[arg(long, value_name = "REGEX")]
    pub keep: Option<Regex>,

    /// Also quantise tensors of two or more dimensions whose name matches
    ///
    /// By default the seven projections of every layer are quantised (q, k, v, o, gate, up, down);
    /// embeddings, lm_head, norms and biases are copied unchanged.
    #[arg(long, value_name = "REGEX")]
    pub quantize: Option<Regex>,

    #[command(flatten)]
    pub threads: ThreadsArg,

    /// A config.json to use instead of the checkpoint's
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,

    /// Keep the finished part if interrupted, and continue from it
    ///
    /// The part is .OUT-partial, next to OUT; it is recorded every second. It is used only if its
    /// checksums and the source bytes it was made from are still right. The pack has the same bytes
    /// as that of an uninterrupted run.
    #[arg(long)]
    pub resume: bool,

    /// Print the plan, and write nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Replace OUT if it exists
    #[arg(long)]
    pub force: bool,

    #[command(flatten)]
    pub output: OutputArgs,
}

/// Options that determine size and error.
#[derive(Debug, Args)]
pub struct QualityArgs {
    /// How the scale of a block is chosen
    #[arg(long, value_enum, default_value_t = EncoderArg::Mse)]
    pub encoder: EncoderArg,

    /// How scales are stored; bits per weight are at block size 64
    #[arg(long, value_enum, default_value_t = ScalesArg::Bf16)]
    pub scales: ScalesArg,

    /// Weights that share a scale: larger blocks are smaller files with larger errors
    #[arg(long, value_name = "N", default_value = "64", value_parser = block_size_parser())]
    pub block_size: u32,
}

impl ConvertArgs {
    /// The options of the library.
    pub fn options(&self) -> Options {
        Options {
            encoder: self.quality.encoder.into(),
            scale_type: self.quality.scales.into(),
            block_size: self.quality.block_size,
            keep: self.keep.clone(),
            quantize: self.quantize.clone(),
            threads: self.threads.non_zero(),
            config: self.config.clone(),
            force: self.force,
            resume: self.resume,
        }
    }
}

//! `nf4pack verify` as data.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::common::{OutputArgs, ReadArgs, ThreadsArg};

const EXAMPLES: &str = "\
Examples:
  nf4pack verify qwen3.nf4pack
  nf4pack verify qwen3.nf4pack --against ./Qwen3-0.6B
  nf4pack verify qwen3.nf4pack --against ./Qwen3-0.6B --tensors
  nf4pack verify qwen3.nf4pack --json | jq -r '.faults[]'

Checks every checksum, scale and padding byte on all cores, and names each damaged section. With --against, decodes every \
weight and compares it with the checkpoint; --tensors lists the errors by tensor. A mismatch is an error that no encoder produces, \
a missing tensor, or a copied tensor with a different byte. Faults and mismatches give exit code 1.";

/// Check a pack, alone or against its checkpoint
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct VerifyArgs {
    /// The pack
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,

    #[command(flatten)]
    pub read: ReadArgs,

    /// The checkpoint that the pack was made from
    #[arg(long, value_name = "SRC", value_hint = ValueHint::AnyPath)]
    pub against: Option<PathBuf>,

    /// List the errors of each tensor, not only the worst block of all
    #[arg(long, requires = "against")]
    pub tensors: bool,

    /// A config.json to use instead of the checkpoint's
    #[arg(long, value_name = "FILE", requires = "against", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,

    #[command(flatten)]
    pub threads: ThreadsArg,

    #[command(flatten)]
    pub output: OutputArgs,
}

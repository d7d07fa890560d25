//! `nf4pack export` as data.

use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};

use super::common::{OutputArgs, WeightsArgs};
use crate::format::FloatType;

const EXAMPLES: &str = "\
Examples:
  nf4pack export qwen3.nf4pack ./Qwen3-0.6B-nf4
  nf4pack export qwen3.nf4pack ./exact --dtype f32

The folder has the weights as .safetensors, and the checkpoint's config and tokenizer files byte for byte, except that
config.json's dtype is the one that can represent all weights.
`AutoModelForCausalLM.from_pretrained(\"./Qwen3-0.6B-nf4\")` loads them in that dtype. The pack is verified first. The
folder appears only when it is complete.";

/// Write a pack back as a folder that transformers loads
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ExportArgs {
    /// The pack
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,

    /// The folder to write; it must be new or empty
    #[arg(value_name = "OUT_DIR", value_hint = ValueHint::DirPath)]
    pub target: PathBuf,

    #[command(flatten)]
    pub weights: WeightsArgs,

    /// Type of the decoded weights; other tensors keep their type
    #[arg(long, value_enum, default_value_t = DtypeArg::Bf16)]
    pub dtype: DtypeArg,

    #[command(flatten)]
    pub output: OutputArgs,
}

/// [`FloatType`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    /// bfloat16, the type of most checkpoints
    Bf16,
    /// float16; a weight beyond 65504 is an error
    F16,
    /// float32: exactly the decoded values
    F32,
}

impl From<DtypeArg> for FloatType {
    fn from(arg: DtypeArg) -> Self {
        match arg {
            DtypeArg::Bf16 => Self::Bf16,
            DtypeArg::F16 => Self::F16,
            DtypeArg::F32 => Self::F32,
        }
    }
}

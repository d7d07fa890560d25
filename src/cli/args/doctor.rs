//! `nf4pack doctor` as data.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::common::{GpuArg, ReadArgs, parse_size};

const EXAMPLES: &str = "\
Examples:
  nf4pack doctor
  nf4pack doctor qwen3.nf4pack
  nf4pack doctor qwen3.nf4pack --budget 8GiB   # on a smaller GPU
  nf4pack doctor --gpu llvmpipe --json

Lists the GPUs of Vulkan, Metal and DX12, and opens one (the best, or the one that --gpu or NF4PACK_ADAPTER names). Compares \
every decoding kernel with the CPU, and every kernel for matrix units, if the GPU has them: `precision` is what `--precision auto` \
takes, and why. Measures upload and decoding briefly; `nf4pack bench` measures longer. For a pack it \
says whether all layers fit in GPU memory, or how many are streamed at a time; exit code 1 means that two layers do not fit. \
If a step fails, it prints the results so far and ends with exit code 1. With NF4PACK_PROFILE=1 it prints the time of every \
kernel at the end.";

/// Show the GPUs, test their kernels, and show how a pack will run
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct DoctorArgs {
    /// A pack to plan for
    #[arg(value_name = "PACK", value_hint = ValueHint::FilePath)]
    pub pack: Option<PathBuf>,

    #[command(flatten)]
    pub read: ReadArgs,

    /// GPU memory to plan with, such as 8GiB or 500MB [default: 90 % of the free GPU memory]
    #[arg(long, value_name = "SIZE", requires = "pack", value_parser = parse_size)]
    pub budget: Option<u64>,

    #[command(flatten)]
    pub gpu: GpuArg,

    /// Print one JSON document on stdout (numbers are exact)
    #[arg(long)]
    pub json: bool,
}

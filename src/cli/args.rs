//! The command line as data: every option with its help. Nothing is decided here.

mod bench;
mod common;
mod completions;
mod convert;
mod doctor;
mod eval;
mod export;
mod generate;
mod inspect;
mod merge;
mod train;
mod verify;

use clap::builder::styling::{AnsiColor, Styles};
use clap::{Parser, Subcommand};

pub use bench::*;
pub use common::{EncoderArg, GpuArg, LoadArgs, OutputArgs, PrecisionArg, ReadArgs, Usage, WeightsArgs};
pub use completions::CompletionsArgs;
pub use convert::ConvertArgs;
pub use doctor::DoctorArgs;
pub use eval::EvalArgs;
pub use export::ExportArgs;
pub use generate::{GenerateArgs, SamplingArgs};
pub use inspect::InspectArgs;
pub use merge::MergeArgs;
pub use train::TrainArgs;
pub use train::values::ResumeArg;
pub use verify::VerifyArgs;

const STYLES: Styles = Styles::styled()
    .header(AnsiColor::Yellow.on_default().bold())
    .usage(AnsiColor::Yellow.on_default().bold())
    .literal(AnsiColor::Green.on_default())
    .placeholder(AnsiColor::Cyan.on_default());

const LONG_ABOUT: &str = "\
One file, 4 bits: converts a Hugging Face checkpoint once into a memory-mapped NF4 pack, trains LoRA adapters on it on any GPU \
that Vulkan, Metal or DX12 support, and generates text with them.

Quick start:
  nf4pack convert Qwen3-0.6B q.nf4pack            # once
  nf4pack verify  q.nf4pack --against Qwen3-0.6B  # every checksum, every weight
  nf4pack doctor  q.nf4pack                       # how it will run on this machine's GPU
  nf4pack train   q.nf4pack --data chat.jsonl --out adapter     # PEFT loads the adapter, too
  nf4pack generate q.nf4pack --adapter adapter --chat           # chat with the adapter
  nf4pack export  q.nf4pack Qwen3-0.6B-nf4        # a folder for transformers";

const AFTER_HELP: &str = "\
Exit codes: 0 success, 1 failure (or a damaged pack), 2 wrong usage.

With --json a command prints one JSON document on stdout and everything else on stderr. On failure the document is \
{\"code\", \"error\", \"hint\"}, and `doctor` adds its results so far. The codes are stable: docs/error-codes.md lists them. For a \
damaged pack, `verify` prints its report with \"good\": false. Wrong usage prints nothing on stdout.

`nf4pack COMMAND --help` explains every option, with examples.";

/// The whole command line.
#[derive(Debug, Parser)]
#[command(
    name = "nf4pack",
    version,
    about = "Converts a Hugging Face checkpoint once into a memory-mapped 4-bit file, and trains LoRA adapters on it",
    long_about = LONG_ABOUT,
    after_help = AFTER_HELP,
    styles = STYLES,
    max_term_width = 120
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    Convert(ConvertArgs),
    Inspect(InspectArgs),
    Verify(VerifyArgs),
    Export(ExportArgs),
    Train(Box<TrainArgs>),
    Eval(EvalArgs),
    Generate(Box<GenerateArgs>),
    Merge(MergeArgs),
    Doctor(DoctorArgs),
    Bench(BenchArgs),
    Completions(CompletionsArgs),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::convert::Options;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_defaults_are_those_of_the_library() {
        let Command::Convert(args) = Cli::parse_from(["nf4pack", "convert", "in", "out"]).command else { unreachable!() };
        assert_eq!(format!("{:?}", args.options()), format!("{:?}", Options::default()));
    }
}

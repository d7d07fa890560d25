//! The command line as data: every option with its help. Nothing is decided here.

mod bench;
mod eval;
mod generate;
mod merge;
mod train;

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::builder::styling::{AnsiColor, Styles};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use regex::Regex;
use thiserror::Error;

use crate::convert::Options;
use crate::convert::encode::Encoder;
use crate::format::FloatType;
use crate::format::nf4::ScaleType;
use crate::gpu;
pub use bench::*;
pub use eval::EvalArgs;
pub use generate::GenerateArgs;
pub use merge::MergeArgs;
pub use train::TrainArgs;
pub use train::values::ResumeArg;

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
With --json a command prints one JSON document on stdout and everything else on stderr. On failure it is
{\"code\", \"error\", \"hint\"} (`doctor` adds all that it found). The codes are stable: docs/error-codes.md
lists them. For a damaged pack, `verify` prints its report with \"good\": false. Wrong usage prints nothing on stdout.
`nf4pack COMMAND --help` explains every option, with examples.";

/// Wrong usage that shows only in the combination of options, or in a file of options. The exit
/// code is clap's.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct Usage(pub String);

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

const CONVERT_EXAMPLES: &str = "\
Examples:
  nf4pack convert Qwen3-4B q.nf4pack
  nf4pack convert Qwen3-4B q.nf4pack --scales dq8           # 4.13 bits per weight
  nf4pack convert Qwen3-4B q.nf4pack --keep 'layers\\.0\\.'   # do not quantise layer 0
  nf4pack convert Llama-3-8B l.nf4pack --quantize ^lm_head  # lm_head, too
  nf4pack convert Qwen3-4B q.nf4pack --dry-run              # the plan and the size

OUT appears under its name only when it is whole and on disk: stopped by Ctrl-C, failed or out of space, there is no OUT and no \
temporary file. (If only its folder cannot be made durable at the end, that is an error, and OUT is there.) What is no part of \
the model is named, and left out if it cannot be stored. A process that is killed outright leaves a hidden .nf4pack-*.tmp next to OUT. The same checkpoint and options give the same bytes, whatever the number of threads.";

/// Convert a checkpoint into a pack
#[derive(Debug, Args)]
#[command(after_help = CONVERT_EXAMPLES)]
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

#[derive(Debug, Args)]
pub struct ThreadsArg {
    /// Worker threads; the result does not depend on it [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

#[derive(Debug, Clone, Copy, Args)]
pub struct OutputArgs {
    /// Print one JSON document on stdout (numbers are exact); all else goes to stderr
    #[arg(long)]
    pub json: bool,

    /// Print only errors (and the JSON document)
    #[arg(long)]
    pub quiet: bool,
}

const INSPECT_EXAMPLES: &str = "\
Examples:
  nf4pack inspect qwen3.nf4pack
  nf4pack inspect qwen3.nf4pack --tensors | grep down_proj
  nf4pack inspect qwen3.nf4pack --layer 0
  nf4pack inspect qwen3.nf4pack --json | jq .provenance

Reads only header, index and metadata; `nf4pack verify` checks the rest.";

/// Show the contents of a pack
#[derive(Debug, Args)]
#[command(after_help = INSPECT_EXAMPLES)]
pub struct InspectArgs {
    /// The pack
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,

    /// List every tensor: role, shape, type, offset and bytes
    #[arg(long)]
    pub tensors: bool,

    /// List the tensors of layer N only
    #[arg(long, value_name = "N")]
    pub layer: Option<u32>,

    /// Print one JSON document on stdout (numbers are exact)
    #[arg(long)]
    pub json: bool,
}

const VERIFY_EXAMPLES: &str = "\
Examples:
  nf4pack verify qwen3.nf4pack
  nf4pack verify qwen3.nf4pack --against ./Qwen3-0.6B
  nf4pack verify qwen3.nf4pack --json | jq -r '.faults[]'

Checks every checksum, scale and padding byte on all cores, and names each damaged section. With --against, decodes every \
weight and compares it with the checkpoint: the errors are listed by tensor. A mismatch is an error that no encoder produces, \
a missing tensor, or a copied tensor with a different byte. Faults and mismatches give exit code 1.";

/// Check a pack, alone or against its checkpoint
#[derive(Debug, Args)]
#[command(after_help = VERIFY_EXAMPLES)]
pub struct VerifyArgs {
    /// The pack
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,

    /// The checkpoint that the pack was made from
    #[arg(long, value_name = "SRC", value_hint = ValueHint::AnyPath)]
    pub against: Option<PathBuf>,

    /// A config.json to use instead of the checkpoint's
    #[arg(long, value_name = "FILE", requires = "against", value_hint = ValueHint::FilePath)]
    pub config: Option<PathBuf>,

    #[command(flatten)]
    pub threads: ThreadsArg,

    #[command(flatten)]
    pub output: OutputArgs,
}

const EXPORT_EXAMPLES: &str = "\
Examples:
  nf4pack export qwen3.nf4pack ./Qwen3-0.6B-nf4
  nf4pack export qwen3.nf4pack ./exact --dtype f32

The folder has the weights as .safetensors, and the checkpoint's config and tokenizer files byte for byte, except that
config.json's dtype is the one that can represent all weights.
`AutoModelForCausalLM.from_pretrained(\"./Qwen3-0.6B-nf4\")` loads them in that dtype. The pack is verified first. The
folder appears only when it is complete.";

/// Write a pack back as a folder that transformers loads
#[derive(Debug, Args)]
#[command(after_help = EXPORT_EXAMPLES)]
pub struct ExportArgs {
    /// The pack
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,

    /// The folder to write; it must be new or empty
    #[arg(value_name = "OUT_DIR", value_hint = ValueHint::DirPath)]
    pub target: PathBuf,

    /// Type of the decoded weights; other tensors keep their type
    #[arg(long, value_enum, default_value_t = DtypeArg::Bf16)]
    pub dtype: DtypeArg,

    #[command(flatten)]
    pub output: OutputArgs,
}

const DOCTOR_EXAMPLES: &str = "\
Examples:
  nf4pack doctor
  nf4pack doctor qwen3.nf4pack
  nf4pack doctor qwen3.nf4pack --budget 8GiB   # on a smaller GPU
  nf4pack doctor --gpu llvmpipe --json

Lists the GPUs of Vulkan, Metal and DX12, and opens one (the best, or the one that --gpu or NF4PACK_ADAPTER names). Compares \
every decoding kernel with the CPU, and measures upload and decoding briefly; `nf4pack bench` measures longer. For a pack it \
says whether all layers fit in GPU memory, or how many are streamed at a time; exit code 1 means that two layers do not fit. \
If a step fails, it prints the results so far and ends with exit code 1. With NF4PACK_PROFILE=1 it prints the time of every \
kernel at the end.";

/// Show the GPUs, test their kernels, and show how a pack will run
#[derive(Debug, Args)]
#[command(after_help = DOCTOR_EXAMPLES)]
pub struct DoctorArgs {
    /// A pack to plan for
    #[arg(value_name = "PACK", value_hint = ValueHint::FilePath)]
    pub pack: Option<PathBuf>,

    /// GPU memory to plan with, such as 8GiB or 500MB [default: 90 % of the free GPU memory]
    #[arg(long, value_name = "SIZE", requires = "pack", value_parser = parse_size)]
    pub budget: Option<u64>,

    #[command(flatten)]
    pub gpu: GpuArg,

    /// Print one JSON document on stdout (numbers are exact)
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct GpuArg {
    /// The GPU: its number in `nf4pack doctor`, or a part of its name [default: NF4PACK_ADAPTER, or
    /// the best]
    #[arg(long, value_name = "NUMBER|NAME")]
    pub gpu: Option<String>,
}

impl GpuArg {
    /// The options of [`gpu::Gpu::open`]; the environment supplies what the flags do not set.
    pub fn options(&self) -> gpu::Options {
        let env = gpu::Options::from_env();
        gpu::Options { adapter: self.gpu.clone().or(env.adapter), ..env }
    }
}

/// Units of [`parse_size`]; a unit comes before its own suffixes.
const SIZE_UNITS: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("kB", 1000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

/// `8GiB`, `1.5 GB`, `4096`: a number of bytes.
fn parse_size(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_lowercase();
    let with_unit = |(unit, bytes): &(&str, u64)| Some((lower.strip_suffix(&unit.to_lowercase())?, *bytes));
    let (number, unit) = SIZE_UNITS.iter().find_map(with_unit).unwrap_or((&lower, 1));
    let bytes = number.trim().parse::<f64>().map(|number| number * unit as f64);
    match bytes {
        Ok(bytes) if (1.0..1e18).contains(&bytes) => Ok(bytes as u64),
        _ => Err("a size is a number of bytes with or without a unit: 8GiB, 500MB, 4096".to_owned()),
    }
}

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  nf4pack completions bash > ~/.local/share/bash-completion/completions/nf4pack
  nf4pack completions zsh  > ~/.zfunc/_nf4pack
  nf4pack completions fish > ~/.config/fish/completions/nf4pack.fish";

/// Print a completion script for a shell
#[derive(Debug, Args)]
#[command(after_help = COMPLETIONS_EXAMPLES)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL", value_enum)]
    pub shell: clap_complete::Shell,
}

/// [`Encoder`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EncoderArg {
    /// The scale with the least squared error: 18.5 % less than absmax at the same size (trained
    /// weights, block 64)
    Mse,
    /// The largest magnitude of the block, as in bitsandbytes: faster to encode
    Absmax,
}

impl From<EncoderArg> for Encoder {
    fn from(arg: EncoderArg) -> Self {
        match arg {
            EncoderArg::Mse => Self::Mse,
            EncoderArg::Absmax => Self::Absmax,
        }
    }
}

/// [`ScaleType`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ScalesArg {
    /// bfloat16: 4.25 bits per weight
    Bf16,
    /// float32: 4.5 bits per weight
    F32,
    /// 8-bit with nested float32 scales, as bitsandbytes' double quantisation: 4.13 bits per weight
    Dq8,
}

impl From<ScalesArg> for ScaleType {
    fn from(arg: ScalesArg) -> Self {
        match arg {
            ScalesArg::Bf16 => Self::Bf16,
            ScalesArg::F32 => Self::F32,
            ScalesArg::Dq8 => Self::Dq8,
        }
    }
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

/// The values of [`crate::format::nf4::BLOCK_SIZES`]; clap wants them as text.
const BLOCK_SIZE_NAMES: [&str; 8] = ["32", "64", "128", "256", "512", "1024", "2048", "4096"];

fn block_size_parser() -> impl TypedValueParser<Value = u32> {
    PossibleValuesParser::new(BLOCK_SIZE_NAMES).try_map(|name| name.parse::<u32>())
}

impl ThreadsArg {
    /// The value for [`Options::threads`].
    pub fn non_zero(&self) -> Option<NonZeroUsize> {
        self.threads.and_then(|n| NonZeroUsize::new(usize::from(n)))
    }

    /// The value for verify: 0 is one per core.
    pub fn or_zero(&self) -> usize {
        self.threads.map_or(0, usize::from)
    }
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
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::format::nf4::BLOCK_SIZES;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn block_sizes_are_those_of_the_library() {
        assert_eq!(BLOCK_SIZE_NAMES.map(|name| name.parse::<u32>().unwrap()), BLOCK_SIZES);
    }

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [("8GiB", 8 << 30), ("1.5 gb", 1_500_000_000), ("4096", 4096), ("7B", 7), ("2kib", 2048)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for wrong in ["", "GiB", "8 apples", "-1", "0", "nan", "inf", "1e30", "8GiBB"] {
            assert!(parse_size(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_defaults_are_those_of_the_library() {
        let Command::Convert(args) = Cli::parse_from(["nf4pack", "convert", "in", "out"]).command else { unreachable!() };
        assert_eq!(format!("{:?}", args.options()), format!("{:?}", Options::default()));
    }
}

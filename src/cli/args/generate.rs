//! `nf4pack generate` as data.

use std::path::PathBuf;

use clap::{ArgGroup, Args, ValueHint};

use super::{GpuArg, parse_size};
use crate::model::generate::sampling::{Sampler, SamplerOptions};

const EXAMPLES: &str = "\
Examples:
  nf4pack generate qwen3.nf4pack --prompt 'Once upon a time'
  nf4pack generate qwen3.nf4pack --adapter adapter --chat
  nf4pack generate qwen3.nf4pack --chat --system 'Answer in one word.' < questions.txt
  nf4pack generate qwen3.nf4pack --prompt 'A haiku:' --temperature 0.7 --top-p 0.9 --seed 3
  nf4pack generate qwen3.nf4pack --prompt 'Once' --json | jq -r .text

--prompt goes on with a text as it stands; --chat asks with the model's chat template, a line of stdin for each turn, and remembers \
the turns before; the oldest are forgotten where --context is full. Text goes to stdout as it comes, how fast it came to stderr. Ctrl-C ends an answer; where \
questions are typed, the next one may follow, and another Ctrl-C (or Ctrl-D) ends the program.

Without --temperature, --top-k, --top-p and --seed the likeliest token is always chosen: the same prompt gives the same text. The \
filters are those of transformers, in the same order: temperature, top-k, top-p.";

/// Go on with a text, or answer in a chat, with or without an adapter
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, group = ArgGroup::new("what").required(true).args(["prompt", "chat"]))]
pub struct GenerateArgs {
    /// The pack
    #[arg(value_name = "PACK", value_hint = ValueHint::FilePath)]
    pub pack: PathBuf,

    /// A LoRA adapter for the pack's model: a folder that `nf4pack train` or PEFT wrote
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub adapter: Option<PathBuf>,

    /// The text to go on with
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,

    /// Answer each line of stdin
    #[arg(long)]
    pub chat: bool,

    /// What the model is told before the first turn
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,

    /// The most tokens of an answer
    #[arg(long, value_name = "N", default_value = "256", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,

    /// The most tokens that are remembered, prompt and answers [default: what --prompt needs, 4096 with --chat]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub context: Option<u32>,

    #[command(flatten)]
    pub sampling: SamplingArgs,

    /// GPU memory to take at most, such as 8GiB: layers that do not fit are streamed [default: nine tenths of what the device has left]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub vram_budget: Option<u64>,

    #[command(flatten)]
    pub gpu: GpuArg,

    /// Print one JSON document on stdout, at the end (numbers are exact)
    #[arg(long, conflicts_with = "chat")]
    pub json: bool,
}

/// How tokens are chosen.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// What the model's scores are divided by: less than 1 is safer, more is wilder, 0 is always the likeliest token [default: 0; 1
    /// with --top-k, --top-p or --seed]
    #[arg(long, allow_negative_numbers = true, value_name = "T", value_parser = temperature)]
    pub temperature: Option<f64>,

    /// Choose among the K likeliest tokens only [default: among all]
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    pub top_k: Option<u32>,

    /// Choose among the likeliest tokens only that together have this probability [default: 1]
    #[arg(long, allow_negative_numbers = true, value_name = "P", value_parser = top_p)]
    pub top_p: Option<f64>,

    /// The seed of the choice: the same seed gives the same text [default: 0]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

fn temperature(text: &str) -> Result<f64, String> {
    sampled_with(text, |temperature| SamplerOptions { temperature, ..SamplerOptions::GREEDY })
}

fn top_p(text: &str) -> Result<f64, String> {
    sampled_with(text, |top_p| SamplerOptions { top_p, ..SamplerOptions::GREEDY })
}

/// A number that a sampler takes as one of its options.
fn sampled_with(text: &str, options: fn(f64) -> SamplerOptions) -> Result<f64, String> {
    let number = text.parse().map_err(|_| "it should be a number".to_owned())?;
    Sampler::new(options(number)).map_err(|e| e.to_string())?;
    Ok(number)
}

impl From<&SamplingArgs> for SamplerOptions {
    fn from(args: &SamplingArgs) -> Self {
        let &SamplingArgs { temperature, top_k, top_p, seed } = args;
        // Who asks for a choice gets one.
        let chooses = top_k.is_some() || top_p.is_some() || seed.is_some();
        Self {
            temperature: temperature.unwrap_or(if chooses { 1.0 } else { 0.0 }),
            top_k: top_k.unwrap_or(Self::GREEDY.top_k),
            top_p: top_p.unwrap_or(Self::GREEDY.top_p),
            seed: seed.unwrap_or(Self::GREEDY.seed),
        }
    }
}

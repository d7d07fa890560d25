//! `nf4pack generate` as data.

use std::path::PathBuf;

use clap::{ArgGroup, Args, ValueHint};

use super::common::{ComputeArgs, GpuArg, LoadArgs, parse_size};
use crate::model::generate::sampling::{Sampler, SamplerOptions};

const EXAMPLES: &str = "\
Examples:
  nf4pack generate qwen3.nf4pack --prompt 'Once upon a time'
  nf4pack generate qwen3.nf4pack --adapter adapter --chat
  nf4pack generate qwen3.nf4pack --chat --system 'Answer in one word.' < questions.txt
  nf4pack generate qwen3.nf4pack --prompt 'A haiku:' --temperature 0.7 --top-p 0.9 --seed 3
  nf4pack generate qwen3.nf4pack --prompt 'Once' --json | jq -r .text

--prompt continues a text without a template. --chat uses the model's chat template, with one line of stdin per turn. It keeps \
earlier turns and drops the oldest ones when --context is full. Text streams to stdout, the speed goes to stderr. Ctrl-C ends an \
answer; on a terminal the next question may follow, and another Ctrl-C (or Ctrl-D) ends the program.

Without --temperature, --top-k, --top-p, --min-p and --seed, decoding is greedy: the same prompt gives the same text. The filters are \
those of transformers, in the same order: temperature, top-k, top-p, min-p.";

/// Continue a text, or answer in a chat, with or without an adapter
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, group = ArgGroup::new("what").required(true).args(["prompt", "chat"]))]
pub struct GenerateArgs {
    /// The pack
    #[arg(value_name = "PACK", value_hint = ValueHint::FilePath)]
    pub pack: PathBuf,

    #[command(flatten)]
    pub load: LoadArgs,

    /// A LoRA adapter for the pack's model: a folder that `nf4pack train` or PEFT wrote
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub adapter: Option<PathBuf>,

    /// The text to continue
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,

    /// Answer each line of stdin
    #[arg(long)]
    pub chat: bool,

    /// The system prompt
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,

    /// Maximum number of new tokens
    #[arg(long, value_name = "N", default_value = "256", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,

    /// Maximum number of tokens in the context, prompt and answers [default: what --prompt needs,
    /// 4096 with --chat]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub context: Option<u32>,

    #[command(flatten)]
    pub sampling: SamplingArgs,

    /// Maximum GPU memory, such as 8GiB: layers that do not fit are streamed [default: 90 % of the
    /// free GPU memory]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub vram_budget: Option<u64>,

    #[command(flatten)]
    pub compute: ComputeArgs,

    #[command(flatten)]
    pub gpu: GpuArg,

    /// Print one JSON document on stdout, at the end (numbers are exact)
    #[arg(long, conflicts_with = "chat")]
    pub json: bool,
}

/// How tokens are sampled.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Divisor of the logits: below 1 is more predictable, above 1 more varied, 0 is greedy
    /// [default: 0; 1 with --top-k, --top-p, --min-p or --seed]
    #[arg(long, allow_negative_numbers = true, value_name = "T", value_parser = temperature)]
    pub temperature: Option<f64>,

    /// Sample only from the K likeliest tokens [default: all]
    #[arg(long, value_name = "K", value_parser = clap::value_parser!(u32).range(1..))]
    pub top_k: Option<u32>,

    /// Sample only from the likeliest tokens that together have this probability [default: 1]
    #[arg(long, allow_negative_numbers = true, value_name = "P", value_parser = top_p)]
    pub top_p: Option<f64>,

    /// Sample only from the tokens with this share of the probability of the likeliest [default: 0]
    #[arg(long, allow_negative_numbers = true, value_name = "P", value_parser = min_p)]
    pub min_p: Option<f64>,

    /// Seed of sampling: the same seed gives the same text [default: 0]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
}

fn temperature(text: &str) -> Result<f64, String> {
    sampled_with(text, |temperature| SamplerOptions { temperature, ..SamplerOptions::GREEDY })
}

fn top_p(text: &str) -> Result<f64, String> {
    sampled_with(text, |top_p| SamplerOptions { top_p, ..SamplerOptions::GREEDY })
}

fn min_p(text: &str) -> Result<f64, String> {
    sampled_with(text, |min_p| SamplerOptions { min_p, ..SamplerOptions::GREEDY })
}

/// A number that a sampler takes as one of its options.
fn sampled_with(text: &str, options: fn(f64) -> SamplerOptions) -> Result<f64, String> {
    let number = text.parse().map_err(|_| "it should be a number".to_owned())?;
    Sampler::new(options(number)).map_err(|e| e.to_string())?;
    Ok(number)
}

impl From<&SamplingArgs> for SamplerOptions {
    fn from(args: &SamplingArgs) -> Self {
        let &SamplingArgs { temperature, top_k, top_p, min_p, seed } = args;
        // These flags turn sampling on.
        let chooses = top_k.is_some() || top_p.is_some() || min_p.is_some() || seed.is_some();
        Self {
            temperature: temperature.unwrap_or(if chooses { 1.0 } else { 0.0 }),
            top_k: top_k.unwrap_or(Self::GREEDY.top_k),
            top_p: top_p.unwrap_or(Self::GREEDY.top_p),
            min_p: min_p.unwrap_or(Self::GREEDY.min_p),
            seed: seed.unwrap_or(Self::GREEDY.seed),
        }
    }
}

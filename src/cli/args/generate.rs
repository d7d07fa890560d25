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
  nf4pack generate qwen3.nf4pack --prompt 'Q: 1+1? A:' --stop 'Q:'
  nf4pack generate qwen3.nf4pack --prompt 'Once' --json | jq -r .text
  nf4pack generate qwen3.nf4pack --chat --json < questions.txt | jq -r .text    # a line of JSON for each answer

--prompt continues a text without a template. --chat uses the model's chat template, with one line of stdin per turn. It keeps \
earlier turns and drops the oldest ones when --context is full. Text streams to stdout, the speed goes to stderr. Ctrl-C ends an \
answer; on a terminal the next question may follow, and another Ctrl-C (or Ctrl-D) ends the program. In a chat, /clear forgets \
the turns, /system TEXT starts again with another system prompt, /save FILE adds the chat to FILE as a line that `nf4pack train \
--data` reads, and /help lists these. On a terminal, a line that ends with \\ continues on the next line.

If the model's generation_config.json has \"do_sample\": true, tokens are sampled with its temperature, top_k, top_p and min_p; \
flags replace them one by one, and --greedy takes the likeliest token instead. Without such a file, and without --temperature, \
--top-k, --top-p, --min-p and --seed, decoding is greedy: the same prompt gives the same text. The filters are \
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
    #[arg(long, alias = "max-new-tokens", value_name = "N", default_value = "256", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_tokens: u32,

    /// Maximum number of tokens in the context, prompt and answers [default: what --prompt needs,
    /// 4096 with --chat]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub context: Option<u32>,

    /// End a text before this string; may be repeated. The string is not printed
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,

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

    /// Print one JSON document on stdout, at the end, or with --chat a line of JSON for each answer
    /// (numbers are exact)
    #[arg(long)]
    pub json: bool,
}

/// How tokens are sampled.
#[derive(Debug, Args)]
pub struct SamplingArgs {
    /// Always take the likeliest token, whatever generation_config.json says
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p", "seed"])]
    pub greedy: bool,

    /// Divisor of the logits: below 1 is more predictable, above 1 more varied, 0 is greedy
    /// [default: that of generation_config.json, or 0; 1 with --top-k, --top-p, --min-p or --seed]
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

impl SamplingArgs {
    /// The flags, completed by the options of the model's generation_config.json.
    pub fn over(&self, model: Option<SamplerOptions>) -> SamplerOptions {
        let &Self { greedy, temperature, top_k, top_p, min_p, seed } = self;
        if greedy {
            return SamplerOptions::GREEDY;
        }
        // These flags turn sampling on.
        let chooses = top_k.is_some() || top_p.is_some() || min_p.is_some() || seed.is_some();
        let sampled = SamplerOptions { temperature: if chooses { 1.0 } else { 0.0 }, ..SamplerOptions::GREEDY };
        let default = model.unwrap_or(sampled);
        SamplerOptions {
            temperature: temperature.unwrap_or(default.temperature),
            top_k: top_k.unwrap_or(default.top_k),
            top_p: top_p.unwrap_or(default.top_p),
            min_p: min_p.unwrap_or(default.min_p),
            seed: seed.unwrap_or(default.seed),
        }
    }
}

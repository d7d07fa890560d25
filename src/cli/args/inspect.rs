//! `nf4pack inspect` as data.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::common::ReadArgs;

const EXAMPLES: &str = "\
Examples:
  nf4pack inspect qwen3.nf4pack
  nf4pack inspect qwen3.nf4pack --tensors | grep down_proj
  nf4pack inspect qwen3.nf4pack --layer 0
  nf4pack inspect qwen3.nf4pack --json | jq .provenance

Reads only header, index, metadata and config.json; `nf4pack verify` checks the rest.";

/// Show the contents of a pack
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct InspectArgs {
    /// The pack
    #[arg(value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub file: PathBuf,

    #[command(flatten)]
    pub read: ReadArgs,

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

//! `nf4pack eval`.

use anyhow::{Result, bail};

use super::Outcome;
use super::args::EvalArgs;

pub fn run(args: &EvalArgs) -> Result<Outcome> {
    bail!("not joined yet: {args:?}, {:?}", args.micro_batch())
}

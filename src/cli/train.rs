//! `nf4pack train`.

use anyhow::{Result, bail};

use super::Outcome;
use super::args::TrainArgs;

pub fn run(args: &TrainArgs) -> Result<Outcome> {
    let options = args.merged()?;
    let _settings = options.settings()?;
    options.data()?;
    if !args.show_batch {
        options.out()?;
    }
    bail!("not joined yet: {}", options.to_toml()?)
}

//! `nf4pack completions`.

use clap::CommandFactory;

use super::args::{Cli, CompletionsArgs};
use super::outcome::Outcome;
use super::ui;

pub fn run(args: &CompletionsArgs) -> anyhow::Result<Outcome> {
    // Into memory first: clap_complete panics where its writer fails, as a closed pipe does.
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "nf4pack", &mut script);
    ui::print(&String::from_utf8_lossy(&script))?;
    Ok(Outcome::Good)
}

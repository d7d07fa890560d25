//! `nf4pack completions` as data.

use clap::Args;

const EXAMPLES: &str = "\
Examples:
  nf4pack completions bash > ~/.local/share/bash-completion/completions/nf4pack
  nf4pack completions zsh  > ~/.zfunc/_nf4pack
  nf4pack completions fish > ~/.config/fish/completions/nf4pack.fish";

/// Print a completion script for a shell
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL", value_enum)]
    pub shell: clap_complete::Shell,
}

//! The `nf4pack` program: see [`nf4pack::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    nf4pack::cli::run(std::env::args_os())
}

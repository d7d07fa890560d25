//! The `nf4pack` program: see [`nf4pack::cli`].
#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    nf4pack::cli::run(std::env::args_os())
}

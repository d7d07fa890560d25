//! The command line: the only part that prints, and the only one that sees clap, indicatif and
//! anyhow. It never names wgpu.
#![allow(unnameable_types, reason = "only main uses this module")]

mod adapter;
mod args;
mod bench;
mod completions;
mod convert;
mod device;
mod doctor;
mod eval;
mod export;
mod failure;
mod generate;
mod inspect;
mod merge;
mod model;
mod open;
mod outcome;
mod process;
mod report;
mod train;
mod ui;
mod verify;

use std::ffi::OsString;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use clap::Parser;

use args::{BenchCommand, Cli, Command};
use outcome::Outcome;
use process::Bug;

/// Runs the program with these arguments, first its own name: 0 is success, 1 failure, 2 wrong
/// usage.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    process::prepare();
    let args: Vec<OsString> = args.into_iter().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => {
            let error = Cli::try_parse_from(ui::visible_arguments(&args)).err().unwrap_or(error);
            ui::print_usage(&error);
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let command = &cli.command;
    process::without_desktop(command, &args);
    let work = || process::start_threads(command).map_err(anyhow::Error::from).and_then(|()| dispatch(command));
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(Outcome::Good)) => ExitCode::SUCCESS,
        Ok(Ok(Outcome::Bad)) => ExitCode::FAILURE,
        Ok(Err(error)) => failure::report(&error, command),
        Err(panic) => failure::report_bug(Bug::new(&*panic), command),
    }
}

fn dispatch(command: &Command) -> anyhow::Result<Outcome> {
    match command {
        Command::Convert(args) => convert::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Export(args) => export::run(args),
        Command::Train(args) => train::run(args),
        Command::Eval(args) => eval::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Merge(args) => merge::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Bench(args) => match &args.what {
            BenchCommand::Convert(args) => bench::convert::run(args),
            BenchCommand::Dequant(args) => bench::dequant::run(args),
            BenchCommand::Matmul(args) => bench::matmul::run(args),
            BenchCommand::Upload(args) => bench::upload::run(args),
            BenchCommand::Stream(args) => bench::stream::run(args),
            BenchCommand::Train(args) => bench::train::run(args),
            BenchCommand::Longest(args) => bench::longest::run(args),
            BenchCommand::Generate(args) => bench::generate::run(args),
        },
        Command::Completions(args) => completions::run(args),
    }
}

impl Command {
    /// Whether the caller wants JSON, on failure too.
    fn json(&self) -> bool {
        match self {
            Self::Convert(args) => args.output.json,
            Self::Inspect(args) => args.json,
            Self::Verify(args) => args.output.json,
            Self::Export(args) => args.output.json,
            Self::Train(args) => args.json,
            Self::Eval(args) => args.json,
            Self::Generate(args) => args.json,
            Self::Merge(args) => args.output.json,
            Self::Doctor(args) => args.json,
            Self::Bench(args) => args.what.json(),
            Self::Completions(_) => false,
        }
    }
}

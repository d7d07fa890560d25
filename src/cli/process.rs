//! What the program sets up before a command runs: a hook for panics, signals, and the thread pool.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic::PanicHookInfo;

use clap::builder::styling::AnsiColor;

use super::args::Command;
use super::ui;
use crate::panics;

/// A panic. Its hook printed it.
#[derive(Debug, thiserror::Error)]
#[error("this is a bug in nf4pack: {message}")]
pub struct Bug {
    message: String,
}

impl Bug {
    /// What to do about a bug.
    pub const HINT: &str = "please report it, with the whole message, the command and the output of `nf4pack --version`; \
                            outputs that were not finished are not used";

    pub fn new(panic: &(dyn Any + Send)) -> Self {
        Self { message: panics::message(panic) }
    }
}

/// The threads of a command could not be started.
#[derive(Debug, thiserror::Error)]
#[error("cannot start the worker threads: {0}")]
pub struct NoThreads(#[from] rayon::ThreadPoolBuildError);

impl NoThreads {
    pub const HINT: &str =
        "raise `ulimit -u` or `ulimit -v`, or start fewer threads with RAYON_NUM_THREADS=1 in the environment";
}

/// Makes a panic readable, and a file that grows beyond `ulimit -f` an error instead of a signal
/// that ends the program.
pub fn prepare() {
    std::panic::set_hook(Box::new(print_bug));
    ignore_file_size_signal();
}

/// Prints a panic, unless it becomes an error.
fn print_bug(info: &PanicHookInfo<'_>) {
    if panics::expected() {
        return;
    }
    let place = info.location().map_or_else(String::new, |place| format!(" ({place})"));
    let bug = Bug::new(info.payload());
    ui::labelled("error", AnsiColor::Red, &format!("{bug}{place}"));
    ui::labelled("hint", AnsiColor::Cyan, Bug::HINT);
    let trace = Backtrace::capture();
    if trace.status() == BacktraceStatus::Captured {
        ui::say(&trace.to_string());
    }
}

/// With a handler in place of the default action, a write beyond the limit fails with EFBIG.
#[cfg(unix)]
fn ignore_file_size_signal() {
    // Without the handler the program only ends without a message.
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, std::sync::Arc::default());
}

#[cfg(not(unix))]
fn ignore_file_size_signal() {}

/// Starts the threads that a command shares with the libraries it uses. Started on first use, they
/// would panic where the system allows no more threads.
///
/// # Errors
/// [`NoThreads`].
pub fn start_threads(command: &Command) -> Result<(), NoThreads> {
    match command {
        Command::Export(_)
        | Command::Train(_)
        | Command::Eval(_)
        | Command::Generate(_)
        | Command::Merge(_)
        | Command::Doctor(_)
        | Command::Bench(_) => Ok(rayon::ThreadPoolBuilder::new().build_global()?),
        // These have pools of their own, with --threads, or need no threads.
        Command::Convert(_) | Command::Verify(_) | Command::Inspect(_) | Command::Completions(_) => Ok(()),
    }
}

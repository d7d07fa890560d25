//! What the program sets up before a command runs: a hook for panics, signals, and the thread pool.

use std::any::Any;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::ffi::OsString;
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

/// A folder that does not exist, so nobody can listen in it.
#[cfg(target_os = "linux")]
const NO_FOLDER: &str = "/nonexistent";

/// Where XDG_RUNTIME_DIR is unset, starts the program again in the same process, with a folder that
/// does not exist. Without the variable, Mesa's drivers print an error on machines without a
/// desktop. A process with threads cannot set variables safely, and a new program image can. If
/// that fails, the command just runs.
#[cfg(target_os = "linux")]
pub fn without_desktop(command: &Command, arguments: &[OsString]) {
    use std::os::unix::process::CommandExt as _;

    const NAME: &str = "XDG_RUNTIME_DIR";
    if !opens_gpu(command) || std::env::var_os(NAME).is_some_and(|folder| !folder.is_empty()) {
        return;
    }
    if let (Ok(program), [name, arguments @ ..]) = (std::env::current_exe(), arguments) {
        let _error = std::process::Command::new(program).arg0(name).args(arguments).env(NAME, NO_FOLDER).exec();
    }
}

#[cfg(not(target_os = "linux"))]
pub fn without_desktop(_: &Command, _: &[OsString]) {}

/// Whether a command may open a GPU.
#[cfg(target_os = "linux")]
fn opens_gpu(command: &Command) -> bool {
    match command {
        Command::Train(_)
        | Command::Eval(_)
        | Command::Generate(_)
        | Command::Merge(_)
        | Command::Doctor(_)
        | Command::Bench(_) => true,
        Command::Convert(_) | Command::Verify(_) | Command::Inspect(_) | Command::Export(_) | Command::Completions(_) => {
            false
        }
    }
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

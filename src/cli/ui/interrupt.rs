//! Ctrl-C and SIGTERM.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;

use super::door::say;

/// Ctrl-C stopped the work: results are saved, partial output is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stopped before the end")]
pub struct Cancelled;

/// Set by Ctrl-C and SIGTERM; every long-running command checks it.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// Whether Ctrl-C or SIGTERM was received.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Whether Ctrl-C or SIGTERM was received; clears it.
pub fn take_interrupt() -> bool {
    INTERRUPTED.swap(false, Ordering::Relaxed)
}

/// Fails if Ctrl-C or SIGTERM was received.
///
/// # Errors
/// [`Cancelled`].
pub fn not_interrupted() -> Result<(), Cancelled> {
    if interrupted() { Err(Cancelled) } else { Ok(()) }
}

/// Makes Ctrl-C and SIGTERM stop the command in order: it saves what it can and removes partial
/// output. A second signal ends the program at once.
///
/// # Errors
/// If the system refuses to set a handler.
pub fn handle_interrupts() -> anyhow::Result<()> {
    handle_interrupts_with(|| {})
}

/// As [`handle_interrupts`]; `acknowledge` is called at the first signal.
///
/// # Errors
/// As [`handle_interrupts`].
pub fn handle_interrupts_with(acknowledge: impl Fn() + Send + 'static) -> anyhow::Result<()> {
    let on_signal = move || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            say("\nended at once; temporary files may be left");
            std::process::exit(1);
        }
        acknowledge();
    };
    // Tests run several commands in one process, which has one handler.
    if cfg!(test) { Ok(()) } else { ctrlc::set_handler(on_signal).context("cannot handle Ctrl-C") }
}

//! A last net below the library `tokenizers`, and work that can be left behind.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use super::error::DataError;

/// Interval at which a wait asks whether to go on.
const PATIENCE: Duration = Duration::from_millis(20);

thread_local! {
    /// Whether a panic of this thread becomes an error.
    static CATCHES: Cell<bool> = const { Cell::new(false) };
}

/// Whether a panic of this thread becomes an error, so that no message of it is due.
#[cfg(feature = "cli")]
pub(crate) fn catches_panics() -> bool {
    CATCHES.get()
}

/// Runs `work`; the message of a panic is the error. `work` changes nothing that is used after a
/// panic.
pub(super) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let outer = CATCHES.replace(true);
    let done = catch_unwind(AssertUnwindSafe(work));
    CATCHES.set(outer);
    done.map_err(message)
}

fn message(panic: Box<dyn Any + Send>) -> String {
    match panic.downcast::<String>() {
        Ok(message) => *message,
        Err(panic) => panic.downcast_ref::<&str>().copied().unwrap_or("a panic without a message").to_owned(),
    }
}

/// Runs `work` on a thread of its own while `proceeds` says so; it is asked all the time. When it
/// does not, the thread is left behind: nothing in the library `tokenizers` can be interrupted.
///
/// # Errors
/// [`DataError::Cancelled`]; [`DataError::NoThread`]; those of the work.
pub(crate) fn interruptible<T: Send + 'static>(
    proceeds: &mut dyn FnMut() -> bool,
    work: impl FnOnce() -> Result<T, DataError> + Send + 'static,
) -> Result<T, DataError> {
    let (sender, receiver) = mpsc::sync_channel(1);
    // No receiver is left where the work was left behind.
    let run = move || drop(sender.send(work()));
    thread::Builder::new().name("tokens".to_owned()).spawn(run).map_err(DataError::NoThread)?;
    loop {
        match receiver.recv_timeout(PATIENCE) {
            Ok(done) => return done,
            Err(RecvTimeoutError::Timeout) if proceeds() => {}
            Err(RecvTimeoutError::Timeout) => return Err(DataError::Cancelled),
            Err(RecvTimeoutError::Disconnected) => return Err(DataError::Panicked),
        }
    }
}

//! Work that the caller can stop waiting for.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use super::error::DataError;

/// Time between two calls of `proceeds`.
const INTERVAL: Duration = Duration::from_millis(20);

/// Runs `work` on a thread of its own, and calls `proceeds` meanwhile. If that returns `false`, the
/// result is not waited for. The thread runs on: the library `tokenizers` cannot be interrupted.
///
/// # Errors
/// [`DataError::Cancelled`]; [`DataError::NoThread`]; those of the work.
pub(crate) fn interruptible<T: Send + 'static>(
    proceeds: &mut dyn FnMut() -> bool,
    work: impl FnOnce() -> Result<T, DataError> + Send + 'static,
) -> Result<T, DataError> {
    let (sender, receiver) = mpsc::sync_channel(1);
    // Nobody receives a result that is not waited for.
    let run = move || drop(sender.send(work()));
    thread::Builder::new().name("tokens".to_owned()).spawn(run).map_err(DataError::NoThread)?;
    loop {
        match receiver.recv_timeout(INTERVAL) {
            Ok(done) => return done,
            Err(RecvTimeoutError::Timeout) if proceeds() => {}
            Err(RecvTimeoutError::Timeout) => return Err(DataError::Cancelled),
            Err(RecvTimeoutError::Disconnected) => return Err(DataError::Panicked),
        }
    }
}

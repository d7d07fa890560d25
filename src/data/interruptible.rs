//! Work that can be left behind.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use super::error::DataError;

/// Interval at which a wait asks whether to go on.
const PATIENCE: Duration = Duration::from_millis(20);

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

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

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn work_of_many_callers_at_the_same_time_gives_its_own_results() {
        thread::scope(|scope| {
            for caller in 0..8_u32 {
                scope.spawn(move || {
                    for round in 0..16 {
                        let text = interruptible(&mut || true, move || Ok(format!("{caller} {round}"))).unwrap();
                        assert_eq!(text, format!("{caller} {round}"));
                    }
                });
            }
        });
    }

    #[test]
    fn work_that_is_left_behind_runs_to_its_end() {
        let ((go, wait), (done, end)) = (mpsc::channel::<()>(), mpsc::channel());
        let work = move || {
            wait.recv().unwrap();
            done.send(vec![7; 1000]).unwrap();
            Ok(vec![8; 1000])
        };
        let mut calls = 0;
        let stopped = interruptible(
            &mut || {
                calls += 1;
                calls < 3
            },
            work,
        );
        assert!(matches!(stopped, Err(DataError::Cancelled)), "{stopped:?}");
        go.send(()).unwrap();
        assert_eq!(end.recv().unwrap(), [7; 1000]);
    }

    #[test]
    fn errors_and_panics_of_the_work_are_errors() {
        let error = interruptible::<()>(&mut || true, || Err(DataError::Cancelled)).unwrap_err();
        assert!(matches!(error, DataError::Cancelled), "{error}");
        let error = interruptible::<()>(&mut || true, || panic!("of a library")).unwrap_err();
        assert!(matches!(error, DataError::Panicked), "{error}");
    }
}

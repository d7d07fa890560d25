//! Panics of dependencies as errors.

use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    /// The number of [`caught`] calls that this thread is in.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
}

/// Runs `work` and returns the message of a panic as the error. After a panic the caller must not
/// use what `work` changed.
///
/// # Errors
/// The message of the panic.
pub(crate) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    DEPTH.set(DEPTH.get() + 1);
    let result = catch_unwind(AssertUnwindSafe(work));
    DEPTH.set(DEPTH.get() - 1);
    result.map_err(|panic| message(&*panic))
}

/// Whether a panic of this thread becomes an error, which is printed in its place.
#[cfg(feature = "cli")]
pub(crate) fn expected() -> bool {
    DEPTH.get() > 0
}

/// The message of a panic.
pub(crate) fn message(panic: &(dyn Any + Send)) -> String {
    let literal = || panic.downcast_ref::<&str>().copied().unwrap_or("a panic without a message").to_owned();
    panic.downcast_ref::<String>().cloned().unwrap_or_else(literal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn panics_become_errors() {
        assert_eq!(caught(|| 7), Ok(7));
        assert_eq!(caught(|| -> u8 { panic!("a literal") }), Err("a literal".to_owned()));
        let number = 8;
        assert_eq!(caught(|| -> u8 { panic!("number {number}") }), Err("number 8".to_owned()));
        assert_eq!(DEPTH.get(), 0);
    }
}

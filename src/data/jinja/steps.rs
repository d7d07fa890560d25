//! What a rendering may take. A template is a stranger's: it shall neither run for ever nor fill
//! the memory.
//!
//! Every operation whose time or memory grows with its operands draws from one budget of the
//! thread: [`with_stack`](super::with_stack) starts a thread for each conversation.

use std::borrow::Cow;
use std::cell::Cell;

use super::error::{ErrorKind, Result};

/// Steps of a rendering. One is an expression, a statement, 64 bytes of text or half an item.
const STEPS: u64 = 5_000_000;
/// Steps of all renderings of a conversation: its spans are found by further ones.
const ALL_STEPS: u64 = 8 * STEPS;
/// Bytes of text that one step pays for.
const BYTES: usize = 64;
/// Bytes of a text that a template makes, at most.
const MAX_LENGTH: usize = 16 << 20;

thread_local! {
    /// Without a limit where nothing is rendered.
    static LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    static LEFT_OF_ALL: Cell<u64> = const { Cell::new(ALL_STEPS) };
}

/// Runs a rendering with a budget of its own, within that of the thread.
pub(super) fn rendering<T>(work: impl FnOnce() -> T) -> T {
    let all = LEFT_OF_ALL.get();
    let own = all.min(STEPS);
    LEFT.set(own);
    let done = work();
    LEFT_OF_ALL.set(all - (own - LEFT.replace(u64::MAX)));
    done
}

/// Leaves this thread fewer steps, for tests: spending all is slow without optimisation.
#[cfg(test)]
pub(super) fn leave(steps: u64) {
    LEFT_OF_ALL.set(steps);
}

/// Fails where the renderings of this thread took all that they may.
pub(super) fn check_all() -> Result<()> {
    match LEFT_OF_ALL.get() {
        0 => Err(ErrorKind::Limit("takes more than 40,000,000 steps in the renderings that find the answers")),
        _ => Ok(()),
    }
}

/// Spends what reading bytes of a text takes, of the budget of all renderings.
pub(super) fn charge_all(bytes: usize) {
    LEFT_OF_ALL.set(LEFT_OF_ALL.get().saturating_sub((bytes / BYTES) as u64));
}

/// Spends steps; the next [`spend`] fails where there were too few.
pub(super) fn charge(steps: usize) {
    LEFT.set(LEFT.get().saturating_sub(steps as u64));
}

/// Spends steps.
pub(super) fn spend(steps: usize) -> Result<()> {
    charge(steps);
    if LEFT.get() == 0 { Err(ErrorKind::Limit("takes more than 5,000,000 steps")) } else { Ok(()) }
}

/// Spends what making or moving items takes.
pub(super) fn spend_items(items: usize) -> Result<()> {
    spend(items.saturating_mul(2))
}

/// Spends what reading bytes of a text takes; these steps.
pub(super) fn spend_read(bytes: usize) -> Result<usize> {
    spend(bytes / BYTES)?;
    Ok(bytes / BYTES)
}

/// Spends what adding bytes to a text of a length takes; fails before the text is too long.
pub(super) fn spend_bytes(length: usize, bytes: usize) -> Result<()> {
    spend(bytes / BYTES)?;
    checked_length(length.saturating_add(bytes))
}

/// Fails for a text that is too long.
pub(super) fn checked_length(length: usize) -> Result<()> {
    if length > MAX_LENGTH { Err(ErrorKind::Limit("makes a text that is too long")) } else { Ok(()) }
}

/// Bytes of a text that is put together from parts.
#[derive(Default)]
pub(super) struct Length(usize);

impl Length {
    /// Adds a part; fails before the text is too long.
    pub(super) fn add(&mut self, bytes: usize) -> Result<()> {
        spend_bytes(self.0, bytes)?;
        self.0 += bytes;
        Ok(())
    }
}

/// A text that is written piece by piece. It spends what that takes, and fails before it is too
/// long.
#[derive(Default)]
pub(super) struct Writer {
    text: String,
    /// Bytes that no step has paid for.
    unpaid: usize,
}

impl Writer {
    /// Adds a piece.
    pub(super) fn push_str(&mut self, piece: &str) -> Result<()> {
        checked_length(self.text.len().saturating_add(piece.len()))?;
        self.unpaid += piece.len();
        if self.unpaid >= BYTES {
            spend(self.unpaid / BYTES)?;
            self.unpaid %= BYTES;
        }
        self.text.push_str(piece);
        Ok(())
    }

    /// Adds a character.
    pub(super) fn push(&mut self, c: char) -> Result<()> {
        self.push_str(c.encode_utf8(&mut [0; 4]))
    }

    /// Adds a text in which some characters are written in another way.
    pub(super) fn push_escaped(&mut self, text: &str, escape: impl Fn(char) -> Option<Cow<'static, str>>) -> Result<()> {
        let mut written = 0;
        for (at, c) in text.char_indices() {
            if let Some(escaped) = escape(c) {
                self.push_str(text.get(written..at).unwrap_or_default())?;
                self.push_str(&escaped)?;
                written = at + c.len_utf8();
            }
        }
        self.push_str(text.get(written..).unwrap_or_default())
    }

    /// The text.
    pub(super) fn finish(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::jinja::json::JsonStyle;
    use crate::data::jinja::value::Value;

    /// The steps that a work takes.
    fn taken<T>(work: impl FnOnce() -> T) -> (T, u64) {
        rendering(|| {
            let before = LEFT.get();
            let done = work();
            (done, before - LEFT.get())
        })
    }

    #[test]
    fn writing_takes_steps() {
        let text = Value::from("x".repeat(64_000));
        let list = Value::from(vec![text.clone(), text, Value::Int(1)]);
        let (json, of_json) = taken(|| JsonStyle::default().dumps(&list).unwrap());
        let (repr, of_repr) = taken(|| list.repr().unwrap());
        assert_eq!((json.len(), repr.len()), (128_011, 128_011));
        assert_eq!((of_json, of_repr), (2_000 + 4, 2_000 + 4));
    }

    #[test]
    fn writing_ends_with_the_steps_and_before_a_text_is_too_long() {
        let written = |pieces: usize, piece: &str| {
            let mut out = Writer::default();
            (0..pieces).find_map(|_| out.push_str(piece).err().map(|error| (error, out.text.len())))
        };
        let (error, len) = written(3, &"x".repeat(8 << 20)).unwrap();
        assert_eq!((error, len), (ErrorKind::Limit("makes a text that is too long"), MAX_LENGTH));
        LEFT.set(1_000);
        let found = written(2_000, &"x".repeat(BYTES)).unwrap();
        LEFT.set(u64::MAX);
        assert_eq!(found, (ErrorKind::Limit("takes more than 5,000,000 steps"), 999 * BYTES));
    }
}

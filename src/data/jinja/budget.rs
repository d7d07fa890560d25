//! What a rendering may take. A template is a stranger's: it shall neither run for ever nor fill
//! the memory.
//!
//! Every operation whose time or memory grows with its operands draws from one budget of the
//! thread: [`with_stack`](super::with_stack) starts a thread for each conversation.

use std::cell::Cell;

use super::args::Args;
use super::error::{ErrorKind, Result};
use super::text::checked_length;
use super::value::{Dict, Value};

/// Steps of a rendering. One is an expression, a statement, 64 bytes of text or half an item.
const STEPS: u64 = 5_000_000;
/// Steps of all renderings of a conversation: its spans are found by further ones.
const ALL_STEPS: u64 = 8 * STEPS;
/// Bytes of text that one step pays for.
const BYTES: usize = 64;
/// Values in a value that is walked through or kept, at most.
const MAX_NODES: usize = 1_000_000;

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

/// Fails where the renderings of this thread took all that they may.
pub(super) fn check_all() -> Result<()> {
    match LEFT_OF_ALL.get() {
        0 => Err(ErrorKind::Limit("takes more than 40,000,000 steps in the renderings that find the answers")),
        _ => Ok(()),
    }
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

/// Spends what adding bytes to a text of a length takes; fails before the text is too long.
pub(super) fn spend_bytes(length: usize, bytes: usize) -> Result<()> {
    spend(bytes / BYTES)?;
    checked_length(length.saturating_add(bytes))
}

/// Spends what reading or making a text takes, of a value that is one.
pub(super) fn spend_text(value: &Value) -> Result<()> {
    let Some(text) = value.as_str() else { return Ok(()) };
    checked_length(text.len())?;
    spend(text.len() / BYTES)
}

/// Spends what going through a value with all that is in it takes; these steps.
pub(super) fn spend_walk(value: &Value) -> Result<usize> {
    if let Some(text) = value.as_str() {
        spend(text.len() / BYTES)?;
        return Ok(1 + text.len() / BYTES);
    }
    let nodes = nodes(value).ok_or(ErrorKind::Limit("goes through more than 1,000,000 values"))?;
    spend(nodes)?;
    Ok(nodes)
}

/// Spends what keeping a value under a name takes.
pub(super) fn spend_kept(value: &Value) -> Result<()> {
    let nodes = nodes(value).ok_or(ErrorKind::Limit("makes a value that is too large"))?;
    spend(nodes / 8)
}

/// The number of values in a value, with itself; `None` if there are too many.
fn nodes(value: &Value) -> Option<usize> {
    let mut left = MAX_NODES;
    value.is_within(&mut left).then(|| MAX_NODES - left)
}

/// Spends what finding a key takes: keys that are no strings are compared one by one.
pub(super) fn spend_lookup(dict: &Dict, key: &Value) -> Result<()> {
    if key.as_str().is_some() { Ok(()) } else { spend(dict.entries().len()) }
}

/// Spends what passing arguments takes.
pub(super) fn spend_args(args: &Args) -> Result<()> {
    spend(args.positional.len() + args.named.len())?;
    args.positional.iter().chain(args.named.iter().map(|(_, value)| value)).try_for_each(spend_text)
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

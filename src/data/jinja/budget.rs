//! What operations on values spend of the budget of a rendering.

use super::args::Args;
use super::error::{ErrorKind, Result};
use super::steps::{checked_length, spend, spend_read};
use super::value::{Dict, Value};

/// Values in a value that is walked through or kept, at most.
const MAX_NODES: usize = 1_000_000;

/// Spends what reading or making a text takes, of a value that is one.
pub(super) fn spend_text(value: &Value) -> Result<()> {
    let Some(text) = value.as_str() else { return Ok(()) };
    checked_length(text.len())?;
    spend_read(text.len()).map(drop)
}

/// Spends what going through a value with all that is in it takes; these steps.
pub(super) fn spend_walk(value: &Value) -> Result<usize> {
    if let Some(text) = value.as_str() {
        return Ok(1 + spend_read(text.len())?);
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

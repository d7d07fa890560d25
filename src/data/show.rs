//! A batch as text, with the learned tokens marked.

use std::fmt;

use serde::Serialize;

use super::error::DataError;
use super::pack::{Batch, IGNORE_INDEX};
use super::tokenizer::Tokenizer;

/// The marks around learned text.
const MARKS: [&str; 2] = ["⟦", "⟧"];

/// A sample of a batch, decoded. Its `Display` puts learned text in ⟦ ⟧.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ShownSample {
    /// Its tokens.
    pub tokens: u64,
    /// Its learned tokens.
    pub learned: u64,
    /// The sample from its start to its end.
    pub parts: Vec<Part>,
}

/// Successive tokens that are all learned, or none of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Part {
    /// Whether they are learned.
    pub learned: bool,
    /// Their text.
    pub text: String,
    /// The tokens.
    pub tokens: Vec<u32>,
}

impl fmt::Display for ShownSample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [start, end] = MARKS;
        self.parts.iter().try_for_each(|part| match part.learned {
            true => write!(f, "{start}{}{end}", part.text),
            false => f.write_str(&part.text),
        })
    }
}

/// The samples of a batch, decoded.
///
/// # Errors
/// [`DataError::Encode`].
pub fn show_batch(batch: &Batch, tokenizer: &Tokenizer) -> Result<Vec<ShownSample>, DataError> {
    let show = |(start, end)| {
        let tokens = batch.tokens.get(start..end).unwrap_or_default();
        let labels = batch.labels.get(start..end).unwrap_or_default();
        let before = labels.iter().map(|&label| label != IGNORE_INDEX);
        // The label of a token is its successor.
        let learned: Vec<bool> = std::iter::once(false).chain(before).take(tokens.len()).collect();
        let count = learned.iter().filter(|&&learned| learned).count() as u64;
        Ok(ShownSample { tokens: tokens.len() as u64, learned: count, parts: parts(tokens, &learned, tokenizer)? })
    };
    samples(batch).into_iter().map(show).collect()
}

/// Start and end of each sample.
fn samples(batch: &Batch) -> Vec<(usize, usize)> {
    let chunks = batch.starts.chunk_by(|a, b| a == b);
    let ranges = chunks.scan(0, |end, chunk| {
        let start = *end;
        *end += chunk.len();
        Some((start, *end))
    });
    ranges.collect()
}

fn parts(tokens: &[u32], learned: &[bool], tokenizer: &Tokenizer) -> Result<Vec<Part>, DataError> {
    let mut rest = tokens;
    let part = |run: &[bool]| {
        let (now, later) = rest.split_at_checked(run.len()).unwrap_or((rest, &[]));
        rest = later;
        Ok(Part { learned: run.first() == Some(&true), text: tokenizer.decode(now)?, tokens: now.to_vec() })
    };
    learned.chunk_by(|a, b| a == b).map(part).collect()
}

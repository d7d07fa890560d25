//! A batch as people can read it.

use std::fmt::Write as _;

use super::pack::{Batch, UNTRAINED};
use super::{DataError, Tokenizer};

/// What stands around text that is learned.
const MARKS: [&str; 2] = ["⟦", "⟧"];

/// The samples of a batch, decoded: text that is learned stands in ⟦ ⟧.
///
/// # Errors
/// [`DataError::Encode`].
pub fn show_batch(batch: &Batch, tokenizer: &Tokenizer) -> Result<String, DataError> {
    let mut text = String::new();
    for (number, (start, end)) in samples(batch).into_iter().enumerate() {
        let tokens = batch.tokens.get(start..end).unwrap_or_default();
        let labels = batch.labels.get(start..end).unwrap_or_default();
        let before = labels.iter().map(|&label| label != UNTRAINED);
        // The label of a token is its successor.
        let trained: Vec<bool> = std::iter::once(false).chain(before).take(tokens.len()).collect();
        let count = trained.iter().filter(|&&t| t).count();
        let _ = writeln!(text, "sample {}: {} tokens, {count} of them learned", number + 1, tokens.len());
        text += &marked(tokens, &trained, tokenizer)?;
        text += "\n\n";
    }
    Ok(text)
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

fn marked(tokens: &[u32], trained: &[bool], tokenizer: &Tokenizer) -> Result<String, DataError> {
    let mut text = String::new();
    let mut rest = tokens;
    for run in trained.chunk_by(|a, b| a == b) {
        let (now, later) = rest.split_at_checked(run.len()).unwrap_or((rest, &[]));
        rest = later;
        let decoded = tokenizer.decode(now)?;
        match run.first() {
            Some(true) => text.extend([MARKS[0], &decoded, MARKS[1]]),
            _ => text += &decoded,
        }
    }
    Ok(text)
}

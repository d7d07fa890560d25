//! Compares the logits of a text: the pack with its adapter against the merged weights.

use std::path::Path;

use regex::Regex;
use serde::Serialize;
use thiserror::Error;

use crate::arch::ModelConfig;
use crate::convert::{Conversion, ConvertError, Options, Progress};
use crate::data::Tokenizer;
use crate::dequant::stream::StreamError;
use crate::export::WriteError;
use crate::gpu::Gpu;
use crate::lora::adapter::Adapter;
use crate::model::ModelError;
use crate::model::open::Passes;
use crate::model::plan::{MemoryError, OffloadVocabulary};
use crate::model::session::Session;
use crate::source::{PackSource, ReadError};

/// Maximum number of tokens of a sample.
const MAX_TOKENS: usize = 128;

/// Why logits could not be compared.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CompareError {
    /// A model, its pack, its tokenizer or the adapter.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The device's memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The pack of the merged weights.
    #[error(transparent)]
    Convert(#[from] ConvertError),
    /// The folder of that pack.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The pattern that keeps all tensors as they are: a defect of this program.
    #[error(transparent)]
    Pattern(#[from] regex::Error),
    /// A sample without tokens.
    #[error("the sample has no tokens")]
    Empty,
}

impl From<ReadError> for CompareError {
    fn from(error: ReadError) -> Self {
        Self::Model(StreamError::from(error).into())
    }
}

/// The difference of two models' logits, over all tokens of the sample and the whole vocabulary.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Compared tokens of the sample, at most the first 128.
    pub tokens: u64,
    /// The largest absolute difference of two logits.
    pub max_difference: f64,
    /// Root of the mean squared difference.
    pub rms_difference: f64,
    /// Root of the mean square of the logits before the merge, the scale of the differences.
    pub rms_logit: f64,
    /// Number of tokens after which the top-1 token (that of the largest logit) changed.
    pub top1_changed: u64,
}

/// Compares the logits of `sample` from `pack` with the adapter of a folder, and from `merged`, the
/// written snapshot. A temporary pack of the snapshot, all in bfloat16, is next to it
/// meanwhile.
///
/// # Errors
/// See [`CompareError`].
pub fn compare(
    gpu: &Gpu,
    pack: PackSource,
    adapter: &Path,
    merged: &Path,
    sample: &str,
    progress: &dyn Progress,
) -> Result<Comparison, CompareError> {
    let folder = crate::io::folder_of(merged);
    let error = |source| WriteError::Target { path: folder.to_owned(), source };
    let temporary = crate::io::temporary_folder(folder).map_err(error)?;
    let path = temporary.path().join("merged.nf4pack");
    let options = Options { keep: Some(Regex::new(".")?), ..Options::default() };
    Conversion::prepare(merged, options)?.write(&path, progress)?;

    let config = ModelConfig::of_pack(&pack)?;
    let adapter = Adapter::read(adapter, &config).map_err(ModelError::from)?;
    let mut tokens = Tokenizer::of_pack(&pack, &config, 0)?.encode(sample, true).map_err(ModelError::from)?;
    tokens.truncate(MAX_TOKENS.min(config.max_position_embeddings as usize));
    if tokens.is_empty() {
        return Err(CompareError::Empty);
    }
    let before = logits(gpu, pack, Some(&adapter), &tokens)?;
    if progress.cancelled() {
        return Err(ConvertError::Cancelled.into());
    }
    let after = logits(gpu, PackSource::open(&path)?, None, &tokens)?;
    Ok(Comparison::of(&before, &after, config.vocab as usize))
}

/// The logits of every token, [tokens, vocabulary].
fn logits(gpu: &Gpu, pack: PackSource, adapter: Option<&Adapter>, tokens: &[u32]) -> Result<Vec<f32>, CompareError> {
    let offload_vocabulary = OffloadVocabulary::Auto;
    let passes = Passes { offload_vocabulary, ..Passes::one_row(tokens.len() as u32) };
    let plan = passes.plan(gpu, &pack, &ModelConfig::of_pack(&pack)?, adapter)?;
    Ok(Session::open(gpu, pack, adapter, &plan)?.logits(tokens)?)
}

impl Comparison {
    fn of(before: &[f32], after: &[f32], vocabulary: usize) -> Self {
        let differences = || before.iter().zip(after).map(|(&a, &b)| f64::from(b) - f64::from(a));
        let rms = |squares: f64| (squares / before.len().max(1) as f64).sqrt();
        let rows = before.chunks(vocabulary).zip(after.chunks(vocabulary));
        Self {
            tokens: (before.len() / vocabulary) as u64,
            // A NaN stays one.
            max_difference: differences()
                .fold(0.0, |max: f64, d| if max.is_nan() || d.abs() <= max { max } else { d.abs() }),
            rms_difference: rms(differences().map(|d| d * d).sum()),
            rms_logit: rms(before.iter().map(|&x| f64::from(x).powi(2)).sum()),
            top1_changed: rows.filter(|(a, b)| top1(a) != top1(b)).count() as u64,
        }
    }
}

fn top1(logits: &[f32]) -> Option<usize> {
    logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(token, _)| token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_of_logits() {
        let found = Comparison::of(&[1.0, 3.0, -2.0, 0.0], &[1.0, 2.0, -2.0, -4.0], 2);
        let rms = |squares: f64| (squares / 4.0).sqrt();
        let expected =
            Comparison { tokens: 2, max_difference: 4.0, rms_difference: rms(17.0), rms_logit: rms(14.0), top1_changed: 1 };
        assert_eq!(found, expected);
        assert!(Comparison::of(&[f32::NAN, 0.0], &[0.0, 5.0], 2).max_difference.is_nan());
    }
}

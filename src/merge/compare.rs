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
/// The logits of each token are centred first: their mean changes no probability.
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
    /// Mean over the tokens of the Kullback-Leibler divergence of the next token's distribution
    /// after the merge from that before it, in nats.
    pub kl: f64,
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
        let rows = || before.chunks(vocabulary).zip(after.chunks(vocabulary));
        let centred = || rows().flat_map(|(before, after)| centred(before).zip(centred(after)));
        let differences = || centred().map(|(before, after)| after - before);
        let rms = |squares: f64| (squares / before.len().max(1) as f64).sqrt();
        let tokens = rows().len();
        Self {
            tokens: tokens as u64,
            // A NaN stays one.
            max_difference: differences()
                .fold(0.0, |max: f64, d| if max.is_nan() || d.abs() <= max { max } else { d.abs() }),
            rms_difference: rms(differences().map(|d| d * d).sum()),
            rms_logit: rms(centred().map(|(before, _)| before.powi(2)).sum()),
            top1_changed: rows().filter(|(a, b)| top1(a) != top1(b)).count() as u64,
            kl: rows().map(|(a, b)| divergence(a, b)).sum::<f64>() / tokens.max(1) as f64,
        }
    }
}

/// The logits of a token minus their mean.
fn centred(logits: &[f32]) -> impl Iterator<Item = f64> {
    let mean = logits.iter().map(|&x| f64::from(x)).sum::<f64>() / logits.len() as f64;
    logits.iter().map(move |&x| f64::from(x) - mean)
}

/// The Kullback-Leibler divergence of softmax(`after`) from softmax(`before`), in nats.
fn divergence(before: &[f32], after: &[f32]) -> f64 {
    let log_sum = |logits: &[f32]| {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        f64::from(max) + logits.iter().map(|&x| f64::from(x - max).exp()).sum::<f64>().ln()
    };
    let (of_before, of_after) = (log_sum(before), log_sum(after));
    let term = |(&a, &b): (&f32, &f32)| {
        let (a, b) = (f64::from(a) - of_before, f64::from(b) - of_after);
        // A token without a chance adds nothing.
        if a == f64::NEG_INFINITY { 0.0 } else { a.exp() * (a - b) }
    };
    before.iter().zip(after).map(term).sum()
}

fn top1(logits: &[f32]) -> Option<usize> {
    logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(token, _)| token)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_of_logits() {
        // Centred: (-1, 1), (-1, 1) before; (-0.5, 0.5), (1, -1) after.
        let found = Comparison::of(&[1.0, 3.0, -2.0, 0.0], &[1.0, 2.0, -2.0, -4.0], 2);
        assert_eq!((found.tokens, found.top1_changed, found.max_difference), (2, 1, 2.0));
        let rms = |squares: f64| (squares / 4.0).sqrt();
        assert!((found.rms_difference - rms(8.5)).abs() < 1e-12, "{found:?}");
        assert_eq!(found.rms_logit, 1.0);
        // Of two tokens, log p is -ln(1 + e^-d) for a lead d.
        let log = |lead: f64| -(1.0 + (-lead).exp()).ln();
        let kl = |p: f64, q: f64| log(p).exp() * (log(p) - log(q)) + log(-p).exp() * (log(-p) - log(-q));
        assert!((found.kl - (kl(2.0, 1.0) + kl(2.0, -2.0)) / 2.0).abs() < 1e-12, "{found:?}");
        assert!(Comparison::of(&[f32::NAN, 0.0], &[0.0, 5.0], 2).max_difference.is_nan());
    }

    #[test]
    fn a_shift_of_all_logits_is_no_difference() {
        let (before, after) = ([1.0, 2.0, 4.0, 1.0], [101.0, 102.0, 0.0, -3.0]);
        let found = Comparison::of(&before, &after, 2);
        assert_eq!((found.max_difference, found.rms_difference, found.top1_changed), (0.0, 0.0, 0));
        assert!(found.kl.abs() < 1e-12, "{found:?}");
    }
}

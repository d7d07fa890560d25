//! Merges an adapter into the weights, as a snapshot folder in bfloat16.
//!
//! For every adapted projection W' = W + scale * B A (Hu et al., "LoRA", section 4.1), computed in
//! float64 and rounded to bfloat16 once, to nearest, ties to even.

mod base;
mod compare;
mod error;
mod sum;

use std::borrow::Cow;
use std::cell::RefCell;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use crate::arch::ModelConfig;
use crate::convert::Progress;
use crate::export::Written;
use crate::export::writer::{self, Tensor};
use crate::format::FloatType;
use crate::lora::adapter::Adapter;
use crate::source::TensorBuf;
use crate::verify::require_undamaged;
use base::BaseTensor;
pub use base::{Base, Sources};
pub use compare::{CompareError, Comparison, compare};
pub use error::MergeError;
use sum::{Change, Delta};

/// The share of the change that rounding removed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Rounding {
    /// The tensor.
    pub tensor: String,
    /// Norm of (bfloat16(W') - W') over norm of (W' - W).
    pub relative_error: f64,
}

/// The report of a merge.
#[derive(Debug, Clone, Serialize)]
pub struct MergeReport {
    /// The snapshot.
    #[serde(flatten)]
    pub written: Written,
    /// Tensors that the adapter changed.
    pub merged: u64,
    /// The factor on B A.
    pub scale: f64,
    /// Norm of the rounding error over norm of the change, over all merged tensors; `None` if
    /// nothing changes (B is zero).
    pub rounding_error: Option<f64>,
    /// The tensor that lost the largest share to rounding; `None` if nothing changes.
    pub worst: Option<Rounding>,
    /// Files of the base that are not, by SHA-256, the ones that the pack was made from.
    pub other_files: Vec<String>,
    /// Wall-clock seconds.
    pub seconds: f64,
}

impl MergeReport {
    /// [`MergeReport::rounding_error`] above which much of the tuning is lost.
    pub const WORRYING: f64 = 0.5;
}

/// Merges `sources` into a snapshot folder `target`, in weights files of at most `shard_len` bytes
/// of tensors each (or one longer tensor); see [`crate::export::MAX_SHARD_LEN`]. All tensors are
/// bfloat16. Bfloat16 tensors of the base that the adapter does not change stay byte for byte the
/// same. The folder also gets the pack's config.json (with dtype bfloat16), tokenizer and other
/// files. It appears only when it is complete. Only one tensor at a time is in memory.
///
/// # Errors
/// See [`MergeError`].
pub fn merge(
    sources: &Sources<'_>,
    target: &Path,
    shard_len: u64,
    progress: &dyn Progress,
) -> Result<MergeReport, MergeError> {
    let started = Instant::now();
    writer::refuse_existing(target)?;
    let pack = sources.pack;
    let model = ModelConfig::of_pack(pack)?;
    require_undamaged(pack, progress)?;
    let adapter = Adapter::read(sources.adapter, &model)?;
    base::check_projections(pack, &adapter.layout)?;
    let opened = match sources.base {
        Base::Dequantised => None,
        Base::Checkpoint { path, config } => Some(base::open(path, config, pack)?),
    };
    let other_files = opened.as_ref().map_or(Ok(Vec::new()), |c| base::other_files(c, pack, progress))?;
    let base = base::tensors(pack, opened.as_ref());
    let readers = base::readers(sources, opened.as_ref())?;
    let (changes, buf) = (RefCell::new(Vec::new()), RefCell::new(TensorBuf::default()));
    let tensors: Vec<Tensor<'_, MergeError>> = base.iter().map(|t| tensor(t, &adapter, &changes, &buf, progress)).collect();
    let written = writer::write(target, pack, &tensors, shard_len, &readers, progress)?;
    let changes = changes.take();
    Ok(MergeReport {
        written,
        merged: changes.len() as u64,
        scale: adapter.config.scale(),
        rounding_error: total(&changes).rounding_error(),
        worst: worst(&changes),
        other_files,
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// The tensor of the snapshot for `base`.
fn tensor<'a>(
    base: &'a BaseTensor<'a>,
    adapter: &'a Adapter,
    changes: &'a RefCell<Vec<(&'a str, Change)>>,
    buf: &'a RefCell<TensorBuf>,
    progress: &'a dyn Progress,
) -> Tensor<'a, MergeError> {
    let make = move || {
        let delta = Delta::of(adapter, base);
        let mut buf = buf.borrow_mut();
        let weights = base.load(&mut buf)?;
        if let (None, Some(bytes)) = (&delta, weights.bfloat16()?) {
            return Ok(Cow::Owned(bytes));
        }
        let (bytes, change) = sum::add(base, &weights, delta.as_ref(), progress)?;
        if delta.is_some() {
            changes.borrow_mut().push((base.name, change));
        }
        Ok(Cow::Owned(bytes))
    };
    Tensor { name: base.name, float_type: FloatType::Bf16, dims: base.dims, make: Box::new(make) }
}

fn total(changes: &[(&str, Change)]) -> Change {
    changes.iter().fold(Change::default(), |sum, (_, change)| sum + *change)
}

fn worst(changes: &[(&str, Change)]) -> Option<Rounding> {
    let errors = changes.iter().filter_map(|(name, change)| Some((name, change.rounding_error()?)));
    let (tensor, relative_error) = errors.max_by(|a, b| a.1.total_cmp(&b.1))?;
    Some(Rounding { tensor: (*tensor).to_owned(), relative_error })
}

#[cfg(test)]
mod tests;

//! W + scale * B A of one tensor, piece by piece, and the error of rounding.

use std::ops::Add;

use half::bf16;
use rayon::prelude::*;

use super::base::{BaseTensor, Loaded};
use super::error::MergeError;
use crate::convert::Progress;
use crate::export::WriteError;
use crate::export::writer::zeros;
use crate::format::FloatType;
use crate::lora::adapter::Adapter;

/// Weights per piece of a thread, at least a row.
const PIECE_WEIGHTS: usize = 1 << 17;

/// The change that an adapter makes to one matrix.
pub(super) struct Delta<'a> {
    scale: f64,
    rank: usize,
    inputs: usize,
    /// [rank, inputs].
    a: &'a [f32],
    /// [outputs, rank].
    b: &'a [f32],
}

impl<'a> Delta<'a> {
    /// `None` for a tensor that the adapter does not change.
    pub(super) fn of(adapter: &'a Adapter, base: &BaseTensor<'_>) -> Option<Self> {
        let place = adapter.layout.place(base.layer?, base.role)?;
        Some(Self {
            scale: adapter.config.scale(),
            rank: adapter.layout.rank() as usize,
            inputs: place.inputs as usize,
            a: adapter.vector.get(place.a)?,
            b: adapter.vector.get(place.b)?,
        })
    }

    /// Row `row` of scale * B A.
    fn row(&self, row: usize, out: &mut [f64]) {
        out.fill(0.0);
        let b = self.b.get(row * self.rank..(row + 1) * self.rank).unwrap_or_default();
        for (&b, a) in b.iter().zip(self.a.chunks_exact(self.inputs)) {
            let b = self.scale * f64::from(b);
            out.iter_mut().zip(a).for_each(|(out, &a)| *out += b * f64::from(a));
        }
    }
}

/// Sums of squares over the weights of a matrix.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Change {
    /// Of W' - W.
    delta: f64,
    /// Of bfloat16(W') - W'.
    rounding: f64,
}

impl Add for Change {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { delta: self.delta + other.delta, rounding: self.rounding + other.rounding }
    }
}

impl Change {
    /// Norm of the rounding over norm of the change; `None` if nothing changes.
    pub(super) fn rounding_error(self) -> Option<f64> {
        (self.delta > 0.0).then(|| (self.rounding / self.delta).sqrt())
    }
}

/// The weights of `base`, changed by `delta`, as little-endian bfloat16; all threads work on it.
///
/// # Errors
/// If the base cannot be read, [`MergeError::NotFinite`], [`WriteError::Cancelled`].
pub(super) fn add(
    base: &BaseTensor<'_>,
    weights: &Loaded<'_>,
    delta: Option<&Delta<'_>>,
    progress: &dyn Progress,
) -> Result<(Vec<u8>, Change), MergeError> {
    let row = delta.map_or(1, |delta| delta.inputs);
    let piece = row * (PIECE_WEIGHTS / row).max(1);
    let mut out = zeros(base.name, base.elements(), FloatType::Bf16)?;
    let pieces = out.par_chunks_mut(piece * size_of::<bf16>()).enumerate().map(|(i, bytes)| {
        if progress.cancelled() {
            return Err(WriteError::Cancelled.into());
        }
        add_piece(base.name, weights, delta, (i * piece) as u64, bytes)
    });
    // Added in the order of the tensor, so the sums do not depend on the number of threads.
    let changes: Vec<Change> = pieces.collect::<Result<_, MergeError>>()?;
    Ok((out, changes.into_iter().fold(Change::default(), Add::add)))
}

/// [`add`] for the weights from `first` on, the start of a row, until `bytes` is full.
fn add_piece(
    name: &str,
    weights: &Loaded<'_>,
    delta: Option<&Delta<'_>>,
    first: u64,
    bytes: &mut [u8],
) -> Result<Change, MergeError> {
    let weights = weights.read(first, bytes.len() / size_of::<bf16>())?;
    let row = delta.map_or(weights.len(), |delta| delta.inputs);
    let mut change = Change::default();
    let mut deltas = vec![0.0; row];
    let rows = weights.chunks(row).zip(bytes.as_chunks_mut::<2>().0.chunks_mut(row)).enumerate();
    for (i, (weights, out)) in rows {
        let from = first + (i * row) as u64;
        if let Some(delta) = delta {
            delta.row(from as usize / row, &mut deltas);
        }
        for (j, ((&weight, &delta), out)) in weights.iter().zip(&deltas).zip(out).enumerate() {
            let value = f64::from(weight) + delta;
            let rounded = round(value);
            if !rounded.is_finite() {
                return Err(MergeError::NotFinite { tensor: name.to_owned(), index: from + j as u64, value });
            }
            change.delta += delta * delta;
            change.rounding += (f64::from(rounded) - value).powi(2);
            *out = rounded.to_le_bytes();
        }
    }
    Ok(change)
}

/// The nearest bfloat16, ties to even. `bf16::from_f64` uses only the upper half of the number, so
/// it takes a value next to a tie for a tie.
fn round(value: f64) -> bf16 {
    let nearest = value as f32;
    let bits = nearest.to_bits();
    let toward_zero = if f64::from(nearest).abs() > value.abs() { bits - 1 } else { bits };
    // Rounded to odd, a float32 is a tie between two bfloat16 only if the value itself is one.
    let inexact = f64::from(f32::from_bits(toward_zero)) != value;
    bf16::from_f32(f32::from_bits(toward_zero | u32::from(inexact)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_to_the_nearest_and_ties_are_even() {
        let (one, next) = (bf16::from_bits(0x3f80), bf16::from_bits(0x3f81));
        let middle = 1.0 + f64::from(2.0_f32.powi(-8));
        assert_eq!(round(middle), one);
        assert_eq!(round(middle * (1.0 + f64::EPSILON)), next);
        assert_eq!(round(-middle * (1.0 + f64::EPSILON)), -next);
        assert_eq!(round(middle * (1.0 - f64::EPSILON)), one);
        assert_eq!(round(middle + f64::from(2.0_f32.powi(-7))), bf16::from_bits(0x3f82));
        assert_eq!(round(-0.0).to_bits(), 0x8000);
        assert_eq!(round(1e-300).to_bits(), 0);
        assert_eq!(round(f64::from(bf16::MAX)), bf16::MAX);
        assert!(round(3.4e38).is_infinite() && round(1e300).is_infinite() && round(f64::INFINITY).is_infinite());
        assert!(round(f64::NAN).is_nan());
    }

    #[test]
    fn every_bfloat16_stays_as_it_is() {
        for bits in 0..=u16::MAX {
            let value = bf16::from_bits(bits);
            assert!(value.is_nan() || round(f64::from(value)).to_bits() == bits, "{bits:04x}");
        }
    }
}

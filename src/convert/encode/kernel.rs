//! The algorithms, written once over eight lanes.

use super::block::{Divisor, MAX_BLOCK, Tile, ZERO_CODES};
use super::lanes::{Lanes, Task};
use super::nested::Margin;
use super::search::Search;
use super::types::{BlockError, Encoder, NotFinite, ScalePrecision, Stats, Weights};

/// [`super::encode`] with [`Encoder::Mse`] or with [`Encoder::Absmax`]; separate types, since each
/// is compiled better on its own.
pub(super) struct Encode<'a, const MSE: bool> {
    pub precision: ScalePrecision,
    pub block: usize,
    pub weights: Weights<'a>,
    pub codes: &'a mut [u8],
    pub scales: &'a mut [f32],
}

impl<const MSE: bool> Task for Encode<'_, MSE> {
    type Output = Result<Stats, NotFinite>;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> Self::Output {
        let (mut tile, mut search, mut stats) = (Tile::new(self.block), Search::new(), Stats::default());
        let capacity = tile.capacity();
        let tiles = self.codes.chunks_mut(capacity * self.block / 2).zip(self.scales.chunks_mut(capacity));
        for (t, (codes, scales)) in tiles.enumerate() {
            tile.load(l, self.weights, t * capacity)?;
            if MSE {
                search.prepare(l, &tile, scales.len());
            }
            for (i, (codes, scale)) in codes.chunks_exact_mut(self.block / 2).zip(scales).enumerate() {
                let block = tile.block(i);
                let codes = block.pad(codes);
                if block.absmax == 0.0 {
                    *scale = 1.0;
                    codes.fill(ZERO_CODES);
                    stats.weights += block.len as u64;
                    continue;
                }
                let sums = if MSE {
                    let best = search.best(l, self.precision, &block, i);
                    codes.copy_from_slice(&best.codes[..codes.len()]);
                    *scale = best.scale;
                    best.sums
                } else {
                    *scale = self.precision.round(block.absmax);
                    block.encode(l, *scale, Divisor::bitsandbytes(*scale, &block), codes)
                };
                stats.merge(&block.stats(sums));
            }
        }
        Ok(stats)
    }
}

/// [`super::choose_scales`] and [`super::choose_scales_with_margins`].
pub(super) struct ChooseScales<'a> {
    pub encoder: Encoder,
    pub block: usize,
    pub weights: Weights<'a>,
    pub scales: &'a mut [f32],
    /// As many as scales, or none; only [`Encoder::Mse`] has any.
    pub margins: &'a mut [Margin],
}

impl Task for ChooseScales<'_> {
    type Output = Result<(), NotFinite>;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> Self::Output {
        let (mut tile, mut search) = (Tile::new(self.block), Search::new());
        let capacity = tile.capacity();
        for (t, scales) in self.scales.chunks_mut(capacity).enumerate() {
            tile.load(l, self.weights, t * capacity)?;
            if self.encoder == Encoder::Mse {
                search.prepare(l, &tile, scales.len());
            }
            for (i, scale) in scales.iter_mut().enumerate() {
                let block = tile.block(i);
                if self.encoder == Encoder::Absmax || block.absmax == 0.0 {
                    *scale = block.absmax;
                    continue;
                }
                let best = search.best(l, ScalePrecision::F32, &block, i);
                *scale = best.scale;
                if let Some(margin) = self.margins.get_mut(t * capacity + i) {
                    *margin = best.margin();
                }
            }
        }
        Ok(())
    }
}

/// [`super::encode_with_scales`].
pub(super) struct EncodeWithScales<'a> {
    pub block: usize,
    pub weights: Weights<'a>,
    pub scales: &'a [f32],
    pub codes: &'a mut [u8],
}

impl Task for EncodeWithScales<'_> {
    type Output = Stats;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> Self::Output {
        let (mut tile, mut stats) = (Tile::new(self.block), Stats::default());
        let capacity = tile.capacity();
        let tiles = self.codes.chunks_mut(capacity * self.block / 2).zip(self.scales.chunks(capacity));
        for (t, (codes, scales)) in tiles.enumerate() {
            // The first pass has refused what is not finite; here it would only make codes and
            // statistics meaningless.
            let _ = tile.load(l, self.weights, t * capacity);
            for (i, (codes, &scale)) in codes.chunks_exact_mut(self.block / 2).zip(scales).enumerate() {
                let block = tile.block(i);
                let codes = block.pad(codes);
                stats.merge(&block.stats(block.encode_at(l, scale, codes)));
            }
        }
        stats
    }
}

/// [`super::block_errors`].
pub(super) struct BlockErrors<'a> {
    pub block: usize,
    pub weights: Weights<'a>,
    pub scales: &'a [f32],
    pub errors: &'a mut [BlockError],
}

impl Task for BlockErrors<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) {
        let (mut tile, mut codes) = (Tile::new(self.block), [0; MAX_BLOCK / 2]);
        let capacity = tile.capacity();
        let tiles = self.errors.chunks_mut(capacity).zip(self.scales.chunks(capacity));
        for (t, (errors, scales)) in tiles.enumerate() {
            // As in the second pass: the first one has refused what is not finite.
            let _ = tile.load(l, self.weights, t * capacity);
            for (i, (error, &scale)) in errors.iter_mut().zip(scales).enumerate() {
                let sums = tile.block(i).encode_at(l, scale, &mut codes);
                *error = BlockError { sum_sq: sums.sq, sum_sq_error: sums.sq_error };
            }
        }
    }
}

/// [`super::first_not_finite`].
pub(super) struct FirstNotFinite<'a> {
    pub weights: Weights<'a>,
}

impl Task for FirstNotFinite<'_> {
    type Output = Option<NotFinite>;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> Self::Output {
        let mut tile = Tile::new(MAX_BLOCK);
        // A loop, since a closure would not be compiled with the target features of `L`.
        for first in 0..self.weights.len().div_ceil(MAX_BLOCK) {
            if let Err(not_finite) = tile.load(l, self.weights, first) {
                return Some(not_finite);
            }
        }
        None
    }
}

//! The algorithms, written once over eight lanes. What a backend may change is how fast the
//! operations of [`Lanes`] are, never their results, so all backends agree bit for bit by
//! construction.

use super::nested::Margin;
use super::search::{Grid, Search};
use super::{BlockError, Encoder, NotFinite, ScalePrecision, Stats, Task, Weights};
use crate::format::{FloatType, nf4};

/// Weights that a pass takes at a time: four vectors of eight, sixteen bytes of codes. Divides
/// every block size.
pub(super) const GROUP: usize = 32;

/// The largest block.
pub(super) const MAX_BLOCK: usize = 4096;

/// Groups of the largest block.
pub(super) const MAX_GROUPS: usize = MAX_BLOCK / GROUP;

/// bitsandbytes divides by at least this.
const MIN_ABSMAX: f32 = 1e-38;

/// Below this, 2^-100, scales are divided by. A scale that [`Search`] tries is never less than
/// 2^-14 of absmax, so above it no reciprocal overflows.
const SMALL_ABSMAX: f32 = f32::from_bits(27 << 23);

/// A byte of two codes of zero weights.
const ZERO_CODES: u8 = nf4::ZERO_CODE << 4 | nf4::ZERO_CODE;

/// The operations of a backend, on eight float32 lanes at a time. Each is exact IEEE 754 binary32
/// with one rounding (no fused multiply-add), subnormal numbers included.
pub(super) trait Lanes: Copy {
    /// Eight float32.
    type F: Copy;
    /// Eight codes.
    type C: Copy;

    fn splat(self, x: f32) -> Self::F;
    fn load(self, from: &[f32; 8]) -> Self::F;
    fn store(self, x: Self::F, to: &mut [f32; 8]);
    /// Eight little-endian bfloat16, widened.
    fn load_bf16(self, from: &[u8; 16]) -> Self::F;
    /// Eight little-endian binary16, widened.
    fn load_f16(self, from: &[u8; 16]) -> Self::F;
    /// Eight little-endian binary32.
    fn load_f32(self, from: &[u8; 32]) -> Self::F;

    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    fn abs(self, a: Self::F) -> Self::F;
    /// The larger of non-negative numbers by their bits: every NaN counts as larger than infinity.
    fn largest(self, a: Self::F, b: Self::F) -> Self::F;

    /// `((x0 + x4) + (x2 + x6)) + ((x1 + x5) + (x3 + x7))`.
    fn reduce_add(self, x: Self::F) -> f32;
    /// The largest lane, in the order of [`Lanes::largest`].
    fn reduce_largest(self, x: Self::F) -> f32;

    /// Number of [`nf4::MIDPOINTS`] strictly below each lane.
    fn codes(self, s: Self::F) -> Self::C;
    /// [`nf4::CODEBOOK`] of each code.
    fn values(self, codes: Self::C) -> Self::F;
    /// Thirty-two codes as the file packs them.
    fn pack(self, codes: [Self::C; 4]) -> [u8; 16];

    /// Each lane rounded to the nearest integer, ties to even, and held to -128..=127; lanes are
    /// within the range of i32.
    fn to_i8(self, x: [Self::F; 4], to: &mut [i8; GROUP]);
    /// The sums that [`Search`] ranks candidates by, for two grids, each with weights times 1 or
    /// -1: `[<q,w>, <q,q>]` of the first, then of the second. See [`Grid`].
    fn dots(self, weights: &[[i8; GROUP]], candidates: [(&Grid, i8); 2]) -> [i32; 4];
}

/// Some blocks in float32, each padded with zeros to whole groups. A zero gets code 7 and adds
/// nothing to any sum.
///
/// [`Search`] takes all of them through one step before the next: what one block waits for, another
/// can do.
pub(super) struct Tile {
    weights: [[f32; GROUP]; MAX_GROUPS],
    blocks: [Extent; MAX_GROUPS],
    /// Elements of a full block.
    block: usize,
}

/// A block of a [`Tile`].
#[derive(Clone, Copy)]
struct Extent {
    /// Weights before the padding.
    len: usize,
    /// The largest magnitude.
    absmax: f32,
}

impl Tile {
    #[inline(always)]
    const fn new(block: usize) -> Self {
        Self { weights: [[0.0; GROUP]; MAX_GROUPS], blocks: [Extent { len: 0, absmax: 0.0 }; MAX_GROUPS], block }
    }

    /// Full blocks that a tile has room for.
    const fn capacity(&self) -> usize {
        MAX_BLOCK / self.block
    }

    /// Loads blocks from block `first` of `weights` on, up to the last one or until it is full.
    #[inline(always)]
    fn load<L: Lanes>(&mut self, l: L, weights: Weights<'_>, first: usize) -> Result<(), NotFinite> {
        let (block, size) = (self.block, weights.float_type.size());
        for i in 0..self.capacity().min(weights.len().div_ceil(block) - first) {
            let start = (first + i) * block;
            let len = block.min(weights.len() - start);
            let bytes = &weights.bytes[start * size..(start + len) * size];
            let to = &mut self.weights[i * block / GROUP..(i + 1) * block / GROUP];
            let absmax = match weights.float_type {
                FloatType::Bf16 => widen(l, bytes, to, L::load_bf16),
                FloatType::F16 => widen(l, bytes, to, L::load_f16),
                FloatType::F32 => widen(l, bytes, to, L::load_f32),
            };
            if !absmax.is_finite() {
                return Err(not_finite(weights, start));
            }
            self.blocks[i] = Extent { len, absmax };
        }
        Ok(())
    }

    /// Block `i` of those loaded.
    #[inline(always)]
    pub fn block(&self, i: usize) -> Block<'_> {
        let Extent { len, absmax } = self.blocks[i];
        let groups = i * self.block / GROUP..(i * self.block + len).div_ceil(GROUP);
        Block { groups: &self.weights[groups], len, partial: len < self.block, absmax, unit: unit_of(absmax) }
    }
}

/// One block of a [`Tile`].
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    /// The weights and their padding.
    pub groups: &'a [[f32; GROUP]],
    /// Weights before the padding.
    len: usize,
    /// Whether the block is the partial last one of its tensor.
    partial: bool,
    /// The largest magnitude.
    pub absmax: f32,
    /// A power of two near `1 / absmax`: at this unit squares of weights neither overflow nor
    /// vanish.
    pub unit: f32,
}

/// The power of two that brings numbers as large as `magnitude` near 1, as far as float32 has it.
fn unit_of(magnitude: f32) -> f32 {
    let exponent = magnitude.to_bits() >> 23 & 0xff;
    f32::from_bits(254_u32.saturating_sub(exponent).max(1) << 23)
}

/// What turns a sum of squares in units of `1 / unit` back: `unit^-2`.
fn square_of(unit: f32) -> f64 {
    1.0 / (f64::from(unit) * f64::from(unit))
}

/// Widens `N / 8`-byte elements into `to`, pads the last group with zeros, and returns the largest
/// magnitude: infinity or NaN if there is any.
#[inline(always)]
fn widen<L: Lanes, const N: usize>(l: L, bytes: &[u8], to: &mut [[f32; GROUP]], load: impl Fn(L, &[u8; N]) -> L::F) -> f32 {
    let mut largest = l.splat(0.0);
    let (vectors, rest) = bytes.as_chunks::<N>();
    let (to, _) = to.as_flattened_mut().as_chunks_mut::<8>();
    for (from, to) in vectors.iter().zip(to.iter_mut()) {
        let w = load(l, from);
        l.store(w, to);
        largest = l.largest(largest, l.abs(w));
    }
    let used = vectors.len();
    if !rest.is_empty() {
        let mut last = [0; N];
        last[..rest.len()].copy_from_slice(rest);
        let w = load(l, &last);
        l.store(w, &mut to[used]);
        largest = l.largest(largest, l.abs(w));
    }
    let used = used + usize::from(!rest.is_empty());
    to[used..used.next_multiple_of(GROUP / 8)].fill([0.0; 8]);
    l.reduce_largest(largest)
}

/// The first NaN or infinity from `first` on; there is one.
#[cold]
fn not_finite(weights: Weights<'_>, first: usize) -> NotFinite {
    let index = (first..weights.len()).find(|&i| !weights.get(i).is_finite()).unwrap_or(first);
    NotFinite { index, value: weights.get(index) }
}

/// How a weight is brought to the codebook's range.
#[derive(Clone, Copy)]
struct Divisor {
    /// What a weight is multiplied with, or divided by.
    by: f32,
    divide: bool,
}

impl Divisor {
    /// As bitsandbytes does it: a reciprocal in full blocks, division in partial ones, by 1e-38 at
    /// least.
    fn bitsandbytes(scale: f32, block: &Block<'_>) -> Self {
        let divisor = scale.max(MIN_ABSMAX);
        if block.partial { Self { by: divisor, divide: true } } else { Self { by: 1.0 / divisor, divide: false } }
    }

    /// The same for ordinary scales of either sign. Where a reciprocal could overflow it divides,
    /// so that the smallest blocks keep their signal; a zero scale brings every weight to zero.
    fn new(scale: f32, block: &Block<'_>) -> Self {
        if block.divides() || scale.abs() < f32::MIN_POSITIVE {
            Self { by: if scale == 0.0 { f32::INFINITY } else { scale }, divide: true }
        } else {
            Self { by: 1.0 / scale, divide: false }
        }
    }
}

impl Block<'_> {
    /// Whether weights are divided by a scale even where the scale's reciprocal is finite.
    fn divides(&self) -> bool {
        self.partial || self.absmax < SMALL_ABSMAX
    }

    /// Encodes the block for a scale that brings weights to the codebook by `divisor`. `codes`
    /// takes the codes of whole groups.
    #[inline(always)]
    fn encode<L: Lanes>(&self, l: L, scale: f32, divisor: Divisor, codes: &mut [u8]) -> Sums {
        if divisor.divide {
            self.encode_by::<L, true>(l, scale, divisor.by, codes)
        } else {
            self.encode_by::<L, false>(l, scale, divisor.by, codes)
        }
    }

    /// The same for any scale.
    #[inline(always)]
    pub fn encode_at<L: Lanes>(&self, l: L, scale: f32, codes: &mut [u8]) -> Sums {
        self.encode(l, scale, Divisor::new(scale, self), codes)
    }

    #[inline(always)]
    fn encode_by<L: Lanes, const DIVIDE: bool>(&self, l: L, scale: f32, by: f32, codes: &mut [u8]) -> Sums {
        // An error is at most as large as its weight: zero is one of the values.
        let unit_f32 = self.unit;
        let (scale, by, unit, zero) = (l.splat(scale), l.splat(by), l.splat(unit_f32), l.splat(0.0));
        let (mut sq_error, mut max_error, mut sq) = (zero, zero, zero);
        for (group, packed) in self.groups.iter().zip(codes.as_chunks_mut::<{ GROUP / 2 }>().0) {
            let mut codes = [l.codes(zero); 4];
            for (vector, codes) in group.as_chunks::<8>().0.iter().zip(&mut codes) {
                let w = l.load(vector);
                *codes = l.codes(if DIVIDE { l.div(w, by) } else { l.mul(w, by) });
                let e = l.sub(w, l.mul(l.values(*codes), scale));
                max_error = l.largest(max_error, l.abs(e));
                let (e, w) = (l.mul(e, unit), l.mul(w, unit));
                sq_error = l.add(sq_error, l.mul(e, e));
                sq = l.add(sq, l.mul(w, w));
            }
            *packed = l.pack(codes);
        }
        Sums {
            sq: f64::from(l.reduce_add(sq)) * square_of(unit_f32),
            sq_error: f64::from(l.reduce_add(sq_error)) * square_of(unit_f32),
            max_error: l.reduce_largest(max_error),
        }
    }

    /// The squared error that [`Block::encode_at`] would find.
    #[inline(always)]
    pub fn sq_error_at<L: Lanes>(&self, l: L, scale: f32) -> f64 {
        let divisor = Divisor::new(scale, self);
        if divisor.divide {
            self.sq_error_by::<L, true>(l, scale, divisor.by)
        } else {
            self.sq_error_by::<L, false>(l, scale, divisor.by)
        }
    }

    #[inline(always)]
    fn sq_error_by<L: Lanes, const DIVIDE: bool>(&self, l: L, scale: f32, by: f32) -> f64 {
        let unit_f32 = self.unit;
        let (scale, by, unit, mut sq_error) = (l.splat(scale), l.splat(by), l.splat(unit_f32), l.splat(0.0));
        for vector in self.groups.as_flattened().as_chunks::<8>().0 {
            let w = l.load(vector);
            let codes = l.codes(if DIVIDE { l.div(w, by) } else { l.mul(w, by) });
            let e = l.mul(l.sub(w, l.mul(l.values(codes), scale)), unit);
            sq_error = l.add(sq_error, l.mul(e, e));
        }
        f64::from(l.reduce_add(sq_error)) * square_of(unit_f32)
    }

    /// The bytes of `codes` that weights use, once those of the padding are filled.
    #[inline(always)]
    fn pad<'c>(&self, codes: &'c mut [u8]) -> &'c mut [u8] {
        let (used, padding) = codes.split_at_mut(self.groups.len() * GROUP / 2);
        padding.fill(ZERO_CODES);
        used
    }

    fn stats(&self, sums: Sums) -> Stats {
        let Sums { sq, sq_error, max_error } = sums;
        let worst_block = BlockError { sum_sq: sq, sum_sq_error: sq_error };
        Stats { weights: self.len as u64, sum_sq: sq, sum_sq_error: sq_error, max_abs_error: max_error, worst_block }
    }
}

/// What encoding a block cost.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    pub sq: f64,
    pub sq_error: f64,
    max_error: f32,
}

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

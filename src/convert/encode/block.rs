//! The blocks of a tensor in float32, and their codes for a given scale.

use super::lanes::{GROUP, Lanes};
use super::types::{BlockError, NotFinite, Stats, Weights};
use crate::format::{FloatType, nf4};

/// The largest block.
pub(super) const MAX_BLOCK: usize = 4096;

/// Groups of the largest block.
pub(super) const MAX_GROUPS: usize = MAX_BLOCK / GROUP;

/// bitsandbytes divides by at least this.
const MIN_ABSMAX: f32 = 1e-38;

/// Below this, 2^-100, scales are divided by. A scale that [`Search`](super::search::Search) tries
/// is never less than 2^-14 of absmax, so above it no reciprocal overflows.
const SMALL_ABSMAX: f32 = f32::from_bits(27 << 23);

/// A byte of two codes of zero weights.
pub(super) const ZERO_CODES: u8 = nf4::ZERO_CODE << 4 | nf4::ZERO_CODE;

/// Some blocks in float32, each padded with zeros to whole groups. A zero gets code 7 and adds
/// nothing to any sum.
///
/// [`Search`](super::search::Search) takes all of them through one step before the next: what one
/// block waits for, another can do.
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
    pub const fn new(block: usize) -> Self {
        Self { weights: [[0.0; GROUP]; MAX_GROUPS], blocks: [Extent { len: 0, absmax: 0.0 }; MAX_GROUPS], block }
    }

    /// Full blocks that a tile has room for.
    pub const fn capacity(&self) -> usize {
        MAX_BLOCK / self.block
    }

    /// Loads blocks from block `first` of `weights` on, up to the last one or until it is full.
    #[inline(always)]
    pub fn load<L: Lanes>(&mut self, l: L, weights: Weights<'_>, first: usize) -> Result<(), NotFinite> {
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
    pub len: usize,
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
pub(super) struct Divisor {
    /// What a weight is multiplied with, or divided by.
    by: f32,
    divide: bool,
}

impl Divisor {
    /// As bitsandbytes does it: a reciprocal in full blocks, division in partial ones, by 1e-38 at
    /// least.
    pub fn bitsandbytes(scale: f32, block: &Block<'_>) -> Self {
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
    pub fn encode<L: Lanes>(&self, l: L, scale: f32, divisor: Divisor, codes: &mut [u8]) -> Sums {
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
    pub fn pad<'c>(&self, codes: &'c mut [u8]) -> &'c mut [u8] {
        let (used, padding) = codes.split_at_mut(self.groups.len() * GROUP / 2);
        padding.fill(ZERO_CODES);
        used
    }

    pub fn stats(&self, sums: Sums) -> Stats {
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

//! The algorithms, written once over eight lanes. What a backend may change is how fast the operations of [`Lanes`] are, never
//! their results, so all backends agree bit for bit by construction.

use super::search::{self, Grid};
use super::{Encoder, NotFinite, ScalePrecision, Stats, Task, Weights};
use crate::format::{FloatType, nf4};

/// Weights that a pass takes at a time: four vectors of eight, sixteen bytes of codes. Divides every block size.
pub(super) const GROUP: usize = 32;

/// The largest block.
const MAX_BLOCK: usize = 4096;

/// bitsandbytes divides by at least this.
const MIN_ABSMAX: f32 = 1e-38;

/// Below this, 2^-100, scales are divided by. A scale that [`search`] tries is never less than 2^-14 of absmax, so above it no
/// reciprocal overflows.
const SMALL_ABSMAX: f32 = f32::from_bits(27 << 23);

/// A byte of two codes of zero weights.
const ZERO_CODES: u8 = nf4::ZERO_CODE << 4 | nf4::ZERO_CODE;

/// The operations of a backend, on eight float32 lanes at a time. Each is exact IEEE 754 binary32 with one rounding (no fused
/// multiply-add), subnormal numbers included.
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

    /// Each lane rounded to the nearest integer, ties to even; lanes are within [-127.5, 127.5].
    fn to_i8(self, x: [Self::F; 4], to: &mut [i8; GROUP]);
    /// The sums that [`search`] scores a candidate by, for both signs of the scale: `[qw, qq]` of `weights`, then of
    /// `-weights`. See [`Grid`].
    fn dots(self, weights: &[[i8; GROUP]], grid: &Grid) -> [i32; 4];
}

/// One block in float32, padded with zeros to whole groups. A zero gets code 7 and adds nothing to any sum.
pub(super) struct Block {
    weights: [[f32; GROUP]; MAX_BLOCK / GROUP],
    /// Weights before the padding.
    len: usize,
    /// Whether the block is the partial last one of its tensor.
    partial: bool,
    /// The largest magnitude.
    pub absmax: f32,
    /// A power of two near `1 / absmax`: at this unit squares of weights neither overflow nor vanish.
    pub unit: f32,
    /// The weights in 8 bits, for [`search`].
    pub rough: [[i8; GROUP]; MAX_BLOCK / GROUP],
}

impl Block {
    #[inline(always)]
    const fn new() -> Self {
        let (weights, rough) = ([[0.0; GROUP]; MAX_BLOCK / GROUP], [[0; GROUP]; MAX_BLOCK / GROUP]);
        Self { weights, len: 0, partial: false, absmax: 0.0, unit: 1.0, rough }
    }

    #[inline(always)]
    pub fn groups(&self) -> &[[f32; GROUP]] {
        &self.weights[..self.len.div_ceil(GROUP)]
    }

    /// Fills [`Block::rough`] with the weights in units of `absmax / 127`.
    #[inline(always)]
    pub fn roughen<L: Lanes>(&mut self, l: L) {
        let (factor, unit) = (l.splat(127.0 / (self.absmax * self.unit)), l.splat(self.unit));
        for (group, to) in self.weights[..self.len.div_ceil(GROUP)].iter().zip(&mut self.rough) {
            let (vectors, _) = group.as_chunks::<8>();
            let mut scaled = [unit; 4];
            for (vector, scaled) in vectors.iter().zip(&mut scaled) {
                *scaled = l.mul(l.mul(l.load(vector), unit), factor);
            }
            l.to_i8(scaled, to);
        }
    }

    /// Loads the weights from `first` on, at most `block` of them.
    #[inline(always)]
    fn load<L: Lanes>(&mut self, l: L, weights: Weights<'_>, first: usize, block: usize) -> Result<(), NotFinite> {
        let (size, len) = (weights.float_type.size(), block.min(weights.len() - first));
        self.len = len;
        self.partial = len < block;
        let bytes = &weights.bytes[first * size..(first + len) * size];
        self.absmax = match weights.float_type {
            FloatType::Bf16 => widen(l, bytes, &mut self.weights, L::load_bf16),
            FloatType::F16 => widen(l, bytes, &mut self.weights, L::load_f16),
            FloatType::F32 => widen(l, bytes, &mut self.weights, L::load_f32),
        };
        self.unit = unit_of(self.absmax);
        if self.absmax.is_finite() { Ok(()) } else { Err(not_finite(weights, first)) }
    }
}

/// The power of two that brings numbers as large as `magnitude` near 1, as far as float32 has it.
fn unit_of(magnitude: f32) -> f32 {
    let exponent = magnitude.to_bits() >> 23 & 0xff;
    f32::from_bits(254_u32.saturating_sub(exponent).max(1) << 23)
}

/// Widens `N / 8`-byte elements into `to`, pads the last group with zeros, and returns the largest magnitude: infinity or NaN if
/// there is any.
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
    /// As bitsandbytes does it: a reciprocal in full blocks, division in partial ones, by 1e-38 at least.
    fn bitsandbytes(scale: f32, block: &Block) -> Self {
        let divisor = scale.max(MIN_ABSMAX);
        if block.partial { Self { by: divisor, divide: true } } else { Self { by: 1.0 / divisor, divide: false } }
    }

    /// The same for ordinary scales of either sign. Where a reciprocal could overflow it divides, so that the smallest blocks keep
    /// their signal; a zero scale brings every weight to zero.
    fn new(scale: f32, block: &Block) -> Self {
        if block.divides() || scale.abs() < f32::MIN_POSITIVE {
            Self { by: if scale == 0.0 { f32::INFINITY } else { scale }, divide: true }
        } else {
            Self { by: 1.0 / scale, divide: false }
        }
    }
}

impl Block {
    /// Whether weights are divided by a scale even where the scale's reciprocal is finite.
    fn divides(&self) -> bool {
        self.partial || self.absmax < SMALL_ABSMAX
    }

    /// For each scale, the least-squares refit to the values that it encodes the weights to, and how much squared error the refit
    /// explains: `(<q,w> / <q,q>, <q,w>^2 / <q,q> * unit^2)`. Scales are near absmax in magnitude, or zero.
    #[inline(always)]
    pub fn refits<L: Lanes, const N: usize>(&self, l: L, scales: [f32; N]) -> [(f32, f32); N] {
        let sums = if self.divides() { self.dots::<L, N, true>(l, scales) } else { self.dots::<L, N, false>(l, scales) };
        sums.map(|(qw, qq)| if qq > 0.0 { (qw / qq / self.unit, qw * (qw / qq)) } else { (0.0, 0.0) })
    }

    /// `(<q,w> * unit, <q,q>)` for each scale.
    #[inline(always)]
    fn dots<L: Lanes, const N: usize, const DIVIDE: bool>(&self, l: L, scales: [f32; N]) -> [(f32, f32); N] {
        let zero = l.splat(0.0);
        let (mut by, mut qw, mut qq) = ([zero; N], [zero; N], [zero; N]);
        for i in 0..N {
            by[i] = l.splat(Divisor::new(scales[i], self).by);
        }
        let unit = l.splat(self.unit);
        for vector in self.vectors() {
            let w = l.load(vector);
            let scaled = l.mul(w, unit);
            for i in 0..N {
                let q = l.values(l.codes(if DIVIDE { l.div(w, by[i]) } else { l.mul(w, by[i]) }));
                qw[i] = l.add(qw[i], l.mul(q, scaled));
                qq[i] = l.add(qq[i], l.mul(q, q));
            }
        }
        let mut out = [(0.0, 0.0); N];
        for i in 0..N {
            out[i] = (l.reduce_add(qw[i]), l.reduce_add(qq[i]));
        }
        out
    }

    /// The squared error of the block at each scale, in units of `unit^-2`. Scales as for [`Block::refits`].
    #[inline(always)]
    pub fn errors<L: Lanes, const N: usize>(&self, l: L, scales: [f32; N]) -> [f32; N] {
        if self.divides() { self.sq_errors::<L, N, true>(l, scales) } else { self.sq_errors::<L, N, false>(l, scales) }
    }

    #[inline(always)]
    fn sq_errors<L: Lanes, const N: usize, const DIVIDE: bool>(&self, l: L, scales: [f32; N]) -> [f32; N] {
        let zero = l.splat(0.0);
        let (mut by, mut scale, mut sum) = ([zero; N], [zero; N], [zero; N]);
        for i in 0..N {
            by[i] = l.splat(Divisor::new(scales[i], self).by);
            scale[i] = l.splat(scales[i]);
        }
        let unit = l.splat(self.unit);
        for vector in self.vectors() {
            let w = l.load(vector);
            for i in 0..N {
                let q = l.values(l.codes(if DIVIDE { l.div(w, by[i]) } else { l.mul(w, by[i]) }));
                let e = l.mul(l.sub(w, l.mul(q, scale[i])), unit);
                sum[i] = l.add(sum[i], l.mul(e, e));
            }
        }
        let mut out = [0.0; N];
        for i in 0..N {
            out[i] = l.reduce_add(sum[i]);
        }
        out
    }

    #[inline(always)]
    fn vectors(&self) -> &[[f32; 8]] {
        self.groups().as_flattened().as_chunks().0
    }

    /// Encodes the block for `scale` into `codes`, padding included, and counts it in `stats`.
    #[inline(always)]
    fn write<L: Lanes>(&self, l: L, scale: f32, divisor: Divisor, codes: &mut [u8], stats: &mut Stats) {
        let (used, padding) = codes.split_at_mut(self.groups().len() * GROUP / 2);
        padding.fill(ZERO_CODES);
        if divisor.divide {
            self.write_used::<L, true>(l, scale, divisor.by, used, stats);
        } else {
            self.write_used::<L, false>(l, scale, divisor.by, used, stats);
        }
    }

    #[inline(always)]
    fn write_used<L: Lanes, const DIVIDE: bool>(&self, l: L, scale: f32, by: f32, codes: &mut [u8], stats: &mut Stats) {
        let unit_f32 = unit_of(self.absmax.max(scale.abs()));
        let (scale, by, unit, zero) = (l.splat(scale), l.splat(by), l.splat(unit_f32), l.splat(0.0));
        let (mut error, mut max_error, mut ww) = (zero, zero, zero);
        for (group, packed) in self.groups().iter().zip(codes.as_chunks_mut::<{ GROUP / 2 }>().0) {
            let mut codes = [l.codes(zero); 4];
            for (vector, codes) in group.as_chunks::<8>().0.iter().zip(&mut codes) {
                let w = l.load(vector);
                *codes = l.codes(if DIVIDE { l.div(w, by) } else { l.mul(w, by) });
                let e = l.sub(w, l.mul(l.values(*codes), scale));
                max_error = l.largest(max_error, l.abs(e));
                let (e, w) = (l.mul(e, unit), l.mul(w, unit));
                error = l.add(error, l.mul(e, e));
                ww = l.add(ww, l.mul(w, w));
            }
            *packed = l.pack(codes);
        }
        let square = 1.0 / (f64::from(unit_f32) * f64::from(unit_f32));
        stats.merge(&Stats {
            weights: self.len as u64,
            sum_sq: f64::from(l.reduce_add(ww)) * square,
            sum_sq_error: f64::from(l.reduce_add(error)) * square,
            max_abs_error: l.reduce_largest(max_error),
        });
    }
}

/// The scale of a block that is not all zeros, rounded to `precision`.
#[inline(always)]
fn scale_of<L: Lanes>(l: L, encoder: Encoder, precision: ScalePrecision, block: &mut Block) -> f32 {
    match encoder {
        Encoder::Absmax => precision.round(block.absmax),
        Encoder::Mse => search::best_scale(l, precision, block),
    }
}

/// [`super::encode`].
pub(super) struct Encode<'a> {
    pub encoder: Encoder,
    pub precision: ScalePrecision,
    pub block: usize,
    pub weights: Weights<'a>,
    pub codes: &'a mut [u8],
    pub scales: &'a mut [f32],
}

impl Task for Encode<'_> {
    type Output = Result<Stats, NotFinite>;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> Self::Output {
        let mut stats = Stats::default();
        let mut block = Block::new();
        for (i, (codes, scale)) in self.codes.chunks_exact_mut(self.block / 2).zip(self.scales).enumerate() {
            block.load(l, self.weights, i * self.block, self.block)?;
            if block.absmax == 0.0 {
                *scale = 1.0;
                codes.fill(ZERO_CODES);
                stats.weights += block.len as u64;
                continue;
            }
            *scale = scale_of(l, self.encoder, self.precision, &mut block);
            let divisor = match self.encoder {
                Encoder::Absmax => Divisor::bitsandbytes(*scale, &block),
                Encoder::Mse => Divisor::new(*scale, &block),
            };
            block.write(l, *scale, divisor, codes, &mut stats);
        }
        Ok(stats)
    }
}

/// [`super::choose_scales`].
pub(super) struct ChooseScales<'a> {
    pub encoder: Encoder,
    pub block: usize,
    pub weights: Weights<'a>,
    pub scales: &'a mut [f32],
}

impl Task for ChooseScales<'_> {
    type Output = Result<(), NotFinite>;

    #[inline(always)]
    fn run<L: Lanes>(self, l: L) -> Self::Output {
        let mut block = Block::new();
        for (i, scale) in self.scales.iter_mut().enumerate() {
            block.load(l, self.weights, i * self.block, self.block)?;
            *scale = match block.absmax {
                0.0 => 0.0,
                _ => scale_of(l, self.encoder, ScalePrecision::F32, &mut block),
            };
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
        let mut stats = Stats::default();
        let mut block = Block::new();
        for (i, (codes, &scale)) in self.codes.chunks_exact_mut(self.block / 2).zip(self.scales).enumerate() {
            // The first pass has refused what is not finite; here it would only make the statistics meaningless.
            let _ = block.load(l, self.weights, i * self.block, self.block);
            block.write(l, scale, Divisor::new(scale, &block), codes, &mut stats);
        }
        stats
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
        let mut block = Block::new();
        // A loop, since a closure would not be compiled with the target features of `L`.
        for first in (0..self.weights.len()).step_by(MAX_BLOCK) {
            if let Err(not_finite) = block.load(l, self.weights, first, MAX_BLOCK) {
                return Some(not_finite);
            }
        }
        None
    }
}

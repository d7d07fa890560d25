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

/// Sixteen bytes of packed codes of zero weights.
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
}

impl Block {
    #[inline(always)]
    const fn new() -> Self {
        Self { weights: [[0.0; GROUP]; MAX_BLOCK / GROUP], len: 0, partial: false, absmax: 0.0, unit: 1.0 }
    }

    pub fn groups(&self) -> &[[f32; GROUP]] {
        &self.weights[..self.len.div_ceil(GROUP)]
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
    /// bitsandbytes multiplies by a reciprocal in full blocks and divides in partial ones. A subnormal divisor always divides, since
    /// its reciprocal may be infinite.
    fn new(divisor: f32, partial: bool) -> Self {
        if divisor == 0.0 {
            Self { by: 0.0, divide: false }
        } else if partial || divisor.abs() < f32::MIN_POSITIVE {
            Self { by: divisor, divide: true }
        } else {
            Self { by: 1.0 / divisor, divide: false }
        }
    }
}

/// What a pass over a block adds up; `w` are the weights, `q` the codebook's values, sums are in units of `unit`.
#[derive(Clone, Copy)]
pub(super) struct Sums {
    /// Sum of `(w - q * scale)^2 * unit^2`.
    pub error: f32,
    /// Largest `|w - q * scale|`, at no unit.
    max_error: f32,
    /// Sum of `w^2 * unit^2`.
    ww: f32,
    /// Sum of `q * w * unit`.
    pub qw: f32,
    /// Sum of `q^2`.
    pub qq: f32,
}

impl Block {
    /// Encodes the block for `scale`. Sums that the caller does not use cost nothing: the pass is inlined.
    #[inline(always)]
    pub fn try_scale<L: Lanes>(&self, l: L, scale: f32) -> Sums {
        let divisor = Divisor::new(scale, self.partial);
        if divisor.divide {
            self.pass::<L, true>(l, scale, divisor.by, self.unit, None)
        } else {
            self.pass::<L, false>(l, scale, divisor.by, self.unit, None)
        }
    }

    /// Encodes the block for `scale` into `codes`, padding included, and counts it in `stats`.
    #[inline(always)]
    fn write<L: Lanes>(&self, l: L, scale: f32, divisor: Divisor, codes: &mut [u8], stats: &mut Stats) {
        let unit = unit_of(self.absmax.max(scale.abs()));
        let (used, padding) = codes.split_at_mut(self.groups().len() * GROUP / 2);
        padding.fill(ZERO_CODES);
        let sums = if divisor.divide {
            self.pass::<L, true>(l, scale, divisor.by, unit, Some(used))
        } else {
            self.pass::<L, false>(l, scale, divisor.by, unit, Some(used))
        };
        let square = 1.0 / (f64::from(unit) * f64::from(unit));
        stats.merge(&Stats {
            weights: self.len as u64,
            sum_sq: f64::from(sums.ww) * square,
            sum_sq_error: f64::from(sums.error) * square,
            max_abs_error: sums.max_error,
        });
    }

    #[inline(always)]
    fn pass<L: Lanes, const DIVIDE: bool>(&self, l: L, scale: f32, by: f32, unit: f32, codes: Option<&mut [u8]>) -> Sums {
        let (scale, by, unit, zero) = (l.splat(scale), l.splat(by), l.splat(unit), l.splat(0.0));
        let (mut error, mut max_error, mut ww, mut qw, mut qq) = (zero, zero, zero, zero, zero);
        let mut packed = codes.map(|codes| codes.as_chunks_mut::<{ GROUP / 2 }>().0.iter_mut());
        for group in self.groups() {
            let (vectors, _) = group.as_chunks::<8>();
            let mut group_codes = [l.codes(zero); 4];
            for (vector, codes) in vectors.iter().zip(&mut group_codes) {
                let w = l.load(vector);
                *codes = l.codes(if DIVIDE { l.div(w, by) } else { l.mul(w, by) });
                let q = l.values(*codes);
                let e = l.sub(w, l.mul(q, scale));
                max_error = l.largest(max_error, l.abs(e));
                let (e, w) = (l.mul(e, unit), l.mul(w, unit));
                error = l.add(error, l.mul(e, e));
                ww = l.add(ww, l.mul(w, w));
                qw = l.add(qw, l.mul(q, w));
                qq = l.add(qq, l.mul(q, q));
            }
            if let Some(to) = packed.as_mut().and_then(Iterator::next) {
                *to = l.pack(group_codes);
            }
        }
        Sums {
            error: l.reduce_add(error),
            max_error: l.reduce_largest(max_error),
            ww: l.reduce_add(ww),
            qw: l.reduce_add(qw),
            qq: l.reduce_add(qq),
        }
    }
}

/// The scale of a block that is not all zeros, rounded to `precision`.
#[inline(always)]
fn scale_of<L: Lanes>(l: L, encoder: Encoder, precision: ScalePrecision, block: &Block) -> f32 {
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
            *scale = scale_of(l, self.encoder, self.precision, &block);
            let divisor = match self.encoder {
                Encoder::Absmax => scale.max(MIN_ABSMAX),
                Encoder::Mse => *scale,
            };
            block.write(l, *scale, Divisor::new(divisor, block.partial), codes, &mut stats);
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
                _ => scale_of(l, self.encoder, ScalePrecision::F32, &block),
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
            block.write(l, scale, Divisor::new(scale, block.partial), codes, &mut stats);
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
        (0..self.weights.len()).step_by(MAX_BLOCK).find_map(|first| block.load(l, self.weights, first, MAX_BLOCK).err())
    }
}

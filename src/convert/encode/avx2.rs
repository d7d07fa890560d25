//! The AVX2 backend. Codes are found by binary search in tables that fit one register.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]
#![cfg(target_arch = "x86_64")]

use super::lanes::{GROUP, Grid, Lanes, MAGNITUDES, Task};
use crate::format::nf4::{CODEBOOK, MIDPOINTS};
use std::arch::x86_64::*;

/// Proof that the processor has AVX2 and F16C: [`Avx2::detect`] is the only way to get one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    pub fn detect() -> Option<Self> {
        (std::is_x86_feature_detected!("avx2") && std::is_x86_feature_detected!("f16c")).then_some(Self(()))
    }

    pub fn run<T: Task>(self, task: T) -> T::Output {
        #[target_feature(enable = "avx2,f16c")]
        fn inner<T: Task>(avx2: Avx2, task: T) -> T::Output {
            task.run(avx2)
        }
        // SAFETY: `self` exists, so `detect` has found both features.
        unsafe { inner(self, task) }
    }
}

/// The thresholds of the third step of the search, at the places that 0, -1, -2 and -3 select by
/// their low two bits.
const THIRD: [f32; 4] = [MIDPOINTS[1], MIDPOINTS[13], MIDPOINTS[9], MIDPOINTS[5]];

/// Every other entry of a table, from `first` on, at the places that 0, -1, ..., -7 select by their
/// low three bits.
const fn every_other(table: &[f32], first: usize) -> [f32; 8] {
    let mut picked = [0.0; 8];
    let mut k = 0;
    while k < 8 {
        picked[(8 - k) % 8] = table[first + 2 * k];
        k += 1;
    }
    picked
}

/// The thresholds of the fourth step.
const FOURTH: [f32; 8] = every_other(&MIDPOINTS, 0);

/// The values of even codes, and those of odd ones.
const EVEN: [f32; 8] = every_other(&CODEBOOK, 0);
const ODD: [f32; 8] = every_other(&CODEBOOK, 1);

/// Eight codes as the search leaves them.
#[derive(Clone, Copy)]
pub(super) struct Codes {
    /// Minus half of the code, rounded down.
    half: __m256i,
    /// -1 where the code is odd.
    odd: __m256i,
}

#[inline]
#[target_feature(enable = "avx2")]
fn codes(s: __m256) -> Codes {
    // SAFETY: both tables have the lengths that are loaded.
    let (third, fourth) = unsafe { (_mm256_broadcast_ps(&_mm_loadu_ps(THIRD.as_ptr())), _mm256_loadu_ps(FOURTH.as_ptr())) };
    let above = |threshold| _mm256_castps_si256(_mm256_cmp_ps::<_CMP_LT_OQ>(threshold, s));
    // Each step leaves minus the number of thresholds below, so that a comparison's -1 can be added
    // as it is.
    let k1 = above(_mm256_set1_ps(MIDPOINTS[7]));
    let second = _mm256_blendv_ps(_mm256_set1_ps(MIDPOINTS[3]), _mm256_set1_ps(MIDPOINTS[11]), _mm256_castsi256_ps(k1));
    let k2 = _mm256_add_epi32(_mm256_add_epi32(k1, k1), above(second));
    let k3 = _mm256_add_epi32(_mm256_add_epi32(k2, k2), above(_mm256_permutevar_ps(third, k2)));
    Codes { half: k3, odd: above(_mm256_permutevar8x32_ps(fourth, k3)) }
}

#[inline]
#[target_feature(enable = "avx2")]
fn values(codes: Codes) -> __m256 {
    // SAFETY: both tables have eight entries.
    let (even, odd) = unsafe { (_mm256_loadu_ps(EVEN.as_ptr()), _mm256_loadu_ps(ODD.as_ptr())) };
    _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(even, codes.half),
        _mm256_permutevar8x32_ps(odd, codes.half),
        _mm256_castsi256_ps(codes.odd),
    )
}

#[inline]
#[target_feature(enable = "avx2")]
fn pack(codes: [Codes; 4]) -> __m128i {
    // Not `codes.map`, which the compiler may leave out of line, without AVX2.
    let code = |codes: Codes| {
        let minus = _mm256_add_epi32(_mm256_add_epi32(codes.half, codes.half), codes.odd);
        _mm256_sub_epi32(_mm256_setzero_si256(), minus)
    };
    let [a, b, c, d] = codes;
    let (a, b, c, d) = (code(a), code(b), code(c), code(d));
    // Packing works within 128-bit halves, so the bytes come out in the order of the 4-element runs
    // a0 b0 c0 d0 a1 b1 c1 d1.
    let bytes = _mm256_packus_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    // Each pair of bytes: low + 16 * high, in 16 bits.
    let pairs = _mm256_maddubs_epi16(bytes, _mm256_set1_epi16(0x1001));
    _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs))
}

#[inline]
#[target_feature(enable = "avx2")]
fn to_i8(x: [__m256; 4]) -> __m256i {
    let [a, b, c, d] = x;
    let (a, b) = (_mm256_cvtps_epi32(a), _mm256_cvtps_epi32(b));
    let (c, d) = (_mm256_cvtps_epi32(c), _mm256_cvtps_epi32(d));
    let bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
}

#[inline]
#[target_feature(enable = "avx2")]
fn reduce_add(x: __m256) -> f32 {
    let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
    let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn reduce_largest(x: __m256) -> f32 {
    let x = _mm256_castps_si256(x);
    let x = _mm_max_epu32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
    let x = _mm_max_epu32(x, _mm_unpackhi_epi64(x, x));
    let x = _mm_max_epu32(x, _mm_shuffle_epi32::<1>(x));
    f32::from_bits(_mm_cvtsi128_si32(x).cast_unsigned())
}

/// The tables of [`dots`] for one [`Grid`], each repeated in both 128-bit halves.
struct Tables {
    first: __m256i,
    second: [__m256i; 2],
    third: __m256i,
    fourth: __m256i,
    magnitudes: __m256i,
}

impl Tables {
    #[inline]
    #[target_feature(enable = "avx2")]
    fn new(grid: &Grid) -> Self {
        // SAFETY: sixteen thresholds.
        let tree = unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(grid.0.as_ptr().cast())) };
        // SAFETY: sixteen magnitudes.
        let magnitudes = unsafe { _mm_loadu_si128(MAGNITUDES.as_ptr().cast()) };
        Self {
            first: _mm256_set1_epi8(grid.0[0]),
            second: [_mm256_set1_epi8(grid.0[1]), _mm256_set1_epi8(grid.0[2])],
            third: _mm256_srli_si256::<4>(tree),
            fourth: _mm256_srli_si256::<8>(tree),
            magnitudes: _mm256_broadcastsi128_si256(magnitudes),
        }
    }

    /// The magnitudes of the values that 32 weights are encoded to.
    #[inline]
    #[target_feature(enable = "avx2")]
    fn magnitudes_of(&self, w: __m256i) -> __m256i {
        let above = |threshold| _mm256_cmpgt_epi8(w, threshold);
        let k1 = above(self.first);
        let m2 = above(_mm256_blendv_epi8(self.second[0], self.second[1], k1));
        // Minus a comparison's -1; unlike the float search, `vpshufb` wants indices that are not
        // negative.
        let k1 = _mm256_abs_epi8(k1);
        let k2 = _mm256_sub_epi8(_mm256_add_epi8(k1, k1), m2);
        let k3 = _mm256_sub_epi8(_mm256_add_epi8(k2, k2), above(_mm256_shuffle_epi8(self.third, k2)));
        let k4 = _mm256_sub_epi8(_mm256_add_epi8(k3, k3), above(_mm256_shuffle_epi8(self.fourth, k3)));
        _mm256_shuffle_epi8(self.magnitudes, k4)
    }
}

#[inline]
#[target_feature(enable = "avx2")]
fn dots(weights: &[[i8; GROUP]], candidates: [(&Grid, i8); 2]) -> __m128i {
    let [first, second] = candidates;
    let candidates =
        [(Tables::new(first.0), _mm256_set1_epi8(first.1)), (Tables::new(second.0), _mm256_set1_epi8(second.1))];
    let ones = _mm256_set1_epi16(1);
    let mut sums = [_mm256_setzero_si256(); 4];
    for group in weights {
        // SAFETY: a group has 32 bytes.
        let w = unsafe { _mm256_loadu_si256(group.as_ptr().cast()) };
        let magnitude = _mm256_abs_epi8(w);
        for (i, (tables, sign)) in candidates.iter().enumerate() {
            let q = tables.magnitudes_of(_mm256_sign_epi8(w, *sign));
            // Two products of at most 127 * 127 fit 16 bits.
            let (qw, qq) = (_mm256_maddubs_epi16(q, magnitude), _mm256_maddubs_epi16(q, q));
            sums[2 * i] = _mm256_add_epi32(sums[2 * i], _mm256_madd_epi16(qw, ones));
            sums[2 * i + 1] = _mm256_add_epi32(sums[2 * i + 1], _mm256_madd_epi16(qq, ones));
        }
    }
    let sums = _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0], sums[1]), _mm256_hadd_epi32(sums[2], sums[3]));
    _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums))
}

/// A method of [`Lanes`] that is one call of functions that need AVX2 or F16C.
macro_rules! forward {
    ($($name:ident($($arg:ident: $type:ty),*) -> $out:ty = $body:expr;)+) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $type),*) -> $out {
            // SAFETY: `self` exists, so `Avx2::detect` has found AVX2 and F16C. Pointers in `$body`
            // are those of arrays of exactly the bytes that are loaded or stored, at any alignment.
            unsafe { $body }
        }
    )+};
}

impl Lanes for Avx2 {
    type F = __m256;
    type C = Codes;

    forward! {
        splat(x: f32) -> __m256 = _mm256_set1_ps(x);
        load(from: &[f32; 8]) -> __m256 = _mm256_loadu_ps(from.as_ptr());
        store(x: __m256, to: &mut [f32; 8]) -> () = _mm256_storeu_ps(to.as_mut_ptr(), x);
        load_bf16(from: &[u8; 16]) -> __m256 =
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(_mm_loadu_si128(from.as_ptr().cast()))));
        load_f16(from: &[u8; 16]) -> __m256 = _mm256_cvtph_ps(_mm_loadu_si128(from.as_ptr().cast()));
        load_f32(from: &[u8; 32]) -> __m256 = _mm256_loadu_ps(from.as_ptr().cast());
        add(a: __m256, b: __m256) -> __m256 = _mm256_add_ps(a, b);
        sub(a: __m256, b: __m256) -> __m256 = _mm256_sub_ps(a, b);
        mul(a: __m256, b: __m256) -> __m256 = _mm256_mul_ps(a, b);
        div(a: __m256, b: __m256) -> __m256 = _mm256_div_ps(a, b);
        abs(a: __m256) -> __m256 = _mm256_andnot_ps(_mm256_set1_ps(-0.0), a);
        largest(a: __m256, b: __m256) -> __m256 =
            _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
        reduce_add(x: __m256) -> f32 = reduce_add(x);
        reduce_largest(x: __m256) -> f32 = reduce_largest(x);
        codes(s: __m256) -> Codes = codes(s);
        values(codes: Codes) -> __m256 = values(codes);
        pack(codes: [Codes; 4]) -> [u8; 16] = std::mem::transmute::<__m128i, [u8; 16]>(pack(codes));
        to_i8(x: [__m256; 4], to: &mut [i8; GROUP]) -> () = _mm256_storeu_si256(to.as_mut_ptr().cast(), to_i8(x));
        dots(weights: &[[i8; GROUP]], candidates: [(&Grid, i8); 2]) -> [i32; 4] =
            std::mem::transmute::<__m128i, [i32; 4]>(dots(weights, candidates));
    }
}

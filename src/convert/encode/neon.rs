//! The NEON backend: eight lanes are two registers of four. Compiled in CI; run only where the
//! tests run on Arm.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]
#![cfg(target_arch = "aarch64")]

use super::lanes::{GROUP, Grid, Lanes, MAGNITUDES, Task};
use super::scalar::Scalar;
use crate::format::nf4::{CODEBOOK, MIDPOINTS};
use std::arch::aarch64::*;

/// Proof that the processor has NEON: [`Neon::detect`] is the only way to get one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Neon(());

impl Neon {
    pub fn detect() -> Option<Self> {
        std::arch::is_aarch64_feature_detected!("neon").then_some(Self(()))
    }

    pub fn run<T: Task>(self, task: T) -> T::Output {
        #[target_feature(enable = "neon")]
        fn inner<T: Task>(neon: Neon, task: T) -> T::Output {
            task.run(neon)
        }
        // SAFETY: `self` exists, so `detect` has found NEON.
        unsafe { inner(self, task) }
    }
}

/// The bits of `i`'s byte `byte` of every codebook entry, for a table lookup.
const fn plane(byte: usize) -> [u8; 16] {
    let mut plane = [0; 16];
    let mut i = 0;
    while i < 16 {
        plane[i] = CODEBOOK[i].to_le_bytes()[byte];
        i += 1;
    }
    plane
}

/// Byte `b` of every codebook entry in `PLANES[b]`.
const PLANES: [[u8; 16]; 4] = [plane(0), plane(1), plane(2), plane(3)];

#[inline]
#[target_feature(enable = "neon")]
fn each(a: float32x4x2_t, f: impl Fn(float32x4_t) -> float32x4_t) -> float32x4x2_t {
    float32x4x2_t(f(a.0), f(a.1))
}

#[inline]
#[target_feature(enable = "neon")]
fn bits(a: float32x4_t) -> uint32x4_t {
    vreinterpretq_u32_f32(a)
}

/// Eight codes as bytes: one comparison with each midpoint.
#[inline]
#[target_feature(enable = "neon")]
fn codes(s: float32x4x2_t) -> uint8x8_t {
    let mut counts = [vdupq_n_u32(0); 2];
    for midpoint in MIDPOINTS {
        let midpoint = vdupq_n_f32(midpoint);
        // A comparison that holds gives all ones: minus one.
        counts[0] = vsubq_u32(counts[0], vcltq_f32(midpoint, s.0));
        counts[1] = vsubq_u32(counts[1], vcltq_f32(midpoint, s.1));
    }
    vmovn_u16(vcombine_u16(vmovn_u32(counts[0]), vmovn_u32(counts[1])))
}

#[inline]
#[target_feature(enable = "neon")]
fn values(codes: uint8x8_t) -> float32x4x2_t {
    // SAFETY: sixteen bytes a plane.
    let [b0, b1, b2, b3] = PLANES.map(|plane| vqtbl1_u8(unsafe { vld1q_u8(plane.as_ptr()) }, codes));
    // Interleaving bytes, then pairs of bytes, rebuilds the little-endian words in order.
    let (low, high) = (vzip_u8(b0, b1), vzip_u8(b2, b3));
    let first = vzip_u16(vreinterpret_u16_u8(low.0), vreinterpret_u16_u8(high.0));
    let second = vzip_u16(vreinterpret_u16_u8(low.1), vreinterpret_u16_u8(high.1));
    float32x4x2_t(
        vreinterpretq_f32_u16(vcombine_u16(first.0, first.1)),
        vreinterpretq_f32_u16(vcombine_u16(second.0, second.1)),
    )
}

#[inline]
#[target_feature(enable = "neon")]
fn pack(codes: [uint8x8_t; 4]) -> [u8; 16] {
    let (a, b) = (vcombine_u8(codes[0], codes[1]), vcombine_u8(codes[2], codes[3]));
    let packed = vorrq_u8(vuzp1q_u8(a, b), vshlq_n_u8::<4>(vuzp2q_u8(a, b)));
    let mut bytes = [0; 16];
    // SAFETY: sixteen bytes.
    unsafe { vst1q_u8(bytes.as_mut_ptr(), packed) };
    bytes
}

#[inline]
#[target_feature(enable = "neon")]
fn to_i8(x: float32x4x2_t) -> int8x8_t {
    vqmovn_s16(vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.0)), vqmovn_s32(vcvtnq_s32_f32(x.1))))
}

#[inline]
#[target_feature(enable = "neon")]
fn reduce_add(x: float32x4x2_t) -> f32 {
    let x = vaddq_f32(x.0, x.1);
    let x = vadd_f32(vget_low_f32(x), vget_high_f32(x));
    vget_lane_f32::<0>(x) + vget_lane_f32::<1>(x)
}

/// Magnitudes of the values that 16 weights are encoded to: one comparison with each threshold.
#[inline]
#[target_feature(enable = "neon")]
fn magnitudes_of(w: int8x16_t, grid: &Grid, magnitudes: uint8x16_t) -> uint8x16_t {
    let mut codes = vdupq_n_u8(0);
    for threshold in grid.0 {
        codes = vsubq_u8(codes, vcgtq_s8(w, vdupq_n_s8(threshold)));
    }
    vqtbl1q_u8(magnitudes, codes)
}

/// Sums of products of bytes, added to `sum`.
#[inline]
#[target_feature(enable = "neon")]
fn add_products(sum: uint32x4_t, a: uint8x16_t, b: uint8x16_t) -> uint32x4_t {
    let sum = vpadalq_u16(sum, vmull_u8(vget_low_u8(a), vget_low_u8(b)));
    vpadalq_u16(sum, vmull_u8(vget_high_u8(a), vget_high_u8(b)))
}

#[inline]
#[target_feature(enable = "neon")]
fn dots(weights: &[[i8; GROUP]], candidates: [(&Grid, i8); 2]) -> [i32; 4] {
    // SAFETY: sixteen magnitudes.
    let magnitudes = unsafe { vld1q_u8(MAGNITUDES.as_ptr()) };
    let mut sums = [vdupq_n_u32(0); 4];
    for half in weights.as_flattened().as_chunks::<16>().0 {
        // SAFETY: sixteen bytes.
        let w = unsafe { vld1q_s8(half.as_ptr()) };
        let magnitude = vreinterpretq_u8_s8(vabsq_s8(w));
        for (i, (grid, sign)) in candidates.iter().enumerate() {
            let q = magnitudes_of(vmulq_s8(w, vdupq_n_s8(*sign)), grid, magnitudes);
            sums[2 * i] = add_products(sums[2 * i], q, magnitude);
            sums[2 * i + 1] = add_products(sums[2 * i + 1], q, q);
        }
    }
    sums.map(|sum| vaddvq_u32(sum).cast_signed())
}

/// A method of [`Lanes`] that is one call of functions that need NEON.
macro_rules! forward {
    ($($name:ident($($arg:ident: $type:ty),*) -> $out:ty = $body:expr;)+) => {$(
        #[inline(always)]
        fn $name(self, $($arg: $type),*) -> $out {
            // SAFETY: `self` exists, so `Neon::detect` has found NEON. Pointers in `$body` are
            // those of arrays of exactly the bytes that are loaded or stored, at any alignment.
            unsafe { $body }
        }
    )+};
}

impl Lanes for Neon {
    type F = float32x4x2_t;
    type C = uint8x8_t;

    forward! {
        splat(x: f32) -> float32x4x2_t = float32x4x2_t(vdupq_n_f32(x), vdupq_n_f32(x));
        load(from: &[f32; 8]) -> float32x4x2_t = vld1q_f32_x2(from.as_ptr());
        store(x: float32x4x2_t, to: &mut [f32; 8]) -> () = vst1q_f32_x2(to.as_mut_ptr(), x);
        load_bf16(from: &[u8; 16]) -> float32x4x2_t = {
            let x = vreinterpretq_u16_u8(vld1q_u8(from.as_ptr()));
            float32x4x2_t(
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_low_u16(x))),
                vreinterpretq_f32_u32(vshll_n_u16::<16>(vget_high_u16(x))),
            )
        };
        load_f16(from: &[u8; 16]) -> float32x4x2_t = vld1q_f32_x2(Scalar.load_f16(from).as_ptr());
        load_f32(from: &[u8; 32]) -> float32x4x2_t = {
            let x = vld1q_u8_x2(from.as_ptr());
            float32x4x2_t(vreinterpretq_f32_u8(x.0), vreinterpretq_f32_u8(x.1))
        };
        add(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t = float32x4x2_t(vaddq_f32(a.0, b.0), vaddq_f32(a.1, b.1));
        sub(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t = float32x4x2_t(vsubq_f32(a.0, b.0), vsubq_f32(a.1, b.1));
        mul(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t = float32x4x2_t(vmulq_f32(a.0, b.0), vmulq_f32(a.1, b.1));
        div(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t = float32x4x2_t(vdivq_f32(a.0, b.0), vdivq_f32(a.1, b.1));
        abs(a: float32x4x2_t) -> float32x4x2_t = each(a, |a| vabsq_f32(a));
        largest(a: float32x4x2_t, b: float32x4x2_t) -> float32x4x2_t = float32x4x2_t(
            vreinterpretq_f32_u32(vmaxq_u32(bits(a.0), bits(b.0))),
            vreinterpretq_f32_u32(vmaxq_u32(bits(a.1), bits(b.1))),
        );
        reduce_add(x: float32x4x2_t) -> f32 = reduce_add(x);
        reduce_largest(x: float32x4x2_t) -> f32 = f32::from_bits(vmaxvq_u32(vmaxq_u32(bits(x.0), bits(x.1))));
        codes(s: float32x4x2_t) -> uint8x8_t = codes(s);
        values(codes: uint8x8_t) -> float32x4x2_t = values(codes);
        pack(codes: [uint8x8_t; 4]) -> [u8; 16] = pack(codes);
        to_i8(x: [float32x4x2_t; 4], to: &mut [i8; GROUP]) -> () = {
            for (x, to) in x.into_iter().zip(to.as_chunks_mut::<8>().0) {
                vst1_s8(to.as_mut_ptr(), to_i8(x));
            }
        };
        dots(weights: &[[i8; GROUP]], candidates: [(&Grid, i8); 2]) -> [i32; 4] = dots(weights, candidates);
    }
}

//! The portable backend and the definition of every operation of [`Lanes`]; the others are held to
//! it bit for bit.

use super::lanes::{GROUP, Grid, Lanes, MAGNITUDES};
use crate::format::nf4;
use half::{bf16, f16};

/// Eight lanes as an array.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scalar;

/// `f` of each pair of lanes.
#[inline(always)]
fn zip(a: [f32; 8], b: [f32; 8], f: impl Fn(f32, f32) -> f32) -> [f32; 8] {
    let mut out = a;
    for (out, b) in out.iter_mut().zip(b) {
        *out = f(*out, b);
    }
    out
}

impl Lanes for Scalar {
    type F = [f32; 8];
    type C = [u8; 8];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [x; 8]
    }

    #[inline(always)]
    fn load(self, from: &[f32; 8]) -> Self::F {
        *from
    }

    #[inline(always)]
    fn store(self, x: Self::F, to: &mut [f32; 8]) {
        *to = x;
    }

    #[inline(always)]
    fn load_bf16(self, from: &[u8; 16]) -> Self::F {
        std::array::from_fn(|i| bf16::from_le_bytes([from[2 * i], from[2 * i + 1]]).to_f32())
    }

    #[inline(always)]
    fn load_f16(self, from: &[u8; 16]) -> Self::F {
        std::array::from_fn(|i| f16::from_le_bytes([from[2 * i], from[2 * i + 1]]).to_f32())
    }

    #[inline(always)]
    fn load_f32(self, from: &[u8; 32]) -> Self::F {
        std::array::from_fn(|i| f32::from_le_bytes([from[4 * i], from[4 * i + 1], from[4 * i + 2], from[4 * i + 3]]))
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        a.map(f32::abs)
    }

    #[inline(always)]
    fn largest(self, a: Self::F, b: Self::F) -> Self::F {
        zip(a, b, |a, b| f32::from_bits(a.to_bits().max(b.to_bits())))
    }

    #[inline(always)]
    fn reduce_add(self, x: Self::F) -> f32 {
        ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]))
    }

    #[inline(always)]
    fn reduce_largest(self, x: Self::F) -> f32 {
        f32::from_bits(x.iter().fold(0, |largest, x| largest.max(x.to_bits())))
    }

    #[inline(always)]
    fn codes(self, s: Self::F) -> Self::C {
        let mut codes = [0; 8];
        for midpoint in nf4::MIDPOINTS {
            for (code, s) in codes.iter_mut().zip(s) {
                *code += u8::from(midpoint < s);
            }
        }
        codes
    }

    #[inline(always)]
    fn values(self, codes: Self::C) -> Self::F {
        codes.map(|code| nf4::CODEBOOK[usize::from(code & 15)])
    }

    #[inline(always)]
    fn pack(self, codes: [Self::C; 4]) -> [u8; 16] {
        let codes = codes.as_flattened();
        std::array::from_fn(|i| codes[2 * i] | codes[2 * i + 1] << 4)
    }

    #[inline(always)]
    fn to_i8(self, x: [Self::F; 4], to: &mut [i8; GROUP]) {
        for (to, x) in to.iter_mut().zip(x.as_flattened()) {
            *to = x.round_ties_even() as i8;
        }
    }

    #[inline(always)]
    fn dots(self, weights: &[[i8; GROUP]], candidates: [(&Grid, i8); 2]) -> [i32; 4] {
        let mut sums = [0; 4];
        for ((grid, sign), sums) in candidates.into_iter().zip(sums.as_chunks_mut::<2>().0) {
            for &weight in weights.as_flattened() {
                let w = sign * weight;
                let code = grid.0.iter().filter(|&&threshold| threshold < w).count();
                let magnitude = i32::from(MAGNITUDES[code]);
                sums[0] += magnitude * i32::from(w.unsigned_abs());
                sums[1] += magnitude * magnitude;
            }
        }
        sums
    }
}

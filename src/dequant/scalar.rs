//! The portable backend. All other backends equal it bit for bit.

use super::blocks::Lookup;

#[derive(Debug, Clone, Copy)]
pub(super) struct Scalar;

/// `out[i] = table[code i]`.
#[inline(always)]
pub(super) fn look_up<T: Copy>(codes: &[u8], table: &[T; 16], out: &mut [T]) {
    for (out, &codes) in out.chunks_mut(2).zip(codes) {
        for (out, code) in out.iter_mut().zip([codes & 15, codes >> 4]) {
            *out = table[usize::from(code)];
        }
    }
}

impl Lookup for Scalar {
    #[inline(always)]
    fn look_up_16(self, codes: &[u8], table: &[u16; 16], out: &mut [u16]) {
        look_up(codes, table, out);
    }

    #[inline(always)]
    fn look_up_32(self, codes: &[u8], table: &[f32; 16], out: &mut [f32]) {
        look_up(codes, table, out);
    }
}

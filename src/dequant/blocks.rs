//! Decodes block by block, with any backend.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use crate::format::nf4::{CODEBOOK, Nf4Tensor};

/// An output type.
pub(super) trait Element: Copy {
    /// The sixteen values of a block with this scale.
    fn table(scale: f32) -> [Self; 16];
    /// `out[i] = table[code i]`; `codes` has `out.len()` codes, low nibble first, and no spare
    /// bytes.
    fn look_up<L: Lookup>(l: L, codes: &[u8], table: &[Self; 16], out: &mut [Self]);
}

impl Element for f32 {
    #[inline(always)]
    fn table(scale: f32) -> [Self; 16] {
        CODEBOOK.map(|value| value * scale)
    }

    #[inline(always)]
    fn look_up<L: Lookup>(l: L, codes: &[u8], table: &[Self; 16], out: &mut [Self]) {
        l.look_up_32(codes, table, out);
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn table(scale: f32) -> [Self; 16] {
        f32::table(scale).map(round_to_bf16)
    }

    #[inline(always)]
    fn look_up<L: Lookup>(l: L, codes: &[u8], table: &[Self; 16], out: &mut [Self]) {
        l.look_up_16(codes, &table.map(Self::to_bits), out.reinterpret_cast_mut());
    }
}

impl Element for f16 {
    #[inline(always)]
    fn table(scale: f32) -> [Self; 16] {
        let mut halves = [Self::ZERO; 16];
        halves.convert_from_f32_slice(&f32::table(scale));
        halves
    }

    #[inline(always)]
    fn look_up<L: Lookup>(l: L, codes: &[u8], table: &[Self; 16], out: &mut [Self]) {
        l.look_up_16(codes, &table.map(Self::to_bits), out.reinterpret_cast_mut());
    }
}

/// [`bf16::from_f32`] without a branch. So the compiler vectorises a table of sixteen values.
#[inline(always)]
pub(super) fn round_to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet_nan = bits >> 16 | 0x40;
    bf16::from_bits(if value.is_nan() { quiet_nan } else { rounded } as u16)
}

/// The operation that an instruction set speeds up: lookups in a table of sixteen entries.
pub(super) trait Lookup: Copy {
    /// [`Element::look_up`] for 16-bit elements, as their bits.
    fn look_up_16(self, codes: &[u8], table: &[u16; 16], out: &mut [u16]);
    /// [`Element::look_up`] for float32.
    fn look_up_32(self, codes: &[u8], table: &[f32; 16], out: &mut [f32]);
}

/// Cuts the elements `first..first + out.len()` at block boundaries, and looks up each piece. The
/// caller has checked the range.
#[inline(always)]
pub(super) fn each_block<L: Lookup, T: Element>(l: L, tensor: &Nf4Tensor<'_>, first: u64, mut out: &mut [T]) {
    let block_size = u64::from(tensor.block_size);
    let mut at = first;
    while !out.is_empty() {
        let len = (block_size - at % block_size).min(out.len() as u64) as usize;
        let (mut piece, after) = out.split_at_mut(len);
        // Indices of blocks and code bytes fit usize, because both are in memory.
        let table = T::table(tensor.scales.get((at / block_size) as usize));
        let mut codes = &tensor.codes[(at / 2) as usize..];
        if at % 2 == 1 {
            piece[0] = table[usize::from(codes[0] >> 4)];
            (piece, codes) = (&mut piece[1..], &codes[1..]);
        }
        T::look_up(l, &codes[..piece.len().div_ceil(2)], &table, piece);
        at += len as u64;
        out = after;
    }
}

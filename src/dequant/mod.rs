//! From packed codes and scales back to floats: on the CPU, and on the GPU (`Dequantizer`, feature `gpu`).
//!
//! `value[i] = CODEBOOK[code[i]] * scale[i / block_size]`, one float32 multiply, then for 16-bit outputs one rounding to nearest even.
//! Within a block only sixteen values occur, so they are computed once per block and the backends only look them up.

mod avx2;
#[cfg(feature = "gpu")]
#[doc(hidden)]
pub mod copy_baseline;
#[cfg(feature = "gpu")]
mod error;
#[cfg(feature = "gpu")]
mod kernel;
mod neon;
#[cfg(feature = "train")]
pub(crate) mod operand;
#[cfg(feature = "gpu")]
mod plan;
#[cfg(feature = "gpu")]
pub(crate) mod sample;
mod scalar;
#[cfg(feature = "gpu")]
mod selftest;
#[cfg(feature = "gpu")]
pub mod stream;
#[cfg(test)]
mod tests;

#[cfg(feature = "gpu")]
pub use error::DequantError;
#[cfg(feature = "gpu")]
pub use kernel::{Dequantizer, GpuWeights, KernelChoice, Output};
#[cfg(feature = "gpu")]
#[doc(hidden)]
pub use kernel::{Fast, Setup};

use crate::format::nf4::{self, CODEBOOK, Nf4Tensor, SUPER_BLOCK, Scales};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

/// The elements asked for are not all there: past the end of the tensor, or the projection's codes or scales have not the lengths
/// that its element count and block size call for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("elements {first}..{first}+{count} are not within the {available} that the projection's codes and scales hold")]
pub struct OutOfRange {
    /// The first element asked for.
    pub first: u64,
    /// How many were asked for.
    pub count: u64,
    /// How many there are: the tensor's elements, or 0 where the lengths disagree.
    pub available: u64,
}

/// Writes elements `first..first + out.len()` of the flattened tensor in float32.
///
/// Scales are taken as they are: those of a damaged file give NaN or infinity, as the formula says.
///
/// # Errors
/// [`OutOfRange`]; `out` is then unchanged.
pub fn dequantize(projection: &Nf4Tensor<'_>, first: u64, out: &mut [f32]) -> Result<(), OutOfRange> {
    checked_run(projection, first, out)
}

/// As [`dequantize`], each float32 value rounded to the nearest bfloat16, ties to even.
///
/// # Errors
/// [`OutOfRange`]; `out` is then unchanged.
pub fn dequantize_bf16(projection: &Nf4Tensor<'_>, first: u64, out: &mut [bf16]) -> Result<(), OutOfRange> {
    checked_run(projection, first, out)
}

/// As [`dequantize`], each float32 value rounded to the nearest binary16, ties to even; what rounds beyond 65504 is infinity.
///
/// # Errors
/// [`OutOfRange`]; `out` is then unchanged.
pub fn dequantize_f16(projection: &Nf4Tensor<'_>, first: u64, out: &mut [f16]) -> Result<(), OutOfRange> {
    checked_run(projection, first, out)
}

/// Elements that the bytes of `projection` hold: all or, where their lengths disagree, none.
fn available(projection: &Nf4Tensor<'_>) -> u64 {
    let Nf4Tensor { codes, scales, block_size, elements } = *projection;
    let blocks = nf4::block_count(elements, block_size);
    let scales_fit = match scales {
        Scales::F32(bytes) => blocks.checked_mul(4) == Some(bytes.len() as u64),
        Scales::Bf16(bytes) => blocks.checked_mul(2) == Some(bytes.len() as u64),
        Scales::Dq8 { map, super_scales, codes, .. } => {
            map.len() == 4 * 256
                && codes.len() as u64 == blocks
                && super_scales.len() as u64 == 4 * blocks.div_ceil(SUPER_BLOCK as u64)
        }
    };
    let codes_fit = nf4::codes_len(elements, block_size) == Some(codes.len() as u64);
    if nf4::BLOCK_SIZES.contains(&block_size) && codes_fit && scales_fit { elements } else { 0 }
}

fn checked_run<T: Element>(projection: &Nf4Tensor<'_>, first: u64, out: &mut [T]) -> Result<(), OutOfRange> {
    let (count, available) = (out.len() as u64, available(projection));
    if first.checked_add(count).is_none_or(|end| end > available) {
        return Err(OutOfRange { first, count, available });
    }
    Backend::best().run(projection, first, out);
    Ok(())
}

/// A type of output.
trait Element: Copy {
    /// The sixteen values of a block with this scale.
    fn table(scale: f32) -> [Self; 16];
    /// `out[i] = table[code i]`; `codes` holds `out.len()` codes, low nibbles first, in just enough bytes.
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

/// [`bf16::from_f32`] without a branch, so that a table of sixteen is a few vector instructions.
#[inline(always)]
fn round_to_bf16(value: f32) -> bf16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet_nan = bits >> 16 | 0x40;
    bf16::from_bits(if value.is_nan() { quiet_nan } else { rounded } as u16)
}

/// The one operation that an instruction set speeds up: sixteen-entry table lookups.
trait Lookup: Copy {
    /// [`Element::look_up`] for 16-bit elements, as their bits.
    fn look_up_16(self, codes: &[u8], table: &[u16; 16], out: &mut [u16]);
    /// [`Element::look_up`] for float32.
    fn look_up_32(self, codes: &[u8], table: &[f32; 16], out: &mut [f32]);
}

/// Cuts the elements `first..first + out.len()`, which exist, at the boundaries of blocks and looks each piece up.
#[inline(always)]
fn each_block<L: Lookup, T: Element>(l: L, projection: &Nf4Tensor<'_>, first: u64, mut out: &mut [T]) {
    let block_size = u64::from(projection.block_size);
    let mut at = first;
    while !out.is_empty() {
        let len = (block_size - at % block_size).min(out.len() as u64) as usize;
        let (mut piece, after) = out.split_at_mut(len);
        // Indices of blocks and of bytes of codes fit, since both lie in memory.
        let table = T::table(projection.scales.get((at / block_size) as usize));
        let mut codes = &projection.codes[(at / 2) as usize..];
        if at % 2 == 1 {
            piece[0] = table[usize::from(codes[0] >> 4)];
            (piece, codes) = (&mut piece[1..], &codes[1..]);
        }
        T::look_up(l, &codes[..piece.len().div_ceil(2)], &table, piece);
        at += len as u64;
        out = after;
    }
}

/// An instruction set that this processor has.
#[derive(Debug, Clone, Copy)]
enum Backend {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    #[cfg(target_arch = "aarch64")]
    Neon(neon::Neon),
}

impl Backend {
    /// The fastest one. The standard library caches what it finds out about the processor.
    fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(avx2) = avx2::Avx2::detect() {
            return Self::Avx2(avx2);
        }
        #[cfg(target_arch = "aarch64")]
        if let Some(neon) = neon::Neon::detect() {
            return Self::Neon(neon);
        }
        Self::Scalar
    }

    /// [`each_block`], compiled for this instruction set.
    fn run<T: Element>(self, projection: &Nf4Tensor<'_>, first: u64, out: &mut [T]) {
        match self {
            Self::Scalar => each_block(scalar::Scalar, projection, first, out),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => avx2.run(projection, first, out),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(neon) => neon.run(projection, first, out),
        }
    }
}

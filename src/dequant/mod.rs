//! Decodes packed codes and scales to floats, on the CPU and on the GPU (`Dequantizer`, feature
//! `gpu`).
//!
//! `value[i] = CODEBOOK[code[i]] * scale[i / block_size]`: one float32 multiply, then for 16-bit
//! outputs one rounding to nearest even. A block has only sixteen distinct values. They are
//! computed once per block, and the backends look them up.

mod avx2;
mod blocks;
#[cfg(feature = "gpu")]
mod codec;
#[cfg(feature = "gpu")]
#[doc(hidden)]
pub mod copy_baseline;
#[cfg(feature = "gpu")]
mod dequantizer;
#[cfg(feature = "gpu")]
mod error;
#[cfg(feature = "gpu")]
mod kernel;
mod neon;
#[cfg(feature = "train")]
pub(crate) mod operand;
#[cfg(feature = "gpu")]
mod output;
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
mod weights;

#[cfg(feature = "gpu")]
pub use codec::Codec;
#[cfg(feature = "gpu")]
pub use dequantizer::{Dequantizer, KernelChoice};
#[cfg(feature = "gpu")]
pub use error::DequantError;
#[cfg(feature = "gpu")]
#[doc(hidden)]
pub use kernel::{Fast, Setup};
#[cfg(feature = "gpu")]
pub use output::Output;
#[cfg(feature = "gpu")]
pub use weights::GpuWeights;

use blocks::{Element, each_block};

use crate::format::nf4::{self, Nf4Tensor, SUPER_BLOCK, Scales};
use half::{bf16, f16};

/// The requested elements are out of range. They exceed the tensor, or the lengths of codes or
/// scales do not match its element count and block size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("elements {first}..{first}+{count} exceed the {available} elements of the tensor's codes and scales")]
pub struct OutOfRange {
    /// First requested element.
    pub first: u64,
    /// Number of requested elements.
    pub count: u64,
    /// Elements of the tensor, or 0 if the lengths are inconsistent.
    pub available: u64,
}

/// Writes elements `first..first + out.len()` of the flattened tensor in float32.
///
/// Scales are not checked. Those of a damaged file give NaN or infinity, by the formula.
///
/// # Errors
/// [`OutOfRange`]; `out` is then unchanged.
pub fn dequantize(tensor: &Nf4Tensor<'_>, first: u64, out: &mut [f32]) -> Result<(), OutOfRange> {
    checked_run(tensor, first, out)
}

/// As [`dequantize`], with each float32 value rounded to the nearest bfloat16, ties to even.
///
/// # Errors
/// [`OutOfRange`]; `out` is then unchanged.
pub fn dequantize_bf16(tensor: &Nf4Tensor<'_>, first: u64, out: &mut [bf16]) -> Result<(), OutOfRange> {
    checked_run(tensor, first, out)
}

/// As [`dequantize`], with each float32 value rounded to the nearest binary16, ties to even. A
/// value that rounds beyond 65504 becomes infinity.
///
/// # Errors
/// [`OutOfRange`]; `out` is then unchanged.
pub fn dequantize_f16(tensor: &Nf4Tensor<'_>, first: u64, out: &mut [f16]) -> Result<(), OutOfRange> {
    checked_run(tensor, first, out)
}

/// Elements of `tensor`, or 0 if the lengths of its codes and scales are inconsistent.
fn available(tensor: &Nf4Tensor<'_>) -> u64 {
    let Nf4Tensor { codes, scales, block_size, elements } = *tensor;
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

fn checked_run<T: Element>(tensor: &Nf4Tensor<'_>, first: u64, out: &mut [T]) -> Result<(), OutOfRange> {
    let (count, available) = (out.len() as u64, available(tensor));
    if first.checked_add(count).is_none_or(|end| end > available) {
        return Err(OutOfRange { first, count, available });
    }
    Backend::best().run(tensor, first, out);
    Ok(())
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
    /// The fastest backend. The standard library caches the processor features.
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

    /// As [`each_block`], compiled for this instruction set.
    fn run<T: Element>(self, tensor: &Nf4Tensor<'_>, first: u64, out: &mut [T]) {
        match self {
            Self::Scalar => each_block(scalar::Scalar, tensor, first, out),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => avx2.run(tensor, first, out),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(neon) => neon.run(tensor, first, out),
        }
    }
}

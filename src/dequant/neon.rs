//! The NEON backend: one table lookup per byte of an element, then stores that interleave the
//! bytes. CI runs its tests under qemu (`scripts/neon.sh`).
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]
#![cfg(target_arch = "aarch64")]

use super::blocks::{Element, Lookup, each_block};
use super::scalar;
use crate::format::nf4::Nf4Tensor;
use std::arch::aarch64::*;

/// Proof that the processor has NEON. Only [`Neon::detect`] creates one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Neon(());

impl Neon {
    pub fn detect() -> Option<Self> {
        // The interleaving stores put the low byte first in memory.
        (cfg!(target_endian = "little") && std::arch::is_aarch64_feature_detected!("neon")).then_some(Self(()))
    }

    pub fn run<T: Element>(self, tensor: &Nf4Tensor<'_>, first: u64, out: &mut [T]) {
        #[target_feature(enable = "neon")]
        fn inner<T: Element>(neon: Neon, tensor: &Nf4Tensor<'_>, first: u64, out: &mut [T]) {
            each_block(neon, tensor, first, out);
        }
        // SAFETY: `self` exists, so `detect` has found NEON.
        unsafe { inner(self, tensor, first, out) }
    }
}

/// Unpacks sixteen codes, one per byte, from eight bytes.
#[inline]
#[target_feature(enable = "neon")]
fn unpack(codes: &[u8; 8]) -> uint8x16_t {
    // SAFETY: eight bytes are loaded.
    let pairs = unsafe { vld1_u8(codes.as_ptr()) };
    let halves = vzip_u8(vand_u8(pairs, vdup_n_u8(15)), vshr_n_u8::<4>(pairs));
    vcombine_u8(halves.0, halves.1)
}

#[inline]
#[target_feature(enable = "neon")]
fn look_up_32(codes: &[u8], table: &[f32; 16], out: &mut [f32]) {
    // SAFETY: the 64 bytes of the table; the load splits them into four planes, low bytes first.
    let planes = unsafe { vld4q_u8(table.as_ptr().cast()) };
    let (vectors, rest) = out.as_chunks_mut::<16>();
    let (words, _) = codes.as_chunks::<8>();
    for (out, word) in vectors.iter_mut().zip(words) {
        let codes = unpack(word);
        let bytes = uint8x16x4_t(
            vqtbl1q_u8(planes.0, codes),
            vqtbl1q_u8(planes.1, codes),
            vqtbl1q_u8(planes.2, codes),
            vqtbl1q_u8(planes.3, codes),
        );
        // SAFETY: 64 bytes are written to an array of sixteen floats.
        unsafe { vst4q_u8(out.as_mut_ptr().cast(), bytes) };
    }
    scalar::look_up(&codes[8 * vectors.len()..], table, rest);
}

#[inline]
#[target_feature(enable = "neon")]
fn look_up_16(codes: &[u8], table: &[u16; 16], out: &mut [u16]) {
    // SAFETY: the 32 bytes of the table; the load splits them into two planes, low bytes first.
    let planes = unsafe { vld2q_u8(table.as_ptr().cast()) };
    let (vectors, rest) = out.as_chunks_mut::<16>();
    let (words, _) = codes.as_chunks::<8>();
    for (out, word) in vectors.iter_mut().zip(words) {
        let codes = unpack(word);
        let bytes = uint8x16x2_t(vqtbl1q_u8(planes.0, codes), vqtbl1q_u8(planes.1, codes));
        // SAFETY: 32 bytes are written to an array of sixteen two-byte elements.
        unsafe { vst2q_u8(out.as_mut_ptr().cast(), bytes) };
    }
    scalar::look_up(&codes[8 * vectors.len()..], table, rest);
}

impl Lookup for Neon {
    #[inline(always)]
    fn look_up_16(self, codes: &[u8], table: &[u16; 16], out: &mut [u16]) {
        // SAFETY: `self` exists, so `Neon::detect` has found NEON.
        unsafe { look_up_16(codes, table, out) }
    }

    #[inline(always)]
    fn look_up_32(self, codes: &[u8], table: &[f32; 16], out: &mut [f32]) {
        // SAFETY: `self` exists, so `Neon::detect` has found NEON.
        unsafe { look_up_32(codes, table, out) }
    }
}

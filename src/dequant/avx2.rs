//! The AVX2 backend. It keeps the table of a block in two registers.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]
#![cfg(target_arch = "x86_64")]

use super::blocks::{Element, Lookup, each_block};
use super::scalar;
use crate::format::nf4::Nf4Tensor;
use std::arch::x86_64::*;

/// Proof that the processor has AVX2. Only [`Avx2::detect`] creates one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Avx2(());

impl Avx2 {
    pub fn detect() -> Option<Self> {
        std::is_x86_feature_detected!("avx2").then_some(Self(()))
    }

    pub fn run<T: Element>(self, tensor: &Nf4Tensor<'_>, first: u64, out: &mut [T]) {
        #[target_feature(enable = "avx2")]
        fn inner<T: Element>(avx2: Avx2, tensor: &Nf4Tensor<'_>, first: u64, out: &mut [T]) {
            each_block(avx2, tensor, first, out);
        }
        // SAFETY: `self` exists, so `detect` has found AVX2.
        unsafe { inner(self, tensor, first, out) }
    }
}

/// Looks up eight floats for four bytes of codes.
#[inline]
#[target_feature(enable = "avx2")]
fn floats(codes: [u8; 4], low: __m256, high: __m256) -> __m256 {
    let word = _mm256_set1_epi32(i32::from_le_bytes(codes));
    // A permutation uses the low three bits of a lane. The fourth bit, shifted to the sign, selects
    // the half.
    let codes = _mm256_srlv_epi32(word, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
    _mm256_blendv_ps(
        _mm256_permutevar8x32_ps(low, codes),
        _mm256_permutevar8x32_ps(high, codes),
        _mm256_castsi256_ps(_mm256_slli_epi32::<28>(codes)),
    )
}

#[inline]
#[target_feature(enable = "avx2")]
fn look_up_32(codes: &[u8], table: &[f32; 16], out: &mut [f32]) {
    // SAFETY: both halves of the table are loaded.
    let (low, high) = unsafe { (_mm256_loadu_ps(table.as_ptr()), _mm256_loadu_ps(table.as_ptr().add(8))) };
    let (vectors, rest) = out.as_chunks_mut::<8>();
    let (words, _) = codes.as_chunks::<4>();
    for (out, &word) in vectors.iter_mut().zip(words) {
        // SAFETY: eight floats are written to an array of eight.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), floats(word, low, high)) };
    }
    scalar::look_up(&codes[4 * vectors.len()..], table, rest);
}

#[inline]
#[target_feature(enable = "avx2")]
fn look_up_16(codes: &[u8], table: &[u16; 16], out: &mut [u16]) {
    // SAFETY: the whole table is loaded.
    let table_bits = unsafe { _mm256_loadu_si256(table.as_ptr().cast()) };
    // The low bytes of the sixteen entries in one register, the high bytes in another, each in both
    // halves.
    let split = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    let split = _mm256_shuffle_epi8(table_bits, split);
    let low_bytes = _mm256_permute4x64_epi64::<0b10_00_10_00>(split);
    let high_bytes = _mm256_permute4x64_epi64::<0b11_01_11_01>(split);

    let (vectors, rest) = out.as_chunks_mut::<32>();
    let (words, _) = codes.as_chunks::<16>();
    for (out, word) in vectors.iter_mut().zip(words) {
        // SAFETY: sixteen bytes of codes.
        let pairs = _mm256_cvtepu8_epi16(unsafe { _mm_loadu_si128(word.as_ptr().cast()) });
        // 16-bit lanes 0x00HL become 0x0H0L: one code per byte, in order.
        let codes = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi16::<4>(pairs)), _mm256_set1_epi8(15));
        let (low, high) = (_mm256_shuffle_epi8(low_bytes, codes), _mm256_shuffle_epi8(high_bytes, codes));
        // Unpack works within halves: elements 0..8 and 16..24, then 8..16 and 24..32.
        let (a, b) = (_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high));
        // SAFETY: 64 bytes are written to an array of 32 two-byte elements.
        unsafe {
            _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm256_permute2x128_si256::<0x20>(a, b));
            _mm256_storeu_si256(out.as_mut_ptr().add(16).cast(), _mm256_permute2x128_si256::<0x31>(a, b));
        }
    }
    scalar::look_up(&codes[16 * vectors.len()..], table, rest);
}

impl Lookup for Avx2 {
    #[inline(always)]
    fn look_up_16(self, codes: &[u8], table: &[u16; 16], out: &mut [u16]) {
        // SAFETY: `self` exists, so `Avx2::detect` has found AVX2.
        unsafe { look_up_16(codes, table, out) }
    }

    #[inline(always)]
    fn look_up_32(self, codes: &[u8], table: &[f32; 16], out: &mut [f32]) {
        // SAFETY: `self` exists, so `Avx2::detect` has found AVX2.
        unsafe { look_up_32(codes, table, out) }
    }
}

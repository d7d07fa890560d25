//! Tests every backend against one multiplication per element.

use super::blocks::round_to_bf16;
use super::*;
use crate::format::nf4::{CODEBOOK, ScaleType};
use proptest::prelude::*;

/// All backends of this machine, the reference first.
fn backends() -> Vec<Backend> {
    #[allow(unused_mut)]
    let mut backends = vec![Backend::Scalar];
    #[cfg(target_arch = "x86_64")]
    backends.extend(avx2::Avx2::detect().map(Backend::Avx2));
    #[cfg(target_arch = "aarch64")]
    backends.extend(neon::Neon::detect().map(Backend::Neon));
    backends
}

/// Element `i`, by the formula.
fn naive(tensor: &Nf4Tensor<'_>, i: u64) -> f32 {
    let code = tensor.codes[(i / 2) as usize] >> (4 * (i % 2)) & 15;
    CODEBOOK[usize::from(code)] * tensor.scales.get((i / u64::from(tensor.block_size)) as usize)
}

/// Checks elements `first..first + len` in all three types on every backend.
fn check(tensor: &Nf4Tensor<'_>, first: u64, len: usize) {
    let expected: Vec<f32> = (first..first + len as u64).map(|i| naive(tensor, i)).collect();
    for backend in backends() {
        let mut out = vec![-12345.0_f32; len];
        backend.run(tensor, first, &mut out);
        for (got, want) in out.iter().zip(&expected) {
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{backend:?}: {got} for {want}");
        }
        let mut out = vec![bf16::MIN; len];
        backend.run(tensor, first, &mut out);
        for (got, want) in out.iter().zip(expected.iter().map(|&x| bf16::from_f32(x))) {
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{backend:?}: {got} for {want}");
        }
        let mut out = vec![f16::MIN; len];
        backend.run(tensor, first, &mut out);
        for (got, want) in out.iter().zip(expected.iter().map(|&x| f16::from_f32(x))) {
            assert!(got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan(), "{backend:?}: {got} for {want}");
        }
    }
}

fn scale_type() -> impl Strategy<Value = ScaleType> {
    prop_oneof![Just(ScaleType::F32), Just(ScaleType::Bf16), Just(ScaleType::Dq8)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 4 } else { 128 }))]

    #[test]
    fn every_range_of_every_tensor(
        scale_type in scale_type(),
        elements in 1..3000_u64,
        size in 0..4_usize,
        seed in any::<u32>(),
        range in (0.0..1.0_f64, 0.0..1.0_f64),
        ordinary in any::<bool>(),
    ) {
        let block_size = nf4::BLOCK_SIZES[size];
        let blocks = nf4::block_count(elements, block_size);
        let mut state = seed;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_le_bytes()[3]
        };
        // One extra byte at the front makes everything unaligned.
        let codes: Vec<u8> = (0..=nf4::codes_len(elements, block_size).unwrap()).map(|_| random()).collect();
        let len = nf4::scales_len(blocks, scale_type).unwrap();
        // Random bits give floats of all magnitudes and NaN. The other scales have one exponent.
        let mut payload: Vec<u8> = (0..len).map(|_| random()).collect();
        if ordinary && scale_type != ScaleType::Dq8 {
            let size = if scale_type == ScaleType::F32 { 4 } else { 2 };
            payload.chunks_mut(size).for_each(|scale| scale[size - 1] = 0x3c);
        }
        let scales = Scales::from_payload(&payload, scale_type, blocks as usize).unwrap();
        let tensor = Nf4Tensor { codes: &codes[1..], scales, block_size, elements };
        let first = (range.0 * elements as f64) as u64;
        let len = (range.1 * (elements - first) as f64) as usize;
        check(&tensor, first, len);
        check(&tensor, 0, elements as usize);
    }
}

#[test]
fn rounding_to_bf16_is_that_of_half() {
    for high in 0..=0xffff_u32 {
        for low in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
            let value = f32::from_bits(high << 16 | low);
            assert_eq!(round_to_bf16(value).to_bits(), bf16::from_f32(value).to_bits(), "{value}");
        }
    }
}

#[test]
fn the_words_of_the_specification() {
    let codes = 0x90F5_1C73_u32.to_le_bytes();
    let codes = [codes.as_slice(), &[0x77; 12]].concat();
    let tensor = Nf4Tensor { codes: &codes, scales: Scales::F32(&2.0_f32.to_le_bytes()), block_size: 32, elements: 8 };
    let mut out = [0.0; 8];
    dequantize(&tensor, 0, &mut out).unwrap();
    assert_eq!(out, [3, 7, 12, 1, 5, 15, 0, 9].map(|code: usize| CODEBOOK[code] * 2.0));
}

#[test]
fn what_does_not_fit_is_an_error() {
    let (codes, scales) = ([0x77; 64], [0; 8]);
    let good = Nf4Tensor { codes: &codes, scales: Scales::F32(&scales), block_size: 64, elements: 100 };
    let mut out = [1.0; 100];
    assert_eq!(dequantize(&good, 0, &mut out), Ok(()));
    assert_eq!(dequantize(&good, 100, &mut []), Ok(()));
    let refused = |tensor: &Nf4Tensor<'_>, first, len: usize, available| {
        let expected = Err(OutOfRange { first, count: len as u64, available });
        assert_eq!(dequantize(tensor, first, &mut vec![1.0; len]), expected);
        assert_eq!(dequantize_bf16(tensor, first, &mut vec![bf16::ONE; len]), expected);
        assert_eq!(dequantize_f16(tensor, first, &mut vec![f16::ONE; len]), expected);
    };
    refused(&good, 1, 100, 100);
    refused(&good, 101, 0, 100);
    refused(&good, u64::MAX, 1, 100);
    for bad in [
        Nf4Tensor { codes: &codes[1..], ..good },
        Nf4Tensor { scales: Scales::F32(&scales[1..]), ..good },
        Nf4Tensor { scales: Scales::Bf16(&scales), ..good },
        Nf4Tensor { elements: 129, ..good },
        Nf4Tensor { elements: u64::MAX, ..good },
        Nf4Tensor { block_size: 0, ..good },
        Nf4Tensor { block_size: 66, ..good },
        Nf4Tensor { scales: Scales::Dq8 { offset: 0.0, map: &[0; 1023], super_scales: &[0; 4], codes: &[0; 2] }, ..good },
        Nf4Tensor { scales: Scales::Dq8 { offset: 0.0, map: &[0; 1024], super_scales: &[0; 3], codes: &[0; 2] }, ..good },
        Nf4Tensor { scales: Scales::Dq8 { offset: 0.0, map: &[0; 1024], super_scales: &[0; 4], codes: &[0; 3] }, ..good },
    ] {
        refused(&bad, 0, 1, 0);
    }
}

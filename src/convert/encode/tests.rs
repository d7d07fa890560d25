//! Every backend against the scalar one, and the scalar one against a linear search.

use half::{bf16, f16};
use proptest::prelude::*;

use super::*;
use crate::format::FloatType;
use crate::format::nf4::{BLOCK_SIZES, CODEBOOK, MIDPOINTS};

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

/// `values` in `float_type`, after `offset` other bytes, so that the weights start at any
/// alignment.
fn bytes_of(values: &[f32], float_type: FloatType, offset: usize) -> Vec<u8> {
    let mut bytes = vec![0xff; offset];
    for &value in values {
        match float_type {
            FloatType::F32 => bytes.extend(value.to_le_bytes()),
            FloatType::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
            FloatType::Bf16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
        }
    }
    bytes
}

const FLOAT_TYPES: [FloatType; 3] = [FloatType::F32, FloatType::F16, FloatType::Bf16];
const ENCODERS: [(Encoder, ScalePrecision); 4] = [
    (Encoder::Absmax, ScalePrecision::F32),
    (Encoder::Absmax, ScalePrecision::Bf16),
    (Encoder::Mse, ScalePrecision::F32),
    (Encoder::Mse, ScalePrecision::Bf16),
];

/// Codes, scales and statistics, as bits.
type Encoded = (Vec<u8>, Vec<u32>, [u64; 5]);

fn bits(stats: Stats) -> [u64; 5] {
    let (max_abs_error, worst_block) = (u64::from(stats.max_abs_error.to_bits()), stats.worst_block.relative().to_bits());
    [stats.weights, stats.sum_sq.to_bits(), stats.sum_sq_error.to_bits(), max_abs_error, worst_block]
}

fn encode_on(
    backend: Backend,
    (encoder, precision): (Encoder, ScalePrecision),
    block_size: u32,
    weights: Weights<'_>,
) -> Result<Encoded, usize> {
    let block = block_size as usize;
    let blocks = weights.len().div_ceil(block);
    let (mut codes, mut scales) = (vec![0xee; blocks * block / 2], vec![f32::NAN; blocks]);
    let (to, of) = (&mut codes, &mut scales);
    let stats = match encoder {
        Encoder::Absmax => backend.run(Encode::<false> { precision, block, weights, codes: to, scales: of }),
        Encoder::Mse => backend.run(Encode::<true> { precision, block, weights, codes: to, scales: of }),
    };
    let stats = stats.map_err(|not_finite| not_finite.index)?;
    Ok((codes, scales.iter().map(|s| s.to_bits()).collect(), bits(stats)))
}

fn encode_with_on(backend: Backend, block_size: u32, weights: Weights<'_>, scales: &[f32]) -> (Vec<u8>, [u64; 5]) {
    let block = block_size as usize;
    let mut codes = vec![0xee; scales.len() * block / 2];
    let stats = backend.run(EncodeWithScales { block, weights, scales, codes: &mut codes });
    (codes, bits(stats))
}

fn choose_on(backend: Backend, encoder: Encoder, block_size: u32, weights: Weights<'_>) -> (Vec<f32>, Vec<Margin>) {
    let block = block_size as usize;
    let mut scales = vec![f32::NAN; weights.len().div_ceil(block)];
    let mut margins = vec![Margin::default(); scales.len()];
    backend.run(ChooseScales { encoder, block, weights, scales: &mut scales, margins: &mut margins }).unwrap();
    (scales, margins)
}

/// What each block has to spare, by encoding it twice.
fn check_margins(block_size: u32, weights: Weights<'_>, margins: &[Margin]) {
    let bytes = block_size as usize * weights.float_type.size();
    for (bytes, margin) in weights.bytes.chunks(bytes).zip(margins) {
        let weights = Weights { float_type: weights.float_type, bytes };
        let [absmax, mse] = [Encoder::Absmax, Encoder::Mse].map(|encoder| {
            let (mut scale, mut error) = ([0.0], [BlockError::default()]);
            choose_scales(encoder, block_size, weights, &mut scale).unwrap();
            block_errors(block_size, weights, &scale, &mut error);
            error[0]
        });
        let (sum_sq, gain) = (absmax.sum_sq, absmax.sum_sq_error - mse.sum_sq_error);
        let gain = if sum_sq == 0.0 { 0.0 } else { gain / sum_sq };
        assert!(gain >= 0.0 && (f64::from(margin.gain) - gain).abs() <= 1e-5 * (1.0 + gain), "{margin:?} {gain}");
        assert_eq!(margin.sum_sq, sum_sq as f32);
    }
}

/// The code of element `i`.
fn code(codes: &[u8], i: usize) -> usize {
    usize::from(codes[i / 2] >> (4 * (i % 2)) & 15)
}

/// The code of `s` by a linear search. A loop over indices, because iterators are slow without
/// optimisation.
fn naive_code(s: f32) -> usize {
    let (mut code, mut i) = (0, 0);
    while i < MIDPOINTS.len() {
        code += usize::from(MIDPOINTS[i] < s);
        i += 1;
    }
    code
}

/// Checks one encoding against what the definitions say, with nothing shared but the codebook.
fn check_encoding(how: (Encoder, ScalePrecision), block_size: u32, weights: Weights<'_>, encoded: &Encoded) {
    let (codes, scales, stats) = encoded;
    let block = block_size as usize;
    let (mut sq, mut sq_error, mut max_error, mut worst) = (0.0_f64, 0.0_f64, 0.0_f32, 0.0_f64);
    for (b, scale) in scales.iter().map(|&bits| f32::from_bits(bits)).enumerate() {
        let w: Vec<f32> = (b * block..weights.len().min((b + 1) * block)).map(|i| weights.get(i)).collect();
        let absmax = w.iter().fold(0.0_f32, |absmax, w| absmax.max(w.abs()));
        assert!(scale.is_finite());
        if how.1 == ScalePrecision::Bf16 {
            assert_eq!(scale.to_bits() & 0xffff, 0, "not a bfloat16: {scale}");
        }
        if absmax == 0.0 {
            assert_eq!(scale, 1.0);
        } else if how.0 == Encoder::Absmax {
            assert_eq!(scale, how.1.round(absmax));
        }
        let divisor = if how.0 == Encoder::Absmax { scale.max(1e-38) } else { scale };
        let (mut block_sq, mut block_sq_error) = (0.0_f64, 0.0_f64);
        for i in 0..block {
            let code = code(codes, b * block + i);
            let Some(&w) = w.get(i) else {
                assert_eq!(code, 7, "padding");
                continue;
            };
            let s = if w_len(weights, b, block) < block || absmax < 1e-30 && how.0 == Encoder::Mse {
                w / divisor
            } else {
                w * (1.0 / divisor)
            };
            let expected = if s.is_nan() { 7 } else { naive_code(s) };
            if scale != 0.0 {
                assert_eq!(code, expected, "block {b} element {i}: {w} at scale {scale}");
            }
            let error = w - CODEBOOK[code] * scale;
            block_sq += f64::from(w) * f64::from(w);
            block_sq_error += f64::from(error) * f64::from(error);
            max_error = max_error.max(error.abs());
        }
        sq += block_sq;
        sq_error += block_sq_error;
        worst = worst.max(if block_sq == 0.0 { 0.0 } else { (block_sq_error / block_sq).sqrt() });
    }
    assert_eq!(stats[0], weights.len() as u64);
    // What is 2^-74 of the largest weight may vanish from a sum.
    let close = |got: u64, want: f64| (f64::from_bits(got) - want).abs() <= 1e-5 * want + 1e-40 * sq;
    assert!(close(stats[1], sq) && close(stats[2], sq_error), "{stats:?} against {sq} {sq_error}");
    assert_eq!(stats[3], u64::from(max_error.to_bits()));
    let found = f64::from_bits(stats[4]);
    assert!((found - worst).abs() <= 1e-4 * worst + 1e-20, "worst block {found} against {worst}");
}

fn w_len(weights: Weights<'_>, b: usize, block: usize) -> usize {
    block.min(weights.len() - b * block)
}

/// The one runner: `values` through every encoder and backend.
fn check_all(values: &[f32], block_size: u32, offset: usize) {
    for float_type in FLOAT_TYPES {
        let bytes = bytes_of(values, float_type, offset);
        let weights = Weights { float_type, bytes: &bytes[offset..] };
        for how in ENCODERS {
            let reference = encode_on(Backend::Scalar, how, block_size, weights);
            for backend in backends() {
                assert_eq!(encode_on(backend, how, block_size, weights), reference, "{backend:?} {how:?} {float_type}");
            }
            let Ok(reference) = reference else {
                let first = (0..weights.len()).find(|&i| !weights.get(i).is_finite());
                assert_eq!(reference.unwrap_err(), first.unwrap());
                continue;
            };
            check_encoding(how, block_size, weights, &reference);
            check_two_passes(how, block_size, weights, &reference);
        }
    }
}

/// The errors of blocks are those that encoding each of them finds.
fn check_block_errors(backend: Backend, block_size: u32, weights: Weights<'_>, scales: &[f32]) {
    let block = block_size as usize;
    let mut errors = vec![BlockError { sum_sq: f64::NAN, sum_sq_error: f64::NAN }; scales.len()];
    backend.run(BlockErrors { block, weights, scales, errors: &mut errors });
    let blocks = weights.bytes.chunks(block * weights.float_type.size()).zip(scales);
    for ((bytes, scale), error) in blocks.zip(errors) {
        let weights = Weights { float_type: weights.float_type, bytes };
        let (_, stats) = encode_with_on(Backend::Scalar, block_size, weights, &[*scale]);
        assert_eq!(stats[1..3], [error.sum_sq.to_bits(), error.sum_sq_error.to_bits()], "{backend:?}");
    }
}

/// The error of weights that a far larger scale rounds to zero is all of them, also where its
/// square in units of the scale would vanish.
#[test]
fn weights_far_below_their_scale_are_lost_and_counted() {
    let bytes: Vec<u8> = (0..64).flat_map(|i| (0.01 * (i as f32 - 31.5)).to_le_bytes()).collect();
    let weights = Weights { float_type: FloatType::F32, bytes: &bytes };
    for backend in backends() {
        for scale in [1e3, 1e20, 1e30, -1e30, f32::MAX] {
            let mut errors = [BlockError::default()];
            backend.run(BlockErrors { block: 64, weights, scales: &[scale], errors: &mut errors });
            assert_eq!(errors[0].relative(), 1.0, "{backend:?} {scale}");
        }
    }
}

/// The two passes of a nested table give what one call gives, and agree between backends.
fn check_two_passes(how: (Encoder, ScalePrecision), block_size: u32, weights: Weights<'_>, once: &Encoded) {
    let reference = choose_on(Backend::Scalar, how.0, block_size, weights);
    if how.0 == Encoder::Mse {
        check_margins(block_size, weights, &reference.1);
    }
    for backend in backends() {
        let (scales, margins) = choose_on(backend, how.0, block_size, weights);
        assert_eq!((&scales, &margins), (&reference.0, &reference.1), "{backend:?}");
        if how.1 == ScalePrecision::F32 {
            for (&scale, &of_once) in scales.iter().zip(&once.1) {
                assert!(scale.to_bits() == of_once || scale == 0.0 && f32::from_bits(of_once) == 1.0);
            }
            let (codes, stats) = encode_with_on(backend, block_size, weights, &scales);
            if how.0 == Encoder::Mse {
                assert_eq!((&codes, stats), (&once.0, once.2));
            }
        }
        // Other scales than the weights', as nesting may give: smaller, larger, negative, zero.
        for factor in [-1.1, 1e-3, -1e3, 0.0] {
            let scales: Vec<f32> = scales.iter().map(|s| (s * factor).clamp(f32::MIN, f32::MAX)).collect();
            let got = encode_with_on(backend, block_size, weights, &scales);
            check_block_errors(backend, block_size, weights, &scales);
            assert_eq!(got, encode_with_on(Backend::Scalar, block_size, weights, &scales), "{backend:?} {factor}");
            if factor == 0.0 {
                assert!(got.0.iter().all(|&byte| byte == 0x77));
            }
        }
    }
}

/// Weights of many magnitudes: ordinary, outliers, subnormal, huge, zeros of both signs.
fn weight() -> impl Strategy<Value = f32> {
    prop_oneof![
        20 => -0.1_f32..0.1,
        2 => -5.0_f32..5.0,
        1 => Just(0.0),
        1 => Just(-0.0),
        1 => (0..15_usize).prop_map(|i| MIDPOINTS[i]),
    ]
}

fn power() -> impl Strategy<Value = f32> {
    prop_oneof![6 => Just(1.0_f32), 1 => Just(1e38), 1 => Just(1e-20), 1 => Just(1e-36), 1 => Just(1e-38), 1 => Just(1e-42), 1 => Just(0.0)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 2 } else { 32 }))]

    #[test]
    fn backends_agree_and_are_right(
        values in prop::collection::vec(weight(), 0..300),
        power in power(),
        size in 0..4_usize,
        offset in 0..5_usize,
    ) {
        let values: Vec<f32> = values.iter().map(|v| (v * power).clamp(f32::MIN, f32::MAX)).collect();
        check_all(&values, BLOCK_SIZES[size], offset);
    }

    #[test]
    fn raw_bits_never_panic(bits in prop::collection::vec(any::<u32>(), 1..200), size in 0..2_usize) {
        // Any float there is, with most exponents at the extremes; not-a-numbers included.
        let values: Vec<f32> = bits.iter().map(|&bits| f32::from_bits(bits)).collect();
        check_all(&values, BLOCK_SIZES[size], 1);
        let finite: Vec<f32> = values.iter().map(|v| if v.is_finite() { *v } else { f32::MAX }).collect();
        check_all(&finite, BLOCK_SIZES[size], 1);
    }
}

/// Few enough for Miri: a whole block and a part of one, at an odd address, through every backend.
#[test]
fn few_weights_on_all_backends() {
    let values: Vec<f32> = (0..41).map(|i| ((i * 37 % 41) as f32 - 20.0) / 16.0).collect();
    for float_type in FLOAT_TYPES {
        let bytes = bytes_of(&values, float_type, 1);
        let weights = Weights { float_type, bytes: &bytes[1..] };
        for how in [(Encoder::Absmax, ScalePrecision::F32), (Encoder::Mse, ScalePrecision::Bf16)] {
            let expected = encode_on(Backend::Scalar, how, 32, weights).unwrap();
            for backend in backends() {
                assert_eq!(encode_on(backend, how, 32, weights).unwrap(), expected, "{float_type:?} {how:?}");
                let scales: Vec<f32> = expected.1.iter().map(|&bits| f32::from_bits(bits)).collect();
                assert_eq!(encode_with_on(backend, 32, weights, &scales).0, expected.0);
            }
        }
    }
}

#[test]
fn large_blocks() {
    let values: Vec<f32> = (0..5000_u32).map(|i| (i.wrapping_mul(2_654_435_769) as f32 / 4e9 - 0.5) * 0.1).collect();
    for block_size in [512, 1024, 2048, 4096] {
        // A whole block and a part of one.
        let len = block_size as usize;
        check_all(&values[..len * 6 / 5], block_size, 3);
        // The integer sums of the search at their largest.
        check_all(&vec![1.0; len], block_size, 0);
    }
}

#[test]
fn a_not_finite_weight_is_found_at_every_position() {
    for len in [1, 8, 33, 100] {
        for at in 0..len {
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = vec![0.5; len];
                values[at] = bad;
                for float_type in FLOAT_TYPES {
                    let bytes = bytes_of(&values, float_type, 1);
                    let weights = Weights { float_type, bytes: &bytes[1..] };
                    for backend in backends() {
                        for how in ENCODERS {
                            assert_eq!(encode_on(backend, how, 32, weights).unwrap_err(), at);
                        }
                        let found = backend.run(FirstNotFinite { weights }).unwrap();
                        assert_eq!((found.index, found.value.is_nan()), (at, bad.is_nan()));
                    }
                }
            }
        }
    }
    let many = vec![0; 3 * 4096 * 2];
    assert_eq!(first_not_finite(Weights { float_type: FloatType::Bf16, bytes: &many }), None);
}

#[test]
fn mse_is_never_worse_than_absmax_in_any_block() {
    let mut state = 7_u32;
    let values: Vec<f32> = (0..64 * 64)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let x = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
            x * x * x
        })
        .collect();
    let bytes = bytes_of(&values, FloatType::F32, 0);
    let error = |how, bytes| {
        let stats = encode_on(Backend::best(), how, 64, Weights { float_type: FloatType::F32, bytes }).unwrap().2;
        f64::from_bits(stats[2])
    };
    let (mut absmax, mut mse) = (0.0, 0.0);
    for block in bytes.chunks(64 * 4) {
        for precision in [ScalePrecision::F32, ScalePrecision::Bf16] {
            let (a, m) = (error((Encoder::Absmax, precision), block), error((Encoder::Mse, precision), block));
            assert!(m <= a, "{m} against {a}");
            (absmax, mse) = (absmax + a, mse + m);
        }
    }
    assert!(mse < 0.9 * absmax, "{mse} against {absmax}");
}

#[test]
fn tiny_blocks_keep_their_signal_with_mse() {
    let values: Vec<f32> = (0..64).map(|i| (i - 32) as f32 * 1e-41).collect();
    let bytes = bytes_of(&values, FloatType::F32, 0);
    let weights = Weights { float_type: FloatType::F32, bytes: &bytes };
    let (mut codes, mut scales) = ([0; 32], [0.0]);
    let stats = encode(Encoder::Mse, ScalePrecision::F32, 64, weights, &mut codes, &mut scales).unwrap();
    assert!(stats.relative_sq_error() < 0.02, "{stats:?}");
}

#[test]
#[should_panic(expected = "block size 48")]
fn another_block_size_is_the_callers_mistake() {
    let weights = Weights { float_type: FloatType::F32, bytes: &[] };
    let _ = encode(Encoder::Absmax, ScalePrecision::F32, 48, weights, &mut [], &mut []);
}

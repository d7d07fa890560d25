//! Weights per second of the encoders: one thread, block 64, bf16. One input is a buffer that
//! exceeds the caches, the other a piece of the converter, which fits.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark stops at the first failure")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;
use nf4pack::convert::encode::{self, Encoder, ScalePrecision, Weights};
use nf4pack::format::FloatType;
use std::hint::black_box;

const WEIGHTS: usize = 16 << 20;
const BLOCK: u32 = 64;
/// Weights per piece of the converter.
const PIECE: usize = 1 << 17;

/// Roughly normal weights, as little-endian bf16: the sum of four uniform numbers, from a fixed
/// linear congruential generator.
fn bf16_weights() -> Vec<u8> {
    let mut state = 1_u64;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..WEIGHTS).flat_map(|_| bf16::from_f32(0.04 * (uniform() + uniform() + uniform() + uniform())).to_le_bytes()).collect()
}

fn encoders(c: &mut Criterion) {
    let bytes = bf16_weights();
    let weights = Weights { float_type: FloatType::Bf16, bytes: &bytes };
    let mut codes = vec![0; WEIGHTS / 2];
    let mut scales = vec![0.0; WEIGHTS / BLOCK as usize];
    let mut group = c.benchmark_group("encode");
    group.throughput(Throughput::Elements(WEIGHTS as u64)).sample_size(10);
    for encoder in [Encoder::Absmax, Encoder::Mse] {
        group.bench_function(encoder.name(), |b| {
            b.iter(|| {
                let stats = encode::encode(encoder, ScalePrecision::Bf16, BLOCK, weights, &mut codes, &mut scales);
                black_box(stats).unwrap()
            });
        });
    }
    let piece = Weights { float_type: FloatType::Bf16, bytes: &bytes[..2 * PIECE] };
    group.throughput(Throughput::Elements(PIECE as u64));
    for encoder in [Encoder::Absmax, Encoder::Mse] {
        let (codes, scales) = (&mut codes[..PIECE / 2], &mut scales[..PIECE / BLOCK as usize]);
        group.bench_function(format!("{}, one piece", encoder.name()), |b| {
            b.iter(|| black_box(encode::encode(encoder, ScalePrecision::Bf16, BLOCK, piece, codes, scales)).unwrap());
        });
    }
    group.throughput(Throughput::Elements(WEIGHTS as u64));
    group.bench_function("choose_scales absmax", |b| {
        b.iter(|| black_box(encode::choose_scales(Encoder::Absmax, BLOCK, weights, &mut scales)).unwrap());
    });
    group.bench_function("encode_with_scales", |b| {
        b.iter(|| black_box(encode::encode_with_scales(BLOCK, weights, &scales, &mut codes)));
    });
    group.bench_function("first_not_finite", |b| b.iter(|| black_box(encode::first_not_finite(weights))));
    group.finish();
}

criterion_group!(benches, encoders);
criterion_main!(benches);

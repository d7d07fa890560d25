//! Output bytes per second of dequantisation and of a memcpy of the same output: one thread, block
//! 64.
#![forbid(unsafe_code)]
#![allow(clippy::unwrap_used, missing_docs, reason = "a benchmark stops at the first failure")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::{bf16, f16};
use nf4pack::dequant;
use nf4pack::format::nf4::{Nf4Tensor, Scales};
use std::hint::black_box;

const ELEMENTS: usize = 32 << 20;
const BLOCK: usize = 64;

fn decoders(c: &mut Criterion) {
    let codes: Vec<u8> = (0..ELEMENTS / 2).map(|i| (i as u32).wrapping_mul(2_654_435_769).to_le_bytes()[3]).collect();
    let scales: Vec<f32> = (0..ELEMENTS / BLOCK).map(|i| 0.02 + (i % 1000) as f32 * 1e-5).collect();
    let f32_bytes: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
    let bf16_bytes: Vec<u8> = scales.iter().flat_map(|&s| bf16::from_f32(s).to_le_bytes()).collect();
    let map: Vec<u8> = (0..256).flat_map(|i| ((i as f32 - 127.0) / 128.0).to_le_bytes()).collect();
    let super_scales: Vec<u8> = (0..(ELEMENTS / BLOCK).div_ceil(256)).flat_map(|_| 0.01_f32.to_le_bytes()).collect();
    let dq8 = Scales::Dq8 { offset: 0.03, map: &map, super_scales: &super_scales, codes: &codes[..ELEMENTS / BLOCK] };
    let with = |scales| Nf4Tensor { codes: &codes, scales, block_size: BLOCK as u32, elements: ELEMENTS as u64 };

    let mut group = c.benchmark_group("dequant");
    group.sample_size(10).throughput(Throughput::Bytes(4 * ELEMENTS as u64));
    let (from, mut to) = (vec![1.0_f32; ELEMENTS], vec![0.0_f32; ELEMENTS]);
    group.bench_function("memcpy", |b| b.iter(|| to.copy_from_slice(black_box(&from))));
    for (name, scales) in [
        ("f32, f32 scales", Scales::F32(&f32_bytes)),
        ("f32, bf16 scales", Scales::Bf16(&bf16_bytes)),
        ("f32, dq8 scales", dq8),
    ] {
        group.bench_function(name, |b| b.iter(|| dequant::dequantize(black_box(&with(scales)), 0, &mut to).unwrap()));
    }
    group.throughput(Throughput::Bytes(2 * ELEMENTS as u64));
    let mut to = vec![bf16::ZERO; ELEMENTS];
    group.bench_function("bf16, bf16 scales", |b| {
        b.iter(|| dequant::dequantize_bf16(black_box(&with(Scales::Bf16(&bf16_bytes))), 0, &mut to).unwrap());
    });
    let mut to = vec![f16::ZERO; ELEMENTS];
    group.bench_function("f16, bf16 scales", |b| {
        b.iter(|| dequant::dequantize_f16(black_box(&with(Scales::Bf16(&bf16_bytes))), 0, &mut to).unwrap());
    });
    group.finish();
}

criterion_group!(benches, decoders);
criterion_main!(benches);

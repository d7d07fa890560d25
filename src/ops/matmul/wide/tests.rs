//! Tests of products of few rows with weights of whole vectors.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::time::{Duration, Instant};

use super::*;
use crate::dequant::copy_baseline::CopyKernel;
use crate::dequant::{Codec, GpuWeights};
use crate::format::nf4::{self, Nf4Tensor};
use crate::ops::matmul::Matmul;
use crate::ops::matmul::tests::{BOUND, Frozen, reference, round};
use crate::ops::matmul::trial::of_wide;
use crate::ops::testing::{assert_close, assert_untouched, gpu, poisoned, random, random_mat};

/// One to three weights of whole vectors in one buffer, with each form of a product of few rows.
#[test]
fn few_rows_of_whole_vectors() {
    let Some(gpu) = &gpu() else { return };
    let matmul = Matmul::new(gpu, None).unwrap();
    let kinds: [&dyn Fn(u32, u32) -> Frozen; 5] = [
        &|n, k| Frozen::nf4(gpu, n, k, 64, ScaleType::F32),
        &|n, k| Frozen::nf4(gpu, n, k, 32, ScaleType::Bf16),
        &|n, k| Frozen::nf4(gpu, n, k, 256, ScaleType::Dq8),
        &|n, k| Frozen::raw(gpu, n, k, FloatType::Bf16, usize::MAX),
        &|n, k| Frozen::raw(gpu, n, k, FloatType::F16, usize::MAX),
    ];
    let shapes = [(1, vec![37], 96), (2, vec![1, 37, 53], 32), (3, vec![70, 75, 145], 1056), (8, vec![9, 18], 160)];
    for (number, kind) in kinds.into_iter().enumerate() {
        // Each combination has kernels of its own, which software drivers take seconds to compile.
        for (m, ends, k) in [0, 1].map(|next| shapes[(number + next) % shapes.len()].clone()) {
            let n = *ends.last().unwrap();
            let frozen = kind(n, k);
            let whole = frozen.weight();
            let starts = [vec![0], ends.clone()].concat();
            let parts: Vec<Weight<'_>> = starts.iter().zip(&ends).map(|(&a, &b)| whole.rows(a..b).times(-0.5)).collect();
            let weights: Vec<&Weight<'_>> = parts.iter().collect();
            let what = format!("{number}: {m} {ends:?} {k}");
            let ((x, xs), (gamma, gammas)) = (random_mat(gpu, 1, m, k), random_mat(gpu, 2, 1, k));
            let (addend, addends) = random_mat(gpu, 3, m, n);
            let (bias, biases) = random_mat(gpu, 4, 1, n);
            let factor =
                |row: &[f32]| 1.0 / (row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / f64::from(k) + 0.125).sqrt();
            let factors: Vec<f64> = xs.chunks(k as usize).map(factor).collect();
            let product = |normed: bool| {
                reference(m, n, k, |i, j, t| {
                    let norm = if normed { factors[i] * f64::from(gammas[t]) } else { 1.0 };
                    -0.5 * norm * f64::from(xs[i * k as usize + t]) * frozen.value(j, t)
                })
            };
            let run = |wide: Wide<'_>, columns: u32| {
                let out = poisoned(gpu, m, columns);
                let mut commands = gpu.commands("few rows");
                assert!(matmul.wide(&mut commands, &x, &wide, &out).unwrap(), "{what}");
                commands.submit().unwrap();
                assert_untouched(gpu, &out);
                out.read(gpu).unwrap()
            };
            assert_close(&what, &run(Wide::of(&weights), n), &round(product(false)), BOUND);
            let norm = Some((&gamma, 0.125));
            let added = product(true).iter().zip(&addends).map(|(y, &a)| y + f64::from(a)).collect();
            assert_close(&what, &run(Wide { norm, addend: Some(&addend), ..Wide::of(&weights) }, n), &round(added), BOUND);
            if weights.len() == 1 {
                let all = product(true)
                    .chunks(n as usize)
                    .flat_map(|row| row.iter().zip(&biases))
                    .map(|(y, &b)| y - 0.5 * f64::from(b))
                    .collect();
                assert_close(&what, &run(Wide { norm, bias: Some(&bias), ..Wide::of(&weights) }, n), &round(all), BOUND);
            }
            if ends.len() == 2 {
                let rows: Vec<f64> = product(true)
                    .chunks(n as usize)
                    .flat_map(|row| {
                        let (gate, up) = row.split_at(n as usize / 2);
                        gate.iter().zip(up).map(|(g, u)| g / (1.0 + (-g).exp()) * u).collect::<Vec<_>>()
                    })
                    .collect();
                let gated = Wide { join: Join::Gated, norm, ..Wide::of(&weights) };
                assert_close(&what, &run(gated, n / 2), &round(rows), BOUND);
            }
        }
    }
}

#[test]
fn other_weights_and_rows_are_left_to_other_kernels() {
    let Some(gpu) = &gpu() else { return };
    let matmul = Matmul::new(gpu, None).unwrap();
    let fits = |rows: u32, weights: &[&Weight<'_>], join: Join| {
        let inputs = weights[0].inputs();
        let (x, out) = (Mat::new(gpu, "x", rows, inputs).unwrap(), Mat::new(gpu, "out", rows, 10).unwrap());
        matmul.wide(&mut gpu.commands("test"), &x, &Wide { join, ..Wide::of(weights) }, &out).unwrap()
    };
    let [whole, other] = [0, 1].map(|_| Frozen::nf4(gpu, 10, 64, 64, ScaleType::Bf16));
    let weight = whole.weight();
    assert!(fits(8, &[&weight], Join::Concat));
    assert!(!fits(9, &[&weight], Join::Concat), "many rows");
    assert!(!fits(1, &[&weight.rows(0..5), &other.weight().rows(0..5)], Join::Concat), "two buffers");
    assert!(!fits(1, &[&weight.rows(0..5), &weight.rows(5..10).times(2.0)], Join::Concat), "two factors");
    assert!(!fits(1, &[&weight], Join::Gated), "one weight");
    assert!(!fits(1, &[&weight.rows(0..4), &weight.rows(4..10)], Join::Gated), "unequal weights");
    assert!(!fits(1, &[&Frozen::nf4(gpu, 10, 72, 64, ScaleType::Bf16).weight()], Join::Concat), "parts of vectors");
    assert!(!fits(1, &[&Frozen::raw(gpu, 10, 64, FloatType::F32, usize::MAX).weight()], Join::Concat), "32 bits");
    assert!(!fits(1, &[&Frozen::raw(gpu, 10, 64, FloatType::F16, 256).weight()], Join::Concat), "several parts");
}

/// Kernels for other numbers of columns than small weights have.
#[test]
fn kernels_of_every_size_are_exact() {
    let Some(gpu) = &gpu() else { return };
    let kernels = WideKernels::new(gpu, Tried::new(gpu), of_wide);
    for (rows, n, storage) in [
        (1, 1 << 15, Stored::Quantized(Codec::Nf4(ScaleType::Bf16))),
        (1, 1 << 13, Stored::Quantized(Codec::Nf4(ScaleType::Dq8))),
        (1, 1 << 18, Stored::Raw(FloatType::Bf16)),
        (1, 1 << 15, Stored::Quantized(Codec::Nf4(ScaleType::Dq8))),
        (2, 1 << 14, Stored::Quantized(Codec::Nf4(ScaleType::F32))),
    ] {
        for norm in [false, true] {
            let variant = Variant::new(storage, rows, n, norm, norm);
            assert!(variant.lanes < MAX_LANES, "as for small weights");
            let kernel = gpu.kernel(&variant.spec()).unwrap();
            assert_eq!(of_wide(&kernels, variant, &kernel).unwrap(), None, "{variant:?}");
        }
    }
}

/// A large weight of repeated codes.
fn repeated(gpu: &Gpu, rows: u32, inputs: u32) -> GpuWeights {
    let elements = u64::from(rows) * u64::from(inputs);
    let some: Vec<u8> = random(7, 1 << 16).into_iter().map(|x| (x.abs() * 255.9) as u8).collect();
    let len = nf4::codes_len(elements, 64).unwrap() as usize;
    let mut codes = some.repeat(len.div_ceil(some.len()));
    codes.truncate(len);
    let blocks = nf4::block_count(elements, 64) as usize;
    let payload = [0x20, 0x3c].repeat(blocks);
    let scales = Scales::from_payload(&payload, ScaleType::Bf16, blocks).unwrap();
    GpuWeights::upload(gpu, &Nf4Tensor { codes: &codes, scales, block_size: 64, elements }).unwrap()
}

/// Keeps the device busy: an idle GPU has a low clock.
fn work(gpu: &Gpu, copy: &CopyKernel, [from, to]: &[Mat; 2], times: u32) {
    let mut commands = gpu.commands("copies");
    (0..times).for_each(|_| copy.record(&mut commands, &from.range, &to.range).unwrap());
    commands.submit().unwrap();
}

/// Prints the time of each product of a token of Qwen3-4B, for several sizes of workgroups. Run by
/// hand on a real GPU, with `--ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn speed() {
    const ROUNDS: u32 = 12;
    let Some(gpu) = &gpu() else { return };
    let kernels = WideKernels::new(gpu, Tried::new(gpu), of_wide);
    let copy = CopyKernel::new(gpu).unwrap();
    let copied = [0, 1].map(|_| Mat::new(gpu, "copied", 1 << 13, 1 << 13).unwrap());
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(3) {
        work(gpu, &copy, &copied, 40);
        gpu.wait().unwrap();
    }
    for (what, parts, inputs, norm, gated) in [
        ("q, k, v", &[4096, 1024, 1024][..], 2560, true, false),
        ("o", &[2560], 4096, false, false),
        ("gate, up", &[9728, 9728], 2560, true, true),
        ("down", &[2560], 9728, false, false),
        ("tiny", &[64], 64, false, false),
    ] {
        let n: u32 = parts.iter().sum();
        // More than a cache holds.
        let sets = ((1 << 29) / (n * inputs)).clamp(1, 60);
        let tensor = repeated(gpu, sets * n, inputs);
        let whole = Weight::new(Elements::Quantized(&tensor), sets * n, inputs);
        let ((x, _), (gamma, _)) = (random_mat(gpu, 1, 1, inputs), random_mat(gpu, 2, 1, inputs));
        let outputs = if gated { n / 2 } else { n };
        let (out, addend) = (poisoned(gpu, 1, outputs), random_mat(gpu, 3, 1, outputs).0);
        let chosen = Variant::new(Stored::Quantized(Codec::Nf4(ScaleType::Bf16)), 1, n, norm, gated);
        let sizes = [(16, 8), (32, 2), (32, 4), (64, 1), (64, 2)];
        let others = sizes.into_iter().flat_map(|(lanes, quads)| {
            let ahead = 8_u32.div_ceil(quads) <= MAX_AHEAD;
            [false, true].into_iter().filter(move |&on| !on || ahead).map(move |ahead| (lanes, quads, ahead))
        });
        let others = others.map(|(lanes, quads, ahead)| Variant { lanes, quads, ahead, ..chosen });
        let variants: Vec<_> = [chosen].into_iter().chain(others).map(|v| (v, gpu.kernel(&v.spec()).unwrap())).collect();
        let mut best = vec![f64::INFINITY; variants.len()];
        for _ in 0..ROUNDS {
            for ((variant, kernel), best) in variants.iter().zip(&mut best) {
                let mut commands = gpu.commands("speed");
                for set in 0..sets {
                    let mut end = set * n;
                    let weight = |rows: &u32| {
                        end += rows;
                        whole.rows(end - rows..end)
                    };
                    let weights: Vec<Weight<'_>> = parts.iter().map(weight).collect();
                    let weights: Vec<&Weight<'_>> = weights.iter().collect();
                    let join = if gated { Join::Gated } else { Join::Concat };
                    let (norm, addend) = (norm.then_some((&gamma, 1e-6)), (!norm).then_some(&addend));
                    let wide = Wide { join, norm, addend, ..Wide::of(&weights) };
                    let bound = kernels.bind(&x, &wide).unwrap().unwrap();
                    kernels.dispatch(&mut commands, kernel, *variant, &x, &wide, &bound, &out);
                }
                work(gpu, &copy, &copied, 40);
                let seconds = commands.submit_timed().unwrap().elapsed(gpu).unwrap().as_secs_f64();
                *best = best.min(seconds / f64::from(sets));
            }
        }
        for ((Variant { lanes, quads, ahead, .. }, _), best) in variants.iter().zip(best) {
            let rate = 0.53125 * f64::from(n) * f64::from(inputs) / best / 1e9;
            println!("{what}: {lanes} x {quads}, ahead {ahead}: {:.2} us, {rate:.0} GB/s", 1e6 * best);
        }
    }
}

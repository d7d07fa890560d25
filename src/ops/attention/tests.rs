#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use super::float::Tiling;
use super::reference::{Inputs as Wide, reference};
use super::*;
use crate::ops::testing::{assert_close, assert_gradient, assert_untouched, gpu, poisoned, random, wide};

/// Inputs, and the gradient of the output.
#[derive(Clone)]
pub(super) struct Inputs {
    pub shape: AttentionShape,
    pub starts: Vec<u32>,
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
    pub d_out: Vec<f32>,
}

/// Outputs of the kernels.
#[derive(PartialEq)]
pub(super) struct Outputs {
    pub out: Vec<f32>,
    pub lse: Vec<f32>,
    pub dq: Vec<f32>,
    pub dk: Vec<f32>,
    pub dv: Vec<f32>,
}

/// The same shape with other heads.
fn with_heads(mut shape: AttentionShape, change: impl FnOnce(&mut Heads)) -> AttentionShape {
    change(&mut shape.heads);
    shape
}

/// The same inputs with a window.
pub(super) fn windowed(inputs: Inputs, window: u32) -> Inputs {
    Inputs { shape: with_heads(inputs.shape, |heads| heads.window = Some(window)), ..inputs }
}

/// Samples with these lengths.
pub(super) fn inputs(head_dim: u32, heads: u32, kv_heads: u32, lengths: &[u32]) -> Inputs {
    let tokens: u32 = lengths.iter().sum();
    let mut starts = Vec::new();
    for &length in lengths {
        starts.resize(starts.len() + length as usize, starts.len() as u32);
    }
    let scale = 1.0 / (head_dim as f32).sqrt();
    let shape = AttentionShape { first: 0, tokens, heads: Heads { heads, kv_heads, head_dim, scale, window: None } };
    let seed = u64::from(tokens) << 16 | u64::from(head_dim * heads + kv_heads);
    let (wide, narrow) = ((tokens * heads * head_dim) as usize, (tokens * kv_heads * head_dim) as usize);
    // Scores between about -5 and 5.
    let q = random(seed + 1, wide).into_iter().map(|x| 4.0 * x).collect();
    let (k, v) = (random(seed + 2, narrow), random(seed + 3, narrow));
    Inputs { shape, starts, q, k, v, d_out: random(seed + 4, wide) }
}

fn run(gpu: &Gpu, inputs: &Inputs) -> Outputs {
    run_on(&Attention::new(gpu, inputs.shape.heads.head_dim, None).unwrap(), gpu, inputs)
}

pub(super) fn run_on(attention: &Attention, gpu: &Gpu, inputs: &Inputs) -> Outputs {
    run_windows(attention, gpu, inputs, inputs.shape.tokens)
}

/// As [`run_on`], `step` queries at a time: the gradients of the last ones first.
pub(super) fn run_windows(attention: &Attention, gpu: &Gpu, inputs: &Inputs, step: u32) -> Outputs {
    let AttentionShape { tokens, heads: Heads { heads, kv_heads, head_dim, .. }, .. } = inputs.shape;
    let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
    let keys = |elements| Mat::from_slice(gpu, "input", tokens, narrow, elements).unwrap();
    let (k, v) = (keys(&inputs.k), keys(&inputs.v));
    let starts = BufferRange::whole(gpu.storage_with("starts", bytemuck::cast_slice(&inputs.starts)).unwrap());
    let (dk, dv) = (poisoned(gpu, tokens, narrow), poisoned(gpu, tokens, narrow));
    let read = |mat: &Mat| {
        assert_untouched(gpu, mat);
        mat.read(gpu).unwrap()
    };
    let windows = (0..tokens).step_by(step as usize).rev().map(|first| {
        let shape = AttentionShape { first, tokens: tokens.min(first + step), ..inputs.shape };
        let queries = |elements: &[f32]| {
            let elements = &elements[(first * wide) as usize..(shape.tokens * wide) as usize];
            Mat::from_slice(gpu, "input", shape.queries(), wide, elements).unwrap()
        };
        let empty = |cols| poisoned(gpu, shape.queries(), cols);
        let (q, d_out, out, dq) = (queries(&inputs.q), queries(&inputs.d_out), empty(wide), empty(wide));
        let (lse, delta) = (empty(heads), empty(heads));
        let [k, v, dk, dv] = [&k, &v, &dk, &dv].map(|mat| mat.narrow(shape.tokens, narrow));
        let mut commands = gpu.commands("attention");
        attention.forward(&mut commands, &shape, &q, &k, &v, &starts, &out, &lse).unwrap();
        let (add, shape) = (shape.tokens < tokens, &shape);
        attention
            .backward(&mut commands, shape, &q, &k, &v, &starts, &out, &lse, &d_out, &delta, &dq, &dk, &dv, add)
            .unwrap();
        commands.submit().unwrap();
        read(&delta);
        [read(&out), read(&lse), read(&dq)]
    });
    let windows: Vec<_> = windows.collect();
    let [out, lse, dq] = [0, 1, 2].map(|at| windows.iter().rev().flat_map(|window| window[at].clone()).collect());
    Outputs { out, lse, dq, dk: read(&dk), dv: read(&dv) }
}

fn assert_matches(found: &Outputs, inputs: &Inputs) {
    let Inputs { shape, starts, q, k, v, d_out } = inputs;
    let (q, k, v, d_out) = (wide(q), wide(k), wide(v), wide(d_out));
    let expected = reference(&Wide { shape, starts, q: &q, k: &k, v: &v, d_out: &d_out });
    let found = [("out", &found.out), ("lse", &found.lse), ("dq", &found.dq), ("dk", &found.dk), ("dv", &found.dv)];
    for ((name, found), expected) in found.into_iter().zip(expected) {
        // A single token attends only to itself: the gradient of its score is 0, up to
        // rounding.
        let scale = if expected.iter().all(|x| x.abs() < 1e-12) { 1.0 } else { 0.0 };
        let shifted = |x: f64| (x + scale) as f32;
        let found: Vec<f32> = found.iter().map(|&x| shifted(x.into())).collect();
        let expected: Vec<f32> = expected.into_iter().map(shifted).collect();
        assert_close(&format!("{name} of {shape:?}"), &found, &expected, 1e-5);
    }
}

#[test]
fn outputs_and_gradients_are_the_reference_s() {
    let Some(gpu) = gpu() else { return };
    for (head_dim, heads, kv_heads, lengths) in [
        (64, 4, 4, &[1][..]),
        (64, 4, 2, &[5]),
        (64, 4, 1, &[7, 90, 33]),
        (64, 6, 2, &[33, 1, 70]),
        (32, 7, 1, &[5, 66, 2]),
        (80, 2, 2, &[33]),
        (80, 4, 2, &[130]),
        (128, 4, 2, &[1, 33, 64, 5, 27]),
        (128, 4, 1, &[130]),
    ] {
        let inputs = inputs(head_dim, heads, kv_heads, lengths);
        assert_matches(&run(&gpu, &inputs), &inputs);
    }
}

/// Windows of one token, of less than a tile, of several tiles, at a tile boundary, and longer
/// than a sample.
#[test]
fn windows_end_what_a_token_sees() {
    let Some(gpu) = gpu() else { return };
    for (head_dim, heads, kv_heads, lengths, windows) in [
        (64, 4, 2, &[5][..], &[1, 3][..]),
        (64, 4, 1, &[7, 90, 33], &[1, 2, 33, 34]),
        (64, 6, 2, &[140, 1, 70], &[31, 32, 33, 63, 64, 65]),
        (64, 2, 1, &[300, 1, 70], &[129, 256]),
        (80, 4, 2, &[133], &[7, 100, 132, 133, 134]),
        (128, 4, 1, &[70, 130], &[5, 97]),
    ] {
        for &window in windows {
            let inputs = windowed(inputs(head_dim, heads, kv_heads, lengths), window);
            assert_matches(&run(&gpu, &inputs), &inputs);
        }
    }
}

/// A window that covers the longest sample gives the same bits as no window.
/// Queries in windows: of whole blocks, so that the order of sums over keys is the same, and not.
/// The gradients of keys are sums over the windows.
#[test]
fn queries_in_windows_have_the_same_results() {
    let Some(gpu) = gpu() else { return };
    for (head_dim, window) in [(64, None), (20, Some(37))] {
        let inputs = inputs(head_dim, 6, 2, &[150, 1, 99]);
        let inputs = window.map_or(inputs.clone(), |window| windowed(inputs, window));
        let attention = Attention::new(&gpu, head_dim, None).unwrap();
        let whole = run_on(&attention, &gpu, &inputs);
        for step in [64, 128, 33, 7] {
            let found = run_windows(&attention, &gpu, &inputs, step);
            assert_matches(&found, &inputs);
            let same = found.out == whole.out && found.lse == whole.lse && found.dq == whole.dq;
            assert!(same || !step.is_multiple_of(64), "{step}");
        }
    }
}

#[test]
fn a_wide_window_changes_nothing() {
    let Some(gpu) = gpu() else { return };
    let inputs = inputs(64, 4, 2, &[7, 90, 33]);
    let expected = run(&gpu, &inputs);
    for window in [90, 91, u32::MAX] {
        assert!(run(&gpu, &windowed(inputs.clone(), window)) == expected, "{window}");
    }
}

/// A narrow window skips most tiles of a long sample. Skipped tiles are not read, even if they
/// are NaN.
#[test]
fn tiles_outside_of_the_window_are_left_out() {
    let Some(gpu) = gpu() else { return };
    let inputs = windowed(inputs(64, 2, 1, &[400]), 40);
    let expected = run(&gpu, &inputs);
    // A block of queries starts at 320. Its first key is 281.
    let mut late = inputs.clone();
    late.k[..280 * 64].fill(f32::NAN);
    late.v[..280 * 64].fill(f32::NAN);
    let found = run(&gpu, &late);
    assert!(found.out[320 * 128..] == expected.out[320 * 128..]);
    assert!(found.dq[320 * 128..] == expected.dq[320 * 128..]);
    // The first block of keys ends at 64. Queries up to 102 attend to it, and the tile of query
    // 102 ends at 128.
    let mut early = inputs;
    early.q[128 * 128..].fill(f32::NAN);
    early.d_out[128 * 128..].fill(f32::NAN);
    let found = run(&gpu, &early);
    assert!(found.dk[..64 * 64] == expected.dk[..64 * 64]);
    assert!(found.dv[..64 * 64] == expected.dv[..64 * 64]);
}

#[test]
fn heads_of_any_size_fit() {
    let Some(gpu) = gpu() else { return };
    for head_dim in [4, 256] {
        let inputs = inputs(head_dim, 2, 1, &[3, 67]);
        assert_matches(&run(&gpu, &inputs), &inputs);
    }
}

#[test]
fn tiles_of_another_size_fit() {
    let Some(gpu) = gpu() else { return };
    let inputs = inputs(20, 2, 1, &[3, 133]);
    let float = FloatAttention::with(&gpu, 20, Tiling { columns: 4, rows: 8 }).unwrap();
    let attention = Attention { head_dim: 20, kernels: Kernels::Float(float) };
    for inputs in [windowed(inputs.clone(), 21), inputs] {
        assert_matches(&run_on(&attention, &gpu, &inputs), &inputs);
    }
}

#[test]
fn scores_whose_exponential_overflows_are_exact() {
    let Some(gpu) = gpu() else { return };
    let mut inputs = inputs(64, 2, 1, &[40, 30]);
    // Small integers: the scores reach several hundred without rounding.
    inputs.q.iter_mut().for_each(|x| *x = 8.0 * x.round());
    inputs.k.iter_mut().for_each(|x| *x = (4.0 * *x).round());
    let found = run(&gpu, &inputs);
    assert!(found.lse.iter().any(|&x| x > 100.0));
    assert_matches(&found, &inputs);
}

#[test]
fn the_reference_s_gradients_are_its_differences() {
    let Inputs { shape, starts, q, k, v, d_out } = windowed(inputs(4, 2, 1, &[2, 3]), 2);
    let (q, k, v, d_out) = (wide(&q), wide(&k), wide(&v), wide(&d_out));
    let wide = Wide { shape: &shape, starts: &starts, q: &q, k: &k, v: &v, d_out: &d_out };
    let [_, _, dq, dk, dv] = reference(&wide);
    let loss = |q: &[f64], k: &[f64], v: &[f64]| {
        let [out, ..] = reference(&Wide { q, k, v, ..wide });
        out.iter().zip(&d_out).map(|(o, d)| o * d).sum()
    };
    assert_gradient("dq", &q, &dq, 1e-5, |q| loss(q, &k, &v));
    assert_gradient("dk", &k, &dk, 1e-5, |k| loss(&q, k, &v));
    assert_gradient("dv", &v, &dv, 1e-5, |v| loss(&q, &k, v));
}

#[test]
fn the_same_inputs_give_the_same_bits() {
    let Some(gpu) = gpu() else { return };
    let inputs = inputs(64, 4, 2, &[7, 90, 33]);
    assert!(run(&gpu, &inputs) == run(&gpu, &inputs));
}

#[test]
fn a_sample_changes_nothing_in_the_others() {
    let Some(gpu) = gpu() else { return };
    let inputs = inputs(64, 4, 2, &[40, 37, 53]);
    let mut changed = inputs.clone();
    let tokens = 40..77;
    let of = |heads: usize| tokens.start * heads * 64..tokens.end * heads * 64;
    for (elements, heads) in [(&mut changed.q, 4), (&mut changed.k, 2), (&mut changed.v, 2), (&mut changed.d_out, 4)] {
        elements[of(heads)].iter_mut().for_each(|x| *x = 3.0 - *x);
    }
    let (before, after) = (run(&gpu, &inputs), run(&gpu, &changed));
    for (name, before, after) in [
        ("out", before.out, after.out),
        ("lse", before.lse, after.lse),
        ("dq", before.dq, after.dq),
        ("dk", before.dk, after.dk),
        ("dv", before.dv, after.dv),
    ] {
        let cols = before.len() / 130;
        let own = tokens.start * cols..tokens.end * cols;
        assert!(before[..own.start] == after[..own.start], "{name} of the sample before");
        assert!(before[own.end..] == after[own.end..], "{name} of the sample after");
        assert!(before[own.clone()] != after[own], "{name} of the sample itself");
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let Some(gpu) = gpu() else { return };
    for head_dim in [0, 6, 260] {
        let error = Attention::new(&gpu, head_dim, None).unwrap_err().to_string();
        assert_eq!(
            error,
            format!("attention: the size of a head is {head_dim}, but must be a multiple of 4, from 4 to 256")
        );
    }
    let attention = Attention::new(&gpu, 64, None).unwrap();
    let [wide, narrow, sums] = [256, 128, 4].map(|cols| Mat::new(&gpu, "test", 5, cols).unwrap());
    let range = |bytes| BufferRange { buffer: gpu.storage("starts", 32).unwrap(), offset: 0, size: bytes };
    let heads = Heads { heads: 4, kv_heads: 2, head_dim: 64, scale: 0.125, window: Some(1) };
    let shape = AttentionShape { first: 0, tokens: 5, heads };
    let forward = |shape: AttentionShape, k: &Mat, lse: &Mat, starts: u64| {
        let mut commands = gpu.commands("test");
        let result = attention.forward(&mut commands, &shape, &wide, k, &narrow, &range(starts), &wide, lse);
        matches!(result, Err(OpError::Shape { .. } | OpError::Value { .. }))
    };
    assert!(!forward(shape, &narrow, &sums, 20));
    assert!(forward(shape, &wide, &sums, 20));
    assert!(forward(shape, &narrow, &wide, 20));
    assert!(forward(shape, &narrow, &sums, 16));
    assert!(forward(AttentionShape { tokens: 6, ..shape }, &narrow, &sums, 32));
    assert!(forward(AttentionShape { first: 1, ..shape }, &narrow, &sums, 20));
    assert!(forward(AttentionShape { first: 6, ..shape }, &narrow, &sums, 20));
    assert!(forward(with_heads(shape, |heads| heads.head_dim = 128), &narrow, &sums, 20));
    assert!(forward(with_heads(shape, |heads| heads.window = Some(0)), &narrow, &sums, 20));
    for (heads, kv_heads) in [(0, 2), (4, 0), (4, 3)] {
        let shape = AttentionShape { heads: Heads { heads, kv_heads, ..shape.heads }, ..shape };
        assert!(forward(shape, &narrow, &sums, 20), "{heads} {kv_heads}");
    }
}

//! Attention on matrix units: as loops, or on the matrix units of the device if it has them.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use super::mixed::Product;
use super::reference::{Inputs as Wide, OUTPUTS, reference};
use super::tests::{Inputs, Outputs, inputs, run_on, run_windows, windowed};
use super::*;
use crate::gpu::poison::assert_written;
use crate::gpu::wgpu;
use crate::gpu::wgpu::naga;
use crate::ops::testing::{gpu, gpu_with, poisoned, random, random_mat, wide};

/// The device, and how it runs the kernels.
fn units() -> Option<(Gpu, MatrixUnits)> {
    let gpu = gpu()?;
    let units = gpu.matrix_units().unwrap_or(MatrixUnits::Loops);
    if !gpu.features().contains(wgpu::Features::SHADER_F16) {
        eprintln!("SKIPPED: no SHADER_F16");
        return None;
    }
    Some((gpu, units))
}

fn attention(gpu: &Gpu, units: MatrixUnits, head_dim: u32) -> Attention {
    Attention::new(gpu, head_dim, Some(units)).unwrap()
}

fn run(gpu: &Gpu, units: MatrixUnits, inputs: &Inputs) -> Outputs {
    run_on(&attention(gpu, units, inputs.shape.heads.head_dim), gpu, inputs)
}

impl Outputs {
    /// In the order of [`OUTPUTS`].
    fn all(&self) -> [&Vec<f32>; 5] {
        [&self.out, &self.lse, &self.dq, &self.dk, &self.dv]
    }
}

fn expected(inputs: &Inputs) -> [Vec<f64>; 5] {
    let Inputs { shape, starts, q, k, v, d_out } = inputs;
    let (q, k, v, d_out) = (wide(q), wide(k), wide(v), wide(d_out));
    reference(&Wide { shape, starts, q: &q, k: &k, v: &v, d_out: &d_out })
}

/// Maximum error of a row, relative to the size of its terms. The error of f16 is 5e-4.
const BOUND: f64 = 1e-3;
/// Maximum error of all ordinary values, relative to their norm, in the order of [`OUTPUTS`].
const ORDINARY: [f64; 5] = [5e-4, 5e-4, 1e-3, 1e-3, 1e-3];

fn norm(values: impl Iterator<Item = f64>) -> f64 {
    values.map(|x| x * x).sum::<f64>().sqrt()
}

fn error(found: &[f32], expected: &[f64]) -> f64 {
    norm(found.iter().zip(expected).map(|(&found, expected)| f64::from(found) - expected))
}

/// The size of the terms of each row of an output, in the order of [`OUTPUTS`]: gradients are small
/// differences of them.
fn sizes(inputs: &Inputs, expected: &[Vec<f64>; 5]) -> [Vec<f64>; 5] {
    let Heads { heads, kv_heads, head_dim, scale, window } = inputs.shape.heads;
    let [heads, kv_heads, dim] = [heads, kv_heads, head_dim].map(|count| count as usize);
    let (scale, window) = (f64::from(scale), window.map_or(usize::MAX, |window| window as usize));
    let row = |values: &[f32], row: usize| wide(&values[row * dim..(row + 1) * dim]);
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let terms = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a * b).abs()).sum::<f64>();
    let length = |values: &[f64]| norm(values.iter().copied());
    let (queries, keys) = (inputs.starts.len() * heads, inputs.starts.len() * kv_heads);
    let [mut out, mut lse, mut dq] = [(); 3].map(|()| vec![0.0; queries]);
    let [mut dk, mut dv] = [(); 2].map(|()| vec![0.0; keys]);
    for query in 0..queries {
        let token = query / heads;
        let (q, d_out) = (row(&inputs.q, query), row(&inputs.d_out, query));
        let delta = terms(&d_out, &expected[0][query * dim..(query + 1) * dim]);
        for seen in (inputs.starts[token] as usize).max((token + 1).saturating_sub(window))..=token {
            let key = seen * kv_heads + query % heads / (heads / kv_heads);
            let (k, v) = (row(&inputs.k, key), row(&inputs.v, key));
            let of_score = 1.0 + scale * terms(&q, &k);
            let weight = (scale * dot(&q, &k) - expected[1][query]).exp() * of_score;
            let slope = scale * weight * (terms(&d_out, &v) + delta);
            lse[query] = f64::max(lse[query], of_score);
            out[query] += weight * length(&v);
            dq[query] += slope * length(&k);
            dk[key] += slope * length(&q);
            dv[key] += weight * length(&d_out);
        }
    }
    [out, lse, dq, dk, dv]
}

/// Asserts the errors of each row. A row whose terms are smaller than the part `floors` of those of
/// an average row counts as that.
#[track_caller]
fn assert_rows_match(found: &Outputs, inputs: &Inputs, floors: [f64; 5]) {
    let expected = expected(inputs);
    let sizes = sizes(inputs, &expected);
    for (i, (found, expected)) in found.all().into_iter().zip(&expected).enumerate() {
        let width = if OUTPUTS[i] == "lse" { 1 } else { inputs.shape.heads.head_dim as usize };
        assert_eq!(found.len(), expected.len(), "{}", OUTPUTS[i]);
        let average = norm(sizes[i].iter().copied()) / (sizes[i].len() as f64).sqrt();
        for (row, (found, expected)) in found.chunks(width).zip(expected.chunks(width)).enumerate() {
            let error = error(found, expected) / sizes[i][row].max(floors[i] * average).max(f64::MIN_POSITIVE);
            assert!(error <= BOUND, "row {row} of {} of {:?}: relative error {error:e}", OUTPUTS[i], inputs.shape);
        }
    }
}

/// Asserts the errors of each row, and of all, for ordinary values.
#[track_caller]
fn assert_matches(found: &Outputs, inputs: &Inputs) {
    assert_rows_match(found, inputs, [0.0; 5]);
    for (i, (found, expected)) in found.all().into_iter().zip(expected(inputs)).enumerate() {
        let error = error(found, &expected) / norm(expected.iter().copied());
        // A token that sees only itself has no gradients but of rounding.
        let bound = if inputs.shape.tokens < 10 { f64::INFINITY } else { ORDINARY[i] };
        assert!(error <= bound || error.is_nan(), "{} of {:?}: relative error {error:e}", OUTPUTS[i], inputs.shape);
    }
}

#[test]
fn outputs_and_gradients_are_the_reference_s() {
    let Some((gpu, units)) = units() else { return };
    for (head_dim, heads, kv_heads, lengths) in [
        (64, 4, 4, &[1][..]),
        (64, 4, 2, &[5]),
        (64, 4, 1, &[7, 90, 33]),
        (64, 6, 2, &[33, 1, 70]),
        (64, 7, 1, &[5, 66, 2]),
        (64, 2, 1, &[64, 64]),
        (64, 2, 1, &[65, 127, 1]),
    ] {
        let inputs = inputs(head_dim, heads, kv_heads, lengths);
        assert_matches(&run(&gpu, units, &inputs), &inputs);
    }
}

/// The sizes of families, and sizes that are padded. Software drivers take minutes to compile the
/// kernels of large heads.
#[test]
fn heads_of_any_size_fit() {
    let Some((gpu, units)) = units() else { return };
    let sizes = match units {
        MatrixUnits::Hardware => &[4, 20, 36, 64, 80, 96, 112, 128, 160, 192, 256][..],
        MatrixUnits::Loops => &[4, 20, 80],
    };
    for &head_dim in sizes {
        let inputs = inputs(head_dim, 2, 1, &[3, 67]);
        assert_matches(&run(&gpu, units, &inputs), &inputs);
    }
}

/// Several workgroups have a part of the columns each.
#[test]
fn blocks_are_shared_as_for_the_largest_heads() {
    let Some((gpu, units)) = units() else { return };
    let inputs = inputs(64, 4, 2, &[7, 90, 33]);
    let mixed = trial::tried(&gpu, HeadSize::as_largest(64), units, |spec| spec).unwrap();
    let attention = Attention { head_dim: 64, kernels: Kernels::Mixed(mixed) };
    for inputs in [windowed(inputs.clone(), 21), inputs] {
        assert_matches(&run_on(&attention, &gpu, &inputs), &inputs);
    }
}

/// Windows of one token, of less than a tile, of several tiles, at a tile boundary, and longer than
/// a sample.
#[test]
fn windows_end_what_a_token_sees() {
    let Some((gpu, units)) = units() else { return };
    for (heads, kv_heads, lengths, windows) in [
        (4, 2, &[5][..], &[1, 3][..]),
        (4, 1, &[7, 90, 33], &[1, 2, 33, 34]),
        (2, 1, &[300, 1, 70], &[15, 16, 17, 31, 32, 33, 64, 65, 129, 256]),
    ] {
        for &window in windows {
            let inputs = windowed(inputs(64, heads, kv_heads, lengths), window);
            assert_rows_match(&run(&gpu, units, &inputs), &inputs, [0.0; 5]);
        }
    }
}

/// Queries in windows, whose sizes are and are not those of blocks. The gradients of keys are sums
/// over the windows.
#[test]
fn queries_in_windows_are_as_exact() {
    let Some((gpu, units)) = units() else { return };
    for (head_dim, window) in [(64, None), (20, Some(37))] {
        let inputs = inputs(head_dim, 6, 2, &[150, 1, 99]);
        let inputs = window.map_or(inputs.clone(), |window| windowed(inputs, window));
        let attention = attention(&gpu, units, head_dim);
        for step in [64, 33] {
            assert_matches(&run_windows(&attention, &gpu, &inputs, step), &inputs);
        }
    }
}

#[test]
fn a_wide_window_changes_nothing_and_the_same_inputs_give_the_same_bits() {
    let Some((gpu, units)) = units() else { return };
    let inputs = inputs(64, 4, 2, &[7, 90, 33]);
    let expected = run(&gpu, units, &inputs);
    assert!(run(&gpu, units, &inputs) == expected);
    for window in [90, u32::MAX] {
        assert!(run(&gpu, units, &windowed(inputs.clone(), window)) == expected, "{window}");
    }
}

/// A narrow window skips most tiles of a long sample. Skipped tiles are not read, even if they are
/// NaN.
#[test]
fn tiles_outside_of_the_window_are_left_out() {
    let Some((gpu, units)) = units() else { return };
    let inputs = windowed(inputs(64, 2, 1, &[400]), 40);
    let expected = run(&gpu, units, &inputs);
    // A block of queries starts at 320. Its first key is 281.
    let mut late = inputs.clone();
    late.k[..281 * 64].fill(f32::NAN);
    late.v[..281 * 64].fill(f32::NAN);
    let found = run(&gpu, units, &late);
    assert!(found.out[320 * 128..] == expected.out[320 * 128..]);
    assert!(found.dq[320 * 128..] == expected.dq[320 * 128..]);
    // The first block of keys ends at 64. Queries up to 102 attend to it, and the tile of query 102
    // ends at 112.
    let mut early = inputs;
    early.q[112 * 128..].fill(f32::NAN);
    early.d_out[112 * 128..].fill(f32::NAN);
    let found = run(&gpu, units, &early);
    assert!(found.dk[..64 * 64] == expected.dk[..64 * 64]);
    assert!(found.dv[..64 * 64] == expected.dv[..64 * 64]);
}

/// Scores that rise along the keys, by less and by more than the step from which on sums are scaled
/// again.
#[test]
fn sums_follow_scores_that_rise() {
    let Some((gpu, units)) = units() else { return };
    for step in [0.01, 0.1, 1.0] {
        let mut inputs = inputs(64, 2, 1, &[130, 70]);
        for (token, row) in inputs.k.chunks_mut(64).enumerate() {
            row.iter_mut().for_each(|x| *x = (*x + 1.0) * step * (token % 50) as f32 / 8.0);
        }
        inputs.q.iter_mut().for_each(|x| *x = x.abs() / 4.0);
        // Keys far below the others have weights below 2^-28, which lose bits.
        assert_rows_match(&run(&gpu, units, &inputs), &inputs, [1e-4; 5]);
    }
}

#[test]
fn scores_whose_exponential_overflows_are_exact() {
    let Some((gpu, units)) = units() else { return };
    let mut inputs = inputs(64, 2, 1, &[40, 30]);
    // Small integers: the scores reach several hundred without rounding.
    inputs.q.iter_mut().for_each(|x| *x = 8.0 * x.round());
    inputs.k.iter_mut().for_each(|x| *x = (4.0 * *x).round());
    let found = run(&gpu, units, &inputs);
    assert!(found.lse.iter().any(|&x| x > 100.0));
    // Weights below 2^-28 lose bits.
    assert_rows_match(&found, &inputs, [1e-4; 5]);
}

/// Multiplies the elements of some columns of each head.
fn scale_columns(elements: &mut [f32], columns: &[usize], factor: f32) {
    elements.chunks_mut(64).for_each(|row| columns.iter().for_each(|&column| row[column] *= factor));
}

/// Columns of up to 1e6, as models have: in values, and in keys where queries are small.
#[test]
fn columns_of_large_elements_keep_the_others_exact() {
    let Some((gpu, units)) = units() else { return };
    let original = inputs(64, 4, 2, &[40, 90]);
    for factor in [1e3, 1e6] {
        let mut inputs = original.clone();
        scale_columns(&mut inputs.k, &[3, 17], factor);
        scale_columns(&mut inputs.q, &[3, 17], 1.0 / factor);
        assert_rows_match(&run(&gpu, units, &inputs), &inputs, [0.0; 5]);
        let mut inputs = original.clone();
        scale_columns(&mut inputs.v, &[5], factor);
        let found = run(&gpu, units, &inputs);
        assert_rows_match(&found, &inputs, [0.0; 5]);
        // The other columns of the output alone.
        let [out, ..] = expected(&inputs);
        let others = |i: &usize| i % 64 != 5;
        let error = norm((0..out.len()).filter(others).map(|i| f64::from(found.out[i]) - out[i]));
        assert!(error <= 1e-3 * norm((0..out.len()).filter(others).map(|i| out[i])), "{error:e}");
        let mut inputs = original.clone();
        scale_columns(&mut inputs.d_out, &[9], factor);
        assert_rows_match(&run(&gpu, units, &inputs), &inputs, [0.0; 5]);
    }
}

/// Rows from 1 down to 1e-8: of one tensor, and of all.
#[test]
fn small_rows_are_as_exact_as_large_ones() {
    let Some((gpu, units)) = units() else { return };
    let original = inputs(64, 4, 2, &[60, 70]);
    // Of a whole sample, of single rows, and of heads.
    let factor = |row: usize| match row {
        100.. => 1e-8,
        _ if row % 7 == 3 => 1e-6,
        _ if row % 5 == 1 => 1e-3,
        _ => 1.0,
    };
    let shrink = |elements: &mut Vec<f32>, heads: usize| {
        for (row, elements) in elements.chunks_mut(64 * heads).enumerate() {
            elements.iter_mut().for_each(|x| *x *= factor(row));
        }
    };
    // Gradients of scores are f16 times one factor for each row of d_out: a row whose values are
    // much smaller than those of other samples loses their last bits.
    let [exact, of_values, of_all] = [[0.0; 5], [0.0, 0.0, 1e-3, 1e-3, 0.0], [1e-3; 5]];
    for (tensors, floors) in [("q", exact), ("k", exact), ("v", of_values), ("d", exact), ("qkvd", of_all)] {
        let mut inputs = original.clone();
        for tensor in tensors.chars() {
            match tensor {
                'q' => shrink(&mut inputs.q, 4),
                'k' => shrink(&mut inputs.k, 2),
                'v' => shrink(&mut inputs.v, 2),
                _ => shrink(&mut inputs.d_out, 4),
            }
        }
        assert_rows_match(&run(&gpu, units, &inputs), &inputs, floors);
    }
}

/// One row of a head is 1e6 times all others. Sums over tokens have one factor for all rows, so
/// the others are far from the largest magnitude of f16, and still keep their bits: in their
/// sample, and in another one.
#[test]
fn an_outlier_row_erases_no_other() {
    let Some((gpu, units)) = units() else { return };
    let original = inputs(64, 4, 2, &[40, 90]);
    for (tensor, heads) in [("v", 2), ("d_out", 4)] {
        for (token, factor) in [(20, 1e6), (60, 1e6), (129, 1e4)] {
            let mut inputs = original.clone();
            let elements = if tensor == "v" { &mut inputs.v } else { &mut inputs.d_out };
            let row = token * heads + 1;
            elements[row * 64..(row + 1) * 64].iter_mut().for_each(|x| *x *= factor);
            assert_rows_match(&run(&gpu, units, &inputs), &inputs, [0.0; 5]);
        }
    }
}

/// Rows of zeros, whole tensors of zeros, and a head of values or of gradients whose elements are
/// 1e6 times those of the others.
#[test]
fn zeros_and_one_huge_head_disturb_no_other_row() {
    let Some((gpu, units)) = units() else { return };
    let original = inputs(64, 4, 2, &[40, 30]);
    for tensor in 0..4 {
        for (zeros, factor) in [(7, 1e6_f32), (1, 1.0)] {
            let mut inputs = original.clone();
            let (elements, heads) = match tensor {
                0 => (&mut inputs.q, 4),
                1 => (&mut inputs.k, 2),
                2 => (&mut inputs.v, 2),
                _ => (&mut inputs.d_out, 4),
            };
            for (row, elements) in elements.chunks_mut(64).enumerate() {
                // Scores of 1e6 would leave one key to each query.
                let factor = if tensor < 2 { 1.0 } else { factor };
                let of_row = if row.is_multiple_of(zeros) { 0.0 } else { [1.0, factor][usize::from(row % heads == 1)] };
                elements.iter_mut().for_each(|x| *x *= of_row);
            }
            let found = run(&gpu, units, &inputs);
            // Weights below 2^-28 lose bits.
            assert_rows_match(&found, &inputs, [1e-4; 5]);
        }
    }
}

/// All magnitudes at once: only the scale of a tensor matters, from 1e-10 to 1e10.
#[test]
fn the_scale_of_a_tensor_changes_nothing_but_the_scale() {
    let Some((gpu, units)) = units() else { return };
    let original = inputs(64, 2, 1, &[70]);
    for [q, k, v, d_out] in [[1e10, 1e-10, 1e10, 1e10], [1e-10, 1e10, 1e-10, 1e-10]] {
        let mut inputs = original.clone();
        let scaled = [(&mut inputs.q, q), (&mut inputs.k, k), (&mut inputs.v, v), (&mut inputs.d_out, d_out)];
        scaled.into_iter().for_each(|(elements, factor)| elements.iter_mut().for_each(|x| *x *= factor));
        let (found, expected) = (run(&gpu, units, &inputs), expected(&inputs));
        for (i, (found, expected)) in found.all().into_iter().zip(expected).enumerate() {
            let error = error(found, &expected);
            let bound = ORDINARY[i] * norm(expected.into_iter());
            assert!(error <= bound, "{}: {error:e}, bound {bound:e}", OUTPUTS[i]);
        }
    }
}

/// NaN and infinity reach the outputs that depend on them.
#[test]
fn what_is_not_finite_stays_visible() {
    let Some((gpu, units)) = units() else { return };
    let original = inputs(64, 2, 1, &[70]);
    // Token 10 of head 0.
    for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for tensor in 0..4 {
            let mut inputs = original.clone();
            let (elements, at) = match tensor {
                0 => (&mut inputs.q, 10 * 128),
                1 => (&mut inputs.k, 10 * 64),
                2 => (&mut inputs.v, 10 * 64),
                _ => (&mut inputs.d_out, 10 * 128),
            };
            elements[at + 7] = value;
            let found = run(&gpu, units, &inputs);
            let visible =
                |values: &[f32], from: usize, count: usize| !values[from..from + count].iter().all(|x| x.is_finite());
            let name = format!("{value} in tensor {tensor}");
            // An infinite key may have a score of -infinity, and then no weight.
            let weighs = tensor != 1 || value.is_nan();
            assert!(tensor == 3 || !weighs || visible(&found.out, 10 * 128, 64), "out, {name}");
            assert!(visible(&found.dq, 10 * 128, 64), "dq, {name}");
            assert!(!weighs || visible(&found.dk, 10 * 64, 64), "dk, {name}");
            assert!(tensor == 2 || !weighs || visible(&found.dv, 10 * 64, 64), "dv, {name}");
        }
    }
}

#[test]
fn a_sample_changes_nothing_in_the_others() {
    let Some((gpu, units)) = units() else { return };
    let inputs = inputs(64, 4, 2, &[40, 37, 53]);
    let mut changed = inputs.clone();
    // The largest magnitudes keep their power of two.
    let of = |heads: usize| 40 * heads * 64..77 * heads * 64;
    for (elements, heads) in [(&mut changed.q, 4), (&mut changed.k, 2), (&mut changed.v, 2), (&mut changed.d_out, 4)] {
        elements[of(heads)].reverse();
    }
    let (before, after) = (run(&gpu, units, &inputs), run(&gpu, units, &changed));
    for ((name, before), after) in OUTPUTS.into_iter().zip(before.all()).zip(after.all()) {
        let cols = before.len() / 130;
        let own = 40 * cols..77 * cols;
        assert!(before[..own.start] == after[..own.start], "{name} of the sample before");
        assert!(before[own.end..] == after[own.end..], "{name} of the sample after");
        assert!(before[own.clone()] != after[own], "{name} of the sample itself");
    }
}

/// Starts of samples that no batch has: after their token, and past the end.
#[test]
fn wrong_starts_end_no_loop_late() {
    let Some((gpu, units)) = units() else { return };
    let mut inputs = inputs(64, 2, 1, &[70, 30]);
    inputs.starts = (0..100).map(|token| [token + 50, u32::MAX, 0][token as usize % 3]).collect();
    let found = run(&gpu, units, &inputs);
    assert!(found.out.iter().chain(&found.lse).all(|x| x.is_finite()));
}

#[test]
fn results_do_not_depend_on_the_memory_before() {
    let Some((gpu, units)) = units() else { return };
    for (head_dim, window) in [(20, None), (64, Some(9))] {
        let (tokens, heads, kv_heads) = (67, 6, 2);
        let shape = AttentionShape { first: 0, tokens, heads: Heads { heads, kv_heads, head_dim, scale: 0.3, window } };
        let starts: Vec<u32> = (0..tokens).map(|t| if t < 31 { 0 } else { 31 }).collect();
        let starts = BufferRange::whole(gpu.storage_with("starts", bytemuck::cast_slice(&starts)).unwrap());
        let [(q, _), (d_out, _)] = [1, 2].map(|seed| random_mat(&gpu, seed, tokens, heads * head_dim));
        let [(k, _), (v, _)] = [3, 4].map(|seed| random_mat(&gpu, seed, tokens, kv_heads * head_dim));
        let [out, dq] = [0, 1].map(|_| poisoned(&gpu, tokens, heads * head_dim));
        let [dk, dv] = [0, 1].map(|_| poisoned(&gpu, tokens, kv_heads * head_dim));
        let [lse, delta] = [0, 1].map(|_| poisoned(&gpu, tokens, heads));
        let attention = attention(&gpu, units, head_dim);
        let kernels = [
            "attention_halves:measure",
            "attention_halves:place",
            "attention_halves:place_d_out",
            "attention_units_forward:main",
            "attention_units_keys:main",
            "attention_units_queries:main",
        ];
        let results = [&out, &lse, &delta, &dq, &dk, &dv].map(|mat| &mat.range);
        assert_written(&gpu, &kernels, &results, &[], |commands| {
            attention.forward(commands, &shape, &q, &k, &v, &starts, &out, &lse).unwrap();
            attention
                .backward(commands, &shape, &q, &k, &v, &starts, &out, &lse, &d_out, &delta, &dq, &dk, &dv, false)
                .unwrap();
        });
    }
}

/// Each kernel with a wrong line fails its trial.
#[test]
fn a_wrong_kernel_is_found_before_its_first_use() {
    let Some((gpu, units)) = units() else { return };
    for (from, to) in [
        // Factors of the copies, and rows that are scaled down.
        ("let exponent = exponent_of(maximum(part, kv_head, t));", "let exponent = i32(group.x);"),
        // Sums that are not scaled again.
        ("of_rows[row] = shrink;", "of_rows[row] = 1.0;"),
        // Masks.
        (">= vec4(start))", ">= vec4(0u))"),
        ("<= vec4(key));", "<= vec4(0xffffffffu));"),
        // The gradients of queries and of keys.
        ("- row_delta)", ")"),
        ("- query_delta[column])", ")"),
        // Stores past the last token: of outputs and queries' gradients, and of keys' gradients.
        ("params.first + of_query < params.tokens && column", "params.first + of_query < params.tokens + 1u && column"),
        ("token < params.tokens && column", "token < params.tokens + 1u && column"),
        // Inputs past the last token.
        ("row >= tokens_of(part)", "row >= tokens_of(part) + 1u"),
    ] {
        let found = trial::tried(&gpu, HeadSize::new(16), units, |spec| spec.patched(from, to));
        assert!(matches!(found, Err(OpError::Unfit { .. })), "{from}: {found:?}");
    }
}

/// All matrices of keys and values lie 8 bytes further, where the units load garbage. As loops, the
/// kernels are right, so the trial finds nothing but the misalignment.
#[test]
fn misaligned_matrices_are_found_on_matrix_units() {
    let Some((gpu, _)) = units() else { return };
    let tried = |units| trial::tried(&gpu, HeadSize::new(16), units, |spec| spec.patched("tile[", "tile[1u + "));
    tried(MatrixUnits::Loops).unwrap();
    if let Ok(units) = gpu.matrix_units() {
        let found = tried(units);
        assert!(matches!(found, Err(OpError::Unfit { .. })), "{found:?}");
    }
}

/// Times of the kernels of a layer: causal samples of equal length, query heads that share keys.
#[test]
#[ignore = "a measurement"]
fn times_of_a_layer() {
    let gpu = gpu_with(|options| options.profile = true).unwrap();
    let units = gpu.matrix_units().unwrap();
    for (heads, kv_heads, head_dim) in [(32, 8, 128), (32, 8, 64), (16, 4, 256)] {
        let attention = attention(&gpu, units, head_dim);
        let heads = Heads { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt(), window: None };
        for (samples, length) in [(1, 512), (4, 512), (1, 2048), (4, 2048)] {
            let shape = AttentionShape { first: 0, tokens: samples * length, heads };
            let times = times(&gpu, &attention, &shape, length);
            let total: f64 = times.iter().map(|(_, ms)| ms).sum();
            eprintln!("heads of {head_dim}, {samples} x {length}: {total:.3} ms");
            times.iter().for_each(|(kernel, ms)| eprintln!("    {kernel:32} {ms:.3}"));
        }
    }
}

/// The best of several times of each kernel, in ms.
fn times(gpu: &Gpu, attention: &Attention, shape: &AttentionShape, length: u32) -> Vec<(String, f64)> {
    let &AttentionShape { tokens, heads: Heads { heads, kv_heads, head_dim, .. }, .. } = shape;
    let some = random(1, 1 << 16);
    let input = |heads: u32| {
        let elements: Vec<f32> = some.iter().copied().cycle().take((tokens * heads * head_dim) as usize).collect();
        Mat::from_slice(gpu, "input", tokens, heads * head_dim, &elements).unwrap()
    };
    let output = |columns| Mat::new(gpu, "output", tokens, columns).unwrap();
    let (q, k, v, d_out) = (input(heads), input(kv_heads), input(kv_heads), input(heads));
    let starts: Vec<u32> = (0..tokens).map(|token| token / length * length).collect();
    let starts = BufferRange::whole(gpu.storage_with("starts", bytemuck::cast_slice(&starts)).unwrap());
    let (out, lse, delta) = (output(heads * head_dim), output(heads), output(heads));
    let (dq, dk, dv) = (output(heads * head_dim), output(kv_heads * head_dim), output(kv_heads * head_dim));
    let mut best: Vec<(String, f64)> = Vec::new();
    for _ in 0..40 {
        let before = gpu.profile().unwrap();
        let mut commands = gpu.commands("attention");
        attention.forward(&mut commands, shape, &q, &k, &v, &starts, &out, &lse).unwrap();
        attention
            .backward(&mut commands, shape, &q, &k, &v, &starts, &out, &lse, &d_out, &delta, &dq, &dk, &dv, false)
            .unwrap();
        commands.submit().unwrap();
        for row in gpu.profile().unwrap().0 {
            let earlier = before.0.iter().find(|other| other.kernel == row.kernel);
            let ms = (row.seconds - earlier.map_or(0.0, |earlier| earlier.seconds)) * 1e3;
            match best.iter_mut().find(|(kernel, _)| *kernel == row.kernel) {
                Some((_, least)) => *least = least.min(ms),
                None => best.push((row.kernel, ms)),
            }
        }
    }
    best.sort_by(|a, b| a.0.cmp(&b.0));
    best
}

/// The sources for matrix units are valid, compile to SPIR-V, and leave room for two workgroups of
/// a core with 48 KiB, up to heads of 128 elements.
#[test]
fn the_sources_for_hardware_are_valid() {
    for head_dim in [4, 20, 36, 64, 80, 96, 112, 128, 160, 192, 256] {
        for product in Product::ALL {
            let source = product.source(HeadSize::new(head_dim), MatrixUnits::Hardware);
            let module = naga::front::wgsl::parse_str(&source).unwrap_or_else(|e| panic!("{}", e.emit_to_string(&source)));
            let mut validator =
                naga::valid::Validator::new(naga::valid::ValidationFlags::all(), naga::valid::Capabilities::all());
            let info = validator.validate(&module).unwrap_or_else(|e| panic!("{}", e.emit_to_string(&source)));
            let options = naga::back::spv::Options { lang_version: (1, 4), ..Default::default() };
            naga::back::spv::write_vec(&module, &info, &options, None).unwrap();
            let mut layouter = naga::proc::Layouter::default();
            layouter.update(module.to_ctx()).unwrap();
            let shared = module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup);
            let sizes: Vec<u32> = shared.map(|(_, v)| layouter[v.ty].size).collect();
            // Matrices are loaded from aligned addresses only.
            assert!(sizes.iter().all(|size| size.is_multiple_of(16)), "{product:?}, heads of {head_dim}: {sizes:?}");
            let limit = if head_dim <= 128 { 24 << 10 } else { 32 << 10 };
            assert!(sizes.iter().sum::<u32>() <= limit, "{product:?}, heads of {head_dim}: {sizes:?}");
        }
    }
}

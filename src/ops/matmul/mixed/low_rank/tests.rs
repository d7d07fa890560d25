//! Products with an adapter against sums in f64: on the units of the device if it has them, else
//! with the matrix operations as loops.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::format::FloatType;
use crate::format::nf4::ScaleType;
use crate::gpu::{Gpu, Options};
use crate::ops::OpError;
use crate::ops::matmul::mixed::tests::{BOUND, Sum, error, even, gpu, matmul, operand, outliers, uneven_rows};
use crate::ops::matmul::tests::Frozen;
use crate::ops::matmul::{Adapter, Left, Matmul};
use crate::ops::testing::{assert_untouched, mat, poisoned, random, random_mat};

/// A product with an adapter: of `m` rows with some rows of a weight.
struct Case<'a> {
    frozen: &'a Frozen,
    m: u32,
    rows: std::ops::Range<u32>,
    rank: u32,
    /// The factor of the adapter, and of both products.
    scale: f32,
    factor: f32,
    /// The magnitude of A and of B.
    sides: [f32; 2],
}

/// Checks both directions, with and without a bias and `add`.
fn check(gpu: &Gpu, what: &str, case: &Case<'_>, magnitude: fn(u32, u32) -> f32) {
    let &Case { frozen, m, rank, scale, factor, .. } = case;
    let (matmul, whole) = (matmul(gpu), case.frozen.weight());
    let weight = whole.rows(case.rows.clone()).times(factor);
    let (n, inputs, first) = (weight.outputs(), weight.inputs(), case.rows.start as usize);
    let ((x, xs), (dy, dys)) = (operand(gpu, 1, m, inputs, magnitude), operand(gpu, 2, m, n, magnitude));
    let side = |seed, rows, cols, magnitude| {
        let values: Vec<f32> = random(seed, (rows * cols) as usize).into_iter().map(|x| x * magnitude).collect();
        (mat(gpu, rows, cols, &values), values)
    };
    let ((a, a_s), (b, b_s)) = (side(6, rank, inputs, case.sides[0]), side(7, n, rank, case.sides[1]));
    let (bias, biases) = random_mat(gpu, 3, 1, n);
    let ((y_added, y_old), (dx_added, dx_old)) = (random_mat(gpu, 4, m, n), random_mat(gpu, 5, m, inputs));
    let (y, dx) = (poisoned(gpu, m, n), poisoned(gpu, m, inputs));
    let (u, du) = (poisoned(gpu, m, rank), poisoned(gpu, m, rank));
    let mut commands = gpu.commands("products with an adapter");
    let packed = matmul.pack(&mut commands, &x).unwrap();
    let low = &matmul.low_nt(&mut commands, &packed, &a, &u).unwrap();
    assert!(low.panels.is_some());
    let adapter = Adapter { low, other: &b, scale };
    matmul.forward_adapted(&mut commands, &packed, &weight, None, adapter, false, &y).unwrap();
    matmul.forward_adapted(&mut commands, &packed, &weight, Some(&bias), adapter, true, &y_added).unwrap();
    let packed = matmul.pack(&mut commands, &dy).unwrap();
    let low = &matmul.low_nn(&mut commands, &packed, &b, scale, &du).unwrap();
    let adapter = Adapter { low, other: &a, scale };
    matmul.backward_adapted(&mut commands, &packed, &weight, adapter, false, &dx).unwrap();
    matmul.backward_adapted(&mut commands, &packed, &weight, adapter, true, &dx_added).unwrap();
    commands.submit().unwrap();
    [&y, &y_added, &dx, &dx_added, &u, &du].into_iter().for_each(|mat| assert_untouched(gpu, mat));
    let [factor, scale] = [factor, scale].map(f64::from);
    let a_at = |k: usize, input: usize| f64::from(a_s[k * inputs as usize + input]);
    let b_at = |output: usize, k: usize| f64::from(b_s[output * rank as usize + k]);
    let w = |output: usize, input: usize| factor * frozen.value(first + output, input);
    let sums = |values: &[f32], cols: [u32; 2], right: &dyn Fn(usize, usize) -> f64| -> Vec<Sum> {
        let [k, n] = cols.map(|cols| cols as usize);
        let of = |row: &[f32], j| Sum::of(row.iter().enumerate().map(|(t, &x)| f64::from(x) * right(j, t)));
        values.chunks(k).flat_map(|row| (0..n).map(|j| of(row, j)).collect::<Vec<_>>()).collect()
    };
    let close = |name: &str, found: &crate::ops::Mat, expected: &[Sum]| {
        let error = error(&found.read(gpu).unwrap(), expected, found.cols);
        // Twice the rounding: that of u and that of the products of u. A row of few sums may lie
        // far above the mean.
        let bound = if rank.min(n).min(inputs) < 32 { 6.0 * BOUND } else { 2.0 * BOUND };
        assert!(error <= bound, "{what}: {name}: the error of a row is {error:e}");
    };
    // The sums of a row with the terms of the adapter.
    let adapted = |plain: &[Sum], low: &[Sum], cols: u32, side: &dyn Fn(usize, usize) -> f64| -> Vec<Sum> {
        let rows = plain.chunks(cols as usize).zip(low.chunks(rank as usize));
        let of = |(j, sum): (usize, &Sum), low: &[Sum]| {
            low.iter().enumerate().fold(*sum, |sum, (k, u)| {
                // The norm of u's terms, which its error is relative to.
                Sum(sum.0 + scale * u.0 * side(j, k), sum.1 + u.1 * (scale * side(j, k)).powi(2))
            })
        };
        rows.flat_map(|(plain, low)| plain.iter().enumerate().map(|sum| of(sum, low)).collect::<Vec<_>>()).collect()
    };
    let of_u = sums(&xs, [inputs, rank], &|k, input| a_at(k, input));
    close("u", &u, &of_u);
    let expected = adapted(&sums(&xs, [inputs, n], &w), &of_u, n, &b_at);
    close("y", &y, &expected);
    let added = |(i, sum): (usize, &Sum)| sum.plus(y_old[i].into()).plus(factor * f64::from(biases[i % n as usize]));
    close("y + x W^T + bias", &y_added, &expected.iter().enumerate().map(added).collect::<Vec<_>>());
    let of_du = sums(&dys, [n, rank], &|k, output| b_at(output, k));
    let scaled: Vec<Sum> = of_du.iter().map(|u| Sum(scale * u.0, scale * scale * u.1)).collect();
    close("du", &du, &scaled);
    let expected =
        adapted(&sums(&dys, [n, inputs], &|input, output| w(output, input)), &of_du, inputs, &|input, k| a_at(k, input));
    close("dx", &dx, &expected);
    let added = expected.iter().zip(&dx_old).map(|(sum, &old)| sum.plus(old.into())).collect::<Vec<_>>();
    close("dx + dy W", &dx_added, &added);
}

fn case(frozen: &Frozen, m: u32, rows: std::ops::Range<u32>, rank: u32) -> Case<'_> {
    Case { frozen, m, rows, rank, scale: 2.0, factor: 1.0, sides: [0.05, 0.01] }
}

#[test]
fn odd_sizes_and_ranks() {
    let Some(gpu) = gpu() else { return };
    for (i, (m, outputs, inputs, rank)) in
        [(65, 1, 7, 1), (129, 131, 70, 16), (66, 40, 129, 33), (130, 33, 64, 70)].into_iter().enumerate()
    {
        let frozen = match i % 2 {
            0 => Frozen::nf4(gpu, outputs, inputs, 64, ScaleType::Dq8),
            _ => Frozen::raw(gpu, outputs, inputs, FloatType::Bf16, 1 << 20),
        };
        let (scale, factor) = [(2.0, 1.0), (-0.3, 0.7)][i / 2];
        let case = Case { scale, factor, ..case(&frozen, m, 0..outputs, rank) };
        check(gpu, &format!("{m} x {outputs} x {inputs}, rank {rank}"), &case, even);
    }
}

#[test]
fn some_rows_of_a_weight() {
    let Some(gpu) = gpu() else { return };
    let frozen = Frozen::nf4(gpu, 130, 37, 64, ScaleType::Bf16);
    check(gpu, "rows", &case(&frozen, 67, 3..70, 8), even);
}

/// Operands and adapters of every magnitude keep the precision of f16.
#[test]
fn magnitudes() {
    let Some(gpu) = gpu() else { return };
    let frozen = Frozen::nf4(gpu, 40, 100, 64, ScaleType::Bf16);
    for (name, magnitude) in [("outliers", outliers as fn(u32, u32) -> f32), ("rows", uneven_rows)] {
        check(gpu, name, &case(&frozen, 71, 0..40, 16), magnitude);
    }
    for sides in [[1e-3, 1e-8], [1e4, 1e3], [1e-12, 1e12], [1e10, 1e-15], [1.0, 0.0], [0.0, 1.0]] {
        check(gpu, &format!("sides of {sides:?}"), &Case { sides, ..case(&frozen, 66, 0..40, 16) }, even);
    }
    for weights in [0.0, 1e-20, 1e20] {
        let frozen = Frozen::nf4_times(gpu, 40, 70, 32, ScaleType::F32, weights);
        check(gpu, &format!("weights of {weights}"), &case(&frozen, 66, 0..40, 16), even);
    }
}

/// A factor that f16 or the sums do not bear is applied by a product of its own.
#[test]
fn factors_of_every_size() {
    let Some(gpu) = gpu() else { return };
    let frozen = Frozen::nf4(gpu, 40, 70, 32, ScaleType::Bf16);
    for (scale, factor) in [(1e7, 1.0), (1e-7, 1.0), (1.0, 0.0), (0.0, 1.0), (1e5, 1.0)] {
        let case = Case { scale, factor, ..case(&frozen, 66, 0..40, 16) };
        check(gpu, &format!("a scale of {scale} and a factor of {factor}"), &case, even);
    }
}

/// Weights in several rectangles, some with few terms, and results in pieces of rows.
#[test]
fn small_buffers_and_bindings() {
    if gpu().is_none() {
        return;
    }
    let limits = Options { cache: None, max_buffer: Some(1 << 18), max_binding: Some(1 << 17), ..Options::from_env() };
    let gpu = &Gpu::open(&limits).unwrap();
    let raw = Frozen::raw(gpu, 150, 100, FloatType::F32, 1 << 14);
    check(gpu, "rectangles", &case(&raw, 70, 0..150, 16), even);
    let nf4 = Frozen::nf4(gpu, 128, 60, 64, ScaleType::Bf16);
    check(gpu, "results in pieces", &case(&nf4, 300, 0..128, 16), even);
}

#[test]
fn a_product_with_many_terms_is_cut_and_gives_the_same_bits_each_time() {
    let Some(gpu) = gpu() else { return };
    let frozen = Frozen::nf4(gpu, 70, 2100, 64, ScaleType::Bf16);
    check(gpu, "cut sums", &case(&frozen, 66, 0..70, 16), even);
    let ((x, _), (a, _), (b, _)) = (random_mat(gpu, 1, 66, 2100), random_mat(gpu, 2, 16, 2100), random_mat(gpu, 3, 70, 16));
    let matmul = matmul(gpu);
    let bits = || {
        let (y, u) = (poisoned(gpu, 66, 70), poisoned(gpu, 66, 16));
        let mut commands = gpu.commands("cut sums");
        let packed = matmul.pack(&mut commands, &x).unwrap();
        let low = &matmul.low_nt(&mut commands, &packed, &a, &u).unwrap();
        let adapter = Adapter { low, other: &b, scale: 1.0 };
        matmul.forward_adapted(&mut commands, &packed, &frozen.weight(), None, adapter, false, &y).unwrap();
        commands.submit().unwrap();
        y.read(gpu).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    assert_eq!(bits(), bits());
}

/// Panels that another product overwrote, and those of another operand, are refused.
#[test]
fn stale_panels_are_refused() {
    let Some(gpu) = gpu() else { return };
    let matmul = matmul(gpu);
    let frozen = Frozen::nf4(gpu, 20, 30, 32, ScaleType::Bf16);
    let ((x, _), (a, _), (b, _)) = (random_mat(gpu, 1, 65, 30), random_mat(gpu, 2, 4, 30), random_mat(gpu, 3, 20, 4));
    let (y, u) = (poisoned(gpu, 65, 20), poisoned(gpu, 65, 4));
    let mut commands = gpu.commands("stale");
    let packed = matmul.pack(&mut commands, &x).unwrap();
    let first = &matmul.low_nt(&mut commands, &packed, &a, &u).unwrap();
    let second = &matmul.low_nt(&mut commands, &packed, &a, &u).unwrap();
    let mut forward = |packed, low| {
        let adapter = Adapter { low, other: &b, scale: 1.0 };
        matmul.forward_adapted(&mut commands, packed, &frozen.weight(), None, adapter, false, &y)
    };
    let refused = |result: Result<(), OpError>| matches!(result, Err(OpError::Shape { operation: "an adapter", .. }));
    assert!(refused(forward(&packed, first)));
    forward(&packed, second).unwrap();
    let again = matmul.pack(&mut gpu.commands("again"), Left::Mat(&x)).unwrap();
    assert!(refused(forward(&again, second)));
}

/// Without matrix units the products are those of before, bit for bit.
#[test]
fn float32_adds_the_adapter_in_a_product_of_its_own() {
    let Some(gpu) = gpu() else { return };
    let matmul = Matmul::new(gpu, None).unwrap();
    let frozen = Frozen::nf4(gpu, 70, 90, 64, ScaleType::Bf16);
    let ((x, _), (a, _), (b, _)) = (random_mat(gpu, 1, 66, 90), random_mat(gpu, 2, 16, 90), random_mat(gpu, 3, 70, 16));
    let [y, z] = [0; 2].map(|_| poisoned(gpu, 66, 70));
    let [u, v] = [0; 2].map(|_| poisoned(gpu, 66, 16));
    let mut commands = gpu.commands("float32");
    let packed = matmul.pack(&mut commands, &x).unwrap();
    let low = &matmul.low_nt(&mut commands, &packed, &a, &u).unwrap();
    let adapter = Adapter { low, other: &b, scale: 0.5 };
    matmul.forward_adapted(&mut commands, &packed, &frozen.weight(), None, adapter, false, &y).unwrap();
    matmul.nt(&mut commands, &x, &a, 1.0, false, &v).unwrap();
    matmul.forward(&mut commands, &x, &frozen.weight(), None, false, &z).unwrap();
    matmul.nt(&mut commands, &v, &b, 0.5, true, &z).unwrap();
    commands.submit().unwrap();
    assert!(y.read(gpu).unwrap() == z.read(gpu).unwrap());
    assert!(u.read(gpu).unwrap() == v.read(gpu).unwrap());
}

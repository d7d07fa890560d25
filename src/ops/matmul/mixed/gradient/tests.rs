//! Sums over rows against sums in f64: on the units of the device if it has them, else with the
//! matrix operations as loops.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::gpu::Gpu;
use crate::ops::matmul::Place;
use crate::ops::matmul::mixed::tests::{BOUND, Sum, error, even, gpu, matmul, operand};
use crate::ops::testing::{assert_untouched, mat, poisoned, random_mat};

/// Checks both forms, with a wide matrix [rows, cols] and a narrow one [rows, rank].
fn check(gpu: &Gpu, what: &str, [rows, cols, rank]: [u32; 3], magnitudes: [fn(u32, u32) -> f32; 2]) {
    let matmul = matmul(gpu);
    let ((x, xs), (u, us)) = (operand(gpu, 1, rows, cols, magnitudes[0]), operand(gpu, 2, rows, rank, magnitudes[1]));
    let ((by_cols, by_cols_old), (by_rank, by_rank_old)) = (random_mat(gpu, 3, cols, rank), random_mat(gpu, 4, rank, cols));
    let (of_cols, of_rank) = (poisoned(gpu, cols, rank), poisoned(gpu, rank, cols));
    let mut commands = gpu.commands("sums over rows");
    let inputs = &matmul.pack_to(&mut commands, &x, Place::Inputs).unwrap();
    // Another left operand does not disturb the inputs.
    let packed = &matmul.pack(&mut commands, &x).unwrap();
    matmul.tn(&mut commands, packed, &u, 0.5, false, &of_cols).unwrap();
    matmul.tn(&mut commands, &u, inputs, -2.0, false, &of_rank).unwrap();
    matmul.tn(&mut commands, inputs, &u, 0.5, true, &by_cols).unwrap();
    matmul.tn(&mut commands, &u, packed, -2.0, true, &by_rank).unwrap();
    commands.submit().unwrap();
    [&of_cols, &of_rank, &by_cols, &by_rank].into_iter().for_each(|mat| assert_untouched(gpu, mat));
    let at = |values: &[f32], cols: u32, row: u32, column: u32| f64::from(values[(row * cols + column) as usize]);
    let sum = |column: u32, k: u32, scale: f64| {
        Sum::of((0..rows).map(|row| scale * at(&xs, cols, row, column) * at(&us, rank, row, k)))
    };
    let first: Vec<Sum> = (0..cols).flat_map(|j| (0..rank).map(move |k| (j, k))).map(|(j, k)| sum(j, k, 0.5)).collect();
    let second: Vec<Sum> = (0..rank).flat_map(|k| (0..cols).map(move |j| (j, k))).map(|(j, k)| sum(j, k, -2.0)).collect();
    let added = |sums: &[Sum], old: &[f32]| sums.iter().zip(old).map(|(sum, &old)| sum.plus(old.into())).collect::<Vec<_>>();
    for (name, found, expected) in [
        ("x^T u", &of_cols, first.clone()),
        ("u^T x", &of_rank, second.clone()),
        ("x^T u on top", &by_cols, added(&first, &by_cols_old)),
        ("u^T x on top", &by_rank, added(&second, &by_rank_old)),
    ] {
        // All terms of a result have a common scale, so the error is relative to all of it.
        let error = error(&found.read(gpu).unwrap(), &expected, found.rows * found.cols);
        assert!(error <= 2.0 * BOUND, "{what}, {rows} x {cols} x {rank}: {name}: the error is {error:e}");
    }
}

#[test]
fn odd_sizes_and_ranks() {
    let Some(gpu) = gpu() else { return };
    for sizes in [[65, 1, 1], [129, 130, 16], [66, 40, 33], [300, 129, 5]] {
        check(gpu, "even", sizes, [even, even]);
    }
}

/// Rows of inputs and of gradients from 1e-12 to 1e10, also such that their products are even.
#[test]
fn uneven_rows() {
    let Some(gpu) = gpu() else { return };
    let up: fn(u32, u32) -> f32 = |row, _| [1.0, 1e-12, 1e5, 1e10][row as usize % 4];
    let down: fn(u32, u32) -> f32 = |row, _| [1.0, 1e12, 1e-5, 1e-10][row as usize % 4];
    for magnitudes in [[up, even], [even, up], [up, down], [down, up], [up, up]] {
        check(gpu, "uneven rows", [140, 70, 16], magnitudes);
    }
}

/// Rows that are zero in one operand do not take precision from the others: gradients of tokens
/// without a loss are zero, and those of the others small.
#[test]
fn rows_of_zeros() {
    let Some(gpu) = gpu() else { return };
    let some: fn(u32, u32) -> f32 = |row, _| if row.is_multiple_of(3) { 1e-9 } else { 0.0 };
    let none: fn(u32, u32) -> f32 = |_, _| 0.0;
    for magnitudes in [[some, even], [even, some], [none, even], [even, none]] {
        check(gpu, "rows of zeros", [140, 70, 16], magnitudes);
    }
}

/// A long sum is cut, with the same bits each time.
#[test]
fn long_sums() {
    let Some(gpu) = gpu() else { return };
    check(gpu, "long sums", [1100, 33, 16], [even, even]);
    let ((x, _), (u, _), matmul) = (random_mat(gpu, 1, 1100, 33), random_mat(gpu, 2, 1100, 16), matmul(gpu));
    let bits = || {
        let out = poisoned(gpu, 16, 33);
        let mut commands = gpu.commands("long sums");
        let inputs = &matmul.pack_to(&mut commands, &x, Place::Inputs).unwrap();
        matmul.tn(&mut commands, &u, inputs, 1.0, false, &out).unwrap();
        commands.submit().unwrap();
        out.read(gpu).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    assert_eq!(bits(), bits());
}

#[test]
fn what_is_not_finite_shows() {
    let Some(gpu) = gpu() else { return };
    let (rows, cols, rank) = (70, 20, 3);
    for (in_x, value) in [(true, f32::NAN), (false, f32::NAN), (true, f32::INFINITY), (false, f32::INFINITY)] {
        let ((mut xs, mut us), matmul) = ((vec![1.0; 1400], vec![1.0; 210]), matmul(gpu));
        if in_x {
            xs[7 * cols as usize + 4] = value
        } else {
            us[7 * rank as usize + 2] = value
        }
        let (x, u, out) = (mat(gpu, rows, cols, &xs), mat(gpu, rows, rank, &us), poisoned(gpu, cols, rank));
        let mut commands = gpu.commands("not finite");
        let inputs = &matmul.pack_to(&mut commands, &x, Place::Inputs).unwrap();
        matmul.tn(&mut commands, inputs, &u, 1.0, false, &out).unwrap();
        commands.submit().unwrap();
        let found = out.read(gpu).unwrap();
        let shows = |i: usize| if in_x { i / rank as usize == 4 } else { i % rank as usize == 2 };
        assert!(found.iter().enumerate().all(|(i, x)| x.is_finite() != shows(i)), "{found:?}");
    }
}

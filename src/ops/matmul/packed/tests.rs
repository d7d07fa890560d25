//! Packed operands against the operation in float32 and the packing of its result.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use half::f16;

use super::super::mixed::Place;
use super::super::{Matmul, Packed};
use super::{PackedGlu, PackedHalves, PackedNorm};
use crate::arch::family::Activation;
use crate::gpu::Gpu;
use crate::ops::testing::{assert_untouched, gpu, mat, poisoned, random, random_mat, units};
use crate::ops::{Glu, Halves, Mat, OpError, RmsNorm, StoredGlu};

const EPSILON: f32 = 1e-5;

/// Rows of every magnitude: zeros, numbers from 1e-8 to 1e6, and what is not finite.
fn values(seed: u64, rows: u32, cols: u32) -> Vec<f32> {
    let magnitude = |i: u32| [1.0, 1e6, 1e-8, 0.0, 1e3, 1e-2, 1.0][(i / cols) as usize % 7];
    let mut values: Vec<f32> =
        random(seed, (rows * cols) as usize).into_iter().zip(0..).map(|(x, i)| x * magnitude(i)).collect();
    values[(cols * 6 + 1) as usize] = f32::INFINITY;
    values[(cols * 13 + 2) as usize] = f32::NAN;
    values
}

/// Elements and exponents, as bytes.
fn bytes(gpu: &Gpu, packed: &Packed) -> [Vec<u8>; 2] {
    let memory = packed.memory().unwrap();
    [memory.elements, memory.exponents].map(|range| gpu.read(&range).unwrap())
}

/// The elements without their powers of two, by row.
fn elements(gpu: &Gpu, packed: &Packed) -> Vec<Vec<f64>> {
    let ((panels, _), x) = (packed.panels.as_ref().unwrap(), packed.mat());
    let [halves, exponents] = bytes(gpu, packed);
    let (halves, exponents): (&[u16], &[i32]) = (bytemuck::cast_slice(&halves), bytemuck::cast_slice(&exponents));
    let at = |i: u32, j: u32| f16::from_bits(halves[panels.size.at(i, j)]).to_f64() * 2_f64.powi(exponents[i as usize]);
    (0..x.rows).map(|i| (0..x.cols).map(|j| at(i, j)).collect()).collect()
}

fn check_norm(gpu: &Gpu, matmul: &Matmul, rows: u32, cols: u32) {
    let (x, (gamma, _)) = (mat(gpu, rows, cols, &values(1, rows, cols)), random_mat(gpu, 2, 1, cols));
    let [y, memory] = [(); 2].map(|()| poisoned(gpu, rows, cols));
    let mut commands = gpu.commands("packed norm");
    let packed = PackedNorm::new(gpu).unwrap();
    let found = packed.forward(&mut commands, matmul, &x, &gamma, EPSILON, &memory, Place::Inputs).unwrap().unwrap();
    RmsNorm::new(gpu).unwrap().forward(&mut commands, &x, &gamma, EPSILON, &y).unwrap();
    let expected = matmul.pack(&mut commands, &y).unwrap();
    commands.submit().unwrap();
    assert_untouched(gpu, &memory);
    assert!(bytes(gpu, &found) == bytes(gpu, &expected), "{rows} x {cols}");
}

/// The sums have the order of `RmsNorm`, so the bits are the same.
#[test]
fn norms_have_the_bits_of_the_packed_norm() {
    let Some(gpu) = gpu() else { return };
    let matmul = Matmul::new(&gpu, Some(units(&gpu))).unwrap();
    for (rows, cols) in [(65, 4), (70, 60), (131, 256), (129, 260), (67, 1028), (193, 132)] {
        check_norm(&gpu, &matmul, rows, cols);
    }
}

#[test]
fn stored_matrices_have_the_bits_of_the_packed_one() {
    let Some(gpu) = gpu() else { return };
    let matmul = Matmul::new(&gpu, Some(units(&gpu))).unwrap();
    for (rows, cols) in [(65, 4), (70, 61), (131, 256), (129, 1030)] {
        let x = mat(&gpu, rows, cols, &values(1, rows, cols));
        let stored = poisoned(&gpu, rows, Halves::words(cols));
        let mut commands = gpu.commands("packed halves");
        Halves::new(&gpu).unwrap().keep(&mut commands, &x, &stored).unwrap();
        let packed = PackedHalves::new(&gpu).unwrap();
        let found = packed.pack(&mut commands, &matmul, &stored, &x, Place::Inputs).unwrap().unwrap();
        let expected = matmul.pack(&mut commands, &x).unwrap();
        commands.submit().unwrap();
        assert!(bytes(&gpu, &found) == bytes(&gpu, &expected), "{rows} x {cols}");
    }
}

fn check_glu(gpu: &Gpu, matmul: &Matmul, activation: Activation, (rows, cols): (u32, u32), fits: bool) {
    let [gate, up, dh] = [1, 2, 3].map(|seed| mat(gpu, rows, cols, &values(seed, rows, cols)));
    let new = || poisoned(gpu, rows, cols);
    let [h, again, d_gate, d_up, unused, unused_too, packed_gate, packed_up] = [(); 8].map(|()| new());
    let store = || [(); 2].map(|()| poisoned(gpu, rows, Halves::words(cols)));
    let (stored, expected_stored) = (store(), store());
    let (halves, plain) = (Halves::new(gpu).unwrap(), Glu::new(gpu, activation).unwrap());
    let separate = StoredGlu::new(gpu, activation, &halves, &plain).unwrap();
    let glu = PackedGlu::new(gpu, activation).unwrap();
    let what = format!("{activation:?}, {rows} x {cols}");

    let submit = |record: &mut dyn FnMut(&mut crate::gpu::Commands)| {
        let mut commands = gpu.commands("packed activation");
        record(&mut commands);
        commands.submit().unwrap();
    };
    let (mut packed, mut expected) = (None, None);
    submit(&mut |commands| {
        packed = glu.forward(commands, matmul, [&gate, &up], stored.each_ref(), &unused).unwrap();
        separate.forward(commands, [&gate, &up], expected_stored.each_ref(), &h).unwrap();
        expected = Some(matmul.pack_to(commands, &h, Place::Inputs).unwrap());
    });
    let of_forward = bytes(gpu, &packed.unwrap());
    assert!(of_forward == bytes(gpu, &expected.unwrap()), "h: {what}");
    for (found, expected) in stored.iter().zip(&expected_stored) {
        assert_untouched(gpu, found);
        let words = |mat: &Mat| {
            let mut words: Vec<u32> = mat.read(gpu).unwrap().into_iter().map(f32::to_bits).collect();
            // The exponent of h.
            words.iter_mut().skip(1).step_by(mat.cols as usize).for_each(|word| *word = 0);
            words
        };
        assert!(words(found) == words(expected), "stored: {what}");
    }

    let (mut packed, mut expected) = (None, None);
    submit(&mut |commands| {
        packed = glu.again(commands, matmul, stored.each_ref(), &unused).unwrap();
        separate.again(commands, expected_stored.each_ref(), [&unused, &unused_too], &again).unwrap();
        expected = Some(matmul.pack(commands, &again).unwrap());
    });
    let (packed, expected) = (packed.unwrap(), expected.unwrap());
    assert!(bytes(gpu, &packed)[1] == of_forward[1], "exponents of h: {what}");
    // An element of the largest magnitude may be rounded to the next power of two.
    for (found, expected) in elements(gpu, &packed).iter().zip(elements(gpu, &expected)) {
        let largest = expected.iter().fold(0.0, |max: f64, x| max.max(x.abs()));
        let close = |(&a, &b): (&f64, &f64)| a == b || (a - b).abs() <= largest / f64::from(1 << 22) || b.is_nan();
        assert!(found.iter().zip(&expected).all(close), "h again: {what}");
    }

    let mut both = None;
    submit(&mut |commands| {
        both = glu.backward(commands, matmul, stored.each_ref(), &dh, [&packed_gate, &packed_up]).unwrap();
        separate.backward(commands, expected_stored.each_ref(), &dh, [&d_gate, &d_up]).unwrap();
    });
    assert_eq!(both.is_some(), fits, "{what}");
    [&packed_gate, &packed_up].into_iter().for_each(|mat| assert_untouched(gpu, mat));
    for (found, mat) in both.iter().flatten().zip([&d_gate, &d_up]) {
        let mut expected = None;
        submit(&mut |commands| expected = Some(matmul.pack(commands, mat).unwrap()));
        assert!(bytes(gpu, found) == bytes(gpu, &expected.unwrap()), "gradients: {what}");
    }
}

#[test]
fn gated_activations_have_the_bits_of_the_packed_ones() {
    let Some(gpu) = gpu() else { return };
    let matmul = Matmul::new(&gpu, Some(units(&gpu))).unwrap();
    for activation in [Activation::Silu, Activation::GeluTanh] {
        for (size, fits) in [((65, 8), false), ((250, 1000), true), ((129, 1000), false), ((128, 120), true)] {
            check_glu(&gpu, &matmul, activation, size, fits);
        }
    }
}

/// Few rows, and columns in no groups.
#[test]
fn other_matrices_are_not_packed() {
    let Some(gpu) = gpu() else { return };
    let matmul = Matmul::new(&gpu, Some(units(&gpu))).unwrap();
    let (norm, mut commands) = (PackedNorm::new(&gpu).unwrap(), gpu.commands("not packed"));
    for (rows, cols) in [(64, 60), (70, 61)] {
        let ((x, _), (gamma, _)) = (random_mat(&gpu, 1, rows, cols), random_mat(&gpu, 2, 1, cols));
        let y = poisoned(&gpu, rows, cols);
        let packed = norm.forward(&mut commands, &matmul, &x, &gamma, EPSILON, &y, Place::Left).unwrap();
        assert!(packed.is_none(), "{rows} x {cols}");
    }
    let [gate, up, h] = [1, 2, 3].map(|seed| random_mat(&gpu, seed, 70, 60).0);
    let stored = [(); 2].map(|()| poisoned(&gpu, 70, Halves::words(60)));
    let glu = PackedGlu::new(&gpu, Activation::Silu).unwrap();
    assert!(glu.forward(&mut commands, &matmul, [&gate, &up], stored.each_ref(), &h).unwrap().is_none());
}

/// A product that would read the elements in float32 is refused: a kernel did not write them.
#[test]
fn float_products_of_packed_operands_are_refused() {
    let Some(gpu) = gpu() else { return };
    let matmul = Matmul::new(&gpu, Some(units(&gpu))).unwrap();
    let norm = PackedNorm::new(&gpu).unwrap();
    let ((x, _), (gamma, _), y) = (random_mat(&gpu, 1, 70, 60), random_mat(&gpu, 2, 1, 60), poisoned(&gpu, 70, 60));
    let mut commands = gpu.commands("refused");
    let packed = norm.forward(&mut commands, &matmul, &x, &gamma, EPSILON, &y, Place::Left).unwrap().unwrap();
    let ((b, _), out) = (random_mat(&gpu, 3, 90, 60), poisoned(&gpu, 70, 90));
    let refused = matmul.nt(&mut commands, &packed, &b, 1.0, false, &out);
    assert!(matches!(refused, Err(OpError::Shape { operation: "a packed operand", .. })), "{refused:?}");
    let ((wide, _), out) = (random_mat(&gpu, 4, 70, 65), poisoned(&gpu, 60, 65));
    let refused = matmul.tn(&mut commands, &packed, &wide, 1.0, false, &out);
    assert!(matches!(refused, Err(OpError::Shape { operation: "a packed operand", .. })), "{refused:?}");
}

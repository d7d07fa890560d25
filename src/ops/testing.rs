//! Helpers for the tests of operations.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

use std::sync::OnceLock;

use crate::gpu::{Gpu, GpuError, MatrixUnits, Options};

use super::Mat;
pub(crate) use super::trial::{add, dot};

/// The device, or `None` without one: the test is then skipped with a message, or fails under
/// `NF4PACK_REQUIRE_GPU=1`. All tests share the device: software drivers take seconds to compile a
/// kernel.
pub(crate) fn gpu() -> Option<Gpu> {
    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    GPU.get_or_init(|| gpu_with(|_| {})).clone()
}

/// The matrix units of a device, or loops in their place.
pub(crate) fn units(gpu: &Gpu) -> MatrixUnits {
    gpu.matrix_units().unwrap_or(MatrixUnits::Loops)
}

/// A separate device with other options.
pub(crate) fn gpu_with(change: impl FnOnce(&mut Options)) -> Option<Gpu> {
    let mut options = Options { cache: None, ..Options::from_env() };
    change(&mut options);
    match Gpu::open(&options) {
        Ok(gpu) => Some(gpu),
        Err(GpuError::NoAdapter) if std::env::var_os("NF4PACK_REQUIRE_GPU").is_none_or(|v| v != "1") => {
            eprintln!("SKIPPED: no GPU, not even a software one");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// Uniform random numbers in [-1, 1), by seed.
pub(crate) fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(count).collect()
}

/// Guard floats after a matrix of [`mat`] in its buffer.
const GUARD: usize = 64;
/// The bits of a guard: a signalling NaN. Arithmetic makes it quiet, so even an in-place operation
/// on it is detected.
const GUARD_BITS: u32 = 0x7fa0_0000;

/// A matrix with these elements, followed by guards in its buffer.
pub(crate) fn mat(gpu: &Gpu, rows: u32, cols: u32, elements: &[f32]) -> Mat {
    let guarded = [elements, &[f32::from_bits(GUARD_BITS); GUARD]].concat();
    let whole = Mat::from_slice(gpu, "guarded", 1, guarded.len() as u32, &guarded).unwrap();
    Mat { range: whole.range.slice(0, 4 * elements.len() as u64), rows, cols }
}

/// Asserts that nothing was written past the end of a matrix of [`mat`].
#[track_caller]
pub(crate) fn assert_untouched(gpu: &Gpu, mat: &Mat) {
    let guard = Mat { range: mat.range.slice(mat.range.size, 4 * GUARD as u64), rows: 1, cols: GUARD as u32 };
    let found = guard.read(gpu).unwrap();
    assert!(found.iter().all(|x| x.to_bits() == GUARD_BITS), "past the end: {found:?}");
}

/// A matrix of random numbers, and the numbers.
pub(crate) fn random_mat(gpu: &Gpu, seed: u64, rows: u32, cols: u32) -> (Mat, Vec<f32>) {
    let elements = random(seed, (rows * cols) as usize);
    (mat(gpu, rows, cols, &elements), elements)
}

/// A matrix of NaN, to detect elements that a kernel does not write.
pub(crate) fn poisoned(gpu: &Gpu, rows: u32, cols: u32) -> Mat {
    mat(gpu, rows, cols, &vec![f32::NAN; (rows * cols) as usize])
}

/// Converts to f64 for a reference.
pub(crate) fn wide(narrow: &[f32]) -> Vec<f64> {
    narrow.iter().map(|&x| x.into()).collect()
}

/// Rounds to f32, as kernels do.
pub(crate) fn narrow(wide: &[f64]) -> Vec<f32> {
    wide.iter().map(|&x| x as f32).collect()
}

/// Asserts |found - expected| / |expected| <= `bound`. NaN fails.
#[track_caller]
pub(crate) fn assert_close(what: &str, found: &[f32], expected: &[f32], bound: f64) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let square = |x: f64| x * x;
    let difference: f64 = found.iter().zip(expected).map(|(&f, &e)| square(f64::from(f) - f64::from(e))).sum();
    let norm: f64 = expected.iter().map(|&e| square(f64::from(e))).sum();
    let error = (difference / norm.max(1e-30)).sqrt();
    assert!(error <= bound, "{what}: relative error {error:e}, bound {bound:e}");
}

/// Compares an analytic gradient with central differences of `loss` (in f64) in every element of
/// `at`.
#[track_caller]
pub(crate) fn assert_gradient(what: &str, at: &[f64], gradient: &[f64], bound: f64, loss: impl Fn(&[f64]) -> f64) {
    let step = 1e-5;
    let mut point = at.to_vec();
    for i in 0..at.len() {
        point[i] = at[i] + step;
        let above = loss(&point);
        point[i] = at[i] - step;
        let below = loss(&point);
        point[i] = at[i];
        let expected = (above - below) / (2.0 * step);
        let error = (gradient[i] - expected).abs() / expected.abs().max(1e-3);
        assert!(error <= bound, "{what}: element {i} is {}, by differences {expected}", gradient[i]);
    }
}

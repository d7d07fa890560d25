//! Broken kernels leave a model in float32, and `mixed` names them. With loops in place of matrix
//! units.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::path::Path;

use super::*;
use crate::dequant::Codec;
use crate::format::nf4::ScaleType;
use crate::gpu::{GpuError, UseMatrixUnits};
use crate::ops::testing::gpu_with;

/// A line that packs the left operand of products, and a wrong one.
const WRONG_PACK: [&str; 2] = ["power(-exponent)", "power(1 - exponent)"];
/// The mask of attention.
const WRONG_ATTENTION: [&str; 2] = ["<= vec4(key));", "<= vec4(0xffffffffu));"];

fn options(cache: &Path) -> Options {
    Options { matrix_units: UseMatrixUnits::Loops, cache: Some(cache.to_owned()), ..Options::from_env() }
}

fn open(cache: &Path) -> Option<Gpu> {
    let gpu = gpu_with(|to| *to = options(cache))?;
    gpu.matrix_units().is_ok().then_some(gpu)
}

/// The kernels that prepare the operands of products. They have no loops, which take long to
/// compile.
fn operands() -> MixedKernels {
    let mut products = ProductKernels::default();
    products.add_weight(Stored::Quantized(Codec::Nf4(ScaleType::Bf16)), 24, 64);
    MixedKernels::of(products, Vec::new(), Vec::new())
}

#[test]
fn a_kernel_that_fails_leaves_float32_and_is_not_run_again() {
    let folder = tempfile::tempdir().unwrap();
    let Some(gpu) = open(folder.path()) else { return };
    let (right, wrong, options) = (operands(), operands().patched(WRONG_PACK), options(folder.path()));
    let exact = wrong.fallback(gpu.clone(), &options).unwrap();
    let reason = exact.matrix_units().unwrap_err().to_owned();
    assert!(reason.contains("kernel pack:main") && reason.contains("wrong values on this driver"), "{reason}");
    // A later run finds the verdict.
    let later = open(folder.path()).unwrap();
    let kept = wrong.tests(&later, MatrixUnits::Loops).unwrap().iter().find_map(|test| test.kept()?.err());
    assert_eq!(kept.as_ref(), Some(&reason));
    assert_eq!(wrong.fallback(later, &options).unwrap().matrix_units(), Err(reason.as_str()));
    // A user who wants mixed precision gets a new test, and its error.
    let error = wrong.check(&gpu).unwrap_err();
    assert!(matches!(&error, OpError::Unfit { kernel, .. } if kernel.contains("pack:main")), "{error}");

    // Right kernels have other verdicts.
    assert!(right.fallback(gpu.clone(), &options).unwrap().matrix_units().is_ok());
    right.check(&gpu).unwrap();
    assert!(right.tests(&gpu, MatrixUnits::Loops).unwrap().iter().all(|test| test.kept() == Some(Ok(()))));
}

#[test]
fn wrong_attention_leaves_float32() {
    let folder = tempfile::tempdir().unwrap();
    let Some(gpu) = open(folder.path()) else { return };
    let wrong = MixedKernels::of(ProductKernels::default(), vec![16], Vec::new()).patched(WRONG_ATTENTION);
    let exact = wrong.fallback(gpu, &options(folder.path())).unwrap();
    let reason = exact.matrix_units().unwrap_err();
    assert!(reason.contains("attention on matrix units, with heads of 16"), "{reason}");
}

#[test]
fn wrong_packed_operands_leave_float32() {
    let folder = tempfile::tempdir().unwrap();
    let Some(gpu) = open(folder.path()) else { return };
    let kernels = || MixedKernels::of(ProductKernels::default(), Vec::new(), vec![Activation::Silu]);
    let of_norm = ["factors[row] = r;", "factors[row] = 1.01 * r;"];
    let of_activation = ["gradients.up[i] = dh[i] * gate[i] * s.x;", "gradients.up[i] = dh[i] * gate[i] * s.y;"];
    for (patch, kernel) in [(of_norm, "norm to panels"), (of_activation, "gated SiLU to panels")] {
        let exact = kernels().patched(patch).fallback(gpu.clone(), &options(folder.path())).unwrap();
        let reason = exact.matrix_units().unwrap_err();
        assert!(reason.contains(kernel), "{reason}");
    }
    assert!(kernels().fallback(gpu, &options(folder.path())).unwrap().matrix_units().is_ok());
}

#[test]
fn a_kernel_that_does_not_compile_leaves_float32() {
    let folder = tempfile::tempdir().unwrap();
    let Some(gpu) = open(folder.path()) else { return };
    let wrong = operands().patched(["power(-exponent)", "power(no_such_name)"]);
    let exact = wrong.fallback(gpu, &options(folder.path())).unwrap();
    let reason = exact.matrix_units().unwrap_err();
    assert!(reason.contains("does not run on this driver") && reason.contains("no_such_name"), "{reason}");
}

/// What says nothing about a kernel is an error.
#[test]
fn only_errors_of_kernels_are_reasons() {
    let memory = GpuError::OutOfMemory { what: "weights".to_owned(), requested: 1, in_use: None };
    assert_eq!(reason(&OpError::Gpu(memory)), None);
    let lost = GpuError::DeviceLost { reason: "reset".to_owned() };
    assert!(reason(&OpError::Gpu(lost)).unwrap().contains("reset"));
}

#[test]
fn a_device_without_matrix_units_has_nothing_to_test() {
    let Some(gpu) = gpu_with(|options| options.matrix_units = UseMatrixUnits::Off) else { return };
    let wrong = operands().patched(WRONG_PACK);
    wrong.check(&gpu).unwrap();
    let same = wrong.fallback(gpu, &Options::from_env()).unwrap();
    assert_eq!(same.matrix_units(), Err("matrix units are switched off"));
}

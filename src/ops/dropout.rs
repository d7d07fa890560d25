//! Dropout with masks that are computed, not stored. The backward pass and a recomputed forward
//! pass use the same masks.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::pieces::{ROWS, pieces};
use super::{Mat, OpError};
use crate::gpu::{Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// Threads per workgroup, one element per thread.
const WORKGROUP: u64 = 256;

/// The key of a mask. The same key gives the same mask on every device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DropoutKey {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the forward pass in the run (micro-batches, not optimiser steps).
    pub step: u64,
    /// Number of the adapted projection in the model.
    pub module: u32,
    /// Number of the window of tokens in the pass.
    pub window: u32,
}

impl DropoutKey {
    /// Hashes the key to 64 bits. Each bit of the key affects every bit.
    fn words(self) -> [u32; 2] {
        let place = u64::from(self.window) << 32 | u64::from(self.module);
        let mixed = [self.seed, self.step, place].into_iter().fold(0, |state, part| split_mix(state ^ part));
        [mixed as u32, (mixed >> 32) as u32]
    }
}

/// One step of SplitMix64 (Steele, Lea and Flood 2014).
fn split_mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// y = x * mask / (1 - p) (Srivastava et al. 2014, scaled in training, as `torch.nn.Dropout` does).
#[derive(Debug, Clone)]
pub struct Dropout {
    gpu: Gpu,
    kernel: Kernel,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    count: u32,
    first: u32,
    key: [u32; 2],
    threshold: u32,
    scale: f32,
    add: u32,
    pad: u32,
}

impl Dropout {
    /// Compiles the kernel for `gpu`.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::KernelLimit`].
    pub fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        // SAFETY: `record` binds as many floats as it passes in `count`; there are no loops and no
        // workgroup memory.
        let shader = unsafe { Shader::trusted("dropout", include_str!("../../shaders/dropout.wgsl")) };
        let kernel = gpu.kernel(&KernelSpec { shader, entry: "main", constants: Vec::new() })?;
        Ok(Self { gpu: gpu.clone(), kernel })
    }

    /// Records y = x * mask / (1 - p), added to `y` if `add` is set. The gradient is the same
    /// operation with the same key: dx = dy * mask / (1 - p). `x` and `y` are [rows, cols] with
    /// fewer than 2^32 elements, in different buffers.
    ///
    /// # Errors
    /// [`OpError::Shape`]; [`OpError::Value`] if `p` is not in [0, 1).
    pub fn record(
        &self,
        commands: &mut Commands,
        p: f32,
        key: DropoutKey,
        x: &Mat,
        y: &Mat,
        add: bool,
    ) -> Result<(), OpError> {
        let max = u64::from(u32::MAX);
        if x.elements() > max {
            let found = x.elements();
            return Err(OpError::Shape { operation: "dropout", what: "the number of elements", expected: max, found });
        }
        x.check("dropout", y.rows, y.cols)?;
        y.check("dropout", y.rows, y.cols)?;
        let (threshold, scale) = rate(p)?;
        for piece in pieces(&self.gpu, y.elements(), 4, ROWS)? {
            let (first, count) = (piece.first as u32, piece.count);
            let params = Params { count, first, key: key.words(), threshold, scale, add: add.into(), pad: 0 };
            let bindings = [piece.of(&x.range, 4), piece.of(&y.range, 4)];
            let groups = self.gpu.grid(u64::from(count).div_ceil(WORKGROUP));
            commands.dispatch(&self.kernel, &bindings, bytemuck::bytes_of(&params), groups, 8 * u64::from(count));
        }
        Ok(())
    }
}

/// p * 2^32 and 1 / (1 - p).
fn rate(p: f32) -> Result<(u32, f32), OpError> {
    let p = f64::from(p);
    if !(0.0..1.0).contains(&p) {
        return Err(OpError::Value { operation: "dropout", what: "the probability", expected: "in [0, 1)", found: p });
    }
    // The largest f32 below 1 is 1 - 2^-24, so the threshold fits.
    Ok(((p * 4_294_967_296.0) as u32, (1.0 / (1.0 - p)) as f32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_untouched, gpu, gpu_with, poisoned, random_mat};

    fn mix(x: u32) -> u32 {
        let x = (x ^ x >> 16).wrapping_mul(0x21f0_aaad);
        let x = (x ^ x >> 15).wrapping_mul(0xd35a_2d97);
        x ^ x >> 15
    }

    fn keeps(key: DropoutKey, threshold: u32, i: u32) -> bool {
        let [a, b] = key.words();
        mix(mix(i ^ a).wrapping_add(b)) >= threshold
    }

    fn reference(p: f32, key: DropoutKey, x: &[f32]) -> Vec<f32> {
        let (threshold, scale) = rate(p).unwrap();
        x.iter().zip(0..).map(|(&x, i)| if keeps(key, threshold, i) { x * scale } else { 0.0 }).collect()
    }

    const KEY: DropoutKey = DropoutKey { seed: 42, step: 7, module: 3, window: 0 };

    fn check(gpu: &Gpu, rows: u32, cols: u32, p: f32) {
        let dropout = Dropout::new(gpu).unwrap();
        let ((x, xs), (sum, sums)) = (random_mat(gpu, 1, rows, cols), random_mat(gpu, 2, rows, cols));
        let y = poisoned(gpu, rows, cols);
        let mut commands = gpu.commands("dropout");
        dropout.record(&mut commands, p, KEY, &x, &y, false).unwrap();
        dropout.record(&mut commands, p, KEY, &x, &sum, true).unwrap();
        commands.submit().unwrap();
        assert_untouched(gpu, &y);
        let expected = reference(p, KEY, &xs);
        assert!(y.read(gpu).unwrap() == expected, "bit for bit");
        let found = sum.read(gpu).unwrap();
        // A device may use a fused multiply-add or round the product first.
        let differs =
            |((found, y), sum): ((&f32, &f32), &f32)| (found - (y + sum)).abs() > 4.0 * f32::EPSILON * (1.0 + y.abs());
        assert_eq!(found.iter().zip(&expected).zip(&sums).filter(|&x| differs(x)).count(), 0);
    }

    #[test]
    fn the_device_drops_what_the_host_drops() {
        let Some(gpu) = gpu() else { return };
        for (rows, cols) in [(1, 1), (7, 65), (3, 1000), (70_000, 3)] {
            [0.0, 0.05, 0.5, 1.0 - f32::EPSILON / 2.0].into_iter().for_each(|p| check(&gpu, rows, cols, p));
        }
    }

    #[test]
    fn keys_are_fixed() {
        // A changed value breaks every `--resume` and every published run.
        assert_eq!(DropoutKey { seed: 0, step: 0, module: 0, window: 0 }.words(), [0x38fc_be91, 0x2382_75bc]);
        assert_eq!(KEY.words(), [0xd465_5539, 0xf55e_4254]);
        assert_eq!(DropoutKey { seed: u64::MAX, step: 1 << 40, module: 251, window: 0 }.words(), [0x022b_4165, 0x5c5b_c05a]);
    }

    #[test]
    fn more_groups_than_a_dimension_has() {
        let Some(gpu) = gpu_with(|options| options.max_groups = Some(7)) else { return };
        check(&gpu, 77, 101, 0.3);
    }

    #[test]
    fn pieces_share_one_mask() {
        let Some(gpu) = gpu_with(|options| options.max_binding = Some(2048)) else { return };
        check(&gpu, 77, 101, 0.3);
    }

    /// The fraction of kept elements, and the fraction of equal decisions with two keys, are within
    /// five standard deviations.
    #[test]
    fn masks_have_the_rate_asked_for_and_depend_on_every_part_of_the_key() {
        let count = 100_000_u32;
        let (threshold, _) = rate(0.3).unwrap();
        let mask = |key| (0..count).map(move |i| keeps(key, threshold, i));
        let within = |fraction: f64, expected: f64| {
            let sigma = (expected * (1.0 - expected) / f64::from(count)).sqrt();
            assert!((fraction - expected).abs() < 5.0 * sigma, "{fraction} is not {expected}");
        };
        let kept = mask(KEY).filter(|&keep| keep).count();
        within(kept as f64 / f64::from(count), 0.7);
        let others = [
            DropoutKey { seed: 43, ..KEY },
            DropoutKey { step: 8, ..KEY },
            DropoutKey { module: 4, ..KEY },
            DropoutKey { window: 1, ..KEY },
            DropoutKey { window: 3, module: 0, ..KEY },
            DropoutKey { seed: KEY.seed + (1 << 40), ..KEY },
            DropoutKey { seed: KEY.step, step: KEY.seed, ..KEY },
        ];
        for other in others {
            let equal = mask(KEY).zip(mask(other)).filter(|(a, b)| a == b).count();
            within(equal as f64 / f64::from(count), 0.7 * 0.7 + 0.3 * 0.3);
        }
        let neighbours = mask(KEY).zip(mask(KEY).skip(1)).filter(|(a, b)| a == b).count();
        within(neighbours as f64 / f64::from(count), 0.58);
    }

    #[test]
    fn probabilities_are_probabilities() {
        for p in [-0.1, 1.0, f32::NAN, f32::INFINITY] {
            assert!(matches!(rate(p), Err(OpError::Value { operation: "dropout", .. })), "{p}");
        }
        assert_eq!(rate(0.0).unwrap(), (0, 1.0));
        assert_eq!(rate(0.5).unwrap(), (1 << 31, 2.0));
    }
}

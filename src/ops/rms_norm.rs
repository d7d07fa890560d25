//! Root-mean-square normalisation (Zhang and Sennrich 2019), as in Llama: the square root includes
//! epsilon.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::pieces::{ROWS, pieces};
use super::{Mat, OpError};
use crate::gpu::{Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// Threads per workgroup.
const WORKGROUP: u32 = 256;
/// Rows of at most this width share a workgroup.
const NARROW: u32 = 256;
/// Threads per narrow row.
const NARROW_LANES: u32 = 32;

/// y = x * r * gamma with r = 1 / sqrt(mean(x^2) + epsilon), row by row, gamma frozen.
///
/// A row has the width of gamma [1, width]. A matrix row with n times that width counts as n rows.
/// In this way, queries [tokens, heads * head_dim] are normalised per head.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    gpu: Gpu,
    narrow: Kernels,
    wide: Kernels,
}

#[derive(Debug, Clone)]
struct Kernels {
    forward: Kernel,
    backward: Kernel,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    rows: u32,
    width: u32,
    epsilon: f32,
    add: u32,
}

impl RmsNorm {
    /// Compiles the kernels for `gpu`.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::KernelLimit`].
    pub fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        // SAFETY: `dispatch` binds `rows * width` floats everywhere (`gamma`: `width`), fewer than
        // 2^29, and threads of other rows touch none; loops end at `width` or halve; workgroup
        // memory is written before each barrier that precedes its reads.
        let shader = unsafe { Shader::trusted("rms_norm", include_str!("../../shaders/rms_norm.wgsl")) };
        let kernel = |entry, lanes: u32| {
            gpu.kernel(&KernelSpec { shader: shader.clone(), entry, constants: vec![("LANES", lanes.into())] })
        };
        let kernels = |lanes| Ok(Kernels { forward: kernel("forward", lanes)?, backward: kernel("backward", lanes)? });
        Ok(Self { gpu: gpu.clone(), narrow: kernels(NARROW_LANES)?, wide: kernels(WORKGROUP)? })
    }

    /// Records y = x * r * gamma. `x` and `y` [rows, n * width], `gamma` [1, width]. `y` must not
    /// share a buffer with an input.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn forward(&self, commands: &mut Commands, x: &Mat, gamma: &Mat, epsilon: f32, y: &Mat) -> Result<(), OpError> {
        self.dispatch(commands, |kernels| &kernels.forward, [x, x, y], gamma, epsilon, false)
    }

    /// As [`RmsNorm::forward`], added to `y`.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn forward_add(&self, commands: &mut Commands, x: &Mat, gamma: &Mat, epsilon: f32, y: &Mat) -> Result<(), OpError> {
        self.dispatch(commands, |kernels| &kernels.forward, [x, x, y], gamma, epsilon, true)
    }

    /// Records dx = r * (dy * gamma - x * r^2 * mean(dy * gamma * x)), added to `dx` if `add` is
    /// set. `x` is the input of [`RmsNorm::forward`]; `x`, `dy`, `dx` [rows, n * width], `gamma`
    /// [1, width]; `dx` must not share a buffer with an input.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    #[expect(clippy::too_many_arguments, reason = "four tensors, and how")]
    pub fn backward(
        &self,
        commands: &mut Commands,
        x: &Mat,
        gamma: &Mat,
        epsilon: f32,
        dy: &Mat,
        dx: &Mat,
        add: bool,
    ) -> Result<(), OpError> {
        self.dispatch(commands, |kernels| &kernels.backward, [x, dy, dx], gamma, epsilon, add)
    }

    fn dispatch(
        &self,
        commands: &mut Commands,
        kernel: impl Fn(&Kernels) -> &Kernel,
        [x, dy, out]: [&Mat; 3],
        gamma: &Mat,
        epsilon: f32,
        add: bool,
    ) -> Result<(), OpError> {
        let width = gamma.cols;
        gamma.check("RMSNorm", 1, width)?;
        if width == 0 || !x.cols.is_multiple_of(width) {
            let (expected, found) = (width.into(), x.cols.into());
            return Err(OpError::Shape {
                operation: "RMSNorm",
                what: "the width of x (a multiple of gamma's)",
                expected,
                found,
            });
        }
        [x, dy, out].into_iter().try_for_each(|mat| mat.check("RMSNorm", x.rows, x.cols))?;
        let (kernels, lanes) = if width <= NARROW { (&self.narrow, NARROW_LANES) } else { (&self.wide, WORKGROUP) };
        let row_bytes = 4 * u64::from(width);
        for piece in pieces(&self.gpu, x.elements() / u64::from(width), row_bytes, ROWS)? {
            let params = Params { rows: piece.count, width, epsilon, add: add.into() };
            let [x, dy, out] = [x, dy, out].map(|mat| piece.of(&mat.range, row_bytes));
            let bytes = 4 * out.size;
            let groups = self.gpu.grid(u64::from(piece.count).div_ceil((WORKGROUP / lanes).into()));
            let bindings = [x, gamma.range.slice(0, row_bytes), dy, out];
            commands.dispatch(kernel(kernels), &bindings, bytemuck::bytes_of(&params), groups, bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{
        assert_close, assert_gradient, assert_untouched, gpu, gpu_with, narrow, poisoned, random, random_mat, wide,
    };

    const EPSILON: f32 = 1e-3;

    fn r(x: &[f64]) -> f64 {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        1.0 / (mean + f64::from(EPSILON)).sqrt()
    }

    fn reference(x: &[f64], gamma: &[f64]) -> Vec<f64> {
        let row = |x: &[f64]| x.iter().zip(gamma).map(|(value, g)| value * r(x) * g).collect::<Vec<_>>();
        x.chunks(gamma.len()).flat_map(row).collect()
    }

    fn reference_backward(x: &[f64], gamma: &[f64], dy: &[f64]) -> Vec<f64> {
        let row = |(x, dy): (&[f64], &[f64])| {
            let r = r(x);
            let scaled: Vec<f64> = dy.iter().zip(gamma).map(|(d, g)| d * g).collect();
            let along = scaled.iter().zip(x).map(|(d, x)| d * x).sum::<f64>() / x.len() as f64;
            scaled.iter().zip(x).map(|(d, x)| r * d - x * r.powi(3) * along).collect::<Vec<_>>()
        };
        x.chunks(gamma.len()).zip(dy.chunks(gamma.len())).flat_map(row).collect()
    }

    /// Tests both directions on [rows, heads * width], with dx added to an initial value.
    fn check(gpu: &Gpu, rows: u32, heads: u32, width: u32) {
        let norm = RmsNorm::new(gpu).unwrap();
        let cols = heads * width;
        let ((x, xs), (gamma, gammas)) = (random_mat(gpu, 1, rows, cols), random_mat(gpu, 2, 1, width));
        let ((dy, dys), (sum, sums)) = (random_mat(gpu, 3, rows, cols), random_mat(gpu, 4, rows, cols));
        let (y, dx) = (poisoned(gpu, rows, cols), poisoned(gpu, rows, cols));
        let (added, addends) = random_mat(gpu, 5, rows, cols);
        let mut commands = gpu.commands("norm");
        norm.forward(&mut commands, &x, &gamma, EPSILON, &y).unwrap();
        norm.backward(&mut commands, &x, &gamma, EPSILON, &dy, &dx, false).unwrap();
        norm.backward(&mut commands, &x, &gamma, EPSILON, &dy, &sum, true).unwrap();
        norm.forward_add(&mut commands, &x, &gamma, EPSILON, &added).unwrap();
        commands.submit().unwrap();
        [&y, &dx, &sum, &added].into_iter().for_each(|mat| assert_untouched(gpu, mat));
        let [xs, gammas, dys] = [xs, gammas, dys].map(|v| wide(&v));
        let (expected, normed) = (reference_backward(&xs, &gammas, &dys), reference(&xs, &gammas));
        let all: Vec<f64> = wide(&addends).iter().zip(normed).map(|(addend, y)| addend + y).collect();
        assert_close("y added", &added.read(gpu).unwrap(), &narrow(&all), 1e-6);
        assert_close("y", &y.read(gpu).unwrap(), &narrow(&reference(&xs, &gammas)), 1e-6);
        // In a row of one element, dx is the small difference of two terms, with their absolute
        // error.
        let terms = |(&x, &dy): (&f64, &f64)| r(&[x]) * gammas[0] * dy;
        let norm_of = |v: &mut dyn Iterator<Item = f64>| v.map(|x| x * x).sum::<f64>().sqrt();
        let cancelled = norm_of(&mut xs.iter().zip(&dys).map(terms)) / norm_of(&mut expected.iter().copied());
        let bound = 1e-6 * if width == 1 { cancelled } else { 1.0 };
        assert_close("dx", &dx.read(gpu).unwrap(), &narrow(&expected), bound);
        let expected: Vec<f64> = expected.iter().zip(&sums).map(|(dx, &sum)| dx + f64::from(sum)).collect();
        assert_close("dx on top", &sum.read(gpu).unwrap(), &narrow(&expected), 1e-6);
    }

    #[test]
    fn forward_and_backward() {
        let Some(gpu) = gpu() else { return };
        for (rows, heads, width) in
            [(1, 1, 1), (7, 1, 65), (65, 3, 7), (3, 1, 1000), (5, 2, 256), (5, 1, 257), (2, 1, 4099), (9, 5, 128)]
        {
            check(&gpu, rows, heads, width);
        }
    }

    #[test]
    fn more_rows_than_a_dimension_has_groups() {
        let Some(gpu) = gpu() else { return };
        check(&gpu, 65_537, 8, 1);
    }

    #[test]
    fn pieces_that_can_be_bound() {
        let Some(gpu) = gpu_with(|options| options.max_binding = Some(1 << 17)) else { return };
        check(&gpu, 77, 5, 101);
        check(&gpu, 301, 1, 300);
    }

    #[test]
    fn the_same_bits_every_time() {
        let Some(gpu) = gpu() else { return };
        let norm = RmsNorm::new(&gpu).unwrap();
        let ((x, _), (dy, _)) = (random_mat(&gpu, 1, 65, 1200), random_mat(&gpu, 2, 65, 1200));
        for width in [100, 1200] {
            let (gamma, _) = random_mat(&gpu, 3, 1, width);
            let gradient = || {
                let dx = poisoned(&gpu, 65, 1200);
                let mut commands = gpu.commands("norm");
                norm.backward(&mut commands, &x, &gamma, EPSILON, &dy, &dx, false).unwrap();
                commands.submit().unwrap();
                dx.read(&gpu).unwrap()
            };
            assert!(gradient() == gradient(), "rows of {width}");
        }
    }

    #[test]
    fn the_reference_is_the_gradient() {
        let [x, gamma, dy] = [(1, 21), (2, 7), (3, 21)].map(|(seed, count)| wide(&random(seed, count)));
        assert_gradient("dx", &x, &reference_backward(&x, &gamma, &dy), 1e-6, |x| {
            reference(x, &gamma).iter().zip(&dy).map(|(y, dy)| y * dy).sum()
        });
    }

    #[test]
    fn rows_must_be_whole() {
        let Some(gpu) = gpu() else { return };
        let ((x, _), (gamma, _)) = (random_mat(&gpu, 1, 2, 10), random_mat(&gpu, 2, 1, 3));
        let refused =
            RmsNorm::new(&gpu).unwrap().forward(&mut gpu.commands("norm"), &x, &gamma, EPSILON, &poisoned(&gpu, 2, 10));
        assert!(matches!(refused, Err(OpError::Shape { operation: "RMSNorm", .. })), "{refused:?}");
    }
}

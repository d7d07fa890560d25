//! Sums of matrices: residual connections, and gradients of what is used twice.

use bytemuck::{Pod, Zeroable};

use super::pieces::{ROWS, pieces};
use super::{Mat, TrainError};
use crate::gpu::{Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// Threads of a workgroup, an element each.
const WORKGROUP: u64 = 256;

/// y += scale * x. The gradient with respect to x is scale * dy, and that with respect to y is dy: the same kernel.
#[derive(Debug, Clone)]
pub struct Add {
    gpu: Gpu,
    kernel: Kernel,
}

/// `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    count: u32,
    scale: f32,
    pad: [u32; 2],
}

impl Add {
    /// The kernel of `gpu`.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::KernelLimit`].
    pub fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        // SAFETY: `scaled` binds as many floats as it passes in `count`; there are no loops and no workgroup memory.
        let shader = unsafe { Shader::trusted("add", include_str!("../../../shaders/add.wgsl")) };
        let kernel = gpu.kernel(&KernelSpec { shader, entry: "main", constants: Vec::new() })?;
        Ok(Self { gpu: gpu.clone(), kernel })
    }

    /// Records y += x.
    ///
    /// # Errors
    /// As [`Add::scaled`].
    pub fn record(&self, commands: &mut Commands, x: &Mat, y: &Mat) -> Result<(), TrainError> {
        self.scaled(commands, 1.0, x, y)
    }

    /// Records y += scale * x. `x` and `y` [rows, cols] lie in different buffers.
    ///
    /// # Errors
    /// [`TrainError::Shape`].
    pub fn scaled(&self, commands: &mut Commands, scale: f32, x: &Mat, y: &Mat) -> Result<(), TrainError> {
        x.check("add", y.rows, y.cols)?;
        y.check("add", y.rows, y.cols)?;
        for piece in pieces(&self.gpu, y.elements(), 4, ROWS)? {
            let params = Params { count: piece.count, scale, pad: [0; 2] };
            let bindings = [piece.of(&x.range, 4), piece.of(&y.range, 4)];
            let groups = self.gpu.grid(u64::from(piece.count).div_ceil(WORKGROUP));
            commands.dispatch(&self.kernel, &bindings, bytemuck::bytes_of(&params), groups, 12 * u64::from(piece.count));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::ops::testing::{assert_close, assert_untouched, gpu, gpu_with, random_mat};

    fn check(gpu: &Gpu, rows: u32, cols: u32, scale: f32) {
        let add = Add::new(gpu).unwrap();
        let ((x, xs), (y, ys)) = (random_mat(gpu, 1, rows, cols), random_mat(gpu, 2, rows, cols));
        let mut commands = gpu.commands("add");
        add.scaled(&mut commands, scale, &x, &y).unwrap();
        commands.submit().unwrap();
        let expected: Vec<f32> =
            xs.iter().zip(&ys).map(|(&x, &y)| (f64::from(y) + f64::from(scale) * f64::from(x)) as f32).collect();
        assert_untouched(gpu, &y);
        assert_close("y", &y.read(gpu).unwrap(), &expected, 1e-7);
    }

    #[test]
    fn adds() {
        let Some(gpu) = gpu() else { return };
        for (rows, cols) in [(1, 1), (7, 65), (1, 1000), (70_000, 3)] {
            check(&gpu, rows, cols, 1.0);
            check(&gpu, rows, cols, -0.3);
        }
        // More workgroups than one dimension has.
        check(&gpu, 65_537, 257, 1.0);
    }

    #[test]
    fn adds_in_pieces_that_can_be_bound() {
        let Some(gpu) = gpu_with(|options| options.max_binding = Some(2048)) else { return };
        check(&gpu, 77, 101, 2.0);
    }

    #[test]
    fn shapes_must_agree() {
        let Some(gpu) = gpu() else { return };
        let add = Add::new(&gpu).unwrap();
        let ((x, _), (y, _)) = (random_mat(&gpu, 1, 2, 3), random_mat(&gpu, 2, 3, 2));
        let refused = add.record(&mut gpu.commands("add"), &x, &y);
        assert!(matches!(refused, Err(TrainError::Shape { operation: "add", expected: 3, found: 2, .. })), "{refused:?}");
    }
}

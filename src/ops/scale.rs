//! Scales a matrix in place, for models with an embedding factor, and adds a number to it, for
//! norms that add 1 to their weights.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::pieces::{ROWS, pieces};
use super::{Mat, OpError};
use crate::gpu::{Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// Threads per workgroup, one element per thread.
const WORKGROUP: u64 = 256;

/// x = x * factor + offset.
#[derive(Debug, Clone)]
pub struct Scale {
    gpu: Gpu,
    kernel: Kernel,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    count: u32,
    factor: f32,
    offset: f32,
    pad: u32,
}

impl Scale {
    /// Compiles the kernel for `gpu`.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::KernelLimit`].
    pub fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        // SAFETY: `record` binds as many floats as it passes in `count`; there are no loops and no
        // workgroup memory.
        let shader = unsafe { Shader::trusted("scale", include_str!("../../shaders/scale.wgsl")) };
        let kernel = gpu.kernel(&KernelSpec { shader, entry: "main", constants: Vec::new() })?;
        Ok(Self { gpu: gpu.clone(), kernel })
    }

    /// Records x = x * factor. Records nothing if the factor is 1.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn record(&self, commands: &mut Commands, factor: f32, x: &Mat) -> Result<(), OpError> {
        self.dispatch(commands, [factor, 0.0], x)
    }

    /// Records x = x + offset. Records nothing if the offset is 0.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn offset(&self, commands: &mut Commands, offset: f32, x: &Mat) -> Result<(), OpError> {
        self.dispatch(commands, [1.0, offset], x)
    }

    fn dispatch(&self, commands: &mut Commands, [factor, offset]: [f32; 2], x: &Mat) -> Result<(), OpError> {
        x.check("scale", x.rows, x.cols)?;
        if factor == 1.0 && offset == 0.0 {
            return Ok(());
        }
        for piece in pieces(&self.gpu, x.elements(), 4, ROWS)? {
            let params = Params { count: piece.count, factor, offset, pad: 0 };
            let groups = self.gpu.grid(u64::from(piece.count).div_ceil(WORKGROUP));
            let bytes = 8 * u64::from(piece.count);
            let bindings = [piece.of(&x.range, 4)];
            commands.dispatch(&self.kernel, &bindings, bytemuck::bytes_of(&params), groups, bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_untouched, gpu, gpu_with, random_mat};

    fn check(gpu: &Gpu, rows: u32, cols: u32) {
        let scale = Scale::new(gpu).unwrap();
        for factor in [1.0, 12.0, -0.3] {
            let (x, elements) = random_mat(gpu, 1, rows, cols);
            let mut commands = gpu.commands("scale");
            scale.record(&mut commands, factor, &x).unwrap();
            commands.submit().unwrap();
            assert_untouched(gpu, &x);
            let expected: Vec<f32> = elements.into_iter().map(|x| x * factor).collect();
            assert!(x.read(gpu).unwrap() == expected, "{rows} x {cols} times {factor}");
        }
        for offset in [0.0, 1.0, -0.3] {
            let (x, elements) = random_mat(gpu, 2, rows, cols);
            let mut commands = gpu.commands("offset");
            scale.offset(&mut commands, offset, &x).unwrap();
            commands.submit().unwrap();
            assert_untouched(gpu, &x);
            let expected: Vec<f32> = elements.into_iter().map(|x| x + offset).collect();
            assert!(x.read(gpu).unwrap() == expected, "{rows} x {cols} plus {offset}");
        }
    }

    #[test]
    fn every_element_is_multiplied_once() {
        let Some(gpu) = gpu() else { return };
        for (rows, cols) in [(0, 7), (1, 1), (3, 85), (1, 256), (257, 5)] {
            check(&gpu, rows, cols);
        }
    }

    #[test]
    fn more_groups_than_a_dimension_has_and_small_bindings() {
        let Some(gpu) = gpu_with(|options| options.max_groups = Some(7)) else { return };
        check(&gpu, 70, 101);
        let Some(gpu) = gpu_with(|options| options.max_binding = Some(1 << 15)) else { return };
        check(&gpu, 301, 77);
    }

    #[test]
    fn a_matrix_without_its_memory_is_refused() {
        let Some(gpu) = gpu() else { return };
        let (x, _) = random_mat(&gpu, 1, 3, 5);
        let short = Mat { range: x.range.slice(0, 56), ..x };
        let result = Scale::new(&gpu).unwrap().record(&mut gpu.commands("scale"), 2.0, &short);
        assert!(matches!(result, Err(OpError::Shape { operation: "scale", .. })), "{result:?}");
    }
}

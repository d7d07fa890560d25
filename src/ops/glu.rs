//! The gated activations of the MLP (Shazeer 2020, "GLU Variants Improve Transformer"): SwiGLU, h =
//! silu(gate) * up, and GEGLU, h = gelu(gate) * up, with gelu's approximation by tanh (Hendrycks
//! and Gimpel 2016, "Gaussian Error Linear Units").
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::pieces::{ROWS, pieces};
use super::{Mat, OpError};
use crate::arch::family::Activation;
use crate::gpu::{Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// Threads per workgroup, one element per thread.
const WORKGROUP: u64 = 256;

/// h = f(gate) * up, where f(x) = x * sigmoid(z(x)). For silu, z(x) = x. For gelu by tanh, z(x) = 2
/// sqrt(2 / pi) (x + 0.044715 x^3), because (1 + tanh(u)) / 2 = sigmoid(2 u).
#[derive(Debug, Clone)]
pub struct Glu {
    gpu: Gpu,
    forward: Kernel,
    backward: Kernel,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    count: u32,
    pad: [u32; 3],
}

impl Glu {
    /// Compiles the kernels for `gpu`.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::KernelLimit`].
    pub fn new(gpu: &Gpu, activation: Activation) -> Result<Self, GpuError> {
        let source = concat!(include_str!("../../shaders/glu_function.wgsl"), include_str!("../../shaders/glu.wgsl"));
        // SAFETY: `dispatch` binds as many floats everywhere as it passes in `count`; there are no
        // loops and no workgroup memory.
        let shader = unsafe { Shader::trusted("glu", source) };
        let gelu = match activation {
            Activation::Silu => 0.0,
            Activation::GeluTanh => 1.0,
        };
        let kernel = |entry| gpu.kernel(&KernelSpec { shader: shader.clone(), entry, constants: vec![("GELU", gelu)] });
        Ok(Self { gpu: gpu.clone(), forward: kernel("forward")?, backward: kernel("backward")? })
    }

    /// Records h = f(gate) * up; all three are [tokens, intermediate]. `h` must be in another
    /// buffer than the inputs.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn forward(&self, commands: &mut Commands, gate: &Mat, up: &Mat, h: &Mat) -> Result<(), OpError> {
        // `h` is binding 3; binding 2 is not used.
        self.dispatch(commands, &self.forward, [gate, up, h, h], 12)
    }

    /// Records the gradients, in place: `gate` becomes d_gate = dh * up * s * (1 + gate * (1 - s) *
    /// z'(gate)) with s = sigmoid(z(gate)), and `up` becomes d_up = dh * f(gate). All three are
    /// [tokens, intermediate]. `dh` must be in another buffer.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn backward(&self, commands: &mut Commands, gate: &Mat, up: &Mat, dh: &Mat) -> Result<(), OpError> {
        self.dispatch(commands, &self.backward, [gate, up, dh, dh], 20)
    }

    /// `moved` is the number of bytes read and written per element.
    fn dispatch(&self, commands: &mut Commands, kernel: &Kernel, mats: [&Mat; 4], moved: u64) -> Result<(), OpError> {
        let [first, ..] = mats;
        mats.iter().try_for_each(|mat| mat.check("GLU", first.rows, first.cols))?;
        for piece in pieces(&self.gpu, first.elements(), 4, ROWS)? {
            let params = Params { count: piece.count, pad: [0; 3] };
            let bindings = mats.map(|mat| piece.of(&mat.range, 4));
            let groups = self.gpu.grid(u64::from(piece.count).div_ceil(WORKGROUP));
            commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), groups, moved * u64::from(piece.count));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{
        assert_close, assert_gradient, assert_untouched, gpu, gpu_with, mat, narrow, poisoned, random, random_mat, wide,
    };

    fn sigmoid(x: f64) -> f64 {
        1.0 / (1.0 + (-x).exp())
    }

    const BOTH: [Activation; 2] = [Activation::Silu, Activation::GeluTanh];

    /// The activation and its derivative. That of gelu is not by way of the sigmoid.
    fn function(of: Activation, x: f64) -> [f64; 2] {
        match of {
            Activation::Silu => {
                let s = sigmoid(x);
                [x * s, s * (1.0 + x * (1.0 - s))]
            }
            Activation::GeluTanh => {
                let root = (2.0 / std::f64::consts::PI).sqrt();
                let tanh = (root * (x + 0.044_715 * x.powi(3))).tanh();
                // Where tanh is 1, the other factor may be infinite.
                let slope = if tanh.abs() == 1.0 { 0.0 } else { root * (1.0 + 3.0 * 0.044_715 * x * x) };
                [0.5 * x * (1.0 + tanh), 0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope]
            }
        }
    }

    fn reference(of: Activation, gate: &[f64], up: &[f64]) -> Vec<f64> {
        gate.iter().zip(up).map(|(&x, &up)| function(of, x)[0] * up).collect()
    }

    /// Gradients of gate and of up.
    fn reference_backward(of: Activation, gate: &[f64], up: &[f64], dh: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let one = |((&x, &up), &dh): ((&f64, &f64), &f64)| {
            let [value, slope] = function(of, x);
            (dh * up * slope, dh * value)
        };
        gate.iter().zip(up).zip(dh).map(one).unzip()
    }

    /// Runs both directions. `spread` scales the range of the gates.
    fn check(gpu: &Gpu, rows: u32, cols: u32, spread: f32) {
        BOTH.into_iter().for_each(|activation| check_of(activation, gpu, rows, cols, spread));
    }

    fn check_of(activation: Activation, gpu: &Gpu, rows: u32, cols: u32, spread: f32) {
        let glu = Glu::new(gpu, activation).unwrap();
        let (_, mut gates) = random_mat(gpu, 1, rows, cols);
        gates.iter_mut().for_each(|x| *x *= spread);
        let gate = mat(gpu, rows, cols, &gates);
        let ((up, ups), (dh, dhs)) = (random_mat(gpu, 2, rows, cols), random_mat(gpu, 3, rows, cols));
        let h = poisoned(gpu, rows, cols);
        let mut commands = gpu.commands("glu");
        glu.forward(&mut commands, &gate, &up, &h).unwrap();
        glu.backward(&mut commands, &gate, &up, &dh).unwrap();
        commands.submit().unwrap();
        [&h, &gate, &up].into_iter().for_each(|mat| assert_untouched(gpu, mat));
        let (gates, ups, dhs) = (wide(&gates), wide(&ups), wide(&dhs));
        let (d_gate, d_up) = reference_backward(activation, &gates, &ups, &dhs);
        assert_close("h", &h.read(gpu).unwrap(), &narrow(&reference(activation, &gates, &ups)), 1e-6);
        assert_close("d_gate", &gate.read(gpu).unwrap(), &narrow(&d_gate), 1e-6);
        assert_close("d_up", &up.read(gpu).unwrap(), &narrow(&d_up), 1e-6);
    }

    #[test]
    fn forward_and_backward() {
        let Some(gpu) = gpu() else { return };
        for (rows, cols) in [(1, 1), (7, 65), (3, 1000), (70_000, 3)] {
            check(&gpu, rows, cols, 8.0);
        }
    }

    #[test]
    fn large_gates_neither_overflow_nor_vanish() {
        let Some(gpu) = gpu() else { return };
        check(&gpu, 7, 65, 1e4);
        check(&gpu, 7, 65, 1e-4);
        check(&gpu, 7, 65, 1e30);
    }

    #[test]
    fn pieces_that_can_be_bound() {
        let Some(gpu) = gpu_with(|options| options.max_binding = Some(2048)) else { return };
        check(&gpu, 77, 101, 8.0);
    }

    #[test]
    fn more_groups_than_a_dimension_has() {
        let Some(gpu) = gpu_with(|options| options.max_groups = Some(7)) else { return };
        check(&gpu, 77, 101, 8.0);
    }

    #[test]
    fn the_reference_is_the_gradient() {
        let [gate, up, dh] = [1, 2, 3].map(|seed| wide(&random(seed, 20)));
        let loss = |h: Vec<f64>| h.iter().zip(&dh).map(|(h, dh)| h * dh).sum();
        for of in BOTH {
            let (d_gate, d_up) = reference_backward(of, &gate, &up, &dh);
            assert_gradient("d_gate", &gate, &d_gate, 1e-6, |gate| loss(reference(of, gate, &up)));
            assert_gradient("d_up", &up, &d_up, 1e-6, |up| loss(reference(of, &gate, up)));
        }
    }
}

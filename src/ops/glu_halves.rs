//! Gated activations whose inputs are stored in f16: see [`Halves`] and [`Glu`].
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use super::halves::Params;
use super::pieces::{ROWS, pieces};
use super::{Glu, Halves, Mat, OpError};
use crate::arch::family::Activation;
use crate::gpu::{Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// Computes h = f(gate) * up and stores gate and up in one pass over them, and computes h and the
/// gradients from what is stored.
#[derive(Debug, Clone)]
pub struct StoredGlu {
    gpu: Gpu,
    forward: Kernel,
    again: Kernel,
    backward: Kernel,
    /// For columns that are not in groups of eight, one after the other.
    halves: Halves,
    glu: Glu,
}

impl StoredGlu {
    /// Compiles the kernels for `gpu`.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::KernelLimit`].
    pub fn new(gpu: &Gpu, activation: Activation, halves: &Halves, glu: &Glu) -> Result<Self, GpuError> {
        let source = concat!(
            include_str!("../../shaders/panels.wgsl"),
            include_str!("../../shaders/glu_function.wgsl"),
            include_str!("../../shaders/glu_fours.wgsl"),
            include_str!("../../shaders/glu_halves.wgsl")
        );
        // SAFETY: `dispatch` binds all rows of all matrices, which have groups of eight columns;
        // threads of other rows touch none. Loops end at `cols` or halve. Barriers separate the
        // writes and the reads of workgroup memory.
        let shader = unsafe { Shader::trusted("glu_halves", source) };
        let constants = vec![("GELU", f64::from(u8::from(activation == Activation::GeluTanh)))];
        let kernel = |entry| gpu.kernel(&KernelSpec { shader: shader.clone(), entry, constants: constants.clone() });
        Ok(Self {
            gpu: gpu.clone(),
            forward: kernel("forward_keep")?,
            again: kernel("forward_stored")?,
            backward: kernel("backward_stored")?,
            halves: halves.clone(),
            glu: glu.clone(),
        })
    }

    /// Records h = f(gate) * up, and stores `gate` and `up` as [`Halves::keep`] does. No two of
    /// them share a buffer.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn forward(&self, commands: &mut Commands, inputs: [&Mat; 2], stored: [&Mat; 2], h: &Mat) -> Result<(), OpError> {
        if !h.cols.is_multiple_of(8) {
            let [gate, up] = inputs;
            self.halves.keep(commands, gate, stored[0])?;
            self.halves.keep(commands, up, stored[1])?;
            return self.glu.forward(commands, gate, up, h);
        }
        self.dispatch(commands, &self.forward, inputs, stored, h, 16)
    }

    /// Records h = f(gate) * up of what [`StoredGlu::forward`] stored. `scratch` has the size of
    /// gate and up, and may be written.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn again(&self, commands: &mut Commands, stored: [&Mat; 2], scratch: [&Mat; 2], h: &Mat) -> Result<(), OpError> {
        if !h.cols.is_multiple_of(8) {
            self.load(commands, stored, scratch)?;
            return self.glu.forward(commands, scratch[0], scratch[1], h);
        }
        self.dispatch(commands, &self.again, scratch, stored, h, 8)
    }

    /// Records the gradients of gate and up, to `outputs`, as [`Glu::backward`] computes them, from
    /// what [`StoredGlu::forward`] stored.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn backward(&self, commands: &mut Commands, stored: [&Mat; 2], dh: &Mat, outputs: [&Mat; 2]) -> Result<(), OpError> {
        if !dh.cols.is_multiple_of(8) {
            self.load(commands, stored, outputs)?;
            return self.glu.backward(commands, outputs[0], outputs[1], dh);
        }
        self.dispatch(commands, &self.backward, outputs, stored, dh, 16)
    }

    fn load(&self, commands: &mut Commands, stored: [&Mat; 2], to: [&Mat; 2]) -> Result<(), OpError> {
        self.halves.load(commands, stored[0], to[0])?;
        self.halves.load(commands, stored[1], to[1])
    }

    /// `moved` is the number of bytes read and written per element of `h`.
    fn dispatch(
        &self,
        commands: &mut Commands,
        kernel: &Kernel,
        [gate, up]: [&Mat; 2],
        stored: [&Mat; 2],
        h: &Mat,
        moved: u64,
    ) -> Result<(), OpError> {
        let (cols, words) = (h.cols, Halves::words(h.cols));
        [gate, up, h].into_iter().try_for_each(|mat| mat.check("GLU", h.rows, cols))?;
        stored.into_iter().try_for_each(|mat| mat.check("GLU", h.rows, words))?;
        if cols == 0 {
            return Ok(());
        }
        let (row_bytes, stored_bytes) = (4 * u64::from(cols), 4 * u64::from(words));
        for piece in pieces(&self.gpu, h.rows.into(), row_bytes.max(stored_bytes), ROWS)? {
            let params = Params { rows: piece.count, cols, fours: words / 4, pad: 0 };
            let [gate, up, h] = [gate, up, h].map(|mat| piece.of(&mat.range, row_bytes));
            let [stored_gate, stored_up] = stored.map(|mat| piece.of(&mat.range, stored_bytes));
            let bindings = [gate, up, stored_gate, stored_up, h];
            let groups = self.gpu.grid(piece.count.into());
            let bytes = moved * u64::from(piece.count) * u64::from(cols);
            commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), groups, bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_close, assert_untouched, gpu, gpu_with, poisoned, random, random_mat};

    /// Against the operations that store, load and compute.
    fn check(gpu: &Gpu, activation: Activation, rows: u32, cols: u32) {
        let (halves, glu) = (Halves::new(gpu).unwrap(), Glu::new(gpu, activation).unwrap());
        let both = StoredGlu::new(gpu, activation, &halves, &glu).unwrap();
        let [(gate, _), (up, _), (dh, _)] = [1, 2, 3].map(|seed| random_mat(gpu, seed, rows, cols));
        let new = || poisoned(gpu, rows, cols);
        let new_stored = || poisoned(gpu, rows, Halves::words(cols));
        let (stored, expected_stored) = ([new_stored(), new_stored()], [new_stored(), new_stored()]);
        let [h, expected_h, again, expected_again, d_gate, d_up, expected_d_gate, expected_d_up] = [(); 8].map(|()| new());
        let scratch = [new(), new()];
        let mut commands = gpu.commands("stored");
        both.forward(&mut commands, [&gate, &up], stored.each_ref(), &h).unwrap();
        both.again(&mut commands, stored.each_ref(), scratch.each_ref(), &again).unwrap();
        both.backward(&mut commands, stored.each_ref(), &dh, [&d_gate, &d_up]).unwrap();
        glu.forward(&mut commands, &gate, &up, &expected_h).unwrap();
        halves.keep(&mut commands, &gate, &expected_stored[0]).unwrap();
        halves.keep(&mut commands, &up, &expected_stored[1]).unwrap();
        halves.load(&mut commands, &expected_stored[0], &expected_d_gate).unwrap();
        halves.load(&mut commands, &expected_stored[1], &expected_d_up).unwrap();
        glu.forward(&mut commands, &expected_d_gate, &expected_d_up, &expected_again).unwrap();
        glu.backward(&mut commands, &expected_d_gate, &expected_d_up, &dh).unwrap();
        commands.submit().unwrap();
        stored.iter().chain([&h, &again, &d_gate, &d_up]).for_each(|mat| assert_untouched(gpu, mat));
        let read = |mat: &Mat| mat.read(gpu).unwrap();
        for (found, expected) in stored.iter().zip(&expected_stored) {
            let bits = |mat: &Mat| read(mat).into_iter().map(f32::to_bits).collect::<Vec<_>>();
            assert_eq!(bits(found), bits(expected), "{rows} x {cols}");
        }
        let pairs = [(&h, &expected_h), (&again, &expected_again), (&d_gate, &expected_d_gate), (&d_up, &expected_d_up)];
        for (found, expected) in pairs {
            assert_close(&format!("{rows} x {cols}"), &read(found), &read(expected), 1e-6);
        }
    }

    #[test]
    fn stored_inputs_give_what_loaded_ones_give() {
        let Some(gpu) = gpu() else { return };
        for activation in [Activation::Silu, Activation::GeluTanh] {
            for (rows, cols) in [(1, 8), (7, 65), (13, 1000), (3, 4104), (300, 16)] {
                check(&gpu, activation, rows, cols);
            }
        }
    }

    #[test]
    fn pieces_that_can_be_bound_and_many_groups() {
        let Some(gpu) = gpu_with(|options| options.max_binding = Some(1 << 15)) else { return };
        check(&gpu, Activation::Silu, 300, 104);
        let Some(gpu) = gpu_with(|options| options.max_groups = Some(7)) else { return };
        check(&gpu, Activation::Silu, 40, 40);
    }

    #[test]
    fn the_shapes_must_match() {
        let Some(gpu) = gpu() else { return };
        let (halves, glu) = (Halves::new(&gpu).unwrap(), Glu::new(&gpu, Activation::Silu).unwrap());
        let both = StoredGlu::new(&gpu, Activation::Silu, &halves, &glu).unwrap();
        let [a, b, h] = [(); 3].map(|()| crate::ops::testing::mat(&gpu, 3, 8, &random(1, 24)));
        let refused = both.forward(&mut gpu.commands("stored"), [&a, &b], [&a, &b.window(0, 2)], &h);
        assert!(matches!(refused, Err(OpError::Shape { operation: "GLU", .. })), "{refused:?}");
    }
}

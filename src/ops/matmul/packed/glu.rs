//! Gated activations whose inputs are stored in f16, packed.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::super::mixed::Place;
use super::super::{Matmul, Packed, PackedMemory};
use super::{GLU, bindings, groups_of_rows, groups_of_tiles};
use crate::arch::family::Activation;
use crate::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};
use crate::ops::{Halves, Mat, OpError};

/// As `StoredGlu`, and the packing of its results. What it stores has the exponents of h, too, so
/// it is read by this operation alone.
#[derive(Debug, Clone)]
pub struct PackedGlu {
    pub(super) gpu: Gpu,
    pub(super) activation: Activation,
    measure: Kernel,
    keep: Kernel,
    again: Kernel,
    measure_gradients: Kernel,
    gradients: Kernel,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    rows: u32,
    cols: u32,
    pairs: u32,
    padded_rows: u32,
    padded_cols: u32,
    pad: [u32; 3],
}

const ENTRIES: [&str; 5] = ["measure", "keep", "again", "measure_gradients", "gradients"];

impl PackedGlu {
    /// The kernels, before they are compared with the CPU.
    pub(super) fn untried(gpu: &Gpu, activation: Activation, specs: &[KernelSpec; 5]) -> Result<Self, GpuError> {
        let [measure, keep, again, measure_gradients, gradients] = specs.each_ref().map(|spec| gpu.kernel(spec));
        Ok(Self {
            gpu: gpu.clone(),
            activation,
            measure: measure?,
            keep: keep?,
            again: again?,
            measure_gradients: measure_gradients?,
            gradients: gradients?,
        })
    }

    pub(super) fn specs(activation: Activation) -> [KernelSpec; 5] {
        // SAFETY: `dispatch` binds all rows of all matrices, which have groups of eight columns,
        // and panels with their padding. Rows and columns past the last one are neither read nor
        // stored. Tiles lie in the panels, whose sides are multiples of their side. Barriers
        // separate the writes and the reads of workgroup memory.
        let shader = unsafe { Shader::trusted("glu_panels", GLU) };
        let constants = vec![("GELU", f64::from(u8::from(activation == Activation::GeluTanh)))];
        ENTRIES.map(|entry| KernelSpec { shader: shader.clone(), entry, constants: constants.clone() })
    }

    /// Records the storing of gate and up, and h = f(gate) * up as the left operand of products.
    /// `h` is a matrix of its shape; its elements are not written. `None`, with nothing recorded,
    /// if such a matrix is not packed.
    ///
    /// # Errors
    /// [`OpError::Shape`], [`OpError::Gpu`].
    pub fn forward(
        &self,
        commands: &mut Commands,
        matmul: &Matmul,
        [gate, up]: [&Mat; 2],
        stored: [&Mat; 2],
        h: &Mat,
    ) -> Result<Option<Packed>, OpError> {
        self.check(h, &[gate, up], stored)?;
        let Some((packed, memory)) = self.operand(matmul, h, Place::Left)? else { return Ok(None) };
        self.dispatch_forward(commands, [gate, up], stored, &memory);
        Ok(Some(packed))
    }

    /// Records h of what [`PackedGlu::forward`] stored, as inputs for the gradients of adapters,
    /// with the powers of two of that time. Otherwise as that.
    ///
    /// # Errors
    /// [`OpError::Shape`], [`OpError::Gpu`].
    pub fn again(
        &self,
        commands: &mut Commands,
        matmul: &Matmul,
        stored: [&Mat; 2],
        h: &Mat,
    ) -> Result<Option<Packed>, OpError> {
        self.check(h, &[], stored)?;
        let Some((packed, memory)) = self.operand(matmul, h, Place::Inputs)? else { return Ok(None) };
        self.dispatch_again(commands, stored, h.cols, &memory);
        Ok(Some(packed))
    }

    /// Records the gradients of gate and up from what [`PackedGlu::forward`] stored and the
    /// gradient of h. They are left operands in the memory of `outputs`. `None` also if they do not
    /// fit.
    ///
    /// # Errors
    /// [`OpError::Shape`], [`OpError::Gpu`].
    pub fn backward(
        &self,
        commands: &mut Commands,
        matmul: &Matmul,
        stored: [&Mat; 2],
        dh: &Mat,
        outputs: [&Mat; 2],
    ) -> Result<Option<[Packed; 2]>, OpError> {
        self.check(dh, &outputs, stored)?;
        if !dh.cols.is_multiple_of(8) {
            return Ok(None);
        }
        let [Some((gate, of_gate)), Some((up, of_up))] = outputs.map(|mat| matmul.operand_in(mat)) else { return Ok(None) };
        self.dispatch_backward(commands, stored, dh, [&of_gate, &of_up]);
        Ok(Some([gate, up]))
    }

    fn check(&self, h: &Mat, mats: &[&Mat], stored: [&Mat; 2]) -> Result<(), OpError> {
        mats.iter().chain([&h]).try_for_each(|mat| mat.check("GLU", h.rows, h.cols))?;
        stored.into_iter().try_for_each(|mat| mat.check("GLU", h.rows, Halves::words(h.cols)))
    }

    fn operand(&self, matmul: &Matmul, h: &Mat, place: Place) -> Result<Option<(Packed, PackedMemory)>, OpError> {
        if h.cols.is_multiple_of(8) { matmul.operand(h, place) } else { Ok(None) }
    }

    pub(super) fn dispatch_forward(
        &self,
        commands: &mut Commands,
        [gate, up]: [&Mat; 2],
        [stored_gate, stored_up]: [&Mat; 2],
        memory: &PackedMemory,
    ) {
        let [exponents, out] = bindings(memory);
        let (read, written) = (8 * gate.elements(), out.size + 4 * gate.elements());
        let bindings = [gate, up, stored_gate, stored_up, gate].map(|mat| mat.range.clone());
        let bindings = [&bindings[..], &[exponents, out]].concat();
        let shape = [gate.rows, gate.cols];
        self.dispatch(commands, &self.measure, &bindings, shape, memory, (groups_of_rows(&self.gpu, memory), read));
        self.dispatch(commands, &self.keep, &bindings, shape, memory, (groups_of_tiles(&self.gpu, memory), read + written));
    }

    pub(super) fn dispatch_again(&self, commands: &mut Commands, [gate, up]: [&Mat; 2], cols: u32, memory: &PackedMemory) {
        let [exponents, out] = bindings(memory);
        let bytes = gate.range.size + up.range.size + out.size;
        let bindings = [gate, up, gate, up, gate].map(|mat| mat.range.clone());
        let bindings = [&bindings[..], &[exponents, out]].concat();
        self.dispatch(
            commands,
            &self.again,
            &bindings,
            [gate.rows, cols],
            memory,
            (groups_of_tiles(&self.gpu, memory), bytes),
        );
    }

    pub(super) fn dispatch_backward(
        &self,
        commands: &mut Commands,
        [gate, up]: [&Mat; 2],
        dh: &Mat,
        memory: [&PackedMemory; 2],
    ) {
        let (read, written) =
            (gate.range.size + up.range.size + 4 * dh.elements(), memory[0].elements.size + memory[1].elements.size);
        let inputs = [gate, up, gate, up, dh].map(|mat| mat.range.clone());
        let bindings = [&inputs[..], &memory.map(bindings).concat()].concat();
        let (shape, [memory, _]) = ([dh.rows, dh.cols], memory);
        self.dispatch(
            commands,
            &self.measure_gradients,
            &bindings,
            shape,
            memory,
            (groups_of_rows(&self.gpu, memory), read),
        );
        self.dispatch(
            commands,
            &self.gradients,
            &bindings,
            shape,
            memory,
            (groups_of_tiles(&self.gpu, memory), read + written),
        );
    }

    /// `bindings` are those of the shader, without the last ones if the kernel does not use them.
    fn dispatch(
        &self,
        commands: &mut Commands,
        kernel: &Kernel,
        bindings: &[BufferRange],
        [rows, cols]: [u32; 2],
        memory: &PackedMemory,
        (groups, bytes): ([u32; 3], u64),
    ) {
        let &PackedMemory { padded_rows, padded_cols, .. } = memory;
        let params = Params { rows, cols, pairs: Halves::words(cols) / 2, padded_rows, padded_cols, pad: [0; 3] };
        // Those that no kernel of one operand uses.
        let unused = bindings.last().into_iter().cycle().take(9 - bindings.len().min(9)).cloned();
        let bindings: Vec<BufferRange> = bindings.iter().cloned().chain(unused).collect();
        commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), groups, bytes);
    }
}

//! The inputs of projections, as operands of products. Where nothing needs them in float32, the
//! norm or the activation writes the packed operand; else it writes a matrix, which is then packed.

use super::{Layer, Norm, Window};
use crate::gpu::Commands;
use crate::model::linear::Linear;
use crate::model::pass::Pass;
use crate::model::workspace::Activations;
use crate::ops::OpError;
use crate::ops::matmul::{Packed, Place};

impl Layer<'_> {
    /// Computes a norm, as the operand of the projections after it. It is in `normed`, too, unless
    /// they need only the packed form.
    pub(super) fn norm(
        &self,
        commands: &mut Commands,
        window: &Window<'_>,
        norm: Norm,
        place: Place,
    ) -> Result<Packed, OpError> {
        let (Pass { kernels, model, .. }, normed) = (self.pass, &window.normed);
        let (x, gamma) = match norm {
            Norm::Input => (window.x, &self.constants.input_norm),
            Norm::Middle => (&window.activations.middle, &self.constants.post_attention_norm),
        };
        let linears: &[_] = if norm == Norm::Input { &[&self.q, &self.k, &self.v] } else { &[&self.gate, &self.up] };
        let epsilon = model.rms_norm_eps as f32;
        if let Some(halves) = &kernels.halves
            && self.only_packed(linears, window)?
            && let Some(packed) = halves.packed_norm.forward(commands, &kernels.matmul, x, gamma, epsilon, normed, place)?
        {
            return Ok(packed);
        }
        kernels.norm.forward(commands, x, gamma, epsilon, normed)?;
        kernels.matmul.pack_to(commands, normed, place)
    }

    /// What attention computed, as the operand of o_proj.
    pub(super) fn attended(&self, commands: &mut Commands, window: &Window<'_>, place: Place) -> Result<Packed, OpError> {
        let (matmul, attended) = (&self.pass.kernels.matmul, &window.activations.attended);
        if let Some((halves, stored)) = self.halves_of(window)
            && self.only_packed(&[&self.o], window)?
            && let Some(packed) = halves.packed_mats.pack(commands, matmul, &stored.attended, attended, place)?
        {
            return Ok(packed);
        }
        matmul.pack_to(commands, attended, place)
    }

    /// The input of gate_proj and up_proj, for their gradients.
    pub(super) fn norm_middle_again(&self, commands: &mut Commands, window: &Window<'_>) -> Result<Packed, OpError> {
        // The middle of the layer may be rounded since, and `normed` overwritten.
        let has_changed = self.kept || self.halves().is_some() || self.constants.feed_forward_output_norm.is_some();
        match has_changed {
            true => self.norm(commands, window, Norm::Middle, Place::Inputs),
            false => self.pass.kernels.matmul.pack_to(commands, &window.normed, Place::Inputs),
        }
    }

    /// Computes `activated` from `gate` and `up`, as the operand of down_proj, and stores these.
    pub(super) fn activate(&self, commands: &mut Commands, window: &Window<'_>) -> Result<Packed, OpError> {
        let (kernels, activated) = (self.pass.kernels, &window.activated);
        let Activations { gate, up, .. } = window.activations.as_ref();
        match self.halves_of(window) {
            None => kernels.glu.forward(commands, gate, up, activated)?,
            Some((halves, stored)) => {
                let stored = [&stored.gate, &stored.up];
                if self.only_packed(&[&self.down], window)?
                    && let Some(packed) =
                        halves.packed_glu.forward(commands, &kernels.matmul, [gate, up], stored, activated)?
                {
                    return Ok(packed);
                }
                halves.glu.forward(commands, [gate, up], stored, activated)?;
            }
        }
        kernels.matmul.pack(commands, activated)
    }

    /// The input of down_proj, for its gradients: from what is kept or stored of `gate` and `up`,
    /// if it is.
    pub(super) fn activate_again(&self, commands: &mut Commands, window: &Window<'_>) -> Result<Packed, OpError> {
        let (kernels, activated) = (self.pass.kernels, &window.activated);
        let Activations { gate, up, .. } = window.activations.as_ref();
        match self.halves_of(window) {
            None if self.kept => kernels.glu.forward(commands, gate, up, activated)?,
            None => {}
            Some((halves, stored)) => {
                let stored = [&stored.gate, &stored.up];
                if self.only_packed(&[&self.down], window)?
                    && let Some(packed) = halves.packed_glu.again(commands, &kernels.matmul, stored, activated)?
                {
                    return Ok(packed);
                }
                halves.glu.again(commands, stored, [gate, up], activated)?;
            }
        }
        kernels.matmul.pack_to(commands, activated, Place::Inputs)
    }

    /// The gradients of `gate` and `up`, in their place, from that of `activated`: packed, or
    /// matrices if this returns `None`.
    pub(super) fn activation_backward(
        &self,
        commands: &mut Commands,
        window: &Window<'_>,
    ) -> Result<Option<[Packed; 2]>, OpError> {
        let (kernels, activated) = (self.pass.kernels, &window.activated);
        let Activations { gate, up, .. } = window.activations.as_ref();
        let Some((halves, stored)) = self.halves_of(window) else {
            return kernels.glu.backward(commands, gate, up, activated).map(|()| None);
        };
        let stored = [&stored.gate, &stored.up];
        if self.only_packed(&[&self.gate, &self.up], window)?
            && let Some(packed) = halves.packed_glu.backward(commands, &kernels.matmul, stored, activated, [gate, up])?
        {
            return Ok(Some(packed));
        }
        halves.glu.backward(commands, stored, activated, [gate, up]).map(|()| None)
    }

    /// Whether the products of these projections need their operands only packed.
    fn only_packed(&self, linears: &[&Linear<'_>], window: &Window<'_>) -> Result<bool, OpError> {
        let rows = window.x.rows;
        linears.iter().try_fold(true, |all, linear| Ok(all && linear.only_packed(self.pass.kernels, rows)?))
    }
}

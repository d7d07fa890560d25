//! The outputs of attention and of the feed-forward network: added to the residual stream, in some
//! models after a norm. The norm needs no memory of its own: between the last product that reads
//! `normed` and the next norm that writes it, `normed` holds the output. For the gradients, the
//! output is computed again.

use super::{Layer, Window};
use crate::gpu::Commands;
use crate::model::linear::Linear;
use crate::model::pass::{Pass, PassInputs};
use crate::ops::matmul::{Packed, Place};
use crate::ops::{Mat, OpError};

impl Layer<'_> {
    /// Records `middle` = the input of the layer + the output of attention.
    pub(super) fn add_attention(&self, commands: &mut Commands, window: &Window<'_>) -> Result<(), OpError> {
        let o = self.o.in_window(window.number, &window.activations);
        let attended = &self.attended(commands, window, Place::Left)?;
        let middle = &window.activations.middle;
        let mats = [&window.normed, window.x, middle];
        self.add_output(commands, &o, self.constants.attention_output_norm.as_ref(), attended, mats)
    }

    /// Records `out` = `middle` + the output of the feed-forward network.
    pub(super) fn add_feed_forward(
        &self,
        commands: &mut Commands,
        window: &Window<'_>,
        activated: &Packed,
        out: &Mat,
    ) -> Result<(), OpError> {
        let down = self.down.in_window(window.number, &window.activations);
        let mats = [&window.normed, &window.activations.middle, out];
        self.add_output(commands, &down, self.constants.feed_forward_output_norm.as_ref(), activated, mats)
    }

    /// Records `out` = `addend` + the projection of `x`, after its norm if there is one. The
    /// projection is then in `scratch`.
    fn add_output(
        &self,
        commands: &mut Commands,
        linear: &Linear<'_>,
        norm: Option<&Mat>,
        x: &Packed,
        [scratch, addend, out]: [&Mat; 3],
    ) -> Result<(), OpError> {
        let Pass { kernels, model, inputs: PassInputs { work, .. }, .. } = self.pass;
        let Some(gamma) = norm else { return linear.forward_plus(kernels, commands, work, x, addend, out) };
        linear.forward(kernels, commands, work, x, false, scratch)?;
        kernels.copy.record(commands, &addend.range, &out.range)?;
        kernels.norm.forward_add(commands, scratch, gamma, model.rms_norm_eps as f32, out)
    }

    /// Records `dx`, the gradient of the projection of `x` before its norm, for `dy`, that after
    /// the norm. The projection is computed again, to `scratch`.
    pub(super) fn output_backward(
        &self,
        commands: &mut Commands,
        linear: &Linear<'_>,
        gamma: &Mat,
        x: &Packed,
        [scratch, dy, dx]: [&Mat; 3],
    ) -> Result<(), OpError> {
        let Pass { kernels, model, inputs: PassInputs { work, .. }, .. } = self.pass;
        linear.forward(kernels, commands, work, x, false, scratch)?;
        kernels.norm.backward(commands, scratch, gamma, model.rms_norm_eps as f32, dy, dx, false)
    }
}

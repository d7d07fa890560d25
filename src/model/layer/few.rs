//! A layer for few new tokens after a KV cache, with fewer dispatches: the norm, q, k and v are one
//! product, norms per head, rotation and cache one dispatch (of one token: part of attention), and
//! the norm, gate, up and activation one product. Layers with an adapter or a bias there take the
//! dispatches of every pass.

use super::{Layer, Window};
use crate::arch::family::Activation;
use crate::gpu::Commands;
use crate::model::kv_cache::Unsplit;
use crate::model::linear::Linear;
use crate::model::pass::{Pass, PassInputs};
use crate::ops::OpError;
use crate::ops::matmul::{Join, Wide};

/// Whether the output of a projection is the product with its weight alone.
fn is_plain(linear: &Linear<'_>) -> bool {
    linear.lora.is_none() && linear.bias.is_none()
}

impl Layer<'_> {
    /// Computes `attended` from the input of the layer. `false` if this layer or pass does not
    /// permit it.
    pub(super) fn attend_few(&self, commands: &mut Commands, window: &Window<'_>) -> Result<bool, OpError> {
        let x = window.x;
        let Pass { kernels, model, inputs: PassInputs { past, .. }, .. } = self.pass;
        let Some(past) = past.filter(|past| past.fits(x.rows)) else { return Ok(false) };
        if ![&self.q, &self.k, &self.v].into_iter().all(is_plain) {
            return Ok(false);
        }
        let epsilon = model.rms_norm_eps as f32;
        let weights = [&self.q.weight, &self.k.weight, &self.v.weight];
        let wide = Wide { norm: Some((&self.constants.input_norm, epsilon)), ..Wide::of(&weights) };
        if !kernels.matmul.wide(commands, x, &wide, &past.joined(x.rows))? {
            return Ok(false);
        }
        let gammas = self.constants.query_norm.as_ref().zip(self.constants.key_norm.as_ref());
        let unsplit = Unsplit {
            norms: gammas.map(|(query, key)| ([query, key], epsilon)),
            angles: self.attention.rotary.then(|| self.pass.angles_after(self.attention, past.tokens)),
        };
        past.attend_joined(
            commands,
            model,
            self.number,
            unsplit,
            [&window.activations.queries, &window.activations.attended],
        )?;
        Ok(true)
    }

    /// Computes `activated` of a window from its `middle`. `false` if this layer or pass does not
    /// permit it.
    pub(super) fn activate_few(&self, commands: &mut Commands, window: &Window<'_>) -> Result<bool, OpError> {
        let Pass { kernels, model, inputs: PassInputs { past, .. }, .. } = self.pass;
        if past.is_none() || ![&self.gate, &self.up].into_iter().all(is_plain) {
            return Ok(false);
        }
        // The joined product has no other activation.
        if model.family.activation != Activation::Silu {
            return Ok(false);
        }
        let norm = Some((&self.constants.post_attention_norm, model.rms_norm_eps as f32));
        let weights = [&self.gate.weight, &self.up.weight];
        kernels.matmul.wide(
            commands,
            &window.activations.middle,
            &Wide { join: Join::Gated, norm, ..Wide::of(&weights) },
            &window.activated,
        )
    }
}

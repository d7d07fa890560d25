//! Queries and keys between their projections and attention: the norm of every head, in some
//! models, and the rotation, in most layers.

use super::{Heads, Layer, Window};
use crate::gpu::Commands;
use crate::model::pass::Pass;
use crate::model::workspace::{Activations, Backward};
use crate::ops::{Mat, OpError, Turn};

/// Queries or keys of a window.
#[derive(Debug, Clone, Copy)]
struct Turned<'a> {
    /// What the norm reads, and its weights, if the model has one.
    norm: Option<(&'a Mat, &'a Mat)>,
    /// What attention reads.
    heads: &'a Mat,
    /// Heads of a token.
    count: u32,
}

impl Layer<'_> {
    fn queries<'w>(&'w self, window: &'w Window<'_>) -> Turned<'w> {
        let Activations { raw_queries, queries, .. } = window.activations.as_ref();
        let norm = raw_queries.as_ref().zip(self.constants.query_norm.as_ref());
        Turned { norm, heads: queries, count: self.pass.model.heads }
    }

    fn keys<'w>(&'w self, window: &'w Window<'_>) -> Turned<'w> {
        let Activations { raw_keys, keys, .. } = window.activations.as_ref();
        let norm = raw_keys.as_ref().zip(self.constants.key_norm.as_ref());
        Turned { norm, heads: keys, count: self.pass.model.kv_heads }
    }

    /// Applies the norms of queries and keys, if the model has them, and rotates both, if the layer
    /// does.
    pub(super) fn turn_heads(&self, commands: &mut Commands, window: &Window<'_>, heads: Heads) -> Result<(), OpError> {
        if heads.queries() {
            self.turn(commands, window, self.queries(window))?;
        }
        if heads.keys() {
            self.turn(commands, window, self.keys(window))?;
        }
        Ok(())
    }

    fn turn(&self, commands: &mut Commands, window: &Window<'_>, turned: Turned<'_>) -> Result<(), OpError> {
        let Pass { kernels, model, .. } = self.pass;
        if let (Some((raw, gamma)), None, true) = (turned.norm, self.pass.inputs.past, self.attention.rotary) {
            let turn = self.turn_of(window, gamma, turned.count);
            return kernels.norm_rotary.forward(commands, raw, &turn, turned.heads);
        }
        if let Some((raw, gamma)) = turned.norm {
            kernels.norm.forward(commands, raw, gamma, model.rms_norm_eps as f32, turned.heads)?;
        }
        match self.attention.rotary {
            true => self.rotate(commands, window, turned.heads, turned.count),
            false => Ok(()),
        }
    }

    /// Norm and rotation of queries or keys.
    fn turn_of<'t>(&'t self, window: &Window<'_>, gamma: &'t Mat, heads: u32) -> Turn<'t> {
        let (table, starts) = self.pass.angles(self.attention);
        Turn { heads, gamma, epsilon: self.pass.model.rms_norm_eps as f32, first: window.first, starts, table }
    }

    /// Rotates queries or keys by the positions of their tokens.
    fn rotate(&self, commands: &mut Commands, window: &Window<'_>, x: &Mat, heads: u32) -> Result<(), OpError> {
        let kernels = self.pass.kernels;
        if let Some(past) = self.pass.inputs.past {
            let (angles, first) = self.pass.angles_after(self.attention, past.tokens);
            return kernels.rotary.forward_from(commands, x, heads, first, angles);
        }
        let (angles, starts) = self.pass.angles(self.attention);
        kernels.rotary.forward(commands, x, heads, (window.first, starts), angles)
    }

    /// The gradients of queries and keys before their norms and rotation. With norms, they
    /// overwrite the queries and keys of the window, which are no longer needed.
    pub(super) fn turn_heads_backward(
        &self,
        commands: &mut Commands,
        window: &Window<'_>,
        gradients: &Backward<Mat>,
    ) -> Result<[Mat; 2], OpError> {
        let d_queries = self.turn_backward(commands, window, self.queries(window), window.narrow(&gradients.queries))?;
        let d_keys = self.turn_backward(commands, window, self.keys(window), window.of(&gradients.keys))?;
        Ok([d_queries, d_keys])
    }

    fn turn_backward(
        &self,
        commands: &mut Commands,
        window: &Window<'_>,
        turned: Turned<'_>,
        gradient: Mat,
    ) -> Result<Mat, OpError> {
        let Pass { kernels, model, .. } = self.pass;
        let (angles, starts) = self.pass.angles(self.attention);
        match (turned.norm, self.attention.rotary) {
            (Some((raw, gamma)), true) => {
                let turn = self.turn_of(window, gamma, turned.count);
                kernels.norm_rotary.backward(commands, raw, &turn, &gradient, turned.heads)?;
            }
            (Some((raw, gamma)), false) => {
                let epsilon = model.rms_norm_eps as f32;
                kernels.norm.backward(commands, raw, gamma, epsilon, &gradient, turned.heads, false)?;
            }
            (None, true) => {
                kernels.rotary.backward(commands, &gradient, turned.count, (window.first, starts), angles)?;
            }
            (None, false) => {}
        }
        Ok(if turned.norm.is_some() { turned.heads.clone() } else { gradient })
    }
}

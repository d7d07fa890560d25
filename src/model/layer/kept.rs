//! Activations in f16. In mixed precision, gradients are computed from them. A layer that keeps its
//! activations stores them in the forward pass, and loads them for its gradients. Any other layer
//! stores or rounds them when it computes them again. So both have the same gradients.

use super::{Layer, Window};
use crate::gpu::Commands;
use crate::model::pass::HalfKernels;
use crate::model::workspace::{Activations, HalfActivations};
use crate::ops::{Mat, OpError};

impl Layer<'_> {
    /// The activations in f16 that are written or read, and the kernels for that.
    pub(super) fn halves(&self) -> Option<(&HalfKernels, &HalfActivations<Mat>)> {
        let stored = self.activations.halves.as_ref().filter(|_| self.with_halves);
        self.pass.kernels.halves.as_ref().zip(stored)
    }

    /// Stores the input and the middle of the layer, if it keeps them.
    pub(super) fn keep_streams(&self, commands: &mut Commands, x: &Mat) -> Result<(), OpError> {
        let Some((halves, HalfActivations { streams: Some([input, middle]), .. })) = self.halves() else { return Ok(()) };
        halves.mats.keep(commands, x, input)?;
        halves.mats.keep(commands, &self.activations.middle, middle)
    }

    /// Stores queries, keys and values as their projections write them. Queries and keys are
    /// rounded then, also in the forward pass of other layers: the gradients of attention need its
    /// scores.
    pub(super) fn keep_heads(&self, commands: &mut Commands) -> Result<(), OpError> {
        let Activations { raw_queries, raw_keys, queries, keys, values, halves: stored, .. } = self.activations;
        let of_training = self.pass.inputs.is_training().then_some(stored.as_ref()).flatten();
        let Some((halves, stored)) = self.pass.kernels.halves.as_ref().zip(of_training) else { return Ok(()) };
        let (queries, keys) = (raw_queries.as_ref().unwrap_or(queries), raw_keys.as_ref().unwrap_or(keys));
        if !self.with_halves {
            halves.mats.round(commands, queries)?;
            return halves.mats.round(commands, keys);
        }
        halves.mats.keep_rounded(commands, queries, &stored.queries)?;
        halves.mats.keep_rounded(commands, keys, &stored.keys)?;
        halves.mats.keep(commands, values, &stored.values)
    }

    /// Stores the output of attention.
    pub(super) fn keep_attended(&self, commands: &mut Commands) -> Result<(), OpError> {
        let Some((halves, stored)) = self.halves() else { return Ok(()) };
        halves.mats.keep(commands, &self.activations.attended, &stored.attended)
    }

    /// Computes `activated` from `gate` and `up`, and stores these.
    pub(super) fn activate(&self, commands: &mut Commands, window: &Window) -> Result<(), OpError> {
        let Window { gate, up, activated, .. } = window;
        let Some((halves, stored)) = self.halves() else {
            return self.pass.kernels.glu.forward(commands, gate, up, activated);
        };
        halves.glu.forward(commands, [gate, up], self.in_window(window, stored).each_ref(), activated)
    }

    /// Computes `activated` again from what is kept or stored of `gate` and `up`.
    pub(super) fn activate_again(&self, commands: &mut Commands, window: &Window) -> Result<(), OpError> {
        let Window { gate, up, activated, .. } = window;
        let Some((halves, stored)) = self.halves() else {
            return self.pass.kernels.glu.forward(commands, gate, up, activated);
        };
        halves.glu.again(commands, self.in_window(window, stored).each_ref(), [gate, up], activated)
    }

    /// The gradients of `gate` and `up`, in their place, from that of `activated`.
    pub(super) fn activation_backward(&self, commands: &mut Commands, window: &Window) -> Result<(), OpError> {
        let Window { gate, up, activated, .. } = window;
        let Some((halves, stored)) = self.halves() else {
            return self.pass.kernels.glu.backward(commands, gate, up, activated);
        };
        halves.glu.backward(commands, self.in_window(window, stored).each_ref(), activated, [gate, up])
    }

    /// Loads `middle` of a window, or rounds it.
    pub(super) fn load_middle(&self, commands: &mut Commands, window: &Window) -> Result<(), OpError> {
        let Some((halves, stored)) = self.halves() else { return Ok(()) };
        match &stored.streams {
            Some([_, middle]) => halves.mats.load(commands, &window.of(middle), &window.middle),
            None => halves.mats.round(commands, &window.middle),
        }
    }

    /// Loads the input of the layer to `x`, and everything else that the gradients of the attention
    /// block need.
    pub(super) fn load_attention(&self, commands: &mut Commands, x: &Mat) -> Result<(), OpError> {
        let Some((halves, stored)) = self.halves() else { return Ok(()) };
        let Activations { raw_queries, raw_keys, queries, keys, values, attended, .. } = self.activations;
        let (queries, keys) = (raw_queries.as_ref().unwrap_or(queries), raw_keys.as_ref().unwrap_or(keys));
        match &stored.streams {
            Some([input, _]) => halves.mats.load(commands, input, x)?,
            None => halves.mats.round(commands, x)?,
        }
        let HalfActivations { queries: stored_queries, keys: stored_keys, values: stored_values, .. } = stored;
        let mats = [(stored_queries, queries), (stored_keys, keys), (stored_values, values), (&stored.attended, attended)];
        mats.into_iter().try_for_each(|(stored, mat)| halves.mats.load(commands, stored, mat))?;
        self.norm_heads(commands)?;
        self.rotate_heads(commands)
    }

    /// The stored `gate` and `up` of a window: of all tokens if the layer keeps them.
    fn in_window(&self, window: &Window, stored: &HalfActivations<Mat>) -> [Mat; 2] {
        let rows = window.middle.rows;
        let of_window = |mat: &Mat| if self.kept { window.of(mat) } else { mat.narrow(rows, mat.cols) };
        [of_window(&stored.gate), of_window(&stored.up)]
    }
}

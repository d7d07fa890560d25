//! Activations in f16. In mixed precision, gradients are computed from them. A layer that keeps its
//! activations stores them in the forward pass, and loads them for its gradients. Any other layer
//! stores or rounds them when it computes them again. So both have the same gradients.

use super::{Heads, Layer, Window};
use crate::gpu::Commands;
use crate::model::pass::HalfKernels;
use crate::model::workspace::{Activations, HalfActivations};
use crate::ops::{Mat, OpError};

impl Layer<'_> {
    /// The activations in f16 that are written or read, and the kernels for that.
    pub(super) fn halves(&self) -> Option<(&HalfKernels, &HalfActivations<Mat>)> {
        self.halves_in(self.activations)
    }

    /// As [`Layer::halves`], of a window.
    pub(super) fn halves_of<'w>(&'w self, window: &'w Window<'_>) -> Option<(&'w HalfKernels, &'w HalfActivations<Mat>)> {
        self.halves_in(&window.activations)
    }

    fn halves_in<'w>(&'w self, activations: &'w Activations<Mat>) -> Option<(&'w HalfKernels, &'w HalfActivations<Mat>)> {
        let stored = activations.halves.as_ref().filter(|_| self.with_halves);
        self.pass.kernels.halves.as_ref().zip(stored)
    }

    /// Stores the input and the middle of the layer, if it keeps them.
    pub(super) fn keep_streams(&self, commands: &mut Commands, window: &Window<'_>) -> Result<(), OpError> {
        let Some((halves, HalfActivations { streams: Some([input, middle]), .. })) = self.halves_of(window) else {
            return Ok(());
        };
        halves.mats.keep(commands, window.x, input)?;
        halves.mats.keep(commands, &window.activations.middle, middle)
    }

    /// Stores queries, keys and values as their projections write them. Queries and keys are
    /// rounded then, also in the forward pass of other layers: the gradients of attention need its
    /// scores.
    ///
    /// With several windows, keys and values serve the attention of some windows before and the
    /// gradients of others after one another. So values are rounded, too, and they are stored only
    /// if the layer keeps them.
    pub(super) fn keep_heads(&self, commands: &mut Commands, window: &Window<'_>, heads: Heads) -> Result<(), OpError> {
        let Activations { raw_queries, raw_keys, queries, keys, values, halves: stored, .. } = window.activations.as_ref();
        let of_training = self.pass.inputs.is_training().then_some(stored.as_ref()).flatten();
        let Some((halves, stored)) = self.pass.kernels.halves.as_ref().zip(of_training) else { return Ok(()) };
        let (queries, keys) = (raw_queries.as_ref().unwrap_or(queries), raw_keys.as_ref().unwrap_or(keys));
        let round = |commands: &mut Commands, mat: &Mat, stored: &Mat, store: bool| match store {
            true => halves.mats.keep_rounded(commands, mat, stored),
            false => halves.mats.round(commands, mat),
        };
        if heads.queries() {
            round(commands, queries, &stored.queries, self.with_halves)?;
        }
        if !heads.keys() {
            return Ok(());
        }
        let store = self.with_halves && (self.kept || !window.is_part);
        round(commands, keys, &stored.keys, store)?;
        match window.is_part {
            true => round(commands, values, &stored.values, store),
            false if store => halves.mats.keep(commands, values, &stored.values),
            false => Ok(()),
        }
    }

    /// Stores the output of attention.
    pub(super) fn keep_attended(&self, commands: &mut Commands, window: &Window<'_>) -> Result<(), OpError> {
        let Some((halves, stored)) = self.halves_of(window) else { return Ok(()) };
        halves.mats.keep(commands, &window.activations.attended, &stored.attended)
    }

    /// Loads `middle`, or rounds it.
    pub(super) fn load_middle(&self, commands: &mut Commands, window: &Window<'_>) -> Result<(), OpError> {
        let (middle, Some((halves, stored))) = (&window.activations.middle, self.halves_of(window)) else { return Ok(()) };
        match &stored.streams {
            Some([_, kept]) => halves.mats.load(commands, kept, middle),
            None => halves.mats.round(commands, middle),
        }
    }

    /// Loads the keys and values of a window of a layer that keeps them.
    pub(super) fn load_keys(&self, commands: &mut Commands, window: &Window<'_>) -> Result<(), OpError> {
        let Some((halves, stored)) = self.halves_of(window) else { return Ok(()) };
        let Activations { raw_keys, keys, values, .. } = window.activations.as_ref();
        halves.mats.load(commands, &stored.keys, raw_keys.as_ref().unwrap_or(keys))?;
        halves.mats.load(commands, &stored.values, values)?;
        self.turn_heads(commands, window, Heads::KeysAndValues)
    }

    /// Loads the input of the layer to `x`, and everything else that the gradients of the attention
    /// block need. With several windows, keys and values are there.
    pub(super) fn load_attention(&self, commands: &mut Commands, window: &Window<'_>) -> Result<(), OpError> {
        let Some((halves, stored)) = self.halves_of(window) else { return Ok(()) };
        let Activations { raw_queries, raw_keys, queries, keys, values, attended, .. } = window.activations.as_ref();
        let (queries, keys) = (raw_queries.as_ref().unwrap_or(queries), raw_keys.as_ref().unwrap_or(keys));
        match &stored.streams {
            Some([input, _]) => halves.mats.load(commands, input, window.x)?,
            None => halves.mats.round(commands, window.x)?,
        }
        if !window.is_part {
            halves.mats.load(commands, &stored.keys, keys)?;
            halves.mats.load(commands, &stored.values, values)?;
        }
        halves.mats.load(commands, &stored.queries, queries)?;
        halves.mats.load(commands, &stored.attended, attended)?;
        self.turn_heads(commands, window, window.heads())
    }
}

//! One layer of the decoder, forward and backward:
//!
//! ```text
//! n = norm(x)
//! middle = x + r * o_proj(attention(rotate(norm(q_proj(n))), rotate(norm(k_proj(n))), v_proj(n)))
//! m = norm(middle)
//! out = middle + r * down_proj(f(gate_proj(m)) * up_proj(m))
//! ```
//!
//! Some models have no norms of queries and keys. Some have norms of the outputs of o_proj and
//! down_proj. f is silu or gelu. Some layers do not rotate, or have a window. The
//! factor r (`residual_multiplier`) multiplies the products with the weights and their gradients;
//! it is 1 in most models.

use std::borrow::Cow;

use crate::arch::config::{LayerAttention, ModelConfig};
use crate::arch::family::PROJECTIONS;
use crate::dequant::stream::{Direction, StreamedLayer};
use crate::format::Role;
use crate::gpu::Commands;
use crate::model::constants::Constants;
use crate::model::error::ModelError;
use crate::model::kv_cache::attention_heads;
use crate::model::linear::Linear;
use crate::model::pass::{Pass, PassInputs};
use crate::model::residual::Residual;
use crate::model::weights::projection;
use crate::model::workspace::{Activations, Backward};
use crate::ops::matmul::{Left, Packed, Place};
use crate::ops::{AttentionShape, Mat, OpError};

mod few;
mod heads;
mod kept;
mod operands;
mod output;

/// From this number of tokens on, tiles of queries are faster than queries one by one.
const LONG_PROMPT: u32 = 64;

/// Submits the commands so far, and begins others: drivers end a submission that takes seconds.
pub(super) type Submit<'a> = &'a dyn Fn(&mut Commands) -> Result<(), OpError>;

/// A layer in GPU memory during a pass.
#[derive(Debug)]
pub(super) struct Layer<'a> {
    pass: &'a Pass<'a>,
    constants: &'a Constants,
    activations: &'a Activations<Mat>,
    /// Whether `activations` are those of its forward pass when its gradients are computed.
    kept: bool,
    /// Whether the activations in f16 are written or read.
    with_halves: bool,
    number: u32,
    attention: LayerAttention,
    q: Linear<'a>,
    k: Linear<'a>,
    v: Linear<'a>,
    o: Linear<'a>,
    gate: Linear<'a>,
    up: Linear<'a>,
    down: Linear<'a>,
}

/// Tokens that pass through the layer together, and their activations.
#[derive(Debug)]
struct Window<'a> {
    number: u32,
    /// The first token.
    first: u32,
    /// Whether there are others.
    is_part: bool,
    /// The input of the layer.
    x: &'a Mat,
    activations: Cow<'a, Activations<Mat>>,
    normed: Mat,
    activated: Mat,
}

impl Window<'_> {
    /// The heads that are computed window by window.
    fn heads(&self) -> Heads {
        if self.is_part { Heads::Queries } else { Heads::All }
    }

    /// The end of its tokens.
    fn end(&self) -> u32 {
        self.first + self.x.rows
    }

    /// The rows of its tokens, of a matrix with a row for each token.
    fn of(&self, mat: &Mat) -> Mat {
        mat.window(self.first, self.x.rows)
    }

    /// The first rows of a matrix for the tokens of one window.
    fn narrow(&self, mat: &Mat) -> Mat {
        mat.narrow(self.x.rows, mat.cols)
    }

    /// The rows of the tokens up to the end of the window.
    fn until(&self, mat: &Mat) -> Mat {
        mat.narrow(self.end(), mat.cols)
    }
}

/// The projections before attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heads {
    All,
    Queries,
    KeysAndValues,
}

impl Heads {
    fn queries(self) -> bool {
        self != Self::KeysAndValues
    }

    fn keys(self) -> bool {
        self != Self::Queries
    }
}

/// The norms before projections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Norm {
    /// Of the input of the layer: before q_proj, k_proj and v_proj.
    Input,
    /// Of the middle: before gate_proj and up_proj.
    Middle,
}

impl<'a> Layer<'a> {
    /// Checks the shapes of the layer's projections.
    pub fn new(
        pass: &'a Pass<'a>,
        layer: &'a StreamedLayer,
        constants: &'a Constants,
        direction: Direction,
    ) -> Result<Self, ModelError> {
        let number = layer.number.unwrap_or_default();
        let (activations, kept) = pass.inputs.work.activations(number, pass.model.layers);
        let linear = |index: usize| -> Result<Linear<'a>, ModelError> {
            let role = PROJECTIONS[index];
            let bias = constants.biases[index].as_ref();
            let rows = pass.model.rows_of(role).ok_or(ModelError::MissingTensor { layer: layer.number, role })?;
            let lora = pass.inputs.adapter.and_then(|adapter| adapter.lora(number, &rows, pass.inputs.mask));
            let factor = output_factor(pass.model, role);
            let weight = projection(layer, &rows)?.times(factor).measured(constants.largest(index));
            let lora = lora.map(|lora| lora.times(factor));
            Ok(Linear { weight, bias, lora, low: activations.lows[index].clone(), index })
        };
        let [q, k, v, o, gate, up, down] = [0, 1, 2, 3, 4, 5, 6].map(linear);
        let attention = pass.model.attention(number);
        Ok(Self {
            pass,
            constants,
            activations,
            kept,
            with_halves: direction == Direction::Backward || (kept && pass.inputs.is_training()),
            number,
            attention,
            q: q?,
            k: k?,
            v: v?,
            o: o?,
            gate: gate?,
            up: up?,
            down: down?,
        })
    }

    /// Records the layer. `x` and `out` are [tokens, hidden]. If there are several windows,
    /// `submit` submits the commands of each.
    pub fn forward(
        &self,
        commands: &mut Commands,
        x: &Residual<Mat>,
        out: &Residual<Mat>,
        submit: Submit<'_>,
    ) -> Result<(), OpError> {
        let windows = self.windows(x);
        self.keys_and_values(commands, &windows)?;
        for (window, out) in windows.iter().zip(out.windows()) {
            self.attention_block(commands, window)?;
            self.keep_streams(commands, window)?;
            let activated = self.feed_forward(commands, window)?;
            self.add_feed_forward(commands, window, &activated, out)?;
            if window.is_part {
                submit(commands)?;
            }
        }
        Ok(())
    }

    /// Records the gradients. `x` is the input of the layer. In the workspace, the gradient of the
    /// output becomes the gradient of `x`, in place. Activations are computed again, unless they
    /// are kept.
    ///
    /// The last window comes first. Queries attend only to tokens before them, so the gradients of
    /// its keys and values are then complete. If there are several windows, `submit` submits the
    /// commands of each.
    pub fn backward(&self, commands: &mut Commands, x: &Residual<Mat>, submit: Submit<'_>) -> Result<(), OpError> {
        let Some(gradients) = &self.pass.inputs.work.backward else {
            return Err(OpError::Shape {
                operation: "backward",
                what: "the workspaces with gradients",
                expected: 1,
                found: 0,
            });
        };
        let windows = self.windows(x);
        match self.kept {
            false => self.keys_and_values(commands, &windows)?,
            true => self.restore_keys(commands, &windows)?,
        }
        for (window, residual) in windows.iter().zip(gradients.residual.windows()).rev() {
            match self.kept {
                false => {
                    self.attention_block(commands, window)?;
                    let activated = self.feed_forward(commands, window)?;
                    let down = self.down.in_window(window.number, &window.activations);
                    down.recompute_low(self.pass.kernels, commands, &self.pass.inputs.work, &activated)?;
                }
                true if self.halves().is_none() => self.restore(commands, window, window.heads())?,
                true => {}
            }
            self.load_middle(commands, window)?;
            self.feed_forward_backward(commands, window, residual, gradients)?;
            self.load_attention(commands, window)?;
            self.attention_block_backward(commands, window, residual, gradients)?;
            if window.is_part {
                submit(commands)?;
            }
        }
        Ok(())
    }

    /// The windows of tokens that pass through the layer one after the other.
    fn windows<'x>(&'x self, x: &'x Residual<Mat>) -> Vec<Window<'x>> {
        let work = &self.pass.inputs.work;
        let mut first = 0;
        let window = |(number, x): (u32, &'x Mat)| {
            let is_part = x.rows < work.tokens;
            let window = Window {
                number,
                first,
                is_part,
                x,
                activations: match is_part {
                    true => Cow::Owned(self.activations.window(work.tokens, first, x.rows)),
                    false => Cow::Borrowed(self.activations),
                },
                normed: work.normed.narrow(x.rows, work.normed.cols),
                activated: work.activated.narrow(x.rows, work.activated.cols),
            };
            first += x.rows;
            window
        };
        (0..).zip(x.windows()).map(window).collect()
    }

    /// Computes the keys and values of all windows, if there are several.
    fn keys_and_values(&self, commands: &mut Commands, windows: &[Window<'_>]) -> Result<(), OpError> {
        let mut parts = windows.iter().filter(|window| window.is_part);
        parts.try_for_each(|window| self.project(commands, window, Heads::KeysAndValues))
    }

    /// Computes the kept keys of all windows again from those before their norm, or loads keys and
    /// values, if there are several windows.
    fn restore_keys(&self, commands: &mut Commands, windows: &[Window<'_>]) -> Result<(), OpError> {
        for window in windows.iter().filter(|window| window.is_part) {
            match self.halves() {
                None => self.restore(commands, window, Heads::KeysAndValues)?,
                Some(_) => self.load_keys(commands, window)?,
            }
        }
        Ok(())
    }

    /// Computes kept heads again from those before their norm. Without norms, they are kept as they
    /// are after their rotation.
    fn restore(&self, commands: &mut Commands, window: &Window<'_>, heads: Heads) -> Result<(), OpError> {
        if window.activations.raw_queries.is_none() {
            return Ok(());
        }
        self.turn_heads(commands, window, heads)
    }

    /// Computes `middle` from the input of the layer, after [`Layer::keys_and_values`].
    fn attention_block(&self, commands: &mut Commands, window: &Window<'_>) -> Result<(), OpError> {
        if !self.attend_few(commands, window)? {
            self.project(commands, window, window.heads())?;
            self.attend(commands, window)?;
        }
        self.keep_attended(commands, window)?;
        self.add_attention(commands, window)
    }

    /// Computes heads from the input of the layer.
    fn project(&self, commands: &mut Commands, window: &Window<'_>, heads: Heads) -> Result<(), OpError> {
        let Pass { kernels, inputs: PassInputs { work, .. }, .. } = self.pass;
        let Activations { raw_queries, raw_keys, queries, keys, values, .. } = window.activations.as_ref();
        let raw_queries = raw_queries.as_ref().unwrap_or(queries);
        let raw_keys = raw_keys.as_ref().unwrap_or(keys);
        let normed = &self.norm(commands, window, Norm::Input, Place::Left)?;
        let [q, k, v] = [&self.q, &self.k, &self.v].map(|linear| linear.in_window(window.number, &window.activations));
        if heads.queries() {
            q.forward(kernels, commands, work, normed, false, raw_queries)?;
        }
        if heads.keys() {
            k.forward(kernels, commands, work, normed, false, raw_keys)?;
            v.forward(kernels, commands, work, normed, false, values)?;
        }
        self.keep_heads(commands, window, heads)?;
        self.turn_heads(commands, window, heads)
    }

    /// Computes `attended`: within each sample, or over a KV cache.
    fn attend(&self, commands: &mut Commands, window: &Window<'_>) -> Result<(), OpError> {
        let Pass { kernels, model, inputs: PassInputs { batch, past, .. }, .. } = self.pass;
        let Activations { queries, keys, values, attended, lse, .. } = window.activations.as_ref();
        match past {
            // The start of a long prompt is a sample of its own.
            Some(past) if past.tokens == 0 && queries.rows >= LONG_PROMPT => {
                past.store(commands, model, self.number, [keys, values])?;
            }
            Some(past) => return past.attend(commands, model, self.number, [queries, keys, values], attended),
            None => {}
        }
        let [keys, values] = [&self.activations.keys, &self.activations.values].map(|mat| window.until(mat));
        let shape = self.attention_shape(window);
        kernels.attention.forward(commands, &shape, queries, &keys, &values, &batch.starts, attended, lse)
    }

    fn attention_shape(&self, window: &Window<'_>) -> AttentionShape {
        let heads = attention_heads(self.pass.model, self.number);
        AttentionShape { first: window.first, tokens: window.end(), heads }
    }

    /// Computes `activated` from `middle`.
    fn feed_forward(&self, commands: &mut Commands, window: &Window<'_>) -> Result<Packed, OpError> {
        let Pass { kernels, inputs: PassInputs { work, .. }, .. } = self.pass;
        let Window { number, activations, .. } = window;
        if self.activate_few(commands, window)? {
            return kernels.matmul.pack(commands, &window.activated);
        }
        let normed = &self.norm(commands, window, Norm::Middle, Place::Left)?;
        let [gate, up] = [&self.gate, &self.up].map(|linear| linear.in_window(*number, activations));
        gate.forward(kernels, commands, work, normed, false, &activations.gate)?;
        up.forward(kernels, commands, work, normed, false, &activations.up)?;
        self.activate(commands, window)
    }

    /// In `residual`, the gradient of the output becomes the gradient of `middle`.
    fn feed_forward_backward(
        &self,
        commands: &mut Commands,
        window: &Window<'_>,
        residual: &Mat,
        gradients: &Backward<Mat>,
    ) -> Result<(), OpError> {
        let Pass { kernels, model, inputs: PassInputs { work, .. }, .. } = self.pass;
        let Window { number, normed, activated, activations, .. } = window;
        let Activations { middle, gate, up, .. } = activations.as_ref();
        let d_normed = &window.narrow(&gradients.normed);
        let [gate_proj, up_proj, down_proj] =
            [&self.gate, &self.up, &self.down].map(|linear| linear.in_window(*number, activations));
        let inputs = &self.activate_again(commands, window)?;
        match &self.constants.feed_forward_output_norm {
            None => down_proj.backward(kernels, commands, work, inputs, residual, activated, false)?,
            Some(gamma) => {
                self.output_backward(commands, &down_proj, gamma, inputs, [normed, residual, d_normed])?;
                down_proj.backward(kernels, commands, work, inputs, d_normed, activated, false)?;
            }
        }
        let packed = self.activation_backward(commands, window)?;
        let [d_gate, d_up] =
            packed.as_ref().map_or([Left::Mat(gate), Left::Mat(up)], |both| both.each_ref().map(Left::Packed));
        let inputs = &self.norm_middle_again(commands, window)?;
        gate_proj.backward(kernels, commands, work, inputs, d_gate, d_normed, false)?;
        up_proj.backward(kernels, commands, work, inputs, d_up, d_normed, true)?;
        let (gamma, epsilon) = (&self.constants.post_attention_norm, model.rms_norm_eps as f32);
        kernels.norm.backward(commands, middle, gamma, epsilon, d_normed, residual, true)
    }

    /// In `residual`, the gradient of `middle` becomes the gradient of the input of the layer.
    fn attention_block_backward(
        &self,
        commands: &mut Commands,
        window: &Window<'_>,
        residual: &Mat,
        gradients: &Backward<Mat>,
    ) -> Result<(), OpError> {
        let Pass { kernels, model, inputs: PassInputs { work, .. }, .. } = self.pass;
        let (gamma, epsilon) = (&self.constants.input_norm, model.rms_norm_eps as f32);
        let [q, k, v, o] =
            [&self.q, &self.k, &self.v, &self.o].map(|linear| linear.in_window(window.number, &window.activations));
        let d_attended = &window.narrow(&gradients.attended);
        let inputs = &self.attended(commands, window, Place::Inputs)?;
        match &self.constants.attention_output_norm {
            None => o.backward(kernels, commands, work, inputs, residual, d_attended, false)?,
            Some(gamma) => {
                // `gradients.normed` shares its memory with `gradients.attended`.
                let d_output = &window.narrow(work.hidden_scratch());
                self.output_backward(commands, &o, gamma, inputs, [&window.normed, residual, d_output])?;
                o.backward(kernels, commands, work, inputs, d_output, d_attended, false)?;
            }
        }
        self.attend_backward(commands, window, gradients)?;
        let [d_queries, d_keys] = &self.turn_heads_backward(commands, window, gradients)?;
        let d_normed = &window.narrow(&gradients.normed);
        let inputs = &self.norm(commands, window, Norm::Input, Place::Inputs)?;
        q.backward(kernels, commands, work, inputs, d_queries, d_normed, false)?;
        k.backward(kernels, commands, work, inputs, d_keys, d_normed, true)?;
        v.backward(kernels, commands, work, inputs, &window.of(&gradients.values), d_normed, true)?;
        kernels.norm.backward(commands, window.x, gamma, epsilon, d_normed, residual, true)
    }

    /// Computes the gradients of queries, keys and values after their rotation.
    fn attend_backward(
        &self,
        commands: &mut Commands,
        window: &Window<'_>,
        gradients: &Backward<Mat>,
    ) -> Result<(), OpError> {
        let Pass { kernels, inputs: PassInputs { work, batch, .. }, .. } = self.pass;
        let Activations { queries, attended, lse, .. } = window.activations.as_ref();
        let [keys, values] = [&self.activations.keys, &self.activations.values].map(|mat| window.until(mat));
        let d_queries = &window.narrow(&gradients.queries);
        kernels.attention.backward(
            commands,
            &self.attention_shape(window),
            queries,
            &keys,
            &values,
            &batch.starts,
            attended,
            lse,
            &window.narrow(&gradients.attended),
            &window.narrow(&gradients.delta),
            d_queries,
            &window.until(&gradients.keys),
            &window.until(&gradients.values),
            window.end() < work.tokens,
        )
    }
}

/// The factor of the output of a projection.
fn output_factor(model: &ModelConfig, role: Role) -> f32 {
    match role {
        Role::OProj | Role::DownProj => model.residual_multiplier as f32,
        _ => 1.0,
    }
}

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
use crate::model::weights::projection;
use crate::model::workspace::{Activations, Backward};
use crate::ops::{AttentionShape, Mat, OpError};

mod few;
mod kept;
mod output;

/// From this number of tokens on, tiles of queries are faster than queries one by one.
const LONG_PROMPT: u32 = 64;

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

/// Tokens that pass through the feed-forward block together, and their activations.
#[derive(Debug)]
struct Window {
    number: u32,
    /// The first token.
    first: u32,
    middle: Mat,
    normed: Mat,
    gate: Mat,
    up: Mat,
    activated: Mat,
}

impl Window {
    /// The rows of its tokens, of a matrix with a row for each token.
    fn of(&self, mat: &Mat) -> Mat {
        mat.window(self.first, self.middle.rows)
    }
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
            Ok(Linear { weight, bias, lora: lora.map(|lora| lora.times(factor)), low: activations.lows[index].clone() })
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

    /// Records the layer. `x` and `out` are [tokens, hidden].
    pub fn forward(&self, commands: &mut Commands, x: &Mat, out: &Mat) -> Result<(), OpError> {
        self.attention_block(commands, x)?;
        self.keep_streams(commands, x)?;
        for window in self.windows() {
            self.feed_forward(commands, &window)?;
            self.add_feed_forward(commands, &window, &window.of(out))?;
        }
        Ok(())
    }

    /// Records the gradients. `x` is the input of the layer. In the workspace, the gradient of the
    /// output becomes the gradient of `x`, in place. Activations are computed again, unless they
    /// are kept.
    pub fn backward(&self, commands: &mut Commands, x: &Mat) -> Result<(), OpError> {
        let Some(gradients) = &self.pass.inputs.work.backward else {
            return Err(OpError::Shape {
                operation: "backward",
                what: "the workspaces with gradients",
                expected: 1,
                found: 0,
            });
        };
        if !self.kept {
            self.attention_block(commands, x)?;
        } else if self.halves().is_none() && self.activations.raw_queries.is_some() {
            // Queries and keys without norms are kept as they are after their rotation.
            self.norm_heads(commands)?;
            self.rotate_heads(commands)?;
        }
        for window in self.windows() {
            if !self.kept {
                self.feed_forward(commands, &window)?;
                let down = self.down.in_window(window.number, window.first);
                down.recompute_low(self.pass.kernels, commands, &self.pass.inputs.work, &window.activated)?;
            }
            if self.kept || self.halves().is_some() {
                self.load_middle(commands, &window)?;
                self.norm_middle(commands, &window)?;
                self.activate_again(commands, &window)?;
            }
            self.feed_forward_backward(commands, &window, gradients)?;
        }
        self.load_attention(commands, x)?;
        self.attention_block_backward(commands, x, gradients)
    }

    /// The windows of tokens that pass through the feed-forward block one after the other.
    fn windows(&self) -> impl Iterator<Item = Window> {
        let work = &self.pass.inputs.work;
        let Activations { middle, gate, up, .. } = self.activations;
        let (tokens, step) = (middle.rows, work.window.max(1));
        (0..).zip((0..tokens).step_by(step as usize)).map(move |(number, first)| {
            let rows = step.min(tokens - first);
            // Activations kept in float32 have all tokens, and others those of a window.
            let all = self.kept && self.activations.halves.is_none();
            let of_window = |mat: &Mat| if all { mat.window(first, rows) } else { mat.narrow(rows, mat.cols) };
            Window {
                number,
                first,
                middle: middle.window(first, rows),
                normed: work.normed.window(first, rows),
                gate: of_window(gate),
                up: of_window(up),
                activated: work.activated.narrow(rows, work.activated.cols),
            }
        })
    }

    /// Computes `middle` from `x`.
    fn attention_block(&self, commands: &mut Commands, x: &Mat) -> Result<(), OpError> {
        let Pass { kernels, model, inputs: PassInputs { work, .. }, .. } = self.pass;
        let Activations { raw_queries, raw_keys, queries, keys, values, attended, middle, .. } = self.activations;
        if self.attend_few(commands, x)? {
            return self.add_attention(commands, attended, x, middle);
        }
        let normed = &work.normed;
        kernels.norm.forward(commands, x, &self.constants.input_norm, model.rms_norm_eps as f32, normed)?;
        let raw_queries = raw_queries.as_ref().unwrap_or(queries);
        let raw_keys = raw_keys.as_ref().unwrap_or(keys);
        let normed = &kernels.matmul.pack(commands, normed)?;
        self.q.forward(kernels, commands, work, normed, false, raw_queries)?;
        self.k.forward(kernels, commands, work, normed, false, raw_keys)?;
        self.v.forward(kernels, commands, work, normed, false, values)?;
        self.keep_heads(commands)?;
        self.norm_heads(commands)?;
        self.attend(commands)?;
        self.keep_attended(commands)?;
        self.add_attention(commands, attended, x, middle)
    }

    /// Rotates queries and keys, and computes `attended`: within each sample, or over a KV cache.
    fn attend(&self, commands: &mut Commands) -> Result<(), OpError> {
        let Pass { kernels, model, inputs: PassInputs { batch, past, .. }, .. } = self.pass;
        let Activations { queries, keys, values, attended, lse, .. } = self.activations;
        self.rotate_heads(commands)?;
        match past {
            // The start of a long prompt is a sample of its own.
            Some(past) if past.tokens == 0 && queries.rows >= LONG_PROMPT => {
                past.store(commands, model, self.number, [keys, values])?;
            }
            Some(past) => return past.attend(commands, model, self.number, [queries, keys, values], attended),
            None => {}
        }
        let shape = self.attention_shape(queries.rows);
        kernels.attention.forward(commands, &shape, queries, keys, values, &batch.starts, attended, lse)
    }

    /// Rotates queries and keys, if the layer does.
    fn rotate_heads(&self, commands: &mut Commands) -> Result<(), OpError> {
        if self.attention.rotary {
            self.rotate(commands, &self.activations.queries, self.pass.model.heads)?;
            self.rotate(commands, &self.activations.keys, self.pass.model.kv_heads)?;
        }
        Ok(())
    }

    /// Rotates queries or keys by the positions of their tokens.
    fn rotate(&self, commands: &mut Commands, x: &Mat, heads: u32) -> Result<(), OpError> {
        let kernels = self.pass.kernels;
        if let Some(past) = self.pass.inputs.past {
            let (angles, first) = self.pass.angles_after(self.attention, past.tokens);
            return kernels.rotary.forward_from(commands, x, heads, first, angles);
        }
        let (angles, starts) = self.pass.angles(self.attention);
        kernels.rotary.forward(commands, x, heads, starts, angles)
    }

    fn attention_shape(&self, tokens: u32) -> AttentionShape {
        AttentionShape { tokens, heads: attention_heads(self.pass.model, self.number) }
    }

    /// Applies the norms of queries and keys, if the model has them.
    fn norm_heads(&self, commands: &mut Commands) -> Result<(), OpError> {
        let Pass { kernels, model, .. } = self.pass;
        let Activations { raw_queries, raw_keys, queries, keys, .. } = self.activations;
        let epsilon = model.rms_norm_eps as f32;
        if let (Some(raw), Some(gamma)) = (raw_queries, &self.constants.query_norm) {
            kernels.norm.forward(commands, raw, gamma, epsilon, queries)?;
        }
        if let (Some(raw), Some(gamma)) = (raw_keys, &self.constants.key_norm) {
            kernels.norm.forward(commands, raw, gamma, epsilon, keys)?;
        }
        Ok(())
    }

    /// Computes `activated` from `middle`.
    fn feed_forward(&self, commands: &mut Commands, window: &Window) -> Result<(), OpError> {
        let Pass { kernels, inputs: PassInputs { work, .. }, .. } = self.pass;
        let Window { number, first, normed, gate, up, .. } = window;
        if self.activate_few(commands, window)? {
            return Ok(());
        }
        self.norm_middle(commands, window)?;
        let normed = &kernels.matmul.pack(commands, normed)?;
        self.gate.in_window(*number, *first).forward(kernels, commands, work, normed, false, gate)?;
        self.up.in_window(*number, *first).forward(kernels, commands, work, normed, false, up)?;
        self.activate(commands, window)
    }

    /// Computes `normed` from `middle`.
    fn norm_middle(&self, commands: &mut Commands, window: &Window) -> Result<(), OpError> {
        let Pass { kernels, model, .. } = self.pass;
        let (gamma, epsilon) = (&self.constants.post_attention_norm, model.rms_norm_eps as f32);
        kernels.norm.forward(commands, &window.middle, gamma, epsilon, &window.normed)
    }

    /// The gradient of the output becomes the gradient of `middle`.
    fn feed_forward_backward(
        &self,
        commands: &mut Commands,
        window: &Window,
        gradients: &Backward<Mat>,
    ) -> Result<(), OpError> {
        let Pass { kernels, model, inputs: PassInputs { work, .. }, .. } = self.pass;
        let &Window { number, first, ref middle, ref normed, ref gate, ref up, ref activated } = window;
        let (residual, d_normed) = (&window.of(&gradients.residual), &window.of(&gradients.normed));
        let [gate_proj, up_proj, down_proj] =
            [&self.gate, &self.up, &self.down].map(|linear| linear.in_window(number, first));
        let inputs = &kernels.matmul.pack_inputs(commands, activated)?;
        match &self.constants.feed_forward_output_norm {
            None => down_proj.backward(kernels, commands, work, inputs, [residual, activated], false)?,
            Some(gamma) => {
                self.output_backward(commands, &down_proj, gamma, [activated, normed, residual, d_normed])?;
                down_proj.backward(kernels, commands, work, inputs, [d_normed, activated], false)?;
                // The output of the projection was in its place.
                self.norm_middle(commands, window)?;
            }
        }
        self.activation_backward(commands, window)?;
        let inputs = &kernels.matmul.pack_inputs(commands, normed)?;
        gate_proj.backward(kernels, commands, work, inputs, [gate, d_normed], false)?;
        up_proj.backward(kernels, commands, work, inputs, [up, d_normed], true)?;
        let (gamma, epsilon) = (&self.constants.post_attention_norm, model.rms_norm_eps as f32);
        kernels.norm.backward(commands, middle, gamma, epsilon, d_normed, residual, true)
    }

    /// The gradient of `middle` becomes the gradient of `x`.
    fn attention_block_backward(&self, commands: &mut Commands, x: &Mat, gradients: &Backward<Mat>) -> Result<(), OpError> {
        let Pass { kernels, model, inputs: PassInputs { work, batch, .. }, .. } = self.pass;
        let (gamma, epsilon) = (&self.constants.input_norm, model.rms_norm_eps as f32);
        let Activations { queries, keys, values, attended, lse, .. } = self.activations;
        let inputs = &kernels.matmul.pack_inputs(commands, attended)?;
        match &self.constants.attention_output_norm {
            None => self.o.backward(kernels, commands, work, inputs, [&gradients.residual, &gradients.attended], false)?,
            Some(gamma) => {
                // `gradients.normed` shares its memory with `gradients.attended`.
                let (residual, d_output) = (&gradients.residual, work.hidden_scratch());
                self.output_backward(commands, &self.o, gamma, [attended, &work.normed, residual, d_output])?;
                self.o.backward(kernels, commands, work, inputs, [d_output, &gradients.attended], false)?;
            }
        }
        let shape = self.attention_shape(x.rows);
        kernels.attention.backward(
            commands,
            &shape,
            queries,
            keys,
            values,
            &batch.starts,
            attended,
            lse,
            &gradients.attended,
            &gradients.delta,
            &gradients.queries,
            &gradients.keys,
            &gradients.values,
        )?;
        if self.attention.rotary {
            let (angles, starts) = self.pass.angles(self.attention);
            kernels.rotary.backward(commands, &gradients.queries, model.heads, starts, angles)?;
            kernels.rotary.backward(commands, &gradients.keys, model.kv_heads, starts, angles)?;
        }
        let [d_queries, d_keys] = self.norm_heads_backward(commands, gradients)?;
        // `normed` contains the output of the post-attention norm, so compute the input norm again.
        kernels.norm.forward(commands, x, gamma, epsilon, &work.normed)?;
        let inputs = &kernels.matmul.pack_inputs(commands, &work.normed)?;
        self.q.backward(kernels, commands, work, inputs, [d_queries, &gradients.normed], false)?;
        self.k.backward(kernels, commands, work, inputs, [d_keys, &gradients.normed], true)?;
        self.v.backward(kernels, commands, work, inputs, [&gradients.values, &gradients.normed], true)?;
        kernels.norm.backward(commands, x, gamma, epsilon, &gradients.normed, &gradients.residual, true)
    }

    /// The gradients of the inputs of the norms per head. They overwrite queries and keys, which
    /// are no longer needed.
    fn norm_heads_backward<'b>(
        &'b self,
        commands: &mut Commands,
        gradients: &'b Backward<Mat>,
    ) -> Result<[&'b Mat; 2], OpError> {
        let Pass { kernels, model, .. } = self.pass;
        let Activations { raw_queries, raw_keys, queries, keys, .. } = self.activations;
        let epsilon = model.rms_norm_eps as f32;
        let mut found = [&gradients.queries, &gradients.keys];
        if let (Some(raw), Some(gamma)) = (raw_queries, &self.constants.query_norm) {
            kernels.norm.backward(commands, raw, gamma, epsilon, &gradients.queries, queries, false)?;
            found[0] = queries;
        }
        if let (Some(raw), Some(gamma)) = (raw_keys, &self.constants.key_norm) {
            kernels.norm.backward(commands, raw, gamma, epsilon, &gradients.keys, keys, false)?;
            found[1] = keys;
        }
        Ok(found)
    }
}

/// The factor of the output of a projection.
fn output_factor(model: &ModelConfig, role: Role) -> f32 {
    match role {
        Role::OProj | Role::DownProj => model.residual_multiplier as f32,
        _ => 1.0,
    }
}

//! The memory that a pass through the model works in. One function lists its matrices. It runs
//! three times: to count the bytes, to reserve them, and to view them as matrices with a row for
//! each token of a batch.
//!
//! Which step reads and writes which matrix (`d.x` is `backward.x`, a gradient):
//!
//! ```text
//! before the layers, in the forward pass
//!   embedding            tokens                     -> residual[0]
//! layer i: forward, and again before backward
//!   input norm           residual[i]                -> normed
//!   q_proj, k_proj       normed                     -> raw_queries, raw_keys if heads have a norm,
//!                                                      else queries, keys
//!   norms of the heads   raw_queries, raw_keys      -> queries, keys
//!   v_proj               normed                     -> values
//!   rotary               queries, keys              -> the same, in place
//!   attention            queries, keys, values      -> attended, lse
//!   o_proj               residual[i] + attended     -> middle
//!   post-attention norm  middle                     -> normed
//!   gate_proj, up_proj   normed                     -> gate, up
//!   GLU                  gate, up                   -> activated
//!   down_proj            middle + activated         -> residual[i + 1], only in the forward pass
//! after the layers, in the forward pass
//!   final norm           residual[layers]           -> normed
//!   head, per chunk      normed                     -> logits
//!   loss, per chunk      logits                     -> loss_state
//!   loss                 loss_state                 -> loss, added
//! before the layers, in the backward pass
//!   head, per chunk      normed                     -> logits, computed again
//!   loss, per chunk      logits, loss_state         -> logits, which become their own gradients
//!   head, per chunk      logits                     -> d.normed, added after the first chunk
//!   final norm           residual[layers], d.normed -> d.residual
//! layer i: backward, d.residual holds the gradient of the layer's output
//!   down_proj            activated, d.residual      -> activated, which becomes its own gradient
//!   GLU                  gate, up, activated        -> gate, up, which become their own gradients
//!   gate_proj, up_proj   normed, gate, up           -> d.normed
//!   post-attention norm  middle, d.normed           -> d.residual, added: that of middle
//!   o_proj               attended, d.residual       -> d.attended
//!   attention            queries, keys, values,
//!                        d.attended, attended, lse  -> d.delta, d.queries, d.keys, d.values
//!   rotary               d.queries, d.keys          -> the same, in place
//!   norms of the heads   raw_queries, raw_keys,
//!                        d.queries, d.keys          -> queries, keys, which become gradients
//!   input norm           residual[i]                -> normed, computed again
//!   q_, k_, v_proj       normed, their gradients    -> d.normed
//!   input norm           residual[i], d.normed      -> d.residual, added: that of residual[i]
//! ```
//!
//! With norms of the heads, each norm and the rotation after it are one step, which reads
//! raw_queries and raw_keys and, backward, d.queries and d.keys, and writes queries and keys.
//!
//! In models with norms of outputs, o_proj and down_proj write `normed`, and the norm adds it to
//! `middle` or `residual[i + 1]`. Backward, they write `normed` again, the gradient before the norm
//! is in `d.normed` or, that of attention, in the shared `middle`, and the post-attention norm
//! writes `normed` again for gate_proj and up_proj.
//!
//! A long pass goes through a layer in windows of tokens. Residual streams, keys, values and their
//! gradients have the rows of all tokens, and all other matrices those of a window: keys and values
//! of all windows are computed first, then the rest of the layer, window by window. Backward, the
//! last window comes first. When its attention is done, all queries that see its keys were in it or
//! in later windows, so the gradients of its keys and values are complete. A pass of one window
//! computes queries with keys and values. The head and the loss have windows, too.
//!
//! Layers that keep their activations have matrices of their own for all but `activated`, with the
//! rows of all tokens, and skip the steps that compute them. Streams in `offloaded` arrive in the
//! place of a later stream, one layer ahead.
//!
//! In mixed precision, gradients are computed from activations in f16 ([`HalfActivations`]). A
//! layer that keeps its activations stores them in the forward pass, and also its input: of the
//! inputs of these layers, `residual` has two, in turn. Another layer stores them, or rounds its
//! input and `middle`, when they are computed again. So the results do not depend on which layers
//! do, and queries and attended tokens are in the memory of the feed-forward block, after it.
//!
//! Two gradients are in the memory of a matrix that nothing reads at that time: `d.attended` in
//! that of `d.normed`, between the feed-forward block and q_, k_ and v_proj, and `d.queries` in
//! that of the shared `middle`, after the feed-forward block.
//!
//! Where products on matrix units alone read `normed`, `activated` or the gradients of gate and up,
//! norms and activations write them as packed operands. The memory of `normed` then has the factors
//! of the norm, that of `activated` only the gradient, and that of gate and up their gradients,
//! packed.
//!
//! Every projection with an adapter has its own x A^T in `lows`, which its gradients are computed
//! from. It uses `low_rank` and `dropped` as scratch, and writes them before it reads them.

mod activations;

pub(crate) use activations::{Activations, HalfActivations};

pub use crate::model::sizes::Sizes;
pub(crate) use crate::model::sizes::{Matrix, Streams, WINDOW};

use crate::arch::config::ModelConfig;
use crate::arch::family::PROJECTIONS;
use crate::gpu::{BufferRange, Gpu, GpuError};
use crate::model::residual::Residual;
use crate::ops::{Mat, OpError, mat_bytes};

/// Maximum bytes of a chunk of logits: a small share of a large model's activations, and enough
/// columns to keep a large GPU busy.
const LOGITS_BYTES: u64 = 128 << 20;
/// The columns of a chunk are a multiple of this, unless a chunk is smaller.
const CHUNK_ALIGN: u32 = 256;

/// The use of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// The residual streams that the forward pass saves for the backward pass.
    SavedActivations,
    /// The other activations of layers that are not computed again.
    KeptActivations,
    /// Residual streams in host memory.
    Host,
    /// Activations and gradients of the current layer.
    Layer,
    /// Logits and losses.
    Loss,
}

/// Matrices of a pass. Most have a row for each token of a window.
#[derive(Debug)]
pub(crate) struct Workspace<M> {
    /// The residual stream before each layer and after the last layer: [`Workspace::before`]
    /// selects one.
    pub residual: Vec<Residual<M>>,
    /// The last of `residual`, which streams have in turn that no layer needs in float32 later.
    in_turn: u32,
    /// The first streams in host memory, between the forward and the backward pass.
    pub offloaded: Vec<Residual<M>>,
    /// The output of a norm: hidden.
    pub normed: M,
    /// silu(gate) * up, later its gradient: intermediate.
    pub activated: M,
    /// The gradient of x A^T: rank.
    pub low_rank: M,
    /// The inputs of an adapter after dropout: as wide as the widest input. One column without
    /// dropout.
    pub dropped: M,
    /// The activations of a layer that is computed again for its gradients.
    shared: Activations<M>,
    /// The activations of the last layers, which keep them.
    kept: Vec<Activations<M>>,
    pub backward: Option<Backward<M>>,
    /// Tokens of the pass.
    pub tokens: u32,
    /// Logits of a chunk of the vocabulary.
    pub logits: M,
    /// 4.
    pub loss_state: M,
    /// [1, 1]: the sum of the losses of the micro-batches so far.
    pub loss: M,
}

/// Gradients, each named after its activation. Those of the residual stream, keys and values have
/// the rows of all tokens.
#[derive(Debug)]
pub(crate) struct Backward<M> {
    pub residual: Residual<M>,
    pub normed: M,
    pub attended: M,
    pub queries: M,
    pub keys: M,
    pub values: M,
    /// Sums of attended * its gradient: heads.
    pub delta: M,
}

impl<M: Matrix> Workspace<M> {
    /// Calls `new` for each matrix, with its use, name, rows and columns. The order is always the
    /// same in memory for `reserved` tokens.
    fn build<E>(
        model: &ModelConfig,
        sizes: Sizes,
        reserved: u32,
        mut new: impl FnMut(Use, &'static str, u32, u32) -> Result<M, E>,
    ) -> Result<Self, E> {
        let &ModelConfig { hidden, intermediate, heads, layers, .. } = model;
        let (queries, keys, tokens) = (model.queries(), model.keys(), sizes.tokens);
        let Streams { saved, offloaded, in_turn } = sizes.streams(layers);
        let mut stream =
            |purpose, name| Residual::build(tokens, reserved, sizes.window, |rows| new(purpose, name, rows, hidden));
        let mut host = |_| stream(Use::Host, "offloaded residual stream");
        let offloaded = (0..offloaded).map(&mut host).collect::<Result<_, E>>()?;
        let mut on_device = |_| stream(Use::SavedActivations, "residual stream");
        let residual = (0..saved.saturating_add(in_turn)).map(&mut on_device).collect::<Result<_, E>>()?;
        let gradient = match sizes.training {
            true => Some(stream(Use::Layer, "gradient of the residual stream")?),
            false => None,
        };
        let window = tokens.min(sizes.window);
        // The matrices that two activations or gradients share.
        let widest = if sizes.training { hidden.max(queries) } else { hidden };
        let middle = new(Use::Layer, "middle of the residual stream", window, widest)?;
        // With halves, queries and attended tokens are in the memory of the feed-forward block.
        let cols = if sizes.halves { queries.max(intermediate) } else { intermediate };
        let [gate, up, activated] = ["gate", "up", "activated"].map(|name| new(Use::Layer, name, window, cols));
        let wide = [gate?, up?, activated?];
        let of_layer = |name, rows, cols| new(Use::Layer, name, rows, cols);
        let shared = Activations::of_layer(model, sizes, &wide, middle.reshaped(window, hidden), of_layer)?;
        let mut keep = |_| {
            let new = |name, rows, cols| new(Use::KeptActivations, name, rows, cols);
            shared.kept(model, sizes, new)
        };
        let kept = (0..sizes.kept).map(&mut keep).collect::<Result<_, E>>()?;
        let [.., activated] = wide.map(|mat| mat.reshaped(window, intermediate));
        let mut layer = |name, rows, cols: u32| new(Use::Layer, name, rows, cols);
        let inputs = if sizes.dropout { intermediate.max(queries).max(hidden) } else { 1 };
        let rank = sizes.rank.max(1);
        Ok(Self {
            residual,
            in_turn,
            offloaded,
            normed: layer("normed", window, hidden)?,
            activated,
            tokens,
            low_rank: layer("low rank", window, rank)?,
            dropped: layer("dropped", window, inputs)?,
            shared,
            kept,
            backward: match gradient {
                None => None,
                Some(residual) => {
                    let normed = layer("gradient of normed", window, widest)?;
                    Some(Backward {
                        residual,
                        attended: normed.reshaped(window, queries),
                        normed: normed.reshaped(window, hidden),
                        queries: middle.reshaped(window, queries),
                        keys: layer("gradient of keys", tokens, keys)?,
                        values: layer("gradient of values", tokens, keys)?,
                        delta: layer("row products", window, heads)?,
                    })
                }
            },
            logits: new(Use::Loss, "logits", window, sizes.chunk)?,
            loss_state: new(Use::Loss, "losses", window, 4)?,
            loss: new(Use::Loss, "loss", 1, 1)?,
        })
    }
}

impl<M> Workspace<M> {
    /// The activations of layer `number` of `layers` layers, and whether it keeps them.
    pub fn activations(&self, number: u32, layers: u32) -> (&Activations<M>, bool) {
        let first = u64::from(layers).saturating_sub(self.kept.len() as u64);
        let kept = u64::from(number).checked_sub(first).and_then(|at| self.kept.get(usize::try_from(at).ok()?));
        kept.map_or((&self.shared, false), |kept| (kept, true))
    }

    /// The residual stream before layer `number`. `number` may be the number of layers.
    pub fn before(&self, number: u32) -> Result<&Residual<M>, OpError> {
        let (expected, found) = (u64::from(number) + 1, self.residual.len() as u64);
        let missing = OpError::Shape { operation: "a pass", what: "the number of residual streams", expected, found };
        self.residual.get(self.slot(number)).ok_or(missing)
    }

    /// The matrix of a residual stream.
    fn slot(&self, number: u32) -> usize {
        let (number, in_turn) = (number as usize, self.in_turn as usize);
        let saved = self.residual.len().saturating_sub(in_turn);
        match number.checked_sub(saved + self.offloaded.len()) {
            Some(later) if in_turn > 0 => saved + later % in_turn,
            _ => number % saved.max(1),
        }
    }

    /// A matrix [tokens of a window, hidden] that no layer needs after a pass, nor between the
    /// gradients of its feed-forward block and of its attention.
    pub fn hidden_scratch(&self) -> &M {
        &self.shared.middle
    }
}

/// Bytes of a workspace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WorkspaceBytes {
    /// The residual streams of all layers.
    pub saved_activations: u64,
    /// The activations of the layers that keep them.
    pub kept_activations: u64,
    /// Residual streams in host memory. They are not part of [`WorkspaceBytes::total`].
    pub host: u64,
    /// Activations of one layer, and their gradients.
    pub layer: u64,
    /// Logits and losses.
    pub loss: u64,
    /// The largest matrix.
    pub largest: u64,
}

impl WorkspaceBytes {
    /// The bytes that [`Memory::new`] reserves.
    pub fn of(model: &ModelConfig, sizes: Sizes) -> Self {
        let mut bytes = Self::default();
        let count = |purpose, _: &'static str, rows: u32, cols: u32| {
            let size = buffer_bytes(rows, cols);
            bytes.largest = bytes.largest.max(size);
            match purpose {
                Use::SavedActivations => bytes.saved_activations = bytes.saved_activations.saturating_add(size),
                Use::KeptActivations => bytes.kept_activations = bytes.kept_activations.saturating_add(size),
                Use::Host => bytes.host = bytes.host.saturating_add(size),
                Use::Layer => bytes.layer = bytes.layer.saturating_add(size),
                Use::Loss => bytes.loss = bytes.loss.saturating_add(size),
            }
            Ok::<_, std::convert::Infallible>(())
        };
        let Ok(_) = Workspace::build(model, sizes, sizes.tokens, count);
        bytes
    }

    /// All bytes of GPU memory.
    pub fn total(&self) -> u64 {
        let kept = self.saved_activations.saturating_add(self.kept_activations);
        kept.saturating_add(self.layer).saturating_add(self.loss)
    }
}

/// Buffers are a multiple of 16 bytes.
fn buffer_bytes(rows: u32, cols: u32) -> u64 {
    mat_bytes(rows, cols).max(1).checked_next_multiple_of(16).unwrap_or(u64::MAX)
}

/// Columns of a chunk of logits in passes of `tokens` tokens, which the head takes in windows.
pub(crate) fn chunk(model: &ModelConfig, tokens: u32) -> u32 {
    let max = (LOGITS_BYTES / (4 * u64::from(tokens.clamp(1, WINDOW)))).min(u64::from(model.vocab)) as u32;
    let aligned = max / CHUNK_ALIGN * CHUNK_ALIGN;
    if aligned == 0 || max == model.vocab { max.max(1) } else { aligned }
}

/// The shapes [outputs, inputs] of the frozen weights that multiply the matrices of a pass: the
/// projections, and the chunks of the head.
pub(crate) fn product_shapes(model: &ModelConfig, tokens: u32) -> Vec<(u32, u32)> {
    let projections = PROJECTIONS.iter().filter_map(|&role| model.rows_of(role));
    let head = (chunk(model, tokens), model.hidden);
    projections.map(|rows| (rows.count, rows.inputs)).chain([head]).collect()
}

/// Reserved memory of a workspace.
#[derive(Debug)]
pub struct Memory {
    sizes: Sizes,
    buffers: Vec<BufferRange>,
}

impl Memory {
    /// Reserves the memory for passes of at most `sizes.tokens` tokens.
    ///
    /// # Errors
    /// [`GpuError::TooLarge`], [`GpuError::OutOfMemory`]; [`GpuError::NoFeature`] if streams are
    /// offloaded on a device without buffers in host memory.
    pub fn new(gpu: &Gpu, model: &ModelConfig, sizes: Sizes) -> Result<Self, GpuError> {
        let mut buffers = Vec::new();
        let reserve = |purpose, name: &'static str, rows: u32, cols: u32| {
            buffers.push(match purpose {
                Use::Host => BufferRange::whole(gpu.host_buffer(name, mat_bytes(rows, cols))?),
                _ => Mat::new(gpu, name, rows, cols)?.range,
            });
            Ok(())
        };
        Workspace::build(model, sizes, sizes.tokens, reserve)?;
        Ok(Self { sizes, buffers })
    }

    /// The sizes that it was reserved for.
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// The matrices for `tokens` tokens.
    ///
    /// # Errors
    /// [`OpError::Shape`] if the memory was reserved for fewer tokens.
    pub(crate) fn workspace(&self, model: &ModelConfig, tokens: u32) -> Result<Workspace<Mat>, OpError> {
        let too_small = |found: u32| {
            let (expected, what) = (self.sizes.tokens.into(), "the number of tokens");
            OpError::Shape { operation: "a pass", what, expected, found: found.into() }
        };
        if tokens > self.sizes.tokens {
            return Err(too_small(tokens));
        }
        let mut buffers = self.buffers.iter();
        let view = |_, _: &'static str, rows: u32, cols: u32| {
            let size = mat_bytes(rows, cols);
            // In the order of `new`, with at most the rows that it reserved.
            buffers.next().map(|range| Mat { range: range.slice(0, size), rows, cols }).ok_or_else(|| too_small(rows))
        };
        Workspace::build(model, Sizes { tokens, ..self.sizes }, self.sizes.tokens, view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::kv_cache::KvCache;

    /// Streams that are needed in float32 later keep their matrix until then, and kept layers take
    /// less memory in f16.
    #[test]
    fn residual_streams_do_not_overwrite_each_other() {
        let model = ModelConfig::parse(&std::fs::read("tests/fixtures/tiny-qwen3/config.json").unwrap(), None).unwrap();
        let model = ModelConfig { layers: 9, ..model };
        let sizes = Sizes {
            tokens: 64,
            rank: 4,
            dropout: false,
            training: true,
            kept: 0,
            offloaded: 0,
            halves: true,
            window: WINDOW,
            chunk: 1,
        };
        for (halves, kept, offloaded) in
            [(true, 0, 0), (true, 0, 7), (true, 1, 0), (true, 4, 3), (true, 9, 5), (false, 4, 3)]
        {
            let sizes = Sizes { kept, offloaded, halves, ..sizes };
            let Streams { saved, offloaded, in_turn } = sizes.streams(model.layers);
            let work = Workspace::build(&model, sizes, 64, |_, _, _, _| Ok::<_, std::convert::Infallible>(())).unwrap();
            assert_eq!(work.residual.len() as u32, saved + in_turn);
            assert!(saved >= 2 || offloaded == 0);
            let slots: Vec<usize> = (0..=model.layers).map(|number| work.slot(number)).collect();
            for (number, pair) in (0..).zip(slots.windows(2)) {
                assert_ne!(pair[0], pair[1], "streams {number} and {}", number + 1);
            }
            // Those on the device until the backward pass.
            let kept_in_halves = if halves { kept } else { 0 };
            let first = offloaded as usize;
            let last = if kept_in_halves > 0 { (model.layers - kept_in_halves) as usize } else { slots.len() };
            for (number, slot) in slots.iter().enumerate().take(last).skip(first) {
                assert!(!slots[number + 1..].contains(slot), "stream {number} of {slots:?}");
            }
        }
        let bytes = |halves| WorkspaceBytes::of(&model, Sizes { kept: 9, halves, ..sizes });
        let (of_halves, of_floats) = (bytes(true), bytes(false));
        assert!(of_halves.kept_activations * 10 < of_floats.kept_activations * 6, "{of_halves:?}, {of_floats:?}");
        assert!(of_halves.saved_activations < of_floats.saved_activations);
    }

    /// The largest sizes that a config.json may have: no product or sum wraps to a small number.
    #[test]
    fn sizes_that_no_u64_holds_saturate() {
        let bytes = std::fs::read("tests/fixtures/tiny-qwen3/config.json").unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        config["head_dim"] = 2.into();
        for key in ["num_attention_heads", "num_key_value_heads"] {
            config[key] = ((1_u32 << 31) - 1).into();
        }
        for key in ["hidden_size", "intermediate_size", "vocab_size"] {
            config[key] = u32::MAX.into();
        }
        let model = ModelConfig::parse(config.to_string().as_bytes(), None).unwrap();
        for training in [false, true] {
            let sizes = Sizes {
                tokens: u32::MAX,
                rank: u32::MAX,
                dropout: true,
                training,
                kept: u32::from(training),
                offloaded: 0,
                halves: training,
                window: WINDOW,
                chunk: chunk(&model, u32::MAX),
            };
            let bytes = WorkspaceBytes::of(&model, sizes);
            assert_eq!((bytes.largest, bytes.total()), (u64::MAX, u64::MAX));
        }
        let many = ModelConfig { layers: u32::MAX, ..model };
        assert_eq!(KvCache::bytes(&many, u32::MAX), u64::MAX);
        assert_eq!(mat_bytes(1 << 31, 1 << 31), u64::MAX);
        assert_eq!(mat_bytes(3, 5), 60);
    }
}

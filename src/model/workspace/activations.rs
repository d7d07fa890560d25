//! The activations of a layer, in float32 and in f16.

use crate::arch::config::ModelConfig;
use crate::arch::family::PROJECTIONS;
use crate::format::Role;
use crate::model::sizes::{Matrix, Sizes};
use crate::ops::{Halves, Mat};

/// The activations of a layer that its gradients are computed from. Those of keys and values have
/// the rows of all tokens, others those of a window unless they are kept.
#[derive(Debug, Clone)]
pub(crate) struct Activations<M> {
    /// heads * head_dim, before the norm per head, if the model has that norm.
    pub raw_queries: Option<M>,
    /// kv_heads * head_dim, before the norm per head, if the model has that norm.
    pub raw_keys: Option<M>,
    /// heads * head_dim.
    pub queries: M,
    /// kv_heads * head_dim.
    pub keys: M,
    /// kv_heads * head_dim.
    pub values: M,
    /// heads * head_dim.
    pub attended: M,
    /// Logarithm of each softmax's denominator: heads.
    pub lse: M,
    /// The residual stream between attention and feed-forward: hidden.
    pub middle: M,
    /// Intermediate.
    pub gate: M,
    /// As `gate`.
    pub up: M,
    /// x A^T of each projection, in the order of `family::PROJECTIONS`: rank.
    pub lows: Vec<M>,
    /// What gradients are computed from, if it is in f16. All matrices above that have a copy here
    /// are then shared by all layers.
    pub halves: Option<HalfActivations<M>>,
}

/// Activations in f16, as [`Halves`] stores them: of a window, or of all tokens if they are kept.
#[derive(Debug, Clone)]
pub(crate) struct HalfActivations<M> {
    /// The input and the middle of a layer that keeps its activations: hidden.
    pub streams: Option<[M; 2]>,
    /// Before the norm per head and the rotation: heads * head_dim.
    pub queries: M,
    /// As `queries`: kv_heads * head_dim.
    pub keys: M,
    /// kv_heads * head_dim.
    pub values: M,
    /// heads * head_dim.
    pub attended: M,
    /// Intermediate.
    pub gate: M,
    /// As `gate`.
    pub up: M,
}

impl<M: Matrix> Activations<M> {
    /// Those that all layers share: each that is not kept has them in turn. Calls `of` for each new
    /// matrix, with its name, rows and columns. `wide` is memory for `gate`, `up` and `activated`.
    pub(super) fn of_layer<E>(
        model: &ModelConfig,
        sizes: Sizes,
        wide: &[M; 3],
        middle: M,
        mut of: impl FnMut(&'static str, u32, u32) -> Result<M, E>,
    ) -> Result<Self, E> {
        let (tokens, queries, keys) = (sizes.tokens, model.queries(), model.keys());
        let window = tokens.min(sizes.window);
        let mut of_heads = |wide: &M, name| match sizes.halves {
            true => Ok(wide.reshaped(window, queries)),
            false => of(name, window, queries),
        };
        let [gate, up, activated] = wide;
        let (queries, attended) = (of_heads(gate, "queries")?, of_heads(activated, "attended")?);
        let raw_queries = model.q_k_norm.then(|| of_heads(up, "raw queries")).transpose()?;
        let raw_keys = model.q_k_norm.then(|| of("raw keys", tokens, keys)).transpose()?;
        let (keys, values) = (of("keys", tokens, keys)?, of("values", tokens, keys)?);
        let lse = of("softmax denominators", window, model.heads)?;
        let lows = Self::lows(sizes, window, &mut of)?;
        let all_kept = sizes.kept >= model.layers;
        let halves = (sizes.halves && !all_kept).then(|| HalfActivations::build(model, window, None, &mut of));
        let [gate, up] = [gate, up].map(|mat| mat.reshaped(window, model.intermediate));
        let halves = halves.transpose()?;
        Ok(Self { raw_queries, raw_keys, queries, keys, values, attended, lse, middle, gate, up, lows, halves })
    }

    /// Those of a layer that keeps them. They share what is cheap to compute again: queries and
    /// keys after the norms of the heads; with halves, all that is not in f16. Calls `of` as
    /// [`Activations::of_layer`] does.
    pub(super) fn kept<E>(
        &self,
        model: &ModelConfig,
        sizes: Sizes,
        mut of: impl FnMut(&'static str, u32, u32) -> Result<M, E>,
    ) -> Result<Self, E> {
        let &ModelConfig { hidden, intermediate, heads, q_k_norm, .. } = model;
        let (tokens, queries, keys) = (sizes.tokens, model.queries(), model.keys());
        let lows = Self::lows(sizes, tokens, &mut of)?;
        let mut new = |name, cols| of(name, tokens, cols);
        let lse = new("softmax denominators", heads)?;
        if sizes.halves {
            let streams = [new("input of a layer", Halves::words(hidden))?, new("middle", Halves::words(hidden))?];
            let halves = Some(HalfActivations::build(model, tokens, Some(streams), &mut of)?);
            return Ok(Self { lse, lows, halves, ..self.clone() });
        }
        let [values, attended] = [new("values", keys)?, new("attended", queries)?];
        let [middle, gate, up] = [("middle of the residual stream", hidden), ("gate", intermediate), ("up", intermediate)]
            .map(|(name, cols)| new(name, cols));
        let of_heads = Self { values, attended, lse, lows, middle: middle?, gate: gate?, up: up?, ..self.clone() };
        Ok(match q_k_norm {
            true => {
                Self { raw_queries: Some(new("raw queries", queries)?), raw_keys: Some(new("raw keys", keys)?), ..of_heads }
            }
            false => Self { queries: new("queries", queries)?, keys: new("keys", keys)?, ..of_heads },
        })
    }

    /// x A^T of each projection. Those of keys and values have a row for each token, others
    /// `window` rows. Without gradients, one for all of them.
    fn lows<E>(sizes: Sizes, window: u32, of: &mut impl FnMut(&'static str, u32, u32) -> Result<M, E>) -> Result<Vec<M>, E> {
        let mut low = |rows| of("low rank", rows, sizes.rank.max(1));
        let rows = |role: &Role| if matches!(role, Role::KProj | Role::VProj) { sizes.tokens } else { window };
        match sizes.training {
            true => PROJECTIONS.iter().map(|role| low(rows(role))).collect(),
            false => Ok(vec![low(window)?; PROJECTIONS.len()]),
        }
    }
}

impl Activations<Mat> {
    /// The rows of `rows` tokens from token `first` on, in a pass of `tokens` tokens.
    pub fn window(&self, tokens: u32, first: u32, rows: u32) -> Self {
        // Those of a window are used by one window after the other.
        let of = |mat: &Mat| if mat.rows == tokens { mat.window(first, rows) } else { mat.narrow(rows, mat.cols) };
        let halves = self.halves.as_ref().map(|halves| HalfActivations {
            streams: halves.streams.as_ref().map(|streams| streams.each_ref().map(of)),
            queries: of(&halves.queries),
            keys: of(&halves.keys),
            values: of(&halves.values),
            attended: of(&halves.attended),
            gate: of(&halves.gate),
            up: of(&halves.up),
        });
        Self {
            raw_queries: self.raw_queries.as_ref().map(of),
            raw_keys: self.raw_keys.as_ref().map(of),
            queries: of(&self.queries),
            keys: of(&self.keys),
            values: of(&self.values),
            attended: of(&self.attended),
            lse: of(&self.lse),
            middle: of(&self.middle),
            gate: of(&self.gate),
            up: of(&self.up),
            lows: self.lows.iter().map(of).collect(),
            halves,
        }
    }
}

impl<M> HalfActivations<M> {
    /// Calls `of` for each matrix, of `rows` rows.
    fn build<E>(
        model: &ModelConfig,
        rows: u32,
        streams: Option<[M; 2]>,
        of: &mut impl FnMut(&'static str, u32, u32) -> Result<M, E>,
    ) -> Result<Self, E> {
        let (queries, keys, intermediate) = (model.queries(), model.keys(), model.intermediate);
        let mut new = |name, cols| of(name, rows, Halves::words(cols));
        Ok(Self {
            streams,
            queries: new("queries in f16", queries)?,
            keys: new("keys in f16", keys)?,
            values: new("values in f16", keys)?,
            attended: new("attended in f16", queries)?,
            gate: new("gate in f16", intermediate)?,
            up: new("up in f16", intermediate)?,
        })
    }
}

//! The KV cache of a text.

use crate::arch::config::ModelConfig;
use crate::gpu::{BufferRange, Commands, Gpu};
use crate::ops::matmul::MAX_ROWS;
use crate::ops::{CachedAttention, CachedAttentionShape, Heads, JoinedHeads, Mat, OpError, SplitHeads, mat_bytes};

/// The keys and values of the tokens of a text, in float32, and the attention over them. Keys are
/// rotated if their layer rotates.
#[derive(Debug)]
pub struct KvCache {
    /// Keys and values of each layer, [capacity, kv_heads * head_dim] each.
    layers: Vec<[Mat; 2]>,
    capacity: u32,
    attention: CachedAttention,
    /// The joined products of q, k and v of few new tokens.
    joined: Mat,
    split: SplitHeads,
}

/// A cache with the tokens before the tokens of a pass.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Past<'a> {
    pub cache: &'a KvCache,
    pub tokens: u32,
}

impl KvCache {
    /// Memory for `capacity` tokens.
    ///
    /// # Errors
    /// [`OpError::Gpu`].
    pub fn new(gpu: &Gpu, model: &ModelConfig, capacity: u32) -> Result<Self, OpError> {
        let mat = |name| Mat::new(gpu, name, capacity, model.keys());
        let layers = (0..model.layers).map(|_| Ok([mat("cached keys")?, mat("cached values")?]));
        let (attention, split) = (CachedAttention::new(gpu, model.head_dim, shared(model))?, SplitHeads::new(gpu)?);
        let joined = Mat::new(gpu, "joined queries, keys and values", MAX_ROWS, joined_columns(model))?;
        Ok(Self { layers: layers.collect::<Result<_, OpError>>()?, capacity, attention, joined, split })
    }

    /// GPU memory of a cache for `capacity` tokens.
    pub fn bytes(model: &ModelConfig, capacity: u32) -> u64 {
        let layers = Self::matrix_bytes(model, capacity).saturating_mul(2 * u64::from(model.layers));
        let joined = mat_bytes(MAX_ROWS, joined_columns(model));
        layers.saturating_add(CachedAttention::scratch_bytes(model.head_dim, shared(model))).saturating_add(joined)
    }

    /// Bytes of the keys or the values of one layer, which a kernel binds at once.
    pub fn matrix_bytes(model: &ModelConfig, capacity: u32) -> u64 {
        mat_bytes(capacity, model.keys())
    }

    /// Maximum tokens.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }
}

impl Past<'_> {
    /// Records the attention of new tokens in layer `number`. Their keys and values are added to
    /// the cache after those of the earlier tokens. `q` and `out` are [tokens, heads * head_dim],
    /// `k` and `v` [tokens, kv_heads * head_dim]. `q` and `k` are rotated if the layer rotates. A
    /// layer with a window attends only to the last tokens of the cache.
    pub fn attend(
        &self,
        commands: &mut Commands,
        model: &ModelConfig,
        number: u32,
        [q, k, v]: [&Mat; 3],
        out: &Mat,
    ) -> Result<(), OpError> {
        self.store(commands, model, number, [k, v])?;
        self.attention(commands, model, number, q, out)
    }

    /// Adds keys and values of new tokens to the cache, as [`Past::attend`] does.
    pub fn store(
        &self,
        commands: &mut Commands,
        model: &ModelConfig,
        number: u32,
        [k, v]: [&Mat; 2],
    ) -> Result<(), OpError> {
        let [keys, values] = self.matrices(model, number, k.rows)?;
        for (new, all) in [(k, keys), (v, values)] {
            commands.copy(&new.range, &rows(all, self.tokens, new.rows));
        }
        Ok(())
    }

    /// As [`Past::attend`], for tokens whose queries, keys and values are in the rows of
    /// [`Past::joined`]: neither normalised nor rotated. `queries` is scratch memory of the shape
    /// of `out`.
    pub fn attend_joined(
        &self,
        commands: &mut Commands,
        model: &ModelConfig,
        number: u32,
        of: Unsplit<'_>,
        [queries, out]: [&Mat; 2],
    ) -> Result<(), OpError> {
        let matrices = self.matrices(model, number, out.rows)?;
        let joined = self.joined(out.rows);
        let heads = attention_heads(model, number);
        let of = JoinedHeads { joined: &joined, heads, past: self.tokens, norms: of.norms, angles: of.angles };
        if self.cache.attention.forward_joined(commands, &of, matrices, out)? {
            return Ok(());
        }
        self.cache.split.record(commands, &of, queries, matrices)?;
        self.attention(commands, model, number, queries, out)
    }

    /// Whether [`Past::joined`] has memory for this number of tokens.
    pub fn fits(&self, tokens: u32) -> bool {
        tokens <= self.cache.joined.rows
    }

    /// Memory for the joined products of q, k and v of `tokens` tokens, which must fit.
    pub fn joined(&self, tokens: u32) -> Mat {
        let joined = &self.cache.joined;
        Mat { range: joined.range.slice(0, mat_bytes(tokens, joined.cols)), rows: tokens, cols: joined.cols }
    }

    /// Keys and values of a layer, which have room for new tokens.
    fn matrices(&self, model: &ModelConfig, number: u32, tokens: u32) -> Result<[&Mat; 2], OpError> {
        let cache = self.cache;
        let shape = |what, expected: u32, found: u64| OpError::Shape {
            operation: "cached keys and values",
            what,
            expected: expected.into(),
            found,
        };
        let found = cache.layers.len() as u64;
        let [keys, values] =
            cache.layers.get(number as usize).ok_or_else(|| shape("the number of layers", model.layers, found))?;
        let end = u64::from(self.tokens) + u64::from(tokens);
        if end > cache.capacity.into() {
            return Err(shape("the number of tokens", cache.capacity, end));
        }
        Ok([keys, values])
    }

    fn attention(
        &self,
        commands: &mut Commands,
        model: &ModelConfig,
        number: u32,
        q: &Mat,
        out: &Mat,
    ) -> Result<(), OpError> {
        let [keys, values] = self.matrices(model, number, q.rows)?;
        let shape = CachedAttentionShape { tokens: q.rows, past: self.tokens, heads: attention_heads(model, number) };
        self.cache.attention.forward(commands, &shape, q, keys, values, out)
    }
}

/// What joined queries and keys lack.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unsplit<'a> {
    /// Gammas of the norms of queries and keys, and their epsilon.
    pub norms: Option<([&'a Mat; 2], f32)>,
    /// Cosines and sines, and the row of the first token.
    pub angles: Option<(&'a Mat, u32)>,
}

/// Query heads that share a key head.
fn shared(model: &ModelConfig) -> u32 {
    model.heads.checked_div(model.kv_heads).unwrap_or(1)
}

/// Columns of queries, keys and values.
fn joined_columns(model: &ModelConfig) -> u32 {
    model.queries().saturating_add(model.keys().saturating_mul(2))
}

/// The heads of layer `number`.
pub(super) fn attention_heads(model: &ModelConfig, number: u32) -> Heads {
    let &ModelConfig { heads, kv_heads, head_dim, .. } = model;
    let (scale, window) = (model.attention_multiplier as f32, model.attention(number).window);
    Heads { heads, kv_heads, head_dim, scale, window }
}

/// Some rows of a matrix.
fn rows(mat: &Mat, first: u32, count: u32) -> BufferRange {
    let row = 4 * u64::from(mat.cols);
    mat.range.slice(u64::from(first) * row, u64::from(count) * row)
}

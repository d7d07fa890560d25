//! The KV cache of a text.

use crate::arch::config::ModelConfig;
use crate::gpu::{BufferRange, Commands, Gpu};
use crate::ops::{CachedAttention, CachedAttentionShape, Heads, Mat, OpError, mat_bytes};

/// The keys and values of the tokens of a text, in float32, and the attention over them. Keys are
/// rotated if their layer rotates.
#[derive(Debug)]
pub struct KvCache {
    /// Keys and values of each layer, [capacity, kv_heads * head_dim] each.
    layers: Vec<[Mat; 2]>,
    capacity: u32,
    attention: CachedAttention,
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
        let attention = CachedAttention::new(gpu, model.head_dim)?;
        Ok(Self { layers: layers.collect::<Result<_, OpError>>()?, capacity, attention })
    }

    /// GPU memory of a cache for `capacity` tokens.
    pub fn bytes(model: &ModelConfig, capacity: u32) -> u64 {
        let layers = Self::matrix_bytes(model, capacity).saturating_mul(2 * u64::from(model.layers));
        layers.saturating_add(CachedAttention::scratch_bytes(model.head_dim))
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
        let Self { cache, tokens: past } = *self;
        let shape = |what, expected: u32, found: u64| OpError::Shape {
            operation: "cached keys and values",
            what,
            expected: expected.into(),
            found,
        };
        let found = cache.layers.len() as u64;
        let [keys, values] =
            cache.layers.get(number as usize).ok_or_else(|| shape("the number of layers", model.layers, found))?;
        let end = u64::from(past) + u64::from(k.rows);
        if end > cache.capacity.into() {
            return Err(shape("the number of tokens", cache.capacity, end));
        }
        for (new, all) in [(k, keys), (v, values)] {
            commands.copy(&new.range, &rows(all, past, new.rows));
        }
        let shape = CachedAttentionShape { tokens: q.rows, past, heads: attention_heads(model, number) };
        cache.attention.forward(commands, &shape, q, keys, values, out)
    }
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

//! Attention of new tokens over a KV cache, for generation. Forward only.

use bytemuck::{Pod, Zeroable};

use super::heads::{Heads, check_head_dim};
use super::{Mat, same};
use crate::gpu::{BufferRange, Commands, Gpu, Kernel, KernelSpec, Shader};
use crate::ops::error::OpError;

/// The sizes of one attention over a KV cache.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CachedAttentionShape {
    /// Number of new tokens. Their keys and values are already in the cache.
    pub tokens: u32,
    /// Number of earlier tokens in the cache. New token `i` attends to the first `past + i + 1`
    /// rows, or to the last `window` of them if there is a window.
    pub past: u32,
    /// The heads.
    pub heads: Heads,
}

/// Attention of the new tokens of one sequence over all of its tokens.
///
/// If tokens and heads give too few workgroups for a GPU, the keys are split into runs
/// ("flash-decoding", Dao et al. 2023). The number of runs depends only on the sizes, so the same
/// inputs give the same bits.
#[derive(Debug, Clone)]
pub struct CachedAttention {
    gpu: Gpu,
    head_dim: u32,
    /// Query heads of a workgroup.
    group: u32,
    /// Partial results of the runs.
    parts: BufferRange,
    attend: Kernel,
    combine: Kernel,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tokens: u32,
    past: u32,
    heads: u32,
    kv_heads: u32,
    splits: u32,
    run: u32,
    scale: f32,
    window: u32,
    first: u32,
    pad: [u32; 3],
}

const OPERATION: &str = "cached attention";
/// Threads per workgroup, and keys per step. As in the shader.
const WORKGROUP: u32 = 128;
/// Number of workgroups from which on keys are not split: a few per core of a large GPU.
const TARGET_WORKGROUPS: u64 = 512;
/// Maximum query heads of a workgroup. As in the shader.
const MAX_GROUP: u32 = 8;
/// Parts of the keys of a step. As in the shader.
const PARTS: u32 = 16;

impl CachedAttention {
    /// Compiles the kernels for heads of `head_dim` elements: a multiple of 4, at most 256.
    /// `shared` query heads share a key head, or a multiple of that. A workgroup reads the keys
    /// once for several of them.
    ///
    /// # Errors
    /// [`OpError::Value`] for any other size; [`OpError::Gpu`] if a kernel does not compile or
    /// memory is exhausted.
    pub fn new(gpu: &Gpu, head_dim: u32, shared: u32) -> Result<Self, OpError> {
        check_head_dim(OPERATION, head_dim)?;
        let group = group(shared);
        // SAFETY: `forward` checks every tensor against `CachedAttentionShape`, and the kernels
        // index by tokens, heads and keys below its counts, keys from `first` on, which is below
        // `past + tokens`; `parts` holds all runs, because only fewer than `TARGET_WORKGROUPS` rows
        // are cut, into as many parts at most; loops end at those counts; workgroup memory is
        // written, with a barrier after it, before it is read.
        let shader = unsafe { Shader::trusted("cached_attention", include_str!("../../shaders/cached_attention.wgsl")) };
        let kernel = |entry| {
            let constants = vec![
                ("HEAD", (head_dim / 4).into()),
                ("GROUP", group.into()),
                ("QUERY", (group * head_dim / 4).into()),
                ("WEIGHTS", (group * WORKGROUP).into()),
                ("HIGHS", (group * PARTS).into()),
            ];
            gpu.kernel(&KernelSpec { shader: shader.clone(), entry, constants })
        };
        let parts = BufferRange::whole(gpu.storage("runs of keys", Self::scratch_bytes(head_dim, shared))?);
        Ok(Self { gpu: gpu.clone(), head_dim, group, parts, attend: kernel("attend")?, combine: kernel("combine")? })
    }

    /// GPU memory of the operation in bytes.
    pub fn scratch_bytes(head_dim: u32, shared: u32) -> u64 {
        // The sums of a head, the highest score and the total, in whole vec4s.
        TARGET_WORKGROUPS * u64::from(group(shared)) * 4 * (u64::from(head_dim) + 4)
    }

    /// Records `out = softmax(scale * q k^T) v`, over the keys that each token attends to.
    ///
    /// `q` (rotated) and `out` are [tokens, heads * head_dim]; `k` (rotated) and `v` are [capacity,
    /// kv_heads * head_dim]; their first `past + tokens` rows are used. `out` must not share a
    /// buffer with an input.
    ///
    /// # Errors
    /// [`OpError::Shape`]; nothing is then recorded.
    pub fn forward(
        &self,
        commands: &mut Commands,
        shape: &CachedAttentionShape,
        q: &Mat,
        k: &Mat,
        v: &Mat,
        out: &Mat,
    ) -> Result<(), OpError> {
        self.check(shape, q, k, v, out)?;
        let &CachedAttentionShape { tokens, past, heads: Heads { heads, kv_heads, head_dim, scale, .. } } = shape;
        let rows = u64::from(tokens) * u64::from(heads);
        if rows == 0 {
            return Ok(());
        }
        let keys = past + tokens;
        let window = shape.heads.window_size();
        let first = (past + 1).saturating_sub(window);
        let units = rows / u64::from(self.group);
        let (splits, run) = runs(keys - first, units);
        let seen = |mat: &Mat| mat.range.slice(0, 4 * u64::from(keys) * u64::from(mat.cols));
        let bindings = [q.range.clone(), seen(k), seen(v), out.range.clone(), self.parts.clone()];
        let params = Params { tokens, past, heads, kv_heads, splits, run, scale, window, first, pad: [0; 3] };
        let bytes = 2 * out.range.size + 2 * 4 * u64::from(keys - first) * u64::from(k.cols);
        let groups = self.gpu.grid(units * u64::from(splits));
        commands.dispatch(&self.attend, &bindings, bytemuck::bytes_of(&params), groups, bytes);
        if splits > 1 {
            let groups = self.gpu.grid((rows * u64::from(head_dim / 4)).div_ceil(WORKGROUP.into()));
            let bytes = out.range.size * u64::from(splits + 1);
            commands.dispatch(&self.combine, &bindings, bytemuck::bytes_of(&params), groups, bytes);
        }
        Ok(())
    }

    fn check(&self, shape: &CachedAttentionShape, q: &Mat, k: &Mat, v: &Mat, out: &Mat) -> Result<(), OpError> {
        let &CachedAttentionShape { tokens, past, heads } = shape;
        heads.check(OPERATION, self.head_dim)?;
        let shared = heads.heads.checked_div(heads.kv_heads).unwrap_or_default();
        let rest = shared.checked_rem(self.group).unwrap_or_default();
        same(OPERATION, "the remainder of the heads of a group", 0, rest.into())?;
        heads.check_queries(OPERATION, tokens, &[q, out])?;
        heads.check_keys(OPERATION, k.rows, &[k, v])?;
        let keys = u64::from(past) + u64::from(tokens);
        same(OPERATION, "the number of cache rows", keys.min(k.rows.into()), keys)
    }
}

/// The largest group of query heads that divides the number of those with the same key head.
fn group(shared: u32) -> u32 {
    (1..=MAX_GROUP).rev().find(|&group| shared.is_multiple_of(group)).filter(|_| shared > 0).unwrap_or(1)
}

/// The number of runs, and the keys per run. `rows` is the number of workgroups for all keys.
fn runs(keys: u32, rows: u64) -> (u32, u32) {
    // At most `TARGET_WORKGROUPS`.
    let max = (TARGET_WORKGROUPS / rows).max(1) as u32;
    let run = keys.div_ceil(max).next_multiple_of(WORKGROUP);
    (keys.div_ceil(run), run)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

    use super::super::testing::{add, assert_close, assert_untouched, dot, gpu, mat, narrow, poisoned, random, wide};
    use super::super::{Attention, AttentionShape};
    use super::*;

    struct Inputs {
        shape: CachedAttentionShape,
        q: Vec<f32>,
        /// Rows in use.
        k: Vec<f32>,
        v: Vec<f32>,
    }

    fn inputs(head_dim: u32, heads: u32, kv_heads: u32, past: u32, tokens: u32) -> Inputs {
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = CachedAttentionShape { tokens, past, heads: Heads { heads, kv_heads, head_dim, scale, window: None } };
        let seed = u64::from(past) << 20 | u64::from(tokens) << 10 | u64::from(head_dim + heads + kv_heads);
        let keys = ((past + tokens) * kv_heads * head_dim) as usize;
        // Scores between about -5 and 5.
        let q = random(seed + 1, (tokens * heads * head_dim) as usize).into_iter().map(|x| 4.0 * x).collect();
        Inputs { shape, q, k: random(seed + 2, keys), v: random(seed + 3, keys) }
    }

    /// Runs with `spare` rows of NaN at the end of the cache.
    fn run(gpu: &Gpu, inputs: &Inputs, spare: u32) -> Vec<f32> {
        let CachedAttentionShape { tokens, past, heads: Heads { heads, kv_heads, head_dim, .. } } = inputs.shape;
        let capacity = past + tokens + spare;
        let cache = |elements: &[f32]| {
            let rest = vec![f32::NAN; (spare * kv_heads * head_dim) as usize];
            mat(gpu, capacity, kv_heads * head_dim, &[elements, &rest].concat())
        };
        let (q, k, v) = (mat(gpu, tokens, heads * head_dim, &inputs.q), cache(&inputs.k), cache(&inputs.v));
        let out = poisoned(gpu, tokens, heads * head_dim);
        let mut commands = gpu.commands("cached attention");
        CachedAttention::new(gpu, head_dim, heads / kv_heads)
            .unwrap()
            .forward(&mut commands, &inputs.shape, &q, &k, &v, &out)
            .unwrap();
        commands.submit().unwrap();
        assert_untouched(gpu, &out);
        out.read(gpu).unwrap()
    }

    /// The reference in f64, one row of one head at a time.
    fn reference(inputs: &Inputs) -> Vec<f32> {
        let CachedAttentionShape { past, heads: Heads { heads, kv_heads, head_dim, scale, window }, .. } = inputs.shape;
        let window = window.map_or(usize::MAX, |window| window as usize);
        let (heads, kv_heads, dim) = (heads as usize, kv_heads as usize, head_dim as usize);
        let (q, k, v) = (wide(&inputs.q), wide(&inputs.k), wide(&inputs.v));
        let key = |t: usize, head: usize| {
            let first = (t * kv_heads + head / (heads / kv_heads)) * dim;
            first..first + dim
        };
        let one = |(row, q): (usize, &[f64])| {
            let end = past as usize + row / heads + 1;
            let seen = end.saturating_sub(window)..end;
            let scores: Vec<f64> = seen.clone().map(|t| f64::from(scale) * dot(q, &k[key(t, row % heads)])).collect();
            let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = scores.iter().map(|s| (s - highest).exp()).sum();
            let mut out = vec![0.0; dim];
            for (t, score) in seen.zip(scores) {
                add(&mut out, (score - highest).exp() / total, &v[key(t, row % heads)]);
            }
            narrow(&out)
        };
        q.chunks(dim).enumerate().flat_map(one).collect()
    }

    fn check(gpu: &Gpu, inputs: &Inputs) {
        let what = format!("{:?}", inputs.shape);
        assert_close(&what, &run(gpu, inputs, 3), &reference(inputs), 1e-5);
    }

    #[test]
    fn new_tokens_see_the_cache_and_those_before_them() {
        let Some(gpu) = gpu() else { return };
        for (head_dim, heads, kv_heads, past, tokens) in [
            (64, 4, 4, 0, 1),
            (64, 4, 2, 0, 7),
            (64, 4, 1, 127, 1),
            (64, 2, 1, 126, 5),
            (64, 6, 2, 130, 3),
            (32, 7, 1, 77, 9),
            (80, 4, 2, 128, 1),
            (80, 6, 3, 301, 3),
            (128, 4, 1, 1000, 1),
            // Runs outside the range of the first token, and enough tokens for one run.
            (128, 2, 1, 120, 20),
            (64, 8, 2, 300, 65),
            // Groups of every size, and two of eight.
            (64, 5, 1, 200, 2),
            (20, 14, 2, 140, 1),
            (256, 16, 2, 130, 2),
            (32, 16, 1, 300, 1),
            (16, 11, 1, 9, 3),
        ] {
            check(&gpu, &inputs(head_dim, heads, kv_heads, past, tokens));
        }
    }

    /// Windows of one key, inside a run, over several runs, and longer than the text.
    #[test]
    fn windows_end_what_a_token_sees() {
        let Some(gpu) = gpu() else { return };
        for (head_dim, heads, kv_heads, past, tokens, windows) in [
            (64, 4, 2, 0, 1, &[1, 2][..]),
            (64, 4, 2, 0, 7, &[1, 3, 6, 7, 8]),
            (64, 4, 1, 127, 1, &[1, 64, 127, 128, 129]),
            (80, 6, 3, 301, 3, &[1, 5, 128, 130, 300, 303, 304]),
            (128, 4, 1, 1000, 1, &[100, 513]),
            // Runs that start before the window of the last token, or end before the window of the
            // first.
            (128, 2, 1, 120, 200, &[9, 127, 140]),
            (64, 8, 2, 300, 65, &[33, 256, 365, u32::MAX]),
        ] {
            for &window in windows {
                let mut inputs = inputs(head_dim, heads, kv_heads, past, tokens);
                inputs.shape.heads.window = Some(window);
                check(&gpu, &inputs);
            }
        }
    }

    /// Keys before all windows are not read, even if they are NaN: a cache may have dropped them.
    #[test]
    fn keys_before_the_window_are_not_read() {
        let Some(gpu) = gpu() else { return };
        let mut inputs = inputs(64, 4, 2, 3000, 2);
        inputs.shape.heads.window = Some(700);
        let expected = run(&gpu, &inputs, 1);
        let before = (3001 - 700) * 128;
        inputs.k[..before].fill(f32::NAN);
        inputs.v[..before].fill(f32::NAN);
        assert!(run(&gpu, &inputs, 1) == expected);
    }

    #[test]
    fn heads_of_any_size_fit() {
        let Some(gpu) = gpu() else { return };
        for head_dim in [4, 20, 252, 256] {
            check(&gpu, &inputs(head_dim, 2, 1, 200, 3));
        }
    }

    #[test]
    fn long_caches_are_cut_into_runs() {
        let Some(gpu) = gpu() else { return };
        check(&gpu, &inputs(16, 1, 1, 99_999, 1));
        check(&gpu, &inputs(64, 4, 2, 5000, 2));
    }

    #[test]
    fn more_workgroups_than_one_dimension_has() {
        let Some(gpu) = gpu() else { return };
        check(&gpu, &inputs(4, 3000, 1, 0, 22));
    }

    #[test]
    fn scores_whose_exponential_overflows_are_exact() {
        let Some(gpu) = gpu() else { return };
        let mut inputs = inputs(64, 2, 1, 500, 2);
        // Small integers: the scores reach several hundred, of either sign, without rounding.
        inputs.q.iter_mut().for_each(|x| *x = 8.0 * x.round());
        inputs.k.iter_mut().for_each(|x| *x = (4.0 * *x).round());
        check(&gpu, &inputs);
    }

    #[test]
    fn runs_hold_every_key_and_their_parts_fit() {
        for keys in [1, 127, 128, 129, 4000, 131_072, u32::MAX - 200] {
            for rows in [1, 3, 32, 511, 512, 513, 1 << 40] {
                let (splits, run) = runs(keys, rows);
                assert!(u64::from(splits) * u64::from(run) >= keys.into() && run.is_multiple_of(WORKGROUP));
                assert!((splits - 1) * run < keys, "an empty run");
                assert!(splits == 1 || u64::from(splits) * rows <= TARGET_WORKGROUPS, "{keys} {rows}");
            }
        }
    }

    /// Without earlier tokens, it equals the attention of training.
    #[test]
    fn it_agrees_with_the_attention_of_training() {
        let Some(gpu) = gpu() else { return };
        let mut inputs = inputs(64, 4, 2, 0, 70);
        inputs.shape.heads.window = Some(50);
        let CachedAttentionShape { tokens, heads: shared, .. } = inputs.shape;
        let shape = AttentionShape { tokens, heads: shared };
        let Heads { heads, kv_heads, head_dim, .. } = shared;
        let (q, k) = (mat(&gpu, tokens, heads * head_dim, &inputs.q), mat(&gpu, tokens, kv_heads * head_dim, &inputs.k));
        let v = mat(&gpu, tokens, kv_heads * head_dim, &inputs.v);
        let starts = BufferRange::whole(gpu.storage_with("starts", &vec![0; 4 * tokens as usize]).unwrap());
        let (out, lse) = (poisoned(&gpu, tokens, heads * head_dim), poisoned(&gpu, tokens, heads));
        let mut commands = gpu.commands("attention");
        let attention = Attention::new(&gpu, head_dim, None).unwrap();
        attention.forward(&mut commands, &shape, &q, &k, &v, &starts, &out, &lse).unwrap();
        commands.submit().unwrap();
        [&out, &lse].into_iter().for_each(|mat| assert_untouched(&gpu, mat));
        assert_close("cached", &run(&gpu, &inputs, 0), &out.read(&gpu).unwrap(), 1e-6);
    }

    #[test]
    fn the_same_inputs_give_the_same_bits() {
        let Some(gpu) = gpu() else { return };
        let inputs = inputs(64, 4, 2, 3000, 1);
        assert!(run(&gpu, &inputs, 1) == run(&gpu, &inputs, 70));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let Some(gpu) = gpu() else { return };
        for head_dim in [0, 6, 260] {
            assert!(matches!(CachedAttention::new(&gpu, head_dim, 1), Err(OpError::Value { .. })), "{head_dim}");
        }
        let attention = CachedAttention::new(&gpu, 64, 2).unwrap();
        let [wide, cache] = [(5, 256), (9, 128)].map(|(rows, cols)| Mat::new(&gpu, "test", rows, cols).unwrap());
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: 64, scale: 0.125, window: Some(1) };
        let shape = CachedAttentionShape { tokens: 5, past: 4, heads };
        let refused = |shape: CachedAttentionShape, k: &Mat, v: &Mat| {
            let result = attention.forward(&mut gpu.commands("test"), &shape, &wide, k, v, &wide);
            matches!(result, Err(OpError::Shape { .. } | OpError::Value { .. }))
        };
        assert!(!refused(shape, &cache, &cache));
        assert!(refused(shape, &wide, &cache));
        assert!(refused(shape, &cache, &wide));
        assert!(refused(CachedAttentionShape { past: 5, ..shape }, &cache, &cache));
        assert!(refused(CachedAttentionShape { past: u32::MAX, ..shape }, &cache, &cache));
        assert!(refused(CachedAttentionShape { tokens: 6, ..shape }, &cache, &cache));
        let refused_heads = |heads| refused(CachedAttentionShape { heads, ..shape }, &cache, &cache);
        assert!(refused_heads(Heads { window: Some(0), ..heads }));
        for (queries, kv_heads) in [(0, 2), (4, 0), (4, 3)] {
            assert!(refused_heads(Heads { heads: queries, kv_heads, ..heads }), "{queries} {kv_heads}");
        }
    }
}

//! Attention of new tokens over a KV cache, for generation. Forward only.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::heads::{Heads, check_head_dim};
use super::split_heads::JoinedHeads;
use super::{Mat, same};
use crate::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};
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
    /// For queries, and keys and values that are in the cache.
    rows: Form,
    /// For a joined token, without and with norms: if a head has an even number of vec4s.
    joined: Option<[Form; 2]>,
}

/// The kernels for a form of the inputs.
#[derive(Debug, Clone)]
struct Form {
    attend: Kernel,
    combine: Kernel,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Default, Pod, Zeroable)]
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
    angles: u32,
    rotated: u32,
    epsilon: f32,
}

const OPERATION: &str = "cached attention";

/// The text of some shader files.
macro_rules! shaders {
    ($($file:literal),*) => { concat!($(include_str!(concat!("../../shaders/", $file, ".wgsl"))),*) };
}

/// Threads per workgroup. As in the shader.
const WORKGROUP: u32 = 128;
/// Keys per step. As in the shader.
const KEYS: u32 = 32;
/// Number of workgroups from which on keys are not split: a few per core of a large GPU. The
/// maximum number of runs in the shader.
const TARGET_WORKGROUPS: u64 = 512;
/// Maximum query heads of a workgroup. As in the shader.
const MAX_GROUP: u32 = 8;

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
        let rows = unsafe { Shader::trusted("cached_attention", shaders!("cached_attention_rows", "cached_attention")) };
        // SAFETY: as above; `forward_joined` checks one joined token, gammas and the table by
        // `JoinedHeads::check`, and that a head has an even number of vec4s; the cache has the row
        // `past` of the token.
        let joined =
            unsafe { Shader::trusted("cached_attention_joined", shaders!("cached_attention", "cached_attention_joined")) };
        let kernel = |shader: &Shader, entry, more: &[(&'static str, f64)]| {
            let mut constants = vec![
                ("HEAD", (head_dim / 4).into()),
                ("GROUP", group.into()),
                ("QUERY", ((group + 1) * head_dim / 4).into()),
                ("DOTS", (group * WORKGROUP).into()),
                ("WEIGHTS", (group * KEYS).into()),
            ];
            constants.extend_from_slice(more);
            gpu.kernel(&KernelSpec { shader: shader.clone(), entry, constants })
        };
        let form = |shader: &Shader, more: &[(&'static str, f64)]| {
            Ok::<_, GpuError>(Form { attend: kernel(shader, "attend", more)?, combine: kernel(shader, "combine", &[])? })
        };
        let parts = BufferRange::whole(gpu.storage("runs of keys", Self::scratch_bytes(head_dim, shared))?);
        let joined_forms = || Ok::<_, GpuError>([form(&joined, &[("NORM", 0.0)])?, form(&joined, &[("NORM", 1.0)])?]);
        let joined = head_dim.is_multiple_of(8).then(joined_forms).transpose()?;
        Ok(Self { gpu: gpu.clone(), head_dim, group, parts, rows: form(&rows, &[])?, joined })
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
        self.record(commands, &self.rows, shape, Params::default(), [q, k, v, out], &[]);
        Ok(())
    }

    /// Records the attention of one token whose queries, key and value are joined: neither
    /// normalised nor rotated. Its key and value are added to the cache. `keys` and `values` are
    /// [capacity, kv_heads * head_dim], `out` is [1, heads * head_dim]. Returns `false` if there
    /// are more tokens, or if a head, or its rotated elements, are not a multiple of 8.
    ///
    /// # Errors
    /// [`OpError::Shape`]; nothing is then recorded.
    pub fn forward_joined(
        &self,
        commands: &mut Commands,
        of: &JoinedHeads<'_>,
        [keys, values]: [&Mat; 2],
        out: &Mat,
    ) -> Result<bool, OpError> {
        let &JoinedHeads { joined, heads, past, norms, angles } = of;
        let whole = angles.is_none_or(|(table, _)| table.cols.is_multiple_of(8));
        let Some([plain, with_norms]) = self.joined.as_ref().filter(|_| joined.rows == 1 && whole) else {
            return Ok(false);
        };
        of.check(OPERATION, [keys, values])?;
        let shape = CachedAttentionShape { tokens: 1, past, heads };
        self.check(&shape, out, keys, values, out)?;
        let (gammas, epsilon) = norms.unwrap_or(([joined; 2], 0.0));
        let (table, row) = angles.unwrap_or((joined, 0));
        let rotated = angles.map_or(0, |(table, _)| table.cols / 8);
        let params = Params { angles: row, rotated, epsilon, ..Params::default() };
        let form = if norms.is_some() { with_norms } else { plain };
        let [query_gamma, key_gamma] = gammas;
        self.record(commands, form, &shape, params, [joined, keys, values, out], &[query_gamma, key_gamma, table]);
        Ok(true)
    }

    /// Records both kernels, with the inputs q, k and v, the output, and further inputs.
    fn record(
        &self,
        commands: &mut Commands,
        form: &Form,
        shape: &CachedAttentionShape,
        params: Params,
        [q, k, v, out]: [&Mat; 4],
        more: &[&Mat],
    ) {
        let &CachedAttentionShape { tokens, past, heads: Heads { heads, kv_heads, scale, .. } } = shape;
        let rows = u64::from(tokens) * u64::from(heads);
        if rows == 0 {
            return;
        }
        let keys = past + tokens;
        let window = shape.heads.window_size();
        let first = (past + 1).saturating_sub(window);
        let units = rows / u64::from(self.group);
        let (splits, run) = runs(keys - first, units);
        let seen = |mat: &Mat| mat.range.slice(0, 4 * u64::from(keys) * u64::from(mat.cols));
        let mut bindings = vec![q.range.clone(), seen(k), seen(v), out.range.clone(), self.parts.clone()];
        bindings.extend(more.iter().map(|mat| mat.range.clone()));
        let params = Params { tokens, past, heads, kv_heads, splits, run, scale, window, first, ..params };
        let bytes = 2 * out.range.size + 2 * 4 * u64::from(keys - first) * u64::from(k.cols);
        let groups = self.gpu.grid(units * u64::from(splits));
        commands.dispatch(&form.attend, &bindings, bytemuck::bytes_of(&params), groups, bytes);
        if splits > 1 {
            let bytes = out.range.size * u64::from(splits + 1);
            commands.dispatch(&form.combine, &bindings, bytemuck::bytes_of(&params), self.gpu.grid(rows), bytes);
        }
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
    let run = keys.div_ceil(max).next_multiple_of(KEYS);
    (keys.div_ceil(run), run)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

    use std::time::{Duration, Instant};

    use super::super::testing::{
        add, assert_close, assert_untouched, dot, gpu, mat, narrow, poisoned, random, random_mat, wide,
    };
    use super::super::{Attention, AttentionShape, SplitHeads, inverse_frequencies};
    use super::*;
    use crate::arch::config::RopeScaling;
    use crate::dequant::copy_baseline::CopyKernel;

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

    /// One joined token equals its split into heads and the attention after it, and only its row of
    /// the cache changes.
    #[test]
    fn a_joined_token_is_split_and_attends() {
        let Some(gpu) = gpu() else { return };
        let split = SplitHeads::new(&gpu).unwrap();
        for (head_dim, heads, kv_heads, past, window, norm, rotated) in [
            (128, 8, 2, 40, None, true, Some(128)),
            (128, 4, 1, 0, None, true, Some(128)),
            (64, 3, 1, 31, None, false, Some(64)),
            (80, 6, 2, 300, Some(70), true, Some(80)),
            (8, 1, 1, 32, None, true, None),
            (256, 16, 1, 70, None, false, None),
            (16, 11, 1, 1000, Some(1), true, Some(16)),
            (128, 2, 1, 9, None, false, Some(96)),
            (80, 2, 2, 70, None, true, Some(24)),
        ] {
            let what = format!("{head_dim} {heads} {kv_heads} {past} {window:?} {norm} {rotated:?}");
            let heads = Heads { heads, kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt(), window };
            let (queries, columns) = (heads.heads * head_dim, kv_heads * head_dim);
            let (joined, _) = random_mat(&gpu, 1, 1, queries + 2 * columns);
            let gammas = [2, 3].map(|seed| random_mat(&gpu, seed, 1, head_dim).0);
            let table = inverse_frequencies(1e4, rotated.unwrap_or(head_dim), &RopeScaling::Default, 1)
                .upload(&gpu, past + 2)
                .unwrap();
            // The row of the token and the rows after it are NaN.
            let caches = || {
                [4, 5].map(|seed| {
                    let mut rows = random(seed, (past * columns) as usize);
                    rows.resize(rows.len() + 3 * columns as usize, f32::NAN);
                    mat(&gpu, past + 3, columns, &rows)
                })
            };
            let (found, expected) = (caches(), caches());
            let [out, q, expected_out] = [0, 1, 2].map(|_| poisoned(&gpu, 1, queries));
            let of = JoinedHeads {
                joined: &joined,
                heads,
                past,
                norms: norm.then_some(([&gammas[0], &gammas[1]], 1e-3)),
                angles: rotated.map(|_| (&table, past + 1)),
            };
            let attention = CachedAttention::new(&gpu, head_dim, heads.heads / kv_heads).unwrap();
            let mut commands = gpu.commands("joined");
            let [keys, values] = &found;
            assert!(attention.forward_joined(&mut commands, &of, [keys, values], &out).unwrap(), "{what}");
            let [keys, values] = &expected;
            split.record(&mut commands, &of, &q, [keys, values]).unwrap();
            let shape = CachedAttentionShape { tokens: 1, past, heads };
            attention.forward(&mut commands, &shape, &q, keys, values, &expected_out).unwrap();
            commands.submit().unwrap();
            assert_close(&what, &out.read(&gpu).unwrap(), &expected_out.read(&gpu).unwrap(), 1e-6);
            for (found, expected) in found.iter().zip(&expected) {
                let (a, b) = (found.read(&gpu).unwrap(), expected.read(&gpu).unwrap());
                let end = ((past + 1) * columns) as usize;
                assert_close(&what, &a[..end], &b[..end], 1e-6);
                assert!(a[end..].iter().all(|x| x.is_nan()), "{what}: other rows are untouched");
                assert_untouched(&gpu, found);
            }
            assert_untouched(&gpu, &out);
        }
    }

    #[test]
    fn several_joined_tokens_and_odd_heads_are_left_to_other_kernels() {
        let Some(gpu) = gpu() else { return };
        let zeros = |rows, cols| Mat::new(&gpu, "test", rows, cols).unwrap();
        for (head_dim, rotated, tokens, past, permitted) in [
            (16, 16, 1, 4, Some(true)),
            (16, 8, 1, 4, Some(true)),
            (16, 12, 1, 4, Some(false)),
            (16, 16, 2, 3, Some(false)),
            (12, 12, 1, 4, Some(false)),
            (16, 24, 1, 4, None),
            (16, 16, 1, 5, None),
        ] {
            let heads = Heads { heads: 2, kv_heads: 1, head_dim, scale: 1.0, window: None };
            let (joined, out) = (zeros(tokens, 4 * head_dim), zeros(tokens, 2 * head_dim));
            let (cache, table) = (zeros(5, head_dim), zeros(3, rotated));
            let of = JoinedHeads { joined: &joined, heads, past, norms: None, angles: Some((&table, 2)) };
            let attention = CachedAttention::new(&gpu, head_dim, 2).unwrap();
            let values = zeros(5, head_dim);
            let result = attention.forward_joined(&mut gpu.commands("test"), &of, [&cache, &values], &out);
            assert_eq!(result.ok(), permitted, "{head_dim} {rotated} {tokens} {past}");
        }
    }

    /// Prints the time of an attention, and that of a joined token. Run by hand on a real GPU, with
    /// `--ignored --nocapture`.
    #[test]
    #[ignore = "a measurement"]
    fn speed() {
        let Some(gpu) = gpu() else { return };
        let attention = CachedAttention::new(&gpu, 128, 4).unwrap();
        let copy = CopyKernel::new(&gpu).unwrap();
        let copied = [0, 1].map(|_| Mat::new(&gpu, "copied", 1 << 13, 1 << 13).unwrap());
        // An idle GPU has a low clock.
        let work = |times: u32| {
            let mut commands = gpu.commands("copies");
            (0..times).for_each(|_| copy.record(&mut commands, &copied[0].range, &copied[1].range).unwrap());
            commands.submit().unwrap();
        };
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(2) {
            work(40);
            gpu.wait().unwrap();
        }
        let (gammas, table) = ([1, 2].map(|seed| random_mat(&gpu, seed, 1, 128).0), random_mat(&gpu, 3, 1, 128).0);
        for (past, tokens) in [(15, 1), (63, 1), (143, 1), (271, 1), (2175, 1), (16_383, 1), (2048, 256)] {
            let heads = Heads { heads: 32, kv_heads: 8, head_dim: 128, scale: 0.1, window: None };
            let shape = CachedAttentionShape { tokens, past, heads };
            let (q, out) = (random_mat(&gpu, 1, tokens, 4096).0, poisoned(&gpu, tokens, 4096));
            let joined = random_mat(&gpu, 1, tokens, 6144).0;
            // More than a cache holds.
            let sets = (64 << 20) / (4096 * (past + tokens)) + 2;
            let caches: Vec<[Mat; 2]> =
                (0..sets.min(200)).map(|_| [0, 1].map(|_| Mat::new(&gpu, "cache", past + tokens, 1024).unwrap())).collect();
            let best = |record: &dyn Fn(&mut Commands, [&Mat; 2])| {
                let seconds = (0..8).map(|_| {
                    let mut commands = gpu.commands("speed");
                    caches.iter().for_each(|cache| record(&mut commands, cache.each_ref()));
                    work(20);
                    commands.submit_timed().unwrap().elapsed(&gpu).unwrap().as_secs_f64() / caches.len() as f64
                });
                1e6 * seconds.fold(f64::INFINITY, f64::min)
            };
            let plain = best(&|commands, [k, v]| attention.forward(commands, &shape, &q, k, v, &out).unwrap());
            println!("{tokens} after {past}: {plain:.2} us");
            if tokens == 1 {
                let norms = Some((gammas.each_ref(), 1e-6));
                let of = JoinedHeads { joined: &joined, heads, past, norms, angles: Some((&table, 0)) };
                let joined = best(&|commands, cache| assert!(attention.forward_joined(commands, &of, cache, &out).unwrap()));
                println!("{tokens} after {past}, joined: {joined:.2} us");
            }
        }
    }

    #[test]
    fn runs_hold_every_key_and_their_parts_fit() {
        for keys in [1, 127, 128, 129, 4000, 131_072, u32::MAX - 200] {
            for rows in [1, 3, 32, 511, 512, 513, 1 << 40] {
                let (splits, run) = runs(keys, rows);
                assert!(u64::from(splits) * u64::from(run) >= keys.into() && run.is_multiple_of(KEYS));
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
        let shape = AttentionShape { first: 0, tokens, heads: shared };
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

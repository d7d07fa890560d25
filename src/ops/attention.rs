//! Causal grouped-query attention with an online softmax: memory grows with the tokens, not with
//! their square. Forward and backward follow FlashAttention-2 (Dao 2023, "FlashAttention-2: Faster
//! Attention with Better Parallelism and Work Partitioning"): a tile of queries meets one tile of
//! keys after the other and keeps the running maximum and sum of each row; the backward pass
//! computes the probabilities again from the stored log-sum-exp (`lse`) and from `delta`, the sums
//! of output times its gradient.

use bytemuck::{Pod, Zeroable};

use super::{Mat, same};
use crate::gpu::{BufferRange, Commands, Gpu, Kernel, KernelSpec, Shader};
use crate::ops::error::OpError;

/// The sizes of one attention.
///
/// Tokens lie one after the other, sample behind sample; a token sees those of its own sample up to itself, and of them only the last
/// `window` where there is a window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Tokens, of all samples.
    pub tokens: u32,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: u32,
    /// Key and value heads: query head `h` uses the one of number `h / (heads / kv_heads)`.
    pub kv_heads: u32,
    /// Elements of a head.
    pub head_dim: u32,
    /// What the products of queries and keys are multiplied by: 1 / sqrt(head_dim) in most models.
    pub scale: f32,
    /// Tokens that a token sees at most, itself among them; `None`: all of its sample up to itself.
    pub window: Option<u32>,
}

/// How a workgroup's work is cut; constants of the shader. A thread has 4 rows and 4 columns of a tile.
#[derive(Debug, Clone, Copy)]
struct Tiling {
    /// Threads along the columns of a tile.
    columns: u32,
    /// Threads along its rows: at least `columns`, and a divisor of 4 times `columns`.
    rows: u32,
}

impl Tiling {
    /// 15,872 bytes of workgroup memory, of the 16,384 that every device has.
    const DEFAULT: Self = Self { columns: 8, rows: 16 };

    /// Tokens of a block of rows.
    fn block(self) -> u32 {
        4 * self.rows
    }

    /// Columns whose values the threads carry at once, as many vec4s as of a product's columns: a power of two, 4 at least.
    fn values(self, head_vecs: u32) -> u32 {
        let block = 4 * self.columns;
        let room = block * self.columns / head_vecs.next_multiple_of(self.columns);
        (1 << room.max(4).ilog2()).min(block)
    }
}

/// The largest head: the shader's `4 * MAX_PARTS` elements for each thread along the columns.
const MAX_HEAD_DIM: u32 = 32 * Tiling::DEFAULT.columns;
const _: () = assert!(MAX_HEAD_DIM == crate::arch::MAX_HEAD_DIM, "packs are judged by it");

/// Causal attention with query heads that share key and value heads, forward and backward.
///
/// All that a call writes lies in buffers of its own, apart from what it reads. Sums have a fixed order: the same inputs give the
/// same bits.
#[derive(Debug, Clone)]
pub struct Attention {
    gpu: Gpu,
    head_dim: u32,
    tiling: Tiling,
    forward: Kernel,
    row_products: Kernel,
    query_gradient: Kernel,
    key_gradient: Kernel,
    value_gradient: Kernel,
}

/// Parameters of a dispatch; those of `struct Params` in the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    scale: f32,
    window: u32,
    pad: [u32; 3],
}

impl Attention {
    /// The kernels for heads of `head_dim` elements: a multiple of 4, at most 256.
    ///
    /// # Errors
    /// [`OpError::Shape`] for any other size; [`OpError::Gpu`] where a kernel does not compile.
    pub fn new(gpu: &Gpu, head_dim: u32) -> Result<Self, OpError> {
        check_head_dim(OPERATION, head_dim)?;
        Self::with(gpu, head_dim, Tiling::DEFAULT)
    }

    fn with(gpu: &Gpu, head_dim: u32, tiling: Tiling) -> Result<Self, OpError> {
        // SAFETY: `forward` and `backward` hold every tensor against `AttentionShape`, and the kernels index by tokens and heads
        // below its counts; what `starts` holds only ends loops early, and all of them end at `tokens`; workgroup memory is
        // written, with a barrier after it, before it is read.
        let shader = unsafe { Shader::trusted("attention", include_str!("../../shaders/attention.wgsl")) };
        let kernel = |entry| {
            let constants = vec![
                ("HEAD", f64::from(head_dim / 4)),
                ("TX", tiling.columns.into()),
                ("TY", tiling.rows.into()),
                ("VALUES", tiling.values(head_dim / 4).into()),
            ];
            gpu.kernel(&KernelSpec { shader: shader.clone(), entry, constants })
        };
        Ok(Self {
            gpu: gpu.clone(),
            head_dim,
            tiling,
            forward: kernel("forward")?,
            row_products: kernel("row_products")?,
            query_gradient: kernel("query_gradient")?,
            key_gradient: kernel("key_gradient")?,
            value_gradient: kernel("value_gradient")?,
        })
    }

    /// `out = softmax(scale * q k^T) v`, over the tokens that each token sees.
    ///
    /// `q` and `out` are [tokens, heads * head_dim], `k` and `v` [tokens, kv_heads * head_dim]; `starts` has a u32 a token: the
    /// first token of its sample. `lse`, [tokens, heads], receives the logarithm of each softmax's denominator, for the backward.
    ///
    /// # Errors
    /// [`OpError::Shape`]: nothing is then recorded.
    #[allow(clippy::too_many_arguments, reason = "the tensors of attention")]
    pub fn forward(
        &self,
        commands: &mut Commands,
        shape: &AttentionShape,
        q: &Mat,
        k: &Mat,
        v: &Mat,
        starts: &BufferRange,
        out: &Mat,
        lse: &Mat,
    ) -> Result<(), OpError> {
        self.check(shape, &[q, out], &[k, v], &[lse], starts)?;
        // The kernel's module names a second tensor of rows, which it does not read, and `delta`, which it has not.
        let roles = Roles { rows: [q, q], columns: [k, v], starts, lse, delta: lse, out, row_sums: lse };
        self.dispatch(commands, &self.forward, shape, shape.heads, &roles);
        Ok(())
    }

    /// The gradients `dq`, `dk` and `dv` (shaped as q, k and v; they are overwritten) for the gradient `d_out` of the output.
    ///
    /// `out` and `lse` are what [`Attention::forward`] wrote. `delta`, [tokens, heads], is overwritten: it holds the sums of
    /// `d_out * out` over each head.
    ///
    /// # Errors
    /// [`OpError::Shape`]: nothing is then recorded.
    #[allow(clippy::too_many_arguments, reason = "the tensors of attention")]
    pub fn backward(
        &self,
        commands: &mut Commands,
        shape: &AttentionShape,
        q: &Mat,
        k: &Mat,
        v: &Mat,
        starts: &BufferRange,
        out: &Mat,
        lse: &Mat,
        d_out: &Mat,
        delta: &Mat,
        dq: &Mat,
        dk: &Mat,
        dv: &Mat,
    ) -> Result<(), OpError> {
        self.check(shape, &[q, out, d_out, dq], &[k, v, dk, dv], &[lse, delta], starts)?;
        let by_query = Roles { rows: [q, d_out], columns: [k, v], starts, lse, delta, out: dq, row_sums: delta };
        let by_key = Roles { rows: [k, v], columns: [q, d_out], out: dk, ..by_query };
        self.sum_rows(commands, shape, out, d_out, &by_query);
        self.dispatch(commands, &self.query_gradient, shape, shape.heads, &by_query);
        self.dispatch(commands, &self.key_gradient, shape, shape.kv_heads, &by_key);
        self.dispatch(commands, &self.value_gradient, shape, shape.kv_heads, &Roles { out: dv, ..by_key });
        Ok(())
    }

    fn check(
        &self,
        shape: &AttentionShape,
        of_queries: &[&Mat],
        of_keys: &[&Mat],
        of_rows: &[&Mat],
        starts: &BufferRange,
    ) -> Result<(), OpError> {
        let &AttentionShape { tokens, heads, kv_heads, head_dim, window, .. } = shape;
        same(OPERATION, "the size of a head", self.head_dim.into(), head_dim.into())?;
        check_heads(OPERATION, heads, kv_heads)?;
        check_window(OPERATION, window)?;
        let columns = |heads: u32| heads.saturating_mul(head_dim);
        of_queries.iter().try_for_each(|mat| mat.check(OPERATION, tokens, columns(heads)))?;
        of_keys.iter().try_for_each(|mat| mat.check(OPERATION, tokens, columns(kv_heads)))?;
        of_rows.iter().try_for_each(|mat| mat.check(OPERATION, tokens, heads))?;
        let bytes = 4 * u64::from(tokens);
        same(OPERATION, "the size of the samples' starts", bytes, starts.size.min(bytes))
    }

    /// One of the kernels that walk over blocks: a workgroup for every block of rows of every head.
    fn dispatch(&self, commands: &mut Commands, kernel: &Kernel, shape: &AttentionShape, heads: u32, roles: &Roles<'_>) {
        let blocks = shape.tokens.div_ceil(self.tiling.block());
        if blocks > 0 {
            let least = roles.bytes();
            commands.dispatch(kernel, &roles.bindings(), bytemuck::bytes_of(&params(shape)), [heads, blocks, 1], least);
        }
    }

    /// `delta`: the sums of out * d_out.
    fn sum_rows(&self, commands: &mut Commands, shape: &AttentionShape, out: &Mat, d_out: &Mat, roles: &Roles<'_>) {
        let rows = u64::from(shape.tokens) * u64::from(shape.heads);
        if rows > 0 {
            let groups = self.gpu.grid(rows.div_ceil(self.tiling.rows.into()));
            let roles = Roles { rows: [out, d_out], ..*roles };
            let least = out.range.size + d_out.range.size;
            commands.dispatch(&self.row_products, &roles.bindings(), bytemuck::bytes_of(&params(shape)), groups, least);
        }
    }
}

const OPERATION: &str = "attention";

/// Holds the size of a head against what the kernels of attention take: a multiple of 4, at most 256.
pub(super) fn check_head_dim(operation: &'static str, head_dim: u32) -> Result<(), OpError> {
    let expected = head_dim.clamp(4, MAX_HEAD_DIM).next_multiple_of(4);
    same(operation, "the size of a head", expected.into(), head_dim.into())
}

/// Holds the numbers of heads against each other: those of queries are a multiple of those of keys, and none is zero.
pub(super) fn check_heads(operation: &'static str, heads: u32, kv_heads: u32) -> Result<(), OpError> {
    let left_over = heads.checked_rem(kv_heads).map_or(1, |rest| u64::from(rest) + u64::from(heads == 0));
    same(operation, "heads left over by kv_heads", 0, left_over)
}

/// Refuses a window in which a token does not see itself.
pub(super) fn check_window(operation: &'static str, window: Option<u32>) -> Result<(), OpError> {
    let window = window.unwrap_or(NO_WINDOW);
    same(operation, "the tokens of a window", window.max(1).into(), window.into())
}

/// The window of the kernels that holds every token.
pub(super) const NO_WINDOW: u32 = u32::MAX;

fn params(shape: &AttentionShape) -> Params {
    let &AttentionShape { tokens, heads, kv_heads, scale, window, .. } = shape;
    Params { tokens, heads, kv_heads, scale, window: window.unwrap_or(NO_WINDOW), pad: [0; 3] }
}

/// Which tensor is what to a kernel: the bindings of the shader, in their order.
#[derive(Clone, Copy)]
struct Roles<'a> {
    rows: [&'a Mat; 2],
    columns: [&'a Mat; 2],
    starts: &'a BufferRange,
    lse: &'a Mat,
    delta: &'a Mat,
    out: &'a Mat,
    row_sums: &'a Mat,
}

impl Roles<'_> {
    fn bindings(&self) -> [BufferRange; 9] {
        let [row_a, row_b] = self.rows;
        let [column_a, column_b] = self.columns;
        let range = |mat: &Mat| mat.range.clone();
        [
            range(row_a),
            range(row_b),
            range(column_a),
            range(column_b),
            self.starts.clone(),
            range(self.lse),
            range(self.delta),
            range(self.out),
            range(self.row_sums),
        ]
    }

    /// What every kernel must at least move.
    fn bytes(&self) -> u64 {
        let [row_a, row_b] = self.rows;
        let [column_a, column_b] = self.columns;
        [row_a, row_b, column_a, column_b, self.out].iter().map(|mat| mat.range.size).sum()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

    use std::sync::OnceLock;

    use super::super::testing::{assert_close, assert_gradient, assert_untouched, gpu, poisoned, random, wide};
    use super::*;

    /// One device for all tests: software drivers take seconds to compile the kernels.
    fn device() -> Option<Gpu> {
        static DEVICE: OnceLock<Option<Gpu>> = OnceLock::new();
        DEVICE.get_or_init(gpu).clone()
    }

    /// Inputs, and the gradient of the output.
    #[derive(Clone)]
    struct Inputs {
        shape: AttentionShape,
        starts: Vec<u32>,
        q: Vec<f32>,
        k: Vec<f32>,
        v: Vec<f32>,
        d_out: Vec<f32>,
    }

    /// What the kernels wrote.
    #[derive(PartialEq)]
    struct Outputs {
        out: Vec<f32>,
        lse: Vec<f32>,
        dq: Vec<f32>,
        dk: Vec<f32>,
        dv: Vec<f32>,
    }

    /// The same with a window.
    fn windowed(inputs: Inputs, window: u32) -> Inputs {
        Inputs { shape: AttentionShape { window: Some(window), ..inputs.shape }, ..inputs }
    }

    /// Samples of these lengths.
    fn inputs(head_dim: u32, heads: u32, kv_heads: u32, lengths: &[u32]) -> Inputs {
        let tokens: u32 = lengths.iter().sum();
        let mut starts = Vec::new();
        for &length in lengths {
            starts.resize(starts.len() + length as usize, starts.len() as u32);
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape { tokens, heads, kv_heads, head_dim, scale, window: None };
        let seed = u64::from(tokens) << 16 | u64::from(head_dim * heads + kv_heads);
        let (wide, narrow) = ((tokens * heads * head_dim) as usize, (tokens * kv_heads * head_dim) as usize);
        // Scores between -5 and 5 or so.
        let q = random(seed + 1, wide).into_iter().map(|x| 4.0 * x).collect();
        let (k, v) = (random(seed + 2, narrow), random(seed + 3, narrow));
        Inputs { shape, starts, q, k, v, d_out: random(seed + 4, wide) }
    }

    fn run(gpu: &Gpu, inputs: &Inputs) -> Outputs {
        run_on(&Attention::new(gpu, inputs.shape.head_dim).unwrap(), gpu, inputs)
    }

    fn run_on(attention: &Attention, gpu: &Gpu, inputs: &Inputs) -> Outputs {
        let &AttentionShape { tokens, heads, kv_heads, head_dim, .. } = &inputs.shape;
        let mat = |heads, elements| Mat::from_slice(gpu, "input", tokens, heads * head_dim, elements).unwrap();
        let empty = |cols| poisoned(gpu, tokens, cols);
        let (q, d_out) = (mat(heads, &inputs.q), mat(heads, &inputs.d_out));
        let (k, v) = (mat(kv_heads, &inputs.k), mat(kv_heads, &inputs.v));
        let starts = BufferRange::whole(gpu.storage_with("starts", bytemuck::cast_slice(&inputs.starts)).unwrap());
        let (out, lse, delta) = (empty(heads * head_dim), empty(heads), empty(heads));
        let (dq, dk, dv) = (empty(heads * head_dim), empty(kv_heads * head_dim), empty(kv_heads * head_dim));
        let mut commands = gpu.commands("attention");
        attention.forward(&mut commands, &inputs.shape, &q, &k, &v, &starts, &out, &lse).unwrap();
        let shape = &inputs.shape;
        attention.backward(&mut commands, shape, &q, &k, &v, &starts, &out, &lse, &d_out, &delta, &dq, &dk, &dv).unwrap();
        commands.submit().unwrap();
        [&out, &lse, &delta, &dq, &dk, &dv].into_iter().for_each(|mat| assert_untouched(gpu, mat));
        let read = |mat: &Mat| mat.read(gpu).unwrap();
        Outputs { out: read(&out), lse: read(&lse), dq: read(&dq), dk: read(&dk), dv: read(&dv) }
    }

    /// The same in f64, one row of one head at a time: out, lse, dq, dk, dv.
    fn reference(shape: &AttentionShape, starts: &[u32], q: &[f64], k: &[f64], v: &[f64], d_out: &[f64]) -> [Vec<f64>; 5] {
        let (heads, kv_heads, dim) = (shape.heads as usize, shape.kv_heads as usize, shape.head_dim as usize);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let add = |to: &mut [f64], factor: f64, from: &[f64]| to.iter_mut().zip(from).for_each(|(t, f)| *t += factor * f);
        let (mut out, mut lse) = (vec![0.0; q.len()], Vec::new());
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; k.len()]);
        for (row, &start) in (0..starts.len() * heads).map(|row| (row, &starts[row / heads])) {
            let (token, own) = (row / heads, row * dim..(row + 1) * dim);
            let key = |t: usize| {
                let first = (t * kv_heads + row % heads / (heads / kv_heads)) * dim;
                first..first + dim
            };
            let window = shape.window.map_or(usize::MAX, |window| window as usize);
            let seen = (start as usize).max((token + 1).saturating_sub(window))..token + 1;
            let scores: Vec<f64> = seen.clone().map(|t| f64::from(shape.scale) * dot(&q[own.clone()], &k[key(t)])).collect();
            let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            lse.push(highest + scores.iter().map(|s| (s - highest).exp()).sum::<f64>().ln());
            let weights: Vec<f64> = scores.iter().map(|s| (s - lse[row]).exp()).collect();
            seen.clone().zip(&weights).for_each(|(t, &w)| add(&mut out[own.clone()], w, &v[key(t)]));
            let delta = dot(&d_out[own.clone()], &out[own.clone()]);
            for (t, &w) in seen.zip(&weights) {
                add(&mut dv[key(t)], w, &d_out[own.clone()]);
                let slope = f64::from(shape.scale) * w * (dot(&d_out[own.clone()], &v[key(t)]) - delta);
                add(&mut dq[own.clone()], slope, &k[key(t)]);
                add(&mut dk[key(t)], slope, &q[own.clone()]);
            }
        }
        [out, lse, dq, dk, dv]
    }

    fn assert_matches(found: &Outputs, inputs: &Inputs) {
        let Inputs { shape, starts, q, k, v, d_out } = inputs;
        let expected = reference(shape, starts, &wide(q), &wide(k), &wide(v), &wide(d_out));
        let found = [("out", &found.out), ("lse", &found.lse), ("dq", &found.dq), ("dk", &found.dk), ("dv", &found.dv)];
        for ((name, found), expected) in found.into_iter().zip(expected) {
            // One token sees only itself: the gradients of its score are 0, and rounding is all there is.
            let scale = if expected.iter().all(|x| x.abs() < 1e-12) { 1.0 } else { 0.0 };
            let shifted = |x: f64| (x + scale) as f32;
            let found: Vec<f32> = found.iter().map(|&x| shifted(x.into())).collect();
            let expected: Vec<f32> = expected.into_iter().map(shifted).collect();
            assert_close(&format!("{name} of {shape:?}"), &found, &expected, 1e-5);
        }
    }

    #[test]
    fn outputs_and_gradients_are_the_reference_s() {
        let Some(gpu) = device() else { return };
        for (head_dim, heads, kv_heads, lengths) in [
            (64, 4, 4, &[1][..]),
            (64, 4, 2, &[5]),
            (64, 4, 1, &[7, 90, 33]),
            (64, 6, 2, &[33, 1, 70]),
            (32, 7, 1, &[5, 66, 2]),
            (80, 2, 2, &[33]),
            (80, 4, 2, &[130]),
            (128, 4, 2, &[1, 33, 64, 5, 27]),
            (128, 4, 1, &[130]),
        ] {
            let inputs = inputs(head_dim, heads, kv_heads, lengths);
            assert_matches(&run(&gpu, &inputs), &inputs);
        }
    }

    /// Windows of one token, of less than a tile, of several, at the edge of a tile, and of more than a sample has.
    #[test]
    fn windows_end_what_a_token_sees() {
        let Some(gpu) = device() else { return };
        for (head_dim, heads, kv_heads, lengths, windows) in [
            (64, 4, 2, &[5][..], &[1, 3][..]),
            (64, 4, 1, &[7, 90, 33], &[1, 2, 33, 34]),
            (64, 6, 2, &[300, 1, 70], &[31, 32, 33, 63, 64, 65, 129, 256]),
            (80, 4, 2, &[133], &[7, 100, 132, 133, 134]),
            (128, 4, 1, &[70, 130], &[5, 97]),
        ] {
            for &window in windows {
                let inputs = windowed(inputs(head_dim, heads, kv_heads, lengths), window);
                assert_matches(&run(&gpu, &inputs), &inputs);
            }
        }
    }

    /// A window that holds the longest sample gives the bits that no window gives.
    #[test]
    fn a_wide_window_changes_nothing() {
        let Some(gpu) = device() else { return };
        let inputs = inputs(64, 4, 2, &[7, 90, 33]);
        let expected = run(&gpu, &inputs);
        for window in [90, 91, u32::MAX] {
            assert!(run(&gpu, &windowed(inputs.clone(), window)) == expected, "{window}");
        }
    }

    /// Of a long sample a narrow window leaves most tiles out: what lies there is not read, be it NaN.
    #[test]
    fn tiles_outside_of_the_window_are_left_out() {
        let Some(gpu) = device() else { return };
        let inputs = windowed(inputs(64, 2, 1, &[400]), 40);
        let expected = run(&gpu, &inputs);
        // A block of queries begins at 320, and sees keys from 281 on.
        let mut late = inputs.clone();
        late.k[..280 * 64].fill(f32::NAN);
        late.v[..280 * 64].fill(f32::NAN);
        let found = run(&gpu, &late);
        assert!(found.out[320 * 128..] == expected.out[320 * 128..]);
        assert!(found.dq[320 * 128..] == expected.dq[320 * 128..]);
        // The first block of keys ends at 64, and is seen by queries up to 102: the tile with the last of them ends at 128.
        let mut early = inputs;
        early.q[128 * 128..].fill(f32::NAN);
        early.d_out[128 * 128..].fill(f32::NAN);
        let found = run(&gpu, &early);
        assert!(found.dk[..64 * 64] == expected.dk[..64 * 64]);
        assert!(found.dv[..64 * 64] == expected.dv[..64 * 64]);
    }

    #[test]
    fn heads_of_any_size_fit() {
        let Some(gpu) = device() else { return };
        for head_dim in [4, 256] {
            let inputs = inputs(head_dim, 2, 1, &[3, 67]);
            assert_matches(&run(&gpu, &inputs), &inputs);
        }
    }

    #[test]
    fn tiles_of_another_size_fit() {
        let Some(gpu) = device() else { return };
        let inputs = inputs(20, 2, 1, &[3, 133]);
        let attention = Attention::with(&gpu, 20, Tiling { columns: 4, rows: 8 }).unwrap();
        for inputs in [windowed(inputs.clone(), 21), inputs] {
            assert_matches(&run_on(&attention, &gpu, &inputs), &inputs);
        }
    }

    #[test]
    fn scores_whose_exponential_overflows_are_exact() {
        let Some(gpu) = device() else { return };
        let mut inputs = inputs(64, 2, 1, &[40, 30]);
        // Small integers: no rounding in the scores, which reach several hundreds.
        inputs.q.iter_mut().for_each(|x| *x = 8.0 * x.round());
        inputs.k.iter_mut().for_each(|x| *x = (4.0 * *x).round());
        let found = run(&gpu, &inputs);
        assert!(found.lse.iter().any(|&x| x > 100.0));
        assert_matches(&found, &inputs);
    }

    #[test]
    fn the_reference_s_gradients_are_its_differences() {
        let Inputs { shape, starts, q, k, v, d_out } = windowed(inputs(4, 2, 1, &[2, 3]), 2);
        let (q, k, v, d_out) = (wide(&q), wide(&k), wide(&v), wide(&d_out));
        let [_, _, dq, dk, dv] = reference(&shape, &starts, &q, &k, &v, &d_out);
        let loss = |q: &[f64], k: &[f64], v: &[f64]| {
            let [out, ..] = reference(&shape, &starts, q, k, v, &d_out);
            out.iter().zip(&d_out).map(|(o, d)| o * d).sum()
        };
        assert_gradient("dq", &q, &dq, 1e-5, |q| loss(q, &k, &v));
        assert_gradient("dk", &k, &dk, 1e-5, |k| loss(&q, k, &v));
        assert_gradient("dv", &v, &dv, 1e-5, |v| loss(&q, &k, v));
    }

    #[test]
    fn the_same_inputs_give_the_same_bits() {
        let Some(gpu) = device() else { return };
        let inputs = inputs(64, 4, 2, &[7, 90, 33]);
        assert!(run(&gpu, &inputs) == run(&gpu, &inputs));
    }

    #[test]
    fn a_sample_changes_nothing_in_the_others() {
        let Some(gpu) = device() else { return };
        let inputs = inputs(64, 4, 2, &[40, 37, 53]);
        let mut changed = inputs.clone();
        let tokens = 40..77;
        let of = |heads: usize| tokens.start * heads * 64..tokens.end * heads * 64;
        for (elements, heads) in [(&mut changed.q, 4), (&mut changed.k, 2), (&mut changed.v, 2), (&mut changed.d_out, 4)] {
            elements[of(heads)].iter_mut().for_each(|x| *x = 3.0 - *x);
        }
        let (before, after) = (run(&gpu, &inputs), run(&gpu, &changed));
        for (name, before, after) in [
            ("out", before.out, after.out),
            ("lse", before.lse, after.lse),
            ("dq", before.dq, after.dq),
            ("dk", before.dk, after.dk),
            ("dv", before.dv, after.dv),
        ] {
            let cols = before.len() / 130;
            let own = tokens.start * cols..tokens.end * cols;
            assert!(before[..own.start] == after[..own.start], "{name} of the sample before");
            assert!(before[own.end..] == after[own.end..], "{name} of the sample after");
            assert!(before[own.clone()] != after[own], "{name} of the sample itself");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let Some(gpu) = device() else { return };
        for head_dim in [0, 6, 260] {
            assert!(matches!(Attention::new(&gpu, head_dim), Err(OpError::Shape { .. })), "{head_dim}");
        }
        let attention = Attention::new(&gpu, 64).unwrap();
        let [wide, narrow, sums] = [256, 128, 4].map(|cols| Mat::new(&gpu, "test", 5, cols).unwrap());
        let range = |bytes| BufferRange { buffer: gpu.storage("starts", 32).unwrap(), offset: 0, size: bytes };
        let shape = AttentionShape { tokens: 5, heads: 4, kv_heads: 2, head_dim: 64, scale: 0.125, window: Some(1) };
        let forward = |shape: AttentionShape, k: &Mat, lse: &Mat, starts: u64| {
            let mut commands = gpu.commands("test");
            let result = attention.forward(&mut commands, &shape, &wide, k, &narrow, &range(starts), &wide, lse);
            matches!(result, Err(OpError::Shape { .. }))
        };
        assert!(!forward(shape, &narrow, &sums, 20));
        assert!(forward(shape, &wide, &sums, 20));
        assert!(forward(shape, &narrow, &wide, 20));
        assert!(forward(shape, &narrow, &sums, 16));
        assert!(forward(AttentionShape { tokens: 6, ..shape }, &narrow, &sums, 32));
        assert!(forward(AttentionShape { head_dim: 128, ..shape }, &narrow, &sums, 20));
        assert!(forward(AttentionShape { window: Some(0), ..shape }, &narrow, &sums, 20));
        for (heads, kv_heads) in [(0, 2), (4, 0), (4, 3)] {
            assert!(forward(AttentionShape { heads, kv_heads, ..shape }, &narrow, &sums, 20), "{heads} {kv_heads}");
        }
    }
}

//! Causal grouped-query attention with an online softmax: memory grows with the tokens, not with
//! their square. Forward and backward follow FlashAttention-2 (Dao 2023, "FlashAttention-2: Faster
//! Attention with Better Parallelism and Work Partitioning"): a tile of queries meets one tile of
//! keys after the other and keeps the running maximum and sum of each row; the backward pass
//! computes the probabilities again from the stored log-sum-exp (`lse`) and from `delta`, the sums
//! of output times its gradient.

use bytemuck::{Pod, Zeroable};

use super::heads::{Heads, MAX_HEAD_DIM, check_head_dim};
use super::{Mat, same};
use crate::gpu::{BufferRange, Commands, Gpu, Kernel, KernelSpec, Shader};
use crate::ops::error::OpError;

/// The sizes of one attention.
///
/// The samples are packed, one after another. A token attends to the tokens of its sample up to
/// itself, or to the last `window` of them if there is a window.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionShape {
    /// Number of tokens in all samples.
    pub tokens: u32,
    /// The heads.
    pub heads: Heads,
}

/// The tiling of a workgroup, as constants of the shader. A thread has 4 rows and 4 columns of a
/// tile.
#[derive(Debug, Clone, Copy)]
struct Tiling {
    /// Threads along the columns of a tile.
    columns: u32,
    /// Threads along the rows of a tile: at least `columns`, and a divisor of 4 * `columns`.
    rows: u32,
}

impl Tiling {
    /// Uses 15,872 bytes of workgroup memory. Every device has 16,384.
    const DEFAULT: Self = Self { columns: 8, rows: 16 };

    /// Tokens of a block of rows.
    fn block(self) -> u32 {
        4 * self.rows
    }

    /// Columns whose values the threads load at once, with as many vec4s as for a product. A power
    /// of two, at least 4.
    fn values(self, head_vecs: u32) -> u32 {
        let block = 4 * self.columns;
        let room = block * self.columns / head_vecs.next_multiple_of(self.columns);
        (1 << room.max(4).ilog2()).min(block)
    }
}

// The shader has `4 * MAX_PARTS` elements of a head for each thread along the columns.
const _: () = assert!(MAX_HEAD_DIM == 32 * Tiling::DEFAULT.columns);

/// Causal attention with query heads that share key and value heads, forward and backward.
///
/// Outputs must not share a buffer with inputs. Sums have a fixed order, so the same inputs give
/// the same bits.
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

/// Parameters of a dispatch: `struct Params` of the shader.
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
    /// Compiles the kernels for heads of `head_dim` elements: a multiple of 4, at most 256.
    ///
    /// # Errors
    /// [`OpError::Value`] for any other size; [`OpError::Gpu`] if a kernel does not compile.
    pub fn new(gpu: &Gpu, head_dim: u32) -> Result<Self, OpError> {
        check_head_dim(OPERATION, head_dim)?;
        Self::with(gpu, head_dim, Tiling::DEFAULT)
    }

    fn with(gpu: &Gpu, head_dim: u32, tiling: Tiling) -> Result<Self, OpError> {
        // SAFETY: `forward` and `backward` check every tensor against `AttentionShape`, and the
        // kernels index by tokens and heads below its counts; the values in `starts` can only end
        // loops early, and all loops end at `tokens`; workgroup memory is written, with a barrier
        // after it, before it is read.
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

    /// Records `out = softmax(scale * q k^T) v`, over the tokens that each token attends to.
    ///
    /// `q` and `out` are [tokens, heads * head_dim], `k` and `v` [tokens, kv_heads * head_dim];
    /// `starts` has one u32 per token: the first token of its sample. `lse`, [tokens, heads],
    /// receives the log-sum-exp of the scores, for the backward pass.
    ///
    /// # Errors
    /// [`OpError::Shape`]; nothing is then recorded.
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
        // This entry point does not use `row_b` and `delta` of the module.
        let roles = Roles { rows: [q, q], columns: [k, v], starts, lse, delta: lse, out, row_sums: lse };
        self.dispatch(commands, &self.forward, shape, shape.heads.heads, &roles);
        Ok(())
    }

    /// Records the gradients `dq`, `dk` and `dv` for the gradient `d_out` of the output. They have
    /// the shapes of q, k and v, and are overwritten.
    ///
    /// `out` and `lse` are what [`Attention::forward`] wrote. `delta`, [tokens, heads], is
    /// overwritten with the sums of `d_out * out` over each head.
    ///
    /// # Errors
    /// [`OpError::Shape`]; nothing is then recorded.
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
        self.dispatch(commands, &self.query_gradient, shape, shape.heads.heads, &by_query);
        self.dispatch(commands, &self.key_gradient, shape, shape.heads.kv_heads, &by_key);
        self.dispatch(commands, &self.value_gradient, shape, shape.heads.kv_heads, &Roles { out: dv, ..by_key });
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
        let &AttentionShape { tokens, heads } = shape;
        heads.check(OPERATION, self.head_dim)?;
        heads.check_queries(OPERATION, tokens, of_queries)?;
        heads.check_keys(OPERATION, tokens, of_keys)?;
        of_rows.iter().try_for_each(|mat| mat.check(OPERATION, tokens, heads.heads))?;
        let bytes = 4 * u64::from(tokens);
        same(OPERATION, "the size of the samples' starts", bytes, starts.size.min(bytes))
    }

    /// Dispatches a kernel that loops over blocks: one workgroup per block of rows and head.
    fn dispatch(&self, commands: &mut Commands, kernel: &Kernel, shape: &AttentionShape, heads: u32, roles: &Roles<'_>) {
        let blocks = shape.tokens.div_ceil(self.tiling.block());
        if blocks > 0 {
            let bytes = roles.bytes();
            commands.dispatch(kernel, &roles.bindings(), bytemuck::bytes_of(&params(shape)), [heads, blocks, 1], bytes);
        }
    }

    /// Dispatches `delta`: the sums of out * d_out.
    fn sum_rows(&self, commands: &mut Commands, shape: &AttentionShape, out: &Mat, d_out: &Mat, roles: &Roles<'_>) {
        let rows = u64::from(shape.tokens) * u64::from(shape.heads.heads);
        if rows > 0 {
            let groups = self.gpu.grid(rows.div_ceil(self.tiling.rows.into()));
            let roles = Roles { rows: [out, d_out], ..*roles };
            let bytes = out.range.size + d_out.range.size;
            commands.dispatch(&self.row_products, &roles.bindings(), bytemuck::bytes_of(&params(shape)), groups, bytes);
        }
    }
}

const OPERATION: &str = "attention";

fn params(shape: &AttentionShape) -> Params {
    let Heads { heads, kv_heads, scale, .. } = shape.heads;
    Params { tokens: shape.tokens, heads, kv_heads, scale, window: shape.heads.window_size(), pad: [0; 3] }
}

/// The tensors of a kernel, in the order of the bindings in the shader.
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

    /// Minimum memory traffic of a kernel in bytes.
    fn bytes(&self) -> u64 {
        let [row_a, row_b] = self.rows;
        let [column_a, column_b] = self.columns;
        [row_a, row_b, column_a, column_b, self.out].iter().map(|mat| mat.range.size).sum()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

    use super::super::testing::{add, assert_close, assert_gradient, assert_untouched, dot, gpu, poisoned, random, wide};
    use super::*;

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

    /// Outputs of the kernels.
    #[derive(PartialEq)]
    struct Outputs {
        out: Vec<f32>,
        lse: Vec<f32>,
        dq: Vec<f32>,
        dk: Vec<f32>,
        dv: Vec<f32>,
    }

    /// The same shape with other heads.
    fn with_heads(mut shape: AttentionShape, change: impl FnOnce(&mut Heads)) -> AttentionShape {
        change(&mut shape.heads);
        shape
    }

    /// The same inputs with a window.
    fn windowed(inputs: Inputs, window: u32) -> Inputs {
        Inputs { shape: with_heads(inputs.shape, |heads| heads.window = Some(window)), ..inputs }
    }

    /// Samples with these lengths.
    fn inputs(head_dim: u32, heads: u32, kv_heads: u32, lengths: &[u32]) -> Inputs {
        let tokens: u32 = lengths.iter().sum();
        let mut starts = Vec::new();
        for &length in lengths {
            starts.resize(starts.len() + length as usize, starts.len() as u32);
        }
        let scale = 1.0 / (head_dim as f32).sqrt();
        let shape = AttentionShape { tokens, heads: Heads { heads, kv_heads, head_dim, scale, window: None } };
        let seed = u64::from(tokens) << 16 | u64::from(head_dim * heads + kv_heads);
        let (wide, narrow) = ((tokens * heads * head_dim) as usize, (tokens * kv_heads * head_dim) as usize);
        // Scores between about -5 and 5.
        let q = random(seed + 1, wide).into_iter().map(|x| 4.0 * x).collect();
        let (k, v) = (random(seed + 2, narrow), random(seed + 3, narrow));
        Inputs { shape, starts, q, k, v, d_out: random(seed + 4, wide) }
    }

    fn run(gpu: &Gpu, inputs: &Inputs) -> Outputs {
        run_on(&Attention::new(gpu, inputs.shape.heads.head_dim).unwrap(), gpu, inputs)
    }

    fn run_on(attention: &Attention, gpu: &Gpu, inputs: &Inputs) -> Outputs {
        let AttentionShape { tokens, heads: Heads { heads, kv_heads, head_dim, .. } } = inputs.shape;
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

    /// The reference in f64, one row of one head at a time: out, lse, dq, dk, dv.
    fn reference(shape: &AttentionShape, starts: &[u32], q: &[f64], k: &[f64], v: &[f64], d_out: &[f64]) -> [Vec<f64>; 5] {
        let Heads { heads, kv_heads, head_dim, scale, window } = shape.heads;
        let (heads, kv_heads, dim) = (heads as usize, kv_heads as usize, head_dim as usize);
        let (mut out, mut lse) = (vec![0.0; q.len()], Vec::new());
        let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; k.len()]);
        for (row, &start) in (0..starts.len() * heads).map(|row| (row, &starts[row / heads])) {
            let (token, own) = (row / heads, row * dim..(row + 1) * dim);
            let key = |t: usize| {
                let first = (t * kv_heads + row % heads / (heads / kv_heads)) * dim;
                first..first + dim
            };
            let window = window.map_or(usize::MAX, |window| window as usize);
            let seen = (start as usize).max((token + 1).saturating_sub(window))..token + 1;
            let scores: Vec<f64> = seen.clone().map(|t| f64::from(scale) * dot(&q[own.clone()], &k[key(t)])).collect();
            let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            lse.push(highest + scores.iter().map(|s| (s - highest).exp()).sum::<f64>().ln());
            let weights: Vec<f64> = scores.iter().map(|s| (s - lse[row]).exp()).collect();
            seen.clone().zip(&weights).for_each(|(t, &w)| add(&mut out[own.clone()], w, &v[key(t)]));
            let delta = dot(&d_out[own.clone()], &out[own.clone()]);
            for (t, &w) in seen.zip(&weights) {
                add(&mut dv[key(t)], w, &d_out[own.clone()]);
                let slope = f64::from(scale) * w * (dot(&d_out[own.clone()], &v[key(t)]) - delta);
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
            // A single token attends only to itself: the gradient of its score is 0, up to
            // rounding.
            let scale = if expected.iter().all(|x| x.abs() < 1e-12) { 1.0 } else { 0.0 };
            let shifted = |x: f64| (x + scale) as f32;
            let found: Vec<f32> = found.iter().map(|&x| shifted(x.into())).collect();
            let expected: Vec<f32> = expected.into_iter().map(shifted).collect();
            assert_close(&format!("{name} of {shape:?}"), &found, &expected, 1e-5);
        }
    }

    #[test]
    fn outputs_and_gradients_are_the_reference_s() {
        let Some(gpu) = gpu() else { return };
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

    /// Windows of one token, of less than a tile, of several tiles, at a tile boundary, and longer
    /// than a sample.
    #[test]
    fn windows_end_what_a_token_sees() {
        let Some(gpu) = gpu() else { return };
        for (head_dim, heads, kv_heads, lengths, windows) in [
            (64, 4, 2, &[5][..], &[1, 3][..]),
            (64, 4, 1, &[7, 90, 33], &[1, 2, 33, 34]),
            (64, 6, 2, &[140, 1, 70], &[31, 32, 33, 63, 64, 65]),
            (64, 2, 1, &[300, 1, 70], &[129, 256]),
            (80, 4, 2, &[133], &[7, 100, 132, 133, 134]),
            (128, 4, 1, &[70, 130], &[5, 97]),
        ] {
            for &window in windows {
                let inputs = windowed(inputs(head_dim, heads, kv_heads, lengths), window);
                assert_matches(&run(&gpu, &inputs), &inputs);
            }
        }
    }

    /// A window that covers the longest sample gives the same bits as no window.
    #[test]
    fn a_wide_window_changes_nothing() {
        let Some(gpu) = gpu() else { return };
        let inputs = inputs(64, 4, 2, &[7, 90, 33]);
        let expected = run(&gpu, &inputs);
        for window in [90, 91, u32::MAX] {
            assert!(run(&gpu, &windowed(inputs.clone(), window)) == expected, "{window}");
        }
    }

    /// A narrow window skips most tiles of a long sample. Skipped tiles are not read, even if they
    /// are NaN.
    #[test]
    fn tiles_outside_of_the_window_are_left_out() {
        let Some(gpu) = gpu() else { return };
        let inputs = windowed(inputs(64, 2, 1, &[400]), 40);
        let expected = run(&gpu, &inputs);
        // A block of queries starts at 320. Its first key is 281.
        let mut late = inputs.clone();
        late.k[..280 * 64].fill(f32::NAN);
        late.v[..280 * 64].fill(f32::NAN);
        let found = run(&gpu, &late);
        assert!(found.out[320 * 128..] == expected.out[320 * 128..]);
        assert!(found.dq[320 * 128..] == expected.dq[320 * 128..]);
        // The first block of keys ends at 64. Queries up to 102 attend to it, and the tile of query
        // 102 ends at 128.
        let mut early = inputs;
        early.q[128 * 128..].fill(f32::NAN);
        early.d_out[128 * 128..].fill(f32::NAN);
        let found = run(&gpu, &early);
        assert!(found.dk[..64 * 64] == expected.dk[..64 * 64]);
        assert!(found.dv[..64 * 64] == expected.dv[..64 * 64]);
    }

    #[test]
    fn heads_of_any_size_fit() {
        let Some(gpu) = gpu() else { return };
        for head_dim in [4, 256] {
            let inputs = inputs(head_dim, 2, 1, &[3, 67]);
            assert_matches(&run(&gpu, &inputs), &inputs);
        }
    }

    #[test]
    fn tiles_of_another_size_fit() {
        let Some(gpu) = gpu() else { return };
        let inputs = inputs(20, 2, 1, &[3, 133]);
        let attention = Attention::with(&gpu, 20, Tiling { columns: 4, rows: 8 }).unwrap();
        for inputs in [windowed(inputs.clone(), 21), inputs] {
            assert_matches(&run_on(&attention, &gpu, &inputs), &inputs);
        }
    }

    #[test]
    fn scores_whose_exponential_overflows_are_exact() {
        let Some(gpu) = gpu() else { return };
        let mut inputs = inputs(64, 2, 1, &[40, 30]);
        // Small integers: the scores reach several hundred without rounding.
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
        let Some(gpu) = gpu() else { return };
        let inputs = inputs(64, 4, 2, &[7, 90, 33]);
        assert!(run(&gpu, &inputs) == run(&gpu, &inputs));
    }

    #[test]
    fn a_sample_changes_nothing_in_the_others() {
        let Some(gpu) = gpu() else { return };
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
        let Some(gpu) = gpu() else { return };
        for head_dim in [0, 6, 260] {
            let error = Attention::new(&gpu, head_dim).unwrap_err().to_string();
            assert_eq!(
                error,
                format!("attention: the size of a head is {head_dim}, but must be a multiple of 4, from 4 to 256")
            );
        }
        let attention = Attention::new(&gpu, 64).unwrap();
        let [wide, narrow, sums] = [256, 128, 4].map(|cols| Mat::new(&gpu, "test", 5, cols).unwrap());
        let range = |bytes| BufferRange { buffer: gpu.storage("starts", 32).unwrap(), offset: 0, size: bytes };
        let heads = Heads { heads: 4, kv_heads: 2, head_dim: 64, scale: 0.125, window: Some(1) };
        let shape = AttentionShape { tokens: 5, heads };
        let forward = |shape: AttentionShape, k: &Mat, lse: &Mat, starts: u64| {
            let mut commands = gpu.commands("test");
            let result = attention.forward(&mut commands, &shape, &wide, k, &narrow, &range(starts), &wide, lse);
            matches!(result, Err(OpError::Shape { .. } | OpError::Value { .. }))
        };
        assert!(!forward(shape, &narrow, &sums, 20));
        assert!(forward(shape, &wide, &sums, 20));
        assert!(forward(shape, &narrow, &wide, 20));
        assert!(forward(shape, &narrow, &sums, 16));
        assert!(forward(AttentionShape { tokens: 6, ..shape }, &narrow, &sums, 32));
        assert!(forward(with_heads(shape, |heads| heads.head_dim = 128), &narrow, &sums, 20));
        assert!(forward(with_heads(shape, |heads| heads.window = Some(0)), &narrow, &sums, 20));
        for (heads, kv_heads) in [(0, 2), (4, 0), (4, 3)] {
            let shape = AttentionShape { heads: Heads { heads, kv_heads, ..shape.heads }, ..shape };
            assert!(forward(shape, &narrow, &sums, 20), "{heads} {kv_heads}");
        }
    }
}

//! Cross-entropy over logits in chunks of the vocabulary. The full logits are never in memory.
//!
//! For a token with logits z and label t: loss = log(sum_j exp(z_j)) - z_t, and d loss / d z_j =
//! softmax(z)_j - [j = t]. The largest logit is subtracted before the exponential, and sums are
//! rescaled if a later chunk has a larger logit (Milakov and Gimelshein 2018, "Online normalizer
//! calculation for softmax").
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::pieces::{Piece, ROWS, pieces};
use super::{Mat, OpError};
use crate::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// Label of a token without a loss.
pub const IGNORE_INDEX: u32 = u32::MAX;

/// Bytes of state and label per token.
const STATE: u64 = 16;
const LABEL: u64 = 4;

/// The kernels of the loss. A micro-batch needs two passes over the chunks of the vocabulary, in
/// ascending order from row 0:
///
/// 1. for each chunk: logits, then [`ChunkedLoss::accumulate`];
/// 2. [`ChunkedLoss::finish`];
/// 3. for each chunk: the same logits again, then [`ChunkedLoss::gradient`].
///
/// `labels` holds one u32 per token: its next token, or [`IGNORE_INDEX`]. A label outside of all
/// chunks makes the loss NaN. `state` [tokens, 4] holds, for each token, the largest logit, the sum
/// of exponentials, the label's logit, and after [`ChunkedLoss::finish`] the loss (0 for a token
/// without a label, NaN if one of its logits is not finite).
#[derive(Debug, Clone)]
pub struct ChunkedLoss {
    gpu: Gpu,
    accumulate: Kernel,
    finish: Kernel,
    gradient: Kernel,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tokens: u32,
    width: u32,
    first: u32,
    scale: f32,
    nan: u32,
    pad: [u32; 3],
}

impl ChunkedLoss {
    /// Compiles the kernels for `gpu`.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::KernelLimit`].
    pub fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        // SAFETY: `chunk` and `finish` bind `tokens` labels and states and `tokens * width` logits,
        // fewer than 2^29; workgroups past the last token return as one; loops end at `width` or
        // `tokens`, or halve; workgroup memory is written before each barrier that precedes its
        // reads.
        let shader = unsafe { Shader::trusted("loss", include_str!("../../shaders/loss.wgsl")) };
        let kernel = |entry| gpu.kernel(&KernelSpec { shader: shader.clone(), entry, constants: Vec::new() });
        let (accumulate, finish, gradient) = (kernel("accumulate")?, kernel("finish")?, kernel("gradient")?);
        Ok(Self { gpu: gpu.clone(), accumulate, finish, gradient })
    }

    /// Records the accumulation of a chunk into the state. `logits` [tokens, width] belong to the
    /// vocabulary rows from `first` on. The chunk with `first` 0 comes first and resets the state.
    /// `state` [tokens, 4].
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn accumulate(
        &self,
        commands: &mut Commands,
        logits: &Mat,
        first: u32,
        labels: &BufferRange,
        state: &Mat,
    ) -> Result<(), OpError> {
        self.chunk(commands, &self.accumulate, [logits, state], first, labels, 0.0)
    }

    /// Records the loss of each token into `state` [tokens, 4], and adds their sum, divided by
    /// `normalizer`, to `total` [1, 1]. `normalizer` is the number of tokens with a label in all
    /// micro-batches of a step, so their losses add up to the mean.
    ///
    /// # Errors
    /// [`OpError::Shape`]; [`OpError::Value`] if `normalizer` is 0.
    pub fn finish(&self, commands: &mut Commands, state: &Mat, normalizer: u64, total: &Mat) -> Result<(), OpError> {
        state.check("loss", state.rows, 4)?;
        total.check("loss", 1, 1)?;
        let params = Params { scale: inverse(normalizer)?, ..params(state.rows, 1, 0) };
        let all = Piece { first: 0, count: state.rows };
        let state = all.of(&state.range, STATE);
        let bytes = state.size;
        // Labels and logits are not used.
        let bindings = [state.clone(), state.clone(), state.clone(), state, total.range.slice(0, 4)];
        commands.dispatch(&self.finish, &bindings, bytemuck::bytes_of(&params), [1, 1, 1], bytes);
        Ok(())
    }

    /// Records the gradient of the mean loss in place of the logits: (softmax - onehot) /
    /// `normalizer`, and 0 for tokens without a label. `logits`, `first`, `labels` and `state` are
    /// those of [`ChunkedLoss::accumulate`], after its last chunk.
    ///
    /// # Errors
    /// [`OpError::Shape`]; [`OpError::Value`] if `normalizer` is 0.
    pub fn gradient(
        &self,
        commands: &mut Commands,
        logits: &Mat,
        first: u32,
        labels: &BufferRange,
        state: &Mat,
        normalizer: u64,
    ) -> Result<(), OpError> {
        self.chunk(commands, &self.gradient, [logits, state], first, labels, inverse(normalizer)?)
    }

    fn chunk(
        &self,
        commands: &mut Commands,
        kernel: &Kernel,
        [logits, state]: [&Mat; 2],
        first: u32,
        labels: &BufferRange,
        scale: f32,
    ) -> Result<(), OpError> {
        let (tokens, width) = (logits.rows, logits.cols);
        logits.check("loss", tokens, width)?;
        state.check("loss", tokens, 4)?;
        let expected = LABEL * u64::from(tokens);
        if labels.size < expected {
            let (what, found) = ("the size of the labels", labels.size);
            return Err(OpError::Shape { operation: "loss", what, expected, found });
        }
        if first.checked_add(width).is_none() {
            let (expected, found) = (u64::from(u32::MAX), u64::from(first) + u64::from(width));
            return Err(OpError::Shape { operation: "loss", what: "the end of the chunk", expected, found });
        }
        let row_bytes = 4 * u64::from(width);
        for piece in pieces(&self.gpu, tokens.into(), row_bytes.max(STATE), ROWS)? {
            let params = Params { scale, ..params(piece.count, width, first) };
            let logits = piece.of(&logits.range, row_bytes);
            let bytes = 2 * logits.size;
            let bindings = [piece.of(labels, LABEL), piece.of(&state.range, STATE), logits.clone(), logits];
            commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), self.gpu.grid(piece.count.into()), bytes);
        }
        Ok(())
    }
}

fn params(tokens: u32, width: u32, first: u32) -> Params {
    Params { tokens, width, first, scale: 0.0, nan: f32::NAN.to_bits(), pad: [0; 3] }
}

/// 1 / the number of tokens with a label.
fn inverse(normalizer: u64) -> Result<f32, OpError> {
    match normalizer {
        0 => Err(OpError::Value {
            operation: "loss",
            what: "the number of tokens with a label",
            expected: "above 0",
            found: 0.0,
        }),
        n => Ok((1.0 / n as f64) as f32),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{
        assert_close, assert_gradient, assert_untouched, gpu, gpu_with, mat, narrow, poisoned, random, wide,
    };

    /// Loss per token.
    fn reference(logits: &[f64], labels: &[u32]) -> Vec<f64> {
        let one = |(z, &label): (&[f64], &u32)| {
            let largest = z.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = z.iter().map(|z| (z - largest).exp()).sum();
            if label == IGNORE_INDEX { 0.0 } else { sum.ln() + (largest - z[label as usize]) }
        };
        logits.chunks(logits.len() / labels.len()).zip(labels).map(one).collect()
    }

    /// Gradient of the sum of the losses.
    fn reference_backward(logits: &[f64], labels: &[u32]) -> Vec<f64> {
        let one = |(z, &label): (&[f64], &u32)| {
            let largest = z.iter().copied().fold(f64::MIN, f64::max);
            let sum: f64 = z.iter().map(|z| (z - largest).exp()).sum();
            let hot = |j: usize| f64::from(u8::from(j == label as usize));
            let slope = |(j, z): (usize, &f64)| if label == IGNORE_INDEX { 0.0 } else { (z - largest).exp() / sum - hot(j) };
            z.iter().enumerate().map(slope).collect::<Vec<_>>()
        };
        logits.chunks(logits.len() / labels.len()).zip(labels).flat_map(one).collect()
    }

    /// Random labels. Every third token has none.
    fn labels(seed: u64, tokens: usize, vocab: u32) -> Vec<u32> {
        let any = |x: f32| (((x + 1.0) / 2.0 * vocab as f32) as u32).min(vocab - 1);
        let label = |(i, x)| if i % 3 == 1 { IGNORE_INDEX } else { any(x) };
        random(seed, tokens).into_iter().enumerate().map(label).collect()
    }

    struct Outcome {
        losses: Vec<f32>,
        total: f32,
        /// [tokens, vocab]
        gradient: Vec<f32>,
    }

    /// Columns `from..to` of a row-major matrix.
    fn columns(logits: &[f32], vocab: usize, from: usize, to: usize) -> Vec<f32> {
        logits.chunks(vocab).flat_map(|row| row[from..to].to_vec()).collect()
    }

    /// Runs both passes over chunks of `width`. The total starts at 1.
    fn run(gpu: &Gpu, logits: &[f32], labels: &[u32], width: usize, normalizer: u64) -> Outcome {
        let loss = ChunkedLoss::new(gpu).unwrap();
        let tokens = labels.len() as u32;
        let vocab = logits.len() / labels.len();
        let label_range = BufferRange::whole(gpu.storage_with("labels", bytemuck::cast_slice(labels)).unwrap());
        let (state, total) = (poisoned(gpu, tokens, 4), mat(gpu, 1, 1, &[1.0]));
        let starts = || (0..vocab).step_by(width);
        let chunk = |from: usize| {
            let to = (from + width).min(vocab);
            mat(gpu, tokens, (to - from) as u32, &columns(logits, vocab, from, to))
        };
        let chunks: Vec<Mat> = starts().map(chunk).collect();
        let mut commands = gpu.commands("loss");
        for (logits, first) in chunks.iter().zip(starts()) {
            loss.accumulate(&mut commands, logits, first as u32, &label_range, &state).unwrap();
        }
        loss.finish(&mut commands, &state, normalizer, &total).unwrap();
        for (logits, first) in chunks.iter().zip(starts()) {
            loss.gradient(&mut commands, logits, first as u32, &label_range, &state, normalizer).unwrap();
        }
        commands.submit().unwrap();
        chunks.iter().chain([&state, &total]).for_each(|mat| assert_untouched(gpu, mat));
        let slopes: Vec<(Vec<f32>, usize)> = chunks.iter().map(|c| (c.read(gpu).unwrap(), c.cols as usize)).collect();
        let row = |i: usize| slopes.iter().flat_map(move |(slopes, cols)| slopes[i * cols..(i + 1) * cols].to_vec());
        Outcome {
            losses: state.read(gpu).unwrap().chunks(4).map(|token| token[3]).collect(),
            total: total.read(gpu).unwrap()[0],
            gradient: (0..labels.len()).flat_map(row).collect(),
        }
    }

    fn check(gpu: &Gpu, logits: &[f32], labels: &[u32], width: usize) {
        let normalizer = 1 + labels.iter().filter(|&&label| label != IGNORE_INDEX).count() as u64;
        let found = run(gpu, logits, labels, width, normalizer);
        let losses = reference(&wide(logits), labels);
        assert_close("losses", &found.losses, &narrow(&losses), 1e-6);
        let total = 1.0 + losses.iter().sum::<f64>() / normalizer as f64;
        assert_close("total", &[found.total], &[total as f32], 1e-6);
        let gradient: Vec<f64> = reference_backward(&wide(logits), labels).iter().map(|g| g / normalizer as f64).collect();
        assert_close("gradient", &found.gradient, &narrow(&gradient), 2e-6);
    }

    #[test]
    fn any_chunking_gives_the_loss_and_its_gradient() {
        let Some(gpu) = gpu() else { return };
        for (tokens, vocab, spread) in [(1, 1, 1.0), (1, 7, 1.0), (7, 65, 10.0), (65, 1000, 10.0), (3, 4099, 30.0)] {
            let logits: Vec<f32> = random(5, tokens * vocab).iter().map(|x| x * spread).collect();
            for width in [vocab, vocab.div_ceil(2), vocab.div_ceil(3), vocab.div_ceil(7)] {
                check(&gpu, &logits, &labels(6, tokens, vocab as u32), width);
            }
        }
    }

    #[test]
    fn many_tokens_and_pieces_that_can_be_bound() {
        let Some(gpu) = gpu() else { return };
        check(&gpu, &random(5, 65_537 * 2), &labels(6, 65_537, 2), 2);
        let Some(gpu) = gpu_with(|options| options.max_binding = Some(1 << 15)) else { return };
        check(&gpu, &random(5, 301 * 99), &labels(6, 301, 99), 50);
    }

    #[test]
    fn extreme_logits() {
        let Some(gpu) = gpu() else { return };
        let logits: Vec<f32> = random(5, 7 * 65).iter().map(|x| x * 1e4).collect();
        [1, 13, 65].into_iter().for_each(|width| check(&gpu, &logits, &labels(6, 7, 65), width));
        let logits: Vec<f32> = random(5, 7 * 65).iter().map(|x| if *x > 0.0 { 1e4 } else { -1e4 }).collect();
        [1, 13, 65].into_iter().for_each(|width| check(&gpu, &logits, &labels(6, 7, 65), width));
        let logits = vec![-1e30; 65];
        check(&gpu, &logits, &[3], 13);
    }

    #[test]
    fn untrained_tokens_count_for_nothing() {
        let Some(gpu) = gpu() else { return };
        let found = run(&gpu, &random(5, 7 * 65), &[IGNORE_INDEX; 7], 13, 5);
        assert_eq!((found.losses, found.total, found.gradient), (vec![0.0; 7], 1.0, vec![0.0; 7 * 65]));
    }

    #[test]
    fn what_is_no_number_shows() {
        let Some(gpu) = gpu() else { return };
        let logits = random(5, 3 * 65);
        assert!(run(&gpu, &logits, &[3, 65, 4], 13, 5).total.is_nan(), "a label past the vocabulary");
        for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut logits = logits.clone();
            logits[70] = poison;
            let found = run(&gpu, &logits, &[3, 64, 4], 13, 5);
            assert!(found.total.is_nan() && found.losses[1].is_nan() && found.losses[2].is_finite(), "{poison}");
        }
    }

    #[test]
    fn the_same_bits_every_time() {
        let Some(gpu) = gpu() else { return };
        let (logits, labels) = (random(5, 1000 * 70), labels(6, 1000, 70));
        let outcome = || run(&gpu, &logits, &labels, 33, 9);
        let (first, second) = (outcome(), outcome());
        assert_eq!(first.total.to_bits(), second.total.to_bits());
        assert!(first.gradient == second.gradient && first.losses == second.losses);
    }

    #[test]
    fn the_reference_is_the_gradient() {
        let (logits, labels) = (wide(&random(5, 4 * 7)), [3, IGNORE_INDEX, 0, 6]);
        assert_gradient("logits", &logits, &reference_backward(&logits, &labels), 1e-6, |z| {
            reference(z, &labels).iter().sum()
        });
    }

    #[test]
    fn a_mean_over_nothing_is_refused() {
        let Some(gpu) = gpu() else { return };
        let loss = ChunkedLoss::new(&gpu).unwrap();
        let refused = loss.finish(&mut gpu.commands("loss"), &poisoned(&gpu, 3, 4), 0, &poisoned(&gpu, 1, 1));
        assert!(matches!(refused, Err(OpError::Value { operation: "loss", .. })), "{refused:?}");
    }
}

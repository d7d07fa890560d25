//! Cross-entropy over logits in chunks of the vocabulary, with the gradient of the input of the
//! head in the same visit. The full logits are never in memory, and none are computed twice.
//!
//! For a token with logits z = W x and label t: loss = log(sum_j exp(z_j)) - z_t. The largest logit
//! is subtracted before the exponential, and sums are rescaled if a later chunk has a larger logit
//! (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"). The gradient
//! d loss / d x = sum_j softmax(z)_j W_j - W_t is such a sum, too: the exponentials of a chunk
//! times its rows of W are added to rows that are rescaled in the same way.
//!
//! The label is in none of these sums. With o, the sum of the other exponentials, and e, its own:
//!
//! ```text
//! d loss / d x = (sum of the others exp(z_j) W_j - o W_t) / (o + e)
//! ```
//!
//! So the gradient of a token that the model is sure of is as exact as any other, although its
//! softmax is 1 with an error of rounding.
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

/// The kernels of the loss. For each chunk of the vocabulary, in ascending order from row 0, with
/// its logits:
///
/// - without a gradient: [`ChunkedLoss::accumulate`]
/// - with it: [`ChunkedLoss::exponentials`], which replaces the logits; from the second chunk on
///   [`ChunkedLoss::rescale`]; then the caller adds the exponentials times the rows of the chunk
///
/// After the last chunk: [`ChunkedLoss::finish`], and [`ChunkedLoss::gradient`] before or after it.
///
/// `labels` holds one u32 per token: its next token, or [`IGNORE_INDEX`]. A label outside of all
/// chunks makes the loss NaN. `state` [tokens, 4] holds, for each token, the largest logit, the sum
/// of exponentials without the label's, the label's logit, and after [`ChunkedLoss::finish`] the
/// loss (0 for a token without a label, NaN if one of its logits is not finite).
#[derive(Debug, Clone)]
pub struct ChunkedLoss {
    gpu: Gpu,
    accumulate: Kernel,
    exponentials: Kernel,
    rescale: Kernel,
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
    factor: f32,
    pad: [u32; 2],
}

impl ChunkedLoss {
    /// Compiles the kernels for `gpu`.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::KernelLimit`].
    pub fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        // SAFETY: `dispatch` and `finish` bind `tokens` labels and states and `tokens * width`
        // floats of each matrix, fewer than 2^29; workgroups past the last token return as one;
        // the label's index is compared with `width`; loops end at `width` or `tokens`, or halve;
        // workgroup memory is written before each barrier that precedes its reads.
        let shader = unsafe { Shader::trusted("loss", include_str!("../../shaders/loss.wgsl")) };
        let kernel = |entry| gpu.kernel(&KernelSpec { shader: shader.clone(), entry, constants: Vec::new() });
        Ok(Self {
            gpu: gpu.clone(),
            accumulate: kernel("accumulate")?,
            exponentials: kernel("exponentials")?,
            rescale: kernel("rescale")?,
            finish: kernel("finish")?,
            gradient: kernel("gradient")?,
        })
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
        check_end(first, logits.cols)?;
        let params = Params { first, ..Params::default() };
        self.dispatch(commands, &self.accumulate, [logits, logits], labels, state, params)
    }

    /// As [`ChunkedLoss::accumulate`], and replaces the logits with exponentials: of each logit
    /// below the largest one so far, and 0 for the label and for tokens without one. The state has
    /// the same bits.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn exponentials(
        &self,
        commands: &mut Commands,
        logits: &Mat,
        first: u32,
        labels: &BufferRange,
        state: &Mat,
    ) -> Result<(), OpError> {
        check_end(first, logits.cols)?;
        let params = Params { first, ..Params::default() };
        self.dispatch(commands, &self.exponentials, [logits, logits], labels, state, params)
    }

    /// Records the change of sums [tokens, columns] of earlier chunks to the largest logit after
    /// [`ChunkedLoss::exponentials`] of this chunk.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn rescale(&self, commands: &mut Commands, sums: &Mat, labels: &BufferRange, state: &Mat) -> Result<(), OpError> {
        self.dispatch(commands, &self.rescale, [sums, sums], labels, state, Params::default())
    }

    /// Records the loss of each token into `state` [tokens, 4], and adds their sum, divided by
    /// `normalizer`, to `total` [1, 1]. `normalizer` is the number of tokens with a label in all
    /// micro-batches of a step, so their losses add up to the mean.
    ///
    /// # Errors
    /// [`OpError::Shape`]; [`OpError::Value`] if `normalizer` is 0.
    pub fn finish(
        &self,
        commands: &mut Commands,
        labels: &BufferRange,
        state: &Mat,
        normalizer: u64,
        total: &Mat,
    ) -> Result<(), OpError> {
        let tokens = state.rows;
        state.check("loss", tokens, 4)?;
        total.check("loss", 1, 1)?;
        check_labels(labels, tokens)?;
        let params = Params { tokens, width: 1, scale: inverse(normalizer)?, ..Params::default() };
        let all = Piece { first: 0, count: tokens };
        let (state, labels) = (all.of(&state.range, STATE), all.of(labels, LABEL));
        let bytes = state.size;
        // The matrices are not used.
        let bindings = [labels, state.clone(), state.clone(), state, total.range.slice(0, 4)];
        commands.dispatch(&self.finish, &bindings, bytemuck::bytes_of(&params), [1, 1, 1], bytes);
        Ok(())
    }

    /// Records the gradient of the mean loss in place of `sums` [tokens, columns], the sums over
    /// all chunks of exponentials times rows of the weight times `factor`. It is 0 for tokens
    /// without a label. `label_rows` [tokens, columns] has the label's row of the weight for all
    /// others.
    ///
    /// # Errors
    /// [`OpError::Shape`]; [`OpError::Value`] if `normalizer` is 0.
    pub fn gradient(
        &self,
        commands: &mut Commands,
        [sums, label_rows]: [&Mat; 2],
        labels: &BufferRange,
        state: &Mat,
        factor: f32,
        normalizer: u64,
    ) -> Result<(), OpError> {
        let params = Params { scale: inverse(normalizer)?, factor, ..Params::default() };
        self.dispatch(commands, &self.gradient, [label_rows, sums], labels, state, params)
    }

    /// Dispatches a workgroup for each token. The kernel reads the first matrix or changes the
    /// second one.
    fn dispatch(
        &self,
        commands: &mut Commands,
        kernel: &Kernel,
        [rows, changed]: [&Mat; 2],
        labels: &BufferRange,
        state: &Mat,
        params: Params,
    ) -> Result<(), OpError> {
        let (tokens, width) = (changed.rows, changed.cols);
        [rows, changed].iter().try_for_each(|mat| mat.check("loss", tokens, width))?;
        state.check("loss", tokens, 4)?;
        check_labels(labels, tokens)?;
        let row_bytes = 4 * u64::from(width);
        for piece in pieces(&self.gpu, tokens.into(), row_bytes.max(STATE), ROWS)? {
            let params = Params { tokens: piece.count, width, ..params };
            let (rows, changed) = (piece.of(&rows.range, row_bytes), piece.of(&changed.range, row_bytes));
            let bytes = 2 * changed.size;
            let bindings = [piece.of(labels, LABEL), piece.of(&state.range, STATE), rows, changed];
            commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), self.gpu.grid(piece.count.into()), bytes);
        }
        Ok(())
    }
}

impl Default for Params {
    fn default() -> Self {
        Self { tokens: 0, width: 0, first: 0, scale: 0.0, nan: f32::NAN.to_bits(), factor: 1.0, pad: [0; 2] }
    }
}

/// Checks the end of a chunk of the vocabulary.
fn check_end(first: u32, width: u32) -> Result<(), OpError> {
    let (expected, found) = (u64::from(u32::MAX), u64::from(first) + u64::from(width));
    match found > expected {
        true => Err(OpError::Shape { operation: "loss", what: "the end of the chunk", expected, found }),
        false => Ok(()),
    }
}

fn check_labels(labels: &BufferRange, tokens: u32) -> Result<(), OpError> {
    let (expected, found) = (LABEL * u64::from(tokens), labels.size);
    match found < expected {
        true => Err(OpError::Shape { operation: "loss", what: "the size of the labels", expected, found }),
        false => Ok(()),
    }
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
    use crate::ops::matmul::Matmul;
    use crate::ops::testing::{
        add, assert_close, assert_gradient, assert_untouched, gpu, gpu_with, mat, narrow, poisoned, random, wide,
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
        /// [tokens, HIDDEN]
        gradient: Vec<f32>,
    }

    /// Columns of the weight, and its factor.
    const HIDDEN: usize = 5;
    const FACTOR: f32 = 0.5;

    /// The weight [vocab, HIDDEN].
    fn weight(vocab: usize) -> Vec<f32> {
        random(7, vocab * HIDDEN)
    }

    /// Columns `from..to` of a row-major matrix.
    fn columns(logits: &[f32], vocab: usize, from: usize, to: usize) -> Vec<f32> {
        logits.chunks(vocab).flat_map(|row| row[from..to].to_vec()).collect()
    }

    /// The chunks of the logits, and of the weight, with their first rows.
    fn chunks(gpu: &Gpu, logits: &[f32], vocab: usize, width: usize) -> Vec<(u32, Mat, Mat)> {
        let (tokens, weight) = ((logits.len() / vocab) as u32, weight(vocab));
        let chunk = |from: usize| {
            let to = (from + width).min(vocab);
            let (count, of_weight) = ((to - from) as u32, &weight[from * HIDDEN..to * HIDDEN]);
            let logits = mat(gpu, tokens, count, &columns(logits, vocab, from, to));
            (from as u32, logits, mat(gpu, count, HIDDEN as u32, of_weight))
        };
        (0..vocab).step_by(width).map(chunk).collect()
    }

    /// Runs all kernels over chunks of `width`. The total starts at 1.
    fn run(gpu: &Gpu, logits: &[f32], labels: &[u32], width: usize, normalizer: u64) -> Outcome {
        let (loss, matmul) = (ChunkedLoss::new(gpu).unwrap(), Matmul::new(gpu, None).unwrap());
        let tokens = labels.len() as u32;
        let vocab = logits.len() / labels.len();
        let range = BufferRange::whole(gpu.storage_with("labels", bytemuck::cast_slice(labels)).unwrap());
        let (state, total) = (poisoned(gpu, tokens, 4), mat(gpu, 1, 1, &[1.0]));
        let (alone, of_alone) = (poisoned(gpu, tokens, 4), mat(gpu, 1, 1, &[1.0]));
        let sums = poisoned(gpu, tokens, HIDDEN as u32);
        let weight = weight(vocab);
        let row = |&label: &u32| weight.chunks(HIDDEN).nth(label as usize).map_or(vec![f32::NAN; HIDDEN], <[f32]>::to_vec);
        let label_rows = mat(gpu, tokens, HIDDEN as u32, &labels.iter().flat_map(row).collect::<Vec<_>>());
        let chunks = chunks(gpu, logits, vocab, width);
        let mut commands = gpu.commands("loss");
        for (first, logits, _) in &chunks {
            loss.accumulate(&mut commands, logits, *first, &range, &alone).unwrap();
        }
        loss.finish(&mut commands, &range, &alone, normalizer, &of_alone).unwrap();
        for (first, logits, weight) in &chunks {
            loss.exponentials(&mut commands, logits, *first, &range, &state).unwrap();
            if *first > 0 {
                loss.rescale(&mut commands, &sums, &range, &state).unwrap();
            }
            matmul.nn(&mut commands, logits, weight, FACTOR, *first > 0, &sums).unwrap();
        }
        loss.finish(&mut commands, &range, &state, normalizer, &total).unwrap();
        loss.gradient(&mut commands, [&sums, &label_rows], &range, &state, FACTOR, normalizer).unwrap();
        commands.submit().unwrap();
        let logits = chunks.iter().map(|(_, logits, _)| logits);
        logits.chain([&state, &total, &sums, &label_rows]).for_each(|mat| assert_untouched(gpu, mat));
        let bits = |mat: &Mat| mat.read(gpu).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&total), bits(&of_alone), "the loss is the same without a gradient");
        Outcome {
            losses: state.read(gpu).unwrap().chunks(4).map(|token| token[3]).collect(),
            total: total.read(gpu).unwrap()[0],
            gradient: sums.read(gpu).unwrap(),
        }
    }

    /// The gradient of the sum of the losses with respect to the input of the head.
    fn reference_gradient(logits: &[f64], labels: &[u32]) -> Vec<f64> {
        let vocab = logits.len() / labels.len();
        let weight = wide(&weight(vocab));
        let row = |slopes: &[f64]| {
            let mut sums = vec![0.0; HIDDEN];
            slopes.iter().zip(weight.chunks(HIDDEN)).for_each(|(slope, row)| add(&mut sums, slope * f64::from(FACTOR), row));
            sums
        };
        reference_backward(logits, labels).chunks(vocab).flat_map(row).collect()
    }

    fn check(gpu: &Gpu, logits: &[f32], labels: &[u32], width: usize) {
        let normalizer = 1 + labels.iter().filter(|&&label| label != IGNORE_INDEX).count() as u64;
        let found = run(gpu, logits, labels, width, normalizer);
        let losses = reference(&wide(logits), labels);
        assert_close("losses", &found.losses, &narrow(&losses), 1e-6);
        let total = 1.0 + losses.iter().sum::<f64>() / normalizer as f64;
        assert_close("total", &[found.total], &[total as f32], 1e-6);
        let gradient = reference_gradient(&wide(logits), labels);
        let gradient: Vec<f64> = gradient.iter().map(|g| g / normalizer as f64).collect();
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

    /// The softmax of the label is 1 with an error of rounding. The gradient is still exact, in
    /// each row: that of the others, which are 1e-5 to 1e-13 of it. The exponential of a number
    /// near -30 has that many digits fewer.
    #[test]
    fn the_gradient_of_a_token_that_is_certain_is_exact() {
        let Some(gpu) = gpu() else { return };
        let vocab = 65;
        for (label, lead) in [(0, 12.0), (40, 20.0), (64, 30.0)] {
            let mut logits = random(5, vocab);
            logits[label] = lead;
            let expected = reference_gradient(&wide(&logits), &[label as u32]);
            for width in [vocab, 13, 1] {
                let found = run(&gpu, &logits, &[label as u32], width, 1);
                assert_close("gradient", &found.gradient, &narrow(&expected), 3e-5);
            }
        }
    }

    #[test]
    fn untrained_tokens_count_for_nothing() {
        let Some(gpu) = gpu() else { return };
        let found = run(&gpu, &random(5, 7 * 65), &[IGNORE_INDEX; 7], 13, 5);
        assert_eq!((found.losses, found.total, found.gradient), (vec![0.0; 7], 1.0, vec![0.0; 7 * HIDDEN]));
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
            let rows: Vec<bool> = found.gradient.chunks(HIDDEN).map(|row| row.iter().all(|x| x.is_nan())).collect();
            assert_eq!(rows, [false, true, false], "{poison}");
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
        let labels = BufferRange::whole(gpu.storage("labels", 12).unwrap());
        let refused = loss.finish(&mut gpu.commands("loss"), &labels, &poisoned(&gpu, 3, 4), 0, &poisoned(&gpu, 1, 1));
        assert!(matches!(refused, Err(OpError::Value { operation: "loss", .. })), "{refused:?}");
    }
}

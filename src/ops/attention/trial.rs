//! Compares the kernels for matrix units with the CPU before their first use on a driver: a forward
//! and a backward pass of ragged samples, with shared keys, with and without a window, of all
//! queries at once and of one half after the other. Scores rise along the keys, so that sums are
//! scaled again.
//!
//! On hardware, the pass has a real size: samples and heads are repeated, so that the CPU computes
//! each only once. Every element of the outputs is compared. Canaries follow all matrices: NaN
//! after inputs, so that a misplaced load shows, and words after outputs that must stay as they
//! were. Outputs hold the same words before.

use super::mixed::MixedAttention;
use super::reference::{Inputs, OUTPUTS, reference};
use super::shape::{AttentionShape, Backward, Forward};
use super::size::HeadSize;
use crate::dequant::sample::Random;
use crate::gpu::{BufferRange, Gpu, KernelSpec, MatrixUnits};
use crate::ops::heads::Heads;
use crate::ops::trial::{PASSED, ROOM, difference};
use crate::ops::{Mat, OpError};

/// The tokens of each sample that the CPU computes, and its heads.
const LENGTHS: [u32; 3] = [70, 1, 83];
const LENGTHS_OF_HARDWARE: [u32; 5] = [261, 1, 83, 70, 200];
const HEADS: u32 = 4;
const KV_HEADS: u32 = 2;
const WINDOWS: [Option<u32>; 2] = [None, Some(37)];
/// Maximum error, relative to the largest magnitude of a row. f16 has a tenth of it. A row may be
/// much smaller than the others, so a part of the largest magnitude of all counts, too.
const TOLERANCE: f64 = 1e-2;
const PART_OF_ALL: f64 = 0.1;
/// What outputs hold before, and after their last row.
const CANARY: u32 = 0x7e00_7e00;
/// Floats after the last row of a matrix.
const MARGIN: usize = 64;

/// What a trial runs.
#[derive(Debug, Clone, Copy)]
struct Pass {
    lengths: &'static [u32],
    /// Repetitions of all samples, and of the heads in a token.
    samples: usize,
    heads: usize,
}

impl Pass {
    fn of(units: MatrixUnits) -> Self {
        match units {
            MatrixUnits::Hardware => Self { lengths: &LENGTHS_OF_HARDWARE, samples: 3, heads: 2 },
            MatrixUnits::Loops => Self { lengths: &LENGTHS, samples: 1, heads: 1 },
        }
    }

    /// The first token of the sample of each token, with `samples` repetitions.
    fn starts(self, samples: usize) -> Vec<u32> {
        let mut starts = Vec::new();
        for &length in (0..samples).flat_map(|_| self.lengths) {
            starts.resize(starts.len() + length as usize, starts.len() as u32);
        }
        starts
    }

    /// Rows of `row` elements with all repetitions.
    fn repeated<T: Copy>(self, values: &[T], row: usize) -> Vec<T> {
        let once: Vec<T> = values.chunks(row.max(1)).flat_map(|row| row.repeat(self.heads)).collect();
        once.repeat(self.samples)
    }
}

/// What the trial compares, in words.
pub(super) fn covers(units: MatrixUnits) -> String {
    let Pass { lengths, samples, heads } = Pass::of(units);
    let (tokens, heads) = (lengths.iter().sum::<u32>() * samples as u32, HEADS * heads as u32);
    let count = lengths.len() * samples;
    format!(
        "attention over {tokens} tokens in {count} samples, {heads} heads, with and without a window, forward and \
         backward: every element, canaries after all matrices"
    )
}

/// The kernels, each after a `change`, if they give the values of the CPU, now or in an earlier run
/// on this driver.
///
/// # Errors
/// [`OpError::Unfit`] if values differ; [`OpError::Gpu`] if a kernel does not compile.
pub(super) fn tried(
    gpu: &Gpu,
    size: HeadSize,
    units: MatrixUnits,
    change: impl Fn(KernelSpec) -> KernelSpec,
) -> Result<MixedAttention, OpError> {
    let (kernels, specs) = MixedAttention::untried(gpu, size, units, change)?;
    passed(gpu, &kernels, size.head_dim, Pass::of(units), &specs)?;
    Ok(kernels)
}

fn passed(gpu: &Gpu, kernels: &MixedAttention, head_dim: u32, pass: Pass, specs: &[KernelSpec]) -> Result<(), OpError> {
    if gpu.limits().max_storage_buffer_binding_size < ROOM {
        return Ok(());
    }
    let find = || {
        for window in WINDOWS {
            if let Some(reason) = differs(gpu, kernels, head_dim, pass, window)? {
                let kernel = format!("attention on matrix units, with heads of {head_dim}");
                return Err(OpError::Unfit { kernel, device: gpu.adapter().to_string(), reason });
            }
        }
        Ok(())
    };
    gpu.recall_or_find(specs, |record| (record == PASSED).then_some(()), |()| PASSED.to_vec(), find)
}

/// Describes the first difference from the CPU, if there is one.
fn differs(
    gpu: &Gpu,
    kernels: &MixedAttention,
    head_dim: u32,
    pass: Pass,
    window: Option<u32>,
) -> Result<Option<String>, OpError> {
    let starts = pass.starts(1);
    let tokens = starts.len() as u32;
    let scale = 1.0 / (head_dim as f32).sqrt();
    let heads = Heads { heads: HEADS, kv_heads: KV_HEADS, head_dim, scale, window };
    let shape = AttentionShape { first: 0, tokens, heads };
    let mut random = Random::default();
    let mut values = |heads: u32, factor: fn(u32) -> f32| -> Vec<f32> {
        (0..tokens * heads * head_dim).map(|i| factor(i / (heads * head_dim)) * random.uniform()).collect()
    };
    // Scores rise over the tokens of a block, and over many of them.
    let rising = |token: u32| 0.2 + 0.05 * (token % 160) as f32;
    let (q, k) = (values(HEADS, |_| 4.0), values(KV_HEADS, rising));
    let (v, d_out) = (values(KV_HEADS, |_| 1.0), values(HEADS, |_| 1.0));
    let (of_queries, of_keys) = ((HEADS * head_dim) as usize, (KV_HEADS * head_dim) as usize);
    let found = {
        let (times, starts) = (pass.heads as u32, pass.starts(pass.samples));
        let heads = Heads { heads: HEADS * times, kv_heads: KV_HEADS * times, ..heads };
        let shape = AttentionShape { tokens: starts.len() as u32, heads, ..shape };
        // At once without a window, and in two parts with one.
        let step = if window.is_some() { shape.tokens.div_ceil(2) } else { shape.tokens };
        let inputs = [(&q, of_queries), (&k, of_keys), (&v, of_keys), (&d_out, of_queries)];
        let inputs = inputs.map(|(values, row)| pass.repeated(values, row));
        run(gpu, kernels, &shape, step, &starts, &inputs)?
    };
    let found = match found {
        Ok(found) => found,
        Err(reason) => return Ok(Some(reason)),
    };
    let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let (q, k, v, d_out) = (wide(&q), wide(&k), wide(&v), wide(&d_out));
    let expected = reference(&Inputs { shape: &shape, starts: &starts, q: &q, k: &k, v: &v, d_out: &d_out });
    let differs = |((name, found), expected): ((&str, &Vec<f32>), Vec<f64>)| {
        let row = if name == "lse" { HEADS } else { head_dim };
        let of_token = expected.len() / tokens as usize;
        let expected = pass.repeated(&with_tolerances(&expected, row as usize), of_token);
        difference(found, expected.into_iter()).map(|reason| format!("{name}: {reason}"))
    };
    Ok(OUTPUTS.into_iter().zip(&found).zip(expected).find_map(differs))
}

/// Elements of rows, each with its tolerance.
fn with_tolerances(expected: &[f64], row: usize) -> Vec<(f64, f64)> {
    let highest = |values: &[f64]| values.iter().fold(0.0, |highest: f64, x| highest.max(x.abs()));
    let of_all = PART_OF_ALL * highest(expected);
    let tolerances = expected.chunks(row).flat_map(|values| {
        let tolerance = TOLERANCE * (highest(values) + of_all);
        values.iter().map(move |&x| (x, tolerance))
    });
    tolerances.collect()
}

/// A matrix with these rows, and a margin of another word.
fn with_margin(gpu: &Gpu, cols: u32, values: &[f32], margin: f32) -> Result<Mat, OpError> {
    let words = [values, &[margin; MARGIN]].concat();
    let range = BufferRange::whole(gpu.storage_with("trial", bytemuck::cast_slice(&words))?);
    Ok(Mat { range, rows: values.len() as u32 / cols.max(1), cols })
}

/// The elements of an output, if its margin is as it was.
fn read(gpu: &Gpu, mat: &Mat) -> Result<Result<Vec<f32>, String>, OpError> {
    let bytes = gpu.read(&mat.range)?;
    let words = bytes.chunks_exact(4).map(|word| f32::from_le_bytes(word.try_into().unwrap_or_default()));
    let mut words: Vec<f32> = words.collect();
    let margin = words.split_off((mat.elements() as usize).min(words.len()));
    let changed = margin.iter().take(MARGIN).any(|word| word.to_bits() != CANARY);
    Ok(if changed { Err("words after an output are overwritten".to_owned()) } else { Ok(words) })
}

/// The outputs of a forward and a backward pass, `step` queries at a time, the last ones first; or
/// the canary that was overwritten.
fn run(
    gpu: &Gpu,
    kernels: &MixedAttention,
    shape: &AttentionShape,
    step: u32,
    starts: &[u32],
    [q, k, v, d_out]: &[Vec<f32>; 4],
) -> Result<Result<[Vec<f32>; 5], String>, OpError> {
    let AttentionShape { tokens, heads: Heads { heads, kv_heads, head_dim, .. }, .. } = *shape;
    let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
    let input = |columns: u32, values: &[f32]| with_margin(gpu, columns, values, f32::NAN);
    let canary = f32::from_bits(CANARY);
    let output =
        |rows: u32, columns: u32| with_margin(gpu, columns, &vec![canary; rows as usize * columns as usize], canary);
    let (k, v) = (input(narrow, k)?, input(narrow, v)?);
    let [dk, dv] = [output(tokens, narrow)?, output(tokens, narrow)?];
    let starts = BufferRange::whole(gpu.storage_with("trial", bytemuck::cast_slice(starts))?);
    let mut parts = Vec::new();
    for first in (0..tokens).step_by(step.max(1) as usize).rev() {
        let shape = &AttentionShape { first, tokens: tokens.min(first + step), ..*shape };
        let rows = (first * wide) as usize..(shape.tokens * wide) as usize;
        let (q, d_out) = (input(wide, &q[rows.clone()])?, input(wide, &d_out[rows])?);
        let output = |columns| output(shape.queries(), columns);
        let (out, dq, lse, delta) = (output(wide)?, output(wide)?, output(heads)?, output(heads)?);
        // Those of later tokens are a margin.
        let [k, v, dk, dv] = [&k, &v, &dk, &dv].map(|mat| Mat { rows: shape.tokens, ..mat.clone() });
        let forward = Forward { shape, q: &q, k: &k, v: &v, starts: &starts, out: &out, lse: &lse };
        let add = shape.tokens < tokens;
        let backward = Backward { d_out: &d_out, delta: &delta, dq: &dq, dk: &dk, dv: &dv, add };
        let mut commands = gpu.commands("a test of attention");
        kernels.forward(&mut commands, &forward)?;
        kernels.backward(&mut commands, &forward, &backward)?;
        commands.submit()?;
        parts.push([read(gpu, &out)?, read(gpu, &lse)?, read(gpu, &dq)?, read(gpu, &delta)?]);
    }
    let of_keys = [read(gpu, &dk)?, read(gpu, &dv)?];
    Ok(together(parts, of_keys))
}

/// The outputs of all parts, the last one first, without the sums that are no output.
fn together(
    parts: Vec<[Result<Vec<f32>, String>; 4]>,
    [dk, dv]: [Result<Vec<f32>, String>; 2],
) -> Result<[Vec<f32>; 5], String> {
    let (mut out, mut lse, mut dq) = (Vec::new(), Vec::new(), Vec::new());
    for [of_out, of_lse, of_dq, of_delta] in parts.into_iter().rev() {
        out.extend(of_out?);
        lse.extend(of_lse?);
        dq.extend(of_dq?);
        of_delta?;
    }
    Ok([out, lse, dq, dk?, dv?])
}

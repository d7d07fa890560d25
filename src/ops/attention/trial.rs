//! Compares the kernels for matrix units with the CPU before their first use on a driver: a forward
//! and a backward pass of ragged samples, with shared keys, with and without a window, of all
//! queries at once and of one half after the other. Scores rise along the keys, so that sums are
//! scaled again.

use super::mixed::MixedAttention;
use super::reference::{Inputs, OUTPUTS, reference};
use super::shape::{AttentionShape, Backward, Forward};
use super::size::HeadSize;
use crate::dequant::sample::Random;
use crate::gpu::{BufferRange, Gpu, KernelSpec, MatrixUnits};
use crate::ops::heads::Heads;
use crate::ops::trial::{PASSED, ROOM, difference};
use crate::ops::{Mat, OpError};

/// Tokens of each sample.
const LENGTHS: [u32; 3] = [70, 1, 83];
const HEADS: u32 = 4;
const KV_HEADS: u32 = 2;
const WINDOWS: [Option<u32>; 2] = [None, Some(37)];
/// Maximum error, relative to the largest magnitude of a row. f16 has a tenth of it. A row may be
/// much smaller than the others, so a part of the largest magnitude of all counts, too.
const TOLERANCE: f64 = 1e-2;
const PART_OF_ALL: f64 = 0.1;

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
    passed(gpu, &kernels, size.head_dim, &specs)?;
    Ok(kernels)
}

fn passed(gpu: &Gpu, kernels: &MixedAttention, head_dim: u32, specs: &[KernelSpec]) -> Result<(), OpError> {
    if gpu.limits().max_storage_buffer_binding_size < ROOM {
        return Ok(());
    }
    let find = || {
        for window in WINDOWS {
            if let Some(reason) = differs(gpu, kernels, head_dim, window)? {
                let kernel = format!("attention on matrix units, with heads of {head_dim}");
                return Err(OpError::Unfit { kernel, device: gpu.adapter().to_string(), reason });
            }
        }
        Ok(())
    };
    gpu.recall_or_find(specs, |record| (record == PASSED).then_some(()), |()| PASSED.to_vec(), find)
}

/// Describes the first difference from the CPU, if there is one.
fn differs(gpu: &Gpu, kernels: &MixedAttention, head_dim: u32, window: Option<u32>) -> Result<Option<String>, OpError> {
    let tokens: u32 = LENGTHS.iter().sum();
    let mut starts = Vec::new();
    for length in LENGTHS {
        starts.resize(starts.len() + length as usize, starts.len() as u32);
    }
    let scale = 1.0 / (head_dim as f32).sqrt();
    let heads = Heads { heads: HEADS, kv_heads: KV_HEADS, head_dim, scale, window };
    let shape = AttentionShape { first: 0, tokens, heads };
    let mut random = Random::default();
    let mut values = |heads: u32, factor: fn(u32) -> f32| -> Vec<f32> {
        (0..tokens * heads * head_dim).map(|i| factor(i / (heads * head_dim)) * random.uniform()).collect()
    };
    let (q, k) = (values(HEADS, |_| 4.0), values(KV_HEADS, |token| 0.2 + 0.05 * token as f32));
    let (v, d_out) = (values(KV_HEADS, |_| 1.0), values(HEADS, |_| 1.0));
    // At once without a window, and in two parts with one.
    let step = if window.is_some() { tokens.div_ceil(2) } else { tokens };
    let found = run(gpu, kernels, &shape, step, &starts, [&q, &k, &v, &d_out])?;
    let wide = |values: &[f32]| values.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let (q, k, v, d_out) = (wide(&q), wide(&k), wide(&v), wide(&d_out));
    let expected = reference(&Inputs { shape: &shape, starts: &starts, q: &q, k: &k, v: &v, d_out: &d_out });
    let differs = |((name, found), expected): ((&str, &Vec<f32>), Vec<f64>)| {
        let row = if name == "lse" { HEADS } else { head_dim };
        difference(found, with_tolerances(&expected, row as usize).into_iter()).map(|reason| format!("{name}: {reason}"))
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

/// The outputs of a forward and a backward pass, `step` queries at a time, the last ones first.
fn run(
    gpu: &Gpu,
    kernels: &MixedAttention,
    shape: &AttentionShape,
    step: u32,
    starts: &[u32],
    [q, k, v, d_out]: [&[f32]; 4],
) -> Result<[Vec<f32>; 5], OpError> {
    let AttentionShape { tokens, heads: Heads { heads, kv_heads, head_dim, .. }, .. } = *shape;
    let (wide, narrow) = (heads * head_dim, kv_heads * head_dim);
    let input = |columns: u32, values: &[f32]| Mat::from_slice(gpu, "trial", values.len() as u32 / columns, columns, values);
    let (k, v) = (input(narrow, k)?, input(narrow, v)?);
    let [dk, dv] = [Mat::new(gpu, "trial", tokens, narrow)?, Mat::new(gpu, "trial", tokens, narrow)?];
    let starts = BufferRange::whole(gpu.storage_with("trial", bytemuck::cast_slice(starts))?);
    let mut parts = Vec::new();
    for first in (0..tokens).step_by(step.max(1) as usize).rev() {
        let shape = &AttentionShape { first, tokens: tokens.min(first + step), ..*shape };
        let rows = (first * wide) as usize..(shape.tokens * wide) as usize;
        let (q, d_out) = (input(wide, &q[rows.clone()])?, input(wide, &d_out[rows])?);
        let output = |columns| Mat::new(gpu, "trial", shape.queries(), columns);
        let (out, dq, lse, delta) = (output(wide)?, output(wide)?, output(heads)?, output(heads)?);
        let [k, v, dk, dv] = [&k, &v, &dk, &dv].map(|mat| mat.narrow(shape.tokens, narrow));
        let forward = Forward { shape, q: &q, k: &k, v: &v, starts: &starts, out: &out, lse: &lse };
        let add = shape.tokens < tokens;
        let backward = Backward { d_out: &d_out, delta: &delta, dq: &dq, dk: &dk, dv: &dv, add };
        let mut commands = gpu.commands("a test of attention");
        kernels.forward(&mut commands, &forward)?;
        kernels.backward(&mut commands, &forward, &backward)?;
        commands.submit()?;
        parts.push([out.read(gpu)?, lse.read(gpu)?, dq.read(gpu)?]);
    }
    let [out, lse, dq] = [0, 1, 2].map(|at| parts.iter().rev().flat_map(|part| part[at].iter().copied()).collect());
    Ok([out, lse, dq, dk.read(gpu)?, dv.read(gpu)?])
}

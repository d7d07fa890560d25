//! Attention in float64 on the CPU, one row of one head at a time.

use super::shape::AttentionShape;
use crate::ops::heads::Heads;
use crate::ops::trial::{add, dot};

/// The inputs of a pass.
#[derive(Debug, Clone, Copy)]
pub(super) struct Inputs<'a> {
    pub shape: &'a AttentionShape,
    pub starts: &'a [u32],
    pub q: &'a [f64],
    pub k: &'a [f64],
    pub v: &'a [f64],
    pub d_out: &'a [f64],
}

/// The names of its outputs.
pub(super) const OUTPUTS: [&str; 5] = ["out", "lse", "dq", "dk", "dv"];

/// The outputs, as [`OUTPUTS`] names them.
pub(super) fn reference(inputs: &Inputs<'_>) -> [Vec<f64>; 5] {
    let &Inputs { shape, starts, q, k, v, d_out } = inputs;
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
        let row_lse = highest + scores.iter().map(|s| (s - highest).exp()).sum::<f64>().ln();
        lse.push(row_lse);
        let weights: Vec<f64> = scores.iter().map(|s| (s - row_lse).exp()).collect();
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

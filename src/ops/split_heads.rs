//! From the joined products of q, k and v of new tokens to queries, and to keys and values in a KV
//! cache: the norms per head, the rotation and the places in one dispatch, for generation.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::heads::{Heads, check_head_dim};
use super::{Mat, OpError, same};
use crate::gpu::{Commands, Gpu, Kernel, KernelSpec, Shader};

/// Splits joined products into heads.
#[derive(Debug, Clone)]
pub struct SplitHeads {
    gpu: Gpu,
    plain: Kernel,
    with_norms: Kernel,
}

/// The input of a split, and where its rows are.
#[derive(Debug, Clone, Copy)]
pub struct JoinedHeads<'a> {
    /// [tokens, (heads + 2 * kv_heads) * head_dim]: queries, keys and values of each token.
    pub joined: &'a Mat,
    /// The heads.
    pub heads: Heads,
    /// Earlier tokens in the cache.
    pub past: u32,
    /// Gammas [1, head_dim] of the norms of queries and keys, and their epsilon.
    pub norms: Option<([&'a Mat; 2], f32)>,
    /// Cosines and sines [positions, rotated elements of a head], and the row of the first token.
    pub angles: Option<(&'a Mat, u32)>,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    half: u32,
    past: u32,
    first: u32,
    rotated: u32,
    epsilon: f32,
}

const OPERATION: &str = "a split into heads";

impl JoinedHeads<'_> {
    /// Heads of queries, keys and values.
    fn all_heads(&self) -> u32 {
        self.heads.heads.saturating_add(self.heads.kv_heads.saturating_mul(2))
    }

    /// Checks the shapes, and that keys and values have rows for the tokens.
    pub(super) fn check(&self, operation: &'static str, [keys, values]: [&Mat; 2]) -> Result<(), OpError> {
        let &JoinedHeads { joined, heads: shape, past, norms, angles } = self;
        let (tokens, head_dim) = (joined.rows, shape.head_dim);
        check_head_dim(operation, head_dim)?;
        shape.check(operation, head_dim)?;
        joined.check(operation, tokens, self.all_heads().saturating_mul(head_dim))?;
        shape.check_keys(operation, keys.rows, &[keys, values])?;
        let end = u64::from(past) + u64::from(tokens);
        same(operation, "the number of cache rows", end.min(keys.rows.into()), end)?;
        if let Some((gammas, _)) = norms {
            gammas.iter().try_for_each(|gamma| gamma.check(operation, 1, head_dim))?;
        }
        if let Some((table, first)) = angles {
            table.check(operation, table.rows, table.cols / 2 * 2)?;
            same(operation, "the rotated elements of a head", table.cols.min(head_dim).into(), table.cols.into())?;
            let end = u64::from(first) + u64::from(tokens);
            same(operation, "the number of positions", end.min(table.rows.into()), end)?;
        }
        Ok(())
    }
}

impl SplitHeads {
    /// Compiles the kernels for `gpu`.
    ///
    /// # Errors
    /// [`OpError::Gpu`].
    pub fn new(gpu: &Gpu) -> Result<Self, OpError> {
        // SAFETY: `record` checks `joined` and `queries` against tokens and heads, keys and values
        // against `past + tokens` rows, gammas against the size of a head, and the table against
        // `first + tokens` rows; there is no access past these; loops end at the size of a head or
        // halve; workgroup memory is written, with a barrier after it, before it is read.
        let shader = unsafe { Shader::trusted("split_heads", include_str!("../../shaders/split_heads.wgsl")) };
        let kernel =
            |norm: f64| gpu.kernel(&KernelSpec { shader: shader.clone(), entry: "main", constants: vec![("NORM", norm)] });
        Ok(Self { gpu: gpu.clone(), plain: kernel(0.0)?, with_norms: kernel(1.0)? })
    }

    /// Records the split: rotated queries to `queries` [tokens, heads * head_dim], and rotated keys
    /// and values to the rows from `past` on of `keys` and `values` [capacity, kv_heads *
    /// head_dim].
    ///
    /// # Errors
    /// [`OpError::Shape`], [`OpError::Value`]; nothing is then recorded.
    pub fn record(
        &self,
        commands: &mut Commands,
        of: &JoinedHeads<'_>,
        queries: &Mat,
        [keys, values]: [&Mat; 2],
    ) -> Result<(), OpError> {
        let &JoinedHeads { joined, heads: Heads { heads, kv_heads, head_dim, .. }, past, norms, angles } = of;
        let (tokens, all) = (joined.rows, of.all_heads());
        of.check(OPERATION, [keys, values])?;
        of.heads.check_queries(OPERATION, tokens, &[queries])?;
        if tokens == 0 {
            return Ok(());
        }
        let ([query_gamma, key_gamma], epsilon) = norms.unwrap_or(([joined; 2], 0.0));
        let (table, first) = angles.unwrap_or((joined, 0));
        let rotated = angles.map_or(0, |(table, _)| table.cols / 2);
        let params = Params { tokens, heads, kv_heads, half: head_dim / 2, past, first, rotated, epsilon };
        let bindings = [joined, query_gamma, key_gamma, table, queries, keys, values].map(|mat| mat.range.clone());
        let kernel = if norms.is_some() { &self.with_norms } else { &self.plain };
        let groups = self.gpu.grid(u64::from(tokens) * u64::from(all));
        commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), groups, 2 * joined.range.size);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

    use super::super::testing::{assert_untouched, gpu, mat, poisoned, random, random_mat};
    use super::super::{RmsNorm, Rotary, inverse_frequencies};
    use super::*;
    use crate::arch::config::RopeScaling;

    /// The columns of some heads of each token.
    fn columns(all: &[f32], width: usize, range: std::ops::Range<usize>) -> Vec<f32> {
        all.chunks(width).flat_map(|row| row[range.clone()].to_vec()).collect()
    }

    /// The split equals the operations that it joins.
    #[test]
    fn it_is_norms_rotations_and_copies() {
        let Some(gpu) = gpu() else { return };
        let split = SplitHeads::new(&gpu).unwrap();
        for (dim, heads, kv_heads, past, tokens, norm, rotated) in [
            (128, 4, 2, 5, 1, true, Some(128)),
            (20, 3, 1, 0, 7, true, Some(20)),
            (64, 2, 2, 3, 8, false, Some(64)),
            (252, 2, 1, 1, 3, true, None),
            (4, 1, 1, 9, 2, false, None),
            (128, 2, 1, 2, 3, false, Some(96)),
            (20, 2, 1, 1, 2, true, Some(4)),
        ] {
            let width = ((heads + 2 * kv_heads) * dim) as usize;
            let elements = random(u64::from(dim), tokens as usize * width);
            let joined = mat(&gpu, tokens, width as u32, &elements);
            let shape = Heads { heads, kv_heads, head_dim: dim, scale: 1.0, window: None };
            let gammas = [1, 2].map(|seed| random_mat(&gpu, seed, 1, dim).0);
            let table = inverse_frequencies(1e4, rotated.unwrap_or(dim), &RopeScaling::Default, 1)
                .upload(&gpu, past + tokens)
                .unwrap();
            let queries = poisoned(&gpu, tokens, heads * dim);
            let [keys, values] = [0, 1].map(|_| poisoned(&gpu, past + tokens + 1, kv_heads * dim));
            let of = JoinedHeads {
                joined: &joined,
                heads: shape,
                past,
                norms: norm.then_some(([&gammas[0], &gammas[1]], 1e-3)),
                angles: rotated.map(|_| (&table, past)),
            };
            let mut commands = gpu.commands("split");
            split.record(&mut commands, &of, &queries, [&keys, &values]).unwrap();
            // The operations one by one.
            let (end, kv) = ((heads * dim) as usize, (kv_heads * dim) as usize);
            let expected: Vec<Mat> = [0..end, end..end + kv]
                .into_iter()
                .zip([heads, kv_heads])
                .zip(&gammas)
                .map(|((range, heads), gamma)| {
                    let raw = mat(&gpu, tokens, heads * dim, &columns(&elements, width, range));
                    let normed = poisoned(&gpu, tokens, heads * dim);
                    let out = if norm {
                        RmsNorm::new(&gpu).unwrap().forward(&mut commands, &raw, gamma, 1e-3, &normed).unwrap();
                        normed
                    } else {
                        raw
                    };
                    if rotated.is_some() {
                        Rotary::new(&gpu).unwrap().forward_from(&mut commands, &out, heads, past, &table).unwrap();
                    }
                    out
                })
                .collect();
            commands.submit().unwrap();
            let close = |found: &[f32], expected: &[f32]| {
                assert_eq!(found.len(), expected.len());
                found.iter().zip(expected).for_each(|(a, b)| assert!((a - b).abs() <= 1e-6 * (1.0 + b.abs()), "{a} {b}"));
            };
            close(&queries.read(&gpu).unwrap(), &expected[0].read(&gpu).unwrap());
            let (keys_read, values_read) = (keys.read(&gpu).unwrap(), values.read(&gpu).unwrap());
            let (from, to) = (past as usize * kv, (past + tokens) as usize * kv);
            close(&keys_read[from..to], &expected[1].read(&gpu).unwrap());
            assert_eq!(&values_read[from..to], columns(&elements, width, end + kv..width));
            for read in [keys_read, values_read] {
                assert!(read[..from].iter().chain(&read[to..]).all(|x| x.is_nan()), "other rows are untouched");
            }
            [&queries, &keys, &values].into_iter().for_each(|mat| assert_untouched(&gpu, mat));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let Some(gpu) = gpu() else { return };
        let split = SplitHeads::new(&gpu).unwrap();
        let zeros = |rows, cols| Mat::new(&gpu, "test", rows, cols).unwrap();
        let (joined, queries, cache, table) = (zeros(2, 32), zeros(2, 16), zeros(5, 8), zeros(5, 8));
        let heads = Heads { heads: 2, kv_heads: 1, head_dim: 8, scale: 1.0, window: None };
        let of = JoinedHeads { joined: &joined, heads, past: 3, norms: None, angles: Some((&table, 3)) };
        let refused = |of: JoinedHeads<'_>, queries: &Mat, keys: &Mat| {
            split.record(&mut gpu.commands("test"), &of, queries, [keys, &cache]).is_err()
        };
        assert!(!refused(of, &queries, &cache));
        for past in [4, u32::MAX] {
            assert!(refused(JoinedHeads { past, ..of }, &queries, &cache));
        }
        for first in [4, u32::MAX] {
            assert!(refused(JoinedHeads { angles: Some((&table, first)), ..of }, &queries, &cache));
        }
        assert!(!refused(JoinedHeads { angles: Some((&zeros(5, 6), 3)), ..of }, &queries, &cache));
        for cols in [7, 10] {
            assert!(refused(JoinedHeads { angles: Some((&zeros(5, cols), 3)), ..of }, &queries, &cache));
        }
        assert!(refused(of, &cache, &cache));
        assert!(refused(of, &queries, &zeros(4, 8)));
        assert!(refused(JoinedHeads { joined: &queries, ..of }, &queries, &cache));
        assert!(refused(JoinedHeads { norms: Some(([&queries, &queries], 0.0)), ..of }, &queries, &cache));
        assert!(refused(JoinedHeads { heads: Heads { kv_heads: 0, ..heads }, ..of }, &queries, &cache));
        assert!(refused(JoinedHeads { heads: Heads { head_dim: 6, ..heads }, ..of }, &queries, &cache));
    }
}

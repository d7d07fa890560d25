//! Causal grouped-query attention with an online softmax: memory grows with the tokens, not with
//! their square. Forward and backward follow FlashAttention-2 (Dao 2023, "FlashAttention-2: Faster
//! Attention with Better Parallelism and Work Partitioning"): a tile of queries meets one tile of
//! keys after the other and keeps the running maximum and sum of each row; the backward pass
//! computes the probabilities again from the stored log-sum-exp (`lse`) and from `delta`, the sums
//! of output times its gradient.
//!
//! There are two sets of kernels: in float32, for every device ([`float`]), and on matrix units,
//! with f16 operands and float32 sums ([`mixed`]).

mod float;
mod mixed;
#[cfg(test)]
mod mixed_tests;
mod reference;
mod scratch;
mod shape;
mod size;
mod source;
#[cfg(test)]
mod tests;
mod trial;

use super::heads::{Heads, check_head_dim};
use super::{Mat, same};
use crate::gpu::{BufferRange, Commands, Gpu, KernelSpec, MatrixUnits};
use crate::ops::error::OpError;
use crate::ops::mixed_test::MixedTest;

use float::FloatAttention;
use mixed::MixedAttention;
use shape::{Backward, Forward};
use size::HeadSize;

pub use shape::AttentionShape;

/// Causal attention with query heads that share key and value heads, forward and backward.
///
/// Outputs must not share a buffer with inputs. Sums have a fixed order, so the same inputs give
/// the same bits.
#[derive(Debug, Clone)]
pub struct Attention {
    head_dim: u32,
    kernels: Kernels,
}

#[derive(Debug, Clone)]
enum Kernels {
    Float(FloatAttention),
    Mixed(MixedAttention),
}

const OPERATION: &str = "attention";

impl Attention {
    /// Compiles the kernels for heads of `head_dim` elements: a multiple of 4, at most 256. With
    /// `units`, operands are rounded to f16 and run on matrix units; without, all is float32.
    ///
    /// Kernels for matrix units are compared with the CPU before their first use on a driver.
    ///
    /// # Errors
    /// [`OpError::Value`] for any other size; [`OpError::Gpu`] if a kernel does not compile;
    /// [`OpError::Unfit`] if the results of a kernel are wrong on this device.
    pub fn new(gpu: &Gpu, head_dim: u32, units: Option<MatrixUnits>) -> Result<Self, OpError> {
        check_head_dim(OPERATION, head_dim)?;
        let kernels = match units {
            Some(units) if MixedAttention::fits(gpu, head_dim) => {
                Kernels::Mixed(trial::tried(gpu, HeadSize::new(head_dim), units, |spec| spec)?)
            }
            _ => Kernels::Float(FloatAttention::new(gpu, head_dim)?),
        };
        Ok(Self { head_dim, kernels })
    }

    /// The test of the kernels on matrix units for heads of `head_dim` elements, each after a
    /// `change`. `None` if heads of this size have no such kernels on this device.
    pub fn mixed_test<'a>(
        gpu: &'a Gpu,
        head_dim: u32,
        units: MatrixUnits,
        change: impl Fn(KernelSpec) -> KernelSpec + Copy + 'a,
    ) -> Option<MixedTest<'a>> {
        if check_head_dim(OPERATION, head_dim).is_err() || !MixedAttention::fits(gpu, head_dim) {
            return None;
        }
        let size = HeadSize::new(head_dim);
        let specs = MixedAttention::specs(size, units).map(change);
        let test = move || trial::tried(gpu, size, units, change).map(drop);
        let kernel = format!("attention with heads of {head_dim}");
        Some(MixedTest::new(gpu, [kernel, trial::covers(units)], specs.into(), test))
    }

    /// GPU memory of the operation in bytes, for up to `queries` queries of up to `tokens` tokens.
    pub fn scratch_bytes(units: Option<MatrixUnits>, [queries, tokens]: [u32; 2], heads: &Heads, training: bool) -> u64 {
        units.map_or(0, |_| scratch::Layout::new(queries, tokens, heads, training).bytes())
    }

    /// Bytes of the largest binding of that memory.
    pub fn scratch_binding([queries, tokens]: [u32; 2], heads: &Heads, training: bool) -> u64 {
        scratch::Layout::new(queries, tokens, heads, training).largest_binding()
    }

    /// Reserves the memory of [`Attention::scratch_bytes`]. Without this call, it grows on demand.
    ///
    /// # Errors
    /// [`OpError::Gpu`] if memory is exhausted.
    pub fn reserve(&self, [queries, tokens]: [u32; 2], heads: &Heads, training: bool) -> Result<(), OpError> {
        match &self.kernels {
            Kernels::Float(_) => Ok(()),
            Kernels::Mixed(kernels) => kernels.reserve(queries, tokens, heads, training),
        }
    }

    /// Records `out = softmax(scale * q k^T) v`, over the tokens that each token attends to.
    ///
    /// `q` and `out` are [queries, heads * head_dim], `k` and `v` [tokens, kv_heads * head_dim];
    /// `starts` has one u32 per token: the first token of its sample. `lse`, [queries, heads],
    /// receives the log-sum-exp of the scores, for the backward pass.
    ///
    /// # Errors
    /// [`OpError::Shape`]; [`OpError::Gpu`] without memory for the f16 operands. Nothing is then
    /// recorded.
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
        let tensors = Forward { shape, q, k, v, starts, out, lse };
        match &self.kernels {
            _ if shape.queries() == 0 => {}
            Kernels::Float(kernels) => kernels.forward(commands, &tensors),
            Kernels::Mixed(kernels) => kernels.forward(commands, &tensors)?,
        }
        Ok(())
    }

    /// Records the gradients `dq`, `dk` and `dv` for the gradient `d_out` of the output. They have
    /// the shapes of q, k and v. `dq` is overwritten, `dk` and `dv`, too, unless `add` is set: then
    /// the gradients are added, those of other queries of the same keys.
    ///
    /// `out` and `lse` are what [`Attention::forward`] wrote. `delta`, [queries, heads], is
    /// overwritten with the sums of `d_out * out` over each head.
    ///
    /// # Errors
    /// As [`Attention::forward`].
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
        add: bool,
    ) -> Result<(), OpError> {
        self.check(shape, &[q, out, d_out, dq], &[k, v, dk, dv], &[lse, delta], starts)?;
        let forward = Forward { shape, q, k, v, starts, out, lse };
        let backward = Backward { d_out, delta, dq, dk, dv, add };
        match &self.kernels {
            _ if shape.queries() == 0 => {}
            Kernels::Float(kernels) => kernels.backward(commands, &forward, &backward),
            Kernels::Mixed(kernels) => kernels.backward(commands, &forward, &backward)?,
        }
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
        let &AttentionShape { first, tokens, heads } = shape;
        heads.check(OPERATION, self.head_dim)?;
        if first > tokens {
            let (expected, found) = (tokens.into(), first.into());
            return Err(OpError::Shape { operation: OPERATION, what: "the first query", expected, found });
        }
        heads.check_queries(OPERATION, shape.queries(), of_queries)?;
        heads.check_keys(OPERATION, tokens, of_keys)?;
        of_rows.iter().try_for_each(|mat| mat.check(OPERATION, shape.queries(), heads.heads))?;
        let bytes = 4 * u64::from(tokens);
        same(OPERATION, "the size of the samples' starts", bytes, starts.size.min(bytes))
    }
}

//! Attention in float32.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::shape::{AttentionShape, Backward, Forward};
use crate::gpu::{BufferRange, Commands, Gpu, Kernel, KernelSpec, Shader};
use crate::ops::heads::{Heads, MAX_HEAD_DIM};
use crate::ops::{Mat, OpError};

/// The tiling of a workgroup, as constants of the shader. A thread has 4 rows and 4 columns of a
/// tile.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tiling {
    /// Threads along the columns of a tile.
    pub columns: u32,
    /// Threads along the rows of a tile: at least `columns`, and a divisor of 4 * `columns`.
    pub rows: u32,
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

/// The kernels for heads of one size.
#[derive(Debug, Clone)]
pub(super) struct FloatAttention {
    gpu: Gpu,
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
    first: u32,
    add: u32,
    pad: u32,
}

impl FloatAttention {
    /// Compiles the kernels.
    ///
    /// # Errors
    /// [`OpError::Gpu`] if a kernel does not compile.
    pub fn new(gpu: &Gpu, head_dim: u32) -> Result<Self, OpError> {
        Self::with(gpu, head_dim, Tiling::DEFAULT)
    }

    pub fn with(gpu: &Gpu, head_dim: u32, tiling: Tiling) -> Result<Self, OpError> {
        // SAFETY: `Attention` checks every tensor against `AttentionShape`, and the
        // kernels index by tokens and heads below its counts; the values in `starts` can only end
        // loops early, and all loops end at `tokens`; workgroup memory is written, with a barrier
        // after it, before it is read.
        let shader = unsafe { Shader::trusted("attention", include_str!("../../../shaders/attention.wgsl")) };
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
            tiling,
            forward: kernel("forward")?,
            row_products: kernel("row_products")?,
            query_gradient: kernel("query_gradient")?,
            key_gradient: kernel("key_gradient")?,
            value_gradient: kernel("value_gradient")?,
        })
    }

    /// Records the forward pass of checked tensors.
    pub fn forward(&self, commands: &mut Commands, tensors: &Forward<'_>) {
        let &Forward { shape, q, k, v, starts, out, lse } = tensors;
        // This entry point does not use `row_b` and `delta` of the module.
        let roles = Roles { rows: [q, q], columns: [k, v], starts, lse, delta: lse, out, row_sums: lse };
        self.dispatch(commands, &self.forward, shape, &roles);
    }

    /// Records the backward pass of checked tensors.
    pub fn backward(&self, commands: &mut Commands, forward: &Forward<'_>, backward: &Backward<'_>) {
        let &Forward { shape, q, k, v, starts, out, lse } = forward;
        let &Backward { d_out, delta, dq, dk, dv, add } = backward;
        let by_query = Roles { rows: [q, d_out], columns: [k, v], starts, lse, delta, out: dq, row_sums: delta };
        let by_key = Roles { rows: [k, v], columns: [q, d_out], out: dk, ..by_query };
        self.sum_rows(commands, shape, out, d_out, &by_query);
        self.dispatch(commands, &self.query_gradient, shape, &by_query);
        self.dispatch_keys(commands, &self.key_gradient, shape, &by_key, add);
        self.dispatch_keys(commands, &self.value_gradient, shape, &Roles { out: dv, ..by_key }, add);
    }

    /// Dispatches a kernel whose rows are queries: one workgroup per block of rows and head.
    fn dispatch(&self, commands: &mut Commands, kernel: &Kernel, shape: &AttentionShape, roles: &Roles<'_>) {
        let groups = [shape.heads.heads, shape.queries().div_ceil(self.tiling.block()), 1];
        let params = params(shape, false);
        commands.dispatch(kernel, &roles.bindings(), bytemuck::bytes_of(&params), groups, roles.bytes());
    }

    /// Dispatches a kernel whose rows are keys. Their gradients are added if `add` is set.
    fn dispatch_keys(&self, commands: &mut Commands, kernel: &Kernel, shape: &AttentionShape, roles: &Roles<'_>, add: bool) {
        let groups = [shape.heads.kv_heads, shape.tokens.div_ceil(self.tiling.block()), 1];
        let params = params(shape, add);
        commands.dispatch(kernel, &roles.bindings(), bytemuck::bytes_of(&params), groups, roles.bytes());
    }

    /// Dispatches `delta`: the sums of out * d_out.
    fn sum_rows(&self, commands: &mut Commands, shape: &AttentionShape, out: &Mat, d_out: &Mat, roles: &Roles<'_>) {
        let rows = u64::from(shape.queries()) * u64::from(shape.heads.heads);
        let groups = self.gpu.grid(rows.div_ceil(self.tiling.rows.into()));
        let roles = Roles { rows: [out, d_out], ..*roles };
        let bytes = out.range.size + d_out.range.size;
        let params = params(shape, false);
        commands.dispatch(&self.row_products, &roles.bindings(), bytemuck::bytes_of(&params), groups, bytes);
    }
}

fn params(shape: &AttentionShape, add: bool) -> Params {
    let &AttentionShape { first, tokens, heads: Heads { heads, kv_heads, scale, .. } } = shape;
    Params { tokens, heads, kv_heads, scale, window: shape.heads.window_size(), first, add: add.into(), pad: 0 }
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

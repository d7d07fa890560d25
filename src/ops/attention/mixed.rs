//! Attention on matrix units: f16 operands, float32 sums.
//!
//! Before a pass, two small kernels find the largest magnitudes and write f16 copies of queries,
//! keys, values and the gradient of the output, each times a power of two. So f16 neither overflows
//! nor loses small rows. `shaders/attention_units.wgsl` has the scales.
//!
//! A matrix of 16 rows and all elements of a head stays in registers. Heads above
//! 128 elements have no registers for all sums: several workgroups share a
//! block, and each has a part of the columns of the result.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::scratch::{Layout, Part, Parts, Scratch};
use super::shape::{AttentionShape, Backward, Forward};
use super::size::{BLOCK, HeadSize};
use super::source::expand;
use crate::gpu::{BufferRange, Commands, Gpu, Kernel, KernelSpec, MatrixUnits, Shader};
use crate::ops::OpError;
use crate::ops::heads::Heads;

/// Threads of a workgroup, as in the shaders.
const THREADS: u32 = 128;
/// Workgroup memory of the kernels for the largest heads.
const MAX_WORKGROUP_BYTES: u32 = 32 << 10;

/// The kernels for heads of one size.
#[derive(Debug, Clone)]
pub(super) struct MixedAttention {
    size: HeadSize,
    scratch: Scratch,
    measure: Kernel,
    place: Kernel,
    place_d_out: Kernel,
    forward: Kernel,
    query_gradient: Kernel,
    key_gradient: Kernel,
}

/// The kernels that multiply matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Product {
    Forward,
    QueryGradient,
    KeyGradient,
}

impl Product {
    #[cfg(test)]
    pub const ALL: [Self; 3] = [Self::Forward, Self::QueryGradient, Self::KeyGradient];

    fn name(self) -> &'static str {
        match self {
            Self::Forward => "attention_units_forward",
            Self::QueryGradient => "attention_units_queries",
            Self::KeyGradient => "attention_units_keys",
        }
    }

    fn template(self) -> &'static str {
        match self {
            Self::Forward => include_str!("../../../shaders/attention_units_forward.wgsl"),
            Self::QueryGradient => include_str!("../../../shaders/attention_units_queries.wgsl"),
            Self::KeyGradient => include_str!("../../../shaders/attention_units_keys.wgsl"),
        }
    }

    /// Workgroups of a block, each with a part of the columns.
    fn splits(self, size: HeadSize) -> u32 {
        match self {
            _ if !size.large() => 1,
            Self::Forward => 1,
            Self::QueryGradient => 2,
            Self::KeyGradient => 4,
        }
    }

    /// Rows of the other side in a round of the loop.
    fn round(self, size: HeadSize) -> u32 {
        if self == Self::Forward && !size.large() { 32 } else { 16 }
    }

    /// The counts of the template.
    fn counts(self, size: HeadSize) -> Vec<(&'static str, u32)> {
        let (fragments, round) = (size.fragments(), self.round(size));
        // The matrices of the block's own rows go to registers in chunks of this number.
        let chunk = 1 << fragments.trailing_zeros().min(2);
        // Strides are odd multiples of 16 bytes: rows are then in different banks.
        let (stage_stride, tile_stride) = (4 * chunk + 2, 4 * fragments + 2);
        let weight_stride = if round == 16 { 4 } else { round / 4 + 2 };
        let score_stride = round / 4 + 1;
        let sums = fragments / self.splits(size);
        let group = if sums.is_multiple_of(2) && round == 32 { 2 } else { 1 };
        let tiles = if self == Self::Forward { 1 } else { 2 };
        vec![
            ("HEAD", size.head_dim / 4),
            ("VECS", size.vecs()),
            ("CHUNK", chunk),
            ("CHUNKS", fragments / chunk),
            ("STAGE_STRIDE", stage_stride),
            ("TILE_STRIDE", tile_stride),
            ("TILE", (BLOCK * stage_stride).max(tiles * round * tile_stride)),
            ("VALUE_TILE", round * tile_stride),
            ("ROUND", round),
            ("LOADS", round * 2 * fragments / THREADS),
            ("PARTIAL", u32::from(!(round * 2 * fragments).is_multiple_of(THREADS))),
            ("KEY_FRAGMENTS", round / 16),
            ("OWN", round / 8),
            ("SCORE_STRIDE", score_stride),
            ("SCORES", BLOCK * score_stride),
            ("WEIGHT_STRIDE", weight_stride),
            ("WEIGHTS", BLOCK * weight_stride),
            ("SUMS", sums),
            ("GROUP", group),
            ("GROUPS", sums / group),
            ("TWO", 2),
            ("QUERY_VECS", round / 4),
        ]
    }

    /// The WGSL for heads of this size.
    pub fn source(self, size: HeadSize, units: MatrixUnits) -> String {
        let common = include_str!("../../../shaders/attention_units.wgsl");
        let template = [include_str!("../../../shaders/attention_units_tile.wgsl"), self.template()].concat();
        units.source(&format!("{common}\n{}", expand(&template, &self.counts(size))))
    }

    fn spec(self, size: HeadSize, units: MatrixUnits) -> KernelSpec {
        // SAFETY: `Attention` checks every tensor against `AttentionShape`, and `Scratch` has whole
        // blocks of rows for its tokens, and the rows of a round more. Rounds start below `tokens`.
        // `first_key_of` is at most its token, whatever is in `starts`, so loops end. Outputs are
        // written below `tokens` and within a head. Workgroup memory is written, with a barrier
        // after it, before it is read.
        let shader = unsafe { Shader::trusted(self.name(), self.source(size, units)) };
        KernelSpec { shader, entry: "main", constants: Vec::new() }
    }
}

/// A kernel that writes the copies.
fn halves_spec(entry: &'static str, size: HeadSize) -> KernelSpec {
    let source =
        [include_str!("../../../shaders/attention_units.wgsl"), include_str!("../../../shaders/attention_halves.wgsl")];
    // SAFETY: as for the products. The grid has the blocks and heads of `Layout`, inputs are read
    // below `tokens` and within a head.
    let shader = unsafe { Shader::trusted("attention_halves", source.concat()) };
    let constants = vec![("HEAD", (size.head_dim / 4).into()), ("VECS", size.vecs().into())];
    KernelSpec { shader, entry, constants }
}

/// Parameters of all kernels: `struct Params` of the shaders.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    tokens: u32,
    heads: u32,
    kv_heads: u32,
    scale: f32,
    window: u32,
    rows: u32,
    training: u32,
    first: u32,
    query_rows: u32,
    add: u32,
    pad: [u32; 2],
}

impl Params {
    fn new(shape: &AttentionShape, parts: &Parts, training: bool) -> Self {
        let heads = &shape.heads;
        Self {
            tokens: shape.tokens,
            heads: heads.heads,
            kv_heads: heads.kv_heads,
            scale: heads.scale,
            window: heads.window_size(),
            rows: parts.layout.rows(),
            training: training.into(),
            first: shape.first,
            query_rows: parts.layout.query_rows(),
            add: 0,
            pad: [0; 2],
        }
    }
}

impl MixedAttention {
    /// Whether the device has the workgroup memory for heads of this size.
    pub fn fits(gpu: &Gpu, head_dim: u32) -> bool {
        !HeadSize::new(head_dim).large() || gpu.limits().max_compute_workgroup_storage_size >= MAX_WORKGROUP_BYTES
    }

    /// Compiles the kernels, each after a `change`. They are not compared with the CPU yet: see
    /// `trial`. Also returns what they were compiled from.
    ///
    /// # Errors
    /// [`OpError::Gpu`] if a kernel does not compile.
    pub fn untried(
        gpu: &Gpu,
        size: HeadSize,
        units: MatrixUnits,
        change: impl Fn(KernelSpec) -> KernelSpec,
    ) -> Result<(Self, Vec<KernelSpec>), OpError> {
        let specs = Self::specs(size, units).map(change);
        let [measure, place, place_d_out, forward, query_gradient, key_gradient] = &specs;
        let kernels = Self {
            size,
            scratch: Scratch::new(gpu),
            measure: gpu.kernel(measure)?,
            place: gpu.kernel(place)?,
            place_d_out: gpu.kernel(place_d_out)?,
            forward: gpu.kernel(forward)?,
            query_gradient: gpu.kernel(query_gradient)?,
            key_gradient: gpu.kernel(key_gradient)?,
        };
        Ok((kernels, specs.into()))
    }

    /// What the kernels are compiled from.
    pub fn specs(size: HeadSize, units: MatrixUnits) -> [KernelSpec; 6] {
        let [measure, place, place_d_out] = ["measure", "place", "place_d_out"].map(|entry| halves_spec(entry, size));
        let products = [Product::Forward, Product::QueryGradient, Product::KeyGradient];
        let [forward, query_gradient, key_gradient] = products.map(|product| product.spec(size, units));
        [measure, place, place_d_out, forward, query_gradient, key_gradient]
    }

    /// Reserves the memory of the copies, for up to `queries` queries of up to `tokens` tokens.
    ///
    /// # Errors
    /// Without memory.
    pub fn reserve(&self, queries: u32, tokens: u32, heads: &Heads, backward: bool) -> Result<(), OpError> {
        Ok(self.scratch.reserve(&Layout::new(queries, tokens, heads, backward)).map(drop)?)
    }

    /// Records the forward pass of checked tensors.
    ///
    /// # Errors
    /// Without memory for the copies. Nothing is then recorded.
    pub fn forward(&self, commands: &mut Commands, tensors: &Forward<'_>) -> Result<(), OpError> {
        let &Forward { shape, q, k, v, starts, out, lse } = tensors;
        let parts = self.scratch.parts(shape, false)?;
        let params = Params::new(shape, &parts, false);
        self.copy(commands, tensors, None, &parts, &params);
        let bindings = [
            parts.of(Part::Queries),
            parts.of(Part::Keys),
            parts.of(Part::Values),
            parts.of(Part::Exponents),
            starts.clone(),
            out.range.clone(),
            lse.range.clone(),
        ];
        let bytes = [q, k, v, out].iter().map(|mat| mat.range.size).sum();
        let groups = [shape.heads.heads, shape.queries().div_ceil(BLOCK), Product::Forward.splits(self.size)];
        commands.dispatch(&self.forward, &bindings, bytemuck::bytes_of(&params), groups, bytes);
        Ok(())
    }

    /// Records the backward pass of checked tensors.
    ///
    /// # Errors
    /// As [`MixedAttention::forward`].
    pub fn backward(&self, commands: &mut Commands, forward: &Forward<'_>, backward: &Backward<'_>) -> Result<(), OpError> {
        let &Forward { shape, q, k, v, .. } = forward;
        let &Backward { dq, dk, dv, d_out, add, .. } = backward;
        let parts = self.scratch.parts(shape, true)?;
        let params = Params { add: add.into(), ..Params::new(shape, &parts, true) };
        self.copy(commands, forward, Some(backward), &parts, &params);
        let inputs = [Part::Queries, Part::Keys, Part::Values, Part::DOut, Part::Exponents, Part::OfQueries];
        let inputs = inputs.map(|part| parts.of(part));
        let bytes: u64 = [q, k, v, d_out].iter().map(|mat| mat.range.size).sum();
        let mut dispatch = |kernel, product: Product, [heads, rows]: [u32; 2], outputs: &[BufferRange]| {
            let bindings = [&inputs, outputs].concat();
            let groups = [heads, rows.div_ceil(BLOCK), product.splits(self.size)];
            commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), groups, bytes);
        };
        let (queries, keys) = ([shape.heads.heads, shape.queries()], [shape.heads.kv_heads, shape.tokens]);
        dispatch(&self.query_gradient, Product::QueryGradient, queries, std::slice::from_ref(&dq.range));
        dispatch(&self.key_gradient, Product::KeyGradient, keys, &[dk.range.clone(), dv.range.clone()]);
        Ok(())
    }

    /// Records the copies of the operands.
    fn copy(
        &self,
        commands: &mut Commands,
        forward: &Forward<'_>,
        backward: Option<&Backward<'_>>,
        parts: &Parts,
        params: &Params,
    ) {
        let &Forward { shape, q, k, v, starts, out, lse } = forward;
        // The forward kernels do not use what is not there.
        let (d_out, delta) = backward.map_or((q, lse), |backward| (backward.d_out, backward.delta));
        let range = |part| parts.of(part);
        let bindings = |halves: BufferRange| {
            [
                q.range.clone(),
                k.range.clone(),
                v.range.clone(),
                d_out.range.clone(),
                out.range.clone(),
                starts.clone(),
                lse.range.clone(),
                delta.range.clone(),
                halves,
                range(Part::Maxima),
                range(Part::RowMaxima),
                range(Part::Exponents),
                range(Part::OfQueries),
            ]
        };
        let (heads, blocks, query_blocks) = (&shape.heads, parts.layout.blocks, parts.layout.query_blocks);
        let columns = heads.heads + 2 * heads.kv_heads;
        let measured = if backward.is_some() { columns + heads.heads } else { columns };
        let params = bytemuck::bytes_of(params);
        let read: u64 = [q, k, v].iter().map(|mat| mat.range.size).sum();
        let copies = parts.copies();
        commands.dispatch(&self.measure, &bindings(copies.clone()), params, [measured, blocks, 1], read);
        commands.dispatch(&self.place, &bindings(copies), params, [columns, blocks, 1], read + read / 2);
        if backward.is_some() {
            let bytes = d_out.range.size * 5 / 2;
            let bindings = bindings(range(Part::DOut));
            commands.dispatch(&self.place_d_out, &bindings, params, [heads.heads, query_blocks, 1], bytes);
        }
    }
}

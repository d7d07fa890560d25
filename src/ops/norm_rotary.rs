//! The norm of every head and its rotation, in one pass over the heads, and their gradient.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::pieces::{ROWS, pieces};
use super::{Mat, OpError, rotary};
use crate::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

const OPERATION: &str = "norm and rotary";
/// Heads of a workgroup, each with 32 of its threads.
const HEADS: u64 = 8;

/// [`RmsNorm`](super::RmsNorm) of every head, then [`Rotary`](super::Rotary): the results have the
/// bits of the two operations for heads of at most 256 elements. Larger ones are summed in another
/// order.
#[derive(Debug, Clone)]
pub struct NormRotary {
    gpu: Gpu,
    forward: Kernel,
    backward: Kernel,
}

/// The norm and the rotation of some heads.
#[derive(Debug, Clone, Copy)]
pub struct Turn<'a> {
    /// Heads of a token.
    pub heads: u32,
    /// [1, head_dim].
    pub gamma: &'a Mat,
    /// Of the norm.
    pub epsilon: f32,
    /// The first token.
    pub first: u32,
    /// The first token of the sample of each token, from token 0 on.
    pub starts: &'a BufferRange,
    /// As of [`Rotary::forward`](super::Rotary::forward).
    pub table: &'a Mat,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    heads: u32,
    per_token: u32,
    head_dim: u32,
    half: u32,
    positions: u32,
    first: u32,
    epsilon: f32,
    sign: f32,
}

impl NormRotary {
    /// Compiles the kernels for `gpu`.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::KernelLimit`].
    pub fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        // SAFETY: `dispatch` binds all heads of its tokens everywhere, fewer than 2^29 elements,
        // and `head_dim` elements of `gamma`; threads of other heads touch none. `starts` has the
        // tokens, and positions are clamped to the rows of the table. Loops end at `head_dim` or
        // halve. Workgroup memory is written before each barrier that precedes its reads.
        let shader = unsafe { Shader::trusted("norm_rotary", include_str!("../../shaders/norm_rotary.wgsl")) };
        let kernel = |entry| gpu.kernel(&KernelSpec { shader: shader.clone(), entry, constants: Vec::new() });
        Ok(Self { gpu: gpu.clone(), forward: kernel("forward")?, backward: kernel("backward")? })
    }

    /// Records y = rotate(norm(x)). `x` and `y` are [tokens, heads * head_dim], in different
    /// buffers, and have the tokens from the first one on.
    ///
    /// # Errors
    /// [`OpError::Shape`], [`OpError::Gpu`].
    pub fn forward(&self, commands: &mut Commands, x: &Mat, turn: &Turn<'_>, y: &Mat) -> Result<(), OpError> {
        self.dispatch(commands, (&self.forward, 1.0), [x, x, y], turn)
    }

    /// Records the gradient of x for `dy`, that of y. `dx` shares no buffer with the others.
    ///
    /// # Errors
    /// [`OpError::Shape`], [`OpError::Gpu`].
    pub fn backward(&self, commands: &mut Commands, x: &Mat, turn: &Turn<'_>, dy: &Mat, dx: &Mat) -> Result<(), OpError> {
        self.dispatch(commands, (&self.backward, -1.0), [x, dy, dx], turn)
    }

    fn dispatch(
        &self,
        commands: &mut Commands,
        (kernel, sign): (&Kernel, f32),
        [x, dy, out]: [&Mat; 3],
        turn: &Turn<'_>,
    ) -> Result<(), OpError> {
        let &Turn { heads, gamma, epsilon, first, starts, table } = turn;
        let head_dim = gamma.cols;
        gamma.check(OPERATION, 1, head_dim)?;
        let cols = heads.saturating_mul(head_dim);
        [x, dy, out].into_iter().try_for_each(|mat| mat.check(OPERATION, x.rows, cols))?;
        let (half, positions) = rotary::pairs(table, head_dim)?;
        rotary::check_starts(starts, first, x.rows)?;
        let row_bytes = 4 * u64::from(cols);
        for piece in pieces(&self.gpu, x.rows.into(), row_bytes, ROWS)? {
            let params = Params {
                heads: piece.count * heads,
                per_token: heads,
                head_dim,
                half,
                positions,
                // Fits u32, because it is a row of x.
                first: first + piece.first as u32,
                epsilon,
                sign,
            };
            let [x, dy, out] = [x, dy, out].map(|mat| piece.of(&mat.range, row_bytes));
            let groups = self.gpu.grid(u64::from(params.heads).div_ceil(HEADS));
            let bytes = 3 * out.size;
            let bindings = [x, gamma.range.clone(), dy, starts.clone(), table.range.clone(), out];
            commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), groups, bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use super::*;
    use crate::arch::config::RopeScaling;
    use crate::ops::testing::{assert_untouched, gpu, gpu_with, poisoned, random_mat};
    use crate::ops::{RmsNorm, Rotary, inverse_frequencies};

    const EPSILON: f32 = 1e-5;

    /// The bits of y and dx, of tokens in samples from token 3 on: of both operations at once, or
    /// of one after the other.
    fn bits(gpu: &Gpu, at_once: bool, tokens: u32, heads: u32, [head_dim, rotated]: [u32; 2]) -> [Vec<u32>; 2] {
        let cols = heads * head_dim;
        let [(x, _), (dy, _)] = [1, 2].map(|seed| random_mat(gpu, seed, tokens, cols));
        let (gamma, _) = random_mat(gpu, 3, 1, head_dim);
        let table = inverse_frequencies(1e4, rotated, &RopeScaling::Default, 1).upload(gpu, 9).unwrap();
        let starts: Vec<u32> = (0..tokens + 3).map(|token| token - token % 7).collect();
        let starts = BufferRange::whole(gpu.storage_with("starts", bytemuck::cast_slice(&starts)).unwrap());
        let [y, dx] = [(); 2].map(|()| poisoned(gpu, tokens, cols));
        let turn = Turn { heads, gamma: &gamma, epsilon: EPSILON, first: 3, starts: &starts, table: &table };
        let mut commands = gpu.commands("norm and rotary");
        if at_once {
            let both = NormRotary::new(gpu).unwrap();
            both.forward(&mut commands, &x, &turn, &y).unwrap();
            both.backward(&mut commands, &x, &turn, &dy, &dx).unwrap();
        } else {
            let (norm, rotary) = (RmsNorm::new(gpu).unwrap(), Rotary::new(gpu).unwrap());
            norm.forward(&mut commands, &x, &gamma, EPSILON, &y).unwrap();
            rotary.forward(&mut commands, &y, heads, (3, &starts), &table).unwrap();
            rotary.backward(&mut commands, &dy, heads, (3, &starts), &table).unwrap();
            norm.backward(&mut commands, &x, &gamma, EPSILON, &dy, &dx, false).unwrap();
        }
        commands.submit().unwrap();
        [y, dx].map(|mat| {
            assert_untouched(gpu, &mat);
            mat.read(gpu).unwrap().into_iter().map(f32::to_bits).collect()
        })
    }

    /// Both operations are tested against the CPU.
    #[test]
    fn the_bits_are_those_of_both_operations() {
        let Some(gpu) = gpu() else { return };
        for (tokens, heads, sizes) in [(1, 1, [4, 4]), (13, 3, [20, 20]), (9, 5, [128, 128]), (70, 2, [96, 48])] {
            let [found, expected] = [true, false].map(|at_once| bits(&gpu, at_once, tokens, heads, sizes));
            assert!(found == expected, "{tokens} tokens, {heads} heads, {sizes:?}");
        }
    }

    #[test]
    fn pieces_that_can_be_bound() {
        let (Some(gpu), Some(small)) = (gpu(), gpu_with(|options| options.max_binding = Some(1 << 15))) else { return };
        assert!(bits(&small, true, 300, 5, [20, 20]) == bits(&gpu, false, 300, 5, [20, 20]));
    }

    #[test]
    fn the_shapes_must_match() {
        let Some(gpu) = gpu() else { return };
        let both = NormRotary::new(&gpu).unwrap();
        let ((x, _), (gamma, _), y) = (random_mat(&gpu, 1, 5, 40), random_mat(&gpu, 2, 1, 20), poisoned(&gpu, 5, 40));
        let table = inverse_frequencies(1e4, 20, &RopeScaling::Default, 1).upload(&gpu, 9).unwrap();
        let starts = BufferRange { buffer: gpu.storage_with("starts", &[0; 20]).unwrap(), offset: 0, size: 20 };
        let turn = Turn { heads: 2, gamma: &gamma, epsilon: EPSILON, first: 0, starts: &starts, table: &table };
        for turn in [Turn { heads: 3, ..turn }, Turn { first: 1, ..turn }] {
            let refused = both.forward(&mut gpu.commands("refused"), &x, &turn, &y);
            assert!(matches!(refused, Err(OpError::Shape { .. })), "{refused:?}");
        }
    }
}

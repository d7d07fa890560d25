//! Matrices in half the memory: f16 with a power of two for each row, so that numbers of any
//! magnitude keep 11 bits. Rounding gives the numbers that come back, so a pass may keep a matrix,
//! or compute and round it again, with the same results.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::pieces::{ROWS, pieces};
use super::{Mat, OpError};
use crate::gpu::{Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// Stores float32 matrices as f16, and loads them.
#[derive(Debug, Clone)]
pub struct Halves {
    gpu: Gpu,
    /// For columns in groups of eight, and for any number of them.
    kernels: [Kernels; 2],
}

#[derive(Debug, Clone)]
struct Kernels {
    round: Kernel,
    keep: Kernel,
    keep_rounded: Kernel,
    load: Kernel,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub(super) struct Params {
    pub(super) rows: u32,
    pub(super) cols: u32,
    /// Groups of 16 bytes of a stored row.
    pub(super) fours: u32,
    pub(super) pad: u32,
}

impl Halves {
    /// Compiles the kernels for `gpu`.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::KernelLimit`].
    pub fn new(gpu: &Gpu) -> Result<Self, GpuError> {
        let kernels = |x: &str| {
            let source = [include_str!("../../shaders/panels.wgsl"), x, include_str!("../../shaders/halves.wgsl")];
            // SAFETY: `dispatch` binds all rows of both matrices; threads of other rows touch none.
            // Loops end at `cols` or halve. Columns past the last one of `x` are neither read nor
            // written, and `halves` has whole groups of eight. Barriers separate the writes and the
            // reads of workgroup memory.
            let shader = unsafe { Shader::trusted("halves", source.concat()) };
            let [round, keep, keep_rounded, load] = ["round_rows", "keep", "keep_rounded", "load"]
                .map(|entry| gpu.kernel(&KernelSpec { shader: shader.clone(), entry, constants: Vec::new() }));
            Ok::<_, GpuError>(Kernels { round: round?, keep: keep?, keep_rounded: keep_rounded?, load: load? })
        };
        let whole = kernels(include_str!("../../shaders/halves_whole.wgsl"))?;
        let ragged = kernels(include_str!("../../shaders/halves_ragged.wgsl"))?;
        Ok(Self { gpu: gpu.clone(), kernels: [whole, ragged] })
    }

    /// Columns of the matrix that stores rows of `cols` elements.
    pub fn words(cols: u32) -> u32 {
        4 + 4 * cols.div_ceil(8)
    }

    /// Records the rounding of a matrix in place.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn round(&self, commands: &mut Commands, x: &Mat) -> Result<(), OpError> {
        self.dispatch(commands, |kernels| &kernels.round, x, None, 8)
    }

    /// Records the copy of a matrix to `halves` [rows, [`Halves::words`]], which must be in another
    /// buffer.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn keep(&self, commands: &mut Commands, x: &Mat, halves: &Mat) -> Result<(), OpError> {
        self.dispatch(commands, |kernels| &kernels.keep, x, Some(halves), 6)
    }

    /// As [`Halves::keep`], and rounds the matrix in place.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn keep_rounded(&self, commands: &mut Commands, x: &Mat, halves: &Mat) -> Result<(), OpError> {
        self.dispatch(commands, |kernels| &kernels.keep_rounded, x, Some(halves), 10)
    }

    /// Records the copy of what [`Halves::keep`] stored to `x`.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn load(&self, commands: &mut Commands, halves: &Mat, x: &Mat) -> Result<(), OpError> {
        self.dispatch(commands, |kernels| &kernels.load, x, Some(halves), 6)
    }

    /// `moved` is the number of bytes read and written per element.
    fn dispatch(
        &self,
        commands: &mut Commands,
        kernel: impl Fn(&Kernels) -> &Kernel,
        x: &Mat,
        halves: Option<&Mat>,
        moved: u64,
    ) -> Result<(), OpError> {
        let (cols, words) = (x.cols, Self::words(x.cols));
        x.check("f16", x.rows, cols)?;
        halves.map_or(Ok(()), |halves| halves.check("f16", x.rows, words))?;
        if cols == 0 {
            return Ok(());
        }
        let [whole, ragged] = &self.kernels;
        let kernel = kernel(if cols.is_multiple_of(8) { whole } else { ragged });
        let (row_bytes, half_bytes) = (4 * u64::from(cols), 4 * u64::from(words));
        for piece in pieces(&self.gpu, x.rows.into(), row_bytes.max(half_bytes), ROWS)? {
            let params = Params { rows: piece.count, cols, fours: words / 4, pad: 0 };
            let x = piece.of(&x.range, row_bytes);
            // The rounding does not use it.
            let halves = halves.map_or_else(|| x.clone(), |halves| piece.of(&halves.range, half_bytes));
            let groups = self.gpu.grid(piece.count.into());
            let bytes = moved * u64::from(piece.count) * u64::from(cols);
            commands.dispatch(kernel, &[x, halves], bytemuck::bytes_of(&params), groups, bytes);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::ops::testing::{assert_untouched, gpu, gpu_with, mat, poisoned, random};

    /// Rows of every magnitude, with zeros.
    fn values(rows: u32, cols: u32) -> Vec<f32> {
        let magnitude = |i: u32| [1.0, 1e-30, 0.0, 1e30, 1e-8, 1e6][(i / cols) as usize % 6];
        random(1, (rows * cols) as usize).into_iter().zip(0..).map(|(x, i)| x * magnitude(i)).collect()
    }

    /// Rounded to f16, with the largest magnitude of the row in 512..1024.
    fn rounded(row: &[f32]) -> Vec<f32> {
        let largest = row.iter().fold(0.0_f32, |largest, x| largest.max(x.abs()));
        let exponent = ((largest.to_bits() >> 23) as i32 - 136).max(-126);
        let [up, down] = [exponent, -exponent].map(|e| 2_f64.powi(e));
        row.iter().map(|&x| (f16::from_f64(f64::from(x) * down).to_f64() * up) as f32).collect()
    }

    fn check(gpu: &Gpu, rows: u32, cols: u32) {
        let halves = Halves::new(gpu).unwrap();
        let values = values(rows, cols);
        let [only_rounded, kept, kept_rounded] = [0; 3].map(|_| mat(gpu, rows, cols, &values));
        let [stored, stored_rounded] = [0; 2].map(|_| poisoned(gpu, rows, Halves::words(cols)));
        let loaded = poisoned(gpu, rows, cols);
        let mut commands = gpu.commands("halves");
        halves.round(&mut commands, &only_rounded).unwrap();
        halves.keep(&mut commands, &kept, &stored).unwrap();
        halves.keep_rounded(&mut commands, &kept_rounded, &stored_rounded).unwrap();
        halves.load(&mut commands, &stored, &loaded).unwrap();
        commands.submit().unwrap();
        [&only_rounded, &kept, &kept_rounded, &stored, &stored_rounded, &loaded]
            .into_iter()
            .for_each(|mat| assert_untouched(gpu, mat));
        let expected: Vec<f32> = values.chunks(cols as usize).flat_map(rounded).collect();
        let loaded = loaded.read(gpu).unwrap();
        for (i, (&found, &expected)) in loaded.iter().zip(&expected).enumerate() {
            // Drivers may round halfway cases either way.
            let tolerance = expected.abs() / 1024.0;
            assert!((found - expected).abs() <= tolerance, "{rows} x {cols}: element {i} is {found}, expected {expected}");
        }
        let bits = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        for rounded in [only_rounded, kept_rounded] {
            assert_eq!(bits(rounded.read(gpu).unwrap()), bits(loaded.clone()));
        }
        assert_eq!(bits(stored.read(gpu).unwrap()), bits(stored_rounded.read(gpu).unwrap()));
        assert_eq!(bits(kept.read(gpu).unwrap()), bits(values), "stored values change");
    }

    #[test]
    fn what_comes_back_is_what_rounding_gives() {
        let Some(gpu) = gpu() else { return };
        for (rows, cols) in [(1, 1), (7, 65), (13, 1000), (70, 3), (600, 2), (3, 4104), (5, 9)] {
            check(&gpu, rows, cols);
        }
    }

    #[test]
    fn pieces_that_can_be_bound_and_many_groups() {
        let Some(gpu) = gpu_with(|options| options.max_binding = Some(1 << 15)) else { return };
        check(&gpu, 300, 101);
        let Some(gpu) = gpu_with(|options| options.max_groups = Some(7)) else { return };
        check(&gpu, 40, 33);
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        let Some(gpu) = gpu() else { return };
        let halves = Halves::new(&gpu).unwrap();
        let values = [1.0, f32::NAN, 2.0, 3.0, f32::INFINITY, -1.0, f32::NEG_INFINITY, 1e30, 0.0];
        let (x, stored, loaded) = (mat(&gpu, 3, 3, &values), poisoned(&gpu, 3, Halves::words(3)), poisoned(&gpu, 3, 3));
        let mut commands = gpu.commands("not finite");
        halves.keep(&mut commands, &x, &stored).unwrap();
        halves.load(&mut commands, &stored, &loaded).unwrap();
        halves.round(&mut commands, &x).unwrap();
        commands.submit().unwrap();
        for found in [x.read(&gpu).unwrap(), loaded.read(&gpu).unwrap()] {
            let wrong = found.iter().zip(&values).find(|(a, b)| a.is_finite() != b.is_finite() || a.is_nan() != b.is_nan());
            assert!(wrong.is_none(), "{found:?}");
        }
    }

    #[test]
    fn the_shapes_must_match() {
        let Some(gpu) = gpu() else { return };
        let halves = Halves::new(&gpu).unwrap();
        let (x, stored) = (poisoned(&gpu, 3, 5), poisoned(&gpu, 3, 4));
        let refused = halves.keep(&mut gpu.commands("halves"), &x, &stored);
        assert!(matches!(refused, Err(OpError::Shape { operation: "f16", .. })), "{refused:?}");
    }
}

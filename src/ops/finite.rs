//! Finds NaN and infinity in matrices, to name the layer where a loss became non-finite.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use bytemuck::{Pod, Zeroable};

use super::pieces::{ROWS, pieces};
use super::{Mat, OpError};
use crate::gpu::{BufferRange, Commands, Gpu, GpuError, Kernel, KernelSpec, Shader};

/// Workgroups of a search, and threads per workgroup.
const GROUPS: u32 = 256;

/// Bytes of a report: the index of the first non-finite element, and the number of such elements.
const REPORT: u64 = 8;

/// The non-finite elements of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NonFinite {
    /// Index of the first one, in row-major order.
    pub first: u32,
    /// Their number.
    pub count: u32,
}

/// Searches matrices and writes one report per matrix into a slot. All reports are read together.
#[derive(Debug, Clone)]
pub struct FiniteCheck {
    gpu: Gpu,
    search: Kernel,
    gather: Kernel,
    /// Results of the workgroups.
    found: BufferRange,
    reports: BufferRange,
}

/// Parameters of a dispatch: `struct Params` of the shader.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Params {
    count: u32,
    first: u32,
    slot: u32,
    pad: u32,
}

impl FiniteCheck {
    /// Compiles the kernels for `gpu`, with memory for `slots` reports.
    ///
    /// # Errors
    /// [`GpuError::Invalid`], [`GpuError::KernelLimit`], [`GpuError::OutOfMemory`].
    pub fn new(gpu: &Gpu, slots: u32) -> Result<Self, GpuError> {
        // SAFETY: `record` binds as many words as it passes in `count`, fewer than 2^30, dispatches
        // GROUPS workgroups, for which `found` has room, and passes a slot that `reports` has;
        // loops step by more than 0 to `count`, or halve; workgroup memory is written before each
        // barrier that precedes its reads.
        let shader = unsafe { Shader::trusted("finite", include_str!("../../shaders/finite.wgsl")) };
        let kernel = |entry| gpu.kernel(&KernelSpec { shader: shader.clone(), entry, constants: Vec::new() });
        let range = |label, count: u32| {
            let size = REPORT * u64::from(count);
            Ok(BufferRange { buffer: gpu.storage(label, size)?, offset: 0, size })
        };
        let (search, gather) = (kernel("search")?, kernel("gather")?);
        Ok(Self { gpu: gpu.clone(), search, gather, found: range("search", GROUPS)?, reports: range("reports", slots)? })
    }

    /// Records a search of the rows of matrices, one after the other, and writes a report to
    /// `slot`. They have at least one and fewer than 2^32 elements.
    ///
    /// # Errors
    /// [`OpError::Shape`].
    pub fn record(&self, commands: &mut Commands, mats: &[Mat], slot: u32) -> Result<(), OpError> {
        let shape = |what, expected, found| OpError::Shape { operation: "search", what, expected, found };
        mats.iter().try_for_each(|x| x.check("search", x.rows, x.cols))?;
        let elements: u64 = mats.iter().map(Mat::elements).sum();
        if elements > u32::MAX.into() {
            return Err(shape("the number of elements", u32::MAX.into(), elements));
        }
        if u64::from(slot) >= self.reports.size / REPORT {
            return Err(shape("the number of slots", u64::from(slot) + 1, self.reports.size / REPORT));
        }
        let mut dispatch = |kernel, x, params: Params, groups, bytes| {
            let bindings = [x, self.found.clone(), self.reports.clone()];
            commands.dispatch(kernel, &bindings, bytemuck::bytes_of(&params), [groups, 1, 1], bytes);
        };
        let Some(unused) = mats.first() else { return Err(shape("the number of matrices", 1, 0)) };
        let mut before = 0;
        for x in mats {
            for piece in pieces(&self.gpu, x.elements(), 4, ROWS)? {
                let params = Params { count: piece.count, first: (before + piece.first) as u32, slot, pad: 0 };
                dispatch(&self.search, piece.of(&x.range, 4), params, GROUPS, 4 * u64::from(piece.count));
            }
            before += x.elements();
        }
        let params = Params { count: 0, first: 0, slot, pad: 0 };
        dispatch(&self.gather, unused.range.clone(), params, 1, self.found.size);
        Ok(())
    }

    /// Waits for all submitted work, and returns the reports of all slots. `None` if all elements
    /// are finite or the slot was never written.
    ///
    /// # Errors
    /// What went wrong on the device.
    pub fn read(&self) -> Result<Vec<Option<NonFinite>>, GpuError> {
        let report = |bytes: &[u32]| match *bytes {
            [first, count] if count > 0 => Some(NonFinite { first, count }),
            _ => None,
        };
        let mut words = vec![0_u32; (self.reports.size / 4) as usize];
        self.gpu.read_into(&self.reports, bytemuck::cast_slice_mut(&mut words))?;
        Ok(words.chunks(2).map(report).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{gpu, gpu_with, random};

    fn reference(x: &[f32]) -> Option<NonFinite> {
        let first = x.iter().position(|x| !x.is_finite())?;
        Some(NonFinite { first: first as u32, count: x.iter().filter(|x| !x.is_finite()).count() as u32 })
    }

    fn check(gpu: &Gpu, rows: u32, cols: u32) {
        let check = FiniteCheck::new(gpu, 5).unwrap();
        let finite = random(1, (rows * cols) as usize);
        let poison = |places: &[usize], poison| {
            let mut x = finite.clone();
            places.iter().for_each(|&at| x[at % finite.len()] = poison);
            x
        };
        let cases = [
            finite.clone(),
            poison(&[finite.len() - 1], f32::NAN),
            poison(&[finite.len() / 2, 777, finite.len() - 1], f32::INFINITY),
            poison(&(0..finite.len()).collect::<Vec<_>>(), f32::NEG_INFINITY),
        ];
        let mut commands = gpu.commands("search");
        // In one matrix, and in two.
        for (x, slot) in cases.iter().zip(0..) {
            let first = if slot % 2 == 0 { rows } else { rows.div_ceil(2) };
            let parts = x.chunks((first * cols) as usize);
            let mat = |x: &[f32]| Mat::from_slice(gpu, "x", x.len() as u32 / cols, cols, x).unwrap();
            check.record(&mut commands, &parts.map(mat).collect::<Vec<_>>(), slot).unwrap();
        }
        commands.submit().unwrap();
        let mut expected: Vec<_> = cases.iter().map(|x| reference(x)).collect();
        expected.push(None);
        assert_eq!(check.read().unwrap(), expected);
    }

    #[test]
    fn what_is_not_finite_is_found() {
        let Some(gpu) = gpu() else { return };
        for (rows, cols) in [(1, 1), (7, 65), (3, 1000), (70_000, 3)] {
            check(&gpu, rows, cols);
        }
        let Some(gpu) = gpu_with(|options| options.max_binding = Some(4096)) else { return };
        check(&gpu, 77, 101);
    }

    #[test]
    fn a_slot_must_exist() {
        let Some(gpu) = gpu() else { return };
        let x = Mat::from_slice(&gpu, "x", 1, 1, &[1.0]).unwrap();
        let refused = FiniteCheck::new(&gpu, 2).unwrap().record(&mut gpu.commands("search"), &[x], 2);
        assert!(matches!(refused, Err(OpError::Shape { expected: 3, found: 2, .. })), "{refused:?}");
    }
}

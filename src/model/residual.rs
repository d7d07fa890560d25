//! A residual stream in windows of tokens: a matrix for each. No matrix is then larger than a
//! buffer, or a binding of a kernel, may be.

use crate::gpu::{BufferRange, Commands, Gpu, GpuError};
use crate::model::sizes::Matrix;
use crate::ops::Mat;

/// The matrices [tokens of the window, hidden] of a residual stream, or of its gradient. The last
/// window may have fewer tokens. There is at least one.
#[derive(Debug, Clone)]
pub(crate) struct Residual<M> {
    windows: Vec<M>,
}

/// Windows that share a buffer: a driver permits some thousand buffers, and long samples have many
/// windows in each of many streams.
const WINDOWS_OF_BUFFER: u32 = 2;

impl<M: Matrix> Residual<M> {
    /// Calls `new` with the rows of each buffer: a few windows of `step` tokens, in all those of
    /// `reserved` tokens. Of fewer tokens, windows without any are left out.
    pub fn build<E>(tokens: u32, reserved: u32, step: u32, mut new: impl FnMut(u32) -> Result<M, E>) -> Result<Self, E> {
        let step = step.max(1);
        let of_buffer = step.saturating_mul(WINDOWS_OF_BUFFER);
        let mut windows = Vec::new();
        for start in (0..reserved.max(1)).step_by(of_buffer as usize) {
            let rows = tokens.saturating_sub(start).min(of_buffer);
            let buffer = new(rows)?;
            // The first window is there without any tokens, too.
            let end = rows.max(u32::from(start == 0));
            windows.extend((0..end).step_by(step as usize).map(|first| buffer.rows(first, step.min(rows - first))));
        }
        Ok(Self { windows })
    }
}

impl<M> Residual<M> {
    /// The matrices of its windows, in order.
    pub fn windows(&self) -> &[M] {
        &self.windows
    }
}

impl Residual<Mat> {
    /// The ranges of its windows.
    fn ranges(&self) -> impl Iterator<Item = &BufferRange> {
        self.windows.iter().map(|window| &window.range)
    }

    /// Records a copy to another one of the same shape.
    pub fn copy_to(&self, commands: &mut Commands, other: &Self) {
        for (from, to) in self.ranges().zip(other.ranges()) {
            commands.copy(from, to);
        }
    }

    /// All elements, after all submitted work.
    ///
    /// # Errors
    /// Any device error.
    pub fn read(&self, gpu: &Gpu) -> Result<Vec<f32>, GpuError> {
        let windows = self.windows.iter().map(|window| window.read(gpu)).collect::<Result<Vec<_>, _>>()?;
        Ok(windows.concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rows of a matrix.
    impl Matrix for u32 {
        fn reshaped(&self, rows: u32, _: u32) -> Self {
            rows
        }

        fn rows(&self, first: u32, rows: u32) -> Self {
            assert!(first + rows <= *self);
            rows
        }
    }

    #[test]
    fn windows_without_tokens_are_reserved_but_not_used() {
        for (tokens, reserved, asked, used) in [
            (10, 10, vec![8, 2], vec![4, 4, 2]),
            (8, 8, vec![8], vec![4, 4]),
            (5, 10, vec![5, 0], vec![4, 1]),
            (4, 20, vec![4, 0, 0], vec![4]),
            (9, 9, vec![8, 1], vec![4, 4, 1]),
            (0, 10, vec![0, 0], vec![0]),
            (0, 0, vec![0], vec![0]),
        ] {
            let mut rows = Vec::new();
            let found = Residual::build(tokens, reserved, 4, |buffer| {
                rows.push(buffer);
                Ok::<_, std::convert::Infallible>(buffer)
            });
            let Ok(found) = found;
            assert_eq!((rows, found.windows()), (asked, used.as_slice()), "{tokens} of {reserved}");
        }
    }
}

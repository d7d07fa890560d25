//! A residual stream in windows of tokens: a matrix for each. No matrix is then larger than a
//! buffer, or a binding of a kernel, may be.

use crate::gpu::{BufferRange, Commands, Gpu, GpuError};
use crate::ops::Mat;

/// The matrices [tokens of the window, hidden] of a residual stream, or of its gradient. The last
/// window may have fewer tokens. There is at least one.
#[derive(Debug, Clone)]
pub(crate) struct Residual<M> {
    windows: Vec<M>,
}

impl<M> Residual<M> {
    /// Calls `new` with the rows of each window: `step` tokens each, as many windows as `reserved`
    /// tokens have. Of fewer tokens, windows without any are left out.
    pub fn build<E>(tokens: u32, reserved: u32, step: u32, mut new: impl FnMut(u32) -> Result<M, E>) -> Result<Self, E> {
        let step = step.max(1);
        let mut windows = Vec::new();
        for first in (0..reserved.max(1)).step_by(step as usize) {
            let rows = tokens.saturating_sub(first).min(step);
            let window = new(rows)?;
            if rows > 0 || first == 0 {
                windows.push(window);
            }
        }
        Ok(Self { windows })
    }

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

    #[test]
    fn windows_without_tokens_are_reserved_but_not_used() {
        for (tokens, reserved, asked, used) in [
            (10, 10, vec![4, 4, 2], vec![4, 4, 2]),
            (8, 8, vec![4, 4], vec![4, 4]),
            (5, 10, vec![4, 1, 0], vec![4, 1]),
            (4, 10, vec![4, 0, 0], vec![4]),
            (0, 10, vec![0, 0, 0], vec![0]),
            (0, 0, vec![0], vec![0]),
        ] {
            let mut rows = Vec::new();
            let found = Residual::build(tokens, reserved, 4, |window| {
                rows.push(window);
                Ok::<_, std::convert::Infallible>(window)
            });
            let Ok(found) = found;
            assert_eq!((rows, found.windows()), (asked, used.as_slice()), "{tokens} of {reserved}");
        }
    }
}

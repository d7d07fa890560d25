//! Cuts work into dispatches that fit the binding limit.

use crate::gpu::{BufferRange, Gpu, GpuError};

/// Maximum bytes of a binding, even if the device allows more. The index of every float then fits
/// 32 bits with room to spare.
const MAX_BYTES: u64 = 1 << 31;
/// A row index that is a multiple of this gives a valid binding offset (a multiple of 256 bytes),
/// for rows of any number of floats.
pub(super) const ROWS: u64 = 64;

/// The rows (or elements) of one dispatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// First row.
    pub first: u64,
    /// Number of rows.
    pub count: u32,
}

impl Piece {
    /// The part of a range with these rows, at `row_bytes` bytes per row.
    pub fn of(&self, range: &BufferRange, row_bytes: u64) -> BufferRange {
        range.slice(self.first * row_bytes, u64::from(self.count) * row_bytes)
    }
}

/// Cuts `rows` rows into pieces that fit the binding limit and start on a multiple of `multiple`
/// rows. `row_bytes` is the row size in the largest buffer. A piece has at most 2^31 bytes, so at
/// most 2^29 floats.
///
/// # Errors
/// [`GpuError::TooLarge`] if the device cannot bind `multiple` rows.
pub(super) fn pieces(gpu: &Gpu, rows: u64, row_bytes: u64, multiple: u64) -> Result<impl Iterator<Item = Piece>, GpuError> {
    let limit = gpu.limits().max_storage_buffer_binding_size.min(MAX_BYTES);
    cut(rows, row_bytes, multiple, limit).ok_or_else(|| GpuError::TooLarge {
        what: format!("{multiple} rows"),
        requested: multiple.saturating_mul(row_bytes),
        limit,
        limit_name: "maxStorageBufferBindingSize",
    })
}

fn cut(rows: u64, row_bytes: u64, multiple: u64, limit: u64) -> Option<impl Iterator<Item = Piece>> {
    let max = limit.checked_div(row_bytes).unwrap_or(rows).min(MAX_BYTES);
    let step = if rows <= max { rows } else { max / multiple * multiple };
    let mut first = 0;
    (step > 0 || rows == 0).then_some(std::iter::from_fn(move || {
        let count = step.min(rows - first);
        // A step is at most 2^31.
        let piece = Piece { first, count: count as u32 };
        first += count;
        (count > 0).then_some(piece)
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_hold_all_rows_once_and_can_be_bound() {
        for (rows, row_bytes, multiple, limit) in [
            (1000, 4, 64, 256),
            (1000, 12, 64, 5000),
            (64, 256, 64, 16384),
            (65, 256, 64, 16384),
            (1 << 34, 4, 16384, 1 << 31),
        ] {
            let mut next = 0;
            for piece in cut(rows, row_bytes, multiple, limit).unwrap() {
                assert_eq!(piece.first, next);
                assert!(piece.first.is_multiple_of(multiple) && u64::from(piece.count) * row_bytes <= limit, "{piece:?}");
                next += u64::from(piece.count);
            }
            assert_eq!(next, rows);
        }
        assert_eq!(cut(0, 4, 64, 256).unwrap().count(), 0);
        assert_eq!(cut(5, 0, 64, 256).unwrap().count(), 1);
        assert!(cut(65, 256, 64, 16383).is_none());
        assert!(cut(1 << 40, 1 << 30, 64, 1 << 31).is_none());
    }
}

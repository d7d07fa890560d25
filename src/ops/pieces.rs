//! Work cut into dispatches that a device can bind.

use crate::gpu::{BufferRange, Gpu, GpuError};

/// Bytes that one binding has at most, whatever the device allows: the index of every float in it is far from the end of 32 bits.
const MAX_BYTES: u64 = 1 << 31;
/// Rows of floats start on a multiple of 256 bytes, as bindings have to, wherever their number is a multiple of this.
pub(super) const ROWS: u64 = 64;

/// Rows (or elements) that one dispatch works on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// The first one.
    pub first: u64,
    /// How many.
    pub count: u32,
}

impl Piece {
    /// What these rows take of a range, where each has `row_bytes` bytes.
    pub fn of(&self, range: &BufferRange, row_bytes: u64) -> BufferRange {
        range.slice(self.first * row_bytes, u64::from(self.count) * row_bytes)
    }
}

/// Cuts `rows` rows, of `row_bytes` bytes in the largest buffer, so that each piece can be bound and starts on a multiple of
/// `multiple` rows. A piece has at most 2^31 bytes, thus 2^29 floats.
///
/// # Errors
/// [`GpuError::TooLarge`] where the device cannot bind `multiple` rows.
pub(super) fn pieces(gpu: &Gpu, rows: u64, row_bytes: u64, multiple: u64) -> Result<impl Iterator<Item = Piece>, GpuError> {
    let limit = gpu.limits().max_storage_buffer_binding_size.min(MAX_BYTES);
    cut(rows, row_bytes, multiple, limit).ok_or_else(|| GpuError::TooLarge {
        what: format!("{multiple} rows"),
        asked: multiple.saturating_mul(row_bytes),
        limit,
        limit_name: "maxStorageBufferBindingSize",
    })
}

fn cut(rows: u64, row_bytes: u64, multiple: u64, limit: u64) -> Option<impl Iterator<Item = Piece>> {
    let most = limit.checked_div(row_bytes).unwrap_or(rows).min(MAX_BYTES);
    let step = if rows <= most { rows } else { most / multiple * multiple };
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

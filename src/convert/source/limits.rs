//! Limits of the files that are read as a whole.

/// Tensors that one file or index may have: far fewer than a pack has sections, and several times
/// what the largest mixtures of experts have.
pub const MAX_TENSORS: usize = 1 << 18;
/// Bytes that a side file may have, and those of config.json: the limits of the format.
pub use crate::format::layout::{MAX_CONFIG_LEN, MAX_FILE_LEN as MAX_SIDE_FILE_LEN};
/// Bytes that an index may have; [`MAX_TENSORS`] lines of a usual length fit.
pub const MAX_INDEX_LEN: u64 = 128 << 20;

//! Limits of the files that are read as a whole.

/// Tensors that one file or index may have: far fewer than a pack has sections, and several times
/// what the largest mixtures of experts have.
pub const MAX_TENSORS: usize = 1 << 18;
/// Bytes that a side file may have.
pub const MAX_SIDE_FILE_LEN: u64 = 256 << 20;
/// Bytes that config.json may have: it is parsed as a whole, which takes many times its length.
pub const MAX_CONFIG_LEN: u64 = 16 << 20;
/// Bytes that an index may have; [`MAX_TENSORS`] lines of a usual length fit.
pub const MAX_INDEX_LEN: u64 = 128 << 20;

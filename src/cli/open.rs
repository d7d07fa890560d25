//! Maps packs. All commands that map a pack call these functions.

use std::path::Path;

use crate::dequant::stream::{PackSource, StreamError};
use crate::{MappedPack, OpenError};

/// Maps a pack.
pub fn pack(path: &Path) -> Result<MappedPack, OpenError> {
    // SAFETY: nf4pack never changes a pack in place, and its users are asked not to change or
    // truncate a pack that is in use (README).
    unsafe { MappedPack::open(path) }
}

/// Maps a pack, as the source of a layer stream.
pub fn source(path: &Path) -> Result<PackSource, StreamError> {
    Ok(PackSource::of_mapped(path, pack(path)?))
}

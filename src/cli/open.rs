//! Opens packs. All commands call these functions; each opens a pack once.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

#[cfg(test)]
mod tests;

use std::path::Path;

use super::args::{LoadArgs, ReadArgs, WeightsArgs};
use crate::{MappedPack, OpenError, PackSource, ReadError};

/// Opens a pack for reading.
pub fn read(path: &Path, _: ReadArgs) -> Result<PackSource, ReadError> {
    PackSource::open(path)
}

/// Opens a pack whose weights are written out.
pub fn weights(path: &Path, args: WeightsArgs) -> Result<PackSource, ReadError> {
    Ok(verified(read(path, args.read)?, args.no_verify))
}

/// Opens a pack whose layers are loaded into GPU memory.
pub fn load(path: &Path, args: LoadArgs) -> Result<PackSource, ReadError> {
    let pack = if args.mmap { mapped(path)? } else { PackSource::open(path)? };
    Ok(verified(pack, args.no_verify))
}

fn verified(pack: PackSource, no_verify: bool) -> PackSource {
    if no_verify { pack.unverified() } else { pack }
}

/// Maps a pack, as the source of a layer stream. The length of the file is compared before every
/// upload.
pub fn mapped(path: &Path) -> Result<PackSource, OpenError> {
    Ok(PackSource::of_mapped(path, map(path)?))
}

/// Maps a pack.
pub fn map(path: &Path) -> Result<MappedPack, OpenError> {
    // SAFETY: nf4pack never changes a pack in place. Only --mmap, whose help asks users not to
    // change the file, and benchmarks, which map files of their own, map a pack.
    unsafe { MappedPack::open(path) }
}

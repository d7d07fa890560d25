//! A pack as a mapped file: the one place that maps.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::Mmap;
use thiserror::Error;

use crate::format::{FormatError, Index, Layer, Pack};

/// An open pack. Opening maps the file and validates header, index and metadata; it reads no payload.
///
/// ```no_run
/// use nf4pack::MappedPack;
/// use nf4pack::format::Role;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pack = MappedPack::open("model.nf4pack")?;
/// let layer = pack.layer(0)?;
/// let up = layer.quantized_tensor(Role::UpProj).ok_or("no up_proj")?;
/// let mut weights = vec![0.0; up.data.elements as usize];
/// nf4pack::dequant::dequantize(&up.data, 0, &mut weights)?;
/// # Ok(())
/// # }
/// ```
///
/// # Safety of the mapping
/// The bytes must not change while they are mapped. A pack is written once, under another name, and renamed: nobody who
/// uses this crate changes one in place. A program that truncates the file under a reader makes the reader's access fault,
/// as with any mapped file.
#[derive(Debug)]
pub struct MappedPack {
    file: File,
    map: Mmap,
    index: Index,
    /// Layers whose scales have been checked.
    checked: Vec<AtomicBool>,
}

/// Why a pack could not be opened or used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file is not a valid pack.
    #[error("{}: {source}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: FormatError,
    },
}

/// Why a layer could not be handed out.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LayerError {
    /// There is no such layer.
    #[error("layer {layer} does not exist: the pack has {count} (0 to {})", count.saturating_sub(1))]
    OutOfRange {
        /// The layer asked for.
        layer: u32,
        /// Layers of the pack.
        count: u32,
    },
    /// Its scales are not what the specification allows.
    #[error("layer {layer}: {source}")]
    Format {
        /// The layer.
        layer: u32,
        /// What is wrong with it.
        source: FormatError,
    },
}

impl MappedPack {
    /// Opens and validates a pack.
    ///
    /// # Errors
    /// Where the file cannot be opened or mapped, or breaks the specification.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        let file = open_regular(path).map_err(io)?;
        // SAFETY: the map is read-only, and its bytes are only ever read as plain bytes, for which every value is valid.
        // That the file is not changed while mapped is the contract above; all that is read from it is validated, so a
        // file that breaks the contract gives wrong values or a fault, and no invalid reference.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let format = |source| OpenError::Format { path: path.to_owned(), source };
        let index = Index::parse(&map, map.len() as u64).map_err(format)?;
        let checked = index.layers().iter().map(|_| AtomicBool::new(false)).collect();
        Ok(Self { file, map, index, checked })
    }

    /// How long the file is now. Where that is less than when it was opened, somebody cut it, and the bytes past its end must not
    /// be touched.
    ///
    /// # Errors
    /// What the system says.
    pub fn file_len(&self) -> std::io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// The view of the whole pack. Its payloads are as they are in the file: see [`crate::format::check`].
    pub fn pack(&self) -> Pack<'_> {
        Pack::of_mapped(&self.map, &self.index)
    }

    /// Layer `number`, from 0. The first call for a layer checks its scales and code padding (not its checksums).
    ///
    /// # Errors
    /// [`LayerError::OutOfRange`] past the last layer; [`LayerError::Format`] where a scale is not what it may be.
    pub fn layer(&self, number: u32) -> Result<Layer<'_>, LayerError> {
        let pack = self.pack();
        let (Some(layer), Some(checked)) = (pack.layer(number), self.checked.get(number as usize)) else {
            return Err(LayerError::OutOfRange { layer: number, count: pack.layer_count() });
        };
        if !checked.load(Ordering::Relaxed) {
            layer.check_contents().map_err(|source| LayerError::Format { layer: number, source })?;
            checked.store(true, Ordering::Relaxed);
        }
        Ok(layer)
    }
}

/// Opens a regular file for reading.
pub(crate) fn open_regular(path: &Path) -> std::io::Result<File> {
    // Asked before opening: opening a pipe waits for its writer.
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file"));
    }
    File::open(path)
}

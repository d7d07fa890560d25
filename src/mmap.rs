//! A pack as a mapped file. Only this module maps files.
#![allow(unsafe_code, reason = "tests/format/layering.rs lists this file")]

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::Mmap;
use thiserror::Error;

use crate::format::{FormatError, Index, Layer, Pack, QuantizedTensor, Section, SectionKind, check};

/// An open pack: mapped, or read into memory. Opening validates header, index and metadata. With a
/// mapping, it reads no payload.
///
/// ```no_run
/// use nf4pack::MappedPack;
/// use nf4pack::format::Role;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // SAFETY: no program changes or truncates the file while it is mapped.
/// let pack = unsafe { MappedPack::open("model.nf4pack") }?;
/// let layer = pack.layer(0)?;
/// let up = layer.quantized_tensor(Role::UpProj).ok_or("no up_proj")?;
/// let mut weights = vec![0.0; up.data.elements as usize];
/// nf4pack::dequant::dequantize(&up.data, 0, &mut weights)?;
/// # Ok(())
/// # }
/// ```
///
/// # Why opening is unsafe
/// Other processes can write to a mapped file. A `&[u8]` promises that its bytes do not change, and
/// this crate cannot check that: the file may be truncated between a check of its length and the
/// access. So the caller must promise it, as with `memmap2` and with the mapped checkpoints of
/// candle. If you cannot promise it, use [`MappedPack::read`], or `PackSource::open` (feature
/// `convert` or `gpu`), which reads each payload when it is needed.
#[derive(Debug)]
pub struct MappedPack {
    path: PathBuf,
    file: File,
    bytes: Bytes,
    index: Index,
    /// One per section: whether it passed its checks.
    checked: Vec<AtomicBool>,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    Read(Vec<u8>),
}

impl Bytes {
    fn all(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Read(bytes) => bytes,
        }
    }
}

/// An error of opening a pack.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The file cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// The file is not a valid pack.
    #[error("{}: {source}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// The violation.
        source: FormatError,
    },
}

/// An error of reading a layer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The layer does not exist.
    #[error("layer {layer} does not exist: the pack has {count} (0 to {})", count.saturating_sub(1))]
    OutOfRange {
        /// Requested layer.
        layer: u32,
        /// Layers of the pack.
        count: u32,
    },
    /// A section of the layer does not match its checksum, or violates the specification.
    #[error("layer {layer}: {source}")]
    Format {
        /// The layer.
        layer: u32,
        /// The violation.
        source: FormatError,
    },
    /// The same for a tensor that belongs to no layer.
    #[error("global tensors: {source}")]
    Globals {
        /// The violation.
        source: FormatError,
    },
}

impl MappedPack {
    /// Maps and validates a pack.
    ///
    /// # Safety
    /// No process may change or truncate the file while the value lives. `nf4pack` renames a
    /// complete pack to its name and never changes it in place, so the promise concerns other
    /// programs. If the promise is broken, values from the pack are unspecified, and an access past
    /// the end of the file kills the process (SIGBUS).
    ///
    /// # Errors
    /// The file cannot be opened or mapped, or it violates the specification.
    pub unsafe fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        // SAFETY: the map is read-only, and its bytes are read as plain bytes, for which every
        // value is valid. The caller promises that they do not change.
        Self::of(path.as_ref(), |file| Ok(Bytes::Mapped(unsafe { Mmap::map(file) }?)))
    }

    /// Reads the whole file into memory and validates it. Later changes of the file have no effect.
    ///
    /// # Errors
    /// The file cannot be read, or it violates the specification.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::of(path.as_ref(), |file| {
            let mut bytes = Vec::new();
            (&*file).read_to_end(&mut bytes)?;
            Ok(Bytes::Read(bytes))
        })
    }

    fn of(path: &Path, bytes: impl FnOnce(&File) -> std::io::Result<Bytes>) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        let file = open_regular(path).map_err(io)?;
        let bytes = bytes(&file).map_err(io)?;
        let format = |source| OpenError::Format { path: path.to_owned(), source };
        let index = Index::parse(bytes.all(), bytes.all().len() as u64).map_err(format)?;
        let checked = index.sections().iter().map(|_| AtomicBool::new(false)).collect();
        Ok(Self { path: path.to_owned(), file, bytes, index, checked })
    }

    /// The path that the pack was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata of the file.
    ///
    /// # Errors
    /// Any error of the operating system.
    #[cfg(feature = "convert")]
    pub(crate) fn metadata(&self) -> std::io::Result<std::fs::Metadata> {
        self.file.metadata()
    }

    /// The present length of the file. If it is shorter than at opening, the file was truncated,
    /// and bytes past its end must not be accessed.
    ///
    /// # Errors
    /// Any error of the operating system.
    pub fn file_len(&self) -> std::io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    /// The view of the whole pack. Its payloads are unchecked: see [`crate::format::check`].
    pub fn pack(&self) -> Pack<'_> {
        Pack::of_mapped(self.bytes.all(), &self.index)
    }

    /// Layer `number`, from 0. The first call for a layer reads all of it: it compares the
    /// checksums of its sections, and checks scales and code padding. [`MappedPack::pack`] has
    /// unchecked layers.
    ///
    /// # Errors
    /// [`LayerError::OutOfRange`] past the last layer; [`LayerError::Format`] if a section does not
    /// match its checksum or violates the specification.
    pub fn layer(&self, number: u32) -> Result<Layer<'_>, LayerError> {
        let pack = self.pack();
        let layer = pack.layer(number).ok_or(LayerError::OutOfRange { layer: number, count: pack.layer_count() })?;
        let sections = self.index.layers().get(number as usize).cloned().unwrap_or_default();
        self.check_once(sections).map_err(|source| LayerError::Format { layer: number, source })?;
        Ok(layer)
    }

    /// The quantised tensor with this name, in a layer or global (an embedding, an `lm_head`). Its
    /// first use compares its checksums and checks its scales and code padding.
    ///
    /// # Errors
    /// [`LayerError::Format`], [`LayerError::Globals`].
    pub fn quantized_tensor(&self, name: &str) -> Result<Option<QuantizedTensor<'_>>, LayerError> {
        let Some(tensor) = self.pack().quantized_tensor(name) else { return Ok(None) };
        let is_its_codes = |section: &Section| section.kind == Some(SectionKind::Codes) && self.index.name(section) == name;
        let codes = self.index.sections().iter().position(is_its_codes).unwrap_or_default();
        // Its scales follow its codes.
        let checked = self.check_once(codes..codes + 2);
        checked.map_err(|source| match tensor.layer {
            Some(layer) => LayerError::Format { layer, source },
            None => LayerError::Globals { source },
        })?;
        Ok(Some(tensor))
    }

    /// Checks sections, except those that have passed before.
    fn check_once(&self, sections: Range<usize>) -> Result<(), FormatError> {
        let all = self.index.sections().iter().enumerate().zip(&self.checked);
        for ((number, section), checked) in all.take(sections.end).skip(sections.start) {
            if !checked.load(Ordering::Relaxed) {
                check::section(&self.pack(), number, section)?;
                checked.store(true, Ordering::Relaxed);
            }
        }
        Ok(())
    }
}

/// Opens a regular file for reading.
pub(crate) fn open_regular(path: &Path) -> std::io::Result<File> {
    // Check before opening: opening a pipe waits for its writer.
    if !std::fs::metadata(path)?.is_file() {
        return Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, "not a regular file"));
    }
    File::open(path)
}

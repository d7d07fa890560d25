//! A pack as a mapped file: the one place that maps.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use memmap2::Mmap;
use thiserror::Error;

use crate::format::{FormatError, Index, Layer, Pack, QuantizedTensor, check};

/// An open pack: mapped, or read into memory. Opening validates header, index and metadata; where the file is mapped, no payload is
/// read.
///
/// ```no_run
/// use nf4pack::MappedPack;
/// use nf4pack::format::Role;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // SAFETY: nobody changes or cuts the file while it is mapped.
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
/// A mapped file is memory that other processes can write to. A `&[u8]` promises that its bytes do not change, and no check of
/// this crate can keep that promise: a look at the file's length before an access is out of date at the access. So the caller has
/// to promise it, as with `memmap2` and with the mapped checkpoints of candle. Who cannot takes [`MappedPack::read`], or, to
/// stream layers to a GPU, [`PackSource::open`](crate::dequant::stream::PackSource::open): both read.
#[derive(Debug)]
pub struct MappedPack {
    file: File,
    bytes: Bytes,
    index: Index,
    /// Layers whose scales have been checked; the last one stands for the tensors of no layer.
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
    /// The scales of a tensor of no layer are not what the specification allows.
    #[error("the tensors of no layer: {source}")]
    Globals {
        /// What is wrong with them.
        source: FormatError,
    },
}

impl MappedPack {
    /// Maps and validates a pack.
    ///
    /// # Safety
    /// Nobody, no other process either, may change or cut the file while the value lives. A pack that `nf4pack` writes appears whole
    /// under its name, by a rename, and is never changed in place; so the promise is about other programs. Where it is broken, the
    /// values read from the pack can be anything, and an access to what was cut off ends the process (SIGBUS).
    ///
    /// # Errors
    /// Where the file cannot be opened or mapped, or breaks the specification.
    pub unsafe fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        // SAFETY: the map is read-only, and its bytes are only ever read as plain bytes, for which every value is valid. That
        // they do not change is the caller's promise.
        Self::of(path.as_ref(), |file| Ok(Bytes::Mapped(unsafe { Mmap::map(file) }?)))
    }

    /// Reads the whole file into memory, and validates it. What happens to the file afterwards does not matter.
    ///
    /// # Errors
    /// Where the file cannot be read, or breaks the specification.
    pub fn read(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        Self::of(path.as_ref(), |file| {
            let mut bytes = Vec::new();
            (&*file).read_to_end(&mut bytes)?;
            Ok(Bytes::Read(bytes))
        })
    }

    /// [`MappedPack::open`] for the functions of this crate that work on a pack of a given name: their documentation passes the
    /// promise on.
    #[cfg(feature = "convert")]
    pub(crate) fn open_unchanged(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        // SAFETY: by the documentation of the callers, the file is not changed while they work.
        unsafe { Self::open(path) }
    }

    fn of(path: &Path, bytes: impl FnOnce(&File) -> std::io::Result<Bytes>) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        let file = open_regular(path).map_err(io)?;
        let bytes = bytes(&file).map_err(io)?;
        let format = |source| OpenError::Format { path: path.to_owned(), source };
        let index = Index::parse(bytes.all(), bytes.all().len() as u64).map_err(format)?;
        let checked = (0..=index.layers().len()).map(|_| AtomicBool::new(false)).collect();
        Ok(Self { file, bytes, index, checked })
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
        Pack::of_mapped(self.bytes.all(), &self.index)
    }

    /// Layer `number`, from 0. The first call for a layer checks its scales and code padding (not its checksums).
    ///
    /// # Errors
    /// [`LayerError::OutOfRange`] past the last layer; [`LayerError::Format`] where a scale is not what it may be.
    pub fn layer(&self, number: u32) -> Result<Layer<'_>, LayerError> {
        let pack = self.pack();
        let layer = pack.layer(number).ok_or(LayerError::OutOfRange { layer: number, count: pack.layer_count() })?;
        self.check_once(number as usize, || layer.check_contents())
            .map_err(|source| LayerError::Format { layer: number, source })?;
        Ok(layer)
    }

    /// The quantised tensor of this name, whether it is one of a layer or of none (an embedding, an `lm_head`). The first call for a
    /// layer, or for the tensors of none, checks their scales and code padding, as [`MappedPack::layer`] does.
    ///
    /// # Errors
    /// [`LayerError::Format`], [`LayerError::Globals`].
    pub fn quantized_tensor(&self, name: &str) -> Result<Option<QuantizedTensor<'_>>, LayerError> {
        let pack = self.pack();
        let Some(tensor) = pack.quantized_tensor(name) else { return Ok(None) };
        match tensor.layer {
            Some(number) => {
                self.layer(number)?;
            }
            None => {
                let check = || check::global_contents(&pack);
                self.check_once(self.index.layers().len(), check).map_err(|source| LayerError::Globals { source })?;
            }
        }
        Ok(Some(tensor))
    }

    /// Runs a check unless it has found nothing before.
    fn check_once(&self, group: usize, check: impl FnOnce() -> Result<(), FormatError>) -> Result<(), FormatError> {
        let checked = self.checked.get(group);
        if checked.is_some_and(|checked| checked.load(Ordering::Relaxed)) {
            return Ok(());
        }
        check()?;
        if let Some(checked) = checked {
            checked.store(true, Ordering::Relaxed);
        }
        Ok(())
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

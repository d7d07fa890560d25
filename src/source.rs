//! An open pack whose payloads are read when they are needed, through the one descriptor that it
//! was opened with.
//!
//! Reads cannot fault: a file that is cut while it is in use gives an error, where an access to a
//! mapping would kill the process. Checksums are compared on the way, so a file that changes after
//! it was verified is found, too.

#[cfg(all(test, feature = "cli"))]
pub(crate) mod cut;
mod error;
#[cfg(feature = "train")]
mod rows;
#[cfg(feature = "convert")]
mod tensor;
mod windows;

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::format::layout::HEADER_LEN;
use crate::format::{FormatError, Header, Index, Limits, Section, SectionKind, check, crc32};
use crate::io::{AlignedBuf, read_exact_at};
use crate::mmap::open_regular;
use crate::{MappedPack, OpenError};

pub use error::ReadError;
#[cfg(feature = "train")]
pub(crate) use rows::RowBuf;
#[cfg(feature = "convert")]
pub(crate) use tensor::TensorBuf;
pub(crate) use windows::WindowBuf;

/// An open pack. Every payload is read when it is needed, and compared with its checksum.
/// [`MappedPack`] gives views into the bytes of a whole pack instead.
///
/// ```no_run
/// use nf4pack::PackSource;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let pack = PackSource::open("model.nf4pack")?;
/// println!("{} layers", pack.index().header().layer_count);
/// let config = pack.file("config.json")?.ok_or("no config.json")?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct PackSource {
    path: PathBuf,
    bytes: Bytes,
    verifies: bool,
}

#[derive(Debug)]
enum Bytes {
    Mapped(MappedPack),
    Read { file: File, index: Index },
}

impl PackSource {
    /// Opens a pack for reading. This is safe even if the file is changed or truncated at the same
    /// time.
    ///
    /// # Errors
    /// [`ReadError::Open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ReadError> {
        let path = path.as_ref();
        Ok(Self { path: path.to_owned(), bytes: read_index(path)?, verifies: true })
    }

    /// Uses a mapped pack. Errors name `path`. With a warm page cache, a ring of layers is a
    /// quarter faster from a mapping than from reads.
    pub fn of_mapped(path: impl AsRef<Path>, pack: MappedPack) -> Self {
        Self { path: path.as_ref().to_owned(), bytes: Bytes::Mapped(pack), verifies: true }
    }

    /// The same pack, whose tensors are used without a look at their checksums. By default, the
    /// first load of a tensor compares them.
    #[must_use]
    pub fn unverified(self) -> Self {
        Self { verifies: false, ..self }
    }

    /// Whether the first load of a tensor compares its checksum.
    pub fn verifies(&self) -> bool {
        self.verifies
    }

    /// The path that the pack was opened with.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The pack's index.
    pub fn index(&self) -> &Index {
        match &self.bytes {
            Bytes::Mapped(pack) => pack.pack().index(),
            Bytes::Read { index, .. } => index,
        }
    }

    /// The metadata of the file.
    ///
    /// # Errors
    /// [`ReadError::Io`].
    #[cfg(feature = "convert")]
    pub(crate) fn metadata(&self) -> Result<std::fs::Metadata, ReadError> {
        let metadata = match &self.bytes {
            Bytes::Mapped(pack) => pack.metadata(),
            Bytes::Read { file, .. } => file.metadata(),
        };
        metadata.map_err(|source| self.io(source))
    }

    /// The names of the embedded files, in file order.
    pub fn file_names(&self) -> impl Iterator<Item = &str> {
        let index = self.index();
        index.sections().iter().filter(|s| s.kind == Some(SectionKind::File)).map(|s| index.name(s))
    }

    /// The bytes of an embedded file (config.json, tokenizer.json, ..), or `None` if the pack has
    /// no such file. Opening has checked its length ([`Limits::file_len`]).
    ///
    /// # Errors
    /// [`ReadError::Truncated`], [`ReadError::Io`]; [`ReadError::Damaged`] if its checksum does not
    /// match.
    pub fn file(&self, name: &str) -> Result<Option<Vec<u8>>, ReadError> {
        let index = self.index();
        let is = |section: &Section| section.kind == Some(SectionKind::File) && index.name(section) == name;
        let Some((number, section)) = index.sections().iter().enumerate().find(|(_, section)| is(section)) else {
            return Ok(None);
        };
        self.check_len()?;
        let bytes = self.bytes(section.offset, section.length, &mut AlignedBuf::default())?.to_vec();
        check::checksum(index, number, section, crc32(&bytes)).map_err(|e| self.damaged(e))?;
        Ok(Some(bytes))
    }

    /// All embedded files, with their names.
    ///
    /// # Errors
    /// As [`PackSource::file`].
    #[cfg(feature = "cli")]
    pub(crate) fn files(&self) -> Result<Vec<(String, Vec<u8>)>, ReadError> {
        let read = |name: &str| Ok((name.to_owned(), self.file(name)?.unwrap_or_default()));
        self.file_names().map(read).collect()
    }

    /// Checks that the file still has its length. With a mapping, the caller has promised this. If
    /// the promise is broken, this check usually gives an error before an access faults.
    pub(crate) fn check_len(&self) -> Result<(), ReadError> {
        let Bytes::Mapped(pack) = &self.bytes else { return Ok(()) };
        let found = pack.file_len().map_err(|source| self.io(source))?;
        let expected = self.index().header().file_len;
        if found < expected { Err(self.truncated(found)) } else { Ok(()) }
    }

    /// `len` bytes of the file from `offset` on, from the mapping or in `buf`.
    pub(crate) fn bytes<'a>(&'a self, offset: u64, len: u64, buf: &'a mut AlignedBuf) -> Result<&'a [u8], ReadError> {
        match &self.bytes {
            Bytes::Mapped(pack) => {
                let all = pack.pack().bytes();
                let range = usize::try_from(offset).ok().zip(usize::try_from(offset.saturating_add(len)).ok());
                range.and_then(|(start, end)| all.get(start..end)).ok_or_else(|| self.truncated(all.len() as u64))
            }
            Bytes::Read { file, .. } => {
                let bytes = self.room(len, buf)?;
                self.read_into(file, bytes, offset)?;
                Ok(bytes)
            }
        }
    }

    fn room<'a>(&self, len: u64, buf: &'a mut AlignedBuf) -> Result<&'a mut [u8], ReadError> {
        let no_memory = || ReadError::Memory { path: self.path.clone(), bytes: len };
        usize::try_from(len).ok().and_then(|len| buf.try_first_mut(len)).ok_or_else(no_memory)
    }

    fn read_into(&self, file: &File, bytes: &mut [u8], offset: u64) -> Result<(), ReadError> {
        read_at(&self.path, file, bytes, offset).map_err(|source| match file.metadata() {
            Ok(now) if now.len() < offset + bytes.len() as u64 => self.truncated(now.len()),
            _ => self.io(source),
        })
    }

    pub(crate) fn damaged(&self, source: FormatError) -> ReadError {
        ReadError::Damaged { path: self.path.clone(), source }
    }

    fn truncated(&self, found: u64) -> ReadError {
        ReadError::Truncated { path: self.path.clone(), expected: self.index().header().file_len, found }
    }

    fn io(&self, source: std::io::Error) -> ReadError {
        ReadError::Io { path: self.path.clone(), source }
    }
}

/// Reads bytes of the pack at a path.
fn read_at(path: &Path, file: &File, bytes: &mut [u8], offset: u64) -> std::io::Result<()> {
    #[cfg(all(test, feature = "cli"))]
    cut::before_read(path);
    let _ = path;
    read_exact_at(file, bytes, offset)
}

/// Reads and validates header, index and metadata of a pack.
fn read_index(path: &Path) -> Result<Bytes, OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    let format = |source| OpenError::Format { path: path.to_owned(), source };
    let file = open_regular(path).map_err(io)?;
    let file_len = file.metadata().map_err(io)?.len();
    let mut front = vec![0; file_len.min(HEADER_LEN as u64) as usize];
    read_at(path, &file, &mut front, 0).map_err(io)?;
    let header = Header::decode(&front, file_len, &Limits::default()).map_err(format)?;
    // A valid header requests no more than the file length and the limits of the specification.
    front.resize(header.front_len() as usize, 0);
    read_at(path, &file, &mut front, 0).map_err(io)?;
    let index = Index::parse(&front, file_len).map_err(format)?;
    Ok(Bytes::Read { file, index })
}

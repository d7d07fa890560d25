//! The bytes of a pack, from a mapping or from reads.

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::format::layout::HEADER_LEN;
use crate::format::{FormatError, Header, Index, Limits, Section, SectionKind, check, crc32};
use crate::io::{AlignedBuf, read_exact_at};
use crate::mmap::open_regular;
use crate::{MappedPack, OpenError};

use super::error::StreamError;

/// An open pack, as the source of a layer stream.
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
    /// [`StreamError::Open`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, StreamError> {
        let path = path.as_ref();
        Ok(Self { path: path.to_owned(), bytes: read_index(path)?, verifies: true })
    }

    /// Uses a mapped pack. Errors name `path`. With a warm page cache, a mapping is a quarter
    /// faster than reads.
    pub fn of_mapped(path: impl AsRef<Path>, pack: MappedPack) -> Self {
        Self { path: path.as_ref().to_owned(), bytes: Bytes::Mapped(pack), verifies: true }
    }

    /// The same pack, whose tensors are used without a look at their checksums. By default, the
    /// first load of a layer and of the global tensors compares them: about 1 % of the time of a
    /// load from a file that is not in the page cache.
    #[must_use]
    pub fn unverified(self) -> Self {
        Self { verifies: false, ..self }
    }

    /// Whether the first load of a tensor compares its checksum.
    pub fn verifies(&self) -> bool {
        self.verifies
    }

    /// The pack's index.
    pub fn index(&self) -> &Index {
        match &self.bytes {
            Bytes::Mapped(pack) => pack.pack().index(),
            Bytes::Read { index, .. } => index,
        }
    }

    /// The bytes of an embedded file (config.json, tokenizer.json, ..), or `None` if the pack has
    /// no such file.
    ///
    /// # Errors
    /// [`StreamError::Truncated`], [`StreamError::Io`]; [`StreamError::Damaged`] if its checksum
    /// does not match.
    pub fn file(&self, name: &str) -> Result<Option<Vec<u8>>, StreamError> {
        let index = self.index();
        let is = |section: &Section| section.kind == Some(SectionKind::File) && index.name(section) == name;
        let Some((number, section)) = index.sections().iter().enumerate().find(|(_, section)| is(section)) else {
            return Ok(None);
        };
        self.check_len()?;
        let len = usize::try_from(section.length).unwrap_or(usize::MAX);
        let bytes = self.bytes(section.offset, len, &mut AlignedBuf::default())?.to_vec();
        check::checksum(index, number, section, crc32(&bytes)).map_err(|e| self.damaged(e))?;
        Ok(Some(bytes))
    }

    /// Checks that the file still has its length. With a mapping, the caller has promised this. If
    /// the promise is broken, this check usually gives an error before an access faults.
    pub(super) fn check_len(&self) -> Result<(), StreamError> {
        let Bytes::Mapped(pack) = &self.bytes else { return Ok(()) };
        let found = pack.file_len().map_err(|source| self.io(source))?;
        let expected = self.index().header().file_len;
        if found < expected { Err(self.truncated(found)) } else { Ok(()) }
    }

    /// `len` bytes of the file from `offset` on, from the mapping or in `buf`.
    pub(super) fn bytes<'a>(&'a self, offset: u64, len: usize, buf: &'a mut AlignedBuf) -> Result<&'a [u8], StreamError> {
        match &self.bytes {
            Bytes::Mapped(pack) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX);
                let all = pack.pack().bytes();
                all.get(start..start.saturating_add(len)).ok_or_else(|| self.truncated(all.len() as u64))
            }
            Bytes::Read { file, .. } => {
                let bytes = buf.first_mut(len);
                read_exact_at(file, bytes, offset).map_err(|source| match file.metadata() {
                    Ok(now) if now.len() < offset + len as u64 => self.truncated(now.len()),
                    _ => self.io(source),
                })?;
                Ok(bytes)
            }
        }
    }

    pub(super) fn damaged(&self, source: FormatError) -> StreamError {
        StreamError::Damaged { path: self.path.clone(), source }
    }

    fn truncated(&self, found: u64) -> StreamError {
        StreamError::Truncated { path: self.path.clone(), expected: self.index().header().file_len, found }
    }

    fn io(&self, source: std::io::Error) -> StreamError {
        StreamError::Io { path: self.path.clone(), source }
    }
}

/// Reads and validates header, index and metadata of a pack.
fn read_index(path: &Path) -> Result<Bytes, OpenError> {
    let io = |source| OpenError::Io { path: path.to_owned(), source };
    let format = |source| OpenError::Format { path: path.to_owned(), source };
    let file = open_regular(path).map_err(io)?;
    let file_len = file.metadata().map_err(io)?.len();
    let mut front = vec![0; file_len.min(HEADER_LEN as u64) as usize];
    read_exact_at(&file, &mut front, 0).map_err(io)?;
    let header = Header::decode(&front, file_len, &Limits::default()).map_err(format)?;
    // A valid header requests no more than the file length and the limits of the specification.
    front.resize(header.front_len() as usize, 0);
    read_exact_at(&file, &mut front, 0).map_err(io)?;
    let index = Index::parse(&front, file_len).map_err(format)?;
    Ok(Bytes::Read { file, index })
}

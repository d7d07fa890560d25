//! A file of samples, and what is in it.

use std::fs::{File, Metadata};
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::error::{Change, DataError};
use super::kind::Kind;
use super::lines::{BUFFER, without_mark};
use super::memory;
use super::options::Options;
use super::sample::Dataset;
use super::tokenizer::Tokenizer;
use crate::io::read::{FileError, MAX_READ, open_any, read_open};

/// Bytes of a file of JSON Lines. [`memory::limit`] is the limit of its samples.
const MAX_FILE: u64 = 64 << 30;
/// Blank buffers at the start of a file before it counts as JSON Lines, whose reader can be
/// stopped.
const MAX_BLANK: usize = 256;

/// A file of samples. JSON Lines stay on disk, and are read as they are tokenised.
#[derive(Debug)]
pub struct DataFile {
    path: PathBuf,
    contents: Contents,
    kind: Kind,
}

#[derive(Debug)]
enum Contents {
    /// A plain text, and what was read from a pipe.
    Memory(Vec<u8>),
    Disk {
        file: File,
        version: Version,
    },
}

/// What the system says of a file, as long as nobody writes to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Version {
    len: u64,
    /// The time of the last change, where the system knows it.
    modified: Option<SystemTime>,
}

impl Version {
    fn of(metadata: &Metadata) -> Self {
        Self { len: metadata.len(), modified: metadata.modified().ok() }
    }

    /// Fails if the file is another one now.
    fn check(self, file: &File) -> Result<(), DataError> {
        let now = Self::of(&file.metadata().map_err(DataError::Read)?);
        if now.len != self.len {
            Err(DataError::Changed(Change::Length { first: self.len, second: now.len }))
        } else if now != self {
            Err(DataError::Changed(Change::Written))
        } else {
            Ok(())
        }
    }
}

impl DataFile {
    /// Opens a file. Its first bytes and its name decide on its kind; if they do not, its first
    /// character does that is not blank, unless 64 MiB are. What cannot be read twice, such as a
    /// pipe, is read into memory, and so is a plain text. A file that is neither text nor JSON
    /// Lines is not read: its samples are an error.
    ///
    /// # Errors
    /// [`FileError`], also above 64 GiB; for what is read into memory, above 4 GiB or half of the
    /// machine's memory.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let failed = |source| FileError::Io { path: path.to_owned(), source };
        let (mut file, metadata) = open_any(path)?;
        let max_read = MAX_READ.min(memory::limit());
        if !metadata.is_file() {
            return Ok(Self::new(path, read_open(path, file, max_read)?));
        }
        let (first, character) = start_of(&mut file).map_err(failed)?;
        let kind = Kind::of(path, &first, character);
        if kind != Kind::JsonLines {
            let bytes = if kind == Kind::Text { read_open(path, file, max_read)? } else { Vec::new() };
            return Ok(Self { path: path.to_owned(), contents: Contents::Memory(bytes), kind });
        }
        let found = metadata.len();
        if found > MAX_FILE {
            return Err(FileError::TooLarge { path: path.to_owned(), limit: MAX_FILE, found });
        }
        let contents = Contents::Disk { file, version: Version::of(&metadata) };
        Ok(Self { path: path.to_owned(), contents, kind })
    }

    /// A file in memory; errors name the path.
    pub fn new(path: &Path, bytes: Vec<u8>) -> Self {
        Self { path: path.to_owned(), kind: Kind::of_bytes(path, &bytes), contents: Contents::Memory(bytes) }
    }

    /// Whether each line is a JSON object.
    pub fn is_json_lines(&self) -> bool {
        self.kind == Kind::JsonLines
    }

    /// The samples of the file. `progress` gets the number of tokenised lines and of all lines;
    /// while the lines are counted, 0 and those that were counted. It stops the work by returning
    /// `false`.
    ///
    /// # Errors
    /// [`DataError::File`] with what is wrong; [`DataError::Cancelled`].
    pub(crate) fn samples(
        &self,
        tokenizer: &Tokenizer,
        options: Options,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Dataset, DataError> {
        self.read(tokenizer, options, progress).map_err(|error| match error {
            DataError::Cancelled => DataError::Cancelled,
            source => DataError::File { path: self.path.clone(), source: Box::new(source) },
        })
    }

    fn read(
        &self,
        tokenizer: &Tokenizer,
        options: Options,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Dataset, DataError> {
        if let Kind::Foreign(foreign) = self.kind {
            return Err(DataError::Foreign(foreign));
        }
        match &self.contents {
            Contents::Memory(bytes) if self.kind == Kind::Text => Dataset::from_text(bytes, tokenizer, options, progress),
            Contents::Memory(bytes) => Dataset::from_json_lines(|| Ok(bytes.as_slice()), tokenizer, options, progress),
            Contents::Disk { file, version } => {
                let open = || {
                    // Before the second reading, which takes longer: its end compares checksums.
                    version.check(file)?;
                    let mut start = file;
                    start.rewind().map_err(DataError::Read)?;
                    Ok(file)
                };
                Dataset::from_json_lines(open, tokenizer, options, progress).map_err(|error| match error {
                    DataError::Cancelled => error,
                    // A line may look broken because somebody writes to the file.
                    error => version.check(file).err().unwrap_or(error),
                })
            }
        }
    }
}

/// The first bytes of a file, and its first byte that is not blank, behind the mark of UTF-8; the
/// file is at its start again.
fn start_of(file: &mut File) -> io::Result<(Vec<u8>, Option<u8>)> {
    let mut first = Vec::new();
    file.take(BUFFER as u64).read_to_end(&mut first)?;
    let mut character = without_mark(&first).trim_ascii_start().first().copied();
    let mut next = Vec::new();
    for _ in 1..MAX_BLANK {
        if character.is_some() {
            break;
        }
        next.clear();
        if file.take(BUFFER as u64).read_to_end(&mut next)? == 0 {
            break;
        }
        // A mark is at the start of a file only.
        character = next.trim_ascii_start().first().copied();
    }
    file.rewind()?;
    Ok((first, character))
}

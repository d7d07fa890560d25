//! A file of samples, and what is in it.

use std::fs::{File, Metadata};
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::error::{Change, DataError};
use super::lines::{BUFFER, without_mark};
use super::memory;
use super::options::Options;
use super::sample::Dataset;
use super::tokenizer::Tokenizer;
use crate::io::read::{FileError, MAX_READ, open_any, read_open};

/// Endings of names of JSON Lines, and of plain text; other files are recognised by their first
/// character.
const JSON_LINES: [&str; 3] = ["jsonl", "json", "ndjson"];
const TEXT: [&str; 2] = ["txt", "md"];

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
    json_lines: bool,
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
    /// Opens a file. Its name decides on its form; if it does not, its first character does that is
    /// not blank, unless 64 MiB are. What cannot be read twice, such as a pipe, is read into
    /// memory, and so is a plain text.
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
        let start = start_of(&mut file).map_err(failed)?;
        if !is_json_lines(path, &start) {
            return Ok(Self::new(path, read_open(path, file, max_read)?));
        }
        let found = metadata.len();
        if found > MAX_FILE {
            return Err(FileError::TooLarge { path: path.to_owned(), limit: MAX_FILE, found });
        }
        let contents = Contents::Disk { file, version: Version::of(&metadata) };
        Ok(Self { path: path.to_owned(), contents, json_lines: true })
    }

    /// A file in memory; errors name the path.
    pub fn new(path: &Path, bytes: Vec<u8>) -> Self {
        Self { path: path.to_owned(), json_lines: is_json_lines(path, &bytes), contents: Contents::Memory(bytes) }
    }

    /// Whether each line is a JSON object; otherwise all of it is one text.
    pub fn is_json_lines(&self) -> bool {
        self.json_lines
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
        match &self.contents {
            Contents::Memory(bytes) if !self.json_lines => Dataset::from_text(bytes, tokenizer, options, progress),
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

/// The start of a file, up to a character that is not blank; the file is at its start again.
fn start_of(file: &mut File) -> io::Result<Vec<u8>> {
    let mut start = Vec::new();
    for _ in 0..MAX_BLANK {
        start.clear();
        let len = file.take(BUFFER as u64).read_to_end(&mut start)?;
        if len == 0 || !without_mark(&start).trim_ascii_start().is_empty() {
            break;
        }
    }
    file.rewind()?;
    Ok(start)
}

/// Whether a file is JSON Lines, by its name and its first bytes.
fn is_json_lines(path: &Path, start: &[u8]) -> bool {
    let named = |endings: &[&str]| path.extension().is_some_and(|e| endings.iter().any(|n| e.eq_ignore_ascii_case(n)));
    let like_json = || without_mark(start).trim_ascii_start().first().is_none_or(|byte| b"{[".contains(byte));
    named(&JSON_LINES) || (!named(&TEXT) && like_json())
}

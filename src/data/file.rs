//! A file of samples, and what is in it.

use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::path::{Path, PathBuf};

use super::checksum::FileChecksum;
use super::error::DataError;
use super::lines::without_mark;
use super::options::Options;
use super::sample::Dataset;
use super::tokenizer::Tokenizer;
use crate::format::{PieceCrc, crc32};
use crate::io::read::{FileError, MAX_READ, open_any, read_open};

/// Endings of names of JSON Lines, and of plain text; other files are recognised by their first
/// character.
const JSON_LINES: [&str; 3] = ["jsonl", "json", "ndjson"];
const TEXT: [&str; 2] = ["txt", "md"];

/// Bytes of a file of JSON Lines. Its tokens need as much memory, or several times as much.
const MAX_FILE: u64 = 64 << 30;
/// Bytes that are read at a time.
const BUFFER: usize = 256 << 10;

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
    Disk(File),
}

impl DataFile {
    /// Opens a file. Its name decides on its form; if it does not, its first character does. What
    /// cannot be read twice, such as a pipe, is read into memory, and so is a plain text.
    ///
    /// # Errors
    /// [`FileError`], also above 64 GiB, or 4 GiB for what is read into memory.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let failed = |source| FileError::Io { path: path.to_owned(), source };
        let (mut file, metadata) = open_any(path)?;
        if !metadata.is_file() {
            return Ok(Self::new(path, read_open(path, file, MAX_READ)?));
        }
        let mut start = Vec::new();
        (&mut file).take(BUFFER as u64).read_to_end(&mut start).map_err(failed)?;
        file.rewind().map_err(failed)?;
        if !is_json_lines(path, &start) {
            return Ok(Self::new(path, read_open(path, file, MAX_READ)?));
        }
        let found = metadata.len();
        if found > MAX_FILE {
            return Err(FileError::TooLarge { path: path.to_owned(), limit: MAX_FILE, found });
        }
        Ok(Self { path: path.to_owned(), contents: Contents::Disk(file), json_lines: true })
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
        let mut dataset = self.read(tokenizer, options, progress).map_err(|error| match error {
            DataError::Cancelled => DataError::Cancelled,
            source => DataError::File { path: self.path.clone(), source: Box::new(source) },
        })?;
        if let Contents::Memory(bytes) = &self.contents {
            dataset.checksum = FileChecksum::of(bytes);
        }
        Ok(dataset)
    }

    fn read(
        &self,
        tokenizer: &Tokenizer,
        options: Options,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Dataset, DataError> {
        match &self.contents {
            Contents::Memory(bytes) if !self.json_lines => {
                Dataset::from_text(bytes, tokenizer, options.max_length, progress)
            }
            Contents::Memory(bytes) => Dataset::from_json_lines(|| Ok(bytes.as_slice()), tokenizer, options, progress),
            Contents::Disk(file) => {
                let seen = RefCell::<PieceCrc>::default();
                let open = || read_again(file, &seen).map_err(DataError::Read);
                let dataset = Dataset::from_json_lines(open, tokenizer, options, progress)?;
                let seen = seen.take();
                Ok(Dataset { checksum: FileChecksum { crc32: seen.value(), len: seen.len() }, ..dataset })
            }
        }
    }
}

/// Whether a file is JSON Lines, by its name and its first bytes.
fn is_json_lines(path: &Path, start: &[u8]) -> bool {
    let named = |endings: &[&str]| path.extension().is_some_and(|e| endings.iter().any(|n| e.eq_ignore_ascii_case(n)));
    let like_json = || without_mark(start).trim_ascii_start().first().is_none_or(|byte| b"{[".contains(byte));
    named(&JSON_LINES) || (!named(&TEXT) && like_json())
}

/// A file from its start on; `seen` gets the checksum of what is read.
fn read_again<'a>(mut file: &'a File, seen: &'a RefCell<PieceCrc>) -> io::Result<impl BufRead + 'a> {
    file.rewind()?;
    seen.take();
    Ok(BufReader::with_capacity(BUFFER, Checksummed { file, seen }))
}

/// A file whose bytes are added to a checksum as they are read.
struct Checksummed<'a> {
    file: &'a File,
    seen: &'a RefCell<PieceCrc>,
}

impl Read for Checksummed<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.file.read(buf)?;
        let read = buf.get(..len).unwrap_or_default();
        self.seen.borrow_mut().push(crc32(read), len as u64);
        Ok(len)
    }
}

//! A file of samples, and what is in it.

use std::path::Path;

use super::error::DataError;
use super::formats::without_mark;
use super::options::Options;
use super::sample::Dataset;
use super::tokenizer::Tokenizer;

/// Endings of names of JSON Lines, and of plain text; other files are recognised by their first
/// character.
const JSON_LINES: [&str; 3] = ["jsonl", "json", "ndjson"];
const TEXT: [&str; 2] = ["txt", "md"];

/// A file of samples.
#[derive(Debug, Clone, Copy)]
pub struct DataFile<'a> {
    /// Its path: errors name it.
    pub path: &'a Path,
    /// Its contents.
    pub bytes: &'a [u8],
    /// Whether each line is a JSON object; otherwise all of it is one text.
    pub json_lines: bool,
}

impl<'a> DataFile<'a> {
    /// A file. Its name decides on its form; if it does not, the first character does.
    pub fn new(path: &'a Path, bytes: &'a [u8]) -> Self {
        let named = |endings: &[&str]| path.extension().is_some_and(|e| endings.iter().any(|n| e.eq_ignore_ascii_case(n)));
        let like_json = || without_mark(bytes).trim_ascii_start().first().is_none_or(|byte| b"{[".contains(byte));
        Self { path, bytes, json_lines: named(&JSON_LINES) || (!named(&TEXT) && like_json()) }
    }

    /// The samples of the file. `progress` gets the number of tokenised lines and of all lines; it
    /// stops the work by returning `false`.
    ///
    /// # Errors
    /// [`DataError::File`] with what is wrong; [`DataError::Cancelled`].
    pub(crate) fn samples(
        &self,
        tokenizer: &Tokenizer,
        options: Options,
        progress: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<Dataset, DataError> {
        let read = match self.json_lines {
            true => Dataset::from_json_lines(self.bytes, tokenizer, options, progress),
            // One call of the tokenizer: cut at another place, a text has other tokens.
            false => Dataset::from_text(self.bytes, tokenizer, options.max_length, progress),
        };
        read.map_err(|error| match error {
            DataError::Cancelled => DataError::Cancelled,
            source => DataError::File { path: self.path.to_owned(), source: Box::new(source) },
        })
    }
}

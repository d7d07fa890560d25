//! The lines of a file of samples, read one after another: the file may be larger than memory.

use std::io::{BufRead, BufReader, Read};

use super::checksum::{Checksummed, FileChecksum};
use super::error::DataError;

/// Bytes of a line, at most: a line takes some 200 times as much memory while it is tokenised.
pub(super) const MAX_LINE: usize = 2 << 20;
/// Bytes between two returns of [`Lines::read`], those of blank lines included: a signal is heard
/// between them.
const MAX_SCANNED: usize = 4 << 20;
/// Bytes that are read at a time.
pub(super) const BUFFER: usize = 256 << 10;
/// The mark of UTF-8 that some programs of Windows put before a text.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// The bytes of a text without its mark.
pub(super) fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(MARK).unwrap_or(bytes)
}

/// A line that is not blank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    /// Its number, from 1.
    pub(super) number: u64,
    /// Its bytes, without its end.
    pub(super) text: Vec<u8>,
}

/// The lines of a file.
#[derive(Debug)]
pub(super) struct Lines<R> {
    input: BufReader<Checksummed<R>>,
    /// The number of the last line that was read.
    number: u64,
    /// A line that did not fit behind others.
    held: Option<Line>,
}

impl<R: Read> Lines<R> {
    /// Those of a file that is read from its start.
    pub(super) fn new(input: R) -> Self {
        Self { input: BufReader::with_capacity(BUFFER, Checksummed::new(input)), number: 0, held: None }
    }

    /// The checksum of what was read; of the whole file once there are no more lines.
    pub(super) fn checksum(&self) -> FileChecksum {
        self.input.get_ref().checksum()
    }

    /// The next lines that are not blank: at most `count`, and no more bytes than a line may have.
    /// `None` at the end of the file.
    ///
    /// # Errors
    /// [`DataError::LineBytes`], [`DataError::Read`].
    pub(super) fn read(&mut self, count: usize) -> Result<Option<Vec<Line>>, DataError> {
        let (mut lines, mut bytes, mut scanned) = (Vec::new(), 0, 0);
        while scanned < MAX_SCANNED {
            let held = self.held.take();
            let next = if held.is_some() { held } else { self.next()? };
            let Some(line) = next else { return Ok(Some(lines).filter(|lines| !lines.is_empty())) };
            scanned += line.text.len() + 1;
            if line.text.trim_ascii().is_empty() {
                continue;
            }
            if bytes > 0 && (lines.len() >= count || bytes + line.text.len() > MAX_LINE) {
                self.held = Some(line);
                break;
            }
            bytes += line.text.len();
            lines.push(line);
        }
        Ok(Some(lines))
    }

    /// The next line.
    fn next(&mut self) -> Result<Option<Line>, DataError> {
        let mut text = Vec::new();
        let limit = MAX_LINE as u64 + 1;
        if (&mut self.input).take(limit).read_until(b'\n', &mut text).map_err(DataError::Read)? == 0 {
            return Ok(None);
        }
        self.number += 1;
        let number = self.number;
        if text.last() == Some(&b'\n') {
            text.pop();
        } else if text.len() > MAX_LINE {
            // The rest is not looked for: a sparse file may have a line of a terabyte.
            return Err(DataError::LineBytes { line: number, limit: MAX_LINE });
        }
        if number == 1 {
            text.drain(..text.len() - without_mark(&text).len());
        }
        Ok(Some(Line { number, text }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    /// The numbers of the lines of each reading.
    fn numbers(text: &str, count: usize) -> Vec<Vec<u64>> {
        let mut lines = Lines::new(text.as_bytes());
        std::iter::from_fn(|| lines.read(count).unwrap())
            .map(|lines| lines.into_iter().map(|line| line.number).collect())
            .collect()
    }

    /// Never more than a line may have, or `count` lines.
    #[test]
    fn few_lines_are_in_memory() {
        let line = |len: usize| format!("{}\n", "a".repeat(len - 1));
        let text = [line(MAX_LINE / 2), line(MAX_LINE / 2), line(1 << 10), line(1 << 10), line(1 << 10)].concat();
        assert_eq!(numbers(&text, 2), [vec![1, 2], vec![3, 4], vec![5]]);
        assert_eq!(numbers(&[line(MAX_LINE / 2 + 2), line(MAX_LINE / 2 + 2)].concat(), 9), [[1], [2]]);
        let long = "a".repeat(MAX_LINE);
        assert_eq!(numbers(&format!("{long}\n{long}"), 9), [[1], [2]]);
        for end in ["", "\n"] {
            let text = format!("a\n{long}a{end}");
            let mut lines = Lines::new(text.as_bytes());
            assert!(matches!(lines.read(9), Err(DataError::LineBytes { line: 2, limit: MAX_LINE })));
        }
    }

    #[test]
    fn blank_lines_and_the_mark_are_left_out() {
        let mut lines = Lines::new(&b"\xef\xbb\xbfa\r\n \t\r\n\nb"[..]);
        let expected = [(1, b"a\r".to_vec()), (4, b"b".to_vec())].map(|(number, text)| Line { number, text });
        assert_eq!((lines.read(9).unwrap(), lines.read(9).unwrap()), (Some(expected.to_vec()), None));
        assert_eq!(numbers("", 9), [[0_u64; 0]; 0]);
        let blank = format!("{}\n", " ".repeat(MAX_LINE - 1));
        let blanks = blank.repeat(MAX_SCANNED / MAX_LINE + 1);
        assert_eq!(numbers(&blanks, 9), [[0_u64; 0]; 1], "a return between blank lines");
    }
}

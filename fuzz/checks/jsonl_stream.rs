//! The reader of JSON Lines, which leaves a file on disk and reads it twice: good lines, then
//! damage, also at the edges of its buffers. In whatever pieces the bytes arrive, the result is
//! that of the whole file at once. A failing read, and another file in the second reading, are
//! errors.

use std::fs;
use std::io::{self, Read};

use arbitrary::{Result, Unstructured};
use nf4pack::data::{DataError, DataFile, Tokenizer, TrainOn};
use nf4pack::fuzzing::{Dataset, Options, file_samples};

use super::{json, jsonl};

/// Bytes of the reader's buffer.
const BUFFER: usize = 256 << 10;

/// What is put between the bytes of good lines.
const DAMAGE: [&[u8]; 10] = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b"{", b"\"", b"}\n{", b"\xe2\x80\xa8"];

thread_local! {
    static FOLDER: tempfile::TempDir = tempfile::tempdir().expect("a temporary folder");
}

/// How a file is read.
struct Reading {
    tokenizer: usize,
    options: Options,
    /// Bytes of each piece; 0 is an interruption.
    pieces: Vec<u8>,
    /// The byte before which a read fails.
    failure: usize,
    /// What the file is in the second reading.
    second: Vec<u8>,
    on_disk: bool,
}

/// Runs the check: text is the file itself; other bytes choose lines and damage.
pub fn run(bytes: &[u8]) {
    if bytes.first().is_none_or(u8::is_ascii) {
        let options = Options { train_on: TrainOn::Completions, max_length: 64, strict: false, memory: 1 << 20 };
        let second = [bytes, b" "].concat();
        let (tokenizer, pieces) = (bytes.len(), vec![bytes.len() as u8 % 7 + 1, 0, 1]);
        let failure = bytes.len() / 2;
        check(bytes, &Reading { tokenizer, options, pieces, failure, second, on_disk: bytes.len().is_multiple_of(2) });
    } else {
        let _ = built(&mut Unstructured::new(&bytes[1..]));
    }
}

fn check(file: &[u8], reading: &Reading) {
    jsonl::with_tokenizer(reading.tokenizer, |tokenizer| {
        let expected = outcome(samples(|| file, tokenizer, reading));
        let pieces = |fails| Pieces { bytes: file, sizes: &reading.pieces, reads: 0, interrupted: false, fails };
        assert_eq!(outcome(samples(|| pieces(None), tokenizer, reading)), expected, "in pieces");
        let fails = Some(reading.failure.min(file.len()));
        assert!(samples(|| pieces(fails), tokenizer, reading).is_err(), "a read fails");
        if reading.second != file {
            let mut readings = [file, &reading.second].into_iter();
            let changed = samples(|| readings.next().unwrap_or_default(), tokenizer, reading);
            assert!(changed.is_err(), "another file in the second reading");
        }
        if reading.on_disk {
            on_disk(file, tokenizer, reading, &expected);
        }
    });
}

fn samples<R: Read>(
    mut open: impl FnMut() -> R,
    tokenizer: &Tokenizer,
    reading: &Reading,
) -> std::result::Result<Dataset, DataError> {
    Dataset::from_json_lines(|| Ok(open()), tokenizer, reading.options, &mut |done, total| done <= total)
}

/// A file is the same on disk and in memory.
fn on_disk(file: &[u8], tokenizer: &Tokenizer, reading: &Reading, expected: &std::result::Result<Dataset, String>) {
    let path = FOLDER.with(|folder| folder.path().join("data"));
    fs::write(&path, file).expect("the file");
    let (disk, memory) = (DataFile::open(&path).expect("a readable file"), DataFile::new(&path, file.to_vec()));
    assert_eq!(disk.is_json_lines(), memory.is_json_lines());
    let [disk, memory] = [&disk, &memory].map(|file| outcome(file_samples(file, tokenizer, reading.options)));
    assert_eq!(disk, memory, "on disk and in memory");
    if let (Ok(expected), Ok(read)) = (expected, &disk) {
        assert!(read.form.is_none() || read == expected);
    }
}

fn outcome(result: std::result::Result<Dataset, DataError>) -> std::result::Result<Dataset, String> {
    if let Ok(dataset) = &result {
        assert!(!dataset.samples.is_empty());
        assert!(dataset.samples.iter().all(|sample| sample.tokens.len() == sample.loss_mask.len()));
    }
    result.map_err(|error| error.to_string())
}

/// A reader that gives a few bytes at a time.
struct Pieces<'a> {
    bytes: &'a [u8],
    sizes: &'a [u8],
    reads: usize,
    interrupted: bool,
    /// Bytes that are left before a read fails.
    fails: Option<usize>,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let size = self.sizes.get(self.reads % self.sizes.len().max(1)).copied().unwrap_or(1);
        self.reads += 1;
        self.interrupted = size == 0 && !self.interrupted;
        if self.interrupted {
            return Err(io::ErrorKind::Interrupted.into());
        }
        if self.fails == Some(0) {
            return Err(io::Error::other("a failing disk"));
        }
        let len = usize::from(size).max(1).min(self.bytes.len()).min(buf.len()).min(self.fails.unwrap_or(usize::MAX));
        let (piece, rest) = self.bytes.split_at(len);
        buf[..len].copy_from_slice(piece);
        (self.bytes, self.fails) = (rest, self.fails.map(|left| left - len));
        Ok(len)
    }
}

fn built(u: &mut Unstructured<'_>) -> Result<()> {
    let form = u.int_in_range(0..=5)?;
    let mut file = Vec::new();
    let good = [jsonl::line(u, form)?, jsonl::line(u, form)?].map(|line| line.to_string());
    // Lines are read 512 at a time.
    let count = if u.ratio(1, 16)? { u.int_in_range(500..=1030)? } else { u.int_in_range(0..=8)? };
    for line in good.iter().cycle().take(count) {
        file.extend(line.as_bytes());
        file.extend(*u.choose(&[&b"\n"[..], b"\r\n", b"\n \n"])?);
    }
    if u.ratio(1, 8)? {
        let edge = BUFFER.saturating_sub(u.int_in_range(0..=80)?);
        file.resize(edge.max(file.len()), b' ');
    }
    for _ in 0..u.int_in_range(0..=3)? {
        let mut line = jsonl::line(u, form)?;
        if u.ratio(1, 2)? {
            json::edit(u, &mut line, &jsonl::KEYS)?;
        }
        file.extend(json::bytes(u, &line)?);
        file.extend(*u.choose(&[&b"\n"[..], b"\r\n", b"\n\n", b""])?);
    }
    if u.ratio(1, 2)? {
        file = damaged(u, file)?;
    }
    let second = damaged(u, file.clone())?;
    let memory = if u.ratio(1, 8)? { u.int_in_range(0..=4000)? } else { 1 << 20 };
    let train_on = if u.arbitrary()? { TrainOn::All } else { TrainOn::Completions };
    let reading = Reading {
        tokenizer: u.int_in_range(0..=20)?,
        options: Options { train_on, max_length: u.int_in_range(1..=100)?, strict: u.arbitrary()?, memory },
        failure: u.int_in_range(0..=file.len())?,
        on_disk: u.ratio(1, 4)?,
        second,
        pieces: u.arbitrary()?,
    };
    check(&file, &reading);
    Ok(())
}

/// A byte changed, something put in or left out.
fn damaged(u: &mut Unstructured<'_>, mut file: Vec<u8>) -> Result<Vec<u8>> {
    let at = u.choose_index(file.len() + 1)?;
    match u.int_in_range(0..=3)? {
        0 => drop(file.splice(at..at, u.choose(&DAMAGE)?.iter().copied())),
        1 => file.truncate(at),
        2 => drop(file.drain(at..(at + u.int_in_range(0..=20)?).min(file.len()))),
        _ => file.get_mut(at).into_iter().for_each(|byte| *byte ^= 1),
    }
    Ok(file)
}

//! Records of a training, step by step: `metrics.jsonl` and TensorBoard's events.

mod file;
mod records;
mod tensorboard;

use std::io;
use std::path::{Path, PathBuf};

use crate::io::folder::publish;
use crate::io::read::{self, FileError, Links};
use file::Appender;
pub use file::RecordError;
pub use records::{EvalRecord, Record, StepRecord};

/// The file of all records, one JSON object per line.
pub const METRICS: &str = "metrics.jsonl";
/// Bytes that it may have: a million steps take a third.
const MAX_METRICS_LEN: u64 = 1 << 30;

/// Writes records into a folder at once: `metrics.jsonl`, and an event file for TensorBoard. Each
/// record tries again to write a file that could not be written, with all records that it lacks.
#[derive(Debug)]
pub struct Recorder {
    metrics: Log,
    events: Log,
}

impl Recorder {
    /// Records a new training. The `metrics.jsonl` of an earlier one is replaced; its event files
    /// remain, but TensorBoard no longer shows them.
    pub fn create(folder: &Path) -> Self {
        let [metrics, events] = [Kind::NewMetrics, Kind::Events { first_step: 0 }].map(|kind| Log::new(folder, kind));
        Self { metrics, events }
    }

    /// Continues the records of a training that resumes after `step`, and returns the records up to
    /// then (none if the file cannot be read). Later records are dropped, all or none, and so are
    /// the evaluation of `step` if it is due again, and an incomplete last line.
    ///
    /// # Errors
    /// [`RecordError::Json`]: a line is not a record. The file is unchanged.
    pub fn resume(folder: &Path, step: u64, eval_due: bool) -> Result<(Self, Vec<Record>), RecordError> {
        let records = match read_kept(folder, step, eval_due) {
            Ok((_, records)) => records,
            Err(error @ RecordError::Json { .. }) => return Err(error),
            // Reported when the file is written.
            Err(_) => Vec::new(),
        };
        let metrics = Log::new(folder, Kind::OldMetrics { step, eval_due });
        let events = Log::new(folder, Kind::Events { first_step: step.saturating_add(1) });
        Ok((Self { metrics, events }, records))
    }

    /// Appends a record to both files, and all records that they lack. The operating system has
    /// them when this returns. Returns the files that could not be written; the next record tries
    /// again.
    pub fn record(&mut self, record: &Record) -> Vec<RecordError> {
        // Numbers and a tag always have a form in JSON.
        let mut line = serde_json::to_vec(record).unwrap_or_default();
        line.push(b'\n');
        self.metrics.add(&line);
        self.events.add(&tensorboard::event_of(record));
        self.flush()
    }

    /// Creates missing files and writes missing records. Returns the files that still could not be
    /// written.
    pub fn flush(&mut self) -> Vec<RecordError> {
        [&mut self.metrics, &mut self.events].into_iter().filter_map(|log| log.write().err()).collect()
    }

    /// Makes all records durable that are in the files. Returns the files that could not be synced.
    pub fn sync(&mut self) -> Vec<RecordError> {
        let files = [&self.metrics, &self.events].into_iter().filter_map(|log| log.file.as_ref());
        files.filter_map(|file| file.sync().err()).collect()
    }

    /// Removes both files. Returns those that could not be removed.
    pub fn remove(&mut self) -> Vec<RecordError> {
        let files = [&mut self.metrics, &mut self.events].into_iter().filter_map(|log| log.file.take());
        files.filter_map(|file| file.remove().err()).collect()
    }

    /// The files that lack records, and how many.
    pub fn missing(&self) -> Vec<(&'static str, u64)> {
        let logs = [(METRICS, &self.metrics), ("TensorBoard's events", &self.events)];
        logs.into_iter().map(|(name, log)| (name, log.missing)).filter(|(_, missing)| *missing > 0).collect()
    }
}

/// What a log records, and what it starts with.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// Metrics of a new training.
    NewMetrics,
    /// Metrics of a training resumed after `step`.
    OldMetrics { step: u64, eval_due: bool },
    /// A new file for TensorBoard that starts at this step.
    Events { first_step: u64 },
}

/// A file of records, and the records that could not be written to it.
#[derive(Debug)]
struct Log {
    folder: PathBuf,
    kind: Kind,
    file: Option<Appender>,
    waiting: Vec<u8>,
    missing: u64,
}

impl Log {
    fn new(folder: &Path, kind: Kind) -> Self {
        Self { folder: folder.to_owned(), kind, file: None, waiting: Vec::new(), missing: 0 }
    }

    fn add(&mut self, record: &[u8]) {
        self.waiting.extend_from_slice(record);
        self.missing += 1;
    }

    /// Writes all records that the file lacks, or none.
    fn write(&mut self) -> Result<(), RecordError> {
        let file = match &mut self.file {
            Some(file) => file,
            closed => closed.insert(open(&self.folder, self.kind)?),
        };
        file.append(&self.waiting)?;
        self.waiting.clear();
        self.missing = 0;
        Ok(())
    }
}

fn open(folder: &Path, kind: Kind) -> Result<Appender, RecordError> {
    let kept = match kind {
        Kind::Events { first_step } => return tensorboard::create(folder, first_step),
        Kind::NewMetrics => Vec::new(),
        Kind::OldMetrics { step, eval_due } => read_kept(folder, step, eval_due)?.0,
    };
    let path = folder.join(METRICS);
    match publish(folder, &[(METRICS, kept.as_slice())]) {
        Ok(()) => Appender::open(path),
        Err(source) => Err(RecordError::Write { path, source }),
    }
}

/// The lines of `metrics.jsonl` that a training that resumes after `step` keeps, and their records;
/// none if there is no file.
fn read_kept(folder: &Path, step: u64, eval_due: bool) -> Result<(Vec<u8>, Vec<Record>), RecordError> {
    let path = folder.join(METRICS);
    let text = match read::read(&path, Links::Refuse, MAX_METRICS_LEN) {
        Ok(text) => text,
        Err(FileError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let (mut kept, mut records) = (Vec::new(), Vec::new());
    for (record, line) in parse(&path, &text)? {
        let again = eval_due && matches!(record, Record::Eval(_)) && record.step() == step;
        if record.step() <= step && !again {
            kept.extend_from_slice(line);
            kept.push(b'\n');
            records.push(record);
        }
    }
    Ok((kept, records))
}

/// Reads `metrics.jsonl`, without an incomplete last line.
///
/// # Errors
/// See [`RecordError`].
#[cfg(any(fuzzing, test))]
pub fn read_metrics(path: &Path) -> Result<Vec<Record>, RecordError> {
    let text = read::read(path, Links::Refuse, MAX_METRICS_LEN)?;
    Ok(parse(path, &text)?.into_iter().map(|(record, _)| record).collect())
}

/// The records, each with its line.
fn parse<'a>(path: &Path, text: &'a [u8]) -> Result<Vec<(Record, &'a [u8])>, RecordError> {
    let mut records = Vec::new();
    for (at, line) in text.split_inclusive(|&b| b == b'\n').enumerate() {
        let complete = line.strip_suffix(b"\n");
        match (serde_json::from_slice(line), complete) {
            (Ok(record), _) => records.push((record, complete.unwrap_or(line))),
            (Err(_), None) => {}
            (Err(source), Some(_)) => {
                return Err(RecordError::Json { path: path.to_owned(), line: at as u64 + 1, source });
            }
        }
    }
    Ok(records)
}

#[cfg(test)]
mod tests;

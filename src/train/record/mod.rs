//! What a training was like, step by step: `metrics.jsonl`, TensorBoard's events and a report.

mod chart;
mod report;
mod series;
mod tensorboard;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

use crate::io::folder::publish;
#[cfg(feature = "cli")]
pub use report::duration;
pub use report::{Report, report};
#[cfg(feature = "cli")]
pub use series::median;

/// The file of all records, one JSON object a line.
pub const METRICS: &str = "metrics.jsonl";

/// Why records could not be written or read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The records cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The records cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A line that is no record.
    #[error("{}: line {line} is not a record: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// The line, from 1 on.
        line: u64,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// One optimiser step.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct StepRecord {
    /// Steps so far, this one included: the first is 1.
    pub step: u64,
    /// Passes over the data so far.
    #[serde(deserialize_with = "nan_or_f64")]
    pub epoch: f64,
    /// Mean cross-entropy over the trained tokens of the step, in nats.
    #[serde(deserialize_with = "nan_or_f32")]
    pub loss: f32,
    /// Learning rate.
    #[serde(deserialize_with = "nan_or_f64")]
    pub lr: f64,
    /// Norm of the gradient of all adapters, before clipping.
    #[serde(deserialize_with = "nan_or_f32")]
    pub grad_norm: f32,
    /// The norm that gradients are clipped to; 0 for none.
    #[serde(deserialize_with = "nan_or_f32")]
    pub clip: f32,
    /// Tokens of the step with a loss.
    pub trained_tokens: u64,
    /// All tokens of the step.
    pub tokens: u64,
    /// All tokens, by the time of the step.
    #[serde(deserialize_with = "nan_or_f64")]
    pub tokens_per_second: f64,
    /// Bytes of the GPU's memory that the run takes: as allocated, or as planned where the backend
    /// does not tell.
    pub gpu_bytes: u64,
    /// Seconds since the training began, those before it was resumed included.
    #[serde(deserialize_with = "nan_or_f64")]
    pub seconds: f64,
}

/// One look at the held-out data.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct EvalRecord {
    /// Steps before it; 0 for the untrained adapter.
    pub step: u64,
    /// Mean cross-entropy over the tokens, in nats.
    #[serde(deserialize_with = "nan_or_f64")]
    pub loss: f64,
    /// e to the power of the loss.
    #[serde(deserialize_with = "nan_or_f64")]
    pub perplexity: f64,
    /// Tokens with a loss.
    pub tokens: u64,
    /// Seconds since the training began, those before it was resumed included.
    #[serde(deserialize_with = "nan_or_f64")]
    pub seconds: f64,
}

/// A line of `metrics.jsonl`. Numbers that are not finite are null there, and NaN when they are
/// read again.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// A step was made.
    Step(StepRecord),
    /// The held-out data was looked at.
    Eval(EvalRecord),
}

impl Record {
    /// The step that the record belongs to.
    pub fn step(&self) -> u64 {
        match self {
            Self::Step(step) => step.step,
            Self::Eval(eval) => eval.step,
        }
    }
}

fn nan_or_f32<'de, D: Deserializer<'de>>(from: D) -> Result<f32, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f32::NAN))
}

fn nan_or_f64<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or(f64::NAN))
}

/// Writes records into a folder as they arise: `metrics.jsonl`, and an event file for TensorBoard.
/// A file that cannot be written is tried again with each record, and then gets all that it lacks.
#[derive(Debug)]
pub struct Recorder {
    metrics: Log,
    events: Log,
}

impl Recorder {
    /// Records a new training. What an earlier one left in `metrics.jsonl` is dropped; its event
    /// files stay, and TensorBoard does not show them any more.
    pub fn create(folder: &Path) -> Self {
        let [metrics, events] = [Kind::NewMetrics, Kind::Events { first_step: 0 }].map(|kind| Log::new(folder, kind));
        Self { metrics, events }
    }

    /// Goes on with a training whose first `step` steps count, and returns its records: what was
    /// recorded after them, and that step's evaluation where it is due again, is dropped, all of it
    /// or, if this fails, nothing, and so is a last line that was not finished. Where the file
    /// cannot be read, there are none.
    ///
    /// # Errors
    /// [`RecordError::Json`]: a line that is no record. Nothing is changed then.
    pub fn resume(folder: &Path, step: u64, eval_due: bool) -> Result<(Self, Vec<Record>), RecordError> {
        let records = match read_kept(folder, step, eval_due) {
            Ok((_, records)) => records,
            Err(error @ RecordError::Json { .. }) => return Err(error),
            // Told when the file is to be written.
            Err(_) => Vec::new(),
        };
        let metrics = Log::new(folder, Kind::OldMetrics { step, eval_due });
        let events = Log::new(folder, Kind::Events { first_step: step.saturating_add(1) });
        Ok((Self { metrics, events }, records))
    }

    /// Appends a record to both files, and all records that they lack; with the operating system
    /// when this returns. Returns what could not be written: that is tried again with the next
    /// record.
    pub fn record(&mut self, record: &Record) -> Vec<RecordError> {
        // Numbers and a tag: that can always be written as JSON.
        let mut line = serde_json::to_vec(record).unwrap_or_default();
        line.push(b'\n');
        self.metrics.add(&line);
        self.events.add(&tensorboard::event_of(record));
        self.flush()
    }

    /// Makes the files that are not there yet, and tries again what could not be written. Returns
    /// what still cannot.
    pub fn flush(&mut self) -> Vec<RecordError> {
        [&mut self.metrics, &mut self.events].into_iter().filter_map(|log| log.write().err()).collect()
    }

    /// How many records each file lacks, by what it is for; only those that lack some.
    pub fn missing(&self) -> Vec<(&'static str, u64)> {
        let logs = [(METRICS, &self.metrics), ("TensorBoard's events", &self.events)];
        logs.into_iter().map(|(name, log)| (name, log.missing)).filter(|(_, missing)| *missing > 0).collect()
    }
}

/// What a log is, and how it begins.
#[derive(Debug, Clone, Copy)]
enum Kind {
    /// Metrics of a new training.
    NewMetrics,
    /// Metrics of a training resumed after `step`.
    OldMetrics { step: u64, eval_due: bool },
    /// A new file for TensorBoard, from this step on.
    Events { first_step: u64 },
}

/// A file of records, and those that it lacks because it could not be opened or written.
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

    /// Writes all that the file lacks; it gets all of it, or nothing.
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

/// The lines of `metrics.jsonl` that a training resumed after `step` keeps, and their records; none
/// where there is no file.
fn read_kept(folder: &Path, step: u64, eval_due: bool) -> Result<(Vec<u8>, Vec<Record>), RecordError> {
    let path = folder.join(METRICS);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(source) => return Err(RecordError::Read { path, source }),
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

/// Reads `metrics.jsonl`. A last line that was not finished is left out.
///
/// # Errors
/// A file that cannot be read; a line that is no record.
pub fn read_metrics(path: &Path) -> Result<Vec<Record>, RecordError> {
    let text = fs::read(path).map_err(|source| RecordError::Read { path: path.to_owned(), source })?;
    Ok(parse(path, &text)?.into_iter().map(|(record, _)| record).collect())
}

/// The records, each with its line.
fn parse<'a>(path: &Path, text: &'a [u8]) -> Result<Vec<(Record, &'a [u8])>, RecordError> {
    let mut records = Vec::new();
    for (at, line) in text.split_inclusive(|&b| b == b'\n').enumerate() {
        let finished = line.strip_suffix(b"\n");
        match (serde_json::from_slice(line), finished) {
            (Ok(record), _) => records.push((record, finished.unwrap_or(line))),
            (Err(_), None) => {}
            (Err(source), Some(_)) => {
                return Err(RecordError::Json { path: path.to_owned(), line: at as u64 + 1, source });
            }
        }
    }
    Ok(records)
}

/// A file that grows by whole records.
#[derive(Debug)]
struct Appender {
    path: PathBuf,
    file: File,
    /// Bytes of whole records.
    len: u64,
    /// Whether a part of a record may follow them.
    partial: bool,
}

impl Appender {
    /// Opens the file, or makes it.
    fn open(path: PathBuf) -> Result<Self, RecordError> {
        let open = || {
            let file = File::options().append(true).create(true).open(&path)?;
            let len = file.metadata()?.len();
            Ok((file, len))
        };
        match open() {
            Ok((file, len)) => Ok(Self { path, file, len, partial: false }),
            Err(source) => Err(RecordError::Write { path, source }),
        }
    }

    /// Appends all of the bytes, or none.
    fn append(&mut self, bytes: &[u8]) -> Result<(), RecordError> {
        if bytes.is_empty() {
            return Ok(());
        }
        // A full disk takes a part, which is cut off at once or, if that fails, before the next
        // bytes.
        let undone = if self.partial { self.file.set_len(self.len) } else { Ok(()) };
        if let Err(source) = undone.and_then(|()| self.file.write_all(bytes)) {
            self.partial = self.file.set_len(self.len).is_err();
            return Err(RecordError::Write { path: self.path.clone(), source });
        }
        self.partial = false;
        self.len += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests;

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
pub use report::{Report, duration, report};
pub use series::median;
use tensorboard::EventFile;

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
    /// Bytes of the GPU's memory that the run takes: as allocated, or as planned where the backend does not tell.
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

/// A line of `metrics.jsonl`. Numbers that are not finite are null there, and NaN when they are read again.
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
#[derive(Debug)]
pub struct Recorder {
    metrics: Appender,
    events: EventFile,
}

impl Recorder {
    /// Records a new training. What an earlier one left in `metrics.jsonl` is dropped; its event files stay, and TensorBoard
    /// does not show them any more.
    ///
    /// # Errors
    /// [`RecordError::Write`].
    pub fn create(folder: &Path) -> Result<Self, RecordError> {
        Self::start(folder, &[], 0)
    }

    /// Goes on with a training whose first `step` steps count, and returns its records: what was recorded after them, and that step's
    /// evaluation where it is due again, is dropped, all of it or, if this fails, nothing, and so is a last line that was not finished.
    ///
    /// # Errors
    /// A folder that cannot be read or written; a line that is no record.
    pub fn resume(folder: &Path, step: u64, eval_due: bool) -> Result<(Self, Vec<Record>), RecordError> {
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
        Ok((Self::start(folder, &kept, step.saturating_add(1))?, records))
    }

    fn start(folder: &Path, metrics: &[u8], first_step: u64) -> Result<Self, RecordError> {
        publish(folder, &[(METRICS, metrics)]).map_err(|source| RecordError::Write { path: folder.to_owned(), source })?;
        let metrics = Appender::open(folder.join(METRICS))?;
        Ok(Self { metrics, events: EventFile::create(folder, first_step)? })
    }

    /// Appends a record to both files. It is with the operating system when this returns.
    ///
    /// # Errors
    /// [`RecordError::Write`]; the file is then without the record, not with a part of it.
    pub fn record(&mut self, record: &Record) -> Result<(), RecordError> {
        let mut line = serde_json::to_vec(record)
            .map_err(|e| RecordError::Write { path: self.metrics.path.clone(), source: e.into() })?;
        line.push(b'\n');
        self.metrics.append(&line)?;
        self.events.record(record)
    }
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
    len: u64,
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
            Ok((file, len)) => Ok(Self { path, file, len }),
            Err(source) => Err(RecordError::Write { path, source }),
        }
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), RecordError> {
        if let Err(source) = self.file.write_all(bytes) {
            // A full disk takes a part. If that cannot be undone, either, the next read says which line is broken.
            let _ = self.file.set_len(self.len);
            return Err(RecordError::Write { path: self.path.clone(), source });
        }
        self.len += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests;

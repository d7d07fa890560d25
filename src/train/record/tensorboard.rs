//! TensorBoard's event files: TFRecord frames (tensorflow/core/lib/io/record_writer.h) around Event
//! messages (tensorflow/core/util/event.proto). They are few, so this file encodes them itself.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::file::{Appender, RecordError};
use super::records::Record;

const PREFIX: &str = "events.out.tfevents.";

/// A new event file after all others of the folder. TensorBoard no longer shows what those have of
/// step `first_step` and later.
pub(super) fn create(folder: &Path, first_step: u64) -> Result<Appender, RecordError> {
    let name = next_name(folder, wall_time() as u64);
    let name = name.map_err(|source| RecordError::Read { path: folder.to_owned(), source })?;
    let path = folder.join(name);
    let mut file = Appender::open(path.clone())?;
    let start = frame(&event(wall_time(), first_step, &session_start()));
    file.append(&[frame(&event(wall_time(), 0, &version())), start].concat()).inspect_err(|_| {
        // The next try takes another name.
        let _ = fs::remove_file(&path);
    })?;
    Ok(file)
}

/// A record as an event.
pub(super) fn event_of(record: &Record) -> Vec<u8> {
    frame(&event(wall_time(), record.step(), &summary(&scalars(record))))
}

/// Tags and values of a record in TensorBoard.
fn scalars(record: &Record) -> Vec<(&'static str, f32)> {
    match record {
        Record::Step(step) => vec![
            ("train/loss", step.loss),
            ("train/learning_rate", step.lr as f32),
            ("train/grad_norm", step.grad_norm),
            ("train/tokens_per_second", step.tokens_per_second as f32),
        ],
        Record::Eval(eval) => vec![("eval/loss", eval.loss as f32), ("eval/perplexity", eval.perplexity as f32)],
    }
}

/// Seconds since 1970.
fn wall_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64())
}

/// TensorBoard reads the files of a folder once, in the order of their names: a new one must come
/// last, even if the clock was set back.
fn next_name(folder: &Path, now: u64) -> io::Result<String> {
    let (mut count, mut seconds) = (0, now);
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        if let Some(rest) = name.to_string_lossy().strip_prefix(PREFIX) {
            let earlier: Option<u64> = rest.split('.').next().and_then(|n| n.parse().ok());
            seconds = seconds.max(earlier.map_or(0, |n| n.saturating_add(1)));
            count += 1;
        }
    }
    Ok(format!("{PREFIX}{seconds:010}.nf4pack.{count}"))
}

/// `uint64 length, uint32 masked crc of length, byte data[length], uint32 masked crc of data`.
fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    [&length, &masked_crc(&length)[..], data, &masked_crc(data)].concat()
}

fn masked_crc(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

/// `Event { double wall_time = 1; int64 step = 2; what }`.
fn event(wall_time: f64, step: u64, what: &[u8]) -> Vec<u8> {
    let mut bytes = vec![tag(1, FIXED64)];
    bytes.extend(wall_time.to_le_bytes());
    bytes.push(tag(2, VARINT));
    varint(&mut bytes, step);
    bytes.extend(what);
    bytes
}

/// `string file_version = 3`.
fn version() -> Vec<u8> {
    delimited(3, b"brain.Event:2")
}

/// `SessionLog session_log = 7 { SessionStatus status = 1 [START = 1] }`: replaces the events of
/// earlier files from the step of this event on.
fn session_start() -> Vec<u8> {
    delimited(7, &[tag(1, VARINT), 1])
}

/// `Summary summary = 5 { repeated Value value = 1 { string tag = 1; float simple_value = 2 } }`.
fn summary(scalars: &[(&str, f32)]) -> Vec<u8> {
    let value = |(name, x): &(&str, f32)| {
        let mut value = delimited(1, name.as_bytes());
        value.push(tag(2, FIXED32));
        value.extend(x.to_le_bytes());
        delimited(1, &value)
    };
    delimited(5, &scalars.iter().flat_map(value).collect::<Vec<_>>())
}

const VARINT: u8 = 0;
const FIXED64: u8 = 1;
const DELIMITED: u8 = 2;
const FIXED32: u8 = 5;

/// The key of a field of Protocol Buffers, for numbers below 16.
const fn tag(field: u8, wire_type: u8) -> u8 {
    field << 3 | wire_type
}

fn varint(to: &mut Vec<u8>, mut x: u64) {
    while x >= 0x80 {
        to.push(x as u8 | 0x80);
        x >>= 7;
    }
    to.push(x as u8);
}

fn delimited(field: u8, bytes: &[u8]) -> Vec<u8> {
    let mut to = vec![tag(field, DELIMITED)];
    varint(&mut to, bytes.len() as u64);
    to.extend(bytes);
    to
}

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs;
#[cfg(target_os = "linux")]
use std::fs::File;
#[cfg(target_os = "linux")]
use std::io::Write;

use super::*;

fn step(step: u64, loss: f32) -> Record {
    let (lr, grad_norm, seconds) = (2e-4, 0.5 + loss, step as f64 * 1.5);
    Record::Step(StepRecord {
        step,
        epoch: step as f64 / 8.0,
        loss,
        lr,
        grad_norm,
        clip: 1.0,
        loss_tokens: 300,
        tokens: 512,
        tokens_per_second: 341.25,
        gpu_bytes: 3 << 30,
        seconds,
    })
}

fn eval(step: u64, loss: f64) -> Record {
    Record::Eval(EvalRecord { step, loss, perplexity: 1.0 + loss, tokens: 99, seconds: 2.0 })
}

fn record_all(recorder: &mut Recorder, records: &[Record]) {
    for record in records {
        let errors = recorder.record(record);
        assert!(errors.is_empty(), "{errors:?}");
    }
}

fn metrics(folder: &Path) -> String {
    fs::read_to_string(folder.join(METRICS)).unwrap()
}

fn event_files(folder: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents."));
    files.sort();
    files
}

#[test]
fn what_is_recorded_is_read_again() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("new/run");
    let records = [eval(0, 3.25), step(1, 2.5), step(2, 0.1), eval(2, 0.3)];
    record_all(&mut Recorder::create(&folder), &records);
    assert_eq!(read_metrics(&folder.join(METRICS)).unwrap(), records);
    let line: serde_json::Value = serde_json::from_str(metrics(&folder).lines().nth(1).unwrap()).unwrap();
    assert_eq!((line["kind"].as_str(), line["step"].as_u64(), line["loss"].as_f64()), (Some("step"), Some(1), Some(2.5)));
    assert_eq!(line["tokens_per_second"].as_f64(), Some(341.25));
}

#[test]
fn every_record_is_in_the_files_at_once() {
    let root = tempfile::tempdir().unwrap();
    let mut recorder = Recorder::create(root.path());
    for n in 1..4 {
        record_all(&mut recorder, &[step(n, 1.0)]);
        assert_eq!(metrics(root.path()).lines().count() as u64, n);
        assert_eq!(decode(&event_files(root.path())[0]).len() as u64, n + 2);
    }
}

#[test]
fn numbers_that_are_none_are_null_and_read_as_nan() {
    let root = tempfile::tempdir().unwrap();
    let mut recorder = Recorder::create(root.path());
    record_all(&mut recorder, &[step(1, f32::NAN), step(2, f32::INFINITY), eval(2, f64::NEG_INFINITY), eval(3, 1e300)]);
    let line: serde_json::Value = serde_json::from_str(metrics(root.path()).lines().next().unwrap()).unwrap();
    assert!(line["loss"].is_null() && line["grad_norm"].is_null());
    let read = read_metrics(&root.path().join(METRICS)).unwrap();
    let losses = read.iter().map(|r| match r {
        Record::Step(r) => r.loss.into(),
        Record::Eval(r) => r.loss,
    });
    let found: Vec<f64> = losses.collect();
    assert!(found[..3].iter().all(|x| x.is_nan()) && found[3] == 1e300, "{found:?}");
    let events = decode(&event_files(root.path())[0]);
    assert!(events[2].scalars[0].1.is_nan());
    assert_eq!(events[4].scalars[0], ("eval/loss".to_owned(), f32::NEG_INFINITY));
}

#[test]
fn resuming_drops_what_came_later_and_half_a_line() {
    let root = tempfile::tempdir().unwrap();
    let records = [step(1, 3.0), step(2, 2.0), eval(2, 2.5), step(3, 1.0), eval(3, 1.5)];
    record_all(&mut Recorder::create(root.path()), &records);
    let kept: String = metrics(root.path()).split_inclusive('\n').take(3).collect();
    let path = root.path().join(METRICS);
    fs::write(&path, metrics(root.path()) + "{\"kind\":\"step\",\"st").unwrap();
    assert_eq!(read_metrics(&path).unwrap(), records, "half a line is no record");

    let (mut resumed, _) = Recorder::resume(root.path(), 2, false).unwrap();
    assert!(resumed.flush().is_empty());
    assert_eq!(metrics(root.path()), kept, "byte for byte");
    record_all(&mut resumed, &[step(3, 0.5)]);
    assert_eq!(read_metrics(&path).unwrap(), [records[0], records[1], records[2], step(3, 0.5)]);
    let others = fs::read_dir(root.path()).unwrap().count();
    assert_eq!(others, 3, "metrics and two event files, nothing temporary");
}

#[test]
fn a_whole_record_without_a_line_feed_is_kept() {
    let root = tempfile::tempdir().unwrap();
    record_all(&mut Recorder::create(root.path()), &[step(1, 3.0), step(2, 2.0)]);
    let path = root.path().join(METRICS);
    fs::write(&path, metrics(root.path()).trim_end()).unwrap();
    record_all(&mut Recorder::resume(root.path(), 2, false).unwrap().0, &[step(3, 1.0)]);
    assert_eq!(read_metrics(&path).unwrap(), [step(1, 3.0), step(2, 2.0), step(3, 1.0)]);
}

#[test]
fn resuming_without_records_begins_them() {
    let root = tempfile::tempdir().unwrap();
    record_all(&mut Recorder::resume(root.path(), 7, false).unwrap().0, &[step(8, 1.0)]);
    assert_eq!(read_metrics(&root.path().join(METRICS)).unwrap(), [step(8, 1.0)]);
}

#[test]
fn a_new_training_replaces_an_old_one() {
    let root = tempfile::tempdir().unwrap();
    record_all(&mut Recorder::create(root.path()), &[eval(0, 1.0), step(1, 3.0)]);
    record_all(&mut Recorder::create(root.path()), &[step(1, 2.0)]);
    assert_eq!(read_metrics(&root.path().join(METRICS)).unwrap(), [step(1, 2.0)]);
    let session = &decode(&event_files(root.path())[1])[1];
    assert_eq!((session.step, session.starts_session), (0, true), "from step 0 on, nothing older is shown");
}

#[test]
fn a_broken_line_is_named_and_nothing_is_changed() {
    let root = tempfile::tempdir().unwrap();
    record_all(&mut Recorder::create(root.path()), &[step(1, 3.0), step(2, 2.0)]);
    let path = root.path().join(METRICS);
    let broken = metrics(root.path()).replacen('\n', "\n{}\n", 1);
    fs::write(&path, &broken).unwrap();
    for error in [Recorder::resume(root.path(), 1, false).unwrap_err(), read_metrics(&path).unwrap_err()] {
        assert!(matches!(error, RecordError::Json { line: 2, .. }), "{error}");
    }
    assert_eq!(metrics(root.path()), broken);
}

#[test]
fn unwritten_records_are_reported_and_written_later() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("run");
    fs::write(&file, "precious").unwrap();
    let mut recorder = Recorder::create(&file);
    for n in 1..4 {
        assert_eq!(recorder.record(&step(n, 1.0)).len(), 2, "both files");
    }
    assert_eq!(recorder.missing(), [(METRICS, 3), ("TensorBoard's events", 3)]);
    assert_eq!(fs::read(&file).unwrap(), b"precious");
    assert!(matches!(read_metrics(&root.path().join("none")), Err(RecordError::Read { .. })));

    fs::remove_file(&file).unwrap();
    record_all(&mut recorder, &[eval(3, 2.0)]);
    let expected = [step(1, 1.0), step(2, 1.0), step(3, 1.0), eval(3, 2.0)];
    assert_eq!(read_metrics(&file.join(METRICS)).unwrap(), expected);
    let steps: Vec<u64> = decode(&event_files(&file)[0]).iter().skip(2).map(|event| event.step).collect();
    assert_eq!(steps, [1, 2, 3, 3]);
    assert!(recorder.missing().is_empty());
}

#[test]
fn a_resumed_training_keeps_what_it_could_not_read_at_first() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join(METRICS);
    fs::create_dir(&path).unwrap();
    fs::write(path.join("in the way"), "").unwrap();
    let (mut recorder, records) = Recorder::resume(root.path(), 2, false).unwrap();
    assert!(records.is_empty());
    let errors = recorder.record(&step(3, 1.0));
    assert!(matches!(errors[..], [RecordError::File(FileError::NotAFile { .. })]), "{errors:?}");
    fs::remove_dir_all(&path).unwrap();
    // A file from elsewhere, with a step after the one that the training resumes from.
    let line = |record: &Record| format!("{}\n", serde_json::to_string(record).unwrap());
    fs::write(&path, [step(1, 3.0), step(2, 2.0), step(3, 9.0)].iter().map(line).collect::<String>()).unwrap();
    assert!(recorder.flush().is_empty());
    assert_eq!(read_metrics(&path).unwrap(), [step(1, 3.0), step(2, 2.0), step(3, 1.0)]);
}

/// A device that is always full.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_and_the_file_has_no_part_of_a_record() {
    let root = tempfile::tempdir().unwrap();
    let mut recorder = Recorder::create(root.path());
    record_all(&mut recorder, &[step(1, 1.0)]);
    let full = File::options().write(true).open("/dev/full").unwrap();
    let good = std::mem::replace(&mut recorder.metrics.file.as_mut().unwrap().file, full);
    let errors = recorder.record(&step(2, 1.0));
    assert!(matches!(errors[..], [RecordError::Write { .. }]), "{errors:?}");
    let file = recorder.metrics.file.as_mut().unwrap();
    assert!(file.partial, "a device cannot be cut");
    file.file = good;
    // Some bytes of the record that failed.
    file.file.write_all(b"{\"kind\":").unwrap();
    record_all(&mut recorder, &[step(3, 1.0)]);
    assert_eq!(read_metrics(&root.path().join(METRICS)).unwrap(), [step(1, 1.0), step(2, 1.0), step(3, 1.0)]);
}

#[test]
fn tensorboard_gets_tags_steps_and_values() {
    let root = tempfile::tempdir().unwrap();
    record_all(&mut Recorder::create(root.path()), &[step(1, 2.5), step(300, 1.25), eval(300, 0.5)]);
    let events = decode(&event_files(root.path())[0]);
    assert_eq!(events[0].version.as_deref(), Some("brain.Event:2"));
    assert!(events[1].starts_session);
    let scalar = |tag: &str, value| (tag.to_owned(), value);
    let rates = [scalar("train/learning_rate", 2e-4), scalar("train/grad_norm", 3.0)];
    let speed = scalar("train/tokens_per_second", 341.25);
    assert_eq!(events[2].scalars, [[scalar("train/loss", 2.5)].as_slice(), &rates, &[speed]].concat());
    assert_eq!((events[2].step, events[3].step, events[4].step), (1, 300, 300));
    assert_eq!(events[4].scalars, [scalar("eval/loss", 0.5), scalar("eval/perplexity", 1.5)]);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!(events.iter().all(|e| (now - 60.0..=now).contains(&e.wall_time)), "{now}");
}

#[test]
fn a_later_event_file_has_a_later_name_and_voids_what_it_repeats() {
    let root = tempfile::tempdir().unwrap();
    let future = root.path().join("events.out.tfevents.9999999000.other.7");
    fs::write(&future, b"").unwrap();
    record_all(&mut Recorder::create(root.path()), &[step(1, 2.0)]);
    record_all(&mut Recorder::resume(root.path(), 41, false).unwrap().0, &[step(42, 2.0)]);
    let files = event_files(root.path());
    assert_eq!(files.len(), 3);
    assert_eq!(files[0], future, "sorts before the others");
    let last = decode(&files[2]);
    assert_eq!((last[1].step, last[1].starts_session, last[2].step), (42, true, 42));
}

/// The contents of an event.
#[derive(Debug, Default)]
struct Event {
    wall_time: f64,
    step: u64,
    version: Option<String>,
    starts_session: bool,
    scalars: Vec<(String, f32)>,
}

fn split<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let (first, rest) = bytes.split_first_chunk::<N>().unwrap();
    *bytes = rest;
    *first
}

/// The checksum by its definition: the reflected polynomial 0x82f63b78, bit by bit.
fn crc32c_bitwise(bytes: &[u8]) -> u32 {
    let shift = |crc: u32, _| crc >> 1 ^ (0x82f6_3b78 * (crc & 1));
    !bytes.iter().fold(!0, |crc, &b| (0..8).fold(crc ^ u32::from(b), shift))
}

fn checked_crc(bytes: &mut &[u8], of: &[u8]) {
    let crc = crc32c_bitwise(of);
    let masked = crc.rotate_right(15).wrapping_add(0xa282_ead8);
    assert_eq!(u32::from_le_bytes(split(bytes)), masked);
}

fn decode(path: &Path) -> Vec<Event> {
    let file = fs::read(path).unwrap();
    let mut rest = file.as_slice();
    let mut events = Vec::new();
    while !rest.is_empty() {
        let length: [u8; 8] = split(&mut rest);
        checked_crc(&mut rest, &length);
        let (data, after) = rest.split_at(u64::from_le_bytes(length) as usize);
        rest = after;
        checked_crc(&mut rest, data);
        events.push(decode_event(data));
    }
    events
}

/// A value of a field: a number, or the bits of one, or bytes.
enum Value<'a> {
    Bits(u64),
    Bytes(&'a [u8]),
}

fn decode_varint(bytes: &mut &[u8]) -> u64 {
    let mut x = 0;
    for shift in (0..64).step_by(7) {
        let [byte] = split(bytes);
        x |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
    }
    x
}

fn fields(mut bytes: &[u8]) -> Vec<(u64, Value<'_>)> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let key = decode_varint(&mut bytes);
        let value = match key & 7 {
            0 => Value::Bits(decode_varint(&mut bytes)),
            1 => Value::Bits(u64::from_le_bytes(split(&mut bytes))),
            2 => {
                let length = decode_varint(&mut bytes) as usize;
                let (inside, rest) = bytes.split_at(length);
                bytes = rest;
                Value::Bytes(inside)
            }
            5 => Value::Bits(u32::from_le_bytes(split(&mut bytes)).into()),
            other => panic!("wire type {other}"),
        };
        fields.push((key >> 3, value));
    }
    fields
}

fn decode_event(data: &[u8]) -> Event {
    let mut event = Event::default();
    for field in fields(data) {
        match field {
            (1, Value::Bits(bits)) => event.wall_time = f64::from_bits(bits),
            (2, Value::Bits(step)) => event.step = step,
            (3, Value::Bytes(text)) => event.version = Some(String::from_utf8(text.to_vec()).unwrap()),
            (5, Value::Bytes(summary)) => event.scalars = fields(summary).into_iter().map(decode_scalar).collect(),
            (7, Value::Bytes(log)) => event.starts_session = matches!(fields(log)[..], [(1, Value::Bits(1))]),
            (number, _) => panic!("field {number}"),
        }
    }
    event
}

fn decode_scalar(field: (u64, Value<'_>)) -> (String, f32) {
    let (1, Value::Bytes(value)) = field else { panic!("field {}", field.0) };
    match fields(value)[..] {
        [(1, Value::Bytes(tag)), (2, Value::Bits(bits))] => {
            (String::from_utf8(tag.to_vec()).unwrap(), f32::from_bits(bits as u32))
        }
        _ => panic!("not a scalar"),
    }
}

#[test]
fn the_checksum_has_its_known_answers() {
    for (bytes, crc) in [
        // RFC 3720, B.4; the last is the check value of the catalogue of CRCs.
        ([0; 32].as_slice(), 0x8a91_36aa_u32),
        (&[0xff; 32], 0x62a8_ab43),
        (&std::array::from_fn::<u8, 32, _>(|i| i as u8), 0x46dd_794e),
        (b"123456789", 0xe306_9283),
    ] {
        assert_eq!((crc32c::crc32c(bytes), crc32c_bitwise(bytes)), (crc, crc));
    }
}

//! Interrupted conversions that keep their finished part, and continue from it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs::{self, File};
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nf4pack::convert::encode::Encoder;
use nf4pack::convert::{ConvertError, Kept, Options, Progress, Report, convert, synth};
use nf4pack::format::nf4::ScaleType;
use tempfile::TempDir;

use crate::conversion::{SHAPE, names_in};

/// Asks to stop at one of its questions.
struct StopAt(AtomicU32);

impl StopAt {
    fn new(question: u32) -> Self {
        Self(AtomicU32::new(question))
    }
}

impl Progress for StopAt {
    fn cancelled(&self) -> bool {
        // It stays at zero.
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(1))) == Ok(0)
    }
}

struct Place {
    folder: TempDir,
}

impl Place {
    fn new(shape: &synth::Shape, shard_len: Option<u64>) -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        synth::write(&place.path("model"), shape, 7, shard_len, &()).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn convert(&self, options: &Options, stop: u32) -> Result<Report, ConvertError> {
        convert(&self.path("model"), &self.path("out.nf4pack"), options.clone(), &StopAt::new(stop))
    }

    fn names(&self) -> Vec<String> {
        names_in(self.folder.path())
    }
}

const PARTIAL: &str = ".out.nf4pack-partial";
const NEVER: u32 = u32::MAX;

/// With the faster encoder: the other is slow without optimisation.
fn resuming(threads: usize) -> Options {
    Options { encoder: Encoder::Absmax, resume: true, threads: NonZeroUsize::new(threads), ..Options::default() }
}

/// The report as JSON, without times and what was kept.
fn numbers(report: &Report) -> serde_json::Value {
    let mut value = serde_json::to_value(report).unwrap();
    for key in ["seconds", "weights_per_second", "kept"] {
        value.as_object_mut().unwrap().remove(key);
    }
    value
}

/// Stops at each question and continues; the pack and the report are those of one run. Returns the
/// number of runs that kept a part.
fn stop_everywhere(place: &Place, options: &Options) -> u32 {
    let reference = convert(&place.path("model"), &place.path("whole"), Options { resume: false, ..options.clone() }, &());
    let (reference, whole) = (reference.unwrap(), fs::read(place.path("whole")).unwrap());
    fs::remove_file(place.path("whole")).unwrap();
    let mut kept = 0;
    for stop in 0.. {
        match place.convert(options, stop) {
            Err(ConvertError::Cancelled) => {}
            Ok(_) => break,
            Err(error) => panic!("{error}"),
        }
        assert!(!place.path("out.nf4pack").exists());
        let report = place.convert(&Options { threads: NonZeroUsize::new(3), ..options.clone() }, NEVER).unwrap();
        assert_eq!(numbers(&report), numbers(&reference), "stopped at {stop}");
        assert!(fs::read(place.path("out.nf4pack")).unwrap() == whole, "stopped at {stop}");
        kept += u32::from(report.kept.is_some_and(|kept| kept.weights > 0));
        assert_eq!(place.names(), ["model", "out.nf4pack"]);
        fs::remove_file(place.path("out.nf4pack")).unwrap();
    }
    fs::remove_file(place.path("out.nf4pack")).unwrap();
    kept
}

#[test]
fn stopped_anywhere_it_continues_to_the_same_bytes_and_numbers() {
    let place = Place::new(&SHAPE, Some(20_000));
    for (encoder, scale_type) in
        [(Encoder::Mse, ScaleType::Bf16), (Encoder::Mse, ScaleType::Dq8), (Encoder::Absmax, ScaleType::F32)]
    {
        let kept = stop_everywhere(&place, &Options { encoder, scale_type, ..resuming(1) });
        assert!(kept >= 3, "{scale_type:?}: {kept} kept a part");
    }
}

#[test]
fn stopped_within_a_file_it_continues_within_it() {
    // Some windows of 4 MiB.
    let place = Place::new(&synth::Shape { hidden: 512, intermediate: 1536, head_dim: 128, ..SHAPE }, None);
    let kept = stop_everywhere(&place, &resuming(1));
    assert!(kept >= 1, "none kept a part");
}

/// A place with the finished part of a conversion.
fn interrupted() -> Place {
    let place = Place::new(&SHAPE, Some(20_000));
    assert!(matches!(place.convert(&resuming(1), 4), Err(ConvertError::Cancelled)));
    assert_eq!(place.names(), [PARTIAL, "model"]);
    place
}

fn patch(path: &Path, offset: u64) {
    let mut bytes = fs::read(path).unwrap();
    bytes[offset as usize] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn without_resume_nothing_is_kept_and_a_part_is_not_touched() {
    let place = Place::new(&SHAPE, Some(20_000));
    assert!(matches!(place.convert(&Options::default(), 4), Err(ConvertError::Cancelled)));
    assert_eq!(place.names(), ["model"]);
    let place = interrupted();
    let before = fs::read(place.path(PARTIAL)).unwrap();
    place.convert(&Options::default(), NEVER).unwrap();
    assert_eq!(fs::read(place.path(PARTIAL)).unwrap(), before);
}

#[test]
fn a_part_of_another_conversion_is_refused_and_stays() {
    let place = interrupted();
    for other in [
        Options { scale_type: ScaleType::Dq8, ..resuming(1) },
        Options { encoder: Encoder::Mse, ..resuming(1) },
        Options { block_size: 128, ..resuming(1) },
    ] {
        let error = place.convert(&other, NEVER).unwrap_err();
        assert!(matches!(&error, ConvertError::PartialDiffers { path } if path.ends_with(PARTIAL)), "{error}");
    }
    let report = place.convert(&resuming(1), NEVER).unwrap();
    assert!(report.kept.is_some_and(|kept| kept.weights > 0 && !kept.damaged), "{:?}", report.kept);
}

#[test]
fn a_source_that_changed_is_named() {
    let place = interrupted();
    let mut shards: Vec<_> = fs::read_dir(place.path("model"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .filter(|p| p.to_string_lossy().contains("-of-"))
        .collect();
    shards.sort();
    let last = fs::metadata(&shards[0]).unwrap().len() - 2;
    patch(&shards[0], last);
    let error = place.convert(&resuming(1), NEVER).unwrap_err();
    assert!(matches!(&error, ConvertError::PartialSource { file, .. } if *file == shards[0]), "{error}");
    patch(&shards[0], last);
    place.convert(&resuming(1), NEVER).unwrap();
}

#[test]
fn a_damaged_part_is_noticed_and_the_conversion_begins_again() {
    let place = interrupted();
    let whole = {
        convert(&place.path("model"), &place.path("whole"), Options { resume: false, ..resuming(1) }, &()).unwrap();
        fs::read(place.path("whole")).unwrap()
    };
    let part = fs::read(place.path(PARTIAL)).unwrap();
    // Bytes of the front, of padding, of tensors, of the records and of the trailer.
    let (mut damaged, mut kept) = (0, 0);
    for at in (0..part.len() as u64).step_by(whole.len() / 40) {
        fs::write(place.path(PARTIAL), &part).unwrap();
        patch(&place.path(PARTIAL), at);
        let report = place.convert(&resuming(1), NEVER).unwrap();
        assert!(fs::read(place.path("out.nf4pack")).unwrap() == whole, "damaged at {at}");
        fs::remove_file(place.path("out.nf4pack")).unwrap();
        match report.kept {
            Some(Kept { damaged: true, .. }) => damaged += 1,
            Some(_) => kept += 1,
            None => {}
        }
    }
    assert!(damaged > 0 && kept > 0, "{damaged} damaged, {kept} kept");
    for len in [0, 10, part.len() - 1] {
        fs::write(place.path(PARTIAL), &part[..len]).unwrap();
        place.convert(&resuming(1), NEVER).unwrap();
        assert!(fs::read(place.path("out.nf4pack")).unwrap() == whole, "{len} bytes");
        fs::remove_file(place.path("out.nf4pack")).unwrap();
    }
}

#[test]
fn a_part_in_use_is_not_touched() {
    let place = interrupted();
    let file = File::open(place.path(PARTIAL)).unwrap();
    file.lock().unwrap();
    let error = place.convert(&resuming(1), NEVER).unwrap_err();
    assert!(matches!(&error, ConvertError::PartialInUse { path } if path.ends_with(PARTIAL)), "{error}");
    drop(file);
    place.convert(&resuming(1), NEVER).unwrap();
}

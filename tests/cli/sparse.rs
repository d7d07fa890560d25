//! A pack of a terabyte, as a sparse file: it is opened, walked and inspected at once, and counts,
//! offsets and indices past 2^32 elements, 4 GiB and 256 GiB are right.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use crate::common::program::{command, failure, json};

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nf4pack::convert::Progress;
use nf4pack::dequant::dequantize;
use nf4pack::dequant::stream::{Globals, StreamError, StreamPlan};
use nf4pack::format::nf4::{CODEBOOK, ScaleType};
use nf4pack::format::{Entry, FloatType, Layout, Role, SectionKind, Shape, Storage, crc32};
use nf4pack::verify::{VerifyError, verify};
use nf4pack::{MappedPack, PackSource, ReadError};
use tempfile::TempDir;

const PACK: &str = "sparse.nf4pack";
const LAYERS: u32 = 4;
/// Weights of the matrix of each layer: its codes take 256 GiB.
const WEIGHTS: u64 = 1 << 39;
const NORM: [u8; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];

fn entry(name: &str, role: Role, layer: Option<u32>, dims: &[u64], storage: Storage) -> Entry {
    Entry { name: name.to_owned(), role, layer, expert: None, shape: Shape::new(dims).unwrap(), storage }
}

/// Four layers of a matrix and a norm. Only the norms and the last weights of the last matrix are
/// written; all else is a hole, which reads as zeros.
fn place() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let nf4 = Storage::Nf4 { scale_type: ScaleType::Bf16, block_size: 64 };
    let of_layer = |layer: u32| {
        let norm = entry(&format!("norm.{layer}"), Role::InputNorm, Some(layer), &[8], Storage::Raw(FloatType::Bf16));
        [norm, entry(&format!("up.{layer}"), Role::UpProj, Some(layer), &[1 << 19, 1 << 20], nf4)]
    };
    let layout = Layout::new((0..LAYERS).flat_map(of_layer).collect(), LAYERS, 2).unwrap();
    assert!(layout.file_len() > 1 << 40);
    let file = File::create(folder.path().join(PACK)).unwrap();
    file.set_len(layout.file_len()).unwrap();
    let sections = layout.sections();
    let crcs: Vec<u32> = sections.iter().map(|s| if s.kind == Some(SectionKind::Raw) { crc32(&NORM) } else { 0 }).collect();
    file.write_all_at(&layout.front(&crcs, 0, "{}").unwrap(), 0).unwrap();
    let norms = sections.iter().filter(|s| s.kind == Some(SectionKind::Raw));
    norms.for_each(|norm| file.write_all_at(&NORM, norm.offset).unwrap());
    let [.., codes, scales] = sections else { unreachable!("more than two sections") };
    file.write_all_at(&[0xf0], codes.end() - 1).unwrap();
    file.write_all_at(&[0x80, 0x3f], scales.end() - 2).unwrap();
    folder
}

#[test]
fn a_pack_of_a_terabyte_is_opened_walked_and_decoded_at_its_end() {
    let place = place();
    let path = place.path().join(PACK);
    let source = PackSource::open(&path).unwrap();
    let index = source.index();
    assert_eq!(index.tensors().count(), 2 * LAYERS as usize);
    let weights: u64 = index.tensors().map(|(_, section)| section.shape.elements()).sum();
    assert_eq!(weights, u64::from(LAYERS) * (WEIGHTS + 8));
    assert!(index.layer_range(3).unwrap().start > 3 << 38);
    assert_eq!(index.layer_range(3).unwrap().end, index.header().file_len);
    assert_eq!(index.layer_range(4), None);

    // SAFETY: nothing changes the file.
    let mapped = unsafe { MappedPack::open(&path) }.unwrap();
    let pack = mapped.pack();
    for layer in pack.layers() {
        assert_eq!(layer.quantized_tensors().map(|tensor| tensor.data.elements).collect::<Vec<_>>(), [WEIGHTS]);
        assert!(layer.raw_tensors().all(|norm| norm.bytes == NORM));
        assert_eq!(layer.bytes().len() as u64, layer.file_range().end - layer.file_range().start);
    }
    let last = pack.quantized_tensor("up.3").unwrap();
    let mut out = [f32::NAN; 72];
    dequantize(&last.data, WEIGHTS - 72, &mut out).unwrap();
    assert_eq!(out[..70], [&[0.0 * CODEBOOK[0]; 8][..], &[CODEBOOK[0]; 62]].concat());
    assert_eq!(out[70..], [CODEBOOK[0], CODEBOOK[15]]);
    assert!(dequantize(&last.data, WEIGHTS - 71, &mut out).is_err());
    assert!(dequantize(&last.data, u64::MAX, &mut out).is_err());
}

#[test]
fn plans_count_a_terabyte_without_a_device() {
    let place = place();
    let source = PackSource::open(place.path().join(PACK)).unwrap();
    let plan = StreamPlan::new(source.index(), 1 << 40, None, Globals::All).unwrap();
    assert!(plan.resident && plan.weights_bytes > 1 << 40 && plan.layer_bytes > 1 << 38);
    // The largest buffers of devices: codes are cut, a table of scales cannot be.
    assert!(matches!(StreamPlan::new(source.index(), 1 << 31, None, Globals::All), Err(StreamError::Gpu(_))));
    let small = StreamPlan::new(source.index(), 1 << 40, Some(24 << 30), Globals::All).unwrap_err();
    assert!(matches!(small, StreamError::Budget { needed, .. } if needed > 1 << 39), "{small}");
}

#[test]
fn the_program_inspects_a_terabyte_and_says_what_it_lacks() {
    let place = place();
    let folder = place.path();
    let document = json(folder, &["inspect", PACK, "--tensors"]);
    assert_eq!((&document["layers"], &document["sizes"]["codes"]), (&LAYERS.into(), &(u64::from(LAYERS) << 38).into()));
    let offset = document["tensors"][7]["offset"].as_u64().unwrap();
    assert!(offset > 3 << 38, "{offset}");
    let layer = json(folder, &["inspect", PACK, "--layer", "3"]);
    assert!(layer["layer"]["bytes"].as_u64().unwrap() > 1 << 38);
    command(folder, &["inspect", PACK]).assert().success();

    let needed = (2 * u64::from(LAYERS) * (WEIGHTS + 8)).to_string();
    failure(folder, &["export", PACK, "out", "--no-verify"]).assert("no-space", &[&needed], &["free"]);
    failure(folder, &["generate", PACK, "--prompt", "a"]).assert("pack-missing-file", &["config.json"], &[]);
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 1);
}

/// Stops after some bytes, and may cut the file then.
struct After<'a> {
    bytes: u64,
    cut: Option<&'a Path>,
    stop: std::sync::atomic::AtomicBool,
}

impl<'a> After<'a> {
    fn new(bytes: u64, cut: Option<&'a Path>) -> Self {
        Self { bytes, cut, stop: false.into() }
    }
}

impl Progress for After<'_> {
    fn advance(&self, done: u64, _: u64) {
        if done < self.bytes {
            return;
        }
        match self.cut {
            Some(path) => File::options().write(true).open(path).unwrap().set_len(1 << 20).unwrap(),
            None => self.stop.store(true, std::sync::atomic::Ordering::Relaxed),
        }
    }

    fn cancelled(&self) -> bool {
        self.stop.load(std::sync::atomic::Ordering::Relaxed)
    }
}

#[test]
fn verify_of_a_terabyte_can_be_stopped_and_notices_that_the_file_shrinks() {
    let place = place();
    let path = place.path().join(PACK);
    let source = PackSource::open(&path).unwrap();
    let stopped = verify(&source, 2, &After::new(8 << 20, None)).unwrap_err();
    assert!(matches!(stopped, VerifyError::Cancelled), "{stopped}");
    let cut = verify(&source, 2, &After::new(8 << 20, Some(&path))).unwrap_err();
    let expected = source.index().header().file_len;
    assert!(
        matches!(cut, VerifyError::Read(ReadError::Truncated { expected: e, found, .. }) if e == expected && found == 1 << 20),
        "{cut}"
    );
    assert!(cut.to_string().contains(&format!("1048576 of {expected} bytes")), "{cut}");
}

//! Tests streamed layers against the same layers decoded on the CPU: every element, in every order
//! and with every budget.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use nf4pack::convert::encode::Encoder;
use nf4pack::convert::{Options, convert, synth};
use nf4pack::dequant::stream::{
    Direction, Globals, LayerStream, PackSource, StreamError, StreamOptions, StreamPlan, StreamedLayer,
};
use nf4pack::dequant::{DequantError, Dequantizer, Output, dequantize};
use nf4pack::format::nf4::ScaleType;
use nf4pack::format::{FormatError, Pack, SectionKind};
use nf4pack::gpu::{Gpu, GpuError};
use nf4pack::{MappedPack, ReadError};
use tempfile::TempDir;

use Direction::{Backward, Forward};

/// The shared device and its decoder. The kernels are compiled and tested once.
fn device() -> Option<(Gpu, &'static Dequantizer)> {
    static KERNELS: OnceLock<Dequantizer> = OnceLock::new();
    let gpu = common::gpu()?;
    let kernels = KERNELS.get_or_init(|| Dequantizer::new(&gpu).unwrap());
    Some((gpu, kernels))
}

/// A pack and its folder.
struct TestPack {
    _folder: TempDir,
    path: PathBuf,
}

fn pack_of(source: &Path, scale_type: ScaleType) -> TestPack {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.nf4pack");
    let options = Options { encoder: Encoder::Absmax, scale_type, ..Options::default() };
    convert(source, &path, options, &()).unwrap();
    TestPack { _folder: folder, path }
}

/// Four layers of a Qwen3 with odd sizes.
fn small_pack(scale_type: ScaleType) -> TestPack {
    synthetic_pack(72, 200, scale_type)
}

fn synthetic_pack(hidden: u64, intermediate: u64, scale_type: ScaleType) -> TestPack {
    let folder = tempfile::tempdir().unwrap();
    let shape = synth::Shape {
        hidden,
        intermediate,
        layers: 4,
        heads: 2,
        kv_heads: 1,
        head_dim: 36,
        vocabulary: 90,
        tied: false,
        q_k_norm: true,
    };
    synth::write(&folder.path().join("model"), &shape, 3, None, &()).unwrap();
    pack_of(&folder.path().join("model"), scale_type)
}

/// The tensors of a pack by name: quantised tensors as decoded by the CPU, raw tensors as stored in
/// the file.
fn decoded(pack: Pack<'_>) -> HashMap<String, Vec<u8>> {
    let floats = pack.quantized_tensors().map(|p| {
        let mut out = vec![f32::NAN; p.data.elements as usize];
        dequantize(&p.data, 0, &mut out).unwrap();
        (p.name.to_owned(), out.iter().flat_map(|x| x.to_le_bytes()).collect())
    });
    floats.chain(pack.raw_tensors().map(|t| (t.name.to_owned(), t.bytes.to_vec()))).collect()
}

/// The number of tensors of a layer that equal the CPU bit for bit.
fn compare(gpu: &Gpu, kernels: &Dequantizer, layer: &StreamedLayer, expected: &HashMap<String, Vec<u8>>) -> usize {
    for projection in &layer.quantized_tensors {
        let found = kernels.read(&projection.weights, 0..projection.weights.elements, Output::F32).unwrap();
        assert!(found == expected[&projection.name], "{} differs", projection.name);
    }
    for tensor in &layer.raw_tensors {
        let part = |part| {
            let mut range = nf4pack::gpu::BufferRange::clone(part);
            let size = range.size as usize;
            range.size = range.size.next_multiple_of(4);
            gpu.read(&range).unwrap()[..size].to_vec()
        };
        let found: Vec<u8> = tensor.parts.iter().flat_map(part).collect();
        assert!(found == expected[&tensor.name], "{} differs", tensor.name);
    }
    layer.quantized_tensors.len() + layer.raw_tensors.len()
}

/// The budget of the smallest plan, a ring of two layers.
fn ring_of_two(gpu: &Gpu, path: &Path) -> Option<u64> {
    let pack = MappedPack::read(path).unwrap();
    let plan = StreamPlan::new(pack.pack().index(), gpu.limits().max_buffer_size, None, Globals::None).unwrap();
    Some(plan.minimum_bytes)
}

/// The pack as a mapped or read source.
fn source(path: &Path, map: bool) -> Result<PackSource, StreamError> {
    if !map {
        return Ok(PackSource::open(path)?);
    }
    // SAFETY: only the test changes its pack, between two uses. A truncated file gives an error or
    // kills the test.
    Ok(PackSource::of_mapped(path, unsafe { MappedPack::open(path) }.map_err(ReadError::from)?))
}

fn stream_and_compare(gpu: &Gpu, kernels: &Dequantizer, path: &Path, options: &StreamOptions) -> StreamPlan {
    stream_and_compare_of(gpu, kernels, path, false, options)
}

/// Streams forward and backward, twice, and compares everything each time.
fn stream_and_compare_of(gpu: &Gpu, kernels: &Dequantizer, path: &Path, map: bool, options: &StreamOptions) -> StreamPlan {
    let mapped = MappedPack::read(path).unwrap();
    let expected = decoded(mapped.pack());
    let mut stream = LayerStream::of(gpu, source(path, map).unwrap(), options).unwrap();
    let layers = stream.layer_count();
    let mut compared = 0;
    for _ in 0..2 {
        for number in 0..layers {
            compared += compare(gpu, kernels, stream.layer(number, Forward).unwrap(), &expected);
        }
        for number in (0..layers).rev() {
            compared += compare(gpu, kernels, stream.layer(number, Backward).unwrap(), &expected);
        }
    }
    let of_layers = |s: &&nf4pack::format::Section| s.layer.is_some() && s.kind != Some(SectionKind::Scales);
    let tensors = mapped.pack().index().sections().iter().filter(of_layers).count();
    assert_eq!(compared, 4 * tensors);
    if options.globals != Globals::None {
        let globals = stream.globals().unwrap().unwrap();
        assert_eq!(compare(gpu, kernels, globals, &expected), expected.len() - tensors);
    }
    stream.plan().clone()
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-qwen3")
}

#[test]
fn tiny_qwen3_resident_and_in_a_ring_of_two() {
    let Some((gpu, kernels)) = device() else { return };
    let pack = pack_of(&fixture(), ScaleType::Bf16);
    let plan = stream_and_compare(&gpu, kernels, &pack.path, &StreamOptions { globals: Globals::All, ..Default::default() });
    assert!(plan.resident);
    let budget = ring_of_two(&gpu, &pack.path);
    let plan = stream_and_compare(&gpu, kernels, &pack.path, &StreamOptions { budget, ..Default::default() });
    assert_eq!((plan.resident, plan.slots), (false, 2));
}

/// A larger trained model, if `../shared` has it.
#[test]
fn small_qwen3_resident_and_in_a_ring_of_two() {
    let Some((gpu, kernels)) = device() else { return };
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/models/small-qwen3");
    if !source.is_dir() {
        eprintln!("SKIPPED: {} does not exist", source.display());
        return;
    }
    let pack = pack_of(&source, ScaleType::F32);
    assert!(stream_and_compare(&gpu, kernels, &pack.path, &StreamOptions::default()).resident);
    let budget = ring_of_two(&gpu, &pack.path);
    assert_eq!(stream_and_compare(&gpu, kernels, &pack.path, &StreamOptions { budget, ..Default::default() }).slots, 2);
}

#[test]
fn every_kind_of_scales_and_every_way_to_read() {
    let Some((gpu, kernels)) = device() else { return };
    // Every way to read, resident and in a ring, over two of the scale types; every scale type in
    // every way to read.
    for (i, scale_type) in [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8].into_iter().enumerate() {
        let pack = small_pack(scale_type);
        let ways = [(false, true, 1), (true, true, 3), (false, false, 2), (true, false, 1)];
        for (j, (verify, map, threads)) in ways.into_iter().enumerate() {
            let budget = ring_of_two(&gpu, &pack.path).filter(|_| (i + j) % 2 == 1);
            let options = StreamOptions {
                budget,
                globals: if budget.is_none() { Globals::All } else { Globals::None },
                verify,
                threads,
            };
            stream_and_compare_of(&gpu, kernels, &pack.path, map, &options);
        }
    }
}

#[test]
fn layers_are_cut_where_buffers_and_bindings_are_small() {
    let small = |options: &mut nf4pack::gpu::Options| {
        options.max_buffer = Some(120 << 10);
        options.max_binding = Some(30 << 10);
    };
    let Some(gpu) = common::gpu_with(small) else { return };
    let pack = synthetic_pack(510, 1110, ScaleType::F32);
    let mut stream = LayerStream::open(&gpu, &pack.path, &StreamOptions::default()).unwrap();
    let layer = stream.layer(0, Forward).unwrap();
    assert!(layer.quantized_tensors.iter().any(|p| p.weights.codes.len() == 3));
    drop(stream);
    stream_and_compare(
        &gpu,
        &Dequantizer::new(&gpu).unwrap(),
        &pack.path,
        &StreamOptions { globals: Globals::All, ..Default::default() },
    );
}

#[test]
fn layers_in_any_order_out_of_a_small_ring() {
    let Some((gpu, kernels)) = device() else { return };
    let pack = small_pack(ScaleType::Bf16);
    let mapped = MappedPack::read(&pack.path).unwrap();
    let expected = decoded(mapped.pack());
    let min = ring_of_two(&gpu, &pack.path).unwrap();
    let mut stream =
        LayerStream::open(&gpu, &pack.path, &StreamOptions { budget: Some(min), ..Default::default() }).unwrap();
    let mut random = 12345_u32;
    for _ in 0..60 {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let number = (random >> 16) % stream.layer_count();
        let direction = if random & (1 << 15) == 0 { Forward } else { Backward };
        let layer = stream.layer(number, direction).unwrap();
        assert_eq!(layer.number, Some(number));
        assert!(compare(&gpu, kernels, layer, &expected) > 7);
    }
}

/// A layer may be cloned and kept. Work with it is refused after its slot was given to another
/// layer.
#[test]
fn work_with_a_layer_whose_slot_was_given_away_is_refused() {
    let Some((gpu, kernels)) = device() else { return };
    let pack = small_pack(ScaleType::Bf16);
    for (budget, resident) in [(ring_of_two(&gpu, &pack.path), false), (None, true)] {
        let options = StreamOptions { budget, ..Default::default() };
        let mut stream = LayerStream::open(&gpu, &pack.path, &options).unwrap();
        assert_eq!(stream.plan().resident, resident);
        let kept = stream.layer(0, Forward).unwrap().clone();
        let codes = kept.quantized_tensors[0].weights.codes[0].clone();
        let range = nf4pack::gpu::BufferRange { size: 256, ..codes };
        let out = nf4pack::gpu::BufferRange::whole(gpu.storage("out", 256).unwrap());
        let recorded = || {
            let mut commands = gpu.commands("kept");
            commands.copy(&range, &out);
            commands
        };
        let (early, late, timed) = (recorded(), recorded(), recorded());
        early.submit().unwrap();
        let expected = gpu.read(&out).unwrap();
        // In a ring of two, layer 2 is prefetched into the slot of layer 0.
        stream.layer(1, Forward).unwrap();
        let decoded = kernels.read(&kept.quantized_tensors[0].weights, 0..8, Output::F32);
        if resident {
            late.submit().unwrap();
            timed.submit_timed().unwrap();
            assert_eq!(gpu.read(&range).unwrap(), expected);
            decoded.unwrap();
        } else {
            assert!(matches!(late.submit(), Err(GpuError::Overwritten { .. })));
            assert!(matches!(timed.submit_timed(), Err(GpuError::Overwritten { .. })));
            assert!(matches!(gpu.read(&range), Err(GpuError::Overwritten { .. })));
            assert!(matches!(decoded, Err(DequantError::Gpu(GpuError::Overwritten { .. }))));
            assert!(matches!(recorded().submit(), Err(GpuError::Overwritten { .. })), "late recording");
            // A new request for the same layer has a new lease.
            let again = stream.layer(0, Forward).unwrap().quantized_tensors[0].weights.codes[0].clone();
            let again = gpu.read(&nf4pack::gpu::BufferRange { size: 256, ..again }).unwrap();
            assert_eq!(again, expected);
            assert!(matches!(gpu.read(&range), Err(GpuError::Overwritten { .. })));
        }
    }
}

#[test]
fn a_layer_past_the_end_and_a_budget_too_small_are_errors() {
    let Some(gpu) = common::gpu() else { return };
    let pack = small_pack(ScaleType::Bf16);
    let mut stream = LayerStream::open(&gpu, &pack.path, &StreamOptions::default()).unwrap();
    let error = stream.layer(4, Forward).unwrap_err();
    assert!(matches!(error, StreamError::OutOfRange { layer: 4, count: 4 }), "{error}");
    let min = ring_of_two(&gpu, &pack.path).unwrap();
    let options = StreamOptions { budget: Some(min - 1), ..Default::default() };
    let error = LayerStream::open(&gpu, &pack.path, &options).unwrap_err();
    assert!(matches!(error, StreamError::Budget { needed, .. } if needed == min), "{error}");
    assert!(error.to_string().contains(&min.to_string()));
}

/// A file that is truncated before all layers are loaded gives an error, mapped or read.
#[test]
fn a_file_that_is_cut_under_the_reader_is_an_error() {
    let Some(gpu) = common::gpu() else { return };
    for map in [true, false] {
        let pack = pack_of(&fixture(), ScaleType::Bf16);
        let last = MappedPack::read(&pack.path).unwrap().layer(3).unwrap().file_range();
        let options = StreamOptions { budget: ring_of_two(&gpu, &pack.path), ..Default::default() };
        let mut stream = LayerStream::of(&gpu, source(&pack.path, map).unwrap(), &options).unwrap();
        stream.layer(0, Backward).unwrap();
        OpenOptions::new().write(true).open(&pack.path).unwrap().set_len(last.start + 100).unwrap();
        let error = stream.layer(3, Backward).unwrap_err();
        assert!(
            matches!(error, StreamError::Read(ReadError::Truncated { found, .. }) if found == last.start + 100),
            "map {map}: {error}"
        );
        // The loader still runs and returns the error again.
        assert!(matches!(stream.layer(3, Backward), Err(StreamError::Read(ReadError::Truncated { .. }))));
    }
}

/// Overwrites one byte of a file.
fn damage(path: &Path, offset: u64, byte: u8) {
    let mut file: File = OpenOptions::new().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(&[byte]).unwrap();
}

#[test]
fn damaged_codes_are_found_by_default_and_in_every_load() {
    let Some(gpu) = common::gpu() else { return };
    let pack = small_pack(ScaleType::Bf16);
    let mapped = MappedPack::read(&pack.path).unwrap();
    let sections = mapped.pack().index().sections();
    let codes = sections.iter().find(|s| s.layer == Some(2) && s.kind == Some(SectionKind::Codes)).unwrap().clone();
    let found = mapped.pack().payload(&codes)[40];
    drop(mapped);
    damage(&pack.path, codes.offset + 40, !found);
    for (map, verify) in [(true, true), (true, false), (false, true), (false, false)] {
        let options = StreamOptions { verify, ..Default::default() };
        let mut stream = LayerStream::of(&gpu, source(&pack.path, map).unwrap(), &options).unwrap();
        stream.layer(1, Forward).unwrap();
        let error = stream.layer(2, Forward).unwrap_err();
        let StreamError::Read(ReadError::Damaged { source: FormatError::PayloadChecksum { offset, .. }, .. }) = error else {
            panic!("{error}")
        };
        assert_eq!(offset, codes.offset);
        stream.layer(3, Forward).unwrap();
        let unverified = source(&pack.path, map).unwrap().unverified();
        let mut stream = LayerStream::of(&gpu, unverified, &StreamOptions::default()).unwrap();
        stream.layer(2, Forward).unwrap();
    }
}

/// A ring loads a layer again and again: only the first load checks it, unless every load should.
#[test]
fn a_ring_checks_a_layer_once_or_in_every_load() {
    let Some(gpu) = common::gpu() else { return };
    for verify in [false, true] {
        let pack = small_pack(ScaleType::Bf16);
        let mapped = MappedPack::read(&pack.path).unwrap();
        let sections = mapped.pack().index().sections();
        let codes = sections.iter().find(|s| s.layer == Some(0) && s.kind == Some(SectionKind::Codes)).unwrap().clone();
        let found = mapped.pack().payload(&codes)[40];
        let options = StreamOptions { verify, budget: ring_of_two(&gpu, &pack.path), ..Default::default() };
        let mut stream = LayerStream::open(&gpu, &pack.path, &options).unwrap();
        (0..4).for_each(|number| assert!(stream.layer(number, Forward).is_ok()));
        stream.wait_loaded().unwrap();
        damage(&pack.path, codes.offset + 40, !found);
        assert_eq!(stream.layer(0, Backward).is_err(), verify);
    }
}

#[test]
fn a_scale_that_is_no_number_is_found_without_verify() {
    let Some(gpu) = common::gpu() else { return };
    let pack = small_pack(ScaleType::F32);
    let mapped = MappedPack::read(&pack.path).unwrap();
    let sections = mapped.pack().index().sections();
    let scales = sections.iter().find(|s| s.layer == Some(1) && s.kind == Some(SectionKind::Scales)).unwrap().clone();
    drop(mapped);
    damage(&pack.path, scales.offset + 3, 0x7f);
    damage(&pack.path, scales.offset + 2, 0xff);
    for map in [true, false] {
        let mut stream = LayerStream::of(&gpu, source(&pack.path, map).unwrap(), &StreamOptions::default()).unwrap();
        stream.layer(0, Forward).unwrap();
        let error = stream.layer(1, Forward).unwrap_err();
        assert!(
            matches!(error, StreamError::Read(ReadError::Damaged { source: FormatError::ScaleNotFinite { .. }, .. })),
            "{error}"
        );
    }
}

/// Each request for damaged global tensors returns an error. Layers still load.
#[test]
fn damaged_globals_do_not_hurt_the_layers() {
    let Some(gpu) = common::gpu() else { return };
    let pack = small_pack(ScaleType::Bf16);
    let mapped = MappedPack::read(&pack.path).unwrap();
    let sections = mapped.pack().index().sections();
    let raw = sections.iter().find(|s| s.layer.is_none() && s.kind == Some(SectionKind::Raw)).unwrap().clone();
    let found = mapped.pack().payload(&raw)[7];
    drop(mapped);
    damage(&pack.path, raw.offset + 7, !found);
    let options = StreamOptions { globals: Globals::All, ..Default::default() };
    let mut stream = LayerStream::open(&gpu, &pack.path, &options).unwrap();
    for _ in 0..2 {
        assert_eq!(stream.layer(3, Forward).unwrap().number, Some(3));
        let error = stream.globals().unwrap_err();
        assert!(
            matches!(error, StreamError::Read(ReadError::Damaged { source: FormatError::PayloadChecksum { .. }, .. })),
            "{error}"
        );
    }
    assert!(stream.wait_loaded().is_err());
    damage(&pack.path, raw.offset + 7, found);
    assert!(stream.globals().is_ok_and(|globals| globals.is_some_and(|g| g.raw_tensors.len() == 3)));
    stream.wait_loaded().unwrap();
}

/// A stream that is dropped during loading stops at once, and the device still works.
#[test]
fn a_stream_may_be_dropped_while_it_loads() {
    let Some((gpu, kernels)) = device() else { return };
    let pack = small_pack(ScaleType::Bf16);
    for _ in 0..5 {
        drop(LayerStream::open(&gpu, &pack.path, &StreamOptions::default()).unwrap());
    }
    stream_and_compare(&gpu, kernels, &pack.path, &StreamOptions::default());
}

#[test]
fn what_is_no_pack_is_refused_however_it_is_opened() {
    let Some(gpu) = common::gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.nf4pack");
    for content in [&b""[..], b"short", &[0x89; 4096]] {
        fs::write(&path, content).unwrap();
        for map in [true, false] {
            assert!(matches!(source(&path, map), Err(StreamError::Read(ReadError::Open(_)))), "map {map}");
        }
    }
    let missing = LayerStream::open(&gpu, folder.path().join("nothing"), &StreamOptions::default());
    assert!(matches!(missing, Err(StreamError::Read(ReadError::Open(_)))));
}

/// The device is lost before, between and during loads: each call gives a layer or the loss, and
/// the loader thread ends.
#[test]
fn a_device_that_is_lost_in_a_load_is_an_error() {
    let pack = synthetic_pack(510, 1110, ScaleType::Bf16);
    for (map, verify) in [(false, false), (true, true)] {
        for delay in 0..8 {
            let Some(gpu) = common::own_gpu() else { return };
            let options = StreamOptions { budget: ring_of_two(&gpu, &pack.path), verify, ..Default::default() };
            let mut stream = LayerStream::of(&gpu, source(&pack.path, map).unwrap(), &options).unwrap();
            let device = gpu.device().clone();
            let destroy = std::thread::spawn(move || {
                std::thread::sleep(Duration::from_micros(delay * delay * 500));
                device.destroy();
            });
            let mut number = 0;
            let started = Instant::now();
            let error = loop {
                match stream.layer(number % 4, Forward) {
                    Ok(_) => assert!(started.elapsed() < Duration::from_secs(60), "the loss is not found"),
                    Err(error) => break error,
                }
                number += 1;
            };
            destroy.join().unwrap();
            let is_lost = |error| matches!(error, StreamError::Gpu(GpuError::DeviceLost { .. }));
            assert!(is_lost(error), "after {number} layers");
            assert!(is_lost(stream.layer(0, Forward).unwrap_err()), "after the loss");
        }
    }
}

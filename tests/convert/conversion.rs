//! Whole conversions through the public API: a checkpoint in, a pack out, and everything that must
//! hold between the two.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use nf4pack::convert::encode::Encoder;
use nf4pack::convert::notice::Notice;
use nf4pack::convert::source::Checkpoint;
use nf4pack::convert::{ConvertError, Options, Progress, Report, convert, synth};
use nf4pack::export::export_sharded;
use nf4pack::format::nf4::{BLOCK_SIZES, ScaleType, Scales};
use nf4pack::format::{FloatType, FormatError, Index, Pack, Provenance, Role, crc32};
use nf4pack::verify::{AgainstReport, Mismatch, against, verify};
use nf4pack::{LayerError, MappedPack, PackSource};
use proptest::prelude::*;
use regex::Regex;
use safetensors::SafeTensors;
use tempfile::TempDir;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// A Qwen3 so small that a test may convert it many times; no size is a multiple of a block of
/// 4096.
pub(crate) const SHAPE: synth::Shape = synth::Shape {
    hidden: 48,
    intermediate: 80,
    layers: 2,
    heads: 2,
    kv_heads: 1,
    head_dim: 24,
    vocabulary: 50,
    tied: true,
    q_k_norm: true,
};

fn small_checkpoint(shard_len: Option<u64>) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    synth::write(&folder.path().join("model"), &SHAPE, 7, shard_len, &()).unwrap();
    folder
}

fn options(encoder: Encoder, scale_type: ScaleType, block_size: u32) -> Options {
    Options { encoder, scale_type, block_size, ..Options::default() }
}

fn converted(source: &Path, options: Options) -> (TempDir, PathBuf, Report) {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out.nf4pack");
    let report = convert(source, &target, options, &()).unwrap();
    (folder, target, report)
}

/// tiny-qwen3 with the default options: converted once, since the encoder is slow without
/// optimisation.
fn trained() -> (TempDir, PathBuf, Report) {
    static CONVERTED: OnceLock<(Vec<u8>, Report)> = OnceLock::new();
    let (pack, report) = CONVERTED.get_or_init(|| {
        let (_folder, target, report) = converted(&fixture("tiny-qwen3"), Options::default());
        (fs::read(target).unwrap(), report)
    });
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out.nf4pack");
    fs::write(&target, pack).unwrap();
    (folder, target, report.clone())
}

fn open(pack: impl AsRef<Path>) -> PackSource {
    PackSource::open(pack).unwrap()
}

fn compare(pack: &Path, source: &Path) -> AgainstReport {
    against(&open(pack), source, None, 2, &()).unwrap()
}

pub(crate) fn names_in(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn absmax_with_f32_scales_is_bitsandbytes_bit_for_bit() {
    let (_folder, target, _) = converted(&fixture("tiny-qwen3"), options(Encoder::Absmax, ScaleType::F32, 64));
    let oracle = fs::read(fixture("oracle/nf4_absmax_b64.safetensors")).unwrap();
    let oracle = SafeTensors::deserialize(&oracle).unwrap();
    let mapped = MappedPack::read(&target).unwrap();
    let mut compared = 0;
    for projection in mapped.pack().quantized_tensors() {
        let packed = oracle.tensor(&format!("{}.packed_high_nibble_first", projection.name)).unwrap();
        let absmax = oracle.tensor(&format!("{}.absmax", projection.name)).unwrap();
        // bitsandbytes has the first element of a byte in the high nibble.
        let codes: Vec<u8> = packed.data().iter().map(|b| b.rotate_left(4)).collect();
        assert!(projection.data.codes == codes, "codes of {}", projection.name);
        assert_eq!(projection.data.scales, Scales::F32(absmax.data()), "scales of {}", projection.name);
        compared += 1;
    }
    assert_eq!(compared, 28);
    assert!(!mapped.pack().index().header().signed_scales());
}

#[test]
fn every_choice_converts_verifies_and_fits_its_source() {
    let folder = small_checkpoint(None);
    let source = folder.path().join("model");
    for encoder in [Encoder::Absmax, Encoder::Mse] {
        for scale_type in [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8] {
            for block_size in BLOCK_SIZES {
                let what = format!("{encoder:?} {scale_type:?} {block_size}");
                let (_folder, target, report) = converted(&source, options(encoder, scale_type, block_size));
                assert_eq!(verify(&open(&target), 2, &()).unwrap().faults, [], "{what}");
                let compared = compare(&target, &source);
                assert_eq!(compared.mismatches, [], "{what}");
                assert_eq!(compared.tensors.len(), 14, "{what}");
                assert_eq!(fs::metadata(&target).unwrap().len(), report.pack_bytes, "{what}");
                check_errors(&compared, &report, &what);
            }
        }
    }
}

/// Trained weights have blocks of every kind: in none is an encoder worse than plain absmax, which
/// the comparison checks.
#[test]
fn a_trained_model_fits_its_source_in_every_block() {
    let source = fixture("tiny-qwen3");
    let (_folder, target, _) = trained();
    assert_eq!(compare(&target, &source).mismatches, []);
    for (scale_type, block_size) in [(ScaleType::F32, 32), (ScaleType::Bf16, 32), (ScaleType::Dq8, 32)] {
        let (_folder, target, _) = converted(&source, options(Encoder::Mse, scale_type, block_size));
        assert_eq!(compare(&target, &source).mismatches, [], "{scale_type:?} {block_size}");
    }
}

/// The converter's own error sums are those of the comparison, which decodes the file.
fn check_errors(compared: &AgainstReport, report: &Report, what: &str) {
    for role in &report.roles {
        let of_role: Vec<_> = compared.tensors.iter().filter(|t| t.role == role.role).collect();
        assert_eq!(of_role.len() as u64, role.tensors, "{what}");
        let max = of_role.iter().fold(0.0_f32, |m, t| m.max(t.max_abs_error));
        assert_eq!(max, role.max_abs_error, "{what} {}", role.role);
        let squares: f64 = of_role.iter().map(|t| t.rms_error * t.rms_error * t.weights as f64).sum();
        let whole: f64 = of_role.iter().map(|t| t.rms_error * t.rms_error * t.weights as f64 / t.relative_error).sum();
        let relative = squares / whole;
        assert!((relative - role.relative_error).abs() <= 1e-4 * relative, "{what} {}: {relative}", role.role);
    }
}

#[test]
fn mse_has_a_fifth_less_error_than_absmax_at_the_same_size() {
    let error = |report: Report| {
        let weights: f64 = report.roles.iter().map(|r| r.weights as f64).sum();
        (report.roles.iter().map(|r| r.relative_error * r.weights as f64).sum::<f64>() / weights, report.pack_bytes)
    };
    let (_folder, _, absmax) = converted(&fixture("tiny-qwen3"), options(Encoder::Absmax, ScaleType::Bf16, 64));
    let ((absmax, absmax_len), (mse, mse_len)) = (error(absmax), error(trained().2));
    assert_eq!(absmax_len, mse_len);
    assert!(mse < 0.82 * absmax, "mse {mse}, absmax {absmax}");
    assert!((0.0068..0.0070).contains(&mse), "{mse}");
    assert!((0.0084..0.0085).contains(&absmax), "{absmax}");
}

#[test]
fn the_bytes_do_not_depend_on_the_number_of_threads() {
    // Two windows of 4 MiB. Most is the embedding, which is not encoded.
    let shape = synth::Shape { layers: 2, vocabulary: 8192, ..synth::Shape::from_name("tiny").unwrap() };
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model");
    synth::write(&source, &shape, 7, None, &()).unwrap();
    for (encoder, scale_type) in
        [(Encoder::Mse, ScaleType::Bf16), (Encoder::Absmax, ScaleType::F32), (Encoder::Mse, ScaleType::Dq8)]
    {
        let bytes = |threads| {
            let options = Options { threads: NonZeroUsize::new(threads), ..options(encoder, scale_type, 64) };
            let (_folder, target, _) = converted(&source, options);
            fs::read(target).unwrap()
        };
        let one = bytes(1);
        assert!(one == bytes(2), "{scale_type:?}: 1 and 2 threads differ");
        assert!(one == bytes(7), "{scale_type:?}: 1 and 7 threads differ");
    }
}

#[test]
fn shards_and_a_single_file_give_the_same_sections() {
    let (single, sharded) = (small_checkpoint(None), small_checkpoint(Some(20_000)));
    let (_a, single_pack, _) = converted(&single.path().join("model"), Options::default());
    let (_b, sharded_pack, _) = converted(&sharded.path().join("model"), Options::default());
    assert!(names_in(&sharded.path().join("model")).len() > 4, "the checkpoint is not sharded");
    let (single_pack, sharded_pack) = (MappedPack::read(single_pack).unwrap(), MappedPack::read(sharded_pack).unwrap());
    let crcs = |pack: &MappedPack| -> Vec<(String, u32)> {
        let index = pack.pack().index();
        index.sections().iter().map(|s| (index.name(s).to_owned(), s.crc)).collect()
    };
    assert_eq!(crcs(&single_pack), crcs(&sharded_pack));
}

#[test]
fn provenance_has_the_hash_of_every_source_file() {
    let checkpoint = small_checkpoint(Some(20_000));
    let source = checkpoint.path().join("model");
    let (_folder, target, _) = converted(&source, options(Encoder::Absmax, ScaleType::Dq8, 32));
    let mapped = MappedPack::read(target).unwrap();
    let provenance = Provenance::from_json(mapped.pack().index().metadata()).unwrap();
    assert_eq!((provenance.encoder.as_str(), provenance.scales.as_str(), provenance.block_size), ("absmax", "dq8", 32));
    let mut files: Vec<String> = provenance.sources.iter().map(|s| s.file.clone()).collect();
    files.sort();
    assert_eq!(files, names_in(&source));
    for record in &provenance.sources {
        use sha2::Digest;
        let bytes = fs::read(source.join(&record.file)).unwrap();
        let digest = sha2::Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect::<String>();
        assert_eq!((record.bytes, &record.sha256), (bytes.len() as u64, &digest), "{}", record.file);
    }
}

#[test]
fn files_and_raw_tensors_are_in_the_pack_byte_for_byte() {
    let source = fixture("tiny-qwen3");
    let (_folder, target, _) = trained();
    let mapped = MappedPack::read(target).unwrap();
    let names: Vec<&str> = mapped.pack().files().map(|f| f.name).collect();
    assert_eq!(names, ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]);
    for file in mapped.pack().files() {
        assert!(file.bytes == fs::read(source.join(file.name)).unwrap(), "{}", file.name);
    }
    let weights = fs::read(source.join("model.safetensors")).unwrap();
    let weights = SafeTensors::deserialize(&weights).unwrap();
    let raw: Vec<_> = mapped.pack().raw_tensors().collect();
    assert_eq!(raw.len(), 18);
    for tensor in raw {
        assert!(tensor.bytes == weights.tensor(tensor.name).unwrap().data(), "{}", tensor.name);
    }
}

#[test]
fn keep_and_quantize_choose_what_is_encoded() {
    let source = fixture("tiny-qwen3");
    let with = |keep: Option<&str>, quantize: Option<&str>| Options {
        keep: keep.map(|p| Regex::new(p).unwrap()),
        quantize: quantize.map(|p| Regex::new(p).unwrap()),
        ..Options::default()
    };
    let (_folder, target, _) = converted(&source, with(Some(r"\.down_proj\."), Some("embed_tokens")));
    let mapped = MappedPack::read(&target).unwrap();
    let layer = mapped.layer(1).unwrap();
    assert!(layer.quantized_tensor(Role::DownProj).is_none());
    assert!(layer.raw_tensors().any(|t| t.role == Role::DownProj && t.float_type == FloatType::Bf16));
    assert_eq!(layer.quantized_tensors().count(), 6);
    assert!(mapped.pack().quantized_tensor("model.embed_tokens.weight").is_some());
    assert_eq!(compare(&target, &source).mismatches, []);

    let fails = |options| convert(&source, &target.with_extension("2"), options, &()).unwrap_err().to_string();
    assert!(fails(with(Some("no such name"), None)).contains("--keep"));
    assert!(fails(with(None, Some("no such name"))).contains("--quantize"));
    assert!(fails(with(None, Some("model.norm"))).contains("two or more dimensions"));
    assert!(fails(options(Encoder::Mse, ScaleType::Bf16, 48)).contains("48"));
}

/// Sets element `index` of a tensor of the single weights file in `folder` to these bf16 bits.
fn patch_weight(folder: &Path, tensor: &str, index: usize, bits: u16) {
    let path = folder.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let checkpoint = Checkpoint::open(folder, None).unwrap();
    let info = checkpoint.tensors.iter().find(|t| t.name == tensor).unwrap();
    let at = info.offset as usize + 2 * index;
    bytes[at..at + 2].copy_from_slice(&bits.to_le_bytes());
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_weight_that_is_not_finite_is_named_and_nothing_is_left() {
    let (nan, infinity) = (0x7fc1, 0xff80);
    for (tensor, index, bits) in [
        ("model.layers.1.mlp.up_proj.weight", 48 * 80 - 1, nan),
        ("model.layers.0.self_attn.q_proj.weight", 17, infinity),
        ("model.norm.weight", 3, nan),
        ("model.embed_tokens.weight", 0, infinity),
    ] {
        for scale_type in [ScaleType::Bf16, ScaleType::Dq8] {
            let folder = small_checkpoint(None);
            let source = folder.path().join("model");
            patch_weight(&source, tensor, index, bits);
            let target = folder.path().join("out.nf4pack");
            let error = convert(&source, &target, options(Encoder::Mse, scale_type, 64), &()).unwrap_err();
            match error {
                ConvertError::NotFinite { tensor: found, index: at, value } => {
                    assert_eq!((found.as_str(), at), (tensor, index as u64));
                    assert!(!value.is_finite());
                }
                other => panic!("{other:?}"),
            }
            assert_eq!(names_in(folder.path()), ["model"]);
        }
    }
}

#[test]
fn a_target_is_replaced_only_by_force_and_never_a_source() {
    let folder = small_checkpoint(None);
    let source = folder.path().join("model");
    let target = folder.path().join("out.nf4pack");
    fs::write(&target, "precious").unwrap();
    let refused = convert(&source, &target, Options::default(), &()).unwrap_err();
    assert!(matches!(refused, ConvertError::TargetExists { .. }), "{refused:?}");
    assert_eq!(fs::read(&target).unwrap(), b"precious");
    convert(&source, &target, Options { force: true, ..Options::default() }, &()).unwrap();
    assert_eq!(verify(&open(&target), 1, &()).unwrap().faults, []);

    let weights = source.join("model.safetensors");
    let before = fs::read(&weights).unwrap();
    let refused = convert(&source, &weights, Options { force: true, ..Options::default() }, &()).unwrap_err();
    assert!(matches!(refused, ConvertError::TargetIsSource { .. }), "{refused:?}");
    assert!(fs::read(&weights).unwrap() == before);

    for bad in [folder.path().to_owned(), folder.path().join("missing/out.nf4pack")] {
        let error = convert(&source, &bad, Options { force: true, ..Options::default() }, &()).unwrap_err();
        assert!(matches!(error, ConvertError::Target { .. }), "{error:?}");
    }
    assert_eq!(names_in(folder.path()), ["model", "out.nf4pack"]);
}

#[test]
fn no_file_of_the_checkpoint_is_ever_the_target() {
    let folder = small_checkpoint(Some(20_000));
    let source = folder.path().join("model");
    let other_config = folder.path().join("other.json");
    fs::copy(source.join("config.json"), &other_config).unwrap();
    let with_config = Options { force: true, config: Some(other_config.clone()), ..Options::default() };
    let mut targets: Vec<PathBuf> = names_in(&source).iter().map(|name| source.join(name)).collect();
    targets.push(other_config);
    for target in targets {
        let before = fs::read(&target).unwrap();
        let error = convert(&source, &target, with_config.clone(), &()).unwrap_err();
        assert!(matches!(error, ConvertError::TargetIsSource { .. }), "{}: {error:?}", target.display());
        assert!(fs::read(&target).unwrap() == before, "{}", target.display());
    }
}

#[cfg(unix)]
#[test]
fn what_is_no_file_is_not_replaced() {
    let folder = small_checkpoint(None);
    let socket = folder.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let link = folder.path().join("link");
    std::os::unix::fs::symlink(&socket, &link).unwrap();
    for target in [&socket, &link] {
        let options = Options { force: true, ..Options::default() };
        let error = convert(&folder.path().join("model"), target, options, &()).unwrap_err();
        assert!(matches!(error, ConvertError::TargetNotAFile { .. }), "{error:?}");
        assert!(MappedPack::read(target).unwrap_err().to_string().contains("not a regular file"));
    }
    assert_eq!(names_in(folder.path()), ["link", "model", "socket"]);
}

#[test]
fn a_pack_in_which_nothing_is_quantised_comes_with_a_warning() {
    let folder = small_checkpoint(None);
    let source = folder.path().join("model");
    let (_folder, target, report) =
        converted(&source, Options { keep: Some(Regex::new("").unwrap()), ..Options::default() });
    assert_eq!(report.notices.len(), 1);
    assert!(report.notices[0].contains("no tensor is quantised"), "{:?}", report.notices);
    assert_eq!(compare(&target, &source).mismatches, []);
}

struct StopAtOnce;

impl Progress for StopAtOnce {
    fn cancelled(&self) -> bool {
        true
    }
}

#[test]
fn a_cancelled_conversion_leaves_nothing() {
    let folder = small_checkpoint(None);
    let target = folder.path().join("out.nf4pack");
    let error = convert(&folder.path().join("model"), &target, Options::default(), &StopAtOnce).unwrap_err();
    assert!(matches!(error, ConvertError::Cancelled), "{error:?}");
    assert_eq!(names_in(folder.path()), ["model"]);
}

#[cfg(unix)]
#[test]
fn packs_and_exports_have_the_permissions_of_ordinary_new_files() {
    use std::os::unix::fs::PermissionsExt;
    let checkpoint = small_checkpoint(None);
    let (folder, target, _) = converted(&checkpoint.path().join("model"), Options::default());
    fs::write(folder.path().join("ordinary"), "").unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode(&target), mode(&folder.path().join("ordinary")));
    let snapshot = folder.path().join("snapshot");
    export_sharded(&open(&target), &snapshot, FloatType::Bf16, u64::MAX, &()).unwrap();
    for name in names_in(&snapshot) {
        assert_eq!(mode(&snapshot.join(&name)), mode(&folder.path().join("ordinary")), "{name}");
    }
}

#[cfg(unix)]
fn mode(path: &Path) -> u32 {
    std::os::unix::fs::PermissionsExt::mode(&fs::metadata(path).unwrap().permissions()) & 0o777
}

#[cfg(unix)]
fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
}

/// [mode]
#[cfg(unix)]
#[test]
fn a_pack_is_no_wider_readable_than_its_narrowest_source() {
    let checkpoint = small_checkpoint(Some(100_000));
    let source = checkpoint.path().join("model");
    for file in names_in(&source) {
        set_mode(&source.join(&file), 0o600);
        let (_folder, target, _) = converted(&source, Options::default());
        assert_eq!(mode(&target), 0o600, "{file}");
        set_mode(&source.join(&file), 0o644);
    }
    let config = checkpoint.path().join("config.json");
    fs::copy(source.join("config.json"), &config).unwrap();
    set_mode(&config, 0o600);
    let (_folder, target, _) = converted(&source, Options { config: Some(config), ..Options::default() });
    assert_eq!(mode(&target), 0o600, "--config");
}

#[cfg(unix)]
#[test]
fn a_replaced_pack_keeps_its_mode_and_an_export_has_the_packs() {
    let checkpoint = small_checkpoint(None);
    let source = checkpoint.path().join("model");
    let (folder, target, _) = converted(&source, Options::default());
    for bits in [0o600, 0o640, 0o664] {
        set_mode(&target, bits);
        convert(&source, &target, Options { force: true, ..Options::default() }, &()).unwrap();
        assert_eq!(mode(&target), bits);
    }
    set_mode(&target, 0o600);
    let snapshot = folder.path().join("snapshot");
    export_sharded(&open(&target), &snapshot, FloatType::Bf16, 20_000, &()).unwrap();
    assert_eq!(mode(&snapshot), 0o700);
    let files = names_in(&snapshot);
    assert!(files.len() > 3, "{files:?}");
    files.iter().for_each(|name| assert_eq!(mode(&snapshot.join(name)), 0o600, "{name}"));
}

/// Adds lm_head.weight to the weights file: a copy of the embedding, with one other bit if it
/// `differs`.
fn add_head(folder: &Path, differs: bool) {
    let bytes = fs::read(folder.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let embedding = tensors.tensor("model.embed_tokens.weight").unwrap();
    let mut head = embedding.data().to_vec();
    if differs {
        head[100] ^= 1;
    }
    let view = safetensors::tensor::TensorView::new(embedding.dtype(), embedding.shape().to_vec(), &head).unwrap();
    let all = tensors.iter().chain([("lm_head.weight", view)]);
    let out = safetensors::serialize(all, None).unwrap();
    fs::write(folder.join("model.safetensors"), out).unwrap();
}

#[test]
fn a_tied_head_is_stored_once_and_a_differing_one_is_kept() {
    for differs in [false, true] {
        let folder = small_checkpoint(None);
        let source = folder.path().join("model");
        add_head(&source, differs);
        let (_folder, target, report) = converted(&source, Options::default());
        let mapped = MappedPack::read(&target).unwrap();
        assert_eq!(mapped.pack().raw_tensor("lm_head.weight").is_some(), differs);
        assert_eq!(report.notices.len(), 1);
        let provenance = Provenance::from_json(mapped.pack().index().metadata()).unwrap();
        assert_eq!(provenance.dropped, if differs { vec![] } else { vec!["lm_head.weight".to_owned()] });
        assert_eq!(provenance.tied_embeddings, !differs);
        assert_eq!(compare(&target, &source).mismatches, []);
        // A snapshot with a projection of its own must not say that it is the embedding.
        let snapshot = target.with_extension("snapshot");
        export_sharded(&open(&target), &snapshot, FloatType::Bf16, u64::MAX, &()).unwrap();
        let [before, after] = [&source, &snapshot].map(|folder| fs::read_to_string(folder.join("config.json")).unwrap());
        let tied = |said: bool| format!("\"tie_word_embeddings\": {said}");
        assert!(before.contains(&tied(true)), "{before}");
        assert_eq!(after, before.replace(&tied(true), &tied(!differs)));
    }
}

#[test]
fn a_tied_head_of_another_float_type_is_the_same_where_its_values_are() {
    for (change, kept) in [(0.0, false), (1e-3, true)] {
        let folder = small_checkpoint(None);
        let source = folder.path().join("model");
        let bytes = fs::read(source.join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let embedding = tensors.tensor("model.embed_tokens.weight").unwrap();
        let values = embedding.data().as_chunks::<2>().0.iter().map(|&b| half::bf16::from_le_bytes(b).to_f32() + change);
        let head: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
        let shape = embedding.shape().to_vec();
        let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, &head).unwrap();
        let all = tensors.iter().chain([("lm_head.weight", view)]);
        fs::write(source.join("model.safetensors"), safetensors::serialize(all, None).unwrap()).unwrap();
        let (_folder, target, report) = converted(&source, Options::default());
        let expected = if kept { Notice::TiedHeadDiffers } else { Notice::TiedHeadDropped };
        assert_eq!(report.notices, [expected.to_string()]);
        assert_eq!(MappedPack::read(&target).unwrap().pack().has(Role::LmHead), kept);
        assert_eq!(compare(&target, &source).mismatches, []);
    }
}

#[test]
fn a_pack_without_a_head_does_not_fit_a_source_whose_head_differs() {
    let folder = small_checkpoint(None);
    let source = folder.path().join("model");
    let (_folder, target, _) = converted(&source, Options::default());
    add_head(&source, true);
    let expected = Mismatch::NotInPack { name: "lm_head.weight".to_owned() };
    assert_eq!(compare(&target, &source).mismatches, [expected]);
}

#[test]
fn another_checkpoint_does_not_fit() {
    let folder = small_checkpoint(None);
    let source = folder.path().join("model");
    let (_pack_folder, target, _) = converted(&source, Options::default());
    // One large weight in the middle of a block.
    patch_weight(&source, "model.layers.0.mlp.up_proj.weight", 70, 0x4120);
    patch_weight(&source, "model.norm.weight", 1, 0x4120);
    let mismatches = compare(&target, &source).mismatches;
    let in_place = |m: &Mismatch| matches!(m, Mismatch::BlockError { name, block: 1, .. } if name == "model.layers.0.mlp.up_proj.weight");
    assert!(in_place(&mismatches[0]), "{mismatches:?}");
    assert_eq!(mismatches[1], Mismatch::Bytes { name: "model.norm.weight".to_owned(), offset: 2 });
    assert_eq!(mismatches.len(), 2);

    let other = tempfile::tempdir().unwrap();
    let shape = synth::Shape { layers: 3, ..SHAPE };
    synth::write(&other.path().join("model"), &shape, 7, None, &()).unwrap();
    let mismatches = compare(&target, &other.path().join("model")).mismatches;
    let missing =
        mismatches.iter().filter(|m| matches!(m, Mismatch::NotInPack { name } if name.starts_with("model.layers.2.")));
    assert_eq!(missing.count(), 11);
}

/// The number of the first section of a tensor whose name contains `name`.
fn section_of(target: &Path, name: &str) -> usize {
    let mapped = MappedPack::read(target).unwrap();
    let index = mapped.pack().index();
    index.sections().iter().position(|s| index.name(s).contains(name)).unwrap()
}

/// Changes one byte of a payload and mends its checksum, so that only its meaning is wrong.
fn patch_payload(path: &Path, section: usize, at: u64, change: impl Fn(u8) -> u8) {
    let mut bytes = fs::read(path).unwrap();
    let index = Index::parse(&bytes, bytes.len() as u64).unwrap();
    let (start, end) = (index.sections()[section].offset as usize, index.sections()[section].end() as usize);
    let at = start + at as usize;
    bytes[at] = change(bytes[at]);
    let crc = crc32(&bytes[start..end]).to_le_bytes();
    let record = 128 + 96 * section;
    bytes[record + 80..record + 84].copy_from_slice(&crc);
    seal_index(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Mends the checksums of the index and of the header.
fn seal_index(bytes: &mut [u8]) {
    let index_len = u64::from_le_bytes(bytes[48..56].try_into().unwrap()) as usize;
    let index_crc = crc32(&bytes[128..128 + index_len]).to_le_bytes();
    bytes[88..92].copy_from_slice(&index_crc);
    let header_crc = crc32(&bytes[..124]).to_le_bytes();
    bytes[124..128].copy_from_slice(&header_crc);
}

#[test]
fn a_code_that_is_not_the_nearest_is_found_although_its_checksum_fits() {
    let checkpoint = small_checkpoint(None);
    let source = checkpoint.path().join("model");
    let (_folder, target, _) = converted(&source, Options::default());
    let section = section_of(&target, "layers.1.self_attn.o_proj");
    // The first code of a byte becomes its neighbour. Where that is a small step, the error of the
    // whole block hides it.
    let neighbour = |byte: u8| if byte & 15 == 15 { byte - 1 } else { byte + 1 };
    let pristine = fs::read(&target).unwrap();
    let mut found = [0, 0];
    for at in 0..96 {
        fs::write(&target, &pristine).unwrap();
        patch_payload(&target, section, at, neighbour);
        assert_eq!(verify(&open(&target), 1, &()).unwrap().faults, []);
        match &compare(&target, &source).mismatches[..] {
            [Mismatch::Code { element, .. }] if *element == 2 * at => found[0] += 1,
            [Mismatch::BlockError { block, .. }] if *block == at / 32 => found[1] += 1,
            other => panic!("byte {at}: {other:?}"),
        }
    }
    assert!(found[0] > 0 && found[1] > 0, "{found:?}");
}

#[test]
fn a_scale_that_no_encoder_chooses_is_found_although_its_checksum_fits() {
    let checkpoint = small_checkpoint(None);
    let source = checkpoint.path().join("model");
    let (_folder, target, _) = converted(&source, Options::default());
    let section = section_of(&target, "layers.0.mlp.gate_proj") + 1;
    // The exponent of the third scale becomes smaller by two.
    patch_payload(&target, section, 2 * 2 + 1, |byte| byte - 1);
    assert_eq!(verify(&open(&target), 1, &()).unwrap().faults, []);
    let mismatches = compare(&target, &source).mismatches;
    assert!(matches!(&mismatches[..], [Mismatch::BlockError { block: 2, .. }]), "{mismatches:?}");
}

/// All codes are the nearest ones for their scales, which are a third too large: no encoder chooses
/// such.
#[test]
fn scales_that_are_too_large_are_found_although_their_codes_fit() {
    use nf4pack::convert::encode::{Weights, encode_with_scales};
    let folder = small_checkpoint(None);
    let source = folder.path().join("model");
    let (_folder, target, _) = converted(&source, options(Encoder::Absmax, ScaleType::F32, 64));
    let (codes, scales) = {
        let mapped = MappedPack::read(&target).unwrap();
        let projection = mapped.pack().quantized_tensor("model.layers.0.mlp.up_proj.weight").unwrap();
        let mut scales = vec![0.0; projection.data.scales.len()];
        projection.data.scales.read(0, &mut scales);
        scales.iter_mut().for_each(|s| *s *= 4.0 / 3.0);
        let checkpoint = Checkpoint::open(&source, None).unwrap();
        let tensor = checkpoint.tensors.iter().find(|t| t.name == projection.name).unwrap();
        let mut bytes = vec![0; tensor.length as usize];
        checkpoint.read(tensor, 0, &mut bytes).unwrap();
        let mut codes = vec![0; projection.data.codes.len()];
        encode_with_scales(64, Weights { float_type: tensor.float_type, bytes: &bytes }, &scales, &mut codes);
        (codes, scales)
    };
    let section = section_of(&target, "layers.0.mlp.up_proj");
    let table: Vec<u8> = scales.iter().flat_map(|s| s.to_le_bytes()).collect();
    for (section, payload) in [(section, codes), (section + 1, table)] {
        let mut bytes = fs::read(&target).unwrap();
        let offset = Index::parse(&bytes, bytes.len() as u64).unwrap().sections()[section].offset as usize;
        bytes[offset..offset + payload.len()].copy_from_slice(&payload);
        fs::write(&target, bytes).unwrap();
        patch_payload(&target, section, 0, |byte| byte);
    }
    let mismatches = compare(&target, &source).mismatches;
    assert!(matches!(&mismatches[..], [Mismatch::BlockError { .. }]), "{mismatches:?}");
}

#[test]
fn a_tensor_in_another_place_of_the_model_is_found() {
    let folder = small_checkpoint(None);
    let source = folder.path().join("model");
    let (_folder, target, _) = converted(&source, Options::default());
    let section = section_of(&target, "model.layers.1.self_attn.k_norm.weight");
    // The section before it, q_norm, claims to be the bias o_bias, whose number is one less: the
    // order still holds.
    let mut bytes = fs::read(&target).unwrap();
    let record = 128 + 96 * (section - 1);
    bytes[record + 4..record + 6].copy_from_slice(&Role::OBias.number().to_le_bytes());
    seal_index(&mut bytes);
    fs::write(&target, bytes).unwrap();
    let mismatches = compare(&target, &source).mismatches;
    assert!(matches!(&mismatches[..], [Mismatch::Place { .. }]), "{mismatches:?}");
    assert!(mismatches[0].to_string().contains("o_bias of layer 1"), "{}", mismatches[0]);
}

#[test]
fn an_export_writes_only_what_a_checkpoint_has() {
    use nf4pack::format::{Entry, Layout, Shape, Storage};
    let folder = tempfile::tempdir().unwrap();
    let shape = Shape::new(&[4]).unwrap();
    let entry =
        |name: &str, storage| Entry { name: name.to_owned(), role: Role::Other, layer: None, expert: None, shape, storage };
    let write = |entries: Vec<Entry>| {
        let path = folder.path().join("in.nf4pack");
        let layout = Layout::new(entries, 0, 2).unwrap();
        let payloads: Vec<Vec<u8>> = layout.sections().iter().map(|s| vec![0; s.length as usize]).collect();
        let payloads: Vec<&[u8]> = payloads.iter().map(Vec::as_slice).collect();
        fs::write(&path, layout.assemble(&payloads, "{}").unwrap()).unwrap();
        path
    };
    let raw = Storage::Raw(FloatType::F32);
    let pack = write(vec![entry("modeling.py", Storage::File), entry("config.json", Storage::File), entry("a", raw)]);
    let out = folder.path().join("out");
    export_sharded(&open(&pack), &out, FloatType::Bf16, u64::MAX, &()).unwrap();
    assert_eq!(names_in(&out), ["config.json", "model.safetensors"]);

    let pack = write(vec![entry("__metadata__", raw)]);
    let error = export_sharded(&open(&pack), &folder.path().join("out2"), FloatType::Bf16, u64::MAX, &()).unwrap_err();
    assert!(error.to_string().contains("__metadata__"), "{error}");
    let pack = write(vec![entry("a", raw)]);
    let error =
        export_sharded(&open(&pack), &folder.path().join("out3"), FloatType::Bf16, u64::MAX, &StopAtOnce).unwrap_err();
    assert!(error.to_string().contains("stopped"), "{error}");
    for bad in [PathBuf::from("."), out.clone()] {
        let error = export_sharded(&open(&pack), &bad, FloatType::Bf16, u64::MAX, &()).unwrap_err();
        assert!(error.to_string().contains("exists already"), "{error}");
    }
    assert_eq!(names_in(folder.path()), ["in.nf4pack", "out"]);
}

/// More windows and more pieces of one tensor than any buffer holds.
#[test]
fn the_bytes_of_a_large_tensor_do_not_depend_on_the_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model");
    let shape = synth::Shape { hidden: 2304, intermediate: 4000, layers: 1, heads: 1, kv_heads: 1, head_dim: 16, ..SHAPE };
    synth::write(&source, &shape, 3, None, &()).unwrap();
    let bytes = |threads| {
        let keep = Some(Regex::new("(gate|up)_proj").unwrap());
        let options = Options { threads: NonZeroUsize::new(threads), keep, ..options(Encoder::Absmax, ScaleType::Dq8, 64) };
        fs::read(converted(&source, options).1).unwrap()
    };
    assert!(bytes(1) == bytes(7));
}

#[test]
fn verify_names_every_damaged_section() {
    let checkpoint = small_checkpoint(None);
    let (_folder, target, _) = converted(&checkpoint.path().join("model"), Options::default());
    let mut bytes = fs::read(&target).unwrap();
    let index = Index::parse(&bytes, bytes.len() as u64).unwrap();
    let damaged = [2, 9, index.sections().len() - 1];
    for number in damaged {
        bytes[index.sections()[number].offset as usize + 1] ^= 0x10;
    }
    fs::write(&target, &bytes).unwrap();
    let faults = verify(&open(&target), 2, &()).unwrap().faults;
    let numbers: Vec<u64> = faults
        .iter()
        .map(|f| match f {
            FormatError::PayloadChecksum { section, .. } => *section,
            other => panic!("{other}"),
        })
        .collect();
    assert_eq!(numbers, damaged.map(|n| n as u64));
    let error = export_sharded(&open(&target), &target.with_extension("out"), FloatType::F32, 1 << 30, &()).unwrap_err();
    assert!(error.to_string().contains("damaged"), "{error}");
}

#[test]
fn verify_checks_scales_and_padding_as_the_parser_in_memory_does() {
    let checkpoint = small_checkpoint(None);
    let source = checkpoint.path().join("model");
    let (_folder, target, _) = converted(&source, options(Encoder::Absmax, ScaleType::Bf16, 4096));
    let pristine = fs::read(&target).unwrap();
    let index = Index::parse(&pristine, pristine.len() as u64).unwrap();
    let codes = index.sections().iter().position(|s| s.block_size == 4096).unwrap();
    let (last_code, gap) = (index.sections()[codes].length - 1, index.sections()[codes + 1].end());
    type Case = (usize, u64, fn(u8) -> u8, &'static str);
    let cases: [Case; 3] = [
        (codes, last_code, |b| b ^ 1, "padding code"),
        (codes + 1, 1, |b| b | 0x80, "is negative"),
        (codes + 1, 1, |_| 0x7f, "scale 0 is"),
    ];
    for (section, at, change, message) in cases {
        fs::write(&target, &pristine).unwrap();
        patch_payload(&target, section, at, change);
        if message == "scale 0 is" {
            patch_payload(&target, section, 0, |_| 0x80);
        }
        check_same_fault(&target, message);
    }
    let mut bytes = pristine;
    bytes[gap as usize] = 1;
    fs::write(&target, &bytes).unwrap();
    check_same_fault(&target, "padding byte");
}

fn check_same_fault(target: &Path, message: &str) {
    // SAFETY: nothing changes the pack while it is mapped.
    let mapped = PackSource::of_mapped(target, unsafe { MappedPack::open(target) }.unwrap());
    let faults = verify(&mapped, 2, &()).unwrap().faults;
    assert_eq!(verify(&open(target), 2, &()).unwrap().faults, faults, "read");
    let bytes = fs::read(target).unwrap();
    let index = Index::parse(&bytes, bytes.len() as u64).unwrap();
    assert_eq!(faults, nf4pack::format::check::all(&Pack::new(&bytes, &index).unwrap()));
    assert_eq!(faults.len(), 1, "{faults:?}");
    assert!(faults[0].to_string().contains(message), "{}", faults[0]);
}

#[test]
fn a_layer_with_a_bad_scale_is_not_handed_out() {
    let checkpoint = small_checkpoint(None);
    let (_folder, target, _) = converted(&checkpoint.path().join("model"), options(Encoder::Absmax, ScaleType::F32, 64));
    let section = {
        let mapped = MappedPack::read(&target).unwrap();
        mapped.pack().index().layers()[1].clone().find(|&n| mapped.pack().index().sections()[n].block_size == 64).unwrap()
            + 1
    };
    patch_payload(&target, section, 3, |_| 0xff);
    let mapped = MappedPack::read(&target).unwrap();
    assert!(mapped.layer(0).is_ok());
    assert!(mapped.layer(1).unwrap_err().to_string().contains("scale 0"));
    assert!(mapped.layer(2).unwrap_err().to_string().contains("2 does not exist"));
}

#[test]
fn a_layer_or_tensor_with_a_changed_bit_is_not_handed_out() {
    let checkpoint = small_checkpoint(None);
    let quantize = Some(Regex::new("embed_tokens").unwrap());
    let options = Options { quantize, ..options(Encoder::Absmax, ScaleType::F32, 64) };
    let (_folder, target, _) = converted(&checkpoint.path().join("model"), options);
    let good = MappedPack::read(&target).unwrap();
    let index = good.pack().index();
    let first = |layer| index.sections().iter().find(|s| s.block_size == 64 && s.layer == layer).unwrap();
    let names = [Some(0), Some(1), None].map(|layer| index.name(first(layer)).to_owned());
    for (layer, damaged) in [(Some(1), 1), (None, 2)] {
        let mut bytes = fs::read(&target).unwrap();
        bytes[first(layer).offset as usize] ^= 1;
        let path = target.with_extension("damaged");
        fs::write(&path, bytes).unwrap();
        let pack = MappedPack::read(&path).unwrap();
        for (at, name) in names.iter().enumerate() {
            for _ in 0..2 {
                let source = match pack.quantized_tensor(name) {
                    Ok(tensor) => {
                        assert!(tensor.is_some() && at != damaged, "{name}");
                        continue;
                    }
                    Err(LayerError::Format { layer: 1, source }) if layer.is_some() => source,
                    Err(LayerError::Globals { source }) if layer.is_none() => source,
                    Err(other) => panic!("{other}"),
                };
                assert!(at == damaged && matches!(source, FormatError::PayloadChecksum { .. }), "{source}");
            }
        }
        assert_eq!([0, 1].map(|number| pack.layer(number).is_ok()), [true, layer.is_none()]);
        assert!(pack.pack().layer(1).is_some(), "unchecked");
    }
}

#[test]
fn a_tensor_of_no_layer_with_a_bad_scale_is_not_handed_out() {
    let checkpoint = small_checkpoint(None);
    let quantize = Some(Regex::new("embed_tokens").unwrap());
    let options = Options { quantize, ..options(Encoder::Absmax, ScaleType::F32, 64) };
    let (_folder, target, _) = converted(&checkpoint.path().join("model"), options);
    let name = "model.embed_tokens.weight";
    let section = {
        let good = MappedPack::read(&target).unwrap();
        assert!(good.quantized_tensor(name).unwrap().is_some_and(|p| p.layer.is_none()));
        assert!(good.quantized_tensor("none").unwrap().is_none());
        let index = good.pack().index();
        index.sections().iter().position(|s| index.name(s) == name && s.block_size == 64).unwrap() + 1
    };
    patch_payload(&target, section, 3, |_| 0xff);
    // SAFETY: the file is not changed any more.
    for pack in [MappedPack::read(&target).unwrap(), unsafe { MappedPack::open(&target) }.unwrap()] {
        let of_a_layer = pack.layer(0).unwrap().quantized_tensors().next().unwrap().name.to_owned();
        assert!(pack.quantized_tensor(&of_a_layer).unwrap().is_some());
        for _ in 0..2 {
            let error = pack.quantized_tensor(name).unwrap_err();
            assert!(matches!(error, LayerError::Globals { source: FormatError::ScaleNegative { .. } }), "{error}");
        }
    }
}

#[test]
fn an_export_is_a_checkpoint_with_the_decoded_weights() {
    let source = fixture("tiny-qwen3");
    let (folder, target, _) = trained();
    for (dtype, shard_len) in [(FloatType::F32, u64::MAX), (FloatType::Bf16, 1_000_000), (FloatType::F16, u64::MAX)] {
        let out = folder.path().join(format!("{dtype}"));
        let report = export_sharded(&open(&target), &out, dtype, shard_len, &()).unwrap();
        assert_eq!(report.written.weights_files.len() > 1, shard_len != u64::MAX);
        for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            let held = if dtype == FloatType::Bf16 { "bfloat16" } else { "float32" };
            let expected = fs::read_to_string(source.join(name))
                .unwrap()
                .replace("\"torch_dtype\": \"bfloat16\"", &format!("\"torch_dtype\": \"{held}\""));
            assert!(fs::read_to_string(out.join(name)).unwrap() == expected, "{name}");
        }
        let checkpoint = Checkpoint::open(&out, None).unwrap();
        let mapped = MappedPack::read(&target).unwrap();
        assert_eq!(checkpoint.tensors.len() as u64, report.written.tensors);
        for projection in mapped.pack().quantized_tensors() {
            let info = checkpoint.tensors.iter().find(|t| t.name == projection.name).unwrap();
            assert_eq!((info.float_type, &info.shape[..]), (dtype, projection.shape.dims()));
            let mut bytes = vec![0; info.length as usize];
            checkpoint.read(info, 0, &mut bytes).unwrap();
            assert!(bytes == decoded(&projection.data, dtype), "{} as {dtype}", projection.name);
        }
        for raw in mapped.pack().raw_tensors() {
            let info = checkpoint.tensors.iter().find(|t| t.name == raw.name).unwrap();
            let mut bytes = vec![0; info.length as usize];
            checkpoint.read(info, 0, &mut bytes).unwrap();
            assert!(bytes == raw.bytes, "{}", raw.name);
        }
        let again = export_sharded(&open(&target), &out, dtype, shard_len, &()).unwrap_err();
        assert!(again.to_string().contains("exists already"), "{again}");
    }
    assert_eq!(names_in(folder.path()), ["bf16", "f16", "f32", "out.nf4pack"]);
}

/// The naive decoder: codebook entry times scale, rounded once.
fn decoded(data: &nf4pack::format::nf4::Nf4Tensor<'_>, dtype: FloatType) -> Vec<u8> {
    let value = |i: usize| {
        let code = (data.codes[i / 2] >> (4 * (i % 2))) & 15;
        nf4pack::format::nf4::CODEBOOK[usize::from(code)] * data.scales.get(i / data.block_size as usize)
    };
    let bytes = |v: f32| match dtype {
        FloatType::F32 => v.to_le_bytes().to_vec(),
        FloatType::F16 => half::f16::from_f32(v).to_le_bytes().to_vec(),
        FloatType::Bf16 => half::bf16::from_f32(v).to_le_bytes().to_vec(),
    };
    (0..data.elements as usize).flat_map(|i| bytes(value(i))).collect()
}

#[test]
fn an_exported_absmax_pack_converts_to_the_same_pack_again() {
    let source = fixture("tiny-qwen3");
    let choice = options(Encoder::Absmax, ScaleType::F32, 64);
    let (folder, target, _) = converted(&source, choice.clone());
    let out = folder.path().join("snapshot");
    export_sharded(&open(&target), &out, FloatType::F32, u64::MAX, &()).unwrap();
    let (_second, again, _) = converted(&out, choice);
    let (first, second) = (MappedPack::read(&target).unwrap(), MappedPack::read(&again).unwrap());
    for (a, b) in first.pack().quantized_tensors().zip(second.pack().quantized_tensors()) {
        // Only a scale may change: in a block whose largest weight is negative, -1 * scale is the
        // largest magnitude all the same.
        assert_eq!((a.name, a.data), (b.name, b.data));
    }
}

#[test]
fn a_synthetic_pack_is_good_and_depends_on_the_seed_alone() {
    let folder = tempfile::tempdir().unwrap();
    let [a, b, c] = ["a", "b", "c"].map(|name| folder.path().join(name));
    let shape = synth::Shape::from_name("tiny").unwrap();
    let len = synth::write_pack(&a, &shape, 1, &()).unwrap();
    synth::write_pack(&b, &shape, 1, &()).unwrap();
    synth::write_pack(&c, &shape, 2, &()).unwrap();
    let read = |path| fs::read(path).unwrap();
    assert!(read(&a) == read(&b) && read(&a) != read(&c));
    assert_eq!(synth::write_pack(&a, &shape, 1, &()).unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
    let odd = synth::Shape { hidden: 47, ..SHAPE };
    let within_a_block = synth::write_pack(&folder.path().join("d"), &odd, 1, &()).unwrap_err();
    assert_eq!(within_a_block.kind(), std::io::ErrorKind::InvalidInput);

    let report = verify(&open(&a), 1, &()).unwrap();
    assert_eq!((report.bytes, report.faults), (len, vec![]));
    let mapped = MappedPack::read(&a).unwrap();
    let weights: u64 = shape.tensors().iter().filter(|(n, _)| n.contains("_proj")).map(|(_, s)| s[0] * s[1]).sum();
    assert_eq!(mapped.pack().quantized_tensors().map(|p| p.data.elements).sum::<u64>(), weights);
    assert_eq!((mapped.pack().layer_count(), mapped.pack().raw_tensors().count()), (4, 4 * 4));
}

#[test]
fn writing_a_synthetic_pack_can_be_cancelled() {
    struct Stop;
    impl Progress for Stop {
        fn cancelled(&self) -> bool {
            true
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let shape = synth::Shape::from_name("tiny").unwrap();
    let stopped = synth::write_pack(&folder.path().join("a"), &shape, 1, &Stop).unwrap_err();
    assert_eq!(stopped.kind(), std::io::ErrorKind::Interrupted);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any shape (heads are even: a rotary embedding turns pairs), block size, encoder, scale type
    /// and source type: the pack verifies and fits its
    /// source.
    #[test]
    fn any_small_model_converts(
        hidden in 1_u64..40, intermediate in 1_u64..70, layers in 1_u64..3, heads in 1_u64..4, half_head in 1_u64..10,
        vocabulary in 1_u64..30, tied: bool, block in 0..BLOCK_SIZES.len(), scale in 0..3_usize, mse: bool, seed: u64,
    ) {
        let shape = synth::Shape { hidden, intermediate, layers, heads, kv_heads: heads, head_dim: 2 * half_head, vocabulary, tied, q_k_norm: true };
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("model");
        synth::write(&source, &shape, seed, None, &()).unwrap();
        let scale_type = [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8][scale];
        let encoder = if mse { Encoder::Mse } else { Encoder::Absmax };
        let target = folder.path().join("out.nf4pack");
        let report = convert(&source, &target, options(encoder, scale_type, BLOCK_SIZES[block]), &()).unwrap();
        prop_assert_eq!(u64::from(report.layers), layers);
        prop_assert_eq!(verify(&open(&target), 1, &()).unwrap().faults, vec![]);
        prop_assert_eq!(compare(&target, &source).mismatches, vec![]);
    }
}

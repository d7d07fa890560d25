//! Adapters merged into weights, compared with float64 arithmetic and with files that PEFT wrote.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;
use crate::common::program::{self, names};

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use nf4pack::convert::encode::Encoder;
use nf4pack::convert::source::Checkpoint;
use nf4pack::convert::{Conversion, Options, Progress};
use nf4pack::export::{WriteError, export};
use nf4pack::format::FloatType;
use nf4pack::format::nf4::ScaleType;
use nf4pack::merge::{Base, CompareError, MergeError, MergeReport, Sources, compare, merge};
use nf4pack::verify::{Mismatch, VerifyError, against};
use nf4pack::{MappedPack, PackSource};
use predicates::prelude::*;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny-qwen3");
const ADAPTER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/oracle/adapter_final");
/// What PEFT puts before the names of the model.
const PREFIX: &str = "base_model.model.";
const DOWN: &str = "model.layers.2.mlp.down_proj.weight";

/// A folder with the pack `tiny.nf4pack` in it.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: program::place() }
    }

    fn convert(&self, source: &Path, name: &str) {
        Conversion::prepare(source, Options::default()).unwrap().write(&self.path(name), &()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn open(&self, name: &str) -> PackSource {
        PackSource::open(self.path(name)).unwrap()
    }

    fn merge(&self, adapter: &Path, base: Base<'_>, out: &str) -> Result<MergeReport, MergeError> {
        let pack = self.open("tiny.nf4pack");
        merge(&Sources { pack: &pack, adapter, base }, &self.path(out), u64::MAX, &())
    }

    fn names(&self) -> Vec<String> {
        names(self.folder.path())
    }

    /// A copy of the fixture's checkpoint, changed.
    fn checkpoint(&self, name: &str, change: impl FnOnce(&mut Tensors)) -> PathBuf {
        let folder = self.path(name);
        fs::create_dir(&folder).unwrap();
        for file in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            fs::copy(Path::new(TINY).join(file), folder.join(file)).unwrap();
        }
        let mut tensors = read_tensors(&Path::new(TINY).join("model.safetensors"));
        change(&mut tensors);
        write_tensors(&folder.join("model.safetensors"), &tensors);
        folder
    }

    /// A copy of the oracle's final adapter, changed.
    fn adapter(&self, name: &str, change: impl FnOnce(&mut Value, &mut Tensors)) -> PathBuf {
        let folder = self.path(name);
        fs::create_dir(&folder).unwrap();
        let mut config: Value =
            serde_json::from_slice(&fs::read(Path::new(ADAPTER).join("adapter_config.json")).unwrap()).unwrap();
        let mut tensors = read_tensors(&Path::new(ADAPTER).join("adapter_model.safetensors"));
        change(&mut config, &mut tensors);
        fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
        write_tensors(&folder.join("adapter_model.safetensors"), &tensors);
        folder
    }

    /// The final adapter with every B zero.
    fn untrained(&self) -> PathBuf {
        self.adapter("untrained", |_, tensors| {
            for (_, (_, _, bytes)) in tensors.iter_mut().filter(|(name, _)| name.contains("lora_B")) {
                bytes.fill(0);
            }
        })
    }
}

/// Name to type, shape and bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn read_tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter().map(|(n, t)| (n.to_owned(), (t.dtype(), t.shape().to_vec(), t.data().to_vec()))).collect()
}

fn write_tensors(path: &Path, tensors: &Tensors) {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

fn floats(tensors: &Tensors, name: &str) -> Vec<f64> {
    let (dtype, _, bytes) = &tensors[name];
    match dtype {
        Dtype::F32 => bytes.as_chunks().0.iter().map(|&b| f64::from(f32::from_le_bytes(b))).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|&b| f64::from(f16::from_le_bytes(b))).collect(),
        Dtype::BF16 => bytes.as_chunks().0.iter().map(|&b| f64::from(bf16::from_le_bytes(b))).collect(),
        other => panic!("{other:?}"),
    }
}

/// The tensor in another type.
fn retyped(tensors: &mut Tensors, name: &str, dtype: Dtype) {
    let values = floats(tensors, name);
    let bytes = |&v: &f64| match dtype {
        Dtype::F32 => (v as f32).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(v as f32).to_le_bytes().to_vec(),
        _ => bf16::from_f32(v as f32).to_le_bytes().to_vec(),
    };
    let bytes = values.iter().flat_map(bytes).collect();
    let shape = tensors[name].1.clone();
    tensors.insert(name.to_owned(), (dtype, shape, bytes));
}

/// The nearest bfloat16, by trying those around; of two equally near ones the even one.
fn nearest(value: f64) -> bf16 {
    let guess = i32::from(bf16::from_f64(value).to_bits());
    let near = (guess - 1..=guess + 1).filter_map(|bits| u16::try_from(bits).ok()).map(bf16::from_bits);
    let distance = |x: &bf16| (f64::from(*x) - value).abs();
    near.filter(|x| x.is_finite())
        .min_by(|a, b| distance(a).total_cmp(&distance(b)).then((a.to_bits() & 1).cmp(&(b.to_bits() & 1))))
        .unwrap()
}

/// Name to values of all weights that a merge of these should give, and the rounding error over the
/// change.
fn expected(base: &Tensors, adapter: &Tensors, rank: usize, scale: f64) -> (BTreeMap<String, Vec<bf16>>, f64) {
    let (mut change, mut rounding) = (0.0, 0.0);
    let mut merged = BTreeMap::new();
    for (name, (_, shape, _)) in base {
        let mut values = floats(base, name);
        let module = name.strip_suffix(".weight").unwrap();
        let matrix = |which: &str| format!("{PREFIX}{module}.{which}.weight");
        let adapted = adapter.contains_key(&matrix("lora_A"));
        if adapted {
            let (a, b) = (floats(adapter, &matrix("lora_A")), floats(adapter, &matrix("lora_B")));
            let inputs = shape[1];
            for (i, value) in values.iter_mut().enumerate() {
                let (row, column) = (i / inputs, i % inputs);
                let product: f64 = (0..rank).map(|k| b[row * rank + k] * a[k * inputs + column]).sum();
                *value += scale * product;
                change += (scale * product).powi(2);
            }
        }
        let rounded: Vec<bf16> = values.iter().map(|&v| nearest(v)).collect();
        if adapted {
            rounding += rounded.iter().zip(&values).map(|(r, v)| (f64::from(*r) - v).powi(2)).sum::<f64>();
        }
        merged.insert(name.clone(), rounded);
    }
    (merged, (rounding / change).sqrt())
}

/// The decoded tensors of a pack, as its checkpoint would have them.
fn decoded(pack: &Path) -> Tensors {
    let mapped = MappedPack::read(pack).unwrap();
    let shape = |dims: &[u64]| dims.iter().map(|&d| d as usize).collect();
    let quantised = mapped.pack().quantized_tensors().map(|p| {
        let bytes = common::decode(&p.data).iter().flat_map(|v| v.to_le_bytes()).collect();
        (p.name.to_owned(), (Dtype::F32, shape(p.shape.dims()), bytes))
    });
    let raw = mapped.pack().raw_tensors().map(|t| {
        assert_eq!(t.float_type, FloatType::Bf16);
        (t.name.to_owned(), (Dtype::BF16, shape(t.shape.dims()), t.bytes.to_vec()))
    });
    quantised.chain(raw).collect()
}

/// Compares the snapshot `out` with the expectation, weight by weight.
fn check(out: &Path, expected: &BTreeMap<String, Vec<bf16>>) {
    let found = read_tensors(&out.join("model.safetensors"));
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, (dtype, _, bytes)) in &found {
        assert_eq!(*dtype, Dtype::BF16, "{name}");
        let want: Vec<u8> = expected[name].iter().flat_map(|x| x.to_le_bytes()).collect();
        assert!(*bytes == want, "{name}");
    }
}

fn tiny() -> Base<'static> {
    Base::Checkpoint { path: Path::new(TINY), config: None }
}

fn close(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-9 * b.abs(), "{a} {b}");
}

#[test]
fn merged_weights_are_those_of_float64_arithmetic_rounded_once() {
    let place = Place::new();
    let adapter = read_tensors(&Path::new(ADAPTER).join("adapter_model.safetensors"));
    let checkpoint = read_tensors(&Path::new(TINY).join("model.safetensors"));
    let pack = decoded(&place.path("tiny.nf4pack"));
    for (base, weights, out) in [(tiny(), &checkpoint, "a"), (Base::Dequantised, &pack, "b")] {
        let report = place.merge(Path::new(ADAPTER), base, out).unwrap();
        let (weights, rounding) = expected(weights, &adapter, 8, 2.0);
        check(&place.path(out), &weights);
        assert_eq!((report.merged, report.scale, report.other_files.len()), (28, 2.0, 0));
        assert_eq!(report.written.tensors, weights.len() as u64);
        close(report.rounding_error.unwrap(), rounding);
        let worst = report.worst.unwrap();
        assert!(worst.relative_error >= rounding && weights.contains_key(&worst.tensor), "{worst:?}");
        for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
            assert!(fs::read(place.path(out).join(name)).unwrap() == fs::read(Path::new(TINY).join(name)).unwrap());
        }
    }
    let of = |name: &str| read_tensors(&place.path(name).join("model.safetensors"))[DOWN].2.clone();
    assert!(of("a") != of("b") && of("a") != checkpoint[DOWN].2, "the adapter and the base make a difference");
    assert_eq!(place.names(), ["a", "b", "tiny.nf4pack"]);
}

/// Fused projections: an export of a pack without loss has the bytes of the checkpoint, and an
/// adapter that PEFT wrote is merged into the whole tensor.
#[test]
fn fused_projections_are_exported_and_merged_whole() {
    let place = Place::new();
    let phi3 = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/architectures/phi3");
    let options = Options { encoder: Encoder::Absmax, scale_type: ScaleType::F32, ..Options::default() };
    Conversion::prepare(&phi3, options).unwrap().write(&place.path("phi3.nf4pack"), &()).unwrap();
    let (pack, checkpoint) = (place.open("phi3.nf4pack"), read_tensors(&phi3.join("model.safetensors")));
    assert_eq!(against(&pack, &phi3, None, 2, &()).unwrap().mismatches, []);
    export(&pack, &place.path("exported"), FloatType::F32, &()).unwrap();
    assert!(read_tensors(&place.path("exported").join("model.safetensors")) == checkpoint);
    let (adapter, base) = (phi3.join("adapter"), Base::Checkpoint { path: &phi3, config: None });
    let report = merge(&Sources { pack: &pack, adapter: &adapter, base }, &place.path("out"), u64::MAX, &()).unwrap();
    // Four tensors of each layer.
    assert_eq!(report.merged, 8);
    let tensors = read_tensors(&adapter.join("adapter_model.safetensors"));
    assert!(tensors.contains_key(&format!("{PREFIX}model.layers.1.self_attn.qkv_proj.lora_B.weight")));
    check(&place.path("out"), &expected(&checkpoint, &tensors, 4, 2.0).0);
}

#[test]
fn scales_targets_types_and_names_of_peft_s_adapters() {
    let place = Place::new();
    let checkpoint = read_tensors(&Path::new(TINY).join("model.safetensors"));
    // rsLoRA on two projections; the other matrices are not there.
    let targets = ["q_proj", "down_proj"];
    let adapter = place.adapter("rslora", |config, tensors| {
        config["use_rslora"] = json!(true);
        config["target_modules"] = json!(targets);
        tensors.retain(|name, _| targets.iter().any(|t| name.contains(t)));
    });
    let report = place.merge(&adapter, tiny(), "rs").unwrap();
    let tensors = read_tensors(&adapter.join("adapter_model.safetensors"));
    assert_eq!(report.merged, 8);
    check(&place.path("rs"), &expected(&checkpoint, &tensors, 8, 16.0 / 8.0_f64.sqrt()).0);

    for (dtype, prefix, name) in [(Dtype::F16, PREFIX, ".default"), (Dtype::BF16, "", "")] {
        let adapter = place.adapter(&format!("{dtype:?}"), |_, tensors| {
            for name in tensors.keys().cloned().collect::<Vec<_>>() {
                retyped(tensors, &name, dtype);
            }
        });
        let tensors = read_tensors(&adapter.join("adapter_model.safetensors"));
        let renamed = |(key, value): (&String, &(Dtype, Vec<usize>, Vec<u8>))| {
            let key = key.replace(PREFIX, prefix).replace(".weight", &format!("{name}.weight"));
            (key, value.clone())
        };
        write_tensors(&adapter.join("adapter_model.safetensors"), &tensors.iter().map(renamed).collect());
        let out = format!("out-{dtype:?}");
        place.merge(&adapter, tiny(), &out).unwrap();
        check(&place.path(&out), &expected(&checkpoint, &tensors, 8, 2.0).0);
    }
}

#[test]
fn an_adapter_before_training_changes_nothing() {
    let place = Place::new();
    let report = place.merge(&place.untrained(), tiny(), "out").unwrap();
    assert_eq!((report.rounding_error, report.worst), (None, None));
    let before = read_tensors(&Path::new(TINY).join("model.safetensors"));
    assert!(read_tensors(&place.path("out/model.safetensors")) == before);
}

#[test]
fn a_stored_head_of_a_model_that_config_json_calls_tied_is_merged_as_it_is() {
    let place = Place::new();
    let base = place.checkpoint("headed", |tensors| {
        let (dtype, shape, mut bytes) = tensors["model.embed_tokens.weight"].clone();
        bytes.rotate_left(2);
        tensors.insert("lm_head.weight".to_owned(), (dtype, shape, bytes));
    });
    place.convert(&base, "headed.nf4pack");
    let pack = place.open("headed.nf4pack");
    let head = read_tensors(&base.join("model.safetensors")).remove("lm_head.weight");
    for (from, out) in [(Base::Dequantised, "a"), (Base::Checkpoint { path: &base, config: None }, "b")] {
        let sources = Sources { pack: &pack, adapter: Path::new(ADAPTER), base: from };
        merge(&sources, &place.path(out), u64::MAX, &()).unwrap();
        assert!(read_tensors(&place.path(out).join("model.safetensors")).remove("lm_head.weight") == head);
        let config: Value = serde_json::from_slice(&fs::read(place.path(out).join("config.json")).unwrap()).unwrap();
        assert_eq!(config["tie_word_embeddings"], json!(false));
    }
}

#[test]
fn all_of_the_snapshot_is_bfloat16_in_shards_of_the_given_size() {
    let place = Place::new();
    let base = place.checkpoint("wide", |tensors| {
        for (name, dtype) in
            [(DOWN, Dtype::F32), ("model.norm.weight", Dtype::F32), ("model.embed_tokens.weight", Dtype::F16)]
        {
            retyped(tensors, name, dtype);
        }
        let (_, _, bytes) = tensors.get_mut("model.norm.weight").unwrap();
        // Just above the middle between 1 and the next bfloat16.
        bytes[..4].copy_from_slice(&(1.0_f32 + 0.003_906_25 + 1e-6).to_le_bytes());
    });
    let config = fs::read_to_string(base.join("config.json")).unwrap();
    fs::write(base.join("config.json"), config.replace("bfloat16", "float32")).unwrap();
    place.convert(&base, "wide.nf4pack");
    let adapter = read_tensors(&Path::new(ADAPTER).join("adapter_model.safetensors"));
    let pack = place.open("wide.nf4pack");
    let sources = Sources { pack: &pack, adapter: Path::new(ADAPTER), base: Base::Checkpoint { path: &base, config: None } };
    merge(&sources, &place.path("whole"), u64::MAX, &()).unwrap();
    let tensors = read_tensors(&base.join("model.safetensors"));
    check(&place.path("whole"), &expected(&tensors, &adapter, 8, 2.0).0);

    let report = merge(&sources, &place.path("shards"), 500_000, &()).unwrap();
    assert!(report.written.weights_files.len() > 1);
    let (whole, shards) = (place.path("whole"), place.path("shards"));
    let [whole, shards] = [whole, shards].map(|path| Checkpoint::open(&path, None).unwrap());
    assert_eq!(whole.tensors.len(), shards.tensors.len());
    for tensor in &shards.tensors {
        let other = whole.tensors.iter().find(|t| t.name == tensor.name).unwrap();
        let read = |checkpoint: &Checkpoint, tensor| {
            let mut bytes = vec![0; other.length as usize];
            checkpoint.read(tensor, 0, &mut bytes).unwrap();
            bytes
        };
        assert!(read(&whole, other) == read(&shards, tensor), "{}", tensor.name);
    }
    // The pack's own raw tensors, too.
    let dequantised = Sources { base: Base::Dequantised, ..sources };
    merge(&dequantised, &place.path("own"), u64::MAX, &()).unwrap();
    let own = read_tensors(&place.path("own/model.safetensors"));
    let (dtype, _, norm) = &own["model.norm.weight"];
    assert_eq!((*dtype, &norm[..2]), (Dtype::BF16, &[0x81, 0x3f][..]));
    // And config.json says so, in place of the checkpoint's type.
    assert!(config.contains("\"torch_dtype\": \"bfloat16\""));
    for out in ["whole", "own"] {
        assert_eq!(fs::read_to_string(place.path(out).join("config.json")).unwrap(), config, "{out}");
    }
}

#[test]
fn a_model_that_nothing_can_be_trained_on_is_refused() {
    let place = Place::new();
    // `convert` refuses such a model, so that the pack is of another program.
    let pack = place.path("tiny.nf4pack");
    let mut bytes = fs::read(&pack).unwrap();
    let key = b"\"hidden_act\": \"silu\"";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap();
    bytes[at..at + key.len()].copy_from_slice(b"\"hidden_act\": \"gelu\"");
    common::seal::seal_payloads(&mut bytes);
    fs::write(&pack, bytes).unwrap();
    let error = place.merge(Path::new(ADAPTER), Base::Dequantised, "out").unwrap_err();
    assert!(matches!(&error, MergeError::Model(_)) && error.to_string().contains("hidden_act"), "{error}");
    assert_eq!(place.names(), ["tiny.nf4pack"]);
}

#[test]
fn another_checkpoint_is_refused_or_warned_about() {
    let place = Place::new();
    let wrong = |name: &str, change: fn(&mut Tensors)| {
        let path = place.checkpoint(name, change);
        let base = Base::Checkpoint { path: &path, config: None };
        place.merge(Path::new(ADAPTER), base, "out")
    };
    let mismatch = |name, change| match wrong(name, change).unwrap_err() {
        MergeError::OtherBase { mismatch, .. } => mismatch,
        other => panic!("{name}: {other}"),
    };
    let missing = mismatch("missing", |tensors| drop(tensors.remove(DOWN)));
    assert_eq!(missing, Mismatch::NotInCheckpoint { name: DOWN.to_owned() });
    let more = mismatch("more", |tensors| {
        let norm = tensors["model.norm.weight"].clone();
        tensors.insert("extra.weight".to_owned(), norm);
    });
    assert_eq!(more, Mismatch::NotInPack { name: "extra.weight".to_owned() });
    let shape = mismatch("shape", |tensors| tensors.get_mut(DOWN).unwrap().1.reverse());
    let [expected, found] = ["[512, 192]", "[192, 512]"].map(str::to_owned);
    assert_eq!(shape, Mismatch::Shape { name: DOWN.to_owned(), expected, found });
    assert!(!place.path("out").exists());

    let report = wrong("edited", |tensors| tensors.get_mut(DOWN).unwrap().2[0] ^= 1).unwrap();
    assert_eq!(report.other_files, ["model.safetensors"]);
}

#[test]
fn adapters_of_other_models_are_refused() {
    let place = Place::new();
    const A: &str = "base_model.model.model.layers.2.mlp.down_proj.lora_A.weight";
    let error = |name: &str, change: fn(&mut Value, &mut Tensors)| {
        let adapter = place.adapter(name, change);
        place.merge(&adapter, tiny(), "out").unwrap_err().to_string()
    };
    let text = error("narrow", |_, tensors| {
        tensors.insert(A.to_owned(), (Dtype::F32, vec![8, 100], vec![0; 3200]));
    });
    assert!(text.contains(A) && text.contains("[8, 512]"), "{text}");
    let text = error("deep", |_, tensors| {
        let matrix = tensors[A].clone();
        tensors.insert(A.replace("layers.2", "layers.7"), matrix);
    });
    assert!(text.contains("layers.7"), "{text}");
    let text = error("shallow", |_, tensors| tensors.retain(|name, _| !name.contains("layers.3")));
    assert!(text.contains("layers.3"), "{text}");
    let text = error("dora", |config, _| config["use_dora"] = json!(true));
    assert!(text.contains("use_dora"), "{text}");
    assert!(!place.path("out").exists());
}

#[test]
fn what_is_no_bfloat16_is_named_and_nothing_is_left() {
    let place = Place::new();
    for (name, value) in [("nan", f32::NAN), ("large", 1e38)] {
        let adapter = place.adapter(name, |_, tensors| {
            for which in ["lora_A", "lora_B"] {
                let matrix = format!("{PREFIX}{}", DOWN.replace("weight", &format!("{which}.weight")));
                tensors.get_mut(&matrix).unwrap().2[..4].copy_from_slice(&value.to_le_bytes());
            }
        });
        for base in [tiny(), Base::Dequantised] {
            match place.merge(&adapter, base, "out").unwrap_err() {
                MergeError::NotFinite { tensor, index, .. } => assert_eq!((tensor.as_str(), index), (DOWN, 0)),
                other => panic!("{other}"),
            }
        }
    }
    assert_eq!(place.names(), ["large", "nan", "tiny.nf4pack"]);
}

struct StopAfter(std::sync::atomic::AtomicU64);

impl Progress for StopAfter {
    fn cancelled(&self) -> bool {
        let before = |n: u64| n.checked_sub(1);
        self.0.try_update(std::sync::atomic::Ordering::Relaxed, std::sync::atomic::Ordering::Relaxed, before).is_err()
    }
}

#[test]
fn stopped_anywhere_it_leaves_nothing() {
    let place = Place::new();
    let pack = place.open("tiny.nf4pack");
    let sources = Sources { pack: &pack, adapter: Path::new(ADAPTER), base: tiny() };
    for after in [0, 1, 5, 20, 60] {
        let error = merge(&sources, &place.path("out"), u64::MAX, &StopAfter(after.into())).unwrap_err();
        let stopped = matches!(error, MergeError::Verify(VerifyError::Cancelled) | MergeError::Write(WriteError::Cancelled));
        assert!(stopped, "{after}: {error}");
        assert_eq!(place.names(), ["tiny.nf4pack"], "{after}");
    }
}

/// Runs `nf4pack merge` in the folder.
fn run(place: &Place, arguments: &str) -> assert_cmd::assert::Assert {
    let arguments = arguments.replace("TINY", TINY).replace("ADAPTER", ADAPTER);
    let mut command = assert_cmd::cargo::cargo_bin_cmd!("nf4pack");
    command
        .env("NF4PACK_CACHE_DIR", program::CACHE)
        .current_dir(place.folder.path())
        .arg("merge")
        .args(arguments.split(' '))
        .assert()
}

fn contains(text: &str) -> impl Predicate<str> {
    predicate::str::contains(text)
}

#[test]
fn the_command_merges_says_so_and_reports_in_json() {
    let place = Place::new();
    let merged = run(&place, "tiny.nf4pack --adapter ADAPTER --base TINY --out out --no-compare").success();
    merged.stdout(contains("out: 46 tensors")).stdout(contains(" 28 of them")).stderr(contains("100 %"));
    run(&place, "tiny.nf4pack --adapter ADAPTER --base dequant --config c.json --out own --no-compare")
        .code(2)
        .stderr(contains("--config").and(contains("--base SNAPSHOT")));
    let json = run(&place, "tiny.nf4pack --adapter ADAPTER --base dequant --out own --json --quiet --no-compare")
        .success()
        .stderr("");
    let report: Value = serde_json::from_slice(&json.get_output().stdout).unwrap();
    assert_eq!((&report["target"], &report["base"]), (&json!("own"), &json!("dequant")));
    assert_eq!((&report["merged"], &report["tensors"], &report["scale"]), (&json!(28), &json!(46), &json!(2.0)));
    assert!(report["rounding_error"].as_f64().unwrap() > 0.0);
    place.untrained();
    run(&place, "tiny.nf4pack --adapter untrained --base dequant --out same --no-compare")
        .success()
        .stderr(contains("warning: the adapter"));
    place.checkpoint("edited", |tensors| tensors.get_mut(DOWN).unwrap().2[0] ^= 1);
    let warned = run(&place, "tiny.nf4pack --adapter ADAPTER --base edited --out new --no-compare").success();
    warned.stderr(contains("warning: model.safetensors of edited"));
}

#[test]
fn an_adapter_too_small_for_bfloat16_is_warned_about() {
    let place = Place::new();
    place.adapter("weak", |config, _| config["lora_alpha"] = json!(0.001));
    let warned = run(&place, "tiny.nf4pack --adapter weak --base TINY --out out --no-compare").success();
    warned.stderr(predicate::str::is_match("warning: bfloat16 .* %").unwrap());
}

#[test]
fn failures_of_the_command_say_what_to_do() {
    let place = Place::new();
    fs::create_dir(place.path("full")).unwrap();
    fs::write(place.path("full/notes"), "mine").unwrap();
    fs::create_dir(place.path("empty")).unwrap();
    place.checkpoint("other", |tensors| tensors.get_mut(DOWN).unwrap().1.reverse());
    let before = place.names();
    for (arguments, error, hint) in [
        ("tiny.nf4pack --adapter ADAPTER --base TINY --out full", "target-folder-exists", "folder"),
        ("tiny.nf4pack --adapter empty --base TINY --out out", "adapter-unreadable", "adapter_config.json"),
        ("tiny.nf4pack --adapter ADAPTER --base none --out out", "source-unreadable", "folder"),
        ("tiny.nf4pack --adapter ADAPTER --base other --out out", "merge-other-base", "--base dequant"),
        ("none --adapter ADAPTER --base dequant --out out", "pack-unreadable", "nf4pack convert"),
        ("tiny.nf4pack --adapter ADAPTER --base dequant --out no/out", "target-unwritable", "no"),
    ] {
        let failed = run(&place, arguments).code(1).stdout("");
        failed.stderr(predicate::str::starts_with("error: ")).stderr(contains("\nhint: ")).stderr(contains(hint));
        let document: Value =
            serde_json::from_slice(&run(&place, &format!("{arguments} --json")).get_output().stdout).unwrap();
        assert_eq!(document["code"], error, "{arguments}");
    }
    assert_eq!(place.names(), before);
    assert_eq!(fs::read(place.path("full/notes")).unwrap(), b"mine");
    run(&place, "tiny.nf4pack --adapter ADAPTER --out out").code(2).stdout("");
    run(&place, "--help").success().stdout(contains("Examples:"));
}

const SAMPLE: &str = "The quick brown fox jumps over the lazy dog.";

#[test]
fn merged_weights_give_the_logits_of_pack_and_adapter() {
    let Some(gpu) = common::gpu() else { return };
    let place = Place::new();
    let pack = place.open("tiny.nf4pack");
    let sources = Sources { pack: &pack, adapter: Path::new(ADAPTER), base: Base::Dequantised };
    merge(&sources, &place.path("own"), u64::MAX, &()).unwrap();
    merge(&Sources { base: tiny(), ..sources }, &place.path("original"), u64::MAX, &()).unwrap();
    export(&pack, &place.path("without"), FloatType::Bf16, &()).unwrap();
    let against = |name: &str| {
        let found = compare(&gpu, place.open("tiny.nf4pack"), sources.adapter, &place.path(name), SAMPLE, &()).unwrap();
        assert!(found.tokens > 5 && found.rms_logit > 0.1 && found.max_difference >= found.rms_difference, "{found:?}");
        found.rms_difference / found.rms_logit
    };
    let [own, original, without] = ["own", "original", "without"].map(against);
    // Rounding to bfloat16 costs little, 4 bits more; without the adapter it is another model.
    assert!(own > 0.0 && own < 0.01 && own < original && 3.0 * own < without, "{own} {original} {without}");
    assert_eq!(place.names(), ["original", "own", "tiny.nf4pack", "without"]);
    let empty = compare(&gpu, place.open("tiny.nf4pack"), sources.adapter, &place.path("own"), "", &()).unwrap_err();
    assert!(matches!(empty, CompareError::Empty), "{empty}");
}

#[test]
fn the_command_compares_logits_where_there_is_a_gpu() {
    let place = Place::new();
    let merged = run(&place, "tiny.nf4pack --adapter ADAPTER --base dequant --out own --sample word --json").success();
    let report: Value = serde_json::from_slice(&merged.get_output().stdout).unwrap();
    if common::gpu().is_none() {
        assert_eq!(report["comparison"], Value::Null);
        merged.stderr(contains("logits").and(contains("GPU")));
    } else {
        assert!(report["comparison"]["max_difference"].as_f64().unwrap() > 0.0);
        assert!(report["comparison"]["top1_changed"].is_u64(), "{report}");
        run(&place, "tiny.nf4pack --adapter ADAPTER --base dequant --out text")
            .success()
            .stdout(contains("logits: ").and(contains("top-1")));
    }
    assert!(place.path("own/model.safetensors").is_file());
    let other = run(&place, "tiny.nf4pack --adapter ADAPTER --base dequant --out other --gpu nonesuch").success();
    other.stderr(contains("logits").and(contains("nonesuch")));
}

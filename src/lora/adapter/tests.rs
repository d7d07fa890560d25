//! Adapters of PEFT read and written; one rejection per error.

use std::fs;

use half::{bf16, f16};
use safetensors::SafeTensors;
use serde_json::json;

use super::*;
use crate::arch::family::PROJECTIONS;
use crate::lora::config::TARGETS;

const FIXTURES: &str = "tests/fixtures/oracle";

fn model() -> ModelConfig {
    ModelConfig::parse(&fs::read("tests/fixtures/tiny-qwen3/config.json").unwrap(), None).unwrap()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(FIXTURES).join(name)
}

/// `adapter_init` with the settings and tensors that a test makes of its own.
struct Copy {
    config: Value,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Copy {
    fn new() -> Self {
        let config = serde_json::from_slice(&fs::read(fixture("adapter_init").join(CONFIG)).unwrap()).unwrap();
        let bytes = fs::read(fixture("adapter_init").join(WEIGHTS)).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let owned = |(name, view): (&str, TensorView<'_>)| {
            (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        };
        Self { config, tensors: file.iter().map(owned).collect() }
    }

    fn with(key: &str, value: Value) -> Self {
        let mut copy = Self::new();
        copy.config[key] = value;
        copy
    }

    fn read(&self) -> Result<Adapter, AdapterError> {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(CONFIG), self.config.to_string()).unwrap();
        let views = self
            .tensors
            .iter()
            .map(|(name, (dtype, shape, data))| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
        fs::write(folder.path().join(WEIGHTS), safetensors::serialize(views, None).unwrap()).unwrap();
        Adapter::read(folder.path(), &model())
    }
}

const A: &str = "base_model.model.model.layers.2.self_attn.k_proj.lora_A.weight";

#[test]
fn adapters_of_peft_come_back_byte_for_byte() {
    for name in ["adapter_init", "adapter_final"] {
        let adapter = Adapter::read(&fixture(name), &model()).unwrap();
        let expected = LoraConfig { rank: 8, alpha: 16.0, dropout: 0.0, targets: PROJECTIONS.to_vec(), rslora: false };
        assert_eq!(adapter.config, expected);
        assert_eq!(adapter.base.as_deref(), Some("tiny-qwen3"));

        let folder = tempfile::tempdir().unwrap();
        adapter.write(folder.path(), &[("train.toml", b"rank = 8")]).unwrap();
        assert_eq!(fs::read(folder.path().join("train.toml")).unwrap(), b"rank = 8");
        let of = |folder: &Path| fs::read(folder.join(WEIGHTS)).unwrap();
        assert!(of(folder.path()) == of(&fixture(name)), "{name}: the whole file is what PEFT wrote");
        assert_eq!(Adapter::read(folder.path(), &model()).unwrap(), adapter);
    }
}

/// An adapter of fused projections has PEFT's names and settings.
#[test]
fn an_adapter_of_fused_projections_comes_back_byte_for_byte() {
    let phi3 = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/architectures/phi3");
    let model = ModelConfig::parse(&fs::read(phi3.join("config.json")).unwrap(), None).unwrap();
    let adapter = Adapter::read(&phi3.join("adapter"), &model).unwrap();
    let targets = vec![Role::QkvProj, Role::OProj, Role::GateUpProj, Role::DownProj];
    assert_eq!(adapter.config, LoraConfig { rank: 4, alpha: 8.0, dropout: 0.0, targets, rslora: false });
    let folder = tempfile::tempdir().unwrap();
    adapter.write(folder.path(), &[]).unwrap();
    let of = |folder: &Path| fs::read(folder.join(WEIGHTS)).unwrap();
    assert!(of(folder.path()) == of(&phi3.join("adapter")), "the whole file is what PEFT wrote");
    // A new adapter of all targets has those of the model.
    let new = Adapter::new(LoraConfig { targets: TARGETS.to_vec(), ..adapter.config.clone() }, None, &model, 1).unwrap();
    new.write(folder.path(), &[]).unwrap();
    let written: Value = serde_json::from_slice(&fs::read(folder.path().join(CONFIG)).unwrap()).unwrap();
    assert_eq!(written["target_modules"], json!(["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]));
    assert_eq!(Adapter::read(folder.path(), &model).unwrap().config, adapter.config);
}

#[test]
fn matrices_land_in_their_places() {
    let adapter = Adapter::read(&fixture("adapter_init"), &model()).unwrap();
    let place = adapter.layout.place(2, Role::KProj).unwrap();
    let copy = Copy::new();
    for (name, shape, range) in [(A.to_owned(), [8, 192], place.a), (A.replace("_A", "_B"), [128, 8], place.b)] {
        let (_, found, bytes) = &copy.tensors[&name];
        assert_eq!(*found, shape);
        assert_eq!(bytemuck::cast_slice::<f32, u8>(&adapter.vector[range]), bytes.as_slice());
    }
}

#[test]
fn settings_are_those_of_peft_with_its_defaults() {
    let written: Value = {
        let config =
            LoraConfig { rank: 4, alpha: 0.5, dropout: 0.25, targets: vec![Role::UpProj, Role::QProj], rslora: true };
        let folder = tempfile::tempdir().unwrap();
        let adapter = Adapter::new(config.clone(), None, &model(), 1).unwrap();
        adapter.write(folder.path(), &[]).unwrap();
        assert_eq!(
            Adapter::read(folder.path(), &model()).unwrap().config,
            LoraConfig { targets: vec![Role::QProj, Role::UpProj], ..config }
        );
        serde_json::from_slice(&fs::read(folder.path().join(CONFIG)).unwrap()).unwrap()
    };
    assert_eq!(written["target_modules"], json!(["q_proj", "up_proj"]));
    assert_eq!(written["lora_alpha"], json!(0.5));
    let own = ["base_model_name_or_path", "lora_alpha", "lora_dropout", "r", "target_modules", "use_rslora"];
    let peft = Copy::new().config;
    for (key, value) in written.as_object().unwrap().iter().filter(|(key, _)| !own.contains(&key.as_str())) {
        assert_eq!(*value, peft[key], "{key}");
    }
    let read = Copy { config: json!({ "target_modules": "all-linear" }), ..Copy::new() }.read().unwrap();
    let targets = PROJECTIONS.to_vec();
    assert_eq!(read.config, LoraConfig { rank: 8, alpha: 8.0, dropout: 0.0, targets, rslora: false });
}

#[test]
fn alphas_are_written_as_they_are() {
    for (alpha, expected) in [(16.0, json!(16)), (0.5, json!(0.5)), (1e300, json!(1e300)), (2e19, json!(2e19))] {
        let config = LoraConfig { rank: 4, alpha, dropout: 0.0, targets: vec![Role::QProj], rslora: false };
        let folder = tempfile::tempdir().unwrap();
        Adapter::new(config, None, &model(), 1).unwrap().write(folder.path(), &[]).unwrap();
        let written: Value = serde_json::from_slice(&fs::read(folder.path().join(CONFIG)).unwrap()).unwrap();
        assert_eq!(written["lora_alpha"], expected);
        assert_eq!(Adapter::read(folder.path(), &model()).unwrap().config.alpha, alpha);
    }
}

#[test]
fn other_float_types_are_read() {
    let number = 0.156_25_f32;
    for (dtype, bytes) in [
        (Dtype::F16, f16::from_f32(number).to_le_bytes().to_vec()),
        (Dtype::BF16, bf16::from_f32(number).to_le_bytes().to_vec()),
        (Dtype::F64, f64::from(number).to_le_bytes().to_vec()),
    ] {
        let mut copy = Copy::new();
        copy.tensors.insert(A.to_owned(), (dtype, vec![8, 192], bytes.repeat(8 * 192)));
        let adapter = copy.read().unwrap();
        let place = adapter.layout.place(2, Role::KProj).unwrap();
        assert!(adapter.vector[place.a].iter().all(|&x| x == number), "{dtype:?}");
    }
}

#[test]
fn other_names_of_the_same_tensors_are_read() {
    let plain = Copy::new().read().unwrap();
    let renamings: [fn(&str) -> String; 14] = [
        |name| name.replace("model.layers.", "language_model.layers."),
        |name| name.replacen("base_model.model.", "base_model.model.student.", 1),
        |name| name.replace("model.layers.", "transformer.layers."),
        |name| name.replace(".weight", ".default.weight"),
        |name| name.replace("base_model.model.model.", "base_model.model."),
        |name| name.replace("base_model.model.", ""),
        |name| name.replace(".weight", ".my_adapter.weight"),
        // What other programs put before or between.
        |name| format!("_orig_mod.{name}"),
        |name| name.replacen("base_model.model.", "base_model.model._orig_mod.", 1),
        |name| format!("module.{name}"),
        |name| format!("base_model.model.{name}"),
        |name| name.replace(".self_attn.", "._orig_mod.self_attn."),
        |name| name.replace(".mlp.", "._fsdp_wrapped_module.mlp._checkpoint_wrapped_module."),
        |name| name.replace("model.layers.", "model.language_model.layers."),
    ];
    for rename in renamings {
        let mut copy = Copy::new();
        copy.tensors = copy.tensors.into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect();
        assert_eq!(copy.read().unwrap(), plain);
    }
}

#[test]
fn target_modules_may_be_names_or_a_pattern() {
    let targets = |value| {
        let mut copy = Copy::with("target_modules", value);
        copy.tensors.retain(|name, _| name.contains("q_proj") || name.contains("up_proj"));
        copy.read().map(|adapter| adapter.config.targets)
    };
    let expected = [Role::QProj, Role::UpProj];
    assert_eq!(targets(json!(["up_proj", "self_attn.q_proj"])).unwrap(), expected);
    assert_eq!(targets(json!(r"model\.layers\.\d+\.(self_attn|mlp)\.(q|up)_proj")).unwrap(), expected);
    assert_eq!(targets(json!(r".*\.q_proj|.*up_proj")).unwrap(), expected);
    let error = targets(json!(["q_proj", "model.layers.1.mlp.up_proj"])).unwrap_err();
    assert!(matches!(error, AdapterError::SomeLayers { role: Role::UpProj }), "{error}");
    let error = targets(json!("q_proj")).unwrap_err();
    assert!(matches!(error, AdapterError::Lora(LoraError::NoTarget)), "a pattern is for the whole name: {error}");
    let error = targets(json!("(")).unwrap_err();
    assert!(matches!(error, AdapterError::Pattern { .. }), "{error}");
    let error = targets(json!(3)).unwrap_err();
    assert_setting(&error, "target_modules");
    // Python's patterns may look around.
    assert_eq!(targets(json!(r"^(?!.*(?:visual|lm_head)).*\.(q|up)_proj")).unwrap(), expected);
}

#[track_caller]
fn assert_setting(error: &AdapterError, expected: &str) {
    assert!(
        matches!(error, AdapterError::Settings(ConfigError::BadValue { key, .. }) if key == expected),
        "{expected}: {error}"
    );
}

/// PEFT 0.21 gives all of these the loss that it gives the adapter without the key.
#[test]
fn settings_that_change_nothing_are_no_obstacle() {
    let plain = Copy::new().read().unwrap();
    for (key, value) in [
        ("fan_in_fan_out", json!(true)),
        ("exclude_modules", json!(["lm_head"])),
        ("exclude_modules", json!("lm_head")),
        ("exclude_modules", json!([])),
        ("layers_to_transform", json!([0, 1, 2, 3])),
        ("layers_to_transform", json!([])),
        ("layers_pattern", json!("")),
        ("use_rslora", json!(null)),
        ("unknown", json!({ "x": 1 })),
        ("target_modules", json!(".*_proj")),
    ] {
        assert_eq!(Copy::with(key, value).read().unwrap(), plain, "{key}");
    }
}

#[test]
fn excluded_modules_are_not_adapted() {
    let mut copy = Copy::with("exclude_modules", json!(["down_proj", "mlp.up_proj"]));
    copy.tensors.retain(|name, _| !name.contains("down_proj") && !name.contains("up_proj"));
    for targets in [json!("all-linear"), json!(".*_proj")] {
        copy.config["target_modules"] = targets;
        let found = copy.read().unwrap().config.targets;
        assert_eq!(found, [Role::QProj, Role::KProj, Role::VProj, Role::OProj, Role::GateProj]);
    }
    copy.config["exclude_modules"] = json!(".*layers.1.*");
    assert!(matches!(copy.read().unwrap_err(), AdapterError::SomeLayers { .. }));
    copy.config["exclude_modules"] = json!("(");
    assert!(matches!(copy.read().unwrap_err(), AdapterError::Pattern { key: "exclude_modules", .. }));
}

#[test]
fn files_without_the_names_of_peft_say_so() {
    for (a, b) in [("lora_a", "lora_b"), ("lora.down", "lora.up")] {
        let mut copy = Copy::new();
        let name = |name: String| name.replace("lora_A", a).replace("lora_B", b);
        copy.tensors = copy.tensors.into_iter().map(|(old, tensor)| (name(old), tensor)).collect();
        assert!(matches!(copy.read().unwrap_err(), AdapterError::NoMatrices { tensor } if tensor.contains(a)));
    }
}

#[test]
fn adapters_of_another_kind_are_refused() {
    let cases = [
        ("alpha_pattern", json!({ "q_proj": 4 })),
        ("rank_pattern", json!({ "q_proj": 4 })),
        ("modules_to_save", json!(["lm_head"])),
        ("use_dora", json!(true)),
        ("layers_pattern", json!("blocks")),
        ("init_lora_weights", json!("pissa_niter_16")),
    ];
    for (key, value) in cases {
        let error = Copy::with(key, value).read().unwrap_err();
        assert!(matches!(error, AdapterError::Unsupported { key: found, .. } if found == key), "{key}: {error}");
    }
    for (key, value) in [
        ("peft_type", json!("IA3")),
        ("task_type", json!("SEQ_CLS")),
        ("bias", json!("all")),
        ("r", json!(-1)),
        ("r", json!(0)),
        ("use_rslora", json!(1)),
        ("layers_to_transform", json!("all")),
        ("exclude_modules", json!(3)),
    ] {
        assert_setting(&Copy::with(key, value).read().unwrap_err(), key);
    }
    for layers in [json!([0]), json!(0)] {
        let error = Copy::with("layers_to_transform", layers).read().unwrap_err();
        assert!(matches!(error, AdapterError::SomeLayers { .. }), "{error}");
    }
}

#[test]
fn tensors_that_do_not_fit_are_named() {
    let mut copy = Copy::new();
    copy.tensors.remove(A);
    let error = copy.read().unwrap_err();
    assert!(matches!(&error, AdapterError::MissingTensor { tensor } if tensor == A), "{error}");

    let extra = "base_model.model.lm_head.lora_A.weight";
    copy = Copy::new();
    copy.tensors.insert(extra.to_owned(), (Dtype::F32, vec![1], vec![0; 4]));
    let error = copy.read().unwrap_err();
    assert!(matches!(&error, AdapterError::Vocabulary { tensor } if tensor == extra), "{error}");
    copy = Copy::new();
    copy.tensors.insert("base_model.model.model.embed_tokens.weight".to_owned(), (Dtype::BF16, vec![2, 2], vec![0; 8]));
    let error = copy.read().unwrap_err();
    assert!(matches!(&error, AdapterError::Vocabulary { .. }), "{error}");

    let extra = A.replace(".2.", ".9.");
    copy = Copy::new();
    copy.tensors.insert(extra.clone(), copy.tensors[A].clone());
    let error = copy.read().unwrap_err();
    assert!(matches!(&error, AdapterError::UnexpectedTensor { tensor } if *tensor == extra), "{error}");

    copy = Copy::new();
    copy.tensors.insert(A.replace("base_model.model.", ""), copy.tensors[A].clone());
    let error = copy.read().unwrap_err();
    assert!(matches!(&error, AdapterError::SameMatrix { .. }), "one matrix under two names: {error}");
    copy = Copy::new();
    copy.tensors.insert(A.replace("lora_A.", "lora_A.other."), copy.tensors[A].clone());
    let error = copy.read().unwrap_err();
    assert!(matches!(&error, AdapterError::SameMatrix { .. }), "two adapters in one file: {error}");

    copy = Copy::new();
    copy.tensors.insert(A.to_owned(), (Dtype::I64, vec![8, 192], vec![0; 8 * 8 * 192]));
    let error = copy.read().unwrap_err();
    assert!(matches!(&error, AdapterError::Type { found: Dtype::I64, .. }), "{error}");

    let error = Copy::with("r", json!(4)).read().unwrap_err();
    assert!(matches!(&error, AdapterError::Shape { expected, .. } if *expected == [4, 192]), "{error}");
}

#[test]
fn files_that_are_missing_or_broken() {
    let folder = tempfile::tempdir().unwrap();
    let read = || Adapter::read(folder.path(), &model()).unwrap_err();
    assert!(matches!(read(), AdapterError::Read { path, .. } if path.ends_with(CONFIG)));
    fs::write(folder.path().join(CONFIG), "[]").unwrap();
    assert!(matches!(read(), AdapterError::Json(_)));
    fs::write(folder.path().join(CONFIG), r#"{"target_modules": ["q_proj"]}"#).unwrap();
    assert!(matches!(read(), AdapterError::Read { path, .. } if path.ends_with(WEIGHTS)));
    fs::write(folder.path().join(WEIGHTS), "{").unwrap();
    assert!(matches!(read(), AdapterError::Safetensors(_)));
}

#[test]
fn what_cannot_be_written_is_an_error() {
    let config = LoraConfig { rank: 4, alpha: 8.0, dropout: 0.0, targets: TARGETS.to_vec(), rslora: false };
    let mut adapter = Adapter::new(config, None, &model(), 1).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "").unwrap();
    let error = adapter.write(&file.join("out"), &[]).unwrap_err();
    assert!(matches!(error, AdapterError::Write { .. }), "{error}");
    adapter.vector.pop();
    let error = adapter.write(&folder.path().join("out"), &[]).unwrap_err();
    assert!(matches!(error, AdapterError::Length { .. }), "{error}");
}

//! Every family as a checkpoint: which tensor lands where, and how names are read.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use nf4pack::arch::{ModelConfig, Obstacle};
use nf4pack::convert::{Conversion, Options, convert, synth};
use nf4pack::export::export;
use nf4pack::format::{FloatType, Role};
use nf4pack::verify::{against, verify};
use nf4pack::{MappedPack, PackSource};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Two layers of every family; no size is a multiple of another.
fn config(model_type: &str, more: &Value) -> Value {
    let mut config = json!({
        "model_type": model_type, "hidden_size": 40, "intermediate_size": 72, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 50, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": false,
    });
    more.as_object().unwrap().iter().for_each(|(key, value)| config[key] = value.clone());
    config
}

fn checkpoint(config: &Value) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("model");
    synth::write_model(&source, config, 5, None, &()).unwrap();
    (folder, source)
}

fn open(pack: impl AsRef<Path>) -> PackSource {
    PackSource::open(pack).unwrap()
}

fn runnable(pack: &Path) -> Result<(), Obstacle> {
    let mapped = MappedPack::read(pack).unwrap();
    let pack = mapped.pack();
    Obstacle::check_pack(pack.index(), |name| pack.file(name).map(|file| file.bytes))
}

/// Role and layer of every tensor of the pack.
fn places(pack: &Path) -> BTreeMap<String, (Role, Option<u32>)> {
    let mapped = MappedPack::read(pack).unwrap();
    let pack = mapped.pack();
    let quantised = pack.quantized_tensors().map(|t| (t.name.to_owned(), (t.role, t.layer)));
    quantised.chain(pack.raw_tensors().map(|t| (t.name.to_owned(), (t.role, t.layer)))).collect()
}

/// Ends of names, and roles.
type Ends = &'static [(&'static str, Role)];

/// What every layer has.
const LAYER: Ends = &[
    ("input_layernorm.weight", Role::InputNorm),
    ("self_attn.q_proj.weight", Role::QProj),
    ("self_attn.k_proj.weight", Role::KProj),
    ("self_attn.v_proj.weight", Role::VProj),
    ("self_attn.o_proj.weight", Role::OProj),
    ("post_attention_layernorm.weight", Role::PostAttentionNorm),
    ("mlp.gate_proj.weight", Role::GateProj),
    ("mlp.up_proj.weight", Role::UpProj),
    ("mlp.down_proj.weight", Role::DownProj),
];
/// What every layer has with norms of outputs.
const GEMMA3_LAYER: Ends = &[
    ("input_layernorm.weight", Role::InputNorm),
    ("self_attn.q_proj.weight", Role::QProj),
    ("self_attn.k_proj.weight", Role::KProj),
    ("self_attn.v_proj.weight", Role::VProj),
    ("self_attn.o_proj.weight", Role::OProj),
    ("self_attn.q_norm.weight", Role::QNorm),
    ("self_attn.k_norm.weight", Role::KNorm),
    ("post_attention_layernorm.weight", Role::AttentionOutputNorm),
    ("pre_feedforward_layernorm.weight", Role::PostAttentionNorm),
    ("mlp.gate_proj.weight", Role::GateProj),
    ("mlp.up_proj.weight", Role::UpProj),
    ("mlp.down_proj.weight", Role::DownProj),
    ("post_feedforward_layernorm.weight", Role::FeedForwardOutputNorm),
];
/// What every layer has, where projections are fused.
const FUSED_LAYER: Ends = &[
    ("input_layernorm.weight", Role::InputNorm),
    ("self_attn.qkv_proj.weight", Role::QkvProj),
    ("self_attn.o_proj.weight", Role::OProj),
    ("post_attention_layernorm.weight", Role::PostAttentionNorm),
    ("mlp.gate_up_proj.weight", Role::GateUpProj),
    ("mlp.down_proj.weight", Role::DownProj),
];
const QKV_BIAS: Ends = &[
    ("self_attn.q_proj.bias", Role::QBias),
    ("self_attn.k_proj.bias", Role::KBias),
    ("self_attn.v_proj.bias", Role::VBias),
];
const O_BIAS: Ends = &[("self_attn.o_proj.bias", Role::OBias)];
const MLP_BIAS: Ends =
    &[("mlp.gate_proj.bias", Role::GateBias), ("mlp.up_proj.bias", Role::UpBias), ("mlp.down_proj.bias", Role::DownBias)];
const NORMS: Ends = &[("self_attn.q_norm.weight", Role::QNorm), ("self_attn.k_norm.weight", Role::KNorm)];

fn expected(prefix: &str, head: &str, more: &[Ends]) -> BTreeMap<String, (Role, Option<u32>)> {
    expected_of(LAYER, prefix, head, more)
}

fn expected_of(layers: Ends, prefix: &str, head: &str, more: &[Ends]) -> BTreeMap<String, (Role, Option<u32>)> {
    let once = [("embed_tokens.weight", Role::Embedding), ("norm.weight", Role::FinalNorm)];
    let mut all: BTreeMap<_, _> = once.map(|(name, role)| (format!("{prefix}{name}"), (role, None))).into();
    all.insert(format!("{head}lm_head.weight"), (Role::LmHead, None));
    for layer in 0..2 {
        for (name, role) in layers.iter().chain(more.iter().copied().flatten()) {
            all.insert(format!("{prefix}layers.{layer}.{name}"), (*role, Some(layer)));
        }
    }
    all
}

/// Converts, checks everything that can be checked, and exports; gives the places in the pack.
fn round_trip(config: &Value) -> BTreeMap<String, (Role, Option<u32>)> {
    let (folder, source) = checkpoint(config);
    let (pack, exported) = (folder.path().join("out.nf4pack"), folder.path().join("exported"));
    convert(&source, &pack, Options::default(), &()).unwrap();
    assert_eq!(verify(&open(&pack), 2, &()).unwrap().faults, []);
    assert_eq!(against(&open(&pack), &source, None, 2, &()).unwrap().mismatches, []);
    runnable(&pack).unwrap();
    export(&open(&pack), &exported, FloatType::Bf16, &()).unwrap();
    let names = |folder: &Path| {
        let bytes = fs::read(folder.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let shapes = file.iter().map(|(name, view)| (name.to_owned(), view.shape().to_vec()));
        shapes.collect::<BTreeMap<_, _>>()
    };
    assert_eq!(names(&exported), names(&source));
    places(&pack)
}

#[test]
fn every_tensor_of_every_family_lands_in_its_place() {
    let all = json!({ "attention_bias": true, "attention_out_bias": true, "mlp_bias": true });
    let biases: &[Ends] = &[QKV_BIAS, O_BIAS, MLP_BIAS];
    let rows: &[(&str, &[Ends], &[Ends])] = &[
        ("gemma", &[], &[QKV_BIAS, O_BIAS]),
        ("granite", &[], biases),
        ("llama", &[], biases),
        ("mistral", &[], &[]),
        ("qwen2", &[QKV_BIAS], &[QKV_BIAS]),
        ("qwen3", &[NORMS], &[NORMS, QKV_BIAS, O_BIAS]),
        ("seed_oss", &[QKV_BIAS], biases),
        ("smollm3", &[], biases),
    ];
    for &(model_type, plain, with_biases) in rows {
        assert_eq!(round_trip(&config(model_type, &json!({}))), expected("model.", "", plain), "{model_type}");
        assert_eq!(round_trip(&config(model_type, &all)), expected("model.", "", with_biases), "{model_type}");
    }
    // Of fused tensors, each projection needs a multiple of 64 rows.
    let sizes = json!({ "head_dim": 32, "intermediate_size": 64, "attention_bias": true });
    assert_eq!(round_trip(&config("phi3", &sizes)), expected_of(FUSED_LAYER, "model.", "", &[]));
    for (more, with_biases) in [(json!({}), &[][..]), (all, &[QKV_BIAS, O_BIAS])] {
        let found = round_trip(&config("gemma3_text", &more));
        assert_eq!(found, expected_of(GEMMA3_LAYER, "model.", "", with_biases));
    }
    let mut covered: Vec<&str> = rows.iter().map(|(model_type, ..)| *model_type).chain(["gemma3_text", "phi3"]).collect();
    covered.sort_unstable();
    assert!(covered.into_iter().eq(ModelConfig::model_types()), "a row for each family");
}

/// Every family has a model whose results transformers and PEFT computed, and the README names it.
#[test]
fn every_family_has_its_oracle_and_its_line_in_the_readme() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let fixtures = fs::read_dir(root.join("tests/fixtures/architectures")).unwrap();
    let model_type = |folder: fs::DirEntry| {
        let config: Value = serde_json::from_slice(&fs::read(folder.path().join("config.json")).unwrap()).unwrap();
        config["model_type"].as_str().unwrap().to_owned()
    };
    let tried: Vec<String> = fixtures.map(|folder| model_type(folder.unwrap())).collect();
    let readme = fs::read_to_string(root.join("README.md")).unwrap();
    for model_type in ModelConfig::model_types() {
        assert!(tried.iter().any(|tried| tried == model_type), "{model_type} has no folder in tests/fixtures/architectures");
        assert!(readme.contains(&format!("| `{model_type}` |")), "README.md does not list {model_type}");
    }
}

/// The checkpoint in `source` under other names.
fn rename(source: &Path, name: impl Fn(&str) -> String) {
    let path = source.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensors: Vec<_> = file.iter().map(|(old, view)| (name(old), view)).collect();
    fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
}

#[test]
fn names_behind_wrappers_or_without_their_prefix_are_stored_as_transformers_writes_them() {
    let bare = |name: &str| name.strip_prefix("model.").unwrap_or(name).to_owned();
    for (rename_to, note) in [
        (Box::new(bare) as Box<dyn Fn(&str) -> String>, "with the \"model.\" that they lack"),
        (Box::new(|name: &str| format!("module.{name}")), "without module."),
        (Box::new(|name: &str| format!("_orig_mod.module.{name}")), "without _orig_mod., module."),
        (Box::new(|name: &str| format!("base_model.model.{name}")), "without base_model.model."),
        (Box::new(move |name: &str| format!("module.{}", bare(name))), "with the \"model.\" that they lack"),
        (Box::new(|name: &str| name.replace(".mlp.", "._orig_mod.mlp.")), "without _orig_mod."),
    ] {
        let (folder, source) = checkpoint(&config("llama", &json!({})));
        rename(&source, rename_to);
        let pack = folder.path().join("out.nf4pack");
        let conversion = Conversion::prepare(&source, Options::default()).unwrap();
        let notes: Vec<String> = conversion.notices().iter().map(ToString::to_string).collect();
        assert!(matches!(notes.as_slice(), [found] if found.contains(note)), "{notes:?}");
        conversion.write(&pack, &()).unwrap();
        assert_eq!(places(&pack), expected("model.", "", &[]));
        assert_eq!(against(&open(&pack), &source, None, 2, &()).unwrap().mismatches, []);
    }
}

#[test]
fn the_language_model_of_a_model_of_text_and_images_keeps_its_names() {
    for (decoder, head) in [("model.language_model.", ""), ("language_model.model.", "language_model.")] {
        let text = config("qwen3", &json!({}));
        let (folder, source) = checkpoint(&text);
        rename(&source, |name| match name.strip_prefix("model.") {
            Some(rest) => format!("{decoder}{rest}"),
            None => format!("{head}{name}"),
        });
        let outer = json!({ "model_type": "some_vl", "text_config": text });
        fs::write(source.join("config.json"), outer.to_string()).unwrap();
        let pack = folder.path().join("out.nf4pack");
        convert(&source, &pack, Options::default(), &()).unwrap();
        assert_eq!(places(&pack), expected(decoder, head, &[NORMS]));
        assert_eq!(against(&open(&pack), &source, None, 2, &()).unwrap().mismatches, []);
        runnable(&pack).unwrap();
    }
}

#[test]
fn two_names_for_one_tensor_are_refused() {
    let (_folder, source) = checkpoint(&config("llama", &json!({})));
    let path = source.join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: Vec<_> = file.iter().map(|(name, view)| (name.to_owned(), view)).collect();
    let norm = safetensors::tensor::TensorView::new(Dtype::BF16, vec![40], &bytes[..80]).unwrap();
    tensors.push(("module.model.norm.weight".to_owned(), norm));
    fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
    let error = Conversion::prepare(&source, Options::default()).unwrap_err();
    assert!(error.to_string().contains("model.norm.weight"), "{error}");
}

/// What convert says about a model that the kernels have no heads for, and about keys without
/// effect.
#[test]
fn what_cannot_be_run_is_said_when_it_is_converted() {
    let more = json!({ "head_dim": 10, "rope_scaling": { "type": "linear", "factor": 2.0, "finetuned": true } });
    let (folder, source) = checkpoint(&config("llama", &more));
    let conversion = Conversion::prepare(&source, Options::default()).unwrap();
    let notices: Vec<_> = conversion.notices().iter().map(|notice| (notice.is_warning(), notice.to_string())).collect();
    let expected = [
        "config.json: rope_scaling.finetuned has no effect, as in transformers",
        "the pack can be verified and exported, but not trained or generated from: a head has 10 features: the kernels need \
         a multiple of 4, and at most 256",
    ];
    assert_eq!(notices, expected.map(|text| (true, text.to_owned())));
    let pack = folder.path().join("out.nf4pack");
    conversion.write(&pack, &()).unwrap();
    let obstacle = runnable(&pack).unwrap_err();
    assert!(expected[1].ends_with(&obstacle.to_string()), "{obstacle}");
}

//! Checkpoints with what no part of the model is: they convert, and every tensor and file that a
//! pack does not have is named.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use nf4pack::arch::ArchError;
use nf4pack::convert::source::{Quantised, SourceError, Unstorable};
use nf4pack::convert::{ConvertError, Options, Report, convert, synth};
use nf4pack::export::{ExportReport, export};
use nf4pack::format::{FloatType, Provenance, Role};
use nf4pack::verify::against;
use nf4pack::{MappedPack, PackSource};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::conversion::SHAPE;

fn open(pack: impl AsRef<Path>) -> PackSource {
    PackSource::open(pack).unwrap()
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A small checkpoint to change, in the folder `model`.
struct Place {
    folder: TempDir,
    tensors: Tensors,
}

const WEIGHTS: &str = "model.safetensors";
const LAST: &str = "model.layers.1.self_attn.q_proj.weight";

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        synth::write(&folder.path().join("model"), &SHAPE, 7, None, &()).unwrap();
        let bytes = fs::read(folder.path().join("model").join(WEIGHTS)).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = |(name, view): (&str, TensorView<'_>)| {
            (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        };
        Self { tensors: tensors.iter().map(tensor).collect(), folder }
    }

    fn with(name: &str, dtype: Dtype, shape: &[usize]) -> Self {
        let mut place = Self::new();
        place.add(name, dtype, shape);
        place
    }

    fn add(&mut self, name: &str, dtype: Dtype, shape: &[usize]) {
        let bytes = vec![0; shape.iter().product::<usize>() * dtype.bitsize() / 8];
        self.tensors.insert(name.to_owned(), (dtype, shape.to_vec(), bytes));
    }

    fn source(&self) -> PathBuf {
        self.folder.path().join("model")
    }

    fn target(&self) -> PathBuf {
        self.folder.path().join("out.nf4pack")
    }

    fn config(&self, change: impl FnOnce(&mut Value)) {
        let path = self.source().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut config);
        fs::write(path, config.to_string()).unwrap();
    }

    fn write(&self, name: &str, tensors: &Tensors) {
        let views = tensors
            .iter()
            .map(|(name, (dtype, shape, bytes))| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        fs::write(self.source().join(name), safetensors::serialize(views, None).unwrap()).unwrap();
    }

    fn convert(&self) -> Result<Report, ConvertError> {
        self.write(WEIGHTS, &self.tensors);
        self.convert_as_it_is()
    }

    fn convert_as_it_is(&self) -> Result<Report, ConvertError> {
        convert(&self.source(), &self.target(), Options::default(), &())
    }

    /// The pack is of its checkpoint, and an export gives back what it holds.
    fn export(&self) -> (PathBuf, ExportReport) {
        assert_eq!(against(&open(self.target()), &self.source(), None, 2, &()).unwrap().mismatches, []);
        let snapshot = self.folder.path().join("snapshot");
        let report = export(&open(self.target()), &snapshot, FloatType::Bf16, &()).unwrap();
        (snapshot, report)
    }

    fn dropped(&self) -> Vec<String> {
        let mapped = MappedPack::read(self.target()).unwrap();
        Provenance::from_json(mapped.pack().index().metadata()).unwrap().dropped
    }

    fn raw_role(&self, name: &str) -> Option<(Role, Option<u32>)> {
        let mapped = MappedPack::read(self.target()).unwrap();
        mapped.pack().raw_tensor(name).map(|tensor| (tensor.role, tensor.layer))
    }
}

fn left_out(report: &Report) -> Vec<&str> {
    report.left_out.iter().map(|tensor| tensor.name.as_str()).collect()
}

#[track_caller]
fn assert_named(report: &Report, name: &str) {
    assert!(report.notices.iter().any(|notice| notice.contains(name)), "{name} in {:?}", report.notices);
}

#[test]
fn what_no_pack_can_hold_is_left_out_and_named() {
    for (name, dtype, shape) in [
        ("model.position_ids", Dtype::I64, &[1, 4][..]),
        ("model.layers.0.self_attn.mask", Dtype::BOOL, &[2, 2]),
        ("model.layers.0.self_attn.bias", Dtype::U8, &[1, 1, 4, 4]),
        ("logit_scale", Dtype::F32, &[]),
        ("model.layers.1.norm.num_batches_tracked", Dtype::I64, &[]),
        ("model.marker", Dtype::F32, &[0]),
        ("lm_head.weight", Dtype::BF16, &[0]),
        ("v_head.summary.bias", Dtype::F64, &[1]),
        ("visual.patch_embed.proj.weight", Dtype::BF16, &[4, 3, 2, 2, 2]),
        ("_flat_param", Dtype::F32, &[0, 7]),
    ] {
        let place = Place::with(name, dtype, shape);
        let report = place.convert().unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!((left_out(&report), place.dropped()), (vec![name], vec![name.to_owned()]));
        assert_named(&report, name);
        let (_, exported) = place.export();
        let missing: &[&str] = if name == "lm_head.weight" { &[] } else { &[name] };
        assert_eq!(exported.written.left_out, missing);
    }
}

#[test]
fn layers_for_multi_token_prediction_are_left_out_and_named() {
    let mut place = Place::with("mtp.layers.0.self_attn.q_proj.weight", Dtype::BF16, &[4, 4]);
    place.add("mtp.fc.weight", Dtype::BF16, &[2, 2]);
    // Not the model's own lm_head, which is tied.
    place.add("mtp.lm_head.weight", Dtype::BF16, &[50, 48]);
    let report = place.convert().unwrap();
    let expected = ["mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight", "mtp.lm_head.weight"];
    assert_eq!(left_out(&report), expected);
    assert_eq!(place.export().1.written.left_out, left_out(&report));

    // As a layer behind the last one, by its own parts or by config.json.
    for (name, key) in [("model.layers.2.eh_proj.weight", None), (LAST, Some("num_nextn_predict_layers"))] {
        let mut place = Place::with("model.layers.2.mlp.up_proj.weight", Dtype::BF16, &[80, 48]);
        place.add(name, Dtype::BF16, &[48, 48]);
        place.config(|config| key.into_iter().for_each(|key| config[key] = json!(1)));
        let report = place.convert().unwrap();
        assert!(left_out(&report).contains(&"model.layers.2.mlp.up_proj.weight"));
        assert!(report.notices.iter().any(|n| n.contains("multi-token prediction")), "{:?}", report.notices);
        place.export();
    }
}

#[test]
fn layers_beyond_those_of_config_json_are_left_out_with_a_warning() {
    let mut place = Place::new();
    place.config(|config| config["num_hidden_layers"] = json!(1));
    let report = place.convert().unwrap();
    assert_eq!(report.left_out.len(), 11);
    assert!(report.left_out.iter().all(|tensor| tensor.name.starts_with("model.layers.1.")));
    assert!(report.notices.iter().any(|n| n.contains("the model has 1 layers by config.json")), "{:?}", report.notices);
    place.export();
    // A layer with only some of its parts is no other case.
    place = Place::with("model.layers.7.mlp.up_proj.weight", Dtype::BF16, &[4, 4]);
    assert_eq!(left_out(&place.convert().unwrap()), ["model.layers.7.mlp.up_proj.weight"]);
}

#[test]
fn other_tensors_that_the_model_does_not_use_are_kept_and_named() {
    for (name, layer, warns) in [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", Some(0), false),
        ("v_head.summary.weight", None, false),
        ("score.weight", None, false),
        ("model.layers.1.self_attn.q_proj.bias", Some(1), true),
        ("model.layers.1.mlp.extra_proj.weight", Some(1), true),
        ("model.layers.1.post_feedforward_layernorm.weight", Some(1), true),
        ("vision_tower.layers.0.q_proj.weight", None, false),
    ] {
        let place = Place::with(name, Dtype::F32, &[4, 4]);
        let report = place.convert().unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(report.kept_unused, [name]);
        assert_named(&report, name);
        let warned = report.notices.iter().any(|n| n.contains("the model has no such tensors"));
        assert_eq!(warned, warns, "{name}: {:?}", report.notices);
        assert_eq!(place.raw_role(name), Some((Role::Other, layer)));
        let (snapshot, exported) = place.export();
        assert!(exported.written.left_out.is_empty());
        let bytes = fs::read(snapshot.join(WEIGHTS)).unwrap();
        assert_eq!(SafeTensors::deserialize(&bytes).unwrap().tensor(name).unwrap().data(), place.tensors[name].2);
    }
}

#[test]
fn a_part_of_the_model_that_no_pack_can_hold_is_an_error_that_says_so() {
    for (name, dtype, shape, expected) in [
        ("model.norm.weight", Dtype::F64, &[48][..], Unstorable::Type { found: "F64".to_owned() }),
        ("model.layers.0.mlp.up_proj.weight", Dtype::F64, &[80, 48], Unstorable::Type { found: "F64".to_owned() }),
        ("model.norm.weight", Dtype::F32, &[], Unstorable::Rank { found: 0 }),
        ("model.norm.weight", Dtype::F32, &[0], Unstorable::Empty { shape: vec![0] }),
        ("lm_head.weight", Dtype::F64, &[50, 48], Unstorable::Type { found: "F64".to_owned() }),
    ] {
        match Place::with(name, dtype, shape).convert().unwrap_err() {
            ConvertError::Source(SourceError::Unstorable { tensor, source, .. }) => {
                assert_eq!((tensor.as_str(), source), (name, expected));
            }
            other => panic!("{name}: {other:?}"),
        }
    }
}

/// The tensors in two shards, and the index that lists them.
fn in_shards(place: &Place) -> serde_json::Map<String, Value> {
    fs::remove_file(place.source().join(WEIGHTS)).unwrap();
    let shard = |name: &str| format!("model-0000{}-of-00002.safetensors", if name < "model.layers.1" { 1 } else { 2 });
    let mut shards: BTreeMap<String, Tensors> = BTreeMap::new();
    for (name, tensor) in &place.tensors {
        shards.entry(shard(name)).or_default().insert(name.clone(), tensor.clone());
    }
    shards.iter().for_each(|(name, tensors)| place.write(name, tensors));
    place.tensors.keys().map(|name| (name.clone(), json!(shard(name)))).collect()
}

fn write_index(place: &Place, map: &serde_json::Map<String, Value>) {
    let index = json!({ "metadata": { "total_size": 1 }, "weight_map": map });
    fs::write(place.source().join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn an_index_may_list_more_or_less_than_the_shards_have() {
    let place = Place::new();
    let mut map = in_shards(&place);
    map.insert("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), json!("model-00001-of-00002.safetensors"));
    map.remove("model.norm.weight");
    map.insert(LAST.to_owned(), json!("model-00001-of-00002.safetensors"));
    write_index(&place, &map);
    let report = place.convert_as_it_is().unwrap();
    for name in ["inv_freq", "model.norm.weight", LAST] {
        assert_named(&report, name);
    }
    assert!(report.left_out.is_empty() && report.kept_unused.is_empty());
    place.export();

    // A part of the model that no shard has is what is wrong, not the index.
    let mut place = Place::new();
    place.tensors.remove(LAST);
    let mut map = in_shards(&place);
    map.insert(LAST.to_owned(), json!("model-00002-of-00002.safetensors"));
    write_index(&place, &map);
    match place.convert_as_it_is().unwrap_err() {
        ConvertError::Source(SourceError::NotInShard { tensor, .. }) => assert_eq!(tensor, LAST),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_quantisation_that_config_json_alone_speaks_of_is_not_followed() {
    let place = Place::new();
    place.config(|config| config["quantization_config"] = json!({ "quant_method": "bitsandbytes", "load_in_4bit": true }));
    let config = fs::read(place.source().join("config.json")).unwrap();
    let report = place.convert().unwrap();
    assert_named(&report, "bitsandbytes");
    let mapped = MappedPack::read(place.target()).unwrap();
    assert!(mapped.pack().files().any(|file| file.name == "config.json" && file.bytes == config));
    let (snapshot, _) = place.export();
    let exported: Value = serde_json::from_slice(&fs::read(snapshot.join("config.json")).unwrap()).unwrap();
    assert_eq!((exported.get("quantization_config"), &exported["model_type"]), (None, &json!("qwen3")));

    // Where the weights are not there as such, config.json is right.
    let mut place = Place::new();
    place.tensors.remove(LAST);
    place.add(&LAST.replace(".weight", ".codes"), Dtype::I16, &[4, 4]);
    place.config(|config| config["quantization_config"] = json!({ "quant_method": "aqlm" }));
    match place.convert().unwrap_err() {
        ConvertError::Source(SourceError::Quantised { source, .. }) => {
            assert_eq!(source, Quantised::Config { method: "aqlm".to_owned() });
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn names_behind_wrappers_or_without_a_prefix_are_those_of_the_model() {
    let rename: [fn(&str) -> String; 9] = [
        |name| format!("model.{name}"),
        |name| format!("student.{name}"),
        |name| name.replacen("model.", "transformer.", 1),
        |name| if name.contains("layers.0.") { name.replacen("model.", "", 1) } else { name.to_owned() },
        |name| name.replacen("model.", "", 1),
        |name| format!("module.{name}"),
        |name| format!("_orig_mod.{name}"),
        |name| format!("base_model.model.{name}"),
        |name| name.replace("self_attn.", "_orig_mod.self_attn."),
    ];
    for rename in rename {
        let mut place = Place::with("model.position_ids", Dtype::I64, &[4]);
        place.tensors = std::mem::take(&mut place.tensors).into_iter().map(|(name, t)| (rename(&name), t)).collect();
        let report = place.convert().unwrap();
        assert_named(&report, "the names of the tensors");
        let mapped = MappedPack::read(place.target()).unwrap();
        assert!(mapped.pack().quantized_tensors().any(|tensor| tensor.name == LAST));
        assert_eq!(report.left_out.len(), 1);
        let (snapshot, _) = place.export();
        let bytes = fs::read(snapshot.join(WEIGHTS)).unwrap();
        assert!(SafeTensors::deserialize(&bytes).unwrap().tensor(LAST).is_ok());
    }
}

#[test]
fn a_missing_part_is_named_with_what_is_there_instead() {
    // Two models in one checkpoint: none of them is the one.
    let mut place = Place::new();
    let tensors = std::mem::take(&mut place.tensors);
    let both = tensors.iter().flat_map(|(name, t)| ["a.", "b."].map(|prefix| (format!("{prefix}{name}"), t.clone())));
    place.tensors = both.collect();
    match place.convert().unwrap_err() {
        ConvertError::Arch(ArchError::MissingTensor { tensor, similar: Some(similar) }) => {
            assert_eq!((tensor.as_str(), similar.as_str()), ("model.embed_tokens.weight", "a.model.embed_tokens.weight"));
        }
        other => panic!("{other:?}"),
    }
    // A model that PEFT has wrapped, saved without merging.
    let wrapped = |name: &str| format!("base_model.model.{}", name.replace("_proj.weight", "_proj.base_layer.weight"));
    place.tensors = tensors.into_iter().map(|(name, t)| (wrapped(&name), t)).collect();
    match place.convert().unwrap_err() {
        ConvertError::Source(SourceError::Unmerged { tensor }) => assert!(tensor.ends_with("q_proj.base_layer.weight")),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_tied_head_in_float64_is_the_embedding() {
    let mut place = Place::new();
    let (_, shape, bytes) = place.tensors["model.embed_tokens.weight"].clone();
    let widen = |pair: &[u8; 2]| f64::from(half::bf16::from_le_bytes(*pair)).to_le_bytes();
    let wide: Vec<u8> = bytes.as_chunks().0.iter().flat_map(widen).collect();
    place.tensors.insert("lm_head.weight".to_owned(), (Dtype::F64, shape, wide));
    let report = place.convert().unwrap();
    assert_eq!(left_out(&report), ["lm_head.weight"]);
    assert_named(&report, "the values of the tied embedding");
    place.export();
}

#[test]
fn the_files_of_a_tokenizer_are_kept_and_given_back() {
    let place = Place::new();
    let files = [
        ("tokenizer.model", &b"\n\x05fake"[..]),
        ("added_tokens.json", b"{\"<x>\": 3}"),
        ("special_tokens_map.json", b"{}"),
        ("vocab.json", b"{}"),
        ("merges.txt", b"a b\n"),
        ("chat_template.json", b"{}"),
        ("preprocessor_config.json", b"{}"),
        ("additional_chat_templates/tool_use.jinja", b"{{ tools }}"),
        ("additional_chat_templates/rag.jinja", b"{{ documents }}"),
    ];
    fs::create_dir(place.source().join("additional_chat_templates")).unwrap();
    for (name, bytes) in files {
        fs::write(place.source().join(name), bytes).unwrap();
    }
    let report = place.convert().unwrap();
    assert_named(&report, "tokenizer.json can be made of tokenizer.model");
    let (snapshot, exported) = place.export();
    for (name, bytes) in files {
        assert_eq!(fs::read(snapshot.join(name)).unwrap(), bytes, "{name}");
        assert!(exported.written.files.iter().any(|file| file == name), "{name}");
    }
}

#[test]
fn the_report_names_the_block_that_lost_most() {
    let place = Place::new();
    let report = place.convert().unwrap();
    let compared = against(&open(place.target()), &place.source(), None, 1, &()).unwrap();
    let worst = compared.tensors.iter().max_by(|a, b| a.max_block_error.total_cmp(&b.max_block_error)).unwrap();
    assert_eq!(report.max_block_error_tensor.as_deref(), Some(worst.name.as_str()));
    assert!((report.max_block_error - worst.max_block_error).abs() < 1e-5 * worst.max_block_error);
    assert!(report.max_block_error > 0.08 && report.max_block_error < 0.3, "{}", report.max_block_error);
    for role in &report.roles {
        let tensor = compared.tensors.iter().find(|t| Some(&t.name) == role.max_block_error_tensor.as_ref()).unwrap();
        assert!(tensor.role == role.role && tensor.max_block_error <= worst.max_block_error);
    }
}

#[track_caller]
fn assert_file(path: &Path) {
    assert!(path.is_file(), "{}", path.display());
}

#[test]
fn a_file_of_a_pack_cannot_leave_the_snapshot() {
    // The name is as close to a path as the format allows.
    use nf4pack::format::{Entry, Layout, Shape, Storage};
    let folder = tempfile::tempdir().unwrap();
    let names =
        ["additional_chat_templates...jinja", "additional_chat_templates.x.py", "additional_chat_templates.ok.jinja"];
    let entry = |name: &&str| Entry {
        name: (*name).to_owned(),
        role: Role::Other,
        layer: None,
        expert: None,
        shape: Shape::new(&[1]).unwrap(),
        storage: Storage::File,
    };
    let layout = Layout::new(names.iter().map(entry).collect(), 0, 2).unwrap();
    let pack = folder.path().join("x.nf4pack");
    fs::write(&pack, layout.assemble(&[b"a", b"b", b"c"], "{}").unwrap()).unwrap();
    let snapshot = folder.path().join("snapshot");
    let report = export(&open(&pack), &snapshot, FloatType::Bf16, &()).unwrap();
    assert_eq!(report.written.files, ["additional_chat_templates/ok.jinja"]);
    assert_file(&snapshot.join("additional_chat_templates/ok.jinja"));
    assert_eq!(fs::read_dir(snapshot.join("additional_chat_templates")).unwrap().count(), 1);
}

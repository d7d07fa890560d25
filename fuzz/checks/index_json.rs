//! A snapshot folder with any model.safetensors.index.json, and at times a changed config.json: it
//! is refused with a reason, or its tensors are those of the shards, each of them readable.

use std::fs;
use std::path::Path;

use arbitrary::{Result, Unstructured};
use nf4pack::convert::source::Checkpoint;
use nf4pack::fuzzing::place;
use serde_json::{Map, Value, json};

use super::{arch_config, json};

const INDEX: &str = "model.safetensors.index.json";
const CONFIG: &str = "config.json";
const SHARDS: [&str; 2] = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

/// Names that an index may have in place of a shard's.
const NAMES: [&str; 12] = [
    "",
    ".",
    "..",
    "/etc/hostname",
    "../model.safetensors",
    "a/b.safetensors",
    "C:\\a",
    "config.json",
    INDEX,
    "model-00003-of-00002.safetensors",
    "folder",
    "a\u{0}b",
];

/// Tensors of a layer, without its prefix.
type Parts = &'static [(&'static str, &'static [u64])];

const ATTENTION: Parts = &[
    ("input_layernorm.weight", &[4]),
    ("self_attn.q_proj.weight", &[4, 4]),
    ("self_attn.k_proj.weight", &[2, 4]),
    ("self_attn.v_proj.weight", &[2, 4]),
    ("self_attn.o_proj.weight", &[4, 4]),
    ("post_attention_layernorm.weight", &[4]),
];
const FEED_FORWARD: Parts =
    &[("mlp.gate_proj.weight", &[6, 4]), ("mlp.up_proj.weight", &[6, 4]), ("mlp.down_proj.weight", &[4, 6])];
const QKV_BIAS: Parts = &[("self_attn.q_proj.bias", &[4]), ("self_attn.k_proj.bias", &[2]), ("self_attn.v_proj.bias", &[2])];
const HEAD_NORMS: Parts = &[("self_attn.q_norm.weight", &[2]), ("self_attn.k_norm.weight", &[2])];
const FEED_FORWARD_NORMS: Parts = &[("pre_feedforward_layernorm.weight", &[4]), ("post_feedforward_layernorm.weight", &[4])];
const FUSED: Parts = &[
    ("input_layernorm.weight", &[4]),
    ("self_attn.qkv_proj.weight", &[8, 4]),
    ("self_attn.o_proj.weight", &[4, 4]),
    ("post_attention_layernorm.weight", &[4]),
    ("mlp.gate_up_proj.weight", &[12, 4]),
    ("mlp.down_proj.weight", &[4, 6]),
];

/// Every family, and the tensors of its layers.
const FAMILIES: [(&str, &[Parts]); 10] = [
    ("llama", &[ATTENTION, FEED_FORWARD]),
    ("gemma", &[ATTENTION, FEED_FORWARD]),
    ("gemma3_text", &[ATTENTION, HEAD_NORMS, FEED_FORWARD, FEED_FORWARD_NORMS]),
    ("granite", &[ATTENTION, FEED_FORWARD]),
    ("mistral", &[ATTENTION, FEED_FORWARD]),
    ("phi3", &[FUSED]),
    ("qwen2", &[ATTENTION, QKV_BIAS, FEED_FORWARD]),
    ("qwen3", &[ATTENTION, HEAD_NORMS, FEED_FORWARD]),
    ("seed_oss", &[ATTENTION, QKV_BIAS, FEED_FORWARD]),
    ("smollm3", &[ATTENTION, FEED_FORWARD]),
];

/// A folder with two shards of one small model, made once.
struct Snapshot {
    folder: tempfile::TempDir,
    model_type: &'static str,
    /// The names of the tensors of each shard.
    tensors: [Vec<String>; 2],
}

thread_local! {
    static SNAPSHOTS: [Snapshot; 10] = FAMILIES.map(|(model_type, parts)| Snapshot::new(model_type, parts));
}

/// Runs the check: text is the index itself; other bytes choose a change of a good one. Their
/// number chooses the family.
pub fn run(bytes: &[u8]) {
    SNAPSHOTS.with(|snapshots| {
        let snapshot = &snapshots[bytes.len() % snapshots.len()];
        if bytes.first().is_none_or(u8::is_ascii) {
            snapshot.check(bytes, &snapshot.config());
        } else {
            let _ = snapshot.edited(&mut Unstructured::new(&bytes[1..]));
        }
    });
}

/// The tensors of a model whose layers have these parts.
fn tensors(parts: &[Parts]) -> Vec<(String, Vec<u64>)> {
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![5, 4])];
    for layer in 0..2 {
        let name = |name: &str| format!("model.layers.{layer}.{name}");
        tensors.extend(parts.iter().copied().flatten().map(|(part, shape)| (name(part), shape.to_vec())));
    }
    tensors.extend([("model.norm.weight".to_owned(), vec![4]), ("lm_head.weight".to_owned(), vec![5, 4])]);
    tensors
}

/// A safetensors file of these tensors, all bfloat16.
pub fn safetensors(tensors: &[(String, Vec<u64>)]) -> Vec<u8> {
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in tensors {
        let start = end;
        end += 2 * shape.iter().product::<u64>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend((0..end).map(|i| (i % 61) as u8));
    file
}

impl Snapshot {
    fn new(model_type: &'static str, parts: &[Parts]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let tensors = tensors(parts);
        let (first, second) = tensors.split_at(9);
        for (name, tensors) in SHARDS.iter().zip([first, second]) {
            fs::write(folder.path().join(name), safetensors(tensors)).expect("a shard");
        }
        fs::create_dir(folder.path().join("folder")).expect("a folder");
        let names = |tensors: &[(String, Vec<u64>)]| tensors.iter().map(|(name, _)| name.clone()).collect();
        let snapshot = Self { tensors: [names(first), names(second)], model_type, folder };
        // As it is, the model is one of its family: what is changed has to be found.
        let index = json!({"weight_map": snapshot.map()}).to_string();
        assert!(snapshot.check(index.as_bytes(), &snapshot.config()), "{model_type}");
        snapshot
    }

    /// The shard of each tensor.
    fn map(&self) -> Map<String, Value> {
        let of = |(shard, names): (&&str, &Vec<String>)| names.iter().map(|name| (name.clone(), json!(shard))).collect();
        SHARDS.iter().zip(&self.tensors).flat_map::<Vec<_>, _>(of).collect()
    }

    fn config(&self) -> Value {
        json!({
            "model_type": self.model_type, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 5, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 16, "tie_word_embeddings": false, "eos_token_id": 1,
            "embedding_multiplier": 1.5, "residual_multiplier": 0.5, "attention_multiplier": 0.5, "logits_scaling": 2.0,
        })
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn edited(&self, u: &mut Unstructured<'_>) -> Result<()> {
        let mut map = self.map();
        for _ in 0..u.int_in_range(0..=3)? {
            let at = u.choose_index(map.len().max(1))?;
            let tensor = map.keys().nth(at).cloned().unwrap_or_default();
            match u.int_in_range(0..=4)? {
                0 => drop(map.remove(&tensor)),
                1 => drop(map.insert(tensor, json!(u.choose(&NAMES)?))),
                2 => drop(map.insert(tensor, json!(u.choose(&SHARDS)?))),
                3 => drop(map.insert(json::string(u)?, json!(u.choose(&SHARDS)?))),
                _ => drop(map.insert(tensor, json::value(u)?)),
            }
        }
        let mut index = json!({"metadata": {"total_size": 1}, "weight_map": map});
        if u.ratio(1, 8)? {
            json::edit(u, &mut index, &["weight_map", "metadata"])?;
        }
        let mut config = if u.ratio(3, 4)? { self.config() } else { arch_config::config(u)? };
        if u.ratio(1, 4)? {
            json::edit(u, &mut config, &arch_config::KEYS)?;
        }
        self.check(&json::bytes(u, &index)?, &config);
        Ok(())
    }

    /// Whether the tensors are a model.
    fn check(&self, index: &[u8], config: &Value) -> bool {
        fs::write(self.path().join(INDEX), index).expect("the index");
        fs::write(self.path().join(CONFIG), config.to_string()).expect("config.json");
        let checkpoint = match Checkpoint::open(self.path(), None) {
            Ok(checkpoint) => checkpoint,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                return false;
            }
        };
        let mut names: Vec<&str> = checkpoint.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), checkpoint.tensors.len(), "each name once");
        assert!(checkpoint.files.iter().all(|file| SHARDS.contains(&file.name.as_str())));
        for tensor in &checkpoint.tensors {
            let mut bytes = vec![0; tensor.length as usize];
            checkpoint.read(tensor, 0, &mut bytes).expect("a tensor lies in its file");
            assert!(checkpoint.read(tensor, 1, &mut bytes).is_err(), "nothing behind it is read");
        }
        for (tensor, shard) in &checkpoint.absent {
            assert!(!names.contains(&tensor.as_str()) && !shard.contains('/'));
        }
        match place(&checkpoint) {
            Ok(parts) => {
                assert!(parts.model.tensors.len() <= checkpoint.tensors.len());
                true
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                false
            }
        }
    }
}

//! The folder of an adapter with its settings, the header of its matrices or its files changed: it
//! is refused with a reason, or has exactly the floats of its layout on the model.

use std::fs;
use std::path::Path;

use arbitrary::{Result, Unstructured};
use nf4pack::arch::ModelConfig;
use nf4pack::fuzzing::{
    ADAPTER_CONFIG as CONFIG, ADAPTER_WEIGHTS as WEIGHTS, LoraConfig, adapter_config, adapter_lengths, new_adapter,
};
use nf4pack::lora::Adapter;
use serde_json::{Value, json};

use super::json;

const KEYS: [&str; 26] = [
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "use_rslora",
    "peft_type",
    "bias",
    "task_type",
    "init_lora_weights",
    "base_model_name_or_path",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "lora_bias",
    "dtype",
    "shape",
    "data_offsets",
    "__metadata__",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "fan_in_fan_out",
];

/// A model, and the folder of a good adapter on it with its two files.
pub struct Base {
    pub model: ModelConfig,
    pub adapter: Adapter,
    folder: tempfile::TempDir,
    config: Value,
    weights: Vec<u8>,
}

thread_local! {
    static BASE: Base = Base::new();
}

/// Runs the check: text is adapter_config.json; bytes from 0xc0 on are the file of matrices; others
/// choose changes of both.
pub fn run(bytes: &[u8]) {
    BASE.with(|base| match bytes.first() {
        None | Some(..0x80) => base.check(bytes, &base.weights),
        Some(0xc0..) => base.check(base.config.to_string().as_bytes(), &bytes[1..]),
        Some(_) => {
            let _ = base.edited(&mut Unstructured::new(&bytes[1..]));
        }
    });
}

impl Base {
    pub fn new() -> Self {
        let config = br#"{"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 20, "max_position_embeddings": 16}"#;
        let model = ModelConfig::parse(config, None).expect("a good configuration");
        let targets = vec![nf4pack::format::Role::QProj, nf4pack::format::Role::DownProj];
        let settings = LoraConfig { rank: 2, alpha: 4.0, dropout: 0.0, targets, rslora: false };
        let adapter = new_adapter(settings, &model).expect("good settings");
        let folder = tempfile::tempdir().expect("a temporary folder");
        adapter.write(folder.path(), &[]).expect("a good adapter");
        let read = |name: &str| fs::read(folder.path().join(name)).expect("a file of the adapter");
        let config = serde_json::from_slice(&read(CONFIG)).expect("JSON");
        Self { model, adapter, weights: read(WEIGHTS), config, folder }
    }

    fn edited(&self, u: &mut Unstructured<'_>) -> Result<()> {
        let mut config = self.config.clone();
        if u.arbitrary()? {
            json::edit(u, &mut config, &KEYS)?;
        }
        let weights = if u.arbitrary()? { edited_safetensors(u, &self.weights)? } else { self.weights.clone() };
        self.check(&json::bytes(u, &config)?, &weights);
        Ok(())
    }

    fn check(&self, config: &[u8], weights: &[u8]) {
        let folder = self.folder.path();
        write(folder, CONFIG, config);
        write(folder, WEIGHTS, weights);
        match Adapter::read(folder, &self.model) {
            Ok(adapter) => {
                let ([floats, expected], config) = (adapter_lengths(&adapter), adapter_config(&adapter));
                assert_eq!(floats, expected);
                assert!(config.rank > 0 && config.alpha > 0.0 && config.scale() > 0.0);
                let _ = adapter.changes_nothing();
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}

pub fn write(folder: &Path, name: &str, bytes: &[u8]) {
    fs::write(folder.join(name), bytes).expect("a file of a temporary folder");
}

/// A safetensors file with its header changed, or its length, or a byte.
pub fn edited_safetensors(u: &mut Unstructured<'_>, file: &[u8]) -> Result<Vec<u8>> {
    let len = file.first_chunk().map_or(0, |len| u64::from_le_bytes(*len)) as usize;
    let (header, data) =
        file.get(8..).and_then(|rest| rest.split_at_checked(len)).ok_or(arbitrary::Error::IncorrectFormat)?;
    let mut header: Value = serde_json::from_slice(header).map_err(|_| arbitrary::Error::IncorrectFormat)?;
    let names =
        ["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight", "lm_head.weight", "dtype", "shape", "data_offsets"];
    json::edit(u, &mut header, &names)?;
    if u.ratio(1, 4)? {
        let tensors: Vec<String> = header.as_object().map(|map| map.keys().cloned().collect()).unwrap_or_default();
        let chosen = u.choose_index(tensors.len().max(1))?;
        let dtype = *u.choose(&["F64", "F32", "F16", "BF16", "I64", "U8", "F8_E4M3", "F4", "BOOL"])?;
        let tensor = tensors.get(chosen).and_then(|tensor| header.get_mut(tensor)).and_then(Value::as_object_mut);
        if let Some(tensor) = tensor {
            tensor.insert("dtype".to_owned(), json!(dtype));
        }
    }
    let header = json::bytes(u, &header)?;
    let len = if u.ratio(1, 16)? { u.arbitrary()? } else { header.len() as u64 };
    let mut out = [&len.to_le_bytes(), &header[..], data].concat();
    if u.ratio(1, 8)? {
        let len = u.int_in_range(0..=out.len() + 64)?;
        out.resize(len, 0);
    }
    Ok(out)
}

//! What becomes of an output projection that is tied to the embedding.

use std::fs;

use serde_json::{Map, json};

use super::*;
use crate::convert::source::CONFIG;
use crate::convert::synth::tensors_of;

/// A checkpoint of a qwen3 model with an output projection; the embedding is all zeros.
fn with_head(head: u8, tied: bool) -> (Model, Checkpoint, tempfile::TempDir) {
    let mut config = json!({
        "model_type": "qwen3", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "vocab_size": 10, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": false,
    });
    // An untied model has them both.
    let tensors = tensors_of(&config).unwrap();
    config["tie_word_embeddings"] = json!(tied);
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in &tensors {
        let length = 2 * shape.iter().product::<u64>();
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [end, end + length]}));
        end += length;
    }
    let json = serde_json::to_vec(&header).unwrap();
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.extend(json);
    bytes.resize(bytes.len() + end as usize, 0);
    *bytes.last_mut().unwrap() = head;
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    fs::write(dir.path().join(CONFIG), config.to_string()).unwrap();
    let checkpoint = Checkpoint::open(dir.path(), None).unwrap();
    (place(&checkpoint).unwrap().model, checkpoint, dir)
}

#[test]
fn a_tied_head_is_dropped_only_where_it_repeats_the_embedding() {
    let heads = |model: &Model| model.tensors.iter().filter(|placed| placed.role == Role::LmHead).count();
    let (mut model, checkpoint, _dir) = with_head(0, true);
    assert_eq!(heads(&model), 1);
    assert_eq!(resolve_tied(&mut model, &checkpoint).unwrap(), Some(Notice::TiedHeadDropped));
    assert_eq!((heads(&model), model.tensors.len()), (0, checkpoint.tensors.len() - 1));
    let (mut model, checkpoint, _dir) = with_head(1, true);
    assert_eq!(resolve_tied(&mut model, &checkpoint).unwrap(), Some(Notice::TiedHeadDiffers));
    assert_eq!((heads(&model), model.config.tied), (1, false));
    let (mut model, checkpoint, _dir) = with_head(0, false);
    assert_eq!(resolve_tied(&mut model, &checkpoint).unwrap(), None);
    assert_eq!(heads(&model), 1);
    let (mut tied, checkpoint, _dir) = with_head(0, true);
    tied.tensors.retain(|placed| placed.role != Role::LmHead);
    assert_eq!(resolve_tied(&mut tied, &checkpoint).unwrap(), None);
}

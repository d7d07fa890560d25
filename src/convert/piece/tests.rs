//! Pieces of tensors far past 2^32 elements and 256 GiB, without their bytes: only what becomes of
//! the last pieces is computed.

use std::fs::{self, File};
use std::io::Write as _;

use serde_json::{Map, json};

use super::super::parts::place;
use super::super::source::Checkpoint;
use super::super::walk::{tensor_pieces, windows};
use super::*;

/// Rows of the feed-forward matrices: each has 2^39 elements, and 1 TiB in bfloat16.
const INTERMEDIATE: u64 = 1 << 27;
const HIDDEN: u64 = 1 << 12;

/// A checkpoint of one layer whose data is a hole; `None` where the file system has no files of
/// that size.
fn checkpoint() -> Option<(Checkpoint, tempfile::TempDir)> {
    let config = json!({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 1,
        "num_attention_heads": 32, "vocab_size": 64, "max_position_embeddings": 16, "tie_word_embeddings": true,
    });
    let (wide, square) = ([INTERMEDIATE, HIDDEN], [HIDDEN, HIDDEN]);
    let layer = [
        ("self_attn.q_proj", &square[..]),
        ("self_attn.k_proj", &square),
        ("self_attn.v_proj", &square),
        ("self_attn.o_proj", &square),
        ("mlp.gate_proj", &wide),
        ("mlp.up_proj", &wide),
        ("mlp.down_proj", &[HIDDEN, INTERMEDIATE]),
        ("input_layernorm", &[HIDDEN]),
        ("post_attention_layernorm", &[HIDDEN]),
    ];
    let layer = layer.map(|(name, shape)| (format!("model.layers.0.{name}.weight"), shape));
    let others = [("model.embed_tokens.weight", &[64, HIDDEN][..]), ("model.norm.weight", &[HIDDEN])];
    let others = others.map(|(name, shape)| (name.to_owned(), shape));
    let (mut header, mut end) = (Map::new(), 0);
    for (name, shape) in layer.into_iter().chain(others) {
        let start = end;
        end += 2 * shape.iter().product::<u64>();
        header.insert(name, json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}));
    }
    let header = serde_json::Value::Object(header).to_string();
    let folder = tempfile::tempdir().unwrap();
    let mut file = File::create(folder.path().join("model.safetensors")).unwrap();
    file.write_all(&[&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()).unwrap();
    file.set_len(8 + header.len() as u64 + end).ok()?;
    fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    Some((Checkpoint::open(folder.path(), None).unwrap(), folder))
}

#[test]
fn the_last_pieces_of_a_terabyte_go_to_the_end_of_their_sections() {
    let Some((checkpoint, _folder)) = checkpoint() else { return };
    let model = place(&checkpoint).unwrap().model;
    for scale_type in [ScaleType::F32, ScaleType::Bf16] {
        let options = Options { scale_type, ..Options::default() };
        let plan = Plan::new(&checkpoint, &model, &options).unwrap();
        for (number, tensor) in checkpoint.tensors.iter().enumerate().filter(|(_, tensor)| tensor.length == 1 << 40) {
            let action = plan.actions[number];
            let Action::Quantise { codes } = action else { panic!("{action:?}") };
            let count = (tensor.length / 2).div_ceil(1 << 17) as usize;
            let piece = tensor_pieces(number, tensor).nth(count - 1).unwrap();
            assert_eq!(
                (piece.first, piece.offset + piece.len as u64),
                ((1 << 39) - (1 << 17), tensor.offset + tensor.length)
            );
            let bytes = vec![0x3f; piece.len];
            let work = Work { plan: &plan, options: &options, tensor, action, piece, bytes: &bytes };
            let outcome = work.run().unwrap();
            let ends: Vec<_> = outcome.writes.iter().map(|write| (write.section, write.offset + write.len)).collect();
            let end = |number: usize| work.section(number).offset + work.section(number).length;
            assert_eq!(ends, [(codes, end(codes)), (codes + 1, end(codes + 1))], "{}", tensor.name);
        }
    }
}

/// A conversion that continues past 256 GiB begins with the piece that it stopped before.
#[test]
fn windows_begin_far_inside_a_file() {
    let Some((checkpoint, _folder)) = checkpoint() else { return };
    let (file, wide) = (&checkpoint.files[0], checkpoint.tensors.iter().position(|t| t.length == 1 << 40).unwrap());
    let piece = tensor_pieces(wide, &checkpoint.tensors[wide]).nth((1 << 39) / (1 << 17) - 2).unwrap();
    let window = windows(file, &checkpoint.tensors, piece.offset, 1 << 18).next().unwrap();
    assert_eq!((window.offset, window.pieces.as_slice()), (piece.offset, &[piece][..]));
    assert!(window.offset > 1 << 39 && window.range_of(&piece) == (0..1 << 18));
}

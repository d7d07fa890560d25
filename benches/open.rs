//! Time of opening a pack: header, index and metadata. One model has the shapes of Qwen3-4B (36
//! layers), the other is a mixture of experts with one tensor per expert (48 layers of 128
//! experts). The packs have no payload.
#![forbid(unsafe_code)]
#![allow(clippy::expect_used, reason = "a benchmark that cannot start fails")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use nf4pack::format::nf4::ScaleType;
use nf4pack::format::{Entry, FloatType, Index, Layout, Role, Shape, Storage};

const METADATA: &str = r#"{"tool":"nf4pack 0.1.0","model_type":"qwen3","tied_embeddings":true,"encoder":"absmax","scales":"bf16","block_size":64,"sources":[]}"#;

const PROJECTIONS: [(&str, Role, [u64; 2]); 7] = [
    ("self_attn.q_proj", Role::QProj, [4096, 2560]),
    ("self_attn.k_proj", Role::KProj, [1024, 2560]),
    ("self_attn.v_proj", Role::VProj, [1024, 2560]),
    ("self_attn.o_proj", Role::OProj, [2560, 4096]),
    ("mlp.gate_proj", Role::GateProj, [9728, 2560]),
    ("mlp.up_proj", Role::UpProj, [9728, 2560]),
    ("mlp.down_proj", Role::DownProj, [2560, 9728]),
];

const NORMS: [(&str, Role, u64); 4] = [
    ("input_layernorm", Role::InputNorm, 2560),
    ("self_attn.q_norm", Role::QNorm, 128),
    ("self_attn.k_norm", Role::KNorm, 128),
    ("post_attention_layernorm", Role::PostAttentionNorm, 2560),
];

fn entry(name: String, role: Role, shape: &[u64], storage: Storage) -> Entry {
    let shape = Shape::new(shape).expect("no dimension is 0");
    Entry { name, role, layer: None, expert: None, shape, storage }
}

/// The tensors of one layer. With experts, each expert has its own feed-forward projections.
fn layer(number: u32, experts: u32) -> impl Iterator<Item = Entry> {
    let nf4 = Storage::Nf4 { scale_type: ScaleType::Bf16, block_size: 64 };
    let raw = Storage::Raw(FloatType::Bf16);
    let name = move |rest: &str| format!("model.layers.{number}.{rest}.weight");
    let norms = NORMS.iter().map(move |&(rest, role, size)| entry(name(rest), role, &[size], raw));
    let projections = PROJECTIONS.iter().flat_map(move |&(rest, role, shape)| {
        let copies = if role >= Role::GateProj { experts } else { 0 };
        let one = (copies == 0).then(|| entry(name(rest), role, &shape, nf4));
        let many = (0..copies).map(move |expert| {
            let name = name(&rest.replace("mlp", &format!("mlp.experts.{expert}")));
            Entry { expert: Some(expert), ..entry(name, role, &shape, nf4) }
        });
        one.into_iter().chain(many)
    });
    norms.chain(projections).map(move |entry| Entry { layer: Some(number), ..entry })
}

/// Header, index and metadata of a pack, and its file length.
fn front(layers: u32, experts: u32) -> (Vec<u8>, u64) {
    let globals = [
        entry("config.json".to_owned(), Role::Other, &[700], Storage::File),
        entry("tokenizer.json".to_owned(), Role::Other, &[11_422_654], Storage::File),
        entry("model.embed_tokens.weight".to_owned(), Role::Embedding, &[151_936, 2560], Storage::Raw(FloatType::Bf16)),
        entry("model.norm.weight".to_owned(), Role::FinalNorm, &[2560], Storage::Raw(FloatType::Bf16)),
    ];
    let entries = globals.into_iter().chain((0..layers).flat_map(|number| layer(number, experts))).collect();
    let layout = Layout::new(entries, layers, METADATA.len() as u64).expect("a valid layout");
    let front = layout.front(&vec![0; layout.sections().len()], 0, METADATA).expect("the planned lengths");
    (front, layout.file_len())
}

fn open(c: &mut Criterion) {
    for (name, layers, experts) in [("open/36 layers", 36, 0), ("open/48 layers of 128 experts", 48, 128)] {
        let (front, file_len) = front(layers, experts);
        let sections = Index::parse(&front, file_len).expect("a valid front").sections().len();
        println!("{name}: {sections} sections, {} bytes, file of {file_len} bytes", front.len());
        c.bench_function(name, |b| b.iter(|| Index::parse(black_box(&front), file_len)));
    }
}

criterion_group!(benches, open);
criterion_main!(benches);

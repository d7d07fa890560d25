//! Packs of each format version, frozen: they stay readable with the same values, and the writer
//! still makes these bytes.
//!
//! The frozen figures were computed by a third reader (in Python, from the specification). A file
//! here never changes; a new minor version gets files of its own, made with
//! `cargo test --test format golden -- --ignored write_missing_golden_files`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common::naive;
use crate::common::{Item, bf16_scales, decode, dq8_scales, f32_scales, faults, pack};
use nf4pack::format::nf4::ScaleType;
use nf4pack::format::{FloatType, Index, Pack, Provenance, Role, crc32};

const METADATA: &str = concat!(
    r#"{"tool":"nf4pack 0.1.0","model_type":"qwen3","tied_embeddings":true,"encoder":"absmax","scales":"bf16","#,
    r#""block_size":32,"sources":[{"file":"model.safetensors","bytes":0,"#,
    r#""sha256":"e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}]}"#
);

const TINY_METADATA: &str = concat!(
    r#"{"tool":"nf4pack 0.1.0","model_type":"qwen3","tied_embeddings":true,"encoder":"absmax","scales":"bf16","#,
    r#""block_size":32,"sources":[]}"#
);

fn path(name: &str) -> std::path::PathBuf {
    std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/golden").join(name)
}

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(path(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// The pack of section 12 of the specification: one file, one raw tensor, one projection.
fn tiny() -> Vec<u8> {
    let mut projection =
        Item::nf4("model.layers.0.self_attn.q_proj.weight", &[2, 4], 32, ScaleType::Bf16, bf16_scales(&[0.5]));
    // The codes 3 7 12 1 5 15 0 9 of the specification's example, then padding.
    projection.payloads[0] = [&[0x73, 0x1c, 0xf5, 0x90][..], &[0x77; 12]].concat();
    let norm = [0x80, 0x3f, 0x00, 0xc0, 0x40, 0x3f];
    let mut raw = Item::raw("model.norm.weight", FloatType::Bf16, &[3]).role(Role::FinalNorm);
    raw.payloads[0] = norm.to_vec();
    let file = Item::file("config.json", b"{\"model_type\":\"qwen3\"}");
    pack(&[file, raw, projection.role(Role::QProj).layer(0)], 1, TINY_METADATA)
}

/// Every kind of section, role by layer, by expert and by stack; all three scale types; a dq8 table
/// of two super-blocks.
fn full() -> Vec<u8> {
    use FloatType::{Bf16, F16, F32};
    let ramp = |n: usize| (1..=n).map(|i| i as f32 * 0.25).collect::<Vec<f32>>();
    let dq8 = dq8_scales(0.0625, &[1.5, 0.1], &(0..282).map(|i| (i * 7) as u8).collect::<Vec<u8>>());
    pack(
        &[
            Item::file("config.json", b"{\"model_type\":\"qwen3\"}\n"),
            Item::file("chat_template.jinja", "{{ 'caf\u{e9}' }}".as_bytes()),
            Item::raw("embed", Bf16, &[5, 8]).role(Role::Embedding),
            Item::raw("norm", F32, &[8]).role(Role::FinalNorm),
            Item::nf4("head", &[5, 8], 32, ScaleType::Bf16, bf16_scales(&ramp(2))).role(Role::LmHead),
            Item::raw("b.other", F32, &[1]),
            Item::raw("a.other", F16, &[2, 1, 1, 3]),
            Item::raw("0.in", Bf16, &[8]).role(Role::InputNorm).layer(0),
            Item::nf4("0.q", &[8, 8], 32, ScaleType::F32, f32_scales(&ramp(2))).role(Role::QProj).layer(0),
            Item::raw("0.k.bias", F16, &[3]).role(Role::KBias).layer(0),
            Item::nf4("0.gate", &[9, 1000], 32, ScaleType::Dq8, dq8).role(Role::GateProj).layer(0),
            Item::raw("1.router", F32, &[2, 8]).role(Role::Router).layer(1),
            Item::nf4("1.gate", &[2, 5, 13], 64, ScaleType::Bf16, bf16_scales(&ramp(3))).role(Role::GateProj).layer(1),
            Item::nf4("1.up.1", &[4, 8], 32, ScaleType::F32, f32_scales(&ramp(1))).role(Role::UpProj).layer(1).expert(1),
            Item::nf4("1.up.0", &[4, 8], 32, ScaleType::F32, f32_scales(&[0.1])).role(Role::UpProj).layer(1).expert(0),
        ],
        2,
        METADATA,
    )
}

/// Negative scales in each type.
fn signed() -> Vec<u8> {
    let dq8 = dq8_scales(-0.5, &[1.0], &[0, 255, 64]);
    pack(
        &[
            Item::nf4("q", &[70], 64, ScaleType::F32, f32_scales(&[-1.5, 0.3])).role(Role::QProj).layer(0),
            Item::nf4("k", &[7, 10], 64, ScaleType::Bf16, bf16_scales(&[2.0, -0.75])).role(Role::KProj).layer(0),
            Item::nf4("v", &[5, 30], 64, ScaleType::Dq8, dq8).role(Role::VProj).layer(0),
        ],
        1,
        METADATA,
    )
}

/// Fused projections: all of one tensor, the other one raw.
fn fused() -> Vec<u8> {
    let table = bf16_scales(&[0.5, 2.0, 1.0, 0.25]);
    pack(
        &[
            Item::nf4("qkv", &[8, 16], 32, ScaleType::Bf16, table).role(Role::QkvProj).layer(0),
            Item::raw("gate_up", FloatType::F16, &[4, 3]).role(Role::GateUpProj).layer(0),
        ],
        1,
        METADATA,
    )
}

/// The four norms of a layer with norms of outputs.
fn output_norms() -> Vec<u8> {
    let norm = |name, role| Item::raw(name, FloatType::Bf16, &[4]).role(role).layer(0);
    pack(
        &[
            norm("a", Role::InputNorm),
            norm("b", Role::PostAttentionNorm),
            norm("c", Role::AttentionOutputNorm),
            norm("d", Role::FeedForwardOutputNorm),
        ],
        1,
        METADATA,
    )
}

type Build = fn() -> Vec<u8>;
const GOLDEN: [(&str, Build); 5] = [
    ("v1.0.nf4pack", tiny),
    ("v1.0-full.nf4pack", full),
    ("v1.0-signed.nf4pack", signed),
    ("v1.0-fused.nf4pack", fused),
    ("v1.0-output-norms.nf4pack", output_norms),
];

#[test]
#[ignore = "makes the files of a new version; never changes one"]
fn write_missing_golden_files() {
    for (name, build) in GOLDEN.into_iter().filter(|(name, _)| !path(name).exists()) {
        std::fs::write(path(name), build()).unwrap();
    }
}

#[test]
fn the_writer_still_makes_these_bytes() {
    for (name, build) in GOLDEN {
        assert!(build() == golden(name), "{name} would be written differently today");
    }
}

#[test]
fn golden_packs_are_valid() {
    for (name, _) in GOLDEN {
        assert_eq!(faults(&golden(name)), [], "{name}");
    }
}

/// What a projection decodes to: name, number of weights, CRC-32 of all as little-endian float32,
/// bits of first and last.
type Frozen = (&'static str, usize, u32, u32, u32);

const FULL: [Frozen; 6] = [
    ("head", 40, 0x980b_9291, 0xbd3d_353f, 0xbf00_0000),
    ("0.q", 64, 0x4c30_b5ac, 0xbd3d_353f, 0x3d22_faff),
    ("0.gate", 9000, 0x7120_7604, 0xbc3d_353f, 0xbe06_0000),
    ("1.gate", 130, 0xac77_15d7, 0xbd3d_353f, 0xbec9_a0c8),
    ("1.up.0", 32, 0xb652_e13a, 0xbc97_5dcc, 0x3c02_6266),
    ("1.up.1", 32, 0x0a9f_7065, 0xbd3d_353f, 0x3ca2_faff),
];

const SIGNED: [Frozen; 3] = [
    ("q", 70, 0x0b22_9d32, 0x3e8d_e7ef, 0xbcdf_c3bb),
    ("k", 70, 0x3121_2c2d, 0xbebd_353f, 0x3d8b_da55),
    ("v", 150, 0x0f93_7568, 0x3dbd_353f, 0x3cba_7871),
];

fn freeze(values: &[f32]) -> (usize, u32, u32, u32) {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    (values.len(), crc32(&bytes), values[0].to_bits(), values[values.len() - 1].to_bits())
}

/// The crate's views and the naive reader both give the frozen values.
fn check_values(bytes: &[u8], frozen: &[Frozen]) {
    let index = Index::parse(bytes, bytes.len() as u64).unwrap();
    let pack = Pack::new(bytes, &index).unwrap();
    assert_eq!(pack.quantized_tensors().count(), frozen.len());
    for (projection, &(name, count, crc, first, last)) in pack.quantized_tensors().zip(frozen) {
        let expected = (name, (count, crc, first, last));
        assert_eq!((projection.name, freeze(&decode(&projection.data))), expected);
    }
    let (_, sections) = naive::read(bytes);
    let pairs = sections.windows(2).filter(|w| w[0].kind == 1);
    for (pair, &(name, count, crc, first, last)) in pairs.zip(frozen) {
        assert_eq!((&*pair[0].name, freeze(&naive::weights(&pair[0], &pair[1]))), (name, (count, crc, first, last)));
    }
}

#[test]
fn projections_decode_to_the_frozen_values() {
    check_values(&golden("v1.0-full.nf4pack"), &FULL);
    check_values(&golden("v1.0-signed.nf4pack"), &SIGNED);
}

#[test]
fn the_tiny_pack_decodes_to_the_values_of_the_specification() {
    let bytes = golden("v1.0.nf4pack");
    let index = Index::parse(&bytes, bytes.len() as u64).unwrap();
    let pack = Pack::new(&bytes, &index).unwrap();
    let projection = pack.layer(0).unwrap().quantized_tensor(Role::QProj).unwrap();
    assert_eq!(projection.shape.dims(), [2, 4]);
    let bits: Vec<u32> = decode(&projection.data).iter().map(|v| v.to_bits()).collect();
    // Half of entries 3 7 12 1 5 15 0 9 of the codebook.
    let expected = [0xbe4a_32a0, 0, 0x3e61_a4b8, 0xbeb2_39b1, 0xbdbd_353f, 0x3f00_0000, 0xbf00_0000, 0x3da4_cae3];
    assert_eq!(bits, expected);
    let norm = pack.raw_tensor("model.norm.weight").unwrap();
    assert_eq!(
        (norm.role, norm.layer, norm.float_type, norm.shape.dims()),
        (Role::FinalNorm, None, FloatType::Bf16, &[3][..])
    );
    assert_eq!(norm.bytes, [0x80, 0x3f, 0x00, 0xc0, 0x40, 0x3f]);
    assert_eq!(pack.file("config.json").unwrap().bytes, b"{\"model_type\":\"qwen3\"}");
    assert_eq!(index.metadata(), TINY_METADATA);
    let provenance = Provenance::from_json(index.metadata()).unwrap();
    assert_eq!((provenance.encoder.as_str(), provenance.block_size, provenance.sources.len()), ("absmax", 32, 0));
}

#[test]
fn raw_tensors_and_files_are_byte_for_byte() {
    let bytes = golden("v1.0-full.nf4pack");
    let (metadata, sections) = naive::read(&bytes);
    assert_eq!(metadata, METADATA);
    let payload = |name: &str| &sections.iter().find(|s| s.name == name).unwrap().payload;
    assert_eq!(payload("chat_template.jinja"), "{{ 'caf\u{e9}' }}".as_bytes());
    let raws: Vec<(&str, u32)> = sections.iter().filter(|s| s.kind == 3).map(|s| (&*s.name, crc32(&s.payload))).collect();
    assert_eq!(raws, RAW);
    let other = sections.iter().find(|s| s.name == "b.other").unwrap();
    assert_eq!(naive::raw_values(other), [f64::from(f32::from_le_bytes([1, 38, 75, 112]))]);
}

const RAW: [(&str, u32); 7] = [
    ("embed", 0x979f_df9b),
    ("norm", 0xfbf5_4ec9),
    ("a.other", 0xb0d5_236a),
    ("b.other", 0xe6b0_65d9),
    ("0.in", 0x401d_dab9),
    ("0.k.bias", 0x0b79_3b03),
    ("1.router", 0xa737_6094),
];

#[test]
fn the_views_of_the_full_pack_show_what_the_naive_reader_sees() {
    let bytes = golden("v1.0-full.nf4pack");
    let index = Index::parse(&bytes, bytes.len() as u64).unwrap();
    let pack = Pack::new(&bytes, &index).unwrap();
    let (_, sections) = naive::read(&bytes);
    assert_eq!(index.sections().len(), sections.len());
    for (ours, naive) in index.sections().iter().zip(&sections) {
        assert_eq!(index.name(ours), naive.name);
        assert_eq!((ours.kind.unwrap().number(), ours.role.number()), (naive.kind, naive.role), "{}", naive.name);
        assert_eq!((ours.layer, ours.expert, ours.block_size), (naive.layer, naive.expert, naive.block_size));
        assert_eq!(ours.element_type.number(), naive.element_type);
        assert_eq!((ours.shape.dims(), pack.payload(ours)), (&*naive.shape, &*naive.payload));
    }
    let layers: Vec<Vec<&str>> = pack.layers().map(|l| l.quantized_tensors().map(|p| p.name).collect()).collect();
    assert_eq!(layers, [vec!["0.q", "0.gate"], vec!["1.gate", "1.up.0", "1.up.1"]]);
    let experts: Vec<Option<u32>> = pack.layer(1).unwrap().quantized_tensors().map(|p| p.expert).collect();
    assert_eq!(experts, [None, Some(0), Some(1)]);
    let files: Vec<&str> = pack.files().map(|f| f.name).collect();
    assert_eq!(files, ["chat_template.jinja", "config.json"]);
    assert!(pack.layers().all(|l| l.file_range().start % 4096 == 0 && !l.bytes().is_empty()));
    assert!(index.header().required_features == 0);
}

#[test]
fn only_the_pack_with_negative_scales_says_so() {
    let signed = |name: &str| Index::parse(&golden(name), golden(name).len() as u64).unwrap().header().signed_scales();
    assert!(signed("v1.0-signed.nf4pack"));
    assert!(!signed("v1.0-full.nf4pack"));
}

#[test]
fn only_the_packs_with_new_roles_have_their_features() {
    let features = ["fused", "output-norms", "signed", "full"].into_iter().zip([2, 4, 1, 0]);
    for (name, expected) in features.map(|(name, expected)| (format!("v1.0-{name}.nf4pack"), expected)) {
        let bytes = golden(&name);
        let index = Index::parse(&bytes, bytes.len() as u64).unwrap();
        assert_eq!(index.header().required_features, expected, "{name}");
    }
    let bytes = golden("v1.0-fused.nf4pack");
    let index = Index::parse(&bytes, bytes.len() as u64).unwrap();
    let layer = Pack::new(&bytes, &index).unwrap().layer(0).unwrap();
    assert_eq!(layer.quantized_tensor(Role::QkvProj).unwrap().shape.dims(), [8, 16]);
    assert_eq!(layer.raw_tensors().map(|raw| raw.role).collect::<Vec<_>>(), [Role::GateUpProj]);
}

/// The bytes of the hex dump in the specification: lines `offset  bytes  ; note`, each at the end
/// of the one before; a line `*` stands for zeros up to the next offset.
fn hex_dump(markdown: &str) -> Vec<u8> {
    let block = markdown.split("```hex\n").nth(1).and_then(|rest| rest.split("```").next()).expect("a ```hex block");
    let (mut bytes, mut zeros) = (Vec::new(), false);
    for line in block.lines() {
        if line.trim() == "*" {
            zeros = true;
            continue;
        }
        let (hex, _) = line.split_once(';').unwrap_or((line, ""));
        let mut words = hex.split_whitespace();
        let offset = usize::from_str_radix(words.next().expect("an offset"), 16).expect(line);
        assert!(offset == bytes.len() || (zeros && offset > bytes.len()), "a line at another offset: {line}");
        bytes.resize(offset, 0);
        bytes.extend(words.map(|word| u8::from_str_radix(word, 16).expect(line)));
        zeros = false;
    }
    bytes
}

#[test]
fn the_hex_dump_of_the_specification_is_the_tiny_pack() {
    let spec = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/spec/nf4pack-format.md")).unwrap();
    let (found, expected) = (hex_dump(&spec), golden("v1.0.nf4pack"));
    let differs = found.iter().zip(&expected).position(|(a, b)| a != b);
    assert_eq!((differs, found.len()), (None, expected.len()), "first differing offset, and length");
}

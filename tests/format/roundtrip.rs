//! Any tensors in, the same tensors out; and packs from later minor versions are read by the rules
//! of this one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common::seal::{seal, seal_payloads};
use crate::common::{self, Item, decode, faults, field, header, layout, naive, pack, put, record};
use nf4pack::format::nf4::{BLOCK_SIZES, ScaleType, block_count, scales_len};
use nf4pack::format::{Field, FloatType, FormatError, Index, Layout, Pack, Role, SectionKind};
use proptest::prelude::*;

/// Bytes of a scale table of `blocks` finite scales, positive unless `signed`.
fn scale_table(scale_type: ScaleType, blocks: usize, signed: bool, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    let mut float = || {
        let magnitude = (next() % 4096) as f32 / 256.0 + 0.125;
        if signed && next() % 2 == 0 { -magnitude } else { magnitude }
    };
    let floats: Vec<f32> = (0..blocks).map(|_| float()).collect();
    match scale_type {
        ScaleType::F32 => common::f32_scales(&floats),
        ScaleType::Bf16 => common::bf16_scales(&floats),
        ScaleType::Dq8 => {
            let super_scales: Vec<f32> = floats.iter().step_by(256).map(|f| f.abs()).collect();
            let codes: Vec<u8> = floats.iter().map(|f| f.to_bits() as u8 ^ (f.to_bits() >> 13) as u8).collect();
            common::dq8_scales(if signed { -1.0 } else { 0.25 }, &super_scales, &codes)
        }
    }
}

fn shapes() -> impl Strategy<Value = Vec<u64>> {
    prop_oneof![
        prop::collection::vec(1_u64..9, 1..=4),
        // One long dimension: lengths around multiples of 8 and of the blocks, and more than 256
        // blocks.
        (0_u64..5, 0_u64..300, 1_u64..4).prop_map(|(fine, blocks, rows)| vec![rows, (32 * blocks + fine).max(1)]),
    ]
}

/// One tensor; names are made unique by the caller.
fn items(signed: bool) -> impl Strategy<Value = Item> {
    let scale_types = prop::sample::select(vec![ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8]);
    let nf4 = (shapes(), prop::sample::select(BLOCK_SIZES.to_vec()), scale_types, any::<u64>()).prop_map(
        move |(shape, block_size, scale_type, seed)| {
            let blocks = block_count(shape.iter().product(), block_size);
            let table = scale_table(scale_type, blocks as usize, signed, seed);
            assert_eq!(Some(table.len() as u64), scales_len(blocks, scale_type));
            Item::nf4("", &shape, block_size, scale_type, table)
        },
    );
    let float_types = prop::sample::select(vec![FloatType::F32, FloatType::F16, FloatType::Bf16]);
    let raw = (shapes(), float_types).prop_map(|(shape, float_type)| Item::raw("", float_type, &shape));
    let file = prop::collection::vec(any::<u8>(), 1..400).prop_map(|bytes| Item::file("", &bytes));
    let tensor =
        (prop_oneof![nf4, raw], prop::sample::select(Role::ALL.to_vec()), any::<Option<u8>>(), any::<Option<u16>>())
            .prop_map(|(mut item, role, layer, expert)| {
                item.entry.role = role;
                item.entry.layer = layer.map(|l| u32::from(l % 3));
                item.entry.expert = expert.filter(|_| layer.is_some()).map(u32::from);
                item
            });
    prop_oneof![4 => tensor, 1 => file]
}

/// Makes names unique, drops tensors whose place is taken, and closes gaps between layers.
fn sets(signed: bool) -> impl Strategy<Value = (Vec<Item>, u32)> {
    prop::collection::vec(items(signed), 0..12).prop_map(|items| {
        let mut kept: Vec<Item> = Vec::new();
        for mut item in items {
            let place = |i: &Item| (i.entry.layer, i.entry.role, i.entry.expert);
            if item.entry.role != Role::Other && kept.iter().any(|k| place(k) == place(&item)) {
                continue;
            }
            item.entry.name = format!("n{}.{}", kept.len() * 7 % 13, kept.len());
            kept.push(item);
        }
        let mut layers: Vec<u32> = kept.iter().filter_map(|i| i.entry.layer).collect();
        layers.sort_unstable();
        layers.dedup();
        for item in &mut kept {
            item.entry.layer = item.entry.layer.and_then(|l| layers.iter().position(|&x| x == l)).map(|l| l as u32);
        }
        (kept, layers.len() as u32)
    })
}

/// What went in is what the views give, and what the naive reader of the specification sees.
fn check_contents(items: &[Item], bytes: &[u8]) {
    let index = Index::parse(bytes, bytes.len() as u64).expect("a pack that was just written");
    let pack = Pack::new(bytes, &index).expect("the pack's own index");
    let (_, sections) = naive::read(bytes);
    let count = |kind: SectionKind| index.sections().iter().filter(|s| s.kind == Some(kind)).count();
    assert_eq!(count(SectionKind::Codes), pack.quantized_tensors().count());
    assert_eq!(count(SectionKind::Raw), pack.raw_tensors().count());
    assert_eq!(count(SectionKind::File), pack.files().count());
    for Item { entry, payloads } in items {
        let place = sections.iter().position(|s| s.name == entry.name).expect("each name");
        let found = &sections[place];
        assert_eq!(&found.payload, &payloads[0]);
        assert_eq!((found.layer, found.expert, found.role), (entry.layer, entry.expert, entry.role.number()));
        if let Some(projection) = pack.quantized_tensor(&entry.name) {
            assert_eq!(found.kind, 1);
            assert_eq!((projection.data.codes, &sections[place + 1].payload), (&*payloads[0], &payloads[1]));
            assert_eq!((projection.shape, projection.role), (&entry.shape, entry.role));
            assert_eq!(decode(&projection.data), naive::weights(found, &sections[place + 1]));
        } else if let Some(raw) = pack.raw_tensor(&entry.name) {
            assert_eq!((found.kind, raw.bytes, raw.shape), (3, &*payloads[0], &entry.shape));
        } else {
            assert_eq!(pack.file(&entry.name).expect("a file").bytes, &*payloads[0]);
        }
    }
    let in_layers: usize = pack.layers().map(|l| l.quantized_tensors().count() + l.raw_tensors().count()).sum();
    assert_eq!(in_layers, items.iter().filter(|i| i.entry.layer.is_some()).count());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 3 } else { 200 }))]

    #[test]
    fn any_tensors_come_back(((items, layers), metadata) in (sets(false), ".{0,300}")) {
        let bytes = pack(&items, layers, &metadata);
        prop_assert_eq!(faults(&bytes), []);
        let index = Index::parse(&bytes, bytes.len() as u64).unwrap();
        prop_assert_eq!(index.metadata(), &metadata);
        prop_assert!(!index.header().signed_scales());
        check_contents(&items, &bytes);
    }

    #[test]
    fn negative_scales_come_back((items, layers) in sets(true)) {
        let bytes = pack(&items, layers, "{}");
        prop_assert_eq!(faults(&bytes), []);
        check_contents(&items, &bytes);
    }

    /// The order in which tensors are handed in does not matter.
    #[test]
    fn the_same_tensors_give_the_same_bytes((items, layers) in sets(true), rotate in 0_usize..12) {
        let mut other = items.clone();
        other.reverse();
        let middle = rotate.min(other.len());
        other.rotate_left(middle);
        let same = pack(&items, layers, "{}") == pack(&other, layers, "{}");
        prop_assert!(same, "the packs differ");
    }

    /// Sections lie in order, aligned, without overlap; a layer is one range.
    #[test]
    fn places_follow_the_rules((items, layers) in sets(false)) {
        let (layout, _) = layout(&items, layers, "{}").unwrap();
        let front = layout.front(&vec![0; layout.sections().len()], 0, "{}").unwrap();
        let mut end = front.len() as u64;
        for section in layout.sections() {
            prop_assert!(section.offset >= end && section.offset - end < 4096 && section.offset % 256 == 0);
            end = section.end();
        }
        prop_assert!(layout.sections().is_empty() || layout.file_len() == end);
        for layer in 0..layers {
            let first = layout.sections().iter().find(|s| s.layer == Some(layer)).unwrap();
            prop_assert_eq!(first.offset % 4096, 0);
        }
    }

    /// Random bytes, with the checksums made right or not, never make the reader panic.
    #[test]
    fn damaged_packs_do_not_panic(
        (items, layers) in sets(true),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        sealed: bool,
    ) {
        let good = pack(&items, layers, "{}");
        let front = Index::parse(&good, good.len() as u64).unwrap().header().front_len() as usize;
        let mut bytes = good.clone();
        for (place, value) in changes {
            bytes[place.index(front)] = value;
        }
        if sealed {
            seal(&mut bytes);
        }
        if bytes != good && !sealed {
            prop_assert!(!faults(&bytes).is_empty());
        }
        if let Ok(index) = Index::parse(&bytes, bytes.len() as u64) {
            let pack = Pack::new(&bytes, &index).unwrap();
            let sections: usize = pack.layers().map(|l| l.sections().len()).sum();
            prop_assert!(sections <= index.sections().len());
            prop_assert!(index.sections().iter().all(|s| pack.payload(s).len() as u64 == s.length));
        }
    }
}

/// A pack whose second tensor of layer 0 is of a kind that this version does not know, with
/// nonsense in the fields that such a kind need not keep.
fn with_unknown_section(flags: u16) -> Vec<u8> {
    let mut bytes = pack(
        &[
            Item::raw("0.norm", FloatType::F32, &[3]).role(Role::InputNorm).layer(0),
            Item::raw("0.later", FloatType::F32, &[5]).layer(0),
            Item::raw("1.norm", FloatType::F32, &[3]).role(Role::InputNorm).layer(1),
        ],
        2,
        "{}",
    );
    put(&mut bytes, field(1, record::KIND), &777_u16.to_le_bytes());
    put(&mut bytes, field(1, record::FLAGS), &flags.to_le_bytes());
    for (at, len) in [(record::ROLE, 2), (record::ELEMENT_TYPE, 2), (record::SCALE_TYPE, 2), (record::RANK, 2)] {
        put(&mut bytes, field(1, at), &[0xee; 2][..len]);
    }
    put(&mut bytes, field(1, record::BLOCK_SIZE), &[0xee; 4]);
    put(&mut bytes, field(1, record::EXPERT), &[0xee; 4]);
    put(&mut bytes, field(1, record::SHAPE), &[0xee; 32]);
    seal_payloads(&mut bytes);
    bytes
}

#[test]
fn an_unknown_optional_section_is_skipped() {
    let bytes = with_unknown_section(1);
    assert_eq!(faults(&bytes), []);
    let index = Index::parse(&bytes, bytes.len() as u64).unwrap();
    let pack = Pack::new(&bytes, &index).unwrap();
    let section = &index.sections()[1];
    assert_eq!((section.kind, index.name(section), section.length, section.layer), (None, "0.later", 20, Some(0)));
    assert_eq!(pack.raw_tensors().map(|t| t.name).collect::<Vec<_>>(), ["0.norm", "1.norm"]);
    assert_eq!(pack.layer(0).unwrap().sections().len(), 2);
    assert_eq!((pack.quantized_tensors().count(), pack.files().count()), (0, 0));
}

#[test]
fn the_checksum_of_an_unknown_section_is_checked() {
    let mut bytes = with_unknown_section(1);
    let offset = common::get_u64(&bytes, field(1, record::OFFSET));
    bytes[offset as usize] ^= 1;
    let found = faults(&bytes);
    assert!(
        matches!(&*found, [FormatError::PayloadChecksum { section: 1, name, .. }] if name == "unknown section of 0.later"),
        "{found:?}"
    );
}

#[test]
fn an_unknown_section_that_is_not_optional_is_refused() {
    let expected = FormatError::Unknown { section: 1, field: Field::Kind, offset: field(1, 0) as u64, found: 777 };
    assert_eq!(faults(&with_unknown_section(0)), [expected]);
}

#[test]
fn a_later_minor_version_and_optional_features_are_read() {
    let mut bytes = common::small_pack();
    put(&mut bytes, header::MINOR, &[0xff, 0xff]);
    put(&mut bytes, header::OPTIONAL, &[0xff; 8]);
    seal(&mut bytes);
    assert_eq!(faults(&bytes), []);
    let index = Index::parse(&bytes, bytes.len() as u64).unwrap();
    assert_eq!((index.header().minor_version, index.header().optional_features), (u16::MAX, u64::MAX));
}

#[test]
fn the_smallest_packs() {
    for metadata in ["", "{}"] {
        let bytes = pack(&[], 0, metadata);
        assert_eq!(faults(&bytes), []);
        assert_eq!(bytes.len(), 256 + metadata.len());
    }
    let one = pack(&[Item::file("a", &[7])], 0, "{}");
    assert_eq!((faults(&one), one.len()), (vec![], 4097));
}

/// The writer refuses all that a reader would refuse.
#[test]
fn the_writer_makes_nothing_that_a_reader_refuses() {
    let raw = |name: &str| Item::raw(name, FloatType::F32, &[2]);
    let refused = |items: &[Item], layers| layout(items, layers, "{}").map(|_| ()).unwrap_err();
    let text = "a".to_owned();
    assert_eq!(
        refused(&[raw("a"), raw("a")], 0),
        FormatError::NameDuplicate { name: 1, offset: 128 + 2 * 96 + 16 + 1, first: 0, text }
    );
    let norm = |name: &str| raw(name).role(Role::InputNorm).layer(0);
    assert_eq!(refused(&[norm("a"), norm("b")], 1), FormatError::Order { section: 1, offset: field(1, 0) as u64 });
    assert_eq!(refused(&[norm("a")], 2), FormatError::LayerMissing { layer: 1, offset: field(1, 0) as u64 });
    let offset = field(0, record::NAME) as u64;
    let text = "x/y".to_owned();
    assert_eq!(refused(&[Item::file("x/y", b"z")], 0), FormatError::FileName { section: 0, offset, text });
    let (field, limit, found, offset) = (Field::MetadataLength, 1 << 24, u64::MAX, 80);
    assert_eq!(Layout::new(vec![], 0, u64::MAX), Err(FormatError::Limit { field, offset, limit, found }));
    let mut huge = raw("a");
    huge.entry.shape = nf4pack::format::Shape::new(&[1 << 62]).unwrap();
    assert_eq!(refused(&[huge.clone()], 0), FormatError::ShapeOverflow { section: 0, shape: [1 << 62, 0, 0, 0] });
    huge.entry.shape = nf4pack::format::Shape::new(&[(1 << 62) - 1]).unwrap();
    let length = u64::MAX - 3;
    assert_eq!(refused(&[huge], 0), FormatError::OffsetOverflow { section: 0, offset: 4096, length });
}

#[test]
fn the_writer_refuses_what_it_was_not_planned_for() {
    let (layout, _) = layout(&[Item::raw("a", FloatType::F32, &[2])], 0, "{}").unwrap();
    let in_header = |field, offset, expected, found| Err(FormatError::Header { field, offset, expected, found });
    assert_eq!(layout.assemble(&[], "{}"), in_header(Field::SectionCount, 56, 1, 0));
    assert_eq!(layout.assemble(&[&[0; 8]], "{ }"), in_header(Field::MetadataLength, 80, 2, 3));
    assert_eq!(layout.front(&[0], 1 << 40, "{}"), Err(FormatError::UnknownFeatures { bits: 1 << 40 }));
    let offset = field(0, record::LENGTH) as u64;
    let error = FormatError::Mismatch { section: 0, field: Field::Length, offset, expected: 8, found: 9 };
    assert_eq!(layout.assemble(&[&[0; 9]], "{}"), Err(error));
}

/// An index belongs to files of its own length only.
#[test]
fn an_index_of_another_file_is_refused() {
    let (a, b) = (pack(&[Item::file("a", &[1])], 0, "{}"), pack(&[Item::file("a", &[1, 2])], 0, "{}"));
    let index = Index::parse(&a, a.len() as u64).unwrap();
    let expected = FormatError::FileLength { expected: a.len() as u64, found: b.len() as u64 };
    assert_eq!(Pack::new(&b, &index).unwrap_err(), expected);
}

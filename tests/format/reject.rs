//! Every way in which a pack can be wrong, one test each: a valid pack is changed in place, its
//! checksums are made right again where they are not what the test is about, and exactly one error
//! comes back, with the fields that it must have.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common::seal::{seal, seal_payloads};
use crate::common::{
    self, Item, bf16_scales, dq8_scales, f32_scales, faults, field, get_u64, header, pack, put, record, small_pack,
};
use nf4pack::format::nf4::ScaleType;
use nf4pack::format::{Field, FloatType, FormatError, Index, Limits, Part, Role};

/// Section numbers of [`small_pack`].
const FILE: usize = 0;
const A: usize = 1;
const B: usize = 2;
const NORM: usize = 3;
const CODES: usize = 4;
const SCALES: usize = 5;
const UP_CODES: usize = 6;
const UP_SCALES: usize = 7;

/// `small_pack` with one value changed and the front's checksums right.
fn changed(offset: usize, value: &[u8]) -> Vec<u8> {
    let mut bytes = small_pack();
    put(&mut bytes, offset, value);
    seal(&mut bytes);
    bytes
}

/// `small_pack` with a field of a record changed.
fn record_field(section: usize, at: usize, value: &[u8]) -> Vec<u8> {
    changed(field(section, at), value)
}

fn unknown(section: usize, field: Field, at: usize, found: u64) -> FormatError {
    FormatError::Unknown { section: section as u64, field, offset: common::field(section, at) as u64, found }
}

fn mismatch(section: usize, field: Field, at: usize, expected: u64, found: u64) -> FormatError {
    FormatError::Mismatch { section: section as u64, field, offset: common::field(section, at) as u64, expected, found }
}

fn zero(section: usize, field: Field, at: usize) -> FormatError {
    FormatError::Zero { section: section as u64, field, offset: common::field(section, at) as u64 }
}

fn limit(field: Field, offset: usize, limit: u64, found: u64) -> FormatError {
    FormatError::Limit { field, offset: offset as u64, limit, found }
}

fn in_header(field: Field, at: usize, expected: u64, found: u64) -> FormatError {
    FormatError::Header { field, offset: at as u64, expected, found }
}

fn order(section: usize) -> FormatError {
    FormatError::Order { section: section as u64, offset: field(section, 0) as u64 }
}

fn unpaired(section: usize) -> FormatError {
    FormatError::Unpaired { section: section as u64, offset: field(section, 0) as u64 }
}

/// Keeps the first `records` records and writes other names behind them. The metadata must stay
/// where it is.
fn reindex(bytes: &mut [u8], records: usize, names: &[&str]) {
    let (mut end, mut ends) = (0, Vec::new());
    for name in names {
        end += name.len() as u64;
        ends.extend_from_slice(&end.to_le_bytes());
    }
    let table = [ends, names.concat().into_bytes()].concat();
    let (start, metadata) = (field(records, 0), get_u64(bytes, header::METADATA_OFFSET) as usize);
    assert_eq!((start + table.len()).next_multiple_of(256), metadata);
    bytes[start..metadata].fill(0);
    put(bytes, start, &table);
    put(bytes, header::SECTION_COUNT, &(records as u64).to_le_bytes());
    put(bytes, header::NAME_COUNT, &(names.len() as u64).to_le_bytes());
    put(bytes, header::INDEX_LEN, &((start + table.len() - header::LEN) as u64).to_le_bytes());
    seal(bytes);
}

fn swap_records(bytes: &mut [u8], a: usize, b: usize) {
    let (left, right) = bytes.split_at_mut(field(b, 0));
    left[field(a, 0)..][..record::LEN].swap_with_slice(&mut right[..record::LEN]);
}

/// Where the name ends and the name text of `small_pack` start.
const NAME_ENDS: usize = header::LEN + 8 * record::LEN;
const NAME_TEXT: usize = NAME_ENDS + 6 * 8;
/// `config.jsonabnormqup`
const TEXT_LEN: u64 = 20;

/// Defines a test for each case, and a list of all cases for the test that no error is left out.
macro_rules! reject {
    ($($(#[$doc:meta])* $name:ident => $case:expr;)+) => {
        $(
            $(#[$doc])*
            #[test]
            fn $name() {
                let (bytes, expected): (Vec<u8>, FormatError) = $case;
                assert_eq!(faults(&bytes), [expected]);
            }
        )+

        const CASES: &[(&str, fn() -> (Vec<u8>, FormatError))] = &[$((stringify!($name), || $case)),+];
    };
}

reject! {
    // Header.
    empty_file => (Vec::new(), FormatError::TooShort { part: Part::Header, expected: 128, found: 0 });
    cut_inside_the_magic => {
        (small_pack()[..7].to_vec(), FormatError::TooShort { part: Part::Header, expected: 128, found: 7 })
    };
    cut_inside_the_header => {
        (small_pack()[..127].to_vec(), FormatError::TooShort { part: Part::Header, expected: 128, found: 127 })
    };
    another_format_and_short => (b"\x89PNG\r\n\x1a\n".to_vec(), FormatError::BadMagic { found: *b"\x89PNG\r\n\x1a\n" });
    another_format => (changed(0, b"GGUF"), FormatError::BadMagic { found: *b"GGUF\r\n\x1a\n" });
    /// A later major version may have another header, so its version is looked at before any
    /// checksum.
    later_major_version => {
        let mut bytes = small_pack();
        put(&mut bytes, header::MAJOR, &[2, 0, 7, 0]);
        (bytes, FormatError::UnsupportedVersion { major: 2, minor: 7 })
    };
    major_version_0 => (changed(header::MAJOR, &[0]), FormatError::UnsupportedVersion { major: 0, minor: 0 });
    header_checksum => {
        let mut bytes = small_pack();
        put(&mut bytes, header::MINOR, &[1]);
        let found = nf4pack::format::crc32(&bytes[..124]);
        let expected = u32::from_le_bytes(bytes[124..128].try_into().unwrap());
        (bytes, FormatError::Checksum { part: Part::Header, offset: 0, expected, found })
    };
    unknown_required_feature => (changed(header::REQUIRED, &[0x81]), FormatError::UnknownFeatures { bits: 0x80 });
    highest_required_feature => {
        (changed(header::REQUIRED + 7, &[0x80]), FormatError::UnknownFeatures { bits: 1 << 63 })
    };
    reserved_bytes_behind_the_version => {
        (changed(header::RESERVED_A + 3, &[9]), FormatError::Reserved { offset: 15, found: 9 })
    };
    reserved_bytes_at_the_header_end => {
        (changed(header::RESERVED_B + 23, &[1]), FormatError::Reserved { offset: 123, found: 1 })
    };
    file_cut_short => {
        let mut bytes = small_pack();
        let expected = bytes.len() as u64;
        bytes.pop();
        (bytes, FormatError::FileLength { expected, found: expected - 1 })
    };
    bytes_behind_the_end => {
        let mut bytes = small_pack();
        let expected = bytes.len() as u64;
        bytes.push(0);
        (bytes, FormatError::FileLength { expected, found: expected + 1 })
    };
    /// The header agrees with the file, the last section does not.
    bytes_behind_the_last_section => {
        let mut bytes = small_pack();
        let expected = bytes.len() as u64;
        bytes.push(0);
        let found = bytes.len() as u64;
        put(&mut bytes, header::FILE_LEN, &found.to_le_bytes());
        seal(&mut bytes);
        (bytes, FormatError::FileLength { expected, found })
    };
    last_section_past_the_end => {
        let mut bytes = small_pack();
        let expected = bytes.len() as u64;
        bytes.pop();
        put(&mut bytes, header::FILE_LEN, &(expected - 1).to_le_bytes());
        seal(&mut bytes);
        (bytes, FormatError::FileLength { expected, found: expected - 1 })
    };
    too_many_sections => {
        let found = (1 << 22) + 1_u64;
        let error = limit(Field::SectionCount, header::SECTION_COUNT, 1 << 22, found);
        (changed(header::SECTION_COUNT, &found.to_le_bytes()), error)
    };
    too_many_names => {
        let error = limit(Field::NameCount, header::NAME_COUNT, 1 << 22, u64::MAX);
        (changed(header::NAME_COUNT, &[0xff; 8]), error)
    };
    index_too_long => {
        let error = limit(Field::IndexLength, header::INDEX_LEN, 1 << 30, u64::MAX);
        (changed(header::INDEX_LEN, &[0xff; 8]), error)
    };
    metadata_too_long => {
        let error = limit(Field::MetadataLength, header::METADATA_LEN, 1 << 24, u64::MAX);
        (changed(header::METADATA_LEN, &[0xff; 8]), error)
    };
    too_many_layers => {
        let error = limit(Field::LayerCount, header::LAYER_COUNT, 1 << 16, (1 << 16) + 1);
        (changed(header::LAYER_COUNT, &[1, 0, 1, 0]), error)
    };
    index_offset => {
        (changed(header::INDEX_OFFSET, &[136]), in_header(Field::IndexOffset, header::INDEX_OFFSET, 128, 136))
    };
    index_shorter_than_its_tables => {
        let tables = 8 * 96 + 6 * 8;
        let error = in_header(Field::IndexLength, header::INDEX_LEN, tables, tables - 1);
        (changed(header::INDEX_LEN, &(tables - 1).to_le_bytes()), error)
    };
    more_records_than_the_index_holds => {
        let (count, len) = (1_u64 << 22, get_u64(&small_pack(), header::INDEX_LEN));
        let error = in_header(Field::IndexLength, header::INDEX_LEN, count * 96 + 48, len);
        (changed(header::SECTION_COUNT, &count.to_le_bytes()), error)
    };
    more_names_than_the_index_holds => {
        let (count, len) = (1_u64 << 22, get_u64(&small_pack(), header::INDEX_LEN));
        let error = in_header(Field::IndexLength, header::INDEX_LEN, 8 * 96 + count * 8, len);
        (changed(header::NAME_COUNT, &count.to_le_bytes()), error)
    };
    metadata_overlaps_the_index => {
        let error = in_header(Field::MetadataOffset, header::METADATA_OFFSET, 1024, 768);
        (changed(header::METADATA_OFFSET, &768_u64.to_le_bytes()), error)
    };
    metadata_behind_a_hole => {
        let error = in_header(Field::MetadataOffset, header::METADATA_OFFSET, 1024, 1280);
        (changed(header::METADATA_OFFSET, &1280_u64.to_le_bytes()), error)
    };
    index_past_the_file => {
        let mut bytes = small_pack();
        put(&mut bytes, header::INDEX_LEN, &(1_u64 << 20).to_le_bytes());
        put(&mut bytes, header::METADATA_OFFSET, &((1_u64 << 20) + 256).to_le_bytes());
        seal(&mut bytes);
        let found = bytes.len() as u64;
        (bytes, FormatError::TooShort { part: Part::Index, expected: (1 << 20) + 128, found })
    };
    metadata_past_the_file => {
        let found = small_pack().len() as u64;
        let error = FormatError::TooShort { part: Part::Metadata, expected: 1024 + (1 << 20), found };
        (changed(header::METADATA_LEN, &(1_u64 << 20).to_le_bytes()), error)
    };
    index_checksum => {
        let mut bytes = small_pack();
        let expected = u32::from_le_bytes(bytes[88..92].try_into().unwrap());
        bytes[field(A, record::CRC)] ^= 1;
        let found = nf4pack::format::crc32(&bytes[128..128 + get_u64(&bytes, header::INDEX_LEN) as usize]);
        (bytes, FormatError::Checksum { part: Part::Index, offset: 128, expected, found })
    };
    metadata_checksum => {
        let mut bytes = small_pack();
        let expected = u32::from_le_bytes(bytes[92..96].try_into().unwrap());
        bytes[1024] = b'[';
        let found = nf4pack::format::crc32(&bytes[1024..1024 + get_u64(&bytes, header::METADATA_LEN) as usize]);
        (bytes, FormatError::Checksum { part: Part::Metadata, offset: 1024, expected, found })
    };
    metadata_not_utf8 => (changed(1024 + 3, &[0xff]), FormatError::MetadataNotUtf8 { offset: 1027 });

    // Names.
    name_end_before_its_start => {
        let error = FormatError::NameRange { name: 1, offset: NAME_ENDS as u64 + 8, min: 12, max: TEXT_LEN, found: 3 };
        (changed(NAME_ENDS + 8, &[3]), error)
    };
    empty_name => {
        let error = FormatError::NameRange { name: 1, offset: NAME_ENDS as u64 + 8, min: 12, max: TEXT_LEN, found: 11 };
        (changed(NAME_ENDS + 8, &[11]), error)
    };
    name_end_past_the_text => {
        let error = FormatError::NameRange { name: 5, offset: NAME_ENDS as u64 + 40, min: 19, max: TEXT_LEN, found: TEXT_LEN + 1 };
        (changed(NAME_ENDS + 5 * 8, &[21]), error)
    };
    name_end_past_everything => {
        let error = FormatError::NameRange { name: 0, offset: NAME_ENDS as u64, min: 1, max: TEXT_LEN, found: u64::MAX };
        (changed(NAME_ENDS, &[0xff; 8]), error)
    };
    text_behind_the_last_name => {
        let error = FormatError::NameRange { name: 5, offset: NAME_ENDS as u64 + 40, min: TEXT_LEN, max: TEXT_LEN, found: TEXT_LEN - 1 };
        (changed(NAME_ENDS + 5 * 8, &[19]), error)
    };
    text_without_names => {
        let mut bytes = pack(&[], 0, "{}");
        put(&mut bytes, header::INDEX_LEN, &[3]);
        seal(&mut bytes);
        (bytes, FormatError::NameRange { name: 0, offset: 128, min: 3, max: 3, found: 0 })
    };
    name_not_utf8 => {
        (changed(NAME_TEXT + 14, &[0xc3]), FormatError::NameNotUtf8 { name: 3, offset: NAME_TEXT as u64 + 14 })
    };
    /// `é` cut in two by a name's end is two names that are not UTF-8, though the whole text is.
    name_end_inside_a_character => {
        (changed(NAME_TEXT + 11, "\u{e9}".as_bytes()), FormatError::NameNotUtf8 { name: 1, offset: NAME_TEXT as u64 + 11 })
    };
    duplicate_name => {
        (changed(NAME_TEXT + 12, b"a"), FormatError::NameDuplicate { name: 2, offset: NAME_TEXT as u64 + 12, first: 1, text: "a".to_owned() })
    };
    name_too_long => {
        let mut bytes = pack(&[Item::raw(&"n".repeat(4096), FloatType::F32, &[1])], 0, "{}");
        put(&mut bytes, header::INDEX_LEN, &(96 + 8 + 4097_u64).to_le_bytes());
        put(&mut bytes, header::LEN + record::LEN, &4097_u64.to_le_bytes());
        seal(&mut bytes);
        (bytes, limit(Field::NameLength, field(1, 0), 4096, 4097))
    };
    unused_name => {
        let mut bytes = pack(&[Item::raw("ab", FloatType::F32, &[1])], 0, "{}");
        reindex(&mut bytes, 1, &["a", "b"]);
        (bytes, in_header(Field::NameCount, header::NAME_COUNT, 1, 2))
    };
    name_number_past_the_table => {
        let mut bytes = pack(&[Item::raw("a", FloatType::F32, &[1]), Item::raw("b", FloatType::F32, &[1])], 0, "{}");
        reindex(&mut bytes, 2, &["ab"]);
        (bytes, unknown(1, Field::Name, record::NAME, 1))
    };
    file_name_with_a_folder => {
        let text = "../ok.json.".to_owned();
        let error = FormatError::FileName { section: 0, offset: field(FILE, record::NAME) as u64, text: text.clone() };
        (changed(NAME_TEXT, text.as_bytes()), error)
    };
    file_name_with_a_backslash => {
        let text = "ab\\cd.json.".to_owned();
        let error = FormatError::FileName { section: 0, offset: field(FILE, record::NAME) as u64, text: text.clone() };
        (changed(NAME_TEXT, text.as_bytes()), error)
    };
    hidden_file_name => {
        let text = ".onfig.json".to_owned();
        let error = FormatError::FileName { section: 0, offset: field(FILE, record::NAME) as u64, text: text.clone() };
        (changed(NAME_TEXT, b"."), error)
    };

    // Records, one field each.
    reserved_bytes_of_a_record => {
        let offset = field(UP_SCALES, record::LEN - 1);
        (changed(offset, &[3]), FormatError::Reserved { offset: offset as u64, found: 3 })
    };
    unknown_kind => (record_field(A, record::KIND, &[5]), unknown(A, Field::Kind, record::KIND, 5));
    kind_0 => (record_field(A, record::KIND, &[0]), unknown(A, Field::Kind, record::KIND, 0));
    unknown_kind_with_an_unknown_flag => (record_field(A, record::KIND, &[5, 0, 3]), unknown(A, Field::Kind, record::KIND, 5));
    unknown_kind_without_the_optional_flag => {
        (record_field(A, record::KIND, &[5, 0, 2]), unknown(A, Field::Kind, record::KIND, 5))
    };
    flags_of_a_known_kind => (record_field(A, record::FLAGS, &[1]), mismatch(A, Field::Flags, record::FLAGS, 0, 1));
    optional_section_of_length_0 => {
        let mut bytes = record_field(B, record::KIND, &[9, 0, 1]);
        put(&mut bytes, field(B, record::LENGTH), &[0; 8]);
        seal(&mut bytes);
        (bytes, zero(B, Field::Length, record::LENGTH))
    };
    optional_section_with_reserved_bytes => {
        let mut bytes = record_field(B, record::KIND, &[9, 0, 1]);
        put(&mut bytes, field(B, record::RESERVED), &[1]);
        seal(&mut bytes);
        (bytes, FormatError::Reserved { offset: field(B, record::RESERVED) as u64, found: 1 })
    };
    optional_section_in_a_layer_too_high => {
        let mut bytes = record_field(B, record::KIND, &[9, 0, 1]);
        put(&mut bytes, field(B, record::LAYER), &65536_u32.to_le_bytes());
        seal(&mut bytes);
        (bytes, limit(Field::Layer, field(B, record::LAYER), 65535, 65536))
    };
    optional_section_that_overflows => {
        let mut bytes = record_field(B, record::KIND, &[9, 0, 1]);
        put(&mut bytes, field(B, record::LENGTH), &[0xff; 8]);
        seal(&mut bytes);
        (bytes, FormatError::OffsetOverflow { section: 2, offset: 8448, length: u64::MAX })
    };
    unknown_role => (record_field(A, record::ROLE, &[254]), unknown(A, Field::Role, record::ROLE, 254));
    output_norm_without_its_feature => {
        (record_field(A, record::ROLE, &[23]), unknown(A, Field::Role, record::ROLE, 23))
    };
    /// Readers without the feature do not know this role.
    fused_role_without_its_feature => (record_field(A, record::ROLE, &[20]), unknown(A, Field::Role, record::ROLE, 20));
    role_0 => (record_field(A, record::ROLE, &[0]), unknown(A, Field::Role, record::ROLE, 0));
    layer_too_high => {
        let error = limit(Field::Layer, field(NORM, record::LAYER), 65535, 65536);
        (record_field(NORM, record::LAYER, &65536_u32.to_le_bytes()), error)
    };
    expert_too_high => {
        let error = limit(Field::Expert, field(NORM, record::EXPERT), 65535, u64::from(u32::MAX - 1));
        (record_field(NORM, record::EXPERT, &(u32::MAX - 1).to_le_bytes()), error)
    };
    expert_without_a_layer => {
        let error = mismatch(A, Field::Expert, record::EXPERT, u32::MAX.into(), 0);
        (record_field(A, record::EXPERT, &[0; 4]), error)
    };
    unknown_element_type => {
        (record_field(A, record::ELEMENT_TYPE, &[7]), unknown(A, Field::ElementType, record::ELEMENT_TYPE, 7))
    };
    raw_tensor_of_bytes => {
        (record_field(A, record::ELEMENT_TYPE, &[6]), unknown(A, Field::ElementType, record::ELEMENT_TYPE, 6))
    };
    raw_tensor_of_codes => {
        (record_field(A, record::ELEMENT_TYPE, &[4]), unknown(A, Field::ElementType, record::ELEMENT_TYPE, 4))
    };
    raw_tensor_of_scales => {
        (record_field(A, record::ELEMENT_TYPE, &[5]), unknown(A, Field::ElementType, record::ELEMENT_TYPE, 5))
    };
    codes_of_floats => {
        (record_field(CODES, record::ELEMENT_TYPE, &[1]), unknown(CODES, Field::ElementType, record::ELEMENT_TYPE, 1))
    };
    scales_of_floats => {
        (record_field(SCALES, record::ELEMENT_TYPE, &[1]), unknown(SCALES, Field::ElementType, record::ELEMENT_TYPE, 1))
    };
    file_of_floats => {
        (record_field(FILE, record::ELEMENT_TYPE, &[1]), unknown(FILE, Field::ElementType, record::ELEMENT_TYPE, 1))
    };
    scale_type_of_a_raw_tensor => {
        (record_field(A, record::SCALE_TYPE, &[1]), mismatch(A, Field::ScaleType, record::SCALE_TYPE, 0, 1))
    };
    bf16_scale_type_of_a_raw_tensor => {
        (record_field(A, record::SCALE_TYPE, &[2]), mismatch(A, Field::ScaleType, record::SCALE_TYPE, 0, 2))
    };
    dq8_scale_type_of_a_file => {
        (record_field(FILE, record::SCALE_TYPE, &[3]), mismatch(FILE, Field::ScaleType, record::SCALE_TYPE, 0, 3))
    };
    codes_without_a_scale_type => {
        (record_field(CODES, record::SCALE_TYPE, &[0]), unknown(CODES, Field::ScaleType, record::SCALE_TYPE, 0))
    };
    unknown_scale_type => {
        (record_field(SCALES, record::SCALE_TYPE, &[4]), unknown(SCALES, Field::ScaleType, record::SCALE_TYPE, 4))
    };
    block_size_not_in_the_list => {
        (record_field(CODES, record::BLOCK_SIZE, &[96]), unknown(CODES, Field::BlockSize, record::BLOCK_SIZE, 96))
    };
    block_size_0 => {
        (record_field(SCALES, record::BLOCK_SIZE, &[0]), unknown(SCALES, Field::BlockSize, record::BLOCK_SIZE, 0))
    };
    block_size_of_a_raw_tensor => {
        (record_field(A, record::BLOCK_SIZE, &[64]), mismatch(A, Field::BlockSize, record::BLOCK_SIZE, 0, 64))
    };
    block_size_of_a_file => {
        (record_field(FILE, record::BLOCK_SIZE, &[64]), mismatch(FILE, Field::BlockSize, record::BLOCK_SIZE, 0, 64))
    };
    rank_0 => (record_field(A, record::RANK, &[0]), unknown(A, Field::Rank, record::RANK, 0));
    rank_5 => (record_field(A, record::RANK, &[5]), unknown(A, Field::Rank, record::RANK, 5));
    dimension_0 => (record_field(B, record::SHAPE, &[0]), zero(B, Field::Shape, record::SHAPE));
    last_dimension_0 => {
        (record_field(A, record::RANK, &[4]), zero(A, Field::Shape, record::SHAPE + 8))
    };
    dimension_past_the_rank => {
        (record_field(A, record::SHAPE + 24, &[1]), mismatch(A, Field::Shape, record::SHAPE + 24, 0, 1))
    };
    shape_overflows => {
        let shape = [1 << 63, 2, 0, 0];
        let value: Vec<u8> = shape.iter().flat_map(|d: &u64| d.to_le_bytes()).collect();
        let mut bytes = record_field(B, record::SHAPE, &value);
        put(&mut bytes, field(B, record::RANK), &[2]);
        seal(&mut bytes);
        (bytes, FormatError::ShapeOverflow { section: 2, shape })
    };
    f32_bytes_overflow => {
        let value: Vec<u8> = [1_u64 << 62, 1].iter().flat_map(|d: &u64| d.to_le_bytes()).collect();
        (record_field(B, record::SHAPE, &value), FormatError::ShapeOverflow { section: 2, shape: [1 << 62, 1, 0, 0] })
    };
    f16_bytes_overflow => {
        let value = (1_u64 << 63).to_le_bytes();
        (record_field(A, record::SHAPE, &value), FormatError::ShapeOverflow { section: 1, shape: [1 << 63, 0, 0, 0] })
    };
    length_of_a_raw_tensor => (record_field(A, record::LENGTH, &[7]), mismatch(A, Field::Length, record::LENGTH, 6, 7));
    length_of_codes => (record_field(CODES, record::LENGTH, &[17]), mismatch(CODES, Field::Length, record::LENGTH, 32, 17));
    length_of_scales => (record_field(SCALES, record::LENGTH, &[4]), mismatch(SCALES, Field::Length, record::LENGTH, 8, 4));
    length_of_dq8_scales => {
        let error = mismatch(UP_SCALES, Field::Length, record::LENGTH, 4 + 1024 + 4 + 3, 1036);
        (record_field(UP_SCALES, record::LENGTH, &1036_u64.to_le_bytes()), error)
    };
    length_of_a_file => (record_field(FILE, record::LENGTH, &[3]), mismatch(FILE, Field::Length, record::LENGTH, 2, 3));
    offset_plus_length_overflows => {
        let offset = u64::MAX - 1;
        let error = FormatError::OffsetOverflow { section: 1, offset, length: 6 };
        (record_field(A, record::OFFSET, &offset.to_le_bytes()), error)
    };
    file_with_a_role => {
        (record_field(FILE, record::ROLE, &[32]), mismatch(FILE, Field::Role, record::ROLE, 255, 32))
    };
    file_in_a_layer => {
        let error = mismatch(FILE, Field::Layer, record::LAYER, u32::MAX.into(), 0);
        (record_field(FILE, record::LAYER, &[0; 4]), error)
    };
    file_of_an_expert => {
        let error = mismatch(FILE, Field::Expert, record::EXPERT, u32::MAX.into(), 1);
        (record_field(FILE, record::EXPERT, &[1, 0, 0, 0]), error)
    };
    file_of_rank_2 => {
        let mut bytes = record_field(FILE, record::RANK, &[2]);
        put(&mut bytes, field(FILE, record::SHAPE + 8), &[1]);
        seal(&mut bytes);
        (bytes, mismatch(FILE, Field::Rank, record::RANK, 1, 2))
    };

    // Records and their neighbours.
    codes_without_scales_at_the_end => {
        let name = "q".repeat(100);
        let mut bytes = pack(&[Item::nf4(&name, &[4], 32, ScaleType::F32, f32_scales(&[1.0]))], 0, "{}");
        reindex(&mut bytes, 1, &[&name]);
        (bytes, unpaired(0))
    };
    codes_before_a_raw_tensor => {
        let mut bytes = small_pack();
        let raw: Vec<u8> = bytes[field(NORM, 0)..field(CODES, 0)].to_vec();
        put(&mut bytes, field(SCALES, 0), &raw);
        seal(&mut bytes);
        (bytes, unpaired(SCALES))
    };
    scales_at_the_start => {
        let mut bytes = pack(&[Item::nf4("q", &[4], 32, ScaleType::F32, f32_scales(&[1.0]))], 0, "{}");
        swap_records(&mut bytes, 0, 1);
        seal(&mut bytes);
        (bytes, unpaired(0))
    };
    scales_behind_a_raw_tensor => {
        let mut bytes = small_pack();
        swap_records(&mut bytes, CODES, SCALES);
        seal(&mut bytes);
        (bytes, unpaired(CODES))
    };
    scales_of_another_name => (record_field(SCALES, record::NAME, &[5]), unpaired(SCALES));
    scales_of_another_role => (record_field(SCALES, record::ROLE, &[3]), unpaired(SCALES));
    scales_of_another_layer => (record_field(SCALES, record::LAYER, &[1]), unpaired(SCALES));
    scales_of_another_expert => (record_field(SCALES, record::EXPERT, &[0; 4]), unpaired(SCALES));
    scales_of_another_shape => (record_field(SCALES, record::SHAPE, &[11, 0, 0, 0, 0, 0, 0, 0, 3]), unpaired(SCALES));
    scales_of_another_block_size => {
        let mut bytes = record_field(SCALES, record::BLOCK_SIZE, &[64]);
        put(&mut bytes, field(SCALES, record::LENGTH), &[4]);
        seal(&mut bytes);
        (bytes, unpaired(SCALES))
    };
    scales_of_another_scale_type => {
        let mut bytes = record_field(SCALES, record::SCALE_TYPE, &[2]);
        put(&mut bytes, field(SCALES, record::LENGTH), &[4]);
        seal(&mut bytes);
        (bytes, unpaired(SCALES))
    };
    first_two_records_swapped => {
        let mut bytes = small_pack();
        swap_records(&mut bytes, FILE, A);
        seal(&mut bytes);
        // The tensor uses name 1 before name 0 is used, which is seen before the file comes out of
        // order.
        (bytes, mismatch(FILE, Field::Name, record::NAME, 0, 1))
    };
    layer_out_of_order => (record_field(NORM, record::LAYER, &[2]), order(CODES));
    role_out_of_order => (record_field(NORM, record::ROLE, &[3]), order(CODES));
    role_twice_in_a_layer => (record_field(NORM, record::ROLE, &[2]), order(CODES));
    expert_out_of_order => {
        let item = |expert| Item::raw(["x", "y"][expert as usize], FloatType::F32, &[1]).role(Role::UpProj).layer(0).expert(expert);
        let mut bytes = pack(&[item(0), item(1)], 1, "{}");
        put(&mut bytes, field(0, record::EXPERT), &[0xff; 4]);
        seal(&mut bytes);
        (bytes, order(1))
    };
    names_of_role_other_out_of_order => {
        let mut bytes = small_pack();
        put(&mut bytes, NAME_TEXT + 11, b"ba");
        seal(&mut bytes);
        (bytes, order(B))
    };
    name_used_twice => (record_field(B, record::NAME, &[1]), mismatch(B, Field::Name, record::NAME, 2, 1));
    name_skipped => (record_field(B, record::NAME, &[3]), mismatch(B, Field::Name, record::NAME, 2, 3));
    section_misaligned => (record_field(B, record::OFFSET, &8449_u64.to_le_bytes()), mismatch(B, Field::Offset, record::OFFSET, 8448, 8449));
    section_overlaps => (record_field(B, record::OFFSET, &8192_u64.to_le_bytes()), mismatch(B, Field::Offset, record::OFFSET, 8448, 8192));
    section_behind_a_hole => (record_field(B, record::OFFSET, &8704_u64.to_le_bytes()), mismatch(B, Field::Offset, record::OFFSET, 8448, 8704));
    first_section_not_on_a_page => {
        (record_field(FILE, record::OFFSET, &1280_u64.to_le_bytes()), mismatch(FILE, Field::Offset, record::OFFSET, 4096, 1280))
    };
    layer_not_on_a_page => {
        (record_field(NORM, record::OFFSET, &8704_u64.to_le_bytes()), mismatch(NORM, Field::Offset, record::OFFSET, 12288, 8704))
    };
    scales_not_behind_their_codes => {
        let error = mismatch(SCALES, Field::Offset, record::OFFSET, 12288 + 512, 12288);
        (record_field(SCALES, record::OFFSET, &12288_u64.to_le_bytes()), error)
    };
    layer_skipped => {
        let mut bytes = record_field(UP_CODES, record::LAYER, &[2]);
        put(&mut bytes, field(UP_SCALES, record::LAYER), &[2]);
        seal(&mut bytes);
        (bytes, FormatError::LayerMissing { layer: 1, offset: field(UP_CODES, 0) as u64 })
    };
    layer_0_missing => {
        let mut bytes = pack(&[Item::raw("x", FloatType::F32, &[1]).layer(0)], 1, "{}");
        put(&mut bytes, field(0, record::LAYER), &[1]);
        seal(&mut bytes);
        (bytes, FormatError::LayerMissing { layer: 0, offset: 128 })
    };
    last_layer_missing => {
        (changed(header::LAYER_COUNT, &[3]), FormatError::LayerMissing { layer: 2, offset: field(8, 0) as u64 })
    };
    more_layers_than_the_header_says => {
        (changed(header::LAYER_COUNT, &[1]), in_header(Field::LayerCount, header::LAYER_COUNT, 2, 1))
    };

    // Payloads and padding.
    payload_checksum => {
        let mut bytes = small_pack();
        let offset = get_u64(&bytes, field(A, record::OFFSET));
        let expected = nf4pack::format::crc32(&bytes[offset as usize..][..6]);
        bytes[offset as usize + 5] ^= 0x10;
        let found = nf4pack::format::crc32(&bytes[offset as usize..][..6]);
        let name = "raw of a".to_owned();
        (bytes, FormatError::PayloadChecksum { section: 1, name, offset, length: 6, expected, found })
    };
    scale_nan => payload(SCALES, 4, &f32::NAN.to_le_bytes(), |offset| FormatError::ScaleNotFinite {
        section: 5, name: "scales of q".to_owned(), offset, scale: 1, found: "NaN".to_owned(),
    });
    scale_infinite => payload(SCALES, 0, &f32::NEG_INFINITY.to_le_bytes(), |offset| FormatError::ScaleNotFinite {
        section: 5, name: "scales of q".to_owned(), offset, scale: 0, found: "-inf".to_owned(),
    });
    scale_negative => payload(SCALES, 4, &(-1.0_f32).to_le_bytes(), |offset| FormatError::ScaleNegative {
        section: 5, name: "scales of q".to_owned(), offset, scale: 1,
    });
    scale_minus_0 => payload(SCALES, 0, &(-0.0_f32).to_le_bytes(), |offset| FormatError::ScaleNegative {
        section: 5, name: "scales of q".to_owned(), offset, scale: 0,
    });
    dq8_super_scale_infinite => payload(UP_SCALES, 1028, &f32::INFINITY.to_le_bytes(), |offset| FormatError::ScaleNotFinite {
        // The first scale has map entry 0.0, and 0 times infinity is not a number.
        section: 7, name: "scales of up".to_owned(), offset, scale: 0, found: "NaN".to_owned(),
    });
    dq8_map_entry_nan => payload(UP_SCALES, 4 + 4 * 255, &f32::NAN.to_le_bytes(), |offset| FormatError::ScaleNotFinite {
        section: 7, name: "scales of up".to_owned(), offset, scale: 2, found: "NaN".to_owned(),
    });
    dq8_product_overflows => payload(UP_SCALES, 4 + 4 * 128, &f32::MAX.to_le_bytes(), |offset| FormatError::ScaleNotFinite {
        section: 7, name: "scales of up".to_owned(), offset, scale: 1, found: "inf".to_owned(),
    });
    dq8_offset_makes_negative => payload(UP_SCALES, 0, &(-1.5_f32).to_le_bytes(), |offset| FormatError::ScaleNegative {
        section: 7, name: "scales of up".to_owned(), offset, scale: 0,
    });
    bf16_scale_nan => {
        let item = Item::nf4("w", &[4], 32, ScaleType::Bf16, bf16_scales(&[f32::NAN]));
        let error = FormatError::ScaleNotFinite {
            section: 1, name: "scales of w".to_owned(), offset: 4096 + 256, scale: 0, found: "NaN".to_owned(),
        };
        (pack(&[item], 0, "{}"), error)
    };
    /// Element 33, the first past the end, shares a byte with the last one.
    padding_code_in_the_last_byte => payload(CODES, 16, &[0x6 << 4], |offset| FormatError::CodePadding {
        section: 4, name: "codes of q".to_owned(), element: 33, offset: offset + 16, found: 6,
    });
    padding_code_in_a_low_nibble => payload(CODES, 31, &[0x78], |offset| FormatError::CodePadding {
        section: 4, name: "codes of q".to_owned(), element: 62, offset: offset + 31, found: 8,
    });
    padding_code_in_the_last_nibble => payload(CODES, 31, &[0x07], |offset| FormatError::CodePadding {
        section: 4, name: "codes of q".to_owned(), element: 63, offset: offset + 31, found: 0,
    });
    padding_before_the_metadata => {
        let mut bytes = small_pack();
        bytes[1023] = 1;
        (bytes, FormatError::Padding { offset: 1023, found: 1 })
    };
    padding_behind_the_metadata => {
        let mut bytes = small_pack();
        bytes[1024 + 15] = 2;
        (bytes, FormatError::Padding { offset: 1024 + 15, found: 2 })
    };
    padding_between_groups => {
        let mut bytes = small_pack();
        bytes[12287] = 0x80;
        (bytes, FormatError::Padding { offset: 12287, found: 0x80 })
    };
    padding_between_sections => {
        let mut bytes = small_pack();
        bytes[8192 + 6] = 4;
        (bytes, FormatError::Padding { offset: 8192 + 6, found: 4 })
    };
}

/// `small_pack` with bytes of a payload changed and its checksum right, and the error that a test
/// makes of its offset.
fn payload(section: usize, at: usize, value: &[u8], error: impl Fn(u64) -> FormatError) -> (Vec<u8>, FormatError) {
    let mut bytes = small_pack();
    let offset = get_u64(&bytes, field(section, record::OFFSET));
    put(&mut bytes, offset as usize + at, value);
    seal_payloads(&mut bytes);
    (bytes, error(offset))
}

#[test]
fn the_unchanged_pack_is_valid() {
    assert_eq!(faults(&small_pack()), []);
    let mut bytes = small_pack();
    seal_payloads(&mut bytes);
    assert_eq!(bytes, small_pack(), "sealing again changes nothing");
}

/// Several faults in one pack all come back, the sections' first.
#[test]
fn all_faults_of_the_payloads_are_found() {
    let mut bytes = small_pack();
    bytes[8192] ^= 1;
    bytes[8448] ^= 1;
    bytes[12287] = 1;
    let found = faults(&bytes);
    assert!(matches!(
        &*found,
        [
            FormatError::PayloadChecksum { section: 1, .. },
            FormatError::PayloadChecksum { section: 2, .. },
            FormatError::Padding { offset: 12287, found: 1 },
        ]
    ));
}

/// Limits below and above those of the specification, on every count; none may make arithmetic
/// overflow.
#[test]
fn limits_are_the_callers() {
    let bytes = small_pack();
    let parse = |limits: &Limits| Index::parse_with(&bytes, bytes.len() as u64, limits);
    let exact = Limits {
        sections: 8,
        name_len: 11,
        index_len: get_u64(&bytes, 48),
        metadata_len: 15,
        layers: 2,
        experts: 0,
        file_len: 2,
        config_len: 2,
    };
    assert!(parse(&exact).is_ok());
    for (limits, field, at, most, found) in [
        (Limits { sections: 7, ..exact.clone() }, Field::SectionCount, header::SECTION_COUNT, 7, 8),
        (Limits { name_len: 10, ..exact.clone() }, Field::NameLength, NAME_ENDS, 10, 11),
        (
            Limits { index_len: exact.index_len - 1, ..exact.clone() },
            Field::IndexLength,
            header::INDEX_LEN,
            exact.index_len - 1,
            exact.index_len,
        ),
        (Limits { metadata_len: 14, ..exact.clone() }, Field::MetadataLength, header::METADATA_LEN, 14, 15),
        (Limits { layers: 1, ..exact.clone() }, Field::LayerCount, header::LAYER_COUNT, 1, 2),
        (Limits { config_len: 1, ..exact.clone() }, Field::FileLength, field(0, record::LENGTH), 1, 2),
    ] {
        assert_eq!(parse(&limits), Err(limit(field, at, most, found)));
    }
}

/// The writer has the same limits: a layout with a longer file is not made.
#[test]
fn embedded_files_have_limits_in_readers_and_writers() {
    for (name, limit) in [("config.json", 16 << 20), ("generation_config.json", 16 << 20), ("tokenizer.json", 256 << 20)] {
        let file = |len: u64| nf4pack::format::Entry {
            name: name.to_owned(),
            role: nf4pack::format::Role::Other,
            layer: None,
            expert: None,
            shape: nf4pack::format::Shape::new(&[len]).unwrap(),
            storage: nf4pack::format::Storage::File,
        };
        assert!(nf4pack::format::Layout::new(vec![file(limit)], 0, 2).is_ok());
        let refused = nf4pack::format::Layout::new(vec![file(limit + 1)], 0, 2).unwrap_err();
        assert!(
            matches!(refused, FormatError::Limit { field: Field::FileLength, limit: l, found, .. } if l == limit && found == limit + 1),
            "{refused}"
        );
    }
}

#[test]
fn claims_of_any_size_do_not_overflow_under_limits_of_any_size() {
    let (sections, name_len, index_len, metadata_len) = (u64::MAX, u64::MAX, u64::MAX, u64::MAX);
    let (layers, experts) = (u32::MAX, u32::MAX);
    let (file_len, config_len) = (u64::MAX, u64::MAX);
    let limits = Limits { sections, name_len, index_len, metadata_len, layers, experts, file_len, config_len };
    let refusal = |fields: &[usize], value: u64, file_len: u64| {
        let mut bytes = small_pack();
        for &at in fields {
            put(&mut bytes, at, &value.to_le_bytes());
        }
        put(&mut bytes, header::FILE_LEN, &file_len.to_le_bytes());
        seal(&mut bytes);
        Index::parse_with(&bytes, file_len, &limits).unwrap_err()
    };
    let index_len = get_u64(&small_pack(), header::INDEX_LEN);
    let expected = in_header(Field::IndexLength, header::INDEX_LEN, u64::MAX, index_len);
    assert_eq!(refusal(&[header::SECTION_COUNT], u64::MAX, 1 << 40), expected);
    assert_eq!(refusal(&[header::NAME_COUNT], u64::MAX, 1 << 40), expected);
    let too_short = FormatError::TooShort { part: Part::Index, expected: u64::MAX, found: small_pack().len() as u64 };
    assert_eq!(refusal(&[header::INDEX_LEN, header::METADATA_OFFSET], u64::MAX, u64::MAX), too_short);
    let expected = FormatError::TooShort { part: Part::Metadata, expected: u64::MAX, found: small_pack().len() as u64 };
    assert_eq!(refusal(&[header::METADATA_LEN], u64::MAX, u64::MAX), expected);
}

/// A front that is shorter than its header says is refused, though the file's length is right.
#[test]
fn a_front_too_short_for_the_index_or_the_metadata() {
    let bytes = small_pack();
    let (file_len, index_end) = (bytes.len() as u64, 128 + get_u64(&bytes, 48) as usize);
    let refusal = |len: usize| Index::parse(&bytes[..len], file_len).unwrap_err();
    let expected =
        |part, expected: usize, found: usize| FormatError::TooShort { part, expected: expected as u64, found: found as u64 };
    assert_eq!(refusal(index_end - 1), expected(Part::Index, index_end, index_end - 1));
    assert_eq!(refusal(index_end), expected(Part::Metadata, 1024 + 15, index_end));
    assert_eq!(refusal(1024 + 14), expected(Part::Metadata, 1024 + 15, 1024 + 14));
    assert!(Index::parse(&bytes[..1024 + 15], file_len).is_ok(), "no payload is needed to open a pack");
}

/// What a scale table's pack says when negative scales are allowed.
#[test]
fn a_negative_scale_is_valid_where_the_header_says_so() {
    let mut bytes = small_pack();
    let offset = get_u64(&bytes, field(SCALES, record::OFFSET)) as usize;
    put(&mut bytes, offset, &(-1.0_f32).to_le_bytes());
    put(&mut bytes, header::REQUIRED, &[1]);
    seal_payloads(&mut bytes);
    assert_eq!(faults(&bytes), []);
}

/// A map entry that no code refers to may be anything.
#[test]
fn an_unused_dq8_map_entry_is_not_restricted() {
    let mut bytes = small_pack();
    let offset = get_u64(&bytes, field(UP_SCALES, record::OFFSET)) as usize;
    put(&mut bytes, offset + 4 + 4, &f32::NAN.to_le_bytes());
    seal_payloads(&mut bytes);
    assert_eq!(faults(&bytes), []);
    assert_eq!(dq8_scales(0.5, &[2.0], &[0, 128, 255])[1028 + 4..], [0, 128, 255]);
}

/// The variants of [`FormatError`], read from its source, since the enum is `non_exhaustive`.
fn variants() -> Vec<&'static str> {
    let source = include_str!("../../src/format/error.rs");
    let body = source.split("pub enum FormatError {").nth(1).expect("the enum").split("\n}\n").next().unwrap();
    let names = body.lines().filter_map(|line| line.strip_prefix("    ")?.strip_suffix(" {"));
    names.filter(|name| name.chars().all(char::is_alphanumeric)).collect()
}

#[test]
fn every_error_has_a_rejection_test() {
    let variants = variants();
    assert!(variants.len() >= 27 && variants.contains(&"BadMagic") && variants.contains(&"Padding"), "{variants:?}");
    let tested: Vec<String> = CASES.iter().map(|(_, case)| format!("{:?}", case().1)).collect();
    let untested = |variant: &&str| !tested.iter().any(|t| t.split([' ', '{']).next() == Some(*variant));
    assert_eq!(variants.into_iter().filter(untested).collect::<Vec<_>>(), Vec::<&str>::new());
}

/// What each error says: place, expected, found.
#[test]
fn messages() {
    let lines: Vec<String> = CASES.iter().map(|(name, case)| format!("{name}: {}", case().1)).collect();
    insta::assert_snapshot!(lines.join("\n"));
}

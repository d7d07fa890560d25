//! The fuzz targets: for each one a function that gets any bytes and panics where something does
//! not hold. Tests run the same functions over the committed files of `corpus` and `regressions`.

pub mod adapter;
pub mod arch_config;
pub mod checkpoint;
pub mod convert_header;
pub mod convert_header_edits;
pub mod dequant;
pub mod index_json;
pub mod jsonl;
pub mod parse;
pub mod parse_edits;
pub mod roundtrip;
pub mod template;
pub mod tokenizer;
pub mod verify;

pub mod json;
#[path = "../../tests/common/seal.rs"]
pub mod seal;

/// The names of the targets, and their checks.
pub const TARGETS: [(&str, fn(&[u8])); 14] = [
    ("adapter", adapter::run),
    ("arch_config", arch_config::run),
    ("checkpoint", checkpoint::run),
    ("convert_header", convert_header::run),
    ("convert_header_edits", convert_header_edits::run),
    ("dequant", dequant::run),
    ("index_json", index_json::run),
    ("jsonl", jsonl::run),
    ("parse", parse::run),
    ("parse_edits", parse_edits::run),
    ("roundtrip", roundtrip::run),
    ("template", template::run),
    ("tokenizer", tokenizer::run),
    ("verify", verify::run),
];

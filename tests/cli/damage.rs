//! Packs that are damaged, cut or contradict themselves, in every command that opens them: the
//! right result, or an error with a code and exit code 1, and no file left over.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;
use crate::common::program::{Failure, PACK, command, failure, place};

use std::fs;
use std::path::Path;

use nf4pack::MappedPack;
use nf4pack::format::{Entry, Layout, Pack, Role, Section, SectionKind, Storage};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/chat.jsonl");
const ADAPTER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/oracle/adapter_final");

/// The commands that run the model of a pack or write its weights.
fn runs() -> [Vec<&'static str>; 5] {
    [
        vec!["eval", PACK, "--data", DATA, "--max-length", "64"],
        vec!["generate", PACK, "--prompt", "a", "--max-tokens", "1"],
        vec!["train", PACK, "--data", DATA, "--out", "out", "--steps", "1", "--max-length", "64", "--rank", "2"],
        vec!["export", PACK, "out"],
        vec!["merge", PACK, "--adapter", ADAPTER, "--base", "dequant", "--out", "out", "--no-compare"],
    ]
}

/// Runs each command on the pack in `folder`, to fail.
fn all_fail(folder: &Path) -> Vec<Failure> {
    let fail = |arguments: &Vec<&str>| {
        let failure = failure(folder, arguments);
        assert_eq!(leftovers(folder, arguments[0]), [""; 0], "{arguments:?}");
        failure
    };
    runs().iter().map(fail).collect()
}

/// What a command has left: hidden files and folders, and the output of one that failed. The folder
/// of a training may remain: the next run continues in it.
fn leftovers(folder: &Path, command: &str) -> Vec<String> {
    if command == "train" {
        let _ = fs::remove_dir_all(folder.join("out"));
    }
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.') || name == "out").collect()
}

/// The pack in `folder`, with other bytes in the embedded file `name`.
fn with_file(folder: &Path, name: &str, bytes: &[u8]) {
    let mapped = MappedPack::read(folder.join(PACK)).unwrap();
    let pack = mapped.pack();
    let index = pack.index();
    let payload = |section: &Section| match index.name(section) == name {
        true => bytes.to_vec(),
        false => pack.payload(section).to_vec(),
    };
    let layout = layout_of(pack, name, bytes.len() as u64);
    // The order of sections does not change.
    let payloads: Vec<Vec<u8>> = index.sections().iter().map(payload).collect();
    let payloads: Vec<&[u8]> = payloads.iter().map(Vec::as_slice).collect();
    fs::write(folder.join(PACK), layout.assemble(&payloads, index.metadata()).unwrap()).unwrap();
}

fn layout_of(pack: Pack<'_>, name: &str, len: u64) -> Layout {
    let index = pack.index();
    let entry = |section: &Section| {
        let storage = match section.kind? {
            SectionKind::Codes => Storage::Nf4 { scale_type: section.scale_type?, block_size: section.block_size },
            SectionKind::Raw => Storage::Raw(section.element_type.float_type()?),
            SectionKind::File => Storage::File,
            SectionKind::Scales => return None,
        };
        let shape = if index.name(section) == name { nf4pack::format::Shape::new(&[len])? } else { section.shape };
        let (role, layer, expert) = (section.role, section.layer, section.expert);
        Some(Entry { name: index.name(section).to_owned(), role, layer, expert, shape, storage })
    };
    let entries = index.sections().iter().filter_map(entry).collect();
    Layout::new(entries, pack.layer_count(), index.metadata().len() as u64).unwrap()
}

/// Changes one bit of a file.
fn flip(path: &Path, offset: u64) {
    let mut bytes = fs::read(path).unwrap();
    bytes[offset as usize] ^= 0x40;
    fs::write(path, bytes).unwrap();
}

/// The first section of the pack that is `wanted`.
fn section(folder: &Path, wanted: impl Fn(&Section) -> bool) -> Section {
    let mapped = MappedPack::read(folder.join(PACK)).unwrap();
    mapped.pack().index().sections().iter().find(|section| wanted(section)).unwrap().clone()
}

#[test]
fn a_changed_bit_in_any_kind_of_section_is_found_by_the_first_load() {
    let Some(_) = common::gpu() else { return };
    let place = place();
    let folder = place.path();
    let last = MappedPack::read(folder.join(PACK)).unwrap().pack().layer_count() - 1;
    let kinds: [&dyn Fn(&Section) -> bool; 5] = [
        &|s| s.kind == Some(SectionKind::Codes) && s.layer == Some(0),
        &|s| s.kind == Some(SectionKind::Scales) && s.layer == Some(last),
        &|s| s.kind == Some(SectionKind::Raw) && s.layer == Some(0),
        &|s| s.role == Role::Embedding,
        &|s| s.role == Role::FinalNorm,
    ];
    for wanted in kinds {
        let damaged = section(folder, wanted);
        // A low bit of a scale or an element, so that its value remains a small number.
        let offset = damaged.offset + damaged.length / 2 / 2 * 2;
        flip(&folder.join(PACK), offset);
        for failure in all_fail(folder) {
            let code = if failure.code == "pack-damaged" { "pack-damaged" } else { "pack-payload-checksum" };
            failure.assert(code, &[PACK, &damaged.offset.to_string(), "checksum"], &["convert"]);
        }
        flip(&folder.join(PACK), offset);
    }
    let file = section(folder, |s| s.kind == Some(SectionKind::File));
    flip(&folder.join(PACK), file.offset + 1);
    all_fail(folder);
}

#[test]
fn config_json_must_describe_exactly_the_layers_of_the_pack() {
    let place = place();
    let folder = place.path();
    let mapped = MappedPack::read(folder.join(PACK)).unwrap();
    let config = String::from_utf8(mapped.pack().file("config.json").unwrap().bytes.to_vec()).unwrap();
    let layers = mapped.pack().layer_count();
    drop(mapped);
    let old = format!("\"num_hidden_layers\": {layers}");
    assert!(config.contains(&old));
    for wrong in [1, layers + 1, 1 << 16, u32::MAX] {
        with_file(folder, "config.json", config.replace(&old, &format!("\"num_hidden_layers\": {wrong}")).as_bytes());
        for failure in all_fail(folder) {
            failure.assert("run-layer-count", &["num_hidden_layers", &wrong.to_string()], &["--config"]);
        }
        command(folder, &["verify", PACK]).assert().success().stderr(predicates::str::contains("num_hidden_layers"));
        command(folder, &["inspect", PACK]).assert().success().stderr(predicates::str::contains("num_hidden_layers"));
    }
}

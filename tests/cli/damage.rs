//! Packs that are damaged, cut or contradict themselves, in every command that opens them: the
//! right result, or an error with a code and exit code 1, and no file left over.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs;
use std::path::Path;

use nf4pack::MappedPack;
use nf4pack::format::{Index, Role, Section, SectionKind, check};

use crate::common::program::{Failure, PACK, campaign, command, failure, names, place};
use crate::common::{self, Item, pack, unpack};

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/chat.jsonl");
const ADAPTER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/oracle/adapter_final");

/// The commands that run the model of a pack or write its weights.
fn runs() -> [Vec<&'static str>; 5] {
    [
        vec!["eval", PACK, "--data", DATA, "--max-length", "64"],
        vec!["generate", PACK, "--prompt", "a", "--max-tokens", "8", "--temperature", "0"],
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

/// What a command has left: hidden files and folders, and the output of one that failed. A training
/// that failed before its first checkpoint may leave its report.
fn leftovers(folder: &Path, command: &str) -> Vec<String> {
    if command == "train" && folder.join("out").exists() && names(&folder.join("out")) == ["report.html"] {
        fs::remove_dir_all(folder.join("out")).unwrap();
    }
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.starts_with('.') || name == "out").collect()
}

/// The pack in `folder`, with other bytes in the embedded file `name`.
fn with_file(folder: &Path, name: &str, bytes: &[u8]) {
    let (mut items, layers, metadata) = unpack(&fs::read(folder.join(PACK)).unwrap());
    items.retain(|item| item.entry.name != name);
    items.push(Item::file(name, bytes));
    fs::write(folder.join(PACK), pack(&items, layers, &metadata)).unwrap();
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

/// [flip]
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

/// [layers]
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

/// Seeded numbers (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// Changes some bytes: a bit, the length, a range copied from another place, a range of zeros, or a
/// byte between sections, which no command reads except `verify`.
fn damage(bytes: &mut Vec<u8>, gaps: &[(u64, u64)], numbers: &mut Numbers) {
    // Half of the changes hit the front, where the structure is.
    let len = if numbers.below(2) == 0 { bytes.len().min(16 << 10) } else { bytes.len() };
    let (at, from, count) = (numbers.below(len), numbers.below(len), 1 + numbers.below(4096));
    let end = (at + count).min(bytes.len());
    match numbers.below(5) {
        0 => bytes[at] ^= 1 << numbers.below(8),
        1 => bytes.truncate(at),
        2 => {
            let copied = bytes[from..].iter().copied().take(end - at).collect::<Vec<_>>();
            bytes[at..at + copied.len()].copy_from_slice(&copied);
        }
        3 => bytes[at..end].fill(0),
        _ => {
            let (start, end) = gaps[numbers.below(gaps.len())];
            bytes[start as usize + numbers.below((end - start) as usize)] = 1;
        }
    }
}

/// What a run computed or wrote.
#[derive(Debug, PartialEq)]
struct Outcome {
    /// The weights of a snapshot or an adapter.
    weights: Option<Vec<u8>>,
    /// Losses, or a text.
    numbers: Vec<serde_json::Value>,
}

/// Runs a command on the pack in `folder`: exit code, outcome, stderr.
fn run(folder: &Path, arguments: &[&str]) -> (Option<i32>, Outcome, serde_json::Value, String) {
    let _ = fs::remove_dir_all(folder.join("out"));
    let output = command(folder, arguments).arg("--json").output().unwrap();
    let weights = ["model.safetensors", "adapter_model.safetensors"].map(|name| fs::read(folder.join("out").join(name)));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let numbers = ["loss", "text", "tokens", "first_loss", "last_loss"].map(|key| document[key].clone());
    let numbers = numbers.into_iter().filter(|number| !number.is_null()).collect();
    let outcome = Outcome { weights: weights.into_iter().find_map(Result::ok), numbers };
    (output.status.code(), outcome, document, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The outcomes with an undamaged pack. Each has something to compare.
fn expected(folder: &Path) -> Vec<Outcome> {
    let outcome = |arguments: &Vec<&str>| {
        let (code, outcome, _, stderr) = run(folder, arguments);
        assert_eq!(code, Some(0), "{stderr}");
        assert!(outcome.weights.is_some() || !outcome.numbers.is_empty(), "{arguments:?}");
        outcome
    };
    runs().iter().map(outcome).collect()
}

/// Random damage (`NF4PACK_CAMPAIGN=N` makes N changes): the right result, or exit code 1 with a
/// code; never a signal, a panic or a file left over.
#[test]
fn random_damage_gives_the_right_result_or_an_error() {
    let Some(_) = common::gpu() else { return };
    let place = place();
    let folder = place.path();
    let good = fs::read(folder.join(PACK)).unwrap();
    let gaps: Vec<_> = check::gaps(&Index::parse(&good, good.len() as u64).unwrap()).collect();
    let expected = expected(folder);
    let changes = campaign(30) as usize;
    let (mut numbers, mut right, mut refused) = (Numbers(0x9e37_79b9_7f4a_7c15), 0, 0);
    for change in 0..changes {
        let mut bytes = good.clone();
        damage(&mut bytes, &gaps, &mut numbers);
        fs::write(folder.join(PACK), &bytes).unwrap();
        let which = change % runs().len();
        let (code, found, document, stderr) = run(folder, &runs()[which]);
        match code {
            Some(0) => {
                assert!(found == expected[which], "change {change}: another result of {:?}", runs()[which]);
                right += 1;
            }
            Some(1) => {
                assert!(document["code"].is_string() && !stderr.contains("panicked"), "change {change}: {stderr}");
                assert_eq!(leftovers(folder, runs()[which][0]), [""; 0], "change {change}: {stderr}");
                refused += 1;
            }
            other => panic!("change {change}: {other:?}, {stderr}"),
        }
    }
    println!("{changes} changes: {right} right results, {refused} errors");
    assert!(refused > 0 && right > 0, "{right} right results, {refused} errors");
    unverified_damage_gives_another_result(folder, good, &expected);
}

/// The comparison of results can fail: damaged weights that are used give another one.
fn unverified_damage_gives_another_result(folder: &Path, mut bytes: Vec<u8>, expected: &[Outcome]) {
    let index = Index::parse(&bytes, bytes.len() as u64).unwrap();
    let codes = index.sections().iter().filter(|s| s.kind == Some(SectionKind::Codes) && s.layer == Some(0));
    codes.for_each(|codes| bytes[codes.offset as usize..codes.end() as usize].fill(0));
    fs::write(folder.join(PACK), bytes).unwrap();
    for (arguments, expected) in runs().iter().zip(expected) {
        let (code, found, _, stderr) = run(folder, &[arguments, ["--no-verify"].as_slice()].concat());
        assert_eq!(code, Some(0), "{arguments:?}: {stderr}");
        assert_ne!(found, *expected, "{arguments:?}");
    }
}

/// [cut] The pack is cut while export writes: an error, or the whole snapshot if all was read
/// before.
#[test]
fn a_pack_that_is_cut_during_an_export_leaves_nothing() {
    let place = place();
    let folder = place.path();
    let good = fs::read(folder.join(PACK)).unwrap();
    for len in [0, 4096, good.len() as u64 / 2, good.len() as u64 - 1] {
        fs::write(folder.join(PACK), &good).unwrap();
        let mut export = std::process::Command::new(assert_cmd::cargo::cargo_bin!("nf4pack"));
        let mut export = export.current_dir(folder).args(["export", PACK, "out", "--quiet"]).spawn().unwrap();
        // Hidden while it is written.
        let begun = || fs::read_dir(folder).unwrap().any(|e| e.unwrap().file_name().to_string_lossy().starts_with('.'));
        while !begun() && export.try_wait().unwrap().is_none() {}
        fs::File::options().write(true).open(folder.join(PACK)).unwrap().set_len(len).unwrap();
        let code = export.wait().unwrap().code();
        assert!(matches!(code, Some(0 | 1)), "{code:?}");
        if code == Some(0) {
            fs::remove_dir_all(folder.join("out")).unwrap();
        }
        assert_eq!(leftovers(folder, "export"), [""; 0]);
    }
}

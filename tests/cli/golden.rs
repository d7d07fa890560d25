//! One golden output of each command, and of its `--help`: `tests/fixtures/golden-cli`.
//!
//! What is measured is left out. `NF4PACK_GOLDEN=update cargo test --test cli golden` writes the
//! files anew; read the difference before it is committed.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs;
use std::path::Path;

use regex::Regex;

use crate::common;
use crate::common::program::{PACK, TINY, command, place};

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden-cli");
/// An adapter of the bundled model.
const ADAPTER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/oracle/adapter_final");
/// Every command that does something.
const COMMANDS: [&str; 16] = [
    "convert",
    "inspect",
    "verify",
    "export",
    "merge",
    "train",
    "eval",
    "generate",
    "doctor",
    "bench",
    "bench convert",
    "bench dequant",
    "bench upload",
    "bench stream",
    "bench train",
    "completions",
];

/// Compares a text with its golden file, or writes that.
#[track_caller]
fn assert_golden(name: &str, found: &str) {
    let path = Path::new(FOLDER).join(format!("{name}.txt"));
    if std::env::var_os("NF4PACK_GOLDEN").is_some_and(|value| value == "update") {
        fs::create_dir_all(FOLDER).unwrap();
        fs::write(&path, found).unwrap();
        return;
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    if found != expected {
        let changed = found.lines().zip(expected.lines()).find(|(a, b)| a != b);
        let (found, expected) = changed.unwrap_or(("(one text is the start of the other)", ""));
        panic!(
            "{} differs:\n  found    {found}\n  expected {expected}\nNF4PACK_GOLDEN=update writes it anew",
            path.display()
        );
    }
}

/// What a command prints on stdout; the text of an assertion names stderr where it fails.
fn stdout(folder: &Path, line: &[&str]) -> String {
    let assert = command(folder, line).assert().success();
    String::from_utf8(assert.get_output().stdout.clone()).unwrap()
}

fn replace(text: &str, pattern: &str, with: &str) -> String {
    Regex::new(pattern).unwrap().replace_all(text, with).into_owned()
}

/// Without times and rates, whose units change with the machine's load, too.
fn untimed(text: &str) -> String {
    let text = replace(text, r"\d[\d.]* ?(ms|min|h|s)\b", "# s");
    let text = replace(&text, r"\d[\d.]* ?[kMGT]?B/s\b", "# B/s");
    replace(&text, r"\d[\d.]*[kMGT]? ?(weights/s|tokens/s)\b", "# $1")
}

/// Without any number, and without what depends on how many digits they have.
fn unnumbered(text: &str) -> String {
    let text = replace(text, r"\b\d[\d.,]*(e-?\d+)?( ?[kMGT]?B| ?[kMGT])?\b", "#");
    let text = replace(&text, "─+", "─");
    replace(&text, " {2,}", "  ")
}

#[test]
fn helps_are_golden() {
    let folder = tempfile::tempdir().unwrap();
    let help = |line: &str| {
        let arguments: Vec<&str> = line.split_whitespace().chain(["--help"]).collect();
        let assert = command(folder.path(), &arguments).env("COLUMNS", "100").assert().success();
        String::from_utf8(assert.get_output().stdout.clone()).unwrap()
    };
    assert_golden("nf4pack.help", &help(""));
    for line in COMMANDS {
        assert_golden(&format!("{}.help", line.replace(' ', "-")), &help(line));
    }
}

#[test]
fn outputs_without_a_gpu_are_golden() {
    let folder = tempfile::tempdir().unwrap();
    let run = |line: &[&str]| untimed(&stdout(folder.path(), line));
    assert_golden("convert", &run(&["convert", TINY, PACK]));
    assert_golden("inspect", &run(&["inspect", PACK]));
    assert_golden("verify", &run(&["verify", PACK, "--against", TINY]));
    assert_golden("export", &run(&["export", PACK, "back"]));
    let merge = ["merge", PACK, "--adapter", ADAPTER, "--base", "dequant", "--out", "merged", "--no-compare"];
    assert_golden("merge", &run(&merge));
    // The script has an entry for every option: its beginning tells that it is one.
    let script = run(&["completions", "bash"]);
    assert_golden("completions", &script.lines().take(12).fold(String::new(), |text, line| text + line + "\n"));
}

#[test]
fn outputs_with_a_gpu_are_golden() {
    let Some(gpu) = common::gpu() else { return };
    let folder = place();
    let data = "{\"prompt\": \"Q: \", \"completion\": \"zebra quartz\"}\n".repeat(4);
    fs::write(folder.path().join("data.jsonl"), data).unwrap();
    let adapter = gpu.adapter();
    // The first line of a benchmark is the GPU; doctor has a table of all there are, and a list of
    // features.
    let run = |line: &str| {
        let text = stdout(folder.path(), &line.split(' ').collect::<Vec<_>>());
        let text = text.replace(&adapter.to_string(), "GPU");
        let text = replace(&text, r"(?m)^[ *]  \d  [A-Za-z].*$", "  GPU");
        unnumbered(&replace(&text, r"(?m)^features .*$", "features"))
    };
    let rows = "--data data.jsonl --micro-batch 1 --max-length 16";
    assert_golden("train", &run(&format!("train {PACK} {rows} --out out --steps 1 --rank 4")));
    assert_golden("eval", &run(&format!("eval {PACK} {rows} --adapter out")));
    assert_golden("generate", &run(&format!("generate {PACK} --prompt Once --max-tokens 3")));
    assert_golden("bench", &run("bench upload --bytes 1MB --runs 1 --threads 2"));
    assert_golden("doctor", &run("doctor"));
}

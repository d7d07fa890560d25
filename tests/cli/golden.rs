//! The golden outputs of each command in `tests/fixtures/golden-cli`: what it prints (`NAME.txt`),
//! its help (`NAME.help.txt`), and an error with its hint (`NAME.error.txt`). They alone fix the
//! wording; other tests match codes, names and numbers.
//!
//! Measured values are left out. `NF4PACK_GOLDEN=update cargo test --test cli golden` writes the
//! files anew; read the difference before you commit it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use regex::Regex;

use crate::common;
use crate::common::program::{PACK, TINY, command, place};

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/golden-cli");
/// An adapter of the bundled model.
const ADAPTER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/oracle/adapter_final");
/// Every command. `bench` is a group: it prints only its help.
const COMMANDS: [&str; 19] = [
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
    "bench matmul",
    "bench upload",
    "bench stream",
    "bench train",
    "bench longest",
    "bench generate",
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

/// The output of a command on stderr when it fails, without names of temporary folders.
fn stderr(folder: &Path, line: &str) -> String {
    let assert = command(folder, &line.split(' ').collect::<Vec<_>>()).assert().failure();
    let text = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    let text = text.replace(folder.to_str().unwrap(), "FOLDER");
    // On a busy machine, work takes long enough for lines of its progress.
    let text = replace(&text, r"(?m)^[a-z ]+: +\d+ %.*\n", "");
    replace(&text, r"nf4pack-bench-\w+", "nf4pack-bench-#")
}

#[test]
fn every_command_has_its_golden_files_and_no_others_exist() {
    let files = |name: &str| {
        let name = name.replace(' ', "-");
        let output = (!["bench", "nf4pack"].contains(&name.as_str())).then(|| format!("{name}.txt"));
        [format!("{name}.help.txt"), format!("{name}.error.txt")].into_iter().chain(output).collect::<Vec<_>>()
    };
    let expected: BTreeSet<String> = COMMANDS.iter().chain(&["nf4pack"]).flat_map(|name| files(name)).collect();
    let names = fs::read_dir(FOLDER).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(names.collect::<BTreeSet<_>>(), expected);
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
    let convert = ["bench", "convert", "--shape", "tiny", "--runs", "1", "--dir", ".", "--threads", "2"];
    assert_golden("bench-convert", &unnumbered(&run(&convert)));
    let longest = ["bench", "longest", "--plan-only", "--shape", "tiny", "--budget", "1MB,120MB"];
    assert_golden("bench-longest", &run(&longest));
    // The script has an entry for every option: its beginning shows that it is a script.
    let script = run(&["completions", "bash"]);
    assert_golden("completions", &script.lines().take(12).fold(String::new(), |text, line| text + line + "\n"));
}

#[test]
fn errors_without_a_gpu_are_golden() {
    let folder = place();
    fs::write(folder.path().join("data.jsonl"), "Once upon a time.\n").unwrap();
    let check = |name: &str, line: &str| assert_golden(&format!("{name}.error"), &stderr(folder.path(), line));
    check("nf4pack", "frobnicate");
    check("convert", &format!("convert {TINY} {PACK}"));
    check("inspect", &format!("inspect {PACK} --layer 9"));
    check("export", "export none back");
    check("merge", &format!("merge {PACK} --adapter none --base dequant --out merged"));
    check("train", &format!("train {PACK} --data data.jsonl --out out"));
    check("eval", &format!("eval {PACK} --data none.jsonl"));
    check("generate", "generate none.nf4pack --prompt Once");
    check("bench", "bench frobnicate");
    check("bench-convert", "bench convert --shape tiny --dir nowhere");
    check("bench-longest", "bench longest --plan-only --budget much");
    check("completions", "completions csh");
    // Damage in the last section.
    let pack = folder.path().join(PACK);
    let mut bytes = fs::read(&pack).unwrap();
    let last = bytes.iter().rposition(|&byte| byte != 0).unwrap();
    bytes[last] ^= 1;
    fs::write(&pack, bytes).unwrap();
    check("verify", &format!("verify {PACK}"));
}

#[test]
fn outputs_with_a_gpu_are_golden() {
    let Some(gpu) = common::gpu() else { return };
    let folder = place();
    let data = "{\"prompt\": \"Q: \", \"completion\": \"zebra quartz\"}\n".repeat(4);
    fs::write(folder.path().join("data.jsonl"), data).unwrap();
    let adapter = gpu.adapter();
    // The first line of a benchmark is the GPU; doctor prints a table of all GPUs, and a list of
    // features.
    let plain = |text: &str| {
        let text = text.replace(&adapter.to_string(), "GPU");
        let text = replace(&text, r"(?m)^[ *]  \d  [A-Za-z].*$", "  GPU");
        unnumbered(&untimed(&replace(&text, r"(?m)^features .*$", "features")))
    };
    let run = |line: &str| plain(&stdout(folder.path(), &line.split(' ').collect::<Vec<_>>()));
    let rows = "--data data.jsonl --micro-batch 1 --max-length 16";
    assert_golden("train", &run(&format!("train {PACK} {rows} --out out --steps 1 --rank 4")));
    assert_golden("eval", &run(&format!("eval {PACK} {rows} --adapter out")));
    assert_golden("generate", &run(&format!("generate {PACK} --prompt Once --max-tokens 3")));
    assert_golden("doctor", &run("doctor"));
    assert_golden("bench-dequant", &run("bench dequant --shape tiny --runs 1 --block-size 32"));
    assert_golden("bench-matmul", &run("bench matmul --shape 64x96 --tokens 3 --runs 1"));
    assert_golden("bench-upload", &run("bench upload --bytes 1MB --runs 1 --threads 2"));
    assert_golden("bench-stream", &run("bench stream --shape tiny --runs 1 --dir ."));
    assert_golden("bench-train", &run("bench train --shape tiny --seq 16 --rank 4 --runs 1 --dir ."));
    assert_golden("bench-generate", &run("bench generate --shape tiny --prompt 3,20 --answer 4 --runs 1 --dir ."));

    let check = |name: &str, line: &str| {
        // The other GPUs of the machine.
        let text = replace(&stderr(folder.path(), line), r"there are: .*", "there are: GPUS");
        assert_golden(&format!("{name}.error"), &plain(&text));
    };
    check("doctor", "doctor none.nf4pack");
    check("bench-dequant", "bench dequant --gpu no-such-gpu");
    check("bench-matmul", "bench matmul --gpu no-such-gpu");
    check("bench-upload", "bench upload --bytes 1000TB");
    check("bench-stream", "bench stream --shape tiny --dir . --budget 4kB");
    check("bench-train", "bench train --shape tiny --dir nowhere");
    check("bench-generate", "bench generate --shape tiny --dir nowhere");
}

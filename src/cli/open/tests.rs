//! Packs that shrink while a command uses them: an error, and nothing left. `--no-mmap` in every
//! command that opens a pack.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs;
use std::path::Path;

use clap::{CommandFactory, Parser};

use crate::cli::args::Cli;
use crate::cli::dispatch;
use crate::cli::failure;
use crate::convert::{Options, convert};
use crate::format::layout::GROUP_ALIGN;
use crate::ops::testing::gpu;
use crate::source::cut::cut_at;

const PACK: &str = "tiny.nf4pack";

fn fixture(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The commands that open a pack, in `folder`; the last three need a GPU.
fn commands(folder: &Path) -> Vec<Vec<String>> {
    let data = folder.join("data.jsonl");
    fs::write(&data, "{\"text\": \"a b c d e f\"}\n").unwrap();
    let (pack, out) = (folder.join(PACK), folder.join("out"));
    let path = |path: &Path| path.display().to_string();
    let (pack, out, data) = (path(&pack), path(&out), path(&data));
    let adapter = path(&fixture("oracle/adapter_final"));
    let lines = [
        format!("verify {pack} --threads 1"),
        format!("inspect {pack} --tensors"),
        format!("export {pack} {out}"),
        format!("merge {pack} --adapter {adapter} --base dequant --out {out} --no-compare"),
        format!("eval {pack} --data {data} --max-length 16"),
        format!("generate {pack} --prompt a --max-tokens 1"),
        format!("train {pack} --data {data} --out {out} --steps 1 --max-length 16 --rank 2"),
    ];
    lines.map(|line| line.split(' ').map(str::to_owned).collect()).into()
}

/// Runs a command; the code of its error.
fn run(arguments: &[String]) -> Result<(), &'static str> {
    let arguments = ["nf4pack".to_owned()]
        .into_iter()
        .chain(arguments.iter().cloned())
        .chain(["--no-mmap", "--json"].map(str::to_owned));
    let cli = Cli::try_parse_from(arguments).unwrap();
    dispatch(&cli.command).map(drop).map_err(|error| failure::code(&error))
}

fn names(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// The names in a folder, except those that were there before, and the report of a training that
/// failed.
fn new_names(folder: &Path) -> Vec<String> {
    let out = folder.join("out");
    if out.exists() && names(&out) == ["report.html"] {
        fs::remove_dir_all(out).unwrap();
    }
    names(folder).into_iter().filter(|name| name != PACK && name != "data.jsonl").collect()
}

/// [cut]
#[test]
fn a_pack_that_is_cut_at_any_read_is_an_error_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let (folder, pack) = (folder.path(), folder.path().join(PACK));
    convert(&fixture("tiny-qwen3"), &pack, Options::default(), &()).unwrap();
    let whole = fs::read(&pack).unwrap();
    let count = if gpu().is_some() { usize::MAX } else { 4 };
    for (command, arguments) in commands(folder).iter().take(count).enumerate() {
        let (done, reads) = cut_at(&pack, None, || run(arguments));
        assert_eq!(done, Ok(()), "{arguments:?}");
        for name in new_names(folder) {
            fs::remove_dir_all(folder.join(name)).unwrap();
        }
        // The first read of a payload follows two of the front. What is left has no payload.
        let front: &[u64] = if command < 4 { &[0, 1, 2] } else { &[] };
        for number in [front, &[reads / 2, reads - 1]].concat() {
            let (done, _) = cut_at(&pack, Some((number, GROUP_ALIGN)), || run(arguments));
            let expected = if number < 2 { "pack-unreadable" } else { "pack-cut-in-use" };
            assert_eq!(done, Err(expected), "{arguments:?}, read {number} of {reads}");
            assert_eq!(new_names(folder), [""; 0], "{arguments:?}, read {number} of {reads}");
            fs::write(&pack, &whole).unwrap();
        }
    }
}

#[test]
fn every_command_that_opens_a_pack_has_no_mmap() {
    let folder = tempfile::tempdir().unwrap();
    let mut listed: Vec<String> = commands(folder.path()).into_iter().map(|mut arguments| arguments.remove(0)).collect();
    listed.push("doctor".to_owned());
    let opens_a_pack = |command: &clap::Command| {
        command.get_positionals().any(|argument| ["pack", "file"].contains(&argument.get_id().as_str()))
    };
    let cli = Cli::command();
    let found: Vec<&clap::Command> = cli.get_subcommands().filter(|command| opens_a_pack(command)).collect();
    assert_eq!(found.len(), listed.len());
    for command in found {
        assert!(listed.contains(&command.get_name().to_owned()), "{}", command.get_name());
        assert!(command.get_arguments().any(|argument| argument.get_long() == Some("no-mmap")), "{}", command.get_name());
    }
}

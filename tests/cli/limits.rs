//! Limits of the system: where it gives no more threads, memory or bytes of a file, a command ends
//! with an error, and leaves nothing behind.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use crate::common::program::{CACHE, PACK, TINY, place};

/// Runs a command under a limit of the shell.
fn limited(folder: &Path, limit: &str, arguments: &str) -> Output {
    let program = assert_cmd::cargo::cargo_bin!("nf4pack");
    let line = format!("ulimit -c 0; {limit}; exec {} {arguments}", program.display());
    let mut shell = Command::new("bash");
    shell.args(["-c", &line]).current_dir(folder).env("NF4PACK_CACHE_DIR", CACHE);
    shell.output().unwrap()
}

/// Asserts an error with exit code 1, without a panic and without leftovers next to `expected`.
#[track_caller]
fn assert_error(output: &Output, folder: &Path, expected: &[&str]) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("error: ") && !stderr.contains("panicked") && !stderr.contains("bug"), "{stderr}");
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    assert_eq!(names, expected, "{stderr}");
    stderr
}

#[test]
fn a_limit_of_file_sizes_is_an_error() {
    let folder = place();
    let adapter = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/oracle/adapter_final");
    for arguments in [
        format!("convert {TINY} out.nf4pack"),
        format!("export {PACK} out"),
        format!("merge {PACK} --adapter {adapter} --base dequant --out out --no-compare"),
    ] {
        let output = limited(folder.path(), "ulimit -f 100", &arguments);
        let stderr = assert_error(&output, folder.path(), &[PACK]);
        assert!(stderr.contains("ulimit -f"), "{arguments}: no hint in {stderr}");
    }
}

#[test]
fn a_limit_of_threads_is_an_error() {
    // The limit does not count for root.
    let folder = place();
    let tried = limited(folder.path(), "ulimit -u 1; (true) || exit 9; true", "--version");
    if tried.status.code() != Some(9) {
        eprintln!("SKIPPED: the system starts processes beyond `ulimit -u`");
        return;
    }
    for arguments in [format!("convert {TINY} out.nf4pack"), format!("verify {PACK}"), format!("export {PACK} out")] {
        let output = limited(folder.path(), "ulimit -u 1", &arguments);
        assert_error(&output, folder.path(), &[PACK]);
    }
}

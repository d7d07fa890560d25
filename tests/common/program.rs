//! The program as its users start it.

use std::path::Path;

use assert_cmd::Command;
use serde_json::Value;

/// The bundled model, and its pack in a [`place`].
pub const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny-qwen3");
pub const PACK: &str = "tiny.nf4pack";

/// The program in `folder`. It keeps nothing between runs.
pub fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = assert_cmd::cargo::cargo_bin_cmd!("nf4pack");
    command.current_dir(folder).env("NF4PACK_CACHE_DIR", "").env_remove("NF4PACK_PROFILE").args(arguments);
    command
}

/// Runs it with `--json`: what it prints.
pub fn json(folder: &Path, arguments: &[&str]) -> Value {
    let assert = command(folder, arguments).arg("--json").assert().success();
    serde_json::from_slice(&assert.get_output().stdout).unwrap()
}

/// Runs it with `--json`, to fail: the code of the error.
pub fn error_code(folder: &Path, arguments: &[&str]) -> String {
    let assert = command(folder, arguments).arg("--json").assert().code(1);
    let document: Value = serde_json::from_slice(&assert.get_output().stdout).unwrap();
    document["code"].as_str().unwrap().to_owned()
}

/// A folder with a pack of the bundled model.
pub fn place() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    command(folder.path(), &["convert", TINY, PACK]).assert().success();
    folder
}

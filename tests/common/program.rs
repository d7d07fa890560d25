//! The program as its users start it.

use std::path::Path;

use assert_cmd::Command;
use serde_json::Value;

/// The bundled model, and its pack in a [`place`].
pub const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny-qwen3");
pub const PACK: &str = "tiny.nf4pack";

/// The cache of all tests: each kernel is tried once on the device, not in every process. A verdict
/// counts only for the same kernel, driver and version.
pub const CACHE: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/nf4pack-cache");

/// The program in `folder`.
pub fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = assert_cmd::cargo::cargo_bin_cmd!("nf4pack");
    command.current_dir(folder).env("NF4PACK_CACHE_DIR", CACHE).env_remove("NF4PACK_PROFILE").args(arguments);
    command
}

/// Runs it with `--json`: what it prints.
pub fn json(folder: &Path, arguments: &[&str]) -> Value {
    let assert = command(folder, arguments).arg("--json").assert().success();
    serde_json::from_slice(&assert.get_output().stdout).unwrap()
}

/// What a command that fails prints with `--json`.
#[derive(Debug)]
pub struct Failure {
    pub code: String,
    pub error: String,
    /// Empty if there is none.
    pub hint: String,
}

/// Runs it with `--json`, to fail with exit code 1.
pub fn failure(folder: &Path, arguments: &[&str]) -> Failure {
    Failure::of(command(folder, arguments))
}

impl Failure {
    /// As [`failure`], for a command with an environment of its own.
    pub fn of(mut command: Command) -> Self {
        let assert = command.arg("--json").assert().code(1);
        let document: Value = serde_json::from_slice(&assert.get_output().stdout).unwrap();
        let text = |key: &str| document[key].as_str().unwrap_or_default().to_owned();
        Self { code: text("code"), error: text("error"), hint: text("hint") }
    }

    /// Checks the code, and that the error and the hint name these things: paths, numbers, flags.
    #[track_caller]
    pub fn assert(&self, code: &str, error: &[&str], hint: &[&str]) {
        assert_eq!(self.code, code, "{self:?}");
        assert!(error.iter().all(|name| self.error.contains(name)), "no {error:?} in {self:?}");
        assert!(hint.iter().all(|name| self.hint.contains(name)), "no {hint:?} in {self:?}");
    }
}

/// The names in a folder, hidden ones too, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// How often a test repeats a random trial: `few` times, or as `NF4PACK_CAMPAIGN` says.
pub fn campaign(few: u64) -> u64 {
    std::env::var("NF4PACK_CAMPAIGN").map_or(few, |count| count.parse().unwrap())
}

/// A folder with a pack of the bundled model.
pub fn place() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    super::write_tiny(&folder.path().join(PACK));
    folder
}

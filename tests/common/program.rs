//! The program as its users start it.

use std::path::Path;

use assert_cmd::Command;

/// The program in `folder`. It keeps nothing between runs.
pub fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = assert_cmd::cargo::cargo_bin_cmd!("nf4pack");
    command.current_dir(folder).env("NF4PACK_CACHE_DIR", "").env_remove("NF4PACK_PROFILE").args(arguments);
    command
}

//! Adapters that were made to hang the program or to fill its memory.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::common::program::{self, PACK};
use serde_json::{Value, json};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";

/// Far more than any of these adapters takes.
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder with an adapter of rank `rank` without matrices.
fn adapter(folder: &Path, rank: u64) -> std::path::PathBuf {
    let adapter = folder.join("a");
    let _ = fs::remove_dir_all(&adapter);
    fs::create_dir(&adapter).unwrap();
    let config = json!({ "peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": "all-linear" });
    fs::write(adapter.join(CONFIG), config.to_string()).unwrap();
    fs::write(adapter.join(WEIGHTS), b"\x02\0\0\0\0\0\0\0{}").unwrap();
    adapter
}

/// The code of the error of `generate` with the adapter, in 4 GB of addresses.
#[track_caller]
fn code(folder: &Path) -> String {
    let began = Instant::now();
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -v 4000000; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_nf4pack"), "generate", PACK]);
    command.args(["--adapter", "a", "--prompt", "a", "--json"]).current_dir(folder).stdin(Stdio::null());
    let output = command.env("NF4PACK_CACHE_DIR", program::CACHE).output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(began.elapsed() < PATIENCE, "{:?}", began.elapsed());
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    document["code"].as_str().unwrap().to_owned()
}

#[test]
fn hostile_adapters_end_with_an_error() {
    let place = program::place();
    let folder = place.path();
    adapter(folder, 8);
    assert_eq!(code(folder), "adapter-no-matrices");
    // [rank]
    adapter(folder, 1 << 24);
    assert_eq!(code(folder), "adapter-no-matrices");
    for name in [CONFIG, WEIGHTS] {
        let replaced = || {
            let path = adapter(folder, 8).join(name);
            fs::remove_file(&path).unwrap();
            path
        };
        // [devzero]
        symlink("/dev/zero", replaced()).unwrap();
        assert_eq!(code(folder), "file-not-regular", "{name}");
        let made = Command::new("mkfifo").arg(replaced()).status().unwrap();
        assert!(made.success());
        assert_eq!(code(folder), "file-not-regular", "{name}");
        fs::create_dir(replaced()).unwrap();
        assert_eq!(code(folder), "file-not-regular", "{name}");
        symlink("/proc/self/environ", replaced()).unwrap();
        assert_eq!(code(folder), if name == CONFIG { "adapter-json" } else { "adapter-safetensors" });
        let file = File::create(replaced()).unwrap();
        // Some file systems have no files of that size.
        if file.set_len(1 << 40).is_ok() {
            assert_eq!(code(folder), if name == CONFIG { "file-too-large" } else { "adapter-safetensors" });
        }
    }
}

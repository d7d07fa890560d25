//! From a checkpoint to a text by a trained adapter, as a user goes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "common/gpu.rs"]
mod common;

use std::fs;
use std::path::Path;

use assert_cmd::Command;
use predicates::prelude::*;
use serde_json::Value;

const PACK: &str = "tiny.nf4pack";

fn command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = assert_cmd::cargo::cargo_bin_cmd!("nf4pack");
    command.current_dir(folder).env("NF4PACK_CACHE_DIR", "").env_remove("NF4PACK_PROFILE").args(arguments);
    command
}

fn json(folder: &Path, arguments: &[&str]) -> Value {
    let assert = command(folder, arguments).arg("--json").assert().success();
    serde_json::from_slice(&assert.get_output().stdout).unwrap()
}

/// A folder with a pack of tiny-qwen3 and data for it.
fn place() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-qwen3");
    command(folder.path(), &["convert", source.to_str().unwrap(), PACK]).assert().success();
    let chat = "{\"prompt\": \"2 + 2 =\", \"completion\": \" four\"}\n{\"prompt\": \"1 + 1 =\", \"completion\": \" two\"}\n";
    fs::write(folder.path().join("chat.jsonl"), chat).unwrap();
    folder
}

#[test]
fn train_resume_eval_and_generate() {
    if common::gpu().is_none() {
        return;
    }
    let place = place();
    let folder = place.path();
    fs::write(folder.join("run.toml"), "rank = 2\ntargets = \"q_proj\"\nsteps = 1\nschedule = \"constant\"\nwarmup = 0\n")
        .unwrap();
    let train = ["train", PACK, "--data", "chat.jsonl", "--out", "out", "--config", "run.toml", "--micro-batch", "1"];
    let done = json(folder, &train);
    assert_eq!((&done["end"], &done["steps"]), (&"complete".into(), &1.into()));
    for name in ["adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "nf4pack-train.toml", "report.html"] {
        assert!(folder.join("out").join(name).is_file(), "{name}");
    }
    let again = command(folder, &train).assert().failure().code(1);
    again.stderr(predicate::str::contains("checkpoints of an earlier run").and(predicate::str::contains("--resume")));
    // A constant rate does not depend on the end of the run: flags win over the file, and it goes on.
    let more = json(folder, &[&train[..], &["--steps", "2", "--resume"]].concat());
    assert_eq!((&more["end"], &more["steps"]), (&"complete".into(), &2.into()));
    assert_eq!(fs::read_to_string(folder.join("out/metrics.jsonl")).unwrap().lines().count(), 2);
    let eval = |adapter: &[&str]| json(folder, &[&["eval", PACK, "--data", "chat.jsonl"], adapter].concat());
    let loss = |eval: &Value| eval["loss"].as_f64().unwrap();
    let (base, tuned) = (eval(&[]), eval(&["--adapter", "out"]));
    assert!(loss(&tuned) < loss(&base), "{tuned} {base}");
    assert!((base["perplexity"].as_f64().unwrap().ln() - loss(&base)).abs() < 1e-9);
    let generate = ["generate", PACK, "--adapter", "out", "--prompt", "2 + 2 =", "--max-tokens", "2"];
    command(folder, &generate).assert().success();
}

#[test]
fn show_batch_marks_what_is_learned_and_needs_no_gpu() {
    let place = place();
    let shown = command(place.path(), &["train", PACK, "--data", "chat.jsonl", "--show-batch"]).assert().success();
    shown.stdout(predicate::str::contains("⟦ two").and(predicate::str::contains("2 + 2 =⟦ four")));
}

#[test]
fn what_cannot_be_trained_is_told_before_anything_is_written() {
    let place = place();
    let folder = place.path();
    fs::write(folder.join("empty.jsonl"), "{\"prompt\": \"a\", \"completion\": 7}\n").unwrap();
    let train = |data: &str| command(folder, &["train", PACK, "--data", data, "--out", "out"]).assert().code(1);
    train("empty.jsonl").stderr(predicate::str::contains("line 1: \"completion\" should be"));
    train("missing.jsonl").stderr(predicate::str::contains("cannot read missing.jsonl"));
    assert!(!folder.join("out").exists());
}

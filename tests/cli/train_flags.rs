//! What the flags of `train` and `eval` leave behind.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;
use crate::common::program;

use std::fs;
use std::path::Path;

use crate::common::program::{PACK, command, place};
use predicates::prelude::*;
use serde_json::{Value, json};

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// A key of all records that have it.
fn metric(out: &Path, key: &str) -> Vec<f64> {
    let text = fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    records.filter_map(|record| record[key].as_f64()).collect()
}

/// The names of checkpoints, also of those that were set aside.
fn checkpoints(out: &Path) -> Vec<String> {
    let names = fs::read_dir(out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.filter(|name| name.contains("checkpoint-")).collect();
    names.sort();
    names
}

const FLAGS: &str = "--rank 2 --dropout 0.1 --rslora --targets q_proj,v_proj --lr 0.02 --warmup 0 --schedule linear --clip 0.5 \
    --weight-decay 0.01 --seed 7 --micro-batch 1 --accumulate 2 --max-length 16 --steps 5 --vram-budget 100MB --eval-data held.jsonl \
    --eval-every 2 --early-stop 1 --save-every 1 --keep 3";

/// Those of [`FLAGS`] that no other file shows.
const SAVED: [&str; 7] = [
    "weight-decay = 0.01",
    "seed = 7",
    "vram-budget = 100000000",
    "eval-every = 2",
    "early-stop = 1",
    "save-every = 1",
    "keep = 3",
];

fn train(flags: &str) -> Vec<&str> {
    ["train", PACK, "--data", "data.jsonl", "--out", "out"].into_iter().chain(flags.split_whitespace()).collect()
}

#[test]
fn every_flag_of_a_training_has_its_effect() {
    if common::gpu().is_none() {
        return;
    }
    let place = place();
    let (folder, out) = (place.path(), &place.path().join("out"));
    // No two samples fit into a row of 16 tokens: an epoch is longer than the two steps of two
    // rows.
    let line = |i: u32| format!("{{\"prompt\": \"Q{i}: \", \"completion\": \"zebra {} quartz\"}}\n", i % 3);
    fs::write(folder.join("data.jsonl"), (0..8).map(line).collect::<String>()).unwrap();
    // Words that the data has none of become less likely.
    fs::write(folder.join("held.jsonl"), "{\"text\": \"Once upon a time.\"}\n").unwrap();
    let small = FLAGS.replace("100MB", "64MB");
    program::failure(folder, &train(&small)).assert("gpu-budget", &["64000000"], &["--vram-budget"]);

    let done = program::json(folder, &train(FLAGS));
    assert!(done["planned_bytes"].as_u64().unwrap() <= 100_000_000, "{done}");
    assert_eq!(
        (&done["end"], &done["steps"], &done["adapter_step"]),
        (&json!("early-stop"), &json!(2), &json!(0)),
        "{done}"
    );
    let config = read_json(&out.join("adapter_config.json"));
    let found = ["r", "lora_dropout", "use_rslora", "target_modules"].map(|key| config[key].clone());
    assert_eq!(found, [json!(2), json!(0.1), json!(true), json!(["q_proj", "v_proj"])]);
    let settings = fs::read_to_string(out.join("nf4pack-train.toml")).unwrap();
    let missing: Vec<&str> = SAVED.into_iter().filter(|saved| !settings.lines().any(|line| line == *saved)).collect();
    assert!(missing.is_empty(), "{missing:?} in {settings}");
    // Of every step, and of both evaluations.
    assert_eq!((metric(out, "clip"), metric(out, "perplexity").len()), (vec![0.5; 2], 2));
    assert_eq!(metric(out, "step"), [0.0, 1.0, 2.0, 2.0]);
    let rates = metric(out, "lr");
    assert!(rates.iter().zip([0.02, 0.016]).all(|(found, expected)| (found - expected).abs() < 1e-12), "{rates:?}");
    assert_eq!(checkpoints(out), ["checkpoint-1", "checkpoint-2"]);
    let state = read_json(&out.join("checkpoint-2/trainer_state.json"));
    assert_eq!(state["state"]["micro_batches"], 4, "{state}");
    let weights = |folder: &str| fs::read(out.join(folder).join("adapter_model.safetensors")).unwrap();
    assert!(weights("") != weights("checkpoint-2"), "the best adapter is that of no step");

    let (losses, last) = (metric(out, "loss"), weights("checkpoint-2"));
    let earlier = [&FLAGS.replace("--keep 3", "--keep 1"), "--resume=out/checkpoint-1"].join(" ");
    let resumed = command(folder, &train(&earlier)).assert().success();
    resumed
        .stderr(predicate::str::is_match("note: .*aside-1-checkpoint-2").unwrap())
        .stdout(predicate::str::contains("2 of 5 steps"));
    assert_eq!(checkpoints(out), ["aside-1-checkpoint-2", "checkpoint-2"]);
    assert_eq!(metric(out, "loss"), losses, "bit for bit");
    assert!(weights("checkpoint-2") == last && weights("aside-1-checkpoint-2") == last);
}

#[test]
fn an_evaluation_counts_the_tokens_that_its_flags_select() {
    if common::gpu().is_none() {
        return;
    }
    let place = place();
    let folder = place.path();
    let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
    let eval = |data: &str, more: &[&str]| {
        let found = program::json(folder, &[&["eval", PACK, "--data", data], more].concat());
        let [tokens, samples] = ["tokens", "samples"].map(|key| found[key].as_u64().unwrap());
        (found["loss"].as_f64().unwrap(), tokens, samples)
    };
    write("pair.jsonl", r#"{"prompt": "2 + 2 =", "completion": " four"}"#);
    write("prompt.txt", "2 + 2 =");
    // A sample of JSON Lines ends with the end token, a plain text with what it says.
    let text = "2 + 2 = four<|im_end|>";
    write("text.txt", text);
    write("text.jsonl", &json!({ "text": text }).to_string());
    let [completion, all] = ["completions", "all"].map(|what| eval("pair.jsonl", &["--train-on", what]));
    let [prompt, plain, line] = ["prompt.txt", "text.txt", "text.jsonl"].map(|data| eval(data, &[]));
    for other in [plain, line] {
        assert!((all.0 - other.0).abs() < 1e-6 && (all.1, all.2) == (other.1, other.2), "{all:?} {other:?}");
    }
    // What is learned of all is what is learned of the prompt and of the completion.
    assert!(completion.1 > 0 && prompt.1 > 0 && all.1 == prompt.1 + completion.1, "{all:?} {prompt:?} {completion:?}");
    let sum = |(loss, tokens, _): (f64, u64, u64)| loss * tokens as f64;
    assert!((sum(all) - sum(prompt) - sum(completion)).abs() < 1e-4, "{all:?} {prompt:?} {completion:?}");

    // The first token of a piece has nothing before it.
    let (_, tokens, pieces) = eval("text.txt", &["--max-length", "4"]);
    assert!(pieces > 1 && tokens + pieces == plain.1 + 1, "{tokens} in {pieces} pieces, {plain:?}");
    let cut = command(folder, &["eval", PACK, "--data", "text.jsonl", "--max-length", "4"]).assert().success();
    let lost = format!("warning: .*--max-length.* 1 sample, {} tokens", plain.1 + 1 - 4);
    cut.stderr(predicate::str::contains(" 4 tokens, 3 of them").and(predicate::str::is_match(lost).unwrap()));
}

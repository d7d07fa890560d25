//! From a checkpoint to a text by a trained adapter, as a user goes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;
use crate::common::program;

use std::fs;
use std::path::Path;

use crate::common::program::{PACK, command, json};
use predicates::prelude::*;
use serde_json::Value;

/// A folder with a pack of tiny-qwen3 and data for it.
fn place() -> tempfile::TempDir {
    let folder = program::place();
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
    let train = [&train[..], &["--base-model", "Qwen/Qwen3-0.6B"]].concat();
    let done = json(folder, &train);
    assert_eq!((&done["end"], &done["steps"]), (&"complete".into(), &1.into()));
    assert!(done["planned_bytes"].as_u64() > Some(0) && done["gpu"]["name"].is_string(), "{done}");
    let adapter: Value = serde_json::from_slice(&fs::read(folder.join("out/adapter_config.json")).unwrap()).unwrap();
    assert_eq!(adapter["base_model_name_or_path"], "Qwen/Qwen3-0.6B");
    for name in ["adapter_model.safetensors", "adapter_config.json", "metrics.jsonl", "nf4pack-train.toml", "report.html"] {
        assert!(folder.join("out").join(name).is_file(), "{name}");
    }
    let again = command(folder, &train).assert().failure().code(1);
    again.stderr(predicate::str::contains("checkpoints of an earlier run").and(predicate::str::contains("--resume")));
    // A constant rate does not depend on the end of the run: flags override the file, and the run
    // continues.
    let more = json(folder, &[&train[..], &["--steps", "2", "--resume"]].concat());
    assert_eq!((&more["end"], &more["steps"]), (&"complete".into(), &2.into()));
    assert_eq!(fs::read_to_string(folder.join("out/metrics.jsonl")).unwrap().lines().count(), 2);
    let text = fs::read_to_string(folder.join("run.toml")).unwrap().replace("steps = 1", "steps = 3\nresume = true");
    fs::write(folder.join("run.toml"), text).unwrap();
    let few = command(folder, &train).assert().success().stdout(predicate::str::contains("done: 3 of 3 steps"));
    few.stderr(
        predicate::str::contains("warning: 3 steps of the optimiser may be too few")
            .and(predicate::str::contains("--epochs")),
    );
    let eval = |adapter: &[&str]| json(folder, &[&["eval", PACK, "--data", "chat.jsonl"], adapter].concat());
    let loss = |eval: &Value| eval["loss"].as_f64().unwrap();
    let (base, tuned) = (eval(&[]), eval(&["--adapter", "out"]));
    assert!(loss(&tuned) < loss(&base), "{tuned} {base}");
    assert!((base["perplexity"].as_f64().unwrap().ln() - loss(&base)).abs() < 1e-9);
    let generate = ["generate", PACK, "--adapter", "out", "--prompt", "2 + 2 =", "--max-tokens", "2"];
    command(folder, &generate).assert().success();
}

/// The embedding of the bundled model is its head, too.
#[test]
fn a_quantised_embedding_is_trained_evaluated_generated_from_merged_and_exported() {
    if common::gpu().is_none() {
        return;
    }
    let place = place();
    let folder = place.path();
    let four_bits = ["convert", program::TINY, "four.nf4pack", "--quantize", "embed", "--scales", "dq8"];
    command(folder, &four_bits).assert().success().stderr(predicate::str::contains("cannot").not());
    command(folder, &["verify", "four.nf4pack"]).assert().success().stderr(predicate::str::contains("note").not());
    command(folder, &["doctor", "four.nf4pack"]).assert().success().stdout(predicate::str::contains("does not run").not());
    let train = ["train", "four.nf4pack", "--data", "chat.jsonl", "--out", "out", "--rank", "2", "--steps", "1"];
    let done = json(folder, &[&train[..], &["--micro-batch", "1", "--schedule", "constant"]].concat());
    assert_eq!(done["steps"], 1);
    // What is exported is decoded by the CPU, and kept as it is.
    command(folder, &["export", "four.nf4pack", "decoded", "--dtype", "f32"]).assert().success();
    command(folder, &["convert", "decoded", "decoded.nf4pack", "--keep", "."]).assert().success();
    let loss = |pack| json(folder, &["eval", pack, "--data", "chat.jsonl"])["loss"].as_f64().unwrap();
    let (found, expected) = (loss("four.nf4pack"), loss("decoded.nf4pack"));
    assert!((found - expected).abs() <= 1e-5, "{found}, decoded beforehand {expected}");
    assert!((found - loss(PACK)).abs() > 1e-5, "four bits make a difference");
    command(folder, &["generate", "four.nf4pack", "--adapter", "out", "--prompt", "2 +", "--max-tokens", "2"])
        .assert()
        .success();
    command(folder, &["merge", "four.nf4pack", "--adapter", "out", "--base", "dequant", "--out", "merged"])
        .assert()
        .success();
}

#[test]
fn show_batch_marks_what_is_learned_and_needs_no_gpu() {
    let place = place();
    let shown = command(place.path(), &["train", PACK, "--data", "chat.jsonl", "--show-batch"]).assert().success();
    shown.stdout(predicate::str::contains("⟦ two").and(predicate::str::contains("2 + 2 =⟦ four")));
    let document = json(place.path(), &["train", PACK, "--data", "chat.jsonl", "--show-batch"]);
    let samples = document["samples"].as_array().unwrap();
    let parts: Vec<&Value> = samples.iter().flat_map(|sample| sample["parts"].as_array().unwrap()).collect();
    let learned =
        |text: &str| parts.iter().find(|part| part["text"].as_str().unwrap().starts_with(text)).unwrap()["learned"].clone();
    assert_eq!((samples.len(), learned("2 + 2 ="), learned(" four")), (2, false.into(), true.into()));
}

#[test]
fn a_mark_of_windows_before_the_first_line_changes_nothing() {
    let place = place();
    let folder = place.path();
    let text = fs::read(folder.join("chat.jsonl")).unwrap();
    fs::write(folder.join("marked.jsonl"), [b"\xef\xbb\xbf", &text[..]].concat()).unwrap();
    let show = |data: &str| command(folder, &["train", PACK, "--data", data, "--show-batch"]).assert();
    let marked =
        show("marked.jsonl").success().stderr(predicate::str::contains("training data: 2 samples of prompt/completion, "));
    assert_eq!(marked.get_output().stdout, show("chat.jsonl").success().get_output().stdout);
    fs::write(folder.join("stray.jsonl"), [b"'", &text[..]].concat()).unwrap();
    let what = predicate::str::contains("stray.jsonl: line 1 is not JSON")
        .and(predicate::str::contains("hint: each line must be one"));
    show("stray.jsonl").code(1).stderr(what);
    fs::write(folder.join("plain.txt"), text).unwrap();
    show("plain.txt").success().stderr(predicate::str::contains("1 sample of plain text"));
}

#[test]
fn what_is_longer_than_the_model_was_made_for_is_cut_or_told() {
    let place = place();
    let folder = place.path();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-qwen3");
    let mut config: Value = serde_json::from_slice(&fs::read(source.join("config.json")).unwrap()).unwrap();
    config["max_position_embeddings"] = 8.into();
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let convert = ["convert", source.to_str().unwrap(), "short.nf4pack", "--config", "config.json"];
    command(folder, &convert).assert().success();
    fs::write(folder.join("long.jsonl"), format!("{{\"text\": \"{}\"}}\n", "word ".repeat(40))).unwrap();
    let show = ["train", "short.nf4pack", "--data", "long.jsonl", "--show-batch"];
    let cut = command(folder, &show).assert().success();
    cut.stderr(
        predicate::str::contains("longer than --max-length are cut").and(predicate::str::contains("max_position").not()),
    );
    let told = command(folder, &[&show[..], &["--max-length", "64"]].concat()).assert().success();
    told.stderr(predicate::str::contains("warning: 1 sample longer than the model's maximum of 8 tokens"));
}

/// A pack of tiny-qwen3 with another chat template.
fn pack_with_template(folder: &Path, template: &str) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tiny-qwen3");
    let changed = folder.join("changed");
    fs::create_dir(&changed).unwrap();
    for entry in fs::read_dir(source).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, changed.join(path.file_name().unwrap())).unwrap();
    }
    fs::write(changed.join("chat_template.jinja"), template).unwrap();
    command(folder, &["convert", "changed", "changed.nf4pack"]).assert().success();
}

#[test]
fn what_a_chat_template_lacks_is_told() {
    let place = place();
    let folder = place.path();
    let questions = "{% for m in messages if m.role != 'system' %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}";
    pack_with_template(folder, questions);
    let line = r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}"#;
    fs::write(folder.join("talk.jsonl"), line).unwrap();
    let show = ["train", "changed.nf4pack", "--data", "talk.jsonl", "--show-batch"];
    let lacks =
        ["no answer ends in a token that ends a text (line 1)", "the chat template leaves out the system prompt (line 1)"];
    for flags in [&[][..], &["--train-on", "all"]] {
        let shown = command(folder, &[&show[..], flags].concat()).assert().success();
        shown.stderr(lacks.iter().fold(predicate::str::contains("warning: ").boxed(), |all, lack| {
            all.and(predicate::str::contains(*lack)).boxed()
        }));
        let warnings = json(folder, &[&show[..], flags].concat())["warnings"].clone();
        let warnings: Vec<&str> = warnings.as_array().unwrap().iter().map(|warning| warning.as_str().unwrap()).collect();
        assert!(
            warnings.len() == 2 && lacks.iter().zip(&warnings).all(|(lack, found)| found.starts_with(lack)),
            "{warnings:?}"
        );
    }
    // The hint of ambiguous spans helps.
    fs::remove_dir_all(folder.join("changed")).unwrap();
    fs::remove_file(folder.join("changed.nf4pack")).unwrap();
    pack_with_template(folder, "{% for m in messages %}{{ m.content | upper }}{% endfor %}");
    let refused = command(folder, &show).assert().code(1);
    refused.stderr(predicate::str::contains("message 2 (from 0)").and(predicate::str::contains("hint: --train-on all")));
    command(folder, &[&show[..], &["--train-on", "all"]].concat()).assert().success();
}

#[test]
fn settings_that_cannot_be_are_wrong_usage_also_in_a_file() {
    let place = place();
    let folder = place.path();
    let train = |toml: &str| {
        fs::write(folder.join("run.toml"), toml).unwrap();
        command(folder, &["train", PACK, "--config", "run.toml", "--json"]).assert().stdout("")
    };
    train("data = 'chat.jsonl'\nout = 'out'\nrank = 0").code(2).stderr(predicate::str::contains("run.toml: --rank"));
    train("ranks = 1").code(2).stderr(predicate::str::contains("run.toml is not a file for --config"));
    train("out = 'out'").code(2).stderr(predicate::str::contains("--data"));
    let missing = command(folder, &["train", PACK, "--config", "none.toml"]).assert().code(1);
    missing.stderr(predicate::str::contains("cannot read none.toml"));
    assert!(!folder.join("out").exists());
}

#[test]
fn a_run_that_fails_has_a_report_all_the_same() {
    if common::gpu().is_none() {
        return;
    }
    let place = place();
    let folder = place.path();
    let train = ["train", PACK, "--data", "chat.jsonl", "--out", "out", "--rank", "2", "--steps", "3"];
    let failed =
        command(folder, &[&train[..], &["--lr", "1e30", "--schedule", "constant", "--warmup", "0"]].concat()).assert();
    failed.code(1).stderr(predicate::str::contains("is not finite").and(predicate::str::contains("a smaller --lr")));
    let report = fs::read_to_string(folder.join("out/report.html")).unwrap();
    assert!(report.contains("failed: step 1: the loss after the step is not finite"), "{report}");
    fs::write(folder.join("file"), "").unwrap();
    let onto = command(folder, &["train", PACK, "--data", "chat.jsonl", "--out", "file"]).assert().code(1);
    onto.stderr(predicate::str::contains("hint: --out must be a folder").and(predicate::str::contains("--resume").not()));
}

#[test]
fn what_cannot_be_trained_is_told_before_anything_is_written() {
    let place = place();
    let folder = place.path();
    fs::write(folder.join("empty.jsonl"), "{\"prompt\": \"a\", \"completion\": 7}\n").unwrap();
    let train = |data: &str| command(folder, &["train", PACK, "--data", data, "--out", "out"]).assert().code(1);
    train("empty.jsonl").stderr(predicate::str::contains("empty.jsonl: line 1: \"completion\" should be"));
    let more = |more: [&str; 2]| {
        command(folder, &[&["train", PACK, "--data", "chat.jsonl", "--out", "out"], &more[..]].concat()).assert().code(1)
    };
    more(["--eval-data", "empty.jsonl"]).stderr(predicate::str::contains("error: empty.jsonl: line 1: "));
    more(["--max-length", "2"])
        .stderr(predicate::str::contains("line 1 has no token").and(predicate::str::contains("hint: --max-length ")));
    fs::write(folder.join("wide.txt"), b"\xff\xfeO\0n\0").unwrap();
    more(["--eval-data", "wide.txt"]).stderr(
        predicate::str::contains("error: wide.txt: the text is not UTF-8")
            .and(predicate::str::contains("hint: save the file as UTF-8")),
    );
    fs::write(folder.join("short.txt"), "Once upon a time.").unwrap();
    let one =
        command(folder, &["train", PACK, "--data", "short.txt", "--out", "out", "--eval-split", "0.5"]).assert().code(1);
    one.stderr(
        predicate::str::contains("nothing can be held out").and(predicate::str::contains("hint: use --eval-data FILE")),
    );
    train("missing.jsonl").stderr(predicate::str::contains("cannot read missing.jsonl"));
    let usage = ["train", PACK, "--data", "chat.jsonl", "--out", "out", "--lr", "-1"];
    command(folder, &usage).assert().code(2).stderr(predicate::str::contains("--lr should be"));
    assert!(!folder.join("out").exists());
}

#[test]
fn a_missing_adapter_or_checkpoint_is_named_with_what_to_do() {
    let place = place();
    let folder = place.path();
    let eval = command(folder, &["eval", PACK, "--data", "chat.jsonl", "--adapter", "none"]).assert().code(1);
    let what = "an adapter is a folder with adapter_model.safetensors and adapter_config.json";
    eval.stderr(predicate::str::contains("cannot read none").and(predicate::str::contains(what)));
    let train =
        |resume: &str| command(folder, &["train", PACK, "--data", "chat.jsonl", "--out", "out", resume]).assert().code(1);
    train("--resume").stderr(
        predicate::str::contains("out has no checkpoint to go on from").and(predicate::str::contains("--save-every")),
    );
    train("--resume=none")
        .stderr(predicate::str::contains("cannot read none").and(predicate::str::contains("--resume=CHECKPOINT")));
}

/// What needs a process that lives on while it is looked at.
#[cfg(unix)]
mod alive {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    /// Longer than any machine takes for a step.
    const PATIENCE: Duration = Duration::from_secs(300);

    #[test]
    fn ctrl_c_saves_the_step_that_it_is_in() {
        if common::gpu().is_none() {
            return;
        }
        let place = place();
        let mut child = Command::new(env!("CARGO_BIN_EXE_nf4pack"));
        child.current_dir(place.path()).env("NF4PACK_CACHE_DIR", "").env_remove("NF4PACK_PROFILE");
        child.args(["train", PACK, "--data", "chat.jsonl", "--out", "out", "--steps", "100000", "--rank", "1"]);
        let child = child.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let metrics = place.path().join("out/metrics.jsonl");
        let steps = || fs::read_to_string(&metrics).unwrap_or_default().lines().count();
        let began = Instant::now();
        while steps() == 0 {
            assert!(began.elapsed() < PATIENCE, "no step after {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
        let status = Command::new("sh").arg("-c").arg(format!("kill -INT {}", child.id())).status().unwrap();
        assert!(status.success());
        let output = child.wait_with_output().unwrap();
        let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        let heard = stderr.find("stopping after the current step").unwrap();
        let saved = stderr.find(&format!("saved out/checkpoint-{}\n", steps())).unwrap_or_else(|| panic!("{stderr}"));
        assert!(heard < saved, "{stderr}");
        assert!(stdout.contains(&format!("stopped; --resume continues: {} of 100000 steps", steps())), "{stdout}");
    }
}

//! From a checkpoint to a text by a trained adapter, as a user goes.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;
use crate::common::program;

use std::fs;
use std::path::Path;

use crate::common::program::{Failure, PACK, command, failure, json};
use nf4pack::gpu::UseMatrixUnits;
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
    failure(folder, &train).assert("run-out-occupied", &["out"], &["--resume", "--out"]);
    // A constant rate does not depend on the end of the run: flags override the file, and the run
    // continues.
    let more = json(folder, &[&train[..], &["--steps", "2", "--resume"]].concat());
    assert_eq!((&more["end"], &more["steps"]), (&"complete".into(), &2.into()));
    assert_eq!(fs::read_to_string(folder.join("out/metrics.jsonl")).unwrap().lines().count(), 2);
    let text = fs::read_to_string(folder.join("run.toml")).unwrap().replace("steps = 1", "steps = 3\nresume = true");
    fs::write(folder.join("run.toml"), text).unwrap();
    let few = command(folder, &train).assert().success().stdout(predicate::str::contains("3 of 3 steps"));
    few.stderr(predicate::str::is_match("warning: 3 steps .*--epochs").unwrap());
    let eval = |adapter: &[&str]| json(folder, &[&["eval", PACK, "--data", "chat.jsonl"], adapter].concat());
    let loss = |eval: &Value| eval["loss"].as_f64().unwrap();
    let (base, tuned) = (eval(&[]), eval(&["--adapter", "out"]));
    assert!(loss(&tuned) < loss(&base), "{tuned} {base}");
    assert!((base["perplexity"].as_f64().unwrap().ln() - loss(&base)).abs() < 1e-9);
    let generate = ["generate", PACK, "--adapter", "out", "--prompt", "2 + 2 =", "--max-tokens", "2"];
    command(folder, &generate).assert().success();
}

#[test]
fn a_run_keeps_its_precision() {
    let with_units =
        |matrix_units| common::gpu_with(|options| options.matrix_units = matrix_units).map(|gpu| gpu.matrix_units().is_ok());
    let (Some(has_units), Some(has_loops)) = (with_units(UseMatrixUnits::Auto), with_units(UseMatrixUnits::Loops)) else {
        return;
    };
    let place = place();
    // Mixed precision is possible with `units`, unless the device lacks f16.
    let run = |more: &str, units: &str| {
        let train = format!(
            "train {PACK} --data chat.jsonl --out out --rank 2 --targets q_proj --micro-batch 1 --schedule constant \
             --warmup 0 {more}"
        );
        let mut command = command(place.path(), &train.split_whitespace().collect::<Vec<_>>());
        command.env("NF4PACK_MATRIX_UNITS", units);
        command
    };
    let contains = predicate::str::contains;
    run("--steps 1 --precision f32", "loops").assert().success().stderr(contains("precision: f32 (--precision"));
    // Without the flag, or with auto, the run continues in float32 also where mixed is possible.
    for (more, steps) in [("--steps 2 --resume", 2), ("--steps 3 --resume --precision auto", 3)] {
        let assert = run(more, "loops").arg("--json").assert().success().stderr(contains("that of the resumed run"));
        let document: Value = serde_json::from_slice(&assert.get_output().stdout).unwrap();
        assert_eq!((&document["precision"], &document["steps"]), (&"f32".into(), &steps.into()));
        assert_eq!(document["precision_reason"], "--precision, or that of the resumed run");
    }
    if has_loops {
        let other = Failure::of(run("--steps 4 --resume --precision mixed", "loops"));
        let error = "--precision is mixed now, and was f32 in the run of the checkpoint";
        other.assert("run-other-settings", &[error], &["the same --precision", "--out"]);
    }
    if !has_units {
        let hint = ["--precision f32", "auto", "resumes only on a GPU that has them"];
        let mut eval = command(place.path(), &["eval", PACK, "--data", "chat.jsonl", "--precision", "mixed"]);
        eval.env("NF4PACK_MATRIX_UNITS", "off");
        for command in [run("--steps 4 --resume --precision mixed", "off"), eval] {
            Failure::of(command).assert("gpu-no-matrix-units", &["mixed precision needs matrix units"], &hint);
        }
    }
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
    command(folder, &four_bits).assert().success().stderr(predicate::str::contains("warning").not());
    assert_eq!(json(folder, &["verify", "four.nf4pack"])["cannot_run"], Value::Array(Vec::new()));
    assert_eq!(json(folder, &["doctor", "four.nf4pack"])["pack"]["cannot_run"], Value::Array(Vec::new()));
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
    let show = |data: &'static str| ["train", PACK, "--data", data, "--show-batch"];
    let shown = |data| command(folder, &show(data)).assert().success();
    let marked = shown("marked.jsonl").stderr(predicate::str::contains("2 samples of prompt/completion"));
    assert_eq!(marked.get_output().stdout, shown("chat.jsonl").get_output().stdout);
    fs::write(folder.join("stray.jsonl"), [b"'", &text[..]].concat()).unwrap();
    failure(folder, &show("stray.jsonl")).assert("data-json", &["stray.jsonl", "line 1"], &["JSON"]);
    fs::write(folder.join("plain.txt"), text).unwrap();
    assert_eq!(json(folder, &show("plain.txt"))["samples"].as_array().unwrap().len(), 1);
}

#[test]
fn samples_longer_than_the_models_maximum_are_cut_or_warned_about() {
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
    let warning = |text| predicate::str::is_match(text).unwrap();
    let cut = command(folder, &show).assert().success();
    cut.stderr(warning("warning: .*--max-length .*1 sample").and(warning("warning: .* 8 tokens").not()));
    let long = command(folder, &[&show[..], &["--max-length", "64"]].concat()).assert().success();
    long.stderr(warning("warning: 1 sample .* 8 tokens.*--max-length 8"));
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
fn a_template_that_lacks_an_end_token_or_drops_a_message_is_warned_about() {
    let place = place();
    let folder = place.path();
    let questions = "{% for m in messages if m.role != 'system' %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}";
    pack_with_template(folder, questions);
    let line = r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}"#;
    fs::write(folder.join("talk.jsonl"), line).unwrap();
    let show = ["train", "changed.nf4pack", "--data", "talk.jsonl", "--show-batch"];
    for flags in [&[][..], &["--train-on", "all"]] {
        let line = [&show[..], flags].concat();
        let warnings = json(folder, &line)["warnings"].clone();
        let warnings: Vec<&str> = warnings.as_array().unwrap().iter().map(|warning| warning.as_str().unwrap()).collect();
        let [end, system] = warnings[..] else { panic!("{warnings:?}") };
        assert!(end.contains("(line 1)") && system.contains("system prompt (line 1)"), "{warnings:?}");
        let stderr = command(folder, &line).assert().success().get_output().stderr.clone();
        let stderr = String::from_utf8(stderr).unwrap();
        assert!(warnings.iter().all(|warning| stderr.contains(&format!("warning: {warning}"))), "{stderr}");
    }
    // The hint of ambiguous spans helps.
    fs::remove_dir_all(folder.join("changed")).unwrap();
    fs::remove_file(folder.join("changed.nf4pack")).unwrap();
    pack_with_template(folder, "{% for m in messages %}{{ m.content | upper }}{% endfor %}");
    failure(folder, &show).assert("data-spans", &["message 2"], &["--train-on all"]);
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
    train("ranks = 1").code(2).stderr(predicate::str::contains("run.toml").and(predicate::str::contains("`ranks`")));
    train("out = 'out'").code(2).stderr(predicate::str::contains("--data"));
    failure(folder, &["train", PACK, "--config", "none.toml"]).assert("io", &["none.toml"], &[]);
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
    let failed = failure(folder, &[&train[..], &["--lr", "1e30", "--schedule", "constant", "--warmup", "0"]].concat());
    failed.assert("run-diverged", &["step 1"], &["--lr"]);
    let report = fs::read_to_string(folder.join("out/report.html")).unwrap();
    assert!(report.contains(&format!("failed: {}", failed.error)), "{failed:?} {report}");
    fs::write(folder.join("file"), "").unwrap();
    let onto = failure(folder, &["train", PACK, "--data", "chat.jsonl", "--out", "file"]);
    onto.assert("checkpoint-unreadable", &["file"], &["--out"]);
    assert!(!onto.hint.contains("--resume"), "{onto:?}");
}

#[test]
fn data_that_cannot_be_trained_on_is_an_error_before_anything_is_written() {
    let place = place();
    let folder = place.path();
    fs::write(folder.join("empty.jsonl"), "{\"prompt\": \"a\", \"completion\": 7}\n").unwrap();
    let train =
        |data: &str, more: &[&str]| failure(folder, &[&["train", PACK, "--out", "out", "--data", data], more].concat());
    let line = ["empty.jsonl", "line 1", "\"completion\""];
    train("empty.jsonl", &[]).assert("data-value", &line, &[]);
    train("chat.jsonl", &["--eval-data", "empty.jsonl"]).assert("data-value", &line, &[]);
    train("chat.jsonl", &["--max-length", "2"]).assert("data-all-dropped", &["line 1"], &["--max-length "]);
    fs::write(folder.join("wide.txt"), b"\xff\xfeO\0n\0").unwrap();
    train("chat.jsonl", &["--eval-data", "wide.txt"]).assert("data-foreign", &["wide.txt", "UTF-16"], &["iconv"]);
    fs::write(folder.join("latin.txt"), b"caf\xe9").unwrap();
    train("latin.txt", &[]).assert("data-utf8", &["latin.txt"], &["iconv -f LATIN1"]);
    fs::write(folder.join("table.csv"), "prompt,completion\na,b\n").unwrap();
    train("table.csv", &[]).assert("data-foreign", &["table.csv"], &["read_csv"]);
    fs::write(folder.join("short.txt"), "Once upon a time.").unwrap();
    train("short.txt", &["--eval-split", "0.5"]).assert("data-nothing-held-out", &[], &["--eval-data FILE"]);
    train("missing.jsonl", &[]).assert("io", &["missing.jsonl"], &[]);
    let usage = ["train", PACK, "--data", "chat.jsonl", "--out", "out", "--lr", "-1"];
    command(folder, &usage).assert().code(2).stderr(predicate::str::contains("--lr"));
    assert!(!folder.join("out").exists());
}

#[test]
fn a_missing_adapter_or_checkpoint_is_named_with_what_to_do() {
    let place = place();
    let folder = place.path();
    let eval = failure(folder, &["eval", PACK, "--data", "chat.jsonl", "--adapter", "none"]);
    eval.assert("adapter-unreadable", &["none"], &["adapter_model.safetensors", "adapter_config.json"]);
    let train = |resume: &str| failure(folder, &["train", PACK, "--data", "chat.jsonl", "--out", "out", resume]);
    train("--resume").assert("run-no-checkpoint", &["out"], &["--save-every"]);
    train("--resume=none").assert("checkpoint-unreadable", &["none"], &["--resume=CHECKPOINT"]);
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
        child.current_dir(place.path()).env("NF4PACK_CACHE_DIR", program::CACHE).env_remove("NF4PACK_PROFILE");
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
        let heard = stderr.find("Ctrl-C again").unwrap();
        let saved = stderr.find(&format!("out/checkpoint-{}\n", steps())).unwrap_or_else(|| panic!("{stderr}"));
        assert!(heard < saved, "{stderr}");
        assert!(stdout.contains(&format!("{} of 100000 steps", steps())) && stdout.contains("--resume"), "{stdout}");
    }
}

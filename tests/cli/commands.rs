//! The program as its user meets it: flags, exit codes, streams, and what is left behind.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::program::{CACHE, names};

use assert_cmd::Command;
use assert_cmd::assert::Assert;
use nf4pack::convert::source::Checkpoint;
use nf4pack::convert::synth::{self, Shape};
use nf4pack::convert::{ConvertError, Options, Progress, convert};
use predicates::prelude::*;
use serde_json::Value;
use tempfile::TempDir;

/// A folder with the checkpoint `tiny` in it.
struct Place {
    folder: TempDir,
}

/// Less than the `tiny` of the library, since the encoder is slow without optimisation.
const TINY: Shape = Shape {
    hidden: 64,
    intermediate: 192,
    layers: 4,
    heads: 2,
    kv_heads: 1,
    head_dim: 32,
    vocabulary: 512,
    tied: true,
    q_k_norm: true,
};

fn nf4pack() -> Command {
    let mut command = assert_cmd::cargo::cargo_bin_cmd!("nf4pack");
    command.env("NF4PACK_CACHE_DIR", CACHE).env_remove("NO_COLOR");
    command
}

impl Place {
    fn new() -> Self {
        let place = Self { folder: tempfile::tempdir().unwrap() };
        place.checkpoint("tiny", &TINY, 7, None);
        place
    }

    fn checkpoint(&self, name: &str, shape: &Shape, seed: u64, shard_bytes: Option<u64>) {
        synth::write(&self.path(name), shape, seed, shard_bytes, &()).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs `nf4pack` with these arguments, split at spaces, in the folder.
    fn run(&self, arguments: &str) -> Assert {
        nf4pack().current_dir(self.folder.path()).args(arguments.split(' ')).assert()
    }

    /// Runs it with `--json`, and parses all of stdout.
    fn json(&self, arguments: &str, code: i32) -> Value {
        let assert = self.run(&format!("{arguments} --json")).code(code);
        let stdout = String::from_utf8(assert.get_output().stdout.clone()).unwrap();
        serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{arguments}: {e} in {stdout:?}"))
    }

    /// Runs it with `--json`, to fail: the code of the error.
    fn error_code(&self, arguments: &str) -> String {
        self.json(arguments, 1)["code"].as_str().unwrap().to_owned()
    }

    /// The names in the folder, hidden ones too.
    fn names(&self) -> Vec<String> {
        names(self.folder.path())
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// Overwrites bytes of a file.
    fn patch(&self, name: &str, offset: u64, bytes: &[u8]) {
        let mut all = self.read(name);
        all[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        fs::write(self.path(name), all).unwrap();
    }

    /// Where a tensor of the checkpoint lies in its file.
    fn source_offset(&self, tensor: &str) -> u64 {
        let checkpoint = Checkpoint::open(&self.path("tiny"), None).unwrap();
        checkpoint.tensors.iter().find(|t| t.name == tensor).unwrap().offset
    }

    /// The entry of a tensor in `inspect --tensors`.
    fn tensor(&self, pack: &str, name: &str) -> Value {
        let document = self.json(&format!("inspect {pack} --tensors"), 0);
        document["tensors"].as_array().unwrap().iter().find(|t| t["name"] == name).unwrap().clone()
    }
}

const DOWN: &str = "model.layers.1.mlp.down_proj.weight";

fn stderr(assert: &Assert) -> String {
    String::from_utf8(assert.get_output().stderr.clone()).unwrap()
}

fn contains(text: &str) -> impl Predicate<str> {
    predicate::str::contains(text)
}

#[test]
fn help_and_version_name_every_command_and_option() {
    nf4pack().arg("--version").assert().success().stdout(concat!("nf4pack ", env!("CARGO_PKG_VERSION"), "\n"));
    let commands =
        ["convert", "inspect", "verify", "export", "train", "eval", "generate", "merge", "doctor", "bench", "completions"];
    let help = nf4pack().arg("--help").assert().success();
    commands.iter().fold(help, |help, command| help.stdout(contains(command)));
    nf4pack().arg("-h").assert().success();
    let options: [(&[&str], &str); 13] = [
        (
            &["convert"],
            "--encoder --scales --block-size --keep --quantize --threads --config --dry-run --force --json --quiet",
        ),
        (&["inspect"], "--tensors --layer --json"),
        (&["verify"], "--against --tensors --config --threads --json --quiet"),
        (&["merge"], "--adapter --base --out --config --sample --no-compare --gpu --json --quiet"),
        (&["bench", "convert"], "--shape --encoder --scales --block-size --threads --runs --dir --json"),
        (&["doctor"], "--budget --gpu --json NF4PACK_ADAPTER NF4PACK_PROFILE"),
        (
            &["train"],
            "--data --out --rank --alpha --dropout --targets --rslora --lr --schedule --warmup --epochs --steps --micro-batch \
             --accumulate --max-length --clip --weight-decay --seed --train-on --strict --eval-data --eval-split --eval-every \
             --early-stop --save-every --keep --resume --vram-budget --base-model --config --show-batch --gpu --json Adapter: Optimiser:",
        ),
        (&["eval"], "--adapter --data --train-on --strict --max-length --micro-batch --vram-budget --gpu --json perplexity"),
        (&["bench", "dequant"], "--shape --block-size --gpu --runs --json 9728x2560"),
        (&["bench", "upload"], "--bytes --threads --gpu --runs --json"),
        (&["bench", "stream"], "--shape --budget --no-mmap --verify-on-load --threads --dir --gpu --runs --json"),
        (
            &["bench", "train"],
            "--shape --batch --seq --keep-activations --offload-activations --offload-vocabulary --vram-budget --rank --dir --gpu \
             --runs --json NF4PACK_PROFILE",
        ),
        (&["bench", "longest"], "--shape --budget --rank --plan-only --dir --gpu --json"),
    ];
    for (command, options) in options {
        let help = nf4pack().args(command).arg("--help").assert().success().stdout(contains("Examples:"));
        options.split(' ').fold(help, |help, option| help.stdout(contains(option)));
    }
}

#[test]
fn convert_prints_progress_lines_and_a_table() {
    let place = Place::new();
    let assert = place.run("convert tiny out.nf4pack").success();
    let assert = assert.stdout(contains("down_proj")).stdout(contains("weights/s"));
    let assert = assert.stderr(contains("100 %  197k of 197k weights"));
    assert!(!stderr(&assert).contains('\u{1b}'), "no colour where there is no terminal");
    assert_eq!(place.names(), ["out.nf4pack", "tiny"]);
}

#[test]
fn convert_reports_in_json() {
    let place = Place::new();
    let report = place.json("convert tiny out.nf4pack", 0);
    let length = fs::metadata(place.path("out.nf4pack")).unwrap().len();
    assert_eq!(report["pack_bytes"], length);
    assert_eq!(report["target"], "out.nf4pack");
    assert_eq!(report["roles"].as_array().unwrap().len(), 7);
    let error = report["relative_error"].as_f64().unwrap();
    assert!((0.006..0.008).contains(&error), "{error}");
    for role in report["roles"].as_array().unwrap() {
        assert_eq!(role["bits_per_weight"], 4.25);
        assert!(role["tensors"] == 4 && role["relative_error"].as_f64().unwrap() > 0.0);
    }
    assert!(report["seconds"].as_f64().unwrap() > 0.0 && report["weights_per_second"].as_f64().unwrap() > 0.0);
}

#[test]
fn quiet_prints_only_errors() {
    let place = Place::new();
    place.run("convert tiny out.nf4pack --quiet").success().stdout("").stderr("");
    place.run("verify out.nf4pack --against tiny --quiet").success().stdout("").stderr("");
    place.run("export out.nf4pack back --quiet").success().stdout("").stderr("");
    place.run("convert tiny out.nf4pack --quiet").code(1).stdout("").stderr(predicate::str::starts_with("error: "));
    let assert = place.run("convert tiny other.nf4pack --quiet --json").success().stderr("");
    serde_json::from_slice::<Value>(&assert.get_output().stdout).unwrap();
}

#[test]
fn an_existing_target_needs_force() {
    let place = Place::new();
    fs::write(place.path("out.nf4pack"), "old").unwrap();
    let assert = place.run("convert tiny out.nf4pack").code(1);
    assert.stderr(contains("out.nf4pack")).stderr(contains("\nhint: --force "));
    assert_eq!(place.error_code("convert tiny out.nf4pack"), "target-exists");
    assert_eq!(place.read("out.nf4pack"), b"old");
    place.run("convert tiny out.nf4pack --force").success();
    assert_eq!(place.json("verify out.nf4pack", 0)["good"], true);
}

#[test]
fn the_bytes_do_not_depend_on_the_threads_but_on_the_options() {
    let place = Place::new();
    // More than one window of the pipeline.
    place.checkpoint("windows", &Shape::from_name("tiny").unwrap(), 7, None);
    for (source, options) in
        [("tiny", "bf16"), ("tiny", "dq8"), ("windows", "f32 --encoder absmax"), ("windows", "dq8 --encoder absmax")]
    {
        for threads in [1, 2, 7] {
            place
                .run(&format!("convert {source} {threads}.nf4pack --scales {options} --threads {threads} --force"))
                .success();
        }
        assert!(place.read("1.nf4pack") == place.read("2.nf4pack"), "{source} {options}");
        assert!(place.read("1.nf4pack") == place.read("7.nf4pack"), "{source} {options}");
        let provenance = &place.json("inspect 1.nf4pack", 0)["provenance"];
        assert!(options.starts_with(provenance["scales"].as_str().unwrap()));
        assert_eq!(provenance["encoder"], if options.ends_with("absmax") { "absmax" } else { "mse" });
        place.run(&format!("verify 1.nf4pack --against {source} --threads 2")).success();
    }
}

#[test]
fn scales_and_block_sizes_give_the_bits_that_the_help_says() {
    let place = Place::new();
    for (options, bits) in [("bf16", 4.25), ("f32", 4.5), ("bf16 --block-size 32", 4.5), ("bf16 --block-size 4096", 4.0)] {
        let report = place.json(&format!("convert tiny out.nf4pack --dry-run --scales {options}"), 0);
        let found = report["roles"][0]["bits_per_weight"].as_f64().unwrap();
        assert!((found - bits).abs() < 0.01, "{options}: {found}");
    }
}

#[test]
fn a_dry_run_prints_the_plan_and_writes_nothing() {
    let place = Place::new();
    // The checkpoint has no tokenizer, and nothing else is wrong with it.
    let assert = place.run("convert tiny out.nf4pack --dry-run").success();
    let warnings = stderr(&assert);
    assert!(warnings.lines().count() == 1 && warnings.starts_with("warning: "), "{warnings}");
    assert!(warnings.contains("tokenizer.json"), "{warnings}");
    assert.stdout(contains("down_proj"));
    let preview = place.json("convert tiny out.nf4pack --dry-run", 0);
    assert_eq!(place.names(), ["tiny"]);
    place.run("convert tiny out.nf4pack").success();
    assert_eq!(preview["pack_bytes"], fs::metadata(place.path("out.nf4pack")).unwrap().len());
    place.run("convert tiny out.nf4pack --dry-run").success().stderr(contains("warning: out.nf4pack"));
}

#[test]
fn a_pack_that_cannot_be_run_is_warned_about_at_once() {
    let place = Place::new();
    place.checkpoint("odd", &Shape { head_dim: 10, ..TINY }, 7, None);
    fs::write(place.path("odd").join("tokenizer.json"), "<html>").unwrap();
    let warned = |assert: Assert| {
        let text = stderr(&assert);
        let names = |what: &str| text.lines().any(|line| line.contains(what));
        assert!(names("10") && names("tokenizer.json"), "{text}");
    };
    warned(place.run("convert odd out.nf4pack").success());
    warned(place.run("verify out.nf4pack").success());
    let reasons = |command| place.json(command, 0)["cannot_run"].as_array().unwrap().len();
    assert_eq!(reasons("verify out.nf4pack"), 2);
    // The other one is a notice.
    assert_eq!([reasons("convert odd again.nf4pack"), reasons("convert odd other.nf4pack --dry-run")], [1, 1]);

    // JSON, and no tokenizer.
    fs::write(place.path("tiny").join("tokenizer.json"), "{}").unwrap();
    for command in ["convert tiny empty.nf4pack", "verify empty.nf4pack", "convert tiny other.nf4pack --dry-run"] {
        let text = stderr(&place.run(command).success());
        assert!(text.contains("tokenizer.json"), "{text}");
    }
}

#[test]
fn keep_and_quantize_choose_tensors() {
    let place = Place::new();
    place.run(r"convert tiny out.nf4pack --keep layers\.1\. --quantize embed_tokens").success();
    assert_eq!(place.tensor("out.nf4pack", DOWN)["type"], "bf16");
    assert_eq!(place.tensor("out.nf4pack", "model.layers.0.mlp.down_proj.weight")["type"], "nf4/64 bf16");
    assert_eq!(place.tensor("out.nf4pack", "model.embed_tokens.weight")["type"], "nf4/64 bf16");
    place.run("verify out.nf4pack --against tiny").success();
    place.run("inspect out.nf4pack").success().stdout(contains(r" layers\.1\."));

    place.run("convert tiny all.nf4pack --keep .").success();
    place.run("verify all.nf4pack --against tiny").success();

    let assert = place.run("convert tiny no.nf4pack --keep nothing").code(1);
    assert.stderr(contains(r#"--keep "nothing""#)).stderr(contains("hint: "));
    for option in ["--keep nothing", "--quantize nothing", "--quantize final_norm|model.norm"] {
        assert_eq!(place.error_code(&format!("convert tiny no.nf4pack {option}")), "plan-no-match");
    }
    assert!(!place.path("no.nf4pack").exists());
}

#[test]
fn wrong_usage_is_exit_code_2_and_nothing_on_stdout() {
    let place = Place::new();
    for arguments in [
        "convert tiny",
        "convert tiny out.nf4pack --keep (",
        "convert tiny out.nf4pack --quantize [",
        "convert tiny out.nf4pack --block-size 63",
        "convert tiny out.nf4pack --block-size many",
        "convert tiny out.nf4pack --threads 0",
        "convert tiny out.nf4pack --encoder best",
        "convert tiny out.nf4pack --scales f64",
        "convert tiny out.nf4pack --what",
        "inspect tiny --layer -1",
        "verify tiny --config tiny/config.json",
        "export out.nf4pack back --dtype f64",
        "bench convert --runs 0",
        "bench dequant --shape 0x64",
        "bench dequant --shape llama",
        "bench upload --bytes many",
        "bench upload --threads 0",
        "bench stream --budget -1",
        "bench stream --shape 9x9",
        "doctor --budget 8GiB",
        "bench",
        "train q.nf4pack --out o",
        "train q.nf4pack --data d --out o --rank 0",
        "train q.nf4pack --data d --out o --dropout 1",
        "train q.nf4pack --data d --out o --max-length 1",
        "train q.nf4pack --data d --out o --micro-batch 0",
        "train q.nf4pack --data d --out o --targets lm_head",
        "train q.nf4pack --data d --out o --early-stop 2",
        "train q.nf4pack --data d --out o --eval-data e --eval-split 0.1",
        "train q.nf4pack --data d --out o --epochs 0 --json",
        "eval q.nf4pack",
        "eval q.nf4pack --data d --max-length 1",
        "eval q.nf4pack --data d --micro-batch 0",
        "eval q.nf4pack --data d --vram-budget some",
        "generate q.nf4pack",
        "generate q.nf4pack --prompt a --chat",
        "generate q.nf4pack --prompt a --top-p 7",
        "generate q.nf4pack --prompt a --top-p most",
        "generate q.nf4pack --prompt a --min-p 1.5",
        "generate q.nf4pack --prompt a --temperature nan",
        "generate q.nf4pack --prompt a --top-k 0",
        "generate q.nf4pack --prompt a --max-tokens 0",
        "generate q.nf4pack --prompt a --greedy --temperature 1",
        "verify q.nf4pack --tensors",
        "merge q.nf4pack --adapter a --out o",
        "merge q.nf4pack --adapter a --base dequant",
        "merge q.nf4pack --adapter a --base dequant --out o --no-compare --sample text",
        "completions csh",
        "frobnicate",
        "convert tiny out.nf4pack --keep ( --json",
    ] {
        let assert = place.run(arguments).code(2).stdout("");
        assert!(!stderr(&assert).is_empty(), "{arguments}");
    }
    assert_eq!(place.names(), ["tiny"]);
}

#[test]
fn errors_say_what_to_do_on_stderr_and_in_json() {
    let place = Place::new();
    place.run("convert tiny out.nf4pack --quiet").success();
    fs::create_dir(place.path("empty")).unwrap();
    for (arguments, error, hint) in [
        ("convert none x.nf4pack", "source-unreadable", "hf download"),
        ("convert empty x.nf4pack", "source-no-weights", "model.safetensors"),
        ("convert tiny/config.json x.nf4pack", "source-not-a-checkpoint", ".safetensors"),
        ("convert tiny nowhere/x.nf4pack", "target-unwritable", "nowhere"),
        ("convert tiny empty", "target-unwritable", "empty/model.nf4pack"),
        ("convert tiny tiny/model.safetensors --force", "target-is-source", "OUT"),
        ("convert tiny out.nf4pack", "target-exists", "--force"),
        ("verify none", "pack-unreadable", "nf4pack convert"),
        ("verify empty", "pack-unreadable", "FILE"),
        ("verify out.nf4pack --against none", "source-unreadable", "hf download"),
        ("inspect tiny/config.json", "pack-bad-magic", "nf4pack convert"),
        ("export out.nf4pack tiny", "target-folder-exists", "folder"),
        ("export none back", "pack-unreadable", "nf4pack convert"),
    ] {
        let assert = place.run(arguments).code(1).stdout("");
        let text = stderr(&assert);
        let (first, second) = text.trim_end().split_once("\nhint: ").unwrap_or_else(|| panic!("{arguments}: {text}"));
        // Warnings may stand before.
        let first = first.lines().last().unwrap_or_default();
        assert!(first.starts_with("error: "), "{arguments}: {text}");
        assert!(second.contains(hint) && !second.contains('\n'), "{arguments}: {text}");
        let document = place.json(arguments, 1);
        assert_eq!(document["code"], error, "{arguments}: {document}");
        assert_eq!(document["error"].as_str().map(|error| format!("error: {error}")).as_deref(), Some(first));
        assert_eq!(document["hint"], second);
    }
    assert_eq!(place.names(), ["empty", "out.nf4pack", "tiny"]);
}

#[test]
fn a_config_can_come_from_elsewhere() {
    let place = Place::new();
    fs::rename(place.path("tiny/config.json"), place.path("config.json")).unwrap();
    assert_eq!(place.error_code("convert tiny out.nf4pack"), "source-no-config");
    place.run("convert tiny out.nf4pack").code(1).stderr(contains("--config FILE"));
    place.run("convert tiny out.nf4pack --config config.json").success();
    place.run("verify out.nf4pack --against tiny --config config.json").success();

    let text = fs::read_to_string(place.path("config.json")).unwrap();
    fs::write(place.path("gpt.json"), text.replace("\"qwen3\"", "\"gpt2\"")).unwrap();
    let assert = place.run("convert tiny x.nf4pack --config gpt.json").code(1);
    assert.stderr(contains("gpt2")).stderr(contains("hint: "));
    assert_eq!(place.error_code("convert tiny x.nf4pack --config gpt.json"), "config-model-type");
    fs::write(place.path("gpt.json"), text.replacen('{', r#"{"quantization_config": {"quant_method": "gptq"},"#, 1))
        .unwrap();
    // The weights are not quantised, whatever config.json says.
    let assert = place.run("convert tiny x.nf4pack --config gpt.json").success();
    assert.stderr(contains("note: ")).stderr(contains("gptq"));
}

#[test]
fn a_checkpoint_that_cannot_be_converted_gets_a_hint_that_works() {
    let place = Place::new();
    fs::write(place.path("tiny/tokenizer.json"), "version https://git-lfs.github.com/spec/v1\noid sha256:0\n").unwrap();
    assert_eq!(place.error_code("convert tiny out.nf4pack"), "source-lfs-pointer");
    place.run("convert tiny out.nf4pack").code(1).stderr(contains("git lfs pull"));
    fs::remove_file(place.path("tiny/tokenizer.json")).unwrap();
    fs::write(place.path("tiny/tokenizer.model"), "x").unwrap();
    let assert = place.run("convert tiny out.nf4pack").success();
    assert.stderr(contains("tokenizer.json")).stderr(contains("tokenizer.model"));

    // The hub's cache instead of the snapshot in it.
    fs::create_dir_all(place.path("models--x--tiny/snapshots")).unwrap();
    fs::rename(place.path("tiny"), place.path("models--x--tiny/snapshots/abc")).unwrap();
    assert_eq!(place.error_code("convert models--x--tiny out.nf4pack --force"), "source-hub-cache");
    let assert = place.run("convert models--x--tiny out.nf4pack --force").code(1);
    assert.stderr(predicate::str::is_match("hint: .*models--x--tiny/snapshots/abc").unwrap());
    place.run("convert models--x--tiny/snapshots/abc out.nf4pack --force").success();
    let snapshot = place.path("models--x--tiny/snapshots/abc");
    fs::rename(snapshot.join("model.safetensors"), snapshot.join("weights.safetensors")).unwrap();
    let assert = place.run("convert models--x--tiny/snapshots/abc out.nf4pack --force").code(1);
    assert.stderr(predicate::str::is_match("hint: .*models--x--tiny/snapshots/abc/weights.safetensors").unwrap());
    fs::rename(snapshot.join("weights.safetensors"), snapshot.join("adapter_model.safetensors")).unwrap();
    let assert = place.run("convert models--x--tiny/snapshots/abc out.nf4pack --force").code(1);
    assert.stderr(predicate::str::is_match("hint: .*`nf4pack merge`").unwrap());
    assert_eq!(place.error_code("convert models--x--tiny/snapshots/abc out.nf4pack --force"), "source-no-weights");
}

#[test]
fn a_nan_leaves_nothing_behind() {
    for (tensor, options) in [(DOWN, ""), (DOWN, " --scales dq8"), ("model.norm.weight", "")] {
        let place = Place::new();
        let offset = place.source_offset(tensor);
        place.patch("tiny/model.safetensors", offset + 4, &[0xc0, 0x7f]);
        let convert = format!("convert tiny out.nf4pack{options}");
        let failed = place.run(&convert).code(1).stdout("");
        failed.stderr(contains(tensor)).stderr(contains(" 2")).stderr(contains("NaN"));
        assert_eq!(place.error_code(&convert), "weight-not-finite");
        assert_eq!(place.names(), ["tiny"]);
    }
}

#[test]
fn a_truncated_or_missing_shard_is_named() {
    let place = Place::new();
    place.checkpoint("shards", &TINY, 7, Some(100_000));
    place.run("convert shards whole.nf4pack").success();
    let mut names: Vec<_> = fs::read_dir(place.path("shards")).unwrap().map(|e| e.unwrap().path()).collect();
    names.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
    names.sort();
    let last = names.last().unwrap();
    let name = last.file_name().unwrap().to_str().unwrap();
    let bytes = fs::read(last).unwrap();
    fs::write(last, &bytes[..bytes.len() - 100]).unwrap();
    let assert = place.run("convert shards out.nf4pack").code(1);
    assert.stderr(contains(name)).stderr(contains("hint: "));
    assert_eq!(place.error_code("convert shards out.nf4pack"), "safetensors-file-length");
    fs::remove_file(last).unwrap();
    place.run("convert shards out.nf4pack").code(1).stderr(contains(name)).stderr(contains("hint: "));
    assert_eq!(place.error_code("convert shards out.nf4pack"), "source-shard-missing");
    assert!(!place.path("out.nf4pack").exists());
}

#[test]
fn inspect_shows_header_origin_sizes_and_files() {
    let place = Place::new();
    place.run("convert tiny out.nf4pack").success();
    let assert = place.run("inspect out.nf4pack").success().stderr("");
    let words = ["1.0", "qwen3", "mse", "bf16", "4 layers", "config.json"];
    words.iter().fold(assert, |assert, word| assert.stdout(contains(word)));
    let document = place.json("inspect out.nf4pack", 0);
    assert_eq!(document["provenance"]["sources"][0]["sha256"].as_str().unwrap().len(), 64);
    assert_eq!(document["bytes"], fs::metadata(place.path("out.nf4pack")).unwrap().len());
    assert!(document.get("tensors").is_none());

    place.run("inspect out.nf4pack --tensors").success().stdout(contains(DOWN)).stdout(contains("[64, 192]"));
    assert_eq!(place.json("inspect out.nf4pack --tensors", 0)["tensors"].as_array().unwrap().len(), 46);
    let layer = place.json("inspect out.nf4pack --layer 3", 0);
    assert_eq!(layer["tensors"].as_array().unwrap().len(), 11);
    assert!(layer["tensors"].as_array().unwrap().iter().all(|t| t["layer"] == 3));
    let assert = place.run("inspect out.nf4pack --layer 1").success();
    assert.stdout(contains(DOWN)).stdout(contains("model.layers.2.").not());
    assert_eq!(place.error_code("inspect out.nf4pack --layer 4"), "layer-out-of-range");
}

#[test]
fn verify_names_the_damaged_section() {
    let place = Place::new();
    place.run("convert tiny out.nf4pack").success();
    let good = place.json("verify out.nf4pack", 0);
    assert_eq!((good["good"].as_bool(), good["faults"].as_array().map(Vec::len)), (Some(true), Some(0)));
    let offset = place.tensor("out.nf4pack", DOWN)["offset"].as_u64().unwrap();
    let byte = place.read("out.nf4pack")[offset as usize];
    place.patch("out.nf4pack", offset, &[byte ^ 1]);
    let assert = place.run("verify out.nf4pack").code(1).stdout(contains(DOWN)).stdout(contains("1 fault"));
    assert.stderr(contains("error: out.nf4pack")).stderr(contains("hint: "));
    place.run("verify out.nf4pack --quiet").code(1).stdout("").stderr(contains(DOWN));
    let report = place.json("verify out.nf4pack", 1);
    assert_eq!(report["good"], false);
    assert!(report["faults"][0].as_str().unwrap().contains(DOWN));
    place.run("verify out.nf4pack --against tiny").code(1).stdout(contains("mismatch: "));
    let assert = place.run("export out.nf4pack back").code(1);
    assert.stderr(contains("hint: `nf4pack verify out.nf4pack`"));
    assert_eq!(place.error_code("export out.nf4pack back"), "pack-damaged");
    assert_eq!(place.names(), ["out.nf4pack", "tiny"]);

    // A damaged header is an error of every command.
    place.patch("out.nf4pack", 24, &[0xff]);
    assert_eq!(place.json("verify out.nf4pack", 1)["code"], "pack-checksum");
}

#[test]
fn verify_against_lists_each_tensor_and_knows_another_checkpoint() {
    let place = Place::new();
    place.checkpoint("other", &TINY, 8, None);
    place.run("convert tiny out.nf4pack").success();
    place
        .run("verify out.nf4pack --against tiny")
        .success()
        .stdout(contains("28 quantised tensors").and(contains("max error").not()));
    let assert = place.run("verify out.nf4pack --against tiny --tensors").success();
    assert.stdout(contains(DOWN));
    let report = place.json("verify out.nf4pack --against tiny", 0);
    let tensors = report["against"]["tensors"].as_array().unwrap();
    assert_eq!(tensors.len(), 28);
    assert!(tensors.iter().all(|t| t["rms_error"].as_f64().unwrap() > 0.0 && t["max_abs_error"].as_f64().unwrap() > 0.0));

    let assert = place.run("verify out.nf4pack --against other").code(1).stdout(contains("mismatch: "));
    assert.stderr(contains("error: out.nf4pack"));
    let report = place.json("verify out.nf4pack --against other", 1);
    assert!(!report["against"]["mismatches"].as_array().unwrap().is_empty());
}

#[test]
fn an_exported_folder_converts_to_the_same_tensors() {
    let place = Place::new();
    place.run("convert tiny out.nf4pack --encoder absmax").success();
    let list = |pack: &str| {
        let document = place.json(&format!("inspect {pack} --tensors"), 0);
        let of = |t: &Value| ["name", "role", "layer", "shape", "type", "offset", "bytes"].map(|key| t[key].clone());
        document["tensors"].as_array().unwrap().iter().map(of).collect::<Vec<_>>()
    };
    for dtype in ["bf16", "f16", "f32"] {
        let report = place.json(&format!("export out.nf4pack {dtype} --dtype {dtype}"), 0);
        assert_eq!((report["tensors"].as_u64(), report["dtype"].as_str()), (Some(46), Some(dtype)));
        // The norms and the embedding are bf16: what holds them and f16 is f32.
        let held = if dtype == "bf16" { "bfloat16" } else { "float32" };
        let config = String::from_utf8(place.read("tiny/config.json")).unwrap().replace("bfloat16", held);
        assert_eq!(String::from_utf8(place.read(&format!("{dtype}/config.json"))).unwrap(), config);
        place.run(&format!("convert {dtype} {dtype}.nf4pack")).success();
        assert_eq!(list("out.nf4pack"), list(&format!("{dtype}.nf4pack")));
        // What was not quantised is the same in every byte, which the other pack's checksums say.
        place.run(&format!("verify {dtype}.nf4pack --against {dtype}")).success();
    }
    place.run("export out.nf4pack text").success().stdout(contains("46 tensors"));
}

#[test]
fn bench_measures_a_small_checkpoint_and_cleans_up() {
    let place = Place::new();
    let report = place.json("bench convert --shape tiny --runs 1 --dir . --threads 2", 0);
    assert_eq!(report["encoders"].as_array().unwrap().len(), 2);
    for encoder in report["encoders"].as_array().unwrap() {
        assert_eq!(encoder["seconds"].as_array().unwrap().len(), 1);
        assert!(encoder["weights_per_second"].as_f64().unwrap() > 0.0);
        assert!(encoder["encode_weights_per_second"].as_f64().unwrap() > 0.0);
    }
    for part in ["decode", "memcpy", "verify", "sha256", "write_sync"] {
        assert!(report[format!("{part}_bytes_per_second")].as_f64().unwrap() > 0.0, "{part}");
    }
    let options = "--encoder absmax --scales dq8 --block-size 128";
    let report = place.json(&format!("bench convert --shape tiny --runs 2 --dir . {options}"), 0);
    let encoders = report["encoders"].as_array().unwrap();
    assert!(encoders.len() == 1 && encoders[0]["encoder"] == "absmax", "{report}");
    assert_eq!((&report["scales"], &report["block_size"]), (&"dq8".into(), &128.into()));
    place.run("bench convert --shape tiny --dir nowhere").code(1).stderr(contains("--dir"));
    assert_eq!(place.names(), ["tiny"]);
}

#[test]
fn completions_are_scripts() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        nf4pack().args(["completions", shell]).assert().success().stdout(contains("nf4pack")).stdout(contains("block-size"));
    }
}

/// Stops a conversion once it has encoded something.
#[derive(Default)]
struct StopEarly(AtomicBool);

impl Progress for StopEarly {
    fn advance(&self, done: u64, _: u64) {
        self.0.fetch_or(done > 0, Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[test]
fn a_kept_part_of_other_options_is_an_error_that_does_not_advise_the_same_command() {
    let place = Place::new();
    place.checkpoint("model", &TINY, 7, Some(20_000));
    let options = Options { resume: true, ..Options::default() };
    let stopped = convert(&place.path("model"), &place.path("out.nf4pack"), options, &StopEarly::default());
    assert!(matches!(stopped, Err(ConvertError::Cancelled)), "{stopped:?}");
    let refused = place.run("convert model out.nf4pack --resume --scales dq8").code(1);
    refused.stderr(predicate::str::contains("hint:").and(predicate::str::contains("the same command").not()));
    assert_eq!(place.error_code("convert model out.nf4pack --resume --scales dq8"), "partial-differs");
    place.run("convert model out.nf4pack --resume").success();
    assert_eq!(place.names(), ["model", "out.nf4pack", "tiny"]);
}

#[cfg(unix)]
mod unix {
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use super::*;

    /// The program under another program's hands.
    fn shell(place: &Place, script: &str) -> Command {
        let mut command = Command::new("sh");
        let binary = assert_cmd::cargo::cargo_bin!("nf4pack");
        command.current_dir(place.folder.path()).arg("-c").arg(script).arg(binary);
        command
    }

    #[test]
    fn a_closed_pipe_is_not_an_error() {
        let place = Place::new();
        place.run("convert tiny out.nf4pack").success();
        for arguments in ["completions bash", "inspect out.nf4pack --tensors", "verify out.nf4pack --json", "--help"] {
            // Exit code of the program, not of the reader; `exec` closes the pipe before anything
            // is written.
            let script = format!("{{ sleep 0.2; \"$0\" {arguments}; echo $? >&2; }} | exec true");
            let output = shell(&place, &script).output().unwrap();
            let text = String::from_utf8(output.stderr).unwrap();
            assert_eq!(text.lines().last(), Some("0"), "{arguments}: {text}");
            assert!(!text.contains("panicked") && !text.contains("error"), "{text}");
        }
    }

    #[test]
    fn a_write_that_fails_leaves_nothing_behind() {
        let place = Place::new();
        let script = "trap '' XFSZ; ulimit -f 100; exec \"$0\" convert tiny out.nf4pack --json";
        let output = shell(&place, script).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(document["code"], "target-unwritable", "{document}");
        assert!(document["hint"].as_str().unwrap().contains("ulimit"), "{document}");
        assert_eq!(place.names(), ["tiny"]);
    }

    /// Starts a conversion that takes a while, and waits until it has begun to write.
    fn start(place: &Place, options: &[&str]) -> Child {
        let binary = assert_cmd::cargo::cargo_bin!("nf4pack");
        let mut command = Command::new(binary);
        command.current_dir(place.folder.path()).args(["convert", "large", "out.nf4pack", "--threads", "1"]).args(options);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let started = Instant::now();
        while !writes(place, &child) {
            assert!(started.elapsed() < Duration::from_secs(60), "no temporary file appears");
            std::thread::sleep(Duration::from_millis(2));
        }
        child
    }

    /// Whether it has a temporary file, which has no name on Linux.
    fn writes(place: &Place, child: &Child) -> bool {
        let open = fs::read_dir(format!("/proc/{}/fd", child.id())).into_iter().flatten().flatten();
        let unnamed = |link: PathBuf| link.starts_with(place.folder.path()) && link.to_string_lossy().ends_with("(deleted)");
        open.filter_map(|entry| fs::read_link(entry.path()).ok()).any(unnamed)
            || place.names().iter().any(|name| name.ends_with(".tmp"))
    }

    fn signal(child: &Child, name: &str) {
        let status = Command::new("sh").arg("-c").arg(format!("kill -{name} {}", child.id())).status().unwrap();
        assert!(status.success());
    }

    #[test]
    fn interrupted_it_leaves_no_target_and_no_temporary_file() {
        let place = Place::new();
        let large = Shape { hidden: 1024, intermediate: 3072, layers: 2, heads: 16, kv_heads: 8, head_dim: 128, ..TINY };
        place.checkpoint("large", &large, 7, None);

        let child = start(&place, &[]);
        signal(&child, "INT");
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.lines().last().is_some_and(|line| line.starts_with("error: ")), "{text}");
        assert_eq!(place.names(), ["large", "tiny"]);

        fs::write(place.path("out.nf4pack"), "old").unwrap();
        let child = start(&place, &["--force", "--scales", "dq8", "--json"]);
        signal(&child, "TERM");
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(document["code"], "cancelled", "{document}");
        assert_eq!(place.names(), ["large", "out.nf4pack", "tiny"]);
        assert_eq!(place.read("out.nf4pack"), b"old");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn killed_it_leaves_nothing_and_the_next_run_removes_what_others_left() {
        let place = Place::new();
        let large = Shape { hidden: 1024, intermediate: 3072, layers: 2, heads: 16, kv_heads: 8, head_dim: 128, ..TINY };
        place.checkpoint("large", &large, 7, None);
        let mut child = start(&place, &[]);
        signal(&child, "KILL");
        child.wait().unwrap();
        assert_eq!(place.names(), ["large", "tiny"]);

        fs::write(place.path(".nf4pack-a.tmp"), "dead").unwrap();
        place.run("convert tiny out.nf4pack").success();
        assert_eq!(place.names(), ["large", "out.nf4pack", "tiny"]);
        fs::create_dir_all(place.path(".nf4pack-b.tmp/inside")).unwrap();
        place.run("export out.nf4pack snapshot").success();
        assert_eq!(place.names(), ["large", "out.nf4pack", "snapshot", "tiny"]);
    }

    #[test]
    fn the_permissions_of_a_pack_are_those_of_any_new_file() {
        use std::os::unix::fs::PermissionsExt;
        let place = Place::new();
        fs::write(place.path("file"), "").unwrap();
        place.run("convert tiny out.nf4pack").success();
        let mode = |name: &str| fs::metadata(place.path(name)).unwrap().permissions().mode();
        assert_eq!(mode("out.nf4pack"), mode("file"));
    }
}

#[test]
fn a_pack_converts_from_one_weights_file_too() {
    let place = Place::new();
    place.run("convert tiny folder.nf4pack").success();
    place.run("convert tiny/model.safetensors file.nf4pack").success();
    assert!(place.read("folder.nf4pack") == place.read("file.nf4pack"));
}

#[test]
fn the_bundled_model_makes_the_round_trip() {
    let place = Place::new();
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tiny-qwen3");
    place.run(&format!("convert {source} out.nf4pack")).success();
    place.run(&format!("verify out.nf4pack --against {source}")).success();
    place.run("inspect out.nf4pack").success().stdout(contains("tokenizer.json"));
    place.run("export out.nf4pack back").success();
    assert_eq!(place.read("back/tokenizer.json"), fs::read(format!("{source}/tokenizer.json")).unwrap());
}

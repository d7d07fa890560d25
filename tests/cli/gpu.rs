//! The commands of the GPU as their user meets them, with a GPU and without.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;
use crate::common::program::{self, Failure, names};

use std::path::Path;

use assert_cmd::Command;
use assert_cmd::assert::Assert;
use nf4pack::convert::synth::{Shape, write_pack};
use predicates::prelude::*;
use serde_json::Value;
use tempfile::TempDir;

/// Of all scale types and outputs.
const KERNELS: usize = 9;

/// The program in `folder`, with these arguments, split at spaces.
fn command(folder: &Path, arguments: &str) -> Command {
    program::command(folder, &arguments.split(' ').collect::<Vec<_>>())
}

fn run(folder: &Path, arguments: &str) -> Assert {
    command(folder, arguments).assert()
}

/// Runs it with `--json`, to fail with exit code 1.
fn failure(folder: &Path, arguments: &str) -> Failure {
    program::failure(folder, &arguments.split(' ').collect::<Vec<_>>())
}

/// Runs it with `--json`, and parses all of stdout.
fn json(folder: &Path, arguments: &str, code: i32) -> Value {
    parse(&run(folder, &format!("{arguments} --json")).code(code))
}

fn parse(assert: &Assert) -> Value {
    let stdout = &assert.get_output().stdout;
    serde_json::from_slice(stdout).unwrap_or_else(|e| panic!("{e} in {:?}", String::from_utf8_lossy(stdout)))
}

/// A folder with a pack of four layers.
fn place() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_pack(&folder.path().join("tiny.nf4pack"), &Shape::from_name("tiny").unwrap(), 7, &()).unwrap();
    folder
}

fn positive(value: &Value) -> bool {
    value.as_f64().is_some_and(|v| v.is_finite() && v > 0.0)
}

fn contains(text: &str) -> impl Predicate<str> {
    predicate::str::contains(text)
}

#[test]
fn doctor_shows_the_gpu_and_the_kernels() {
    let Some(gpu) = common::gpu() else { return };
    let folder = place();
    let document = json(folder.path(), "doctor", 0);
    let used = document["adapter"].as_u64().unwrap() as usize;
    assert_eq!(document["adapters"][used]["name"], gpu.adapter().name);
    assert_eq!(document["adapters"][used]["driver"], gpu.adapter().driver);
    assert_eq!(document["limits"]["binding_bytes"], gpu.limits().max_storage_buffer_binding_size);
    assert_eq!(document["limits"]["smallest_subgroup"], gpu.subgroup_sizes().0);
    assert_eq!(document["memory"]["total"].as_u64(), gpu.memory().map(|m| m.total));
    assert_eq!(document["checked"], gpu.is_checked());
    // Without matrix units, there is nothing to test.
    let tests = document["mixed_kernels"].as_array().unwrap();
    match gpu.matrix_units() {
        Ok(_) => {
            let described = |test: &Value| test["kernel"].is_string() && test["covers"].is_string();
            assert!(tests.iter().all(described) && tests.len() > 20, "{tests:?}");
        }
        Err(reason) => assert_eq!((tests.len(), &document["precision_reason"]), (0, &reason.into())),
    }
    let failed = tests.iter().any(|test| test.get("reason").is_some());
    assert_eq!(document["precision"] == "mixed", gpu.matrix_units().is_ok() && !failed);
    let kernels = document["kernels"].as_array().unwrap();
    assert_eq!(kernels.len(), KERNELS);
    assert!(kernels.iter().all(|k| (k["fast"] == true) == k.get("reason").is_none()), "a plain kernel has a reason");
    let speed = &document["speed"];
    assert!(positive(&speed["upload"]["bytes_per_second"]) && positive(&speed["upload"]["memcpy_bytes_per_second"]));
    assert!(positive(&speed["dequant"]["copy"]["kernel_bytes_per_second"]));
    assert_eq!(speed["dequant"]["kernels"].as_array().unwrap().len(), 3);
    assert!(document.get("pack").is_none());
}

#[test]
fn doctor_plans_for_a_pack_and_a_budget() {
    let Some(_) = common::gpu() else { return };
    let folder = place();
    let pack = json(folder.path(), "doctor tiny.nf4pack", 0)["pack"].clone();
    assert_eq!((pack["layers"].as_u64(), pack["globals_bytes"].as_u64()), (Some(4), Some(0)));
    assert_eq!((&pack["plan"]["resident"], &pack["plan"]["slots"]), (&Value::from(true), &Value::from(4)));
    let (resident, smallest) = (pack["resident_bytes"].as_u64().unwrap(), pack["smallest_bytes"].as_u64().unwrap());
    assert!(smallest < resident && pack["largest_layer_bytes"].as_u64().unwrap() < smallest);
    assert_eq!(pack["plan"]["needed_bytes"], resident);

    let plan =
        |budget: u64, code| json(folder.path(), &format!("doctor tiny.nf4pack --budget {budget}"), code)["pack"].clone();
    let ring = plan(smallest, 0);
    assert_eq!((&ring["plan"]["resident"], &ring["plan"]["slots"]), (&Value::from(false), &Value::from(2)));
    assert_eq!(ring["budget_bytes"], smallest);
    assert_eq!(plan(smallest - 1, 1)["plan"], Value::Null);

    // Made of layers alone.
    let reasons = pack["cannot_run"].as_array().unwrap();
    assert!(reasons.iter().any(|reason| reason.as_str().unwrap().contains("config.json")), "{reasons:?}");
    let assert = run(folder.path(), "doctor tiny.nf4pack --budget 1GiB").success();
    assert.stdout(contains("1.07 GB")).stdout(contains("tokenizer.json"));
    let assert = run(folder.path(), &format!("doctor tiny.nf4pack --budget {smallest}")).success();
    assert.stdout(contains("2 of 4 layers"));
    let assert = run(folder.path(), "doctor tiny.nf4pack --budget 4096 --json").code(1);
    let assert = assert.stderr(contains(&format!("hint: --budget {smallest}")));
    let failed = parse(&assert);
    assert_eq!(failed["code"], "gpu-budget", "{failed}");
    assert!(failed["error"].as_str().unwrap().contains("4096"), "{failed}");
    assert_eq!(failed["kernels"].as_array().map(Vec::len), Some(KERNELS));
}

#[test]
fn doctor_shows_what_it_knows_where_something_fails() {
    let Some(gpu) = common::gpu() else { return };
    let folder = place();
    let assert = run(folder.path(), "doctor --gpu no-such-gpu").code(1).stdout(contains(&gpu.adapter().name));
    assert.stderr(contains("hint: --gpu"));
    let document = json(folder.path(), "doctor --gpu no-such-gpu", 1);
    assert_eq!(document["adapters"][gpu.adapter().index]["name"], gpu.adapter().name);
    assert!(document["code"] == "gpu-no-such" && document.get("adapter").is_none(), "{document}");
    assert_eq!((document["kernels"].as_array().map(Vec::len), &document["speed"]), (Some(0), &Value::Null));

    // The device is open by then.
    let document = json(folder.path(), "doctor none.nf4pack", 1);
    assert_eq!(document["adapter"].as_u64(), Some(gpu.adapter().index as u64));
    assert!(document["code"] == "pack-unreadable" && document["limits"].is_object(), "{document}");
}

#[test]
fn bench_dequant_counts_the_bytes_that_must_move() {
    let Some(gpu) = common::gpu() else { return };
    let folder = place();
    let report = json(folder.path(), "bench dequant --shape 96x64 --runs 2", 0);
    assert_eq!(report["gpu"]["name"], gpu.adapter().name);
    assert_eq!((report["weights"].as_u64(), report["runs"].as_u64()), (Some(96 * 64), Some(2)));
    assert!(report["sets"].as_u64().unwrap() > 1, "what fits a cache takes turns");
    let kernels = report["kernels"].as_array().unwrap();
    assert_eq!(kernels.len(), KERNELS);
    for k in kernels {
        let scales = match k["scales"].as_str().unwrap() {
            "f32" => 4 * 96,
            "bf16" => 2 * 96,
            _ => 4 + 4 * 256 + 4 + 96,
        };
        let element = if k["output"] == "f32" { 4 } else { 2 };
        assert_eq!(k["bytes"].as_u64(), Some(96 * 64 / 2 + scales + 96 * 64 * element), "{k}");
        let fields = ["median_seconds", "min_seconds", "bytes_per_second", "weights_per_second", "of_copy"];
        assert!(fields.iter().all(|field| positive(&k[field])), "{k}");
    }
    assert!(positive(&report["copy"]["kernel_bytes_per_second"]) && positive(&report["copy"]["driver_bytes_per_second"]));

    let report = json(folder.path(), "bench dequant --shape tiny --runs 1 --block-size 32", 0);
    assert_eq!((report["tensors"].as_array().map(Vec::len), report["block_size"].as_u64()), (Some(7), Some(32)));
}

#[test]
fn the_profile_of_the_kernels_goes_to_stderr() {
    let Some(_) = common::gpu() else { return };
    let folder = place();
    let mut command = command(folder.path(), "bench dequant --shape 96x64 --runs 1 --json");
    let assert = command.env("NF4PACK_PROFILE", "1").assert().success();
    parse(&assert);
    assert.stderr(contains("copy:vectors")).stderr(contains("nf4_fast:to_16")).stderr(contains("total"));
}

#[test]
fn bench_upload_has_a_baseline() {
    let Some(_) = common::gpu() else { return };
    let folder = place();
    let report = json(folder.path(), "bench upload --bytes 3MB --runs 2", 0);
    assert_eq!(report["bytes"], 3_000_000);
    let threads = report["threads"].as_array().unwrap();
    assert_eq!(threads.iter().map(|t| t["threads"].as_u64().unwrap()).collect::<Vec<_>>(), [1, 2, 4, 8]);
    for t in threads {
        assert_eq!(t["seconds"].as_array().unwrap().len(), 2);
        assert!(positive(&t["bytes_per_second"]) && positive(&t["memcpy_bytes_per_second"]), "{t}");
    }
    let report = json(folder.path(), "bench upload --bytes 20MiB --threads 3 --runs 1", 0);
    assert_eq!((report["bytes"].as_u64(), &report["threads"][0]["threads"]), (Some(20 << 20), &Value::from(3)));

    // Half a byte a weight, and a bfloat16 for each 64: of a matrix, and of the projections of all
    // layers.
    let bytes =
        |shape| json(folder.path(), &format!("bench upload --shape {shape} --threads 1 --runs 1"), 0)["bytes"].clone();
    assert_eq!(bytes("512x384"), 512 * 384 / 2 + 512 * 384 / 64 * 2);
    let layer = 192 * (2 * 256 + 2 * 128) + 3 * 192 * 512;
    assert_eq!(bytes("tiny"), 4 * (layer / 2 + layer / 64 * 2));
    let failed = failure(folder.path(), "bench upload --bytes 1000TB");
    assert!(failed.error.contains("--bytes"), "{failed:?}");
    run(folder.path(), "bench upload --shape tiny --bytes 1MB").code(2);
}

#[test]
fn bench_matmul_measures_both_products_in_each_precision() {
    let Some(_) = common::gpu() else { return };
    let folder = place();
    let report = json(folder.path(), "bench matmul --shape 128x64 --tokens 70 --runs 2", 0);
    let products = report["products"].as_array().unwrap();
    let precisions = if report["without_mixed"].is_null() { 2 } else { 1 };
    assert_eq!(products.len(), 2 * precisions, "{report}");
    for product in products {
        assert_eq!((&product["outputs"], &product["inputs"], &product["tokens"]), (&128.into(), &64.into(), &70.into()));
        assert_eq!(product["seconds"].as_array().unwrap().len(), 2);
        assert!(positive(&product["operations_per_second"]), "{product}");
    }
}

#[test]
fn bench_stream_measures_every_way_and_cleans_up() {
    let Some(_) = common::gpu() else { return };
    let folder = place();
    let report = json(folder.path(), "bench stream --shape tiny --runs 2 --dir . --threads 2", 0);
    assert_eq!((report["layers"].as_u64(), report["threads"].as_u64()), (Some(4), Some(2)));
    let layers_bytes = report["layers_bytes"].as_u64().unwrap();
    let ways = report["measurements"].as_array().unwrap();
    assert_eq!(ways.len(), 8);
    for (i, way) in ways.iter().enumerate() {
        assert_eq!(way["source"], if i < 4 { "mapped" } else { "read" });
        assert_eq!(way["verified"], i % 4 >= 2);
        assert_eq!(
            (&way["resident"], &way["slots"]),
            (&Value::from(i % 2 == 0), &Value::from(if i % 2 == 0 { 4 } else { 2 }))
        );
        // Four layers once; or two forward and two back, since the other two are still there.
        assert_eq!(way["bytes"], layers_bytes / 4 * 4);
        assert!(way["seconds"].as_array().unwrap().len() == 2 && positive(&way["bytes_per_second"]), "{way}");
        let of_upload = way["bytes_per_second"].as_f64().unwrap() / report["upload"]["bytes_per_second"].as_f64().unwrap();
        assert!((way["of_upload"].as_f64().unwrap() / of_upload - 1.0).abs() < 1e-9, "{way}");
    }
    assert_eq!(report["upload"]["threads"], 2);
    assert!(positive(&report["upload"]["memcpy_bytes_per_second"]));
    let narrowed = json(folder.path(), "bench stream --shape tiny --runs 1 --dir . --no-mmap --verify-on-load", 0);
    let ways = narrowed["measurements"].as_array().unwrap();
    assert!(ways.len() == 2 && ways.iter().all(|way| way["source"] == "read" && way["verified"] == true));

    failure(folder.path(), "bench stream --shape tiny --dir . --budget 4kB").assert("gpu-budget", &["4000"], &["--budget "]);
    failure(folder.path(), "bench stream --shape tiny --dir nowhere").assert("io", &["nowhere", "--dir"], &[]);
    assert_eq!(names(folder.path()), ["tiny.nf4pack"]);
}

#[test]
fn bench_stream_takes_a_matrix() {
    let Some(_) = common::gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let report = json(folder.path(), "bench stream --shape 256x128 --runs 1 --dir . --threads 1 --no-mmap", 0);
    assert_eq!((&report["shape"], report["layers"].as_u64()), (&Value::from("256x128"), Some(8)));
    // In the GPU's memory, sections are padded.
    let (bytes, payload) = (report["layers_bytes"].as_u64().unwrap(), 8 * (256 * 128 / 2 + 256 * 128 / 64 * 2));
    assert!((payload..payload + 8 * 512).contains(&bytes), "{bytes} of {payload}");
    assert_eq!(report["measurements"].as_array().unwrap().len(), 4);
    run(folder.path(), "bench stream --shape 3x5 --dir .").code(2).stderr(contains("3x5"));
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn bench_train_takes_the_memory_it_plans_and_cleans_up() {
    let Some(gpu) = common::gpu() else { return };
    let folder = place();
    let report = json(folder.path(), "bench train --shape tiny --batch 2 --seq 24 --rank 4 --runs 2 --dir .", 0);
    assert_eq!(
        (&report["gpu"]["name"], &report["shape"]),
        (&Value::from(gpu.adapter().name.as_str()), &Value::from("tiny"))
    );
    assert_eq!(["batch", "seq", "rank"].map(|field| report[field].as_u64().unwrap()), [2, 24, 4]);
    let seconds: Vec<f64> = report["seconds"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect();
    assert!(seconds.len() == 2 && seconds.iter().all(|&s| s > 0.0), "{seconds:?}");
    let (median, rate) = (report["median_seconds"].as_f64().unwrap(), report["tokens_per_second"].as_f64().unwrap());
    assert!((median / seconds.iter().sum::<f64>() * 2.0 - 1.0).abs() < 1e-9, "{median} of {seconds:?}");
    assert!((rate * median / 48.0 - 1.0).abs() < 1e-9, "{rate}");
    let phases = report["ms_per_phase"].as_object().unwrap();
    assert_eq!(phases.keys().collect::<Vec<_>>(), ["backward", "forward", "loss", "optimizer"]);
    assert!(phases.values().all(positive), "{phases:?}");
    // The phases are a step's: milliseconds, and no more than a few times as long as one that was
    // not looked at.
    let milliseconds: f64 = phases.values().map(|ms| ms.as_f64().unwrap()).sum();
    assert!((0.1..10.0).contains(&(milliseconds / 1e3 / median)), "{milliseconds} ms, {median} s");

    let part = |name: &str| {
        let mut parts = report["planned"].as_array().unwrap().iter();
        parts.find(|part| part[0] == name).and_then(|part| part[1].as_u64()).unwrap_or_else(|| panic!("no {name}"))
    };
    let bytes: u64 = report["planned"].as_array().unwrap().iter().map(|part| part[1].as_u64().unwrap()).sum();
    assert_eq!((report["planned_bytes"].as_u64(), &report["resident"]), (Some(bytes), &Value::from(true)));
    // Rows and columns of the seven projections: 4 floats of each at rank 4, for parameters,
    // gradient and two moments.
    let sides = (192 + 256) + 2 * (192 + 128) + (256 + 192) + 3 * (192 + 512);
    assert_eq!(part("adapter, gradient, moments"), 4 * 4 * 4 * 4 * sides);
    assert_eq!(part("residual streams"), 4 * 5 * 48 * 192);
    // Queries, keys, values, the output of attention with its denominators, the middle of the
    // residual stream, gate and up, and x A^T of the seven projections.
    let of_token = 256 + 2 * 128 + 256 + 4 + 192 + 2 * 512 + 7 * 4;
    assert_eq!((report["kept_layers"].as_u64(), part("activations kept")), (Some(4), 4 * 4 * 48 * of_token));
    if let Some(used) = report["used_bytes"].as_u64() {
        // Staging buffers are made as they are needed; what small buffers take is not planned.
        assert!((bytes - part("staging")..bytes + (1 << 20)).contains(&used), "{used} of {bytes}");
        assert!(report["reserved_bytes"].as_u64().unwrap() >= used);
    }
    assert_eq!(names(folder.path()), ["tiny.nf4pack"]);
}

/// Ctrl-C while a gigabyte is written: it is not waited for, and none of it stays.
#[test]
#[cfg(unix)]
fn bench_train_can_be_stopped_while_it_writes_its_weights() {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};

    let Some(_) = common::gpu() else { return };
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_nf4pack"));
    command.current_dir(folder.path()).env("NF4PACK_CACHE_DIR", program::CACHE);
    command.args(["bench", "train", "--shape", "qwen3-0.6b", "--dir", "."]).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.starts_with("writing:  10 %")));
    assert!(Command::new("sh").arg("-c").arg(format!("kill -INT {}", child.id())).status().unwrap().success());
    let rest: Vec<String> = lines.collect();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(rest.last().unwrap().starts_with("error: "), "{rest:?}");
    assert!(rest.iter().all(|line| !line.starts_with("converting")), "{rest:?}");
    assert_eq!(names(folder.path()), [""; 0]);
}

#[test]
fn bench_train_names_its_own_flags_where_it_does_not_fit() {
    let Some(_) = common::gpu().filter(|gpu| gpu.memory().is_some()) else { return };
    let folder = place();
    // A matrix of hundreds of gigabytes.
    let failed = failure(folder.path(), "bench train --shape tiny --batch 1024 --seq 131072 --rank 8 --dir .");
    let any = |flags: &[&str]| flags.iter().any(|flag| failed.error.contains(flag) || failed.hint.contains(flag));
    assert!(any(&["--batch", "--seq"]), "{failed:?}");
    assert!(!any(&["--micro-batch", "--max-length", "--vram-budget"]), "{failed:?}");
    failure(folder.path(), "bench train --shape tiny --dir nowhere").assert("io", &["nowhere", "--dir"], &[]);
    assert_eq!(names(folder.path()), ["tiny.nf4pack"]);
}

#[test]
fn bench_generate_measures_each_length_and_cleans_up() {
    let Some(_) = common::gpu() else { return };
    let folder = place();
    let line = "bench generate --shape tiny --prompt 3,40 --answer 5 --runs 2 --dir .";
    let report = json(folder.path(), line, 0);
    assert_eq!((&report["shape"], &report["resident"]), (&Value::from("tiny"), &Value::from(true)));
    assert_eq!(["answer", "runs"].map(|field| report[field].as_u64().unwrap()), [5, 2]);
    let (copy, weights) = (report["copy_bytes_per_second"].as_f64().unwrap(), report["weight_bytes"].as_u64().unwrap());
    assert!(copy > 0.0 && weights > 1_000_000, "{copy} {weights}");
    let texts = report["texts"].as_array().unwrap();
    assert_eq!(texts.iter().map(|text| text["prompt"].as_u64().unwrap()).collect::<Vec<_>>(), [3, 40]);
    for (text, middle) in texts.iter().zip([5, 42]) {
        let of = |field: &str| text[field].as_f64().unwrap();
        // Keys and values of 4 layers with 128 columns each.
        assert_eq!(of("bytes_per_token"), (weights + 2 * 4 * middle * 128 * 4) as f64);
        assert!((of("limit_tokens_per_second") * of("bytes_per_token") / copy - 1.0).abs() < 1e-9);
        assert!((of("of_limit") * of("limit_tokens_per_second") / of("tokens_per_second") - 1.0).abs() < 1e-9);
        assert!((of("prompt_seconds") * of("prompt_tokens_per_second") / of("prompt") - 1.0).abs() < 1e-9);
        assert!((of("ms_per_token") * of("tokens_per_second") / 1e3 - 1.0).abs() < 1e-9);
    }
    json(folder.path(), &format!("{line} --top-k 3 --top-p 0.9 --min-p 0.1 --seed 2"), 0);
    assert_eq!(names(folder.path()), ["tiny.nf4pack"]);
}

#[test]
fn a_gpu_that_does_not_exist_is_an_error_that_lists_the_others() {
    let Some(gpu) = common::gpu() else { return };
    let folder = place();
    for arguments in [
        "doctor",
        "bench dequant",
        "bench matmul",
        "bench upload",
        "bench stream --shape tiny",
        "bench train --shape tiny",
        "bench generate --shape tiny",
    ] {
        let assert = run(folder.path(), &format!("{arguments} --gpu no-such-gpu")).code(1);
        // What doctor has found out is on stdout.
        let assert = if arguments == "doctor" { assert } else { assert.stdout("") };
        assert.stderr(contains(&gpu.adapter().name)).stderr(contains("hint: --gpu"));
        let document = json(folder.path(), &format!("{arguments} --gpu 99"), 1);
        assert_eq!(document["code"], "gpu-no-such", "{document}");
    }
}

/// Without a driver: exit code 1, and what to install.
#[test]
#[cfg(target_os = "linux")]
fn without_a_driver_every_command_says_what_to_install() {
    let folder = place();
    let benches = [
        "bench dequant",
        "bench matmul",
        "bench upload",
        "bench stream --shape tiny",
        "bench train --shape tiny",
        "bench generate --shape tiny",
    ];
    for arguments in ["doctor", "doctor tiny.nf4pack"].into_iter().chain(benches) {
        let without_driver = |arguments: &str| {
            let mut command = command(folder.path(), arguments);
            command.env("VK_DRIVER_FILES", "/nonexistent").env("VK_ICD_FILENAMES", "/nonexistent").assert().code(1)
        };
        without_driver(arguments).stdout("").stderr(contains("error: ").and(contains("hint: ")));
        let document = parse(&without_driver(&format!("{arguments} --json")));
        assert_eq!(document["code"], "gpu-none", "{document}");
        assert!(document["hint"].as_str().unwrap().contains("mesa-vulkan-drivers"), "{document}");
    }
    assert_eq!(names(folder.path()), ["tiny.nf4pack"]);
}

#[test]
fn bench_longest_trains_what_it_plans() {
    if common::gpu().is_none() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let line = "bench longest --shape tiny --rank 4 --precision f32 --budget 84MB --dir .";
    let bench = json(folder.path(), line, 0);
    let found = &bench["found"][0];
    let (tokens, planned) = (found["tokens"].as_u64().unwrap(), found["planned_bytes"].as_u64().unwrap());
    assert!(tokens > 1 && planned <= 84_000_000, "{found}");
    assert!(positive(&found["step"]["seconds"]));
    // Batches and parameters of kernels are not in the plan.
    let (used, host) = (found["step"]["used_bytes"].as_u64(), found["host_bytes"].as_u64().unwrap());
    assert!(used.is_none_or(|used| used <= planned + host + (8 << 20)), "{found}");
}

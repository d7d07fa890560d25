//! Hints name only flags that the command has.

use clap::{CommandFactory, Parser};

use super::*;
use crate::cli::args::Cli;
use crate::format::Role;
use crate::model::plan::Remedy;

/// The hint of a command, and of its line on the command line.
fn hint_of(line: &str, error: impl Into<anyhow::Error>) -> String {
    let command = Cli::parse_from(["nf4pack"].into_iter().chain(line.split(' '))).command;
    Failure::new(&error.into(), Advice::of(&command)).hint.unwrap()
}

fn out_of_memory() -> GpuError {
    GpuError::OutOfMemory { what: "weights".to_owned(), requested: 1, in_use: None }
}

fn too_large() -> GpuError {
    GpuError::TooLarge { what: "weights".to_owned(), requested: 2, limit: 1, limit_name: "max_buffer_size" }
}

const COMMANDS: [&str; 10] = [
    "train p --data d --out o",
    "eval p --data d",
    "generate p --chat",
    "merge p --adapter a --base dequant --out o",
    "doctor",
    "bench dequant",
    "bench upload",
    "bench stream",
    "bench train",
    "bench generate",
];

#[test]
fn hints_name_only_flags_of_the_command() {
    for line in COMMANDS {
        let mut command = Cli::command();
        for name in line.split(' ').take(if line.starts_with("bench") { 2 } else { 1 }) {
            command = command.find_subcommand(name).unwrap().clone();
        }
        let has = |flag: &str| command.get_arguments().any(|argument| argument.get_long() == Some(flag));
        let budget = || StreamError::Budget { budget: 1, needed: 7, layer: 3, globals: 1 };
        for error in [out_of_memory().into(), too_large().into(), anyhow::Error::from(budget())] {
            let hint = hint_of(line, error);
            let flags: Vec<&str> = hint.split([' ', ',', '(', ')']).filter_map(|word| word.strip_prefix("--")).collect();
            assert!(!flags.is_empty() && flags.iter().all(|flag| has(flag)), "{line}: {hint}");
        }
    }
    assert!(hint_of(COMMANDS[0], out_of_memory()).contains("a smaller --micro-batch, --max-length or --vram-budget"));
}

#[test]
fn only_training_can_be_resumed_after_a_lost_device() {
    for line in COMMANDS {
        for error in [GpuError::DeviceLost { reason: "reset".to_owned() }, GpuError::Timeout { seconds: 60 }] {
            assert_eq!(hint_of(line, error).contains("--resume continues"), line.starts_with("train"), "{line}");
        }
    }
}

#[test]
fn a_setting_that_differs_from_the_checkpoint_has_a_hint() {
    let differs = |setting: &str| {
        let [setting, expected, found] = [setting, "1", "2"].map(str::to_owned);
        let source = Difference { setting, expected, found };
        hint_of(COMMANDS[0], RunError::OtherRun { checkpoint: "out/checkpoint-1".into(), source })
    };
    assert!(differs("--steps").contains("--epochs or --steps") && differs("--steps").contains("learning rate"));
    assert!(!differs("PACK").contains("toml") && differs("PACK").contains("name the pack"));
    assert!(differs("--data").contains("the file of --data"));
    assert!(differs("--lr").contains("give the same --lr (--config OUT/nf4pack-train.toml"));
}

#[test]
fn an_occupied_folder_has_a_hint() {
    let occupied = |found| hint_of(COMMANDS[0], RunError::Occupied { out: "out".into(), found });
    assert!(occupied(Leftover::Checkpoints).contains("--resume continues"));
    assert!(!occupied(Leftover::Adapter).contains("--resume") && occupied(Leftover::Records).contains("another --out"));
    assert!(occupied(Leftover::Foreign).contains("name another --out"));
    let elsewhere = RunError::Elsewhere { checkpoint: "a/checkpoint-1".into(), out: "b".into() };
    assert!(hint_of(COMMANDS[0], elsewhere).contains("with --out"));
    let source = std::io::Error::from(ErrorKind::PermissionDenied);
    let error = RunError::Checkpoint(CheckpointError::SetAside { path: "out/checkpoint-3".into(), source });
    assert!(error.to_string().contains("rename") && hint_of(COMMANDS[0], error).contains("--out"));
}

#[test]
fn records_that_fail_have_a_hint() {
    let full = std::io::Error::from(ErrorKind::StorageFull);
    let error = RunError::Record(RecordError::Write { path: "out/metrics.jsonl".into(), source: full });
    let hint = hint_of(COMMANDS[0], error);
    assert!(hint.contains("free some space") && hint.contains("--resume"), "{hint}");
    let source = serde_json::from_str::<u8>("x").unwrap_err();
    let error = RunError::Record(RecordError::Json { path: "out/metrics.jsonl".into(), line: 3, source });
    assert!(hint_of(COMMANDS[0], error).contains("move the file away"));
}

#[test]
fn a_run_that_does_not_fit_names_a_budget_that_does() {
    let budget = |remedy| MemoryError::Budget { budget: 1, needed: 7_000_001, remedy };
    assert!(hint_of(COMMANDS[0], budget(None)).starts_with("--vram-budget 8MB or more"));
    assert!(hint_of(COMMANDS[0], budget(Some(Remedy::Rank(8)))).starts_with("--vram-budget 8MB or more works too"));
    let matrix = |remedy| MemoryError::Matrix { limit: 1, needed: 2, remedy };
    assert!(hint_of(COMMANDS[0], matrix(Some(Remedy::Rows(1)))).contains("another GPU"));
    assert!(hint_of(COMMANDS[0], matrix(None)).contains("a smaller --micro-batch or --max-length"));
    let host = MemoryError::Host { available: 1, needed: 15_000_001, remedy: None };
    assert!(host.to_string().contains("takes 15000001 bytes of host memory") && host.to_string().contains("and 1 are"));
    assert!(hint_of(COMMANDS[0], host).starts_with("free 16MB of memory on this machine"));
    assert!(hint_of("generate p --chat", GenerateError::Memory(matrix(None))).contains("a smaller --context"));
}

#[test]
fn adapters_that_are_not_supported_can_be_merged_by_peft() {
    let hint = |error: AdapterError| hint_of("eval p --data d", error);
    let unsupported = AdapterError::Unsupported { key: "use_dora", found: json!(true) };
    assert!(hint(unsupported).contains("merge_and_unload().save_pretrained(MERGED)"));
    let setting = |key: &str| {
        let (file, expected, found) = ("adapter_config.json", "something else", json!(1));
        hint(ConfigError::BadValue { file, key: key.to_owned(), expected: expected.into(), found }.into())
    };
    assert!(setting("bias").contains("merge_and_unload"));
    assert!(setting("task_type").contains("set task_type"));
    assert!(setting("r").contains("correct adapter_config.json"));
}

#[test]
fn the_hint_about_a_configuration_names_its_file() {
    let hint = |file| {
        let (key, expected, found) = ("eos_token_id".to_owned(), "a token id", json!("x"));
        hint_of("eval p --data d", ModelError::Config(ConfigError::BadValue { file, key, expected: expected.into(), found }))
    };
    assert!(
        hint("generation_config.json").contains("generation_config.json")
            && !hint("generation_config.json").contains("--config")
    );
    assert!(hint("config.json").contains("--config FILE"));
}

#[test]
fn a_model_that_no_kernel_runs_can_still_be_exported() {
    let part = Obstacle::Part { model_type: "llama", name: "extra.weight", role: Role::Router };
    let fused = Obstacle::FusedRows { role: Role::QProj, found: 40 };
    for obstacle in [part, Obstacle::HeadDim { found: 512 }, Obstacle::Norm { model_type: "llama", found: "" }, fused] {
        let hint = hint_of("train p --data d --out o", ModelError::from(obstacle));
        assert!(hint.contains("`nf4pack export`"), "{hint}");
    }
}

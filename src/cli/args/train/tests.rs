//! Flags, files, and their precedence.

use std::fs;

use clap::Parser;

use super::super::{Cli, Command};
use super::*;
use crate::data::TrainOn;
use crate::format::Role;
use crate::model::plan::{KeepActivations, MicroBatch, OffloadActivations, OffloadVocabulary};
use crate::train::schedule::{Shape, Warmup};

fn parse(flags: &str) -> Result<Box<TrainArgs>, String> {
    let words = ["nf4pack", "train", "q.nf4pack"].into_iter().chain(flags.split_whitespace());
    match Cli::try_parse_from(words).map_err(|e| e.to_string())?.command {
        Command::Train(args) => Ok(args),
        other => Err(format!("{other:?}")),
    }
}

fn flags(flags: &str) -> TrainOptions {
    parse(&format!("--data d --out o {flags}")).unwrap().options
}

#[test]
fn flags_of_other_tools_mean_ours() {
    assert_eq!(flags("--learning-rate 1e-3 --num-train-epochs 2"), flags("--lr 1e-3 --epochs 2"));
    for out in ["--output", "--output-dir"] {
        assert_eq!(parse(&format!("--data d {out} o")).unwrap().options, flags(""));
    }
    let command = |words: &str| format!("{:?}", Cli::try_parse_from(words.split(' ')).unwrap().command);
    let generate = "nf4pack generate q.nf4pack --prompt a";
    assert_eq!(command(&format!("{generate} --max-new-tokens 7")), command(&format!("{generate} --max-tokens 7")));
    let merge = "nf4pack merge q.nf4pack --adapter a --base b";
    assert_eq!(command(&format!("{merge} --output o")), command(&format!("{merge} --out o")));
}

fn file(text: &str) -> Result<TrainOptions, String> {
    toml::from_str(text).map_err(|e: toml::de::Error| e.to_string())
}

/// Every setting, with a value other than its default.
const ALL_FLAGS: &str = "--rank 8 --alpha 4.5 --dropout 0.1 --targets v_proj,q_proj --rslora --lr 1e-4 --schedule linear \
     --warmup 7 --clip 0 --weight-decay 0.01 --seed 9223372036854775807 --epochs 3 --steps 50 --micro-batch 4 --keep-activations 3 \
     --offload-activations on --offload-vocabulary embedding --accumulate 2 \
     --max-length 512 --train-on all --strict --vram-budget 6GiB --eval-split 0.1 --eval-every 5 --early-stop 6 --save-every 8 --keep 9";

const ALL_FILE: &str = r#"
data = "d"
out = "o"
rank = 8
alpha = 4.5
dropout = 0.1
targets = ["v_proj", "q_proj"]
rslora = true
lr = 1e-4
schedule = "linear"
warmup = 7
clip = 0
weight-decay = 0.01
seed = 9223372036854775807
epochs = 3
steps = 50
micro-batch = 4
keep-activations = 3
offload-activations = "on"
offload-vocabulary = "embedding"
accumulate = 2
max-length = 512
train-on = "all"
strict = true
vram-budget = "6GiB"
eval-split = 0.1
eval-every = 5
early-stop = 6
save-every = 8
keep = 9
"#;

fn all_settings() -> Settings {
    Settings {
        rank: 8,
        alpha: 4.5,
        dropout: 0.1,
        targets: vec![Role::VProj, Role::QProj],
        rslora: true,
        lr: 1e-4,
        schedule: Shape::Linear,
        warmup: Warmup::Steps(7),
        epochs: 3,
        steps: Some(50),
        micro_batch: MicroBatch::Rows(4),
        keep_activations: KeepActivations::Layers(3),
        offload_activations: OffloadActivations::On,
        offload_vocabulary: OffloadVocabulary::Embedding,
        accumulate: 2,
        max_length: 512,
        clip: None,
        weight_decay: 0.01,
        seed: i64::MAX as u64,
        train_on: TrainOn::All,
        strict: true,
        eval_split: 0.1,
        eval_every: Some(5),
        early_stop: Some(6),
        save_every: Some(8),
        keep: 9,
        vram_budget: Some(6 << 30),
    }
}

#[test]
fn nothing_said_is_the_library_s_default() {
    assert_eq!(flags("").settings().unwrap(), Settings::default());
    assert_eq!(file("").unwrap().settings().unwrap(), Settings::default());
}

#[test]
fn flags_and_a_file_say_the_same() {
    assert_eq!(flags(ALL_FLAGS).settings().unwrap(), all_settings());
    assert_eq!(file(ALL_FILE).unwrap(), flags(ALL_FLAGS));
}

#[test]
fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.toml");
    fs::write(&path, ALL_FILE).unwrap();
    let merged = |flags: &str| parse(&format!("--config {} {flags}", path.display())).unwrap().merged().unwrap();
    assert_eq!(merged("").settings().unwrap(), all_settings());
    assert_eq!(merged("").data().unwrap(), Path::new("d"));
    assert_eq!(merged("--data e").data().unwrap(), Path::new("e"));
    let changed = "--lr 3 --clip 2 --rslora=false --micro-batch auto --keep-activations none --warmup 0.5 --targets all-linear --seed 0";
    let settings = merged(changed).settings().unwrap();
    let expected = Settings {
        lr: 3.0,
        clip: Some(2.0),
        rslora: false,
        micro_batch: MicroBatch::Auto,
        keep_activations: KeepActivations::None,
        warmup: Warmup::Fraction(0.5),
        targets: Settings::default().targets,
        seed: 0,
        ..all_settings()
    };
    assert_eq!(settings, expected);
}

#[test]
fn epochs_that_are_asked_for_win_over_steps_of_the_file() {
    let steps = |flags: &str| self::flags(flags).or(file("steps = 50\nepochs = 2").unwrap()).steps;
    assert_eq!(steps("--epochs 3"), None);
    assert_eq!(steps("--epochs 3 --steps 9"), Some(9));
    assert_eq!(steps(""), Some(50));
}

#[test]
fn the_default_length_is_within_what_the_model_was_made_for() {
    let config = fs::read("tests/fixtures/tiny-qwen3/config.json").unwrap();
    let model = ModelConfig::parse(&config, None).unwrap();
    let length = |text: &str, max_position_embeddings| {
        let model = ModelConfig { max_position_embeddings, ..model.clone() };
        file(text).unwrap().for_model(&model).settings().unwrap().max_length
    };
    assert_eq!(length("", 40_960), 2048);
    assert_eq!(length("", 512), 512);
    assert_eq!(length("max-length = 4096", 512), 4096);
}

#[test]
fn errors_of_the_file_name_the_setting() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.toml");
    let error = |text: &str, flags: &str| {
        fs::write(&path, text).unwrap();
        let error = parse(&format!("--config {} {flags}", path.display())).unwrap().merged().unwrap_err();
        error.downcast::<Usage>().unwrap().0
    };
    let name = path.display();
    assert!(error("rank = 0", "").starts_with(&format!("{name}: --rank: ")), "{}", error("rank = 0", ""));
    assert!(error("rank = 0", "--lr 0").starts_with(&format!("{name}: --rank: ")), "the first that is wrong is the file's");
    assert!(error("lr = 1", "--rank 0").starts_with("--rank: "));
    assert!(error("ranks = 1", "").starts_with(&format!("{name} is not a file for --config")));
    assert!(error("rank = 0", "--rank 2 --early-stop 3").starts_with("--early-stop needs"), "flags win");
}

/// Finds a field that [`TrainOptions::or`] forgets or confuses with another one.
#[test]
fn every_option_is_taken_from_either_side() {
    let all = flags(&format!("{ALL_FLAGS} --eval-data e --resume --base-model Qwen/Qwen3-0.6B"));
    let other = TrainOptions {
        data: Some("x".into()),
        out: Some("z".into()),
        eval_data: Some("y".into()),
        resume: Some(ResumeArg::No),
        base_model: Some("b".to_owned()),
        ..TrainOptions::from(&Settings::default())
    };
    assert_eq!(TrainOptions::default().or(all.clone()), all);
    assert_eq!(all.clone().or(TrainOptions::default()), all);
    assert_eq!(all.clone().or(other), all);
}

#[test]
fn what_is_saved_says_the_same_again() {
    for options in [
        flags(""),
        flags(ALL_FLAGS),
        flags("--warmup 0.0 --micro-batch auto --keep-activations all --eval-data e"),
        flags("--warmup 0"),
    ] {
        let text = options.to_toml().unwrap();
        let again = file(&text).unwrap();
        assert_eq!(again.settings().unwrap(), options.settings().unwrap(), "{text}");
        assert_eq!(again.to_toml().unwrap(), text);
        assert_eq!((again.data, again.out, again.eval_data), (options.data, options.out, options.eval_data));
    }
    let text = flags("").to_toml().unwrap();
    for line in [
        "targets = \"all-linear\"",
        "micro-batch = \"auto\"",
        "keep-activations = \"auto\"",
        "lr = 0.0002",
        "warmup = 0.03",
        "data = \"d\"",
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
    }
}

#[test]
fn values_of_several_forms() {
    let warmup = |text: &str| file(&format!("warmup = {text}")).unwrap().settings().unwrap().warmup;
    assert_eq!(warmup("1"), Warmup::Steps(1));
    assert_eq!(warmup("0"), Warmup::Steps(0));
    assert_eq!(warmup("0.0"), Warmup::Fraction(0.0));
    assert_eq!(warmup("\"0.5\""), Warmup::Fraction(0.5));
    assert_eq!(file("vram-budget = 1024").unwrap().settings().unwrap().vram_budget, Some(1024));
    assert_eq!(file("alpha = 3").unwrap().settings().unwrap().alpha, 3.0);
    let targets = |text: &str| file(&format!("targets = {text}")).unwrap().settings().unwrap().targets;
    assert_eq!(targets("\"q_proj, o_proj\""), [Role::QProj, Role::OProj]);
    assert_eq!(targets("\"all-linear\""), crate::lora::config::TARGETS);
    assert_eq!(flags("--targets down_proj").settings().unwrap().targets, [Role::DownProj]);
}

#[test]
fn resume_takes_a_folder_or_none() {
    let resume = |flags: &str| self::flags(flags).resume;
    assert_eq!(resume(""), None);
    assert_eq!(resume("--resume"), Some(ResumeArg::Newest));
    assert_eq!(resume("--resume=o/checkpoint-3"), Some(ResumeArg::Checkpoint("o/checkpoint-3".into())));
    assert_eq!(resume("--resume=false"), Some(ResumeArg::No));
    let of_file = |text: &str| file(text).unwrap().resume;
    assert_eq!(of_file("resume = true"), Some(ResumeArg::Newest));
    assert_eq!(of_file("resume = false"), Some(ResumeArg::No));
    assert_eq!(of_file("resume = \"o/checkpoint-3\""), Some(ResumeArg::Checkpoint("o/checkpoint-3".into())));
    assert_eq!(flags("--resume=false").or(file("resume = true").unwrap()).resume, Some(ResumeArg::No));
    assert!(!flags("--resume").to_toml().unwrap().contains("resume"), "what is saved starts a run");
    assert!(parse("--data d --out o --resume o/checkpoint-3").unwrap_err().contains("o/checkpoint-3"), "not a second PACK");
}

#[test]
fn flags_that_cannot_be_read() {
    for (flags, said) in [
        ("--out o", "--data <FILE>"),
        ("--data d", "--out <DIR>"),
        ("--data d --out o --targets q_proj,lm_head", "\"lm_head\""),
        ("--data d --out o --targets=", "all-linear"),
        ("--data d --out o --warmup 1.5", "a share of all steps below 1"),
        ("--data d --out o --micro-batch all", "auto, or a number of rows"),
        ("--data d --out o --micro-batch 0", "auto, or a number of rows"),
        ("--data d --out o --keep-activations some", "auto, none, all, or a number of layers"),
        ("--data d --out o --keep-activations 1.5", "auto, none, all, or a number of layers"),
        ("--data d --out o --schedule sine", "[possible values: constant, linear, cosine]"),
        ("--data d --out o --vram-budget 6apples", "8GiB, 500MB"),
        ("--data d --out o --rank -1", "-1"),
        ("--data d --out o --rslora=maybe", "maybe"),
    ] {
        let error = parse(flags).unwrap_err();
        assert!(error.contains(said), "{flags}: {error}");
    }
    parse("--data d --show-batch").unwrap();
}

#[test]
fn files_that_cannot_be_read() {
    for (text, said) in [
        ("ranks = 8", ["unknown field `ranks`", "`rank`", "`micro-batch`"]),
        ("max_length = 8", ["unknown field `max_length`", "`max-length`", "line 1"]),
        ("resume = 3", ["line 1", "resume = 3", "true, false or the path of a checkpoint"]),
        ("gpu = 1", ["unknown field `gpu`", "line 1", "`resume`"]),
        ("lr = \"fast\"", ["line 1", "lr", "expected f64"]),
        ("\nrank = 1.5", ["line 2", "rank = 1.5", "u32"]),
        ("targets = [\"q_proj\", \"lm_head\"]", ["line 1", "\"lm_head\"", "all-linear"]),
        ("targets = [1]", ["line 1", "a text, a number or a list of texts", ""]),
        ("warmup = -1", ["line 1", "a share of all steps below 1", ""]),
        ("schedule = \"sine\"", ["sine", "`constant`", "`cosine`"]),
        ("rank = ", ["line 1", "", ""]),
    ] {
        let error = file(text).unwrap_err();
        assert!(said.iter().all(|said| error.contains(said)), "{text}: {error}");
    }
}

#[test]
fn a_config_that_is_not_there_or_not_one_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.toml");
    let error = || format!("{:#}", parse(&format!("--config {}", path.display())).unwrap().merged().unwrap_err());
    assert!(error().contains(&format!("cannot read {}", path.display())), "{}", error());
    fs::write(&path, "rank = 'x'").unwrap();
    assert!(
        error().contains(&format!("{} is not a file for --config: line 1, `rank = 'x'`", path.display())),
        "{}",
        error()
    );
}

#[test]
fn settings_that_cannot_be_are_named_by_their_flag() {
    let error = |text: &str| file(text).unwrap().settings().unwrap_err().to_string();
    assert!(error("rank = 0").contains("--rank"));
    assert!(error("clip = -1").contains("--clip"));
    assert!(error("early-stop = 3").contains("--early-stop needs evaluation data: --eval-data"));
    assert!(error("eval-every = 3").contains("--eval-every needs"));
    assert!(error("eval-data = \"e\"\neval-split = 0.1").contains("--eval-data and --eval-split are both given"));
    file("early-stop = 3\neval-data = \"e\"\neval-split = 0").unwrap().settings().unwrap();
    let nothing = file("").unwrap();
    assert!(nothing.data().unwrap_err().to_string().contains("--data"));
    assert!(nothing.out().unwrap_err().to_string().contains("--out"));
}

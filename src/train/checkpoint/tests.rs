//! Checkpoints written and read; every damage is found.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use safetensors::SafeTensors;
use serde_json::Value;

use super::*;
use crate::data::checksum::FileChecksum;
use crate::format::Role;
use crate::io::leftovers::names;
use crate::io::{crash, record};
use crate::lora::adapter::{AdapterError, CONFIG, WEIGHTS};
use crate::random::{Generator, Stream};
use crate::train::best;
use crate::train::schedule::{Shape, Warmup};
use crate::train::settings::Settings;

pub(super) fn model() -> ModelConfig {
    ModelConfig::parse(&fs::read("tests/fixtures/tiny-qwen3/config.json").unwrap(), None).unwrap()
}

fn inputs() -> Inputs {
    let (pack, data) = ("0123abcd-00000000".to_owned(), data_identity(FileChecksum::of(b"data")));
    Inputs { pack, data, eval_data: None, micro_batch: 4, precision: "f32", total_steps: 100 }
}

/// A run after `step` steps, with random numbers and with numbers that text and other types would
/// change.
pub(super) fn checkpoint(step: u64) -> Checkpoint {
    with_settings(step, &Settings { rank: 3, alpha: 0.1 + 0.2, ..Settings::default() })
}

fn with_settings(step: u64, settings: &Settings) -> Checkpoint {
    let mut adapter = Adapter::new(settings.lora(), Some("org/model".to_owned()), &model(), 1).unwrap();
    let mut generator = Generator::new(step, Stream::Split);
    let mut moments = [vec![0.0; adapter.layout.len()], vec![0.0; adapter.layout.len()]];
    for matrix in matrices(&adapter.layout) {
        for vector in moments.iter_mut().chain([&mut adapter.vector]) {
            vector[matrix.range.clone()].fill_with(|| generator.uniform() - 0.5);
            vector[matrix.range.start] = -0.0;
            vector[matrix.range.start + 1] = f32::from_bits(1);
            vector[matrix.range.start + 2] = f32::MAX;
        }
    }
    let [exp_avg, exp_avg_sq] = moments;
    let state = State {
        step,
        total_steps: 100,
        epoch: 3,
        row: u64::MAX,
        micro_batches: (1 << 53) + 1,
        loss_tokens: 12_345_678_901,
        seconds: 0.1 + 0.2,
        now: -1,
        best_eval: Some(f64::from_bits(0x3ff1_2345_6789_abcd)),
        best_step: 3,
        best_adapter: Some(0x1234_5678),
        evals_without_gain: 2,
        eval_due: true,
        fingerprint: Fingerprint::new(settings, &inputs()),
    };
    Checkpoint { adapter, exp_avg, exp_avg_sq, state }
}

fn bits(vector: &[f32]) -> Vec<u32> {
    vector.iter().map(|x| x.to_bits()).collect()
}

/// A checkpoint in its own folder.
pub(super) fn written() -> (tempfile::TempDir, PathBuf) {
    static WRITTEN: OnceLock<crash::Tree> = OnceLock::new();
    let out = tempfile::tempdir().unwrap();
    let once = || {
        let out = tempfile::tempdir().unwrap();
        checkpoint(7).write(out.path()).unwrap();
        crash::tree(out.path())
    };
    crash::put(WRITTEN.get_or_init(once), out.path());
    let folder = out.path().join("checkpoint-7");
    (out, folder)
}

#[test]
fn it_comes_back_bit_for_bit() {
    let (out, folder) = written();
    assert_eq!(folder, out.path().join("checkpoint-7"));
    assert_eq!(names(out.path()), ["checkpoint-7"]);
    assert_eq!(names(&folder), [CONFIG, WEIGHTS, OPTIMIZER, STATE]);
    let (expected, found) = (checkpoint(7), Checkpoint::read(&folder, &model()).unwrap());
    assert_eq!(bits(&found.adapter.vector), bits(&expected.adapter.vector));
    assert_eq!(bits(&found.exp_avg), bits(&expected.exp_avg));
    assert_eq!(bits(&found.exp_avg_sq), bits(&expected.exp_avg_sq));
    assert_eq!(found.state, expected.state);
    assert_eq!(found.state.seconds.to_bits(), expected.state.seconds.to_bits());
    assert_eq!(found.adapter.config.alpha.to_bits(), expected.adapter.config.alpha.to_bits());
    assert_eq!(Adapter::read(&folder, &model()).unwrap(), expected.adapter, "PEFT's files are an adapter");
}

#[test]
fn random_times_and_losses_survive_as_text() {
    let mut generator = Generator::new(3, Stream::Split);
    let mut state = checkpoint(1).state;
    for _ in 0..1000 {
        let word = |g: &mut Generator| g.below(1 << 32) as u64;
        let number = f64::from_bits(word(&mut generator) << 32 | word(&mut generator));
        (state.seconds, state.best_eval) = if number.is_finite() { (number, Some(-number)) } else { (0.0, None) };
        let back: State = serde_json::from_slice(&serde_json::to_vec(&state).unwrap()).unwrap();
        assert_eq!(back, state, "{number:e}");
    }
}

#[test]
fn the_moments_stand_under_the_names_of_the_adapter_s_tensors() {
    let (_out, folder) = written();
    let bytes = fs::read(folder.join(OPTIMIZER)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.len(), 2 * 4 * 7 * 2);
    let name = "base_model.model.model.layers.2.self_attn.k_proj.lora_B.weight.exp_avg_sq";
    let expected = checkpoint(7);
    let place = expected.adapter.layout.place(2, Role::KProj).unwrap();
    assert_eq!(file.tensor(name).unwrap().data(), le_bytes(&expected.exp_avg_sq[place.b]));
}

#[test]
fn a_missing_file_is_named() {
    for name in [CONFIG, WEIGHTS, OPTIMIZER, STATE] {
        let (_out, folder) = written();
        fs::remove_file(folder.join(name)).unwrap();
        let error = Checkpoint::read(&folder, &model()).unwrap_err().to_string();
        assert!(error.contains(&format!("cannot read {}", folder.join(name).display())), "{error}");
    }
}

/// Reads the checkpoint with each of 60 damaged versions of a file.
fn with_damage(name: &str, damage: impl Fn(&mut Generator, &mut Vec<u8>)) -> Vec<CheckpointError> {
    let (_out, folder) = written();
    let mut generator = Generator::new(9, Stream::Split);
    let whole = fs::read(folder.join(name)).unwrap();
    let mut read = || {
        let mut bytes = whole.clone();
        damage(&mut generator, &mut bytes);
        fs::write(folder.join(name), bytes).unwrap();
        Checkpoint::read(&folder, &model()).unwrap_err()
    };
    std::iter::repeat_with(&mut read).take(60).collect()
}

#[test]
fn every_cut_is_an_error() {
    for name in [CONFIG, WEIGHTS, OPTIMIZER, STATE] {
        with_damage(name, |generator, bytes| bytes.truncate(generator.below(bytes.len() - 1)));
    }
}

#[test]
fn every_flipped_bit_of_the_numbers_is_an_error() {
    for name in [WEIGHTS, OPTIMIZER] {
        // The end of the file is tensors.
        let errors = with_damage(name, |generator, bytes| {
            let at = bytes.len() - 1 - generator.below(4000);
            bytes[at] ^= 1 << generator.below(8);
        });
        assert!(errors.iter().all(|e| matches!(e, CheckpointError::Checksum { .. })), "{errors:?}");
    }
}

#[test]
fn files_of_another_checkpoint_are_noticed() {
    for name in [WEIGHTS, OPTIMIZER, STATE] {
        let (out, folder) = written();
        let other = checkpoint(8).write(out.path()).unwrap();
        fs::copy(other.join(name), folder.join(name)).unwrap();
        let error = Checkpoint::read(&folder, &model()).unwrap_err();
        let of_step = matches!(error, CheckpointError::Step { expected: 7, found: 8, .. });
        assert!(if name == STATE { of_step } else { matches!(error, CheckpointError::Checksum { .. }) }, "{error}");
    }
}

/// A state file with a change.
fn with_state(change: impl FnOnce(&mut Value)) -> CheckpointError {
    let (_out, folder) = written();
    let mut state: Value = serde_json::from_slice(&fs::read(folder.join(STATE)).unwrap()).unwrap();
    change(&mut state);
    fs::write(folder.join(STATE), state.to_string()).unwrap();
    Checkpoint::read(&folder, &model()).unwrap_err()
}

#[test]
fn a_state_that_is_not_understood() {
    let json = |error: &CheckpointError| matches!(error, CheckpointError::Json { .. });
    assert!(json(&with_state(|s| s["state"]["step"] = (-1).into())));
    assert!(json(&with_state(|s| s["state"]["seconds"] = Value::Null)));
    assert!(json(&with_state(|s| s["state"]["more"] = 1.into())));
    assert!(json(&with_state(|s| *s = Value::Null)));
    let newer = with_state(|s| {
        *s = serde_json::json!({ "format": 5, "what is not known today": [] });
    });
    assert!(matches!(newer, CheckpointError::Format { expected: 4, found: 5, .. }), "{newer}");
}

#[test]
fn moments_that_are_not_the_adapter_s() {
    let (_out, folder) = written();
    let path = folder.join(OPTIMIZER);
    let bytes = fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight.exp_avg";
    let write = |change: &dyn Fn(&mut BTreeMap<String, safetensors::tensor::TensorView<'_>>)| {
        let mut tensors: BTreeMap<_, _> = file.tensors().into_iter().collect();
        change(&mut tensors);
        fs::write(&path, safetensors::serialize(tensors, None).unwrap()).unwrap();
        Checkpoint::read(&folder, &model()).unwrap_err().to_string()
    };
    static ZEROS: [u8; 3 * 192 * 4] = [0; 3 * 192 * 4];
    let with = |dtype, shape: [usize; 2]| {
        write(&|t| {
            let len = shape[0] * shape[1] * if dtype == Dtype::F32 { 4 } else { 2 };
            let view = safetensors::tensor::TensorView::new(dtype, shape.to_vec(), &ZEROS[..len]).unwrap();
            t.insert(name.to_owned(), view);
        })
    };
    let missing = write(&|t| assert!(t.remove(name).is_some()));
    assert!(missing.contains(OPTIMIZER) && missing.contains(name), "{missing}");
    let shape = with(Dtype::F32, [192, 3]);
    assert!(shape.ends_with(r#"exp_avg" should be F32 of [3, 192], found F32 of [192, 3]"#), "{shape}");
    assert!(with(Dtype::F16, [3, 192]).ends_with("should be F32 of [3, 192], found F16 of [3, 192]"));
}

#[test]
fn a_checkpoint_of_another_model_is_refused() {
    let (_out, folder) = written();
    let other = ModelConfig { layers: 3, ..model() };
    let error = Checkpoint::read(&folder, &other).unwrap_err();
    assert!(matches!(error, CheckpointError::Adapter { source: AdapterError::UnexpectedTensor { .. }, .. }), "{error}");
}

#[test]
fn moments_of_a_wrong_length_are_not_written() {
    let out = tempfile::tempdir().unwrap();
    let mut short = checkpoint(1);
    short.exp_avg_sq.pop();
    assert!(matches!(short.write(out.path()).unwrap_err(), CheckpointError::Length { .. }));
    assert_eq!(names(out.path()), [""; 0]);
}

#[test]
fn where_it_cannot_be_written_the_folder_is_named() {
    let out = tempfile::tempdir().unwrap();
    fs::write(out.path().join("file"), "").unwrap();
    let error = checkpoint(1).write(&out.path().join("file")).unwrap_err().to_string();
    assert!(error.contains("file/checkpoint-1") && error.contains("cannot write"), "{error}");
}

#[test]
fn the_latest_is_the_one_with_the_most_steps() {
    let out = tempfile::tempdir().unwrap();
    assert_eq!(Checkpoint::latest(&out.path().join("none")).unwrap(), None);
    assert_eq!(Checkpoint::latest(out.path()).unwrap(), None);
    for step in [9, 100, 20] {
        checkpoint(step).write(out.path()).unwrap();
    }
    other_things(out.path());
    assert_eq!(Checkpoint::latest(out.path()).unwrap(), Some(out.path().join("checkpoint-100")));
    let error = Checkpoint::latest(&out.path().join("checkpoint-9").join(STATE)).unwrap_err();
    assert!(matches!(error, CheckpointError::Read { .. }), "{error}");
}

/// Entries that look like checkpoints, but are not.
fn other_things(out: &Path) {
    for name in ["checkpoint-0200", "checkpoint-", "checkpoint-x", "checkpoint-+300", "old-checkpoint-400", ".nf4pack-x"] {
        fs::create_dir(out.join(name)).unwrap();
        fs::write(out.join(name).join(OPTIMIZER), "").unwrap();
    }
    fs::write(out.join("checkpoint-500"), "a file").unwrap();
    // The form of transformers.
    fs::create_dir(out.join("checkpoint-600")).unwrap();
    fs::write(out.join("checkpoint-600").join(STATE), "{}").unwrap();
    fs::write(out.join("checkpoint-600/optimizer.pt"), "").unwrap();
    #[cfg(unix)]
    std::os::unix::fs::symlink(out.join("checkpoint-100"), out.join("checkpoint-700")).unwrap();
}

#[test]
fn pruning_keeps_the_newest_and_everything_else() {
    let out = tempfile::tempdir().unwrap();
    other_things(out.path());
    let others = names(out.path());
    for step in [9, 100, 20, 3] {
        checkpoint(step).write(out.path()).unwrap();
    }
    let left = |keep| {
        assert!(Checkpoint::prune(out.path(), 100, keep).is_empty());
        let mut left = names(out.path());
        left.retain(|name| !others.contains(name));
        left
    };
    assert_eq!(left(9), ["checkpoint-100", "checkpoint-20", "checkpoint-3", "checkpoint-9"]);
    assert_eq!(left(2), ["checkpoint-100", "checkpoint-20"]);
    assert_eq!(left(0), ["checkpoint-100"]);
    assert!(others.iter().all(|name| out.path().join(name).symlink_metadata().is_ok()));
    Checkpoint::read(&out.path().join("checkpoint-100"), &model()).unwrap();
}

#[test]
fn folders_that_cannot_be_removed_are_reported_and_tried_again() {
    let out = tempfile::tempdir().unwrap();
    for step in [1, 2, 3] {
        checkpoint(step).write(out.path()).unwrap();
    }
    let refused = |_: &Path| Err(io::Error::from(io::ErrorKind::PermissionDenied));
    let refuse_the_first = |path: &Path| {
        let file = fs::read(path.join("removed").join(STATE)).unwrap();
        if String::from_utf8(file).unwrap().contains("\"step\": 1,") { refused(path) } else { fs::remove_dir_all(path) }
    };
    let failed = Checkpoint::prune_with(out.path(), 3, 1, refuse_the_first);
    match &failed[..] {
        [CheckpointError::Remove { path, .. }] => assert_eq!(path, &out.path().join("checkpoint-1")),
        other => panic!("{other:?}"),
    }
    // It has lost its name, so nobody takes it for a complete one; the others were removed.
    let left = names(out.path());
    assert!(left.len() == 2 && left[0].ends_with(".tmp") && left[1] == "checkpoint-3", "{left:?}");
    assert_eq!(Checkpoint::prune_with(out.path(), 3, 1, refused).len(), 1, "tried again");
    assert!(Checkpoint::prune(out.path(), 3, 1).is_empty());
    assert_eq!(names(out.path()), ["checkpoint-3"]);
}

#[test]
fn a_later_checkpoint_does_not_count_among_those_that_are_kept() {
    let out = tempfile::tempdir().unwrap();
    for step in [1, 2, 9] {
        checkpoint(step).write(out.path()).unwrap();
    }
    assert!(Checkpoint::prune(out.path(), 2, 1).is_empty());
    assert_eq!(names(out.path()), ["checkpoint-2", "checkpoint-9"]);
    let (renamed, stuck) = Checkpoint::set_aside(out.path(), 2).unwrap();
    assert_eq!(renamed, [out.path().join("aside-1-checkpoint-9")]);
    assert!(stuck.is_empty());
}

#[test]
fn a_step_that_is_saved_twice_keeps_what_was_there_unless_it_is_the_same() {
    let out = tempfile::tempdir().unwrap();
    let folder = checkpoint(5).write(out.path()).unwrap();
    let mut again = checkpoint(5);
    again.state.evals_without_gain += 1;
    assert_eq!(again.write(out.path()).unwrap(), folder);
    assert_eq!(names(out.path()), ["checkpoint-5"]);
    assert_eq!(Checkpoint::read(&folder, &model()).unwrap(), again);

    let mut other = again.clone();
    other.exp_avg[0] += 1.0;
    assert_eq!(other.write(out.path()).unwrap(), folder);
    assert_eq!(names(out.path()), ["aside-1-checkpoint-5", "checkpoint-5"]);
    assert_eq!(Checkpoint::read(&folder, &model()).unwrap(), other);
    assert_eq!(Checkpoint::read(&out.path().join("aside-1-checkpoint-5"), &model()).unwrap(), again);

    // A checkpoint of another program is not overwritten, either.
    fs::write(out.path().join("checkpoint-6"), "mine").unwrap();
    checkpoint(6).write(out.path()).unwrap();
    assert_eq!(fs::read(out.path().join("aside-1-checkpoint-6")).unwrap(), b"mine");
}

#[test]
fn another_run_is_recognised_by_the_first_setting_that_differs() {
    let settings = Settings::default();
    let kept = Fingerprint::new(&settings, &inputs());
    assert_eq!(kept.micro_batch(), Some(4));
    let difference =
        |settings: &Settings, inputs: &Inputs| kept.check(&Fingerprint::new(settings, inputs)).map_err(|d| d.setting);
    let setting = |change: fn(&mut Settings)| {
        let mut changed = settings.clone();
        change(&mut changed);
        difference(&changed, &inputs()).unwrap_err()
    };
    assert_eq!(difference(&settings, &inputs()), Ok(()));
    assert_eq!(setting(|s| s.rank = 8), "--rank");
    assert_eq!(setting(|s| s.alpha = 16.0), "--alpha");
    assert_eq!(setting(|s| s.dropout = 0.1), "--dropout");
    assert_eq!(setting(|s| s.targets.truncate(6)), "--targets");
    assert_eq!(setting(|s| s.rslora = true), "--rslora");
    assert_eq!(setting(|s| s.lr = s.lr.next_up()), "--lr");
    assert_eq!(setting(|s| s.schedule = Shape::Linear), "--schedule");
    assert_eq!(setting(|s| s.warmup = Warmup::Steps(0)), "--warmup");
    assert_eq!(setting(|s| s.accumulate = 2), "--accumulate");
    assert_eq!(setting(|s| s.max_length = 2047), "--max-length");
    assert_eq!(setting(|s| s.clip = None), "--clip");
    assert_eq!(setting(|s| s.weight_decay = 0.01), "--weight-decay");
    assert_eq!(setting(|s| s.seed = 1), "--seed");
    assert_eq!(setting(|s| s.train_on = crate::data::TrainOn::All), "--train-on");
    assert_eq!(setting(|s| s.eval_split = 0.1), "--eval-split");
    let of = |inputs: Inputs| difference(&settings, &inputs).unwrap_err();
    assert_eq!(of(Inputs { pack: "x".into(), ..inputs() }), "PACK");
    assert_eq!(of(Inputs { data: data_identity(FileChecksum::of(b"dato")), ..inputs() }), "--data");
    assert_eq!(of(Inputs { eval_data: Some(data_identity(FileChecksum::of(b""))), ..inputs() }), "--eval-data");
    assert_eq!(of(Inputs { micro_batch: 2, ..inputs() }), "--micro-batch");
    assert_eq!(of(Inputs { precision: "mixed", ..inputs() }), "--precision");
    assert_eq!(of(Inputs { total_steps: 99, ..inputs() }), "--steps");
}

#[test]
fn a_fingerprint_without_a_precision_is_one_in_float32() {
    let settings = Settings::default();
    let of = |precision| Fingerprint::new(&settings, &Inputs { precision, ..inputs() });
    let mut entries = serde_json::to_value(of("f32")).unwrap();
    assert!(entries.as_object_mut().unwrap().remove("--precision").is_some());
    let old: Fingerprint = serde_json::from_value(entries).unwrap();
    assert_eq!((old.precision(), of("mixed").precision()), (Some("f32"), Some("mixed")));
    assert_eq!(old.check(&of("f32")), Ok(()));
    let error = old.check(&of("mixed")).unwrap_err().to_string();
    assert_eq!(error, "--precision is mixed now, and was f32 in the run of the checkpoint");
}

#[test]
fn the_error_has_both_values() {
    let kept = Fingerprint::new(&Settings::default(), &inputs());
    let requested = Settings { warmup: Warmup::Steps(3), ..Settings::default() };
    let error = kept.check(&Fingerprint::new(&requested, &inputs())).unwrap_err().to_string();
    assert_eq!(error, "--warmup is 3 steps now, and was a share of 0.03 in the run of the checkpoint");
}

#[test]
fn what_changes_no_number_may_change() {
    let settings = Settings { schedule: Shape::Constant, warmup: Warmup::Steps(5), ..Settings::default() };
    let kept = Fingerprint::new(&settings, &inputs());
    let mut other = Settings { keep: 9, save_every: Some(1), eval_every: Some(1), vram_budget: Some(1), ..settings };
    other.targets.reverse();
    let longer = Inputs { total_steps: 200, ..inputs() };
    assert_eq!(kept.check(&Fingerprint::new(&other, &longer)), Ok(()), "with a constant rate a run may be made longer");
}

/// With an adapter of a few pages, so that the files of every crash are compared in a short time.
fn small(step: u64) -> Checkpoint {
    with_settings(step, &Settings { rank: 1, targets: vec![Role::KProj], ..Settings::default() })
}

/// Cuts `save` of step 8, which follows that of step 7, at each of its steps. Calls `check` with
/// each folder that a crash may leave, and with its latest checkpoint, which must be whole.
fn cut(save: impl Fn(u64, &Path), mut check: impl FnMut(&Path, &Checkpoint)) -> crash::Counts {
    let root = tempfile::tempdir().unwrap();
    save(7, root.path());
    let before = crash::tree(root.path());
    let recording = record::start(root.path());
    save(8, root.path());
    let saved = [7, 8].map(|step| bits(&small(step).adapter.vector));
    crash::every_crash(root.path(), &before, &recording.steps(), |crash| {
        let root = tempfile::tempdir().unwrap();
        crash::put(crash.tree, root.path());
        let latest = Checkpoint::latest(root.path()).unwrap().expect("no checkpoint is left");
        let latest = Checkpoint::read(&latest, &model()).unwrap();
        assert!(latest.state.step == 8 || (latest.state.step == 7 && !crash.at_end));
        assert_eq!(bits(&latest.adapter.vector), saved[(latest.state.step - 7) as usize]);
        check(root.path(), &latest);
    })
}

/// What a run writes at a step: a checkpoint, the adapter of the folder, then older checkpoints are
/// removed.
fn save(step: u64, out: &Path) {
    let now = small(step);
    now.write(out).unwrap();
    now.adapter.write(out, &[]).unwrap();
    assert!(Checkpoint::prune(out, step, 1).is_empty());
}

#[test]
fn cut_at_any_step_of_saving_a_run_can_resume_and_its_adapter_is_whole() {
    let saved = [7, 8].map(|step| bits(&small(step).adapter.vector));
    let counts = cut(save, |root, _| {
        let published = Adapter::read(root, &model()).unwrap();
        assert!(saved.contains(&bits(&published.vector)), "half an adapter");
        save(9, root);
        assert_eq!(Checkpoint::read(&root.join("checkpoint-9"), &model()).unwrap().state.step, 9);
        assert_eq!(names(root), [CONFIG, WEIGHTS, "checkpoint-9"]);
    });
    assert!(counts.steps > 20 && counts.states > 20, "{counts:?}");
}

/// What a run with an early stop writes if the evaluation at a step is the best one: the adapter,
/// in its own folder and in that of the run, then a checkpoint that needs it. Older ones are
/// removed.
fn save_best(step: u64, out: &Path) {
    let mut now = small(step);
    let (best_step, checksum) = best::write(out, step, &now.adapter).unwrap();
    now.adapter.write(out, &[]).unwrap();
    (now.state.best_step, now.state.best_adapter) = (best_step, Some(checksum));
    now.write(out).unwrap();
    assert!(Checkpoint::prune(out, step, 1).is_empty());
    assert!(best::prune(out, now.state.best_key()).is_empty());
}

#[test]
fn cut_at_any_step_of_saving_the_best_adapter_the_latest_checkpoint_has_its_own() {
    let saved = [7, 8].map(|step| bits(&small(step).adapter.vector));
    let mut steps = BTreeMap::new();
    let counts = cut(save_best, |root, latest| {
        let best = best::read(root, latest.state.best_key().unwrap(), &model()).unwrap();
        assert_eq!(bits(&best.vector), bits(&latest.adapter.vector));
        let published = Adapter::read(root, &model()).unwrap();
        assert!(saved.contains(&bits(&published.vector)), "half an adapter");
        *steps.entry(latest.state.step).or_insert(0) += 1;
    });
    assert!(counts.steps > 30 && steps.len() == 2, "{counts:?}, {steps:?}");
}

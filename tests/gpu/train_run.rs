//! Tests complete training runs of tiny-qwen3: learning, resume, refusals and memory plans.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;

use std::fs;
use std::path::{Path, PathBuf};

use nf4pack::data::DataFile;
use nf4pack::dequant::stream::PackSource;
use nf4pack::format::Role;
use nf4pack::gpu::Gpu;
use nf4pack::model::memory::{KeepActivations, MicroBatch, OffloadActivations};
use nf4pack::model::{MemoryError, MemoryPlan};
use nf4pack::train::events::Event;
use nf4pack::train::learning_rate::{Shape, Warmup};
use nf4pack::train::{CheckpointError, End, Leftover, Prepared, Run, RunError, Settings, Task};
use serde_json::Value;

/// The file of all records in the folder of a run.
const METRICS: &str = "metrics.jsonl";
/// The file of an adapter's matrices.
const WEIGHTS: &str = "adapter_model.safetensors";

/// A pack of tiny-qwen3, and a folder for runs.
struct Fixture {
    gpu: Gpu,
    folder: tempfile::TempDir,
    data: DataFile,
}

impl Fixture {
    fn new() -> Option<Self> {
        let gpu = common::gpu()?;
        let folder = tempfile::tempdir().unwrap();
        common::write_tiny(&folder.path().join("tiny.nf4pack"));
        let line = |i: u32| format!("{{\"prompt\": \"Q{i}: \", \"completion\": \"zebra {} quartz {}\"}}\n", i % 3, i % 5);
        let data = folder.path().join("chat.jsonl");
        fs::write(&data, (0..24).map(line).collect::<String>()).unwrap();
        Some(Self { gpu, data: DataFile::open(&data).unwrap(), folder })
    }

    /// With a text as the training data, cut into samples.
    fn of_text() -> Option<Self> {
        let text = include_bytes!("../../LICENSE-APACHE");
        Some(Self { data: DataFile::new(Path::new("text.txt"), text[..3000].to_vec()), ..Self::new()? })
    }

    fn out(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn task<'a>(&'a self, settings: &'a Settings, out: &'a Path) -> Task<'a> {
        Task {
            settings,
            data: &self.data,
            eval_data: None,
            out,
            base: Some("tiny"),
            files: &[("settings.toml", b"x = 1")],
            now: 0,
        }
    }

    fn start(&self, settings: &Settings, out: &Path, resume: Option<&Path>) -> Result<Run, RunError> {
        let task = self.task(settings, out);
        let pack = PackSource::open(self.out("tiny.nf4pack")).unwrap();
        let prepared = Prepared::new(pack, &task, resume, &mut |_, _| true)?;
        let plan = prepared.plan(&self.gpu, settings)?;
        Run::start(&self.gpu, prepared, &task, plan)
    }
}

/// Two rows of few tokens per step and two projections per layer, to be fast on software Vulkan.
fn settings() -> Settings {
    Settings {
        rank: 4,
        targets: vec![Role::QProj, Role::DownProj],
        lr: 4e-3,
        schedule: Shape::Constant,
        warmup: Warmup::Steps(0),
        micro_batch: MicroBatch::Rows(1),
        accumulate: 2,
        max_length: 32,
        ..Settings::default()
    }
}

/// The records of a run of this kind: "step" or "eval".
fn records(out: &Path, kind: &str) -> Vec<Value> {
    let text = fs::read_to_string(out.join(METRICS)).unwrap();
    let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    records.filter(|record| record["kind"] == kind).collect()
}

fn losses(out: &Path) -> Vec<u32> {
    records(out, "step").iter().map(|step| (step["loss"].as_f64().unwrap() as f32).to_bits()).collect()
}

/// Step and loss of each evaluation.
fn evaluations(out: &Path) -> Vec<(u64, f64)> {
    records(out, "eval").iter().map(|eval| (eval["step"].as_u64().unwrap(), eval["loss"].as_f64().unwrap())).collect()
}

#[test]
fn training_on_a_text_lowers_the_held_out_loss() {
    let Some(fixture) = Fixture::of_text() else { return };
    let out = fixture.out("learned");
    let targets = Settings::default().targets;
    let settings = Settings { targets, steps: Some(8), lr: 2e-3, eval_split: 0.2, eval_every: Some(8), ..settings() };
    let mut run = fixture.start(&settings, &out, None).unwrap();
    // Adapter and settings are written before the first step, so a bad path fails early.
    let before = fs::read(out.join(WEIGHTS)).unwrap();
    assert_eq!(fs::read(out.join("settings.toml")).unwrap(), b"x = 1");
    assert_eq!(run.train(|_| true).unwrap(), End::Complete);
    let evals = evaluations(&out);
    let [(0, first), (8, last)] = evals[..] else { panic!("{evals:?}") };
    assert!(last < first - 0.4, "held-out loss {first} before, {last} after");
    assert_ne!(fs::read(out.join(WEIGHTS)).unwrap(), before);
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_bit_for_bit() {
    let Some(fixture) = Fixture::new() else { return };
    let [whole, parts] = ["whole", "parts"].map(|name| fixture.out(name));
    // Past the end of an epoch of 3 steps, with dropout, moments and a schedule.
    let settings = Settings { steps: Some(5), dropout: 0.1, schedule: Shape::Cosine, ..settings() };
    fixture.start(&settings, &whole, None).unwrap().train(|_| true).unwrap();
    let mut run = fixture.start(&settings, &parts, None).unwrap();
    let mut saved = Vec::new();
    let end = run.train(|event| match event {
        Event::Step(step, _) => step.step < 2,
        Event::Saved(path) => {
            saved.push(path.to_owned());
            true
        }
        _ => true,
    });
    assert_eq!((end.unwrap(), saved.len()), (End::Stopped, 1));
    drop(run);
    assert!(matches!(fixture.start(&settings, &parts, None), Err(RunError::Occupied { .. })));
    let other = Settings { lr: 1e-3, ..settings.clone() };
    let checkpoint = Run::latest(&parts).unwrap();
    assert_eq!(checkpoint, saved[0]);
    match fixture.start(&other, &parts, Some(&checkpoint)) {
        Err(RunError::OtherRun { source, .. }) => assert_eq!(source.setting, "--lr"),
        other => panic!("{other:?}"),
    }
    let mut run = fixture.start(&settings, &parts, Some(&checkpoint)).unwrap();
    assert_eq!(run.steps(), (2, 5));
    assert_eq!(run.train(|_| true).unwrap(), End::Complete);
    assert_eq!(losses(&parts), losses(&whole));
    assert_eq!(losses(&whole).len(), 5);
    assert_eq!(fs::read(parts.join(WEIGHTS)).unwrap(), fs::read(whole.join(WEIGHTS)).unwrap());
    let optimizer = |out: &Path| fs::read(out.join("checkpoint-5/optimizer.safetensors")).unwrap();
    assert_eq!(optimizer(&parts), optimizer(&whole));
}

#[test]
fn a_loss_that_is_not_finite_names_the_layer_and_the_last_checkpoint() {
    let Some(fixture) = Fixture::new() else { return };
    let out = fixture.out("diverged");
    // The first step of the warm-up changes nothing. The second step diverges.
    let targets = Settings::default().targets;
    let settings = Settings { targets, steps: Some(4), lr: 1e30, warmup: Warmup::Steps(2), ..settings() };
    let diverged = |settings: &Settings, out: &Path, expected: &str| match fixture
        .start(settings, out, None)
        .unwrap()
        .train(|_| true)
    {
        Err(error @ RunError::Diverged { .. }) => assert!(error.to_string().contains(expected), "{error}"),
        other => panic!("{other:?}"),
    };
    diverged(&settings, &out, "step 3: the loss is not finite; it arose first in layer 0");
    assert!(matches!(Run::latest(&out), Err(RunError::NoCheckpoint { .. })));
    // Nothing was learned, so another run may use the folder.
    let evaluated = Settings { eval_split: 0.25, eval_every: Some(1), ..settings.clone() };
    diverged(&evaluated, &out, "step 2: the held-out loss is not finite; it arose first in layer 0");
    // A checkpoint that cannot be resumed is not written, and the last good one is not replaced.
    let (out, settings) = (fixture.out("saved"), Settings { save_every: Some(1), keep: 1, ..settings });
    diverged(&settings, &out, "step 2: the loss after the step is not finite; it arose first in layer 0");
    let checkpoint = out.join("checkpoint-1");
    assert_eq!(Run::latest(&out).unwrap(), checkpoint);
    let again = fixture.start(&settings, &out, Some(&checkpoint)).unwrap().train(|_| true).unwrap_err().to_string();
    assert!(again.contains("the last good checkpoint is") && again.ends_with("checkpoint-1"), "{again}");
}

#[test]
fn nothing_of_another_run_is_replaced() {
    let Some(fixture) = Fixture::new() else { return };
    let [out, other] = ["one", "two"].map(|name| fixture.out(name));
    let settings = Settings { steps: Some(3), save_every: Some(1), keep: 2, ..settings() };
    let names = |out: &Path| {
        let mut names: Vec<String> =
            fs::read_dir(out).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name.contains("checkpoint"));
        names.sort();
        names
    };
    fixture.start(&settings, &out, None).unwrap().train(|_| true).unwrap();
    assert_eq!(names(&out), ["checkpoint-2", "checkpoint-3"]);
    let two = out.join("checkpoint-2");
    assert!(matches!(fixture.start(&settings, &other, Some(&two)), Err(RunError::Elsewhere { .. })));
    assert!(!other.exists());
    // After a resume from an older checkpoint, newer checkpoints are kept under another name.
    let mut run = fixture.start(&settings, &out, Some(&two)).unwrap();
    assert_eq!(run.set_aside, [out.join("aside-1-checkpoint-3")]);
    assert_eq!((run.train(|_| true).unwrap(), losses(&out).len()), (End::Complete, 3));
    drop(run);
    assert_eq!(names(&out), ["aside-1-checkpoint-3", "checkpoint-2", "checkpoint-3"]);
    let optimizer = |name: &str| fs::read(out.join(name).join("optimizer.safetensors")).unwrap();
    assert_eq!(optimizer("aside-1-checkpoint-3"), optimizer("checkpoint-3"));
    for name in names(&out) {
        fs::remove_dir_all(out.join(name)).unwrap();
    }
    let adapter = fs::read(out.join(WEIGHTS)).unwrap();
    assert!(matches!(fixture.start(&settings, &out, None), Err(RunError::Occupied { found: Leftover::Adapter, .. })));
    assert_eq!((fs::read(out.join(WEIGHTS)).unwrap(), losses(&out).len()), (adapter, 3));
}

#[test]
fn records_that_cannot_be_written_do_not_end_a_run() {
    let Some(fixture) = Fixture::new() else { return };
    let out = fixture.out("records");
    let settings = Settings { steps: Some(4), save_every: Some(1), keep: 9, ..settings() };
    let stop_after = |last: u64| move |event: Event<'_>| !matches!(event, Event::Step(step, _) if step.step >= last);
    fixture.start(&settings, &out, None).unwrap().train(stop_after(1)).unwrap();
    let resume = || fixture.start(&settings, &out, Some(&Run::latest(&out).unwrap())).unwrap();
    // Folders in place of files: not even root can write them.
    let metrics = fs::read(out.join(METRICS)).unwrap();
    fs::remove_file(out.join(METRICS)).unwrap();
    fs::create_dir_all(out.join(METRICS).join("in the way")).unwrap();
    let mut run = resume();
    let mut warnings = Vec::new();
    let end = run.train(|event| match event {
        Event::Warning(warning) => {
            warnings.push(warning.to_string());
            true
        }
        event => stop_after(3)(event),
    });
    assert_eq!((end.unwrap(), run.steps().0), (End::Stopped, 3));
    assert!(warnings.len() == 1 && warnings[0].contains(METRICS), "warned once: {warnings:?}");
    assert_eq!(run.lost_records(), [(METRICS, 2)]);
    drop(run);

    let mut run = resume();
    let end = run.train(|event| {
        if let Event::Warning(_) = event {
            fs::remove_dir_all(out.join(METRICS)).unwrap();
            fs::write(out.join(METRICS), &metrics).unwrap();
        }
        true
    });
    assert_eq!(end.unwrap(), End::Complete);
    assert!(run.lost_records().is_empty());
    // Only the records of the failing part are lost.
    let steps: Vec<u64> = records(&out, "step").iter().map(|step| step["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [1, 4]);
}

#[test]
fn a_checkpoint_that_cannot_be_written_again_ends_the_run() {
    let Some(fixture) = Fixture::new() else { return };
    let out = fixture.out("unwritable");
    // The evaluation after the last checkpoint changes the state: the end writes the step again.
    let settings = Settings { steps: Some(2), eval_split: 0.25, eval_every: Some(2), ..settings() };
    let checkpoint = out.join("checkpoint-2");
    let result = fixture.start(&settings, &out, None).unwrap().train(|event| {
        if matches!(event, Event::Eval(eval) if eval.step == 2) {
            // A folder in place of a file: not even root can replace it.
            let optimizer = checkpoint.join("optimizer.safetensors");
            fs::remove_file(&optimizer).unwrap();
            fs::create_dir_all(optimizer.join("in the way")).unwrap();
        }
        !matches!(event, Event::Warning(_))
    });
    match result {
        Err(RunError::Checkpoint(CheckpointError::Adapter { path, .. })) => assert_eq!(path, checkpoint),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_early_stop_leaves_the_best_adapter_and_a_stopped_evaluation_is_made_up_for() {
    let Some(fixture) = Fixture::new() else { return };
    let out = fixture.out("early");
    // The learning rate rises until the loss gets worse.
    let settings = Settings {
        steps: Some(12),
        lr: 0.24,
        warmup: Warmup::Steps(12),
        eval_split: 0.25,
        eval_every: Some(1),
        early_stop: Some(2),
        save_every: Some(1),
        keep: 12,
        ..settings()
    };
    let mut run = fixture.start(&settings, &out, None).unwrap();
    let mut evaluated = 0;
    let end = run.train(|event| {
        evaluated += u32::from(matches!(event, Event::Eval(_)));
        !(evaluated == 1 && matches!(event, Event::Evaluating(..)))
    });
    assert_eq!((end.unwrap(), evaluated, run.steps().0), (End::Stopped, 1, 1));
    drop(run);
    let mut run = fixture.start(&settings, &out, Some(&Run::latest(&out).unwrap())).unwrap();
    assert_eq!(run.train(|_| true).unwrap(), End::EarlyStop);
    let evals = evaluations(&out);
    let steps = run.steps().0;
    assert_eq!(evals.iter().map(|eval| eval.0).collect::<Vec<_>>(), (0..=steps).collect::<Vec<_>>());
    let best = evals.iter().min_by(|a, b| a.1.total_cmp(&b.1)).unwrap().0;
    assert_eq!((run.adapter_step(), steps), (best, best + 2));
    assert!(steps < 12, "{evals:?}");
    assert!(best > 0, "{evals:?}");
    drop(run);
    let mut again = fixture.start(&settings, &out, Some(&Run::latest(&out).unwrap())).unwrap();
    let adapter = fs::read(out.join(WEIGHTS)).unwrap();
    assert_eq!((again.train(|_| true).unwrap(), again.steps().0), (End::EarlyStop, steps));
    assert_eq!(fs::read(out.join(WEIGHTS)).unwrap(), adapter);
    let checkpoint = |step: u64| fs::read(out.join(format!("checkpoint-{step}")).join(WEIGHTS)).unwrap();
    assert_eq!(adapter, checkpoint(best));
    assert_ne!(adapter, checkpoint(steps));
    drop(again);
    let bests = || -> Vec<PathBuf> {
        let paths = fs::read_dir(&out).unwrap().map(|e| e.unwrap().path());
        paths.filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("best-")).collect()
    };
    // All checkpoints are kept, and with them the best adapter of each.
    let mut kept: Vec<Vec<u8>> = bests().iter().map(|folder| fs::read(folder.join(WEIGHTS)).unwrap()).collect();
    kept.sort();
    kept.dedup();
    assert!(kept.len() > 1 && kept.contains(&adapter));
    // The adapter in the folder of the run is a copy.
    fs::remove_file(out.join(WEIGHTS)).unwrap();
    drop(fixture.start(&settings, &out, Some(&Run::latest(&out).unwrap())).unwrap());
    assert_eq!(fs::read(out.join(WEIGHTS)).unwrap(), adapter);
    // Without the best adapter, the search restarts from the present one, with a warning.
    fs::remove_file(out.join(WEIGHTS)).unwrap();
    bests().iter().for_each(|folder| fs::remove_dir_all(folder).unwrap());
    let mut anew = fixture.start(&settings, &out, Some(&Run::latest(&out).unwrap())).unwrap();
    assert_eq!(fs::read(out.join(WEIGHTS)).unwrap(), checkpoint(steps));
    let mut lost = 0;
    let end = anew.train(|event| {
        lost += u32::from(matches!(event, Event::Warning(RunError::BestLost { .. })));
        !matches!(event, Event::Eval(_))
    });
    assert_eq!((end.unwrap(), anew.adapter_step(), lost), (End::Stopped, steps, 1));
}

/// The best adapter at a checkpoint is kept even if a later one took its place in the folder.
#[test]
fn a_run_that_resumes_before_its_best_step_equals_one_that_never_stopped() {
    let Some(fixture) = Fixture::new() else { return };
    let [whole, parts] = ["best-whole", "best-parts"].map(|name| fixture.out(name));
    let settings = Settings {
        steps: Some(9),
        lr: 0.02,
        warmup: Warmup::Steps(9),
        eval_split: 0.25,
        eval_every: Some(1),
        early_stop: Some(3),
        save_every: Some(4),
        keep: 1,
        ..settings()
    };
    fixture.start(&settings, &whole, None).unwrap().train(|_| true).unwrap();
    // Ends at the third step after the checkpoint as a killed process does: it saves nothing more.
    let copy = fixture.out("copy");
    let mut run = fixture.start(&settings, &parts, None).unwrap();
    let end = run.train(|event| {
        if matches!(event, Event::Step(step, _) if step.step == 7) {
            copy_folder(&parts, &copy);
            return false;
        }
        true
    });
    assert_eq!(end.unwrap(), End::Stopped);
    drop(run);
    assert!(Run::latest(&copy).unwrap().ends_with("checkpoint-4"));
    let mut run = fixture.start(&settings, &copy, Some(&Run::latest(&copy).unwrap())).unwrap();
    assert!(run.set_aside.is_empty());
    run.train(|event| !matches!(event, Event::Warning(_))).unwrap();
    // The lock is no file of the run.
    drop(run);
    assert_eq!(common::run::files(&copy, &[]), common::run::files(&whole, &[]));
}

fn copy_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn a_folder_has_one_run_at_a_time() {
    let Some(fixture) = Fixture::new() else { return };
    let out = fixture.out("locked");
    let settings = Settings { steps: Some(1), ..settings() };
    let mut run = fixture.start(&settings, &out, None).unwrap();
    match fixture.start(&settings, &out, None) {
        Err(RunError::Locked { out: found, pid }) => assert_eq!((found, pid), (out.clone(), Some(std::process::id()))),
        other => panic!("{other:?}"),
    }
    // Commands that read the adapter are not blocked.
    let config = include_bytes!("../fixtures/tiny-qwen3/config.json");
    let model = nf4pack::arch::ModelConfig::parse(config, None).unwrap();
    nf4pack::lora::Adapter::read(&out, &model).unwrap();
    assert_eq!(run.train(|_| true).unwrap(), End::Complete);
    drop(run);
    assert!(!out.join(".nf4pack-lock").exists());
    let again = fixture.start(&settings, &out, Some(&Run::latest(&out).unwrap())).unwrap();
    assert_eq!(again.steps(), (1, 1));
}

#[test]
fn memory_is_planned_and_what_does_not_fit_says_what_would() {
    let Some(fixture) = Fixture::new() else { return };
    let out = fixture.out("planned");
    let plan = |settings: &Settings| {
        let pack = PackSource::open(fixture.out("tiny.nf4pack")).unwrap();
        Prepared::new(pack, &fixture.task(settings, &out), None, &mut |_, _| true).unwrap().plan(&fixture.gpu, settings)
    };
    let (micro_batch, keep_activations) = (MicroBatch::Auto, KeepActivations::None);
    let settings = Settings { micro_batch, keep_activations, max_length: 64, ..settings() };
    let roomy = plan(&settings).unwrap();
    assert!(roomy.micro_batch > 1 && roomy.stream.resident, "{roomy:?}");
    let parts: u64 = roomy.parts().iter().map(|(_, bytes)| bytes).sum();
    assert_eq!(parts, roomy.total());
    let one = plan(&Settings { micro_batch: MicroBatch::Rows(1), ..settings.clone() }).unwrap();
    // Too little for the maximum number of rows, but enough for one.
    let budget = one.total() + (roomy.total() - one.total()) / 2;
    let tight = plan(&Settings { vram_budget: Some(budget), ..settings.clone() }).unwrap();
    assert!((1..roomy.micro_batch).contains(&tight.micro_batch) && tight.total() <= budget, "{tight:?}");
    let too_many =
        Settings { micro_batch: MicroBatch::Rows(roomy.micro_batch), vram_budget: Some(tight.total()), ..settings.clone() };
    match plan(&too_many) {
        Err(RunError::Plan(MemoryError::Budget { remedy: Some(remedy), needed, .. })) => {
            assert!(remedy.to_string().starts_with("--micro-batch ") && needed > tight.total(), "{remedy}");
        }
        other => panic!("{other:?}"),
    }
    match plan(&Settings { vram_budget: Some(1000), ..settings.clone() }) {
        Err(RunError::Plan(MemoryError::Budget { remedy: None, budget: 1000, needed })) => assert!(needed > 1000),
        other => panic!("{other:?}"),
    }
    // Kept activations of the present memory, and as a remedy.
    let keeping = Settings { keep_activations: KeepActivations::Auto, ..roomy_settings(&settings, &roomy) };
    let kept = plan(&keeping).unwrap();
    assert!(kept.kept_layers() == kept.stream.layers && kept.total() > roomy.total(), "{kept:?}");
    let all = Settings { keep_activations: KeepActivations::All, vram_budget: Some(roomy.total()), ..keeping };
    match plan(&all) {
        Err(RunError::Plan(MemoryError::Budget { remedy: Some(remedy), .. })) => {
            assert!(remedy.to_string().starts_with("--keep-activations "), "{remedy}");
        }
        other => panic!("{other:?}"),
    }
    assert!(!out.exists(), "planning writes nothing");
}

/// The settings of a plan, with its rows.
fn roomy_settings(settings: &Settings, plan: &MemoryPlan) -> Settings {
    Settings { micro_batch: MicroBatch::Rows(plan.micro_batch), ..settings.clone() }
}

/// A run that resumes with other kept and offloaded activations equals one that never stopped.
#[test]
fn kept_and_offloaded_activations_are_no_part_of_a_run() {
    let Some(fixture) = Fixture::new() else { return };
    let [whole, parts] = ["whole", "parts"].map(|name| fixture.out(name));
    let with = |keep_activations| Settings { steps: Some(4), dropout: 0.1, keep_activations, ..settings() };
    fixture.start(&with(KeepActivations::None), &whole, None).unwrap().train(|_| true).unwrap();
    let mut run = fixture.start(&with(KeepActivations::All), &parts, None).unwrap();
    assert_eq!(run.plan.kept_layers(), run.plan.stream.layers);
    run.train(|event| !matches!(event, Event::Step(step, _) if step.step == 2)).unwrap();
    drop(run);
    let checkpoint = Run::latest(&parts).unwrap();
    let offload_activations = OffloadActivations::On;
    let resumed = Settings { offload_activations, ..with(KeepActivations::Layers(1)) };
    let mut run = fixture.start(&resumed, &parts, Some(&checkpoint)).unwrap();
    assert_eq!((run.steps(), run.plan.kept_layers()), ((2, 4), 1));
    assert!(run.plan.offloaded().0 > 0 || !fixture.gpu.has_host_buffers());
    assert_eq!(run.train(|_| true).unwrap(), End::Complete);
    assert_eq!(losses(&parts), losses(&whole));
    assert_eq!(fs::read(parts.join(WEIGHTS)).unwrap(), fs::read(whole.join(WEIGHTS)).unwrap());
}

/// The device is lost between steps and in a step. The run ends with the loss, and the checkpoint
/// before it is whole: a resumed run equals an uninterrupted one.
#[test]
fn a_device_that_is_lost_in_a_step_leaves_the_last_checkpoint() {
    let Some(fixture) = Fixture::new() else { return };
    let settings = Settings { steps: Some(4), save_every: Some(1), keep: 9, ..settings() };
    let whole = fixture.out("whole");
    fixture.start(&settings, &whole, None).unwrap().train(|_| true).unwrap();
    for (name, delay) in [("between", None), ("first", Some(1)), ("middle", Some(30))] {
        let out = fixture.out(name);
        let Some(gpu) = common::own_gpu() else { return };
        let device = gpu.device().clone();
        let lossy = Fixture { gpu, ..Fixture::new().unwrap() };
        let mut run = lossy.start(&settings, &out, None).unwrap();
        let mut thread = None;
        let result = run.train(|event| {
            match (event, delay) {
                (Event::Step(step, _), None) if step.step == 3 => device.destroy(),
                (Event::Saved(path), Some(delay)) if path.ends_with("checkpoint-2") => {
                    let device = device.clone();
                    thread = Some(std::thread::spawn(move || {
                        std::thread::sleep(std::time::Duration::from_millis(delay));
                        device.destroy();
                    }));
                }
                _ => {}
            }
            true
        });
        let error = result.unwrap_err();
        assert!(format!("{error:?}").contains("DeviceLost {"), "{name}: {error:?}");
        thread.into_iter().for_each(|thread| thread.join().unwrap());
        drop(run);
        let last = Run::latest(&out).unwrap();
        assert!(last.ends_with("checkpoint-2"), "{name}: {}", last.display());
        let mut run = fixture.start(&settings, &out, Some(&last)).unwrap();
        assert_eq!(run.train(|_| true).unwrap(), End::Complete);
        drop(run);
        assert_eq!(fs::read(out.join(WEIGHTS)).unwrap(), fs::read(whole.join(WEIGHTS)).unwrap(), "{name}");
        assert_eq!(losses(&out), losses(&whole), "{name}");
    }
}

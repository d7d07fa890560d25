//! `nf4pack train`.

mod beside;

use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Serialize;

use super::args::{ResumeArg, TrainArgs};
use super::device::{self, AdapterEntry, PrecisionEntry};
use super::model;
use super::open;
use super::outcome::Outcome;
use super::report::{self, Report};
use super::ui::{self, Meter, Table, Ui, Unit};
use crate::arch::config::ModelConfig;
use crate::convert::Progress as _;
use crate::data::DataFile;
use crate::data::form::Form;
use crate::data::keys::KeyCounts;
use crate::data::pack::batch;
use crate::data::sample::{Dataset, Dropped, Sample};
use crate::data::show::{ShownSample, show_batch};
use crate::gpu::Gpu;
use crate::model::plan::{MemoryPlan, MicroBatch, Slower};
use crate::model::precision::MixedKernels;
use crate::train::record::{EvalRecord, Record, RecordError, StepRecord};
use crate::train::run::{End, Event, Prepared, Run, RunError, Task};
use crate::train::schedule::Warmup;
use crate::train::settings::Settings;

/// The settings that were used, in the adapter's folder.
const SETTINGS_FILE: &str = "nf4pack-train.toml";
/// A run with fewer steps hardly learns; a warning names the flags that make more.
const FEW_STEPS: u64 = 10;

#[derive(Serialize)]
struct Summary {
    out: String,
    /// `None` if it could not be written.
    report: Option<String>,
    /// Warnings about the data, and about files that could not be removed or written.
    warnings: Vec<String>,
    end: End,
    steps: u64,
    total_steps: u64,
    /// Samples of the data that were left out.
    dropped: Dropped,
    seconds: f64,
    /// Tokens with a loss, in all epochs together.
    #[serde(rename = "trained_tokens")]
    loss_tokens: u64,
    /// The step whose adapter is in the folder: the last one or, with an early stop, the best one.
    adapter_step: u64,
    first_loss: Option<f32>,
    last_loss: Option<f32>,
    /// The held-out loss of that adapter.
    held_out_loss: Option<f64>,
    tokens_per_second: Option<f64>,
    micro_batch: u32,
    /// Bytes of GPU memory: planned, and allocated by the driver, if the backend reports it.
    planned_bytes: u64,
    reserved_bytes: Option<u64>,
    resident: bool,
    #[serde(flatten)]
    precision: PrecisionEntry,
    /// Layers that keep their activations for the backward pass.
    kept_layers: u32,
    /// Residual streams in host memory, and their bytes.
    offloaded_streams: u32,
    host_bytes: u64,
    gpu: AdapterEntry,
}

/// The output of `--show-batch --json`.
#[derive(Serialize)]
struct Shown {
    samples: Vec<ShownSample>,
    /// Warnings about the data.
    warnings: Vec<String>,
}

pub fn run(args: &TrainArgs) -> Result<Outcome> {
    let ui = Ui::new(args.json);
    ui::handle_interrupts_with(move || {
        ui.block("\nstopping after the current step, then saving; Ctrl-C again ends at once");
    })?;
    let options = args.merged()?;
    let data_path = options.data()?;
    let out = if args.show_batch { Path::new("") } else { options.out()? };
    let data = DataFile::open(data_path)?;
    let eval_data = options.eval_data.as_deref().map(DataFile::open).transpose()?;
    let pack = open::load(&args.pack, args.load)?;
    let model = model::read(&pack, ui)?;
    let options = options.clone().for_model(&model);
    let settings = options.settings()?;
    let toml = options.to_toml()?;
    let resume = match &options.resume {
        // --show-batch does not resume.
        _ if args.show_batch => None,
        None | Some(ResumeArg::No) => None,
        Some(ResumeArg::Checkpoint(checkpoint)) => Some(checkpoint.clone()),
        Some(ResumeArg::Newest) => Some(Run::latest(out)?),
    };
    let stem = || args.pack.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    // A resumed run keeps its base model's name.
    let base = options.base_model.clone().or_else(|| resume.is_none().then(stem));
    // --show-batch writes nothing.
    let beside = if args.show_batch { Vec::new() } else { beside::files(&pack, out, base.as_deref())? };
    let files: Vec<(&str, &[u8])> = beside.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let files = [files.as_slice(), &[(SETTINGS_FILE, toml.as_bytes())]].concat();
    let task = Task {
        settings: &settings,
        data: &data,
        eval_data: eval_data.as_ref(),
        out,
        base: base.as_deref(),
        files: &files,
        now: ui::now(),
    };
    if !args.show_batch {
        Run::check_folder(out, resume.as_deref(), &model)?;
    }
    let meter = ui.meter("reading", Unit::Rows);
    let prepared = Prepared::new(pack, &task, resume.as_deref(), &mut |done, total| {
        meter.advance(done, total);
        !ui::interrupted()
    })?;
    drop(meter);
    print_data(ui, "training data", "learned", &prepared.data, &prepared.model);
    if let Some(held_out) = &prepared.held_out {
        print_data(ui, "held out", "predicted", held_out, &prepared.model);
    }
    if args.show_batch {
        return show(ui, &prepared, &settings);
    }
    let precision = options.precision.unwrap_or_default().on_resume(prepared.precision());
    let kernels = MixedKernels::new(prepared.pack.index(), &prepared.model, settings.rank, true);
    let summary = device::with_precision(&args.gpu, Some(precision), &kernels, ui, |gpu| train(ui, gpu, prepared, &task))?;
    ui.result(&summary, || summary.text())?;
    Ok(Outcome::from(summary.end != End::Stopped))
}

/// Prints the size of the data, and warns of cut, dropped and overlong samples. `used` is "learned"
/// or "predicted".
pub fn print_data(ui: Ui, what: &str, used: &str, data: &Dataset, model: &ModelConfig) {
    let loss_tokens = data.samples.iter().map(Sample::loss_tokens).sum();
    let [tokens, loss_tokens] = [data.tokens(), loss_tokens].map(ui::grouped);
    let samples = ui::plural(data.samples.len() as u64, "sample");
    ui.stage(&format!("{what}: {samples} of {}, {tokens} tokens, {loss_tokens} of them {used}", form_name(data.form)));
    let max = model.max_position_embeddings;
    let longer = data.samples.iter().filter(|sample| sample.tokens.len() > max as usize).count() as u64;
    if longer > 0 {
        ui.warning(&format!(
            "{} longer than the model's maximum of {max} tokens; --max-length {max} cuts them",
            ui::plural(longer, "sample")
        ));
    }
    if data.cut.samples > 0 {
        let (samples, tokens) = (ui::plural(data.cut.samples, "sample"), ui::plural(data.cut.tokens, "token"));
        ui.warning(&format!("samples longer than --max-length are cut: {samples}, {tokens} in all"));
    }
    print_dropped(ui, data);
    data.notices.iter().for_each(|notice| ui.warning(&notice.to_string()));
    if let Some(keys) = unknown_keys(&data.ignored_keys) {
        ui.note(&format!("unknown keys are ignored: {keys}"));
    }
}

/// Unknown keys in words, if there are any.
fn unknown_keys(keys: &KeyCounts) -> Option<String> {
    let named = keys.named.iter().map(|(key, lines)| format!("{key} ({})", ui::plural(*lines, "line")));
    let others = (keys.others > 0).then(|| format!("and others ({})", ui::plural(keys.others, "time")));
    let all: Vec<String> = named.chain(others).collect();
    (!all.is_empty()).then(|| all.join(", "))
}

/// Warns of dropped samples, with the reason.
fn print_dropped(ui: Ui, data: &Dataset) {
    let Dropped { empty, overlong, first_line } = data.dropped;
    let reasons = [(empty, "nothing to learn"), (overlong, "nothing to learn within --max-length")];
    for (samples, reason) in reasons.into_iter().filter(|(samples, _)| *samples > 0) {
        let samples = ui::plural(samples, "sample");
        ui.warning(&format!(
            "dropped: {samples} with {reason} (the first one is line {first_line}; --strict makes this an error)"
        ));
    }
}

/// The number of dropped samples, in words.
pub fn dropped_text(dropped: Dropped) -> String {
    match dropped.empty + dropped.overlong {
        0 => String::new(),
        samples => format!(" ({} dropped)", ui::plural(samples, "sample")),
    }
}

/// The warnings about the samples, for `--json`.
pub fn warnings<'a>(data: impl IntoIterator<Item = &'a Dataset>) -> Vec<String> {
    data.into_iter().flat_map(|data| &data.notices).map(ToString::to_string).collect()
}

/// A form by its keys.
fn form_name(form: Option<Form>) -> String {
    form.map_or_else(|| "plain text".to_owned(), |form| form.keys().join("/"))
}

fn show(ui: Ui, prepared: &Prepared, settings: &Settings) -> Result<Outcome> {
    let rows = match settings.micro_batch {
        MicroBatch::Auto => 1,
        MicroBatch::Rows(rows) => rows,
    };
    let first: Vec<Vec<usize>> = prepared.epoch(settings, 0).into_iter().take(rows as usize).collect();
    let samples = show_batch(&batch(&prepared.data.samples, &first), &prepared.tokenizer)?;
    let shown = Shown { samples, warnings: warnings([&prepared.data].into_iter().chain(&prepared.held_out)) };
    ui.result(&shown, || shown.text())?;
    Ok(Outcome::Good)
}

impl Shown {
    fn text(&self) -> String {
        let sample = |(number, sample): (usize, &ShownSample)| {
            let ShownSample { tokens, learned, .. } = sample;
            format!("sample {number}: {tokens} tokens, {learned} of them learned\n{sample}\n\n")
        };
        (1..).zip(&self.samples).map(sample).collect()
    }
}

/// Prints the parts of the memory plan.
pub fn print_plan(ui: Ui, plan: &MemoryPlan) {
    let mut table = Table::new(&["GPU memory", ">"]);
    for (what, bytes) in plan.parts() {
        table.row([&what, &ui::bytes(bytes as f64)]);
    }
    let budget = plan.budget.map_or_else(String::new, |budget| format!(" of {}", ui::bytes(budget as f64)));
    table.row([&"all", &format!("{}{budget}", ui::bytes(plan.total() as f64))]);
    let layers = match plan.stream.resident {
        true => "all layers stay in GPU memory".to_owned(),
        false => format!("the layers are streamed through a ring of {}", plan.stream.slots),
    };
    let rows = ui::plural(plan.micro_batch.into(), "row");
    ui.block(&format!("\n{table}\n{rows} per forward pass; {layers}"));
    let (embedding_on_host, head_parts) = plan.offloaded_vocabulary();
    if embedding_on_host {
        ui.stage("the embedding is not in GPU memory: the host gathers the rows of a batch");
    }
    if head_parts > 0 {
        ui.stage(&format!("the output projection passes through GPU memory in {head_parts} parts"));
    }
}

/// Prints how many layers keep their activations, and why there are not more rows.
fn print_kept(ui: Ui, plan: &MemoryPlan) {
    let (kept, layers) = (plan.kept_layers(), plan.stream.layers);
    ui.stage(&match kept {
        0 => "the backward pass computes all layers again".to_owned(),
        _ if kept == layers => "all layers keep their activations for the backward pass".to_owned(),
        _ => format!("{kept} of {layers} layers keep their activations; the backward pass computes the others again"),
    });
    if let (streams @ 1.., bytes) = plan.offloaded() {
        let bytes = ui::bytes(bytes as f64);
        ui.stage(&format!("the inputs of {streams} layers are in host memory until the backward pass: {bytes}"));
    }
    if let Some(Slower { micro_batch, kept_layers, percent }) = plan.slower {
        ui.stage(&format!(
            "{micro_batch} rows, which leave room for the activations of {}, are estimated to have {percent} % of the speed",
            ui::plural(kept_layers.into(), "layer")
        ));
    }
}

fn train(ui: Ui, gpu: &Gpu, prepared: Prepared, task: &Task<'_>) -> Result<Summary> {
    let plan = prepared.plan(gpu, task.settings)?;
    print_plan(ui, &plan);
    print_kept(ui, &plan);
    if plan.budget.is_none() && task.settings.micro_batch == MicroBatch::Auto {
        ui.note("the memory of this GPU is unknown: --vram-budget SIZE lets --micro-batch auto take more rows");
    }
    let mut run = Run::start(gpu, prepared, task, plan)?;
    for path in &run.set_aside {
        ui.note(&format!("a later checkpoint was renamed to {}", path.display()));
    }
    let (done, total) = run.steps();
    warn_of_length(ui, task.settings, total);
    let meter = ui.meter_from("training", Unit::Steps, done);
    let mut warnings = warnings([&run.data].into_iter().chain(&run.held_out));
    let end = run.train(|event| {
        if let Event::Warning(warning) = &event {
            warnings.push(warning.to_string());
        }
        show_event(&meter, &event);
        !ui::interrupted()
    });
    drop(meter);
    if end.is_err() && run.left_nothing() {
        ui.note("the run failed before its first checkpoint: it saved no adapter, only its report");
    }
    let lost = run.lost_records();
    let lost = lost
        .into_iter()
        .map(|(file, count)| format!("{file} could not be written: {} missing", ui::plural(count, "record")));
    // A failed report must not hide the result of the training.
    let (report, failed) =
        write_report(gpu, &run, task, &end).map_or_else(|e| (None, Some(e.to_string())), |path| (Some(path), None));
    for warning in lost.chain(failed) {
        ui.warning(&warning);
        warnings.push(warning);
    }
    Ok(Summary::new(gpu, task, &run, end?, report, warnings))
}

/// Warns of a run that is too short to learn much.
fn warn_of_length(ui: Ui, settings: &Settings, total: u64) {
    if total < FEW_STEPS {
        ui.warning(&format!(
            "{} of the optimiser may be too few: a larger --epochs or --steps makes more, and so does a smaller --micro-batch, \
             --accumulate or --max-length",
            ui::plural(total, "step")
        ));
    }
    match settings.warmup {
        Warmup::Steps(warmup) if warmup >= total => ui.warning(&format!(
            "the warm-up takes {} and the run has {total}: the learning rate never reaches --lr (a smaller --warmup, or more steps)",
            ui::plural(warmup, "step")
        )),
        _ => {}
    }
}

/// Writes the report, also of a failed run, with the reason.
fn write_report(gpu: &Gpu, run: &Run, task: &Task<'_>, end: &Result<End, RunError>) -> Result<PathBuf, RecordError> {
    let ended = end.as_ref().map_or_else(|error| format!("failed: {error}"), |end| end_name(*end).to_owned());
    let data = format!(
        "{}{} of {}, {} tokens",
        ui::plural(run.data.samples.len() as u64, "sample"),
        dropped_text(run.data.dropped),
        form_name(run.data.form),
        ui::grouped(run.data.tokens())
    );
    let model = run.base().unwrap_or("a pack");
    let facts = [
        ("model", model.to_owned()),
        ("device", AdapterEntry::from(gpu.adapter()).to_string()),
        ("precision", PrecisionEntry::from(gpu).to_string()),
        ("data", data),
        ("rows of a forward pass", run.plan.micro_batch.to_string()),
        ("GPU memory, planned", ui::bytes(run.plan.total() as f64)),
        ("time", ui::duration(run.seconds())),
        ("tokens learned", ui::grouped(run.loss_tokens())),
        ("end", ended),
    ];
    let report = Report {
        title: format!("LoRA adapter on {model}"),
        settings: task.settings.clone(),
        facts: facts.map(|(name, value)| (name.to_owned(), value)).into(),
        records: run.records.clone(),
    };
    report::write(&report, task.out)
}

fn end_name(end: End) -> &'static str {
    match end {
        End::Stopped => "stopped; --resume continues",
        End::EarlyStop => "stopped early: the held-out loss no longer fell",
        End::Complete => "done",
    }
}

/// What a step adds to the line of progress. That has 80 columns, some of them for the bar;
/// `metrics.jsonl` has the rest.
fn step_text(loss: f32, tokens_per_second: f64) -> String {
    format!("loss {loss:.3}  {} tok/s", ui::count(tokens_per_second.round()))
}

/// Shows an event of the training.
fn show_event(meter: &Meter, event: &Event<'_>) {
    match event {
        Event::Step(step, total) => {
            meter.advance_with(step.step, *total, &step_text(step.loss, step.tokens_per_second));
        }
        // This event only lets Ctrl-C stop an evaluation.
        Event::Evaluating(..) => {}
        Event::Eval(eval) => meter.line(&eval_line(eval)),
        Event::Saved(path) => meter.line(&format!("saved {}", path.display())),
        Event::Warning(warning) => meter.line(&format!("warning: {warning}; the training continues and tries again")),
    }
}

fn eval_line(eval: &EvalRecord) -> String {
    format!("step {}: held-out loss {:.4}, perplexity {:.2}", eval.step, eval.loss, eval.perplexity)
}

impl Summary {
    fn new(gpu: &Gpu, task: &Task<'_>, run: &Run, end: End, report: Option<PathBuf>, warnings: Vec<String>) -> Self {
        let steps: Vec<&StepRecord> = run.records.iter().filter_map(step_of).collect();
        let evals = run.records.iter().filter_map(|record| if let Record::Eval(eval) = record { Some(eval) } else { None });
        let speeds: Vec<f64> = steps.iter().map(|step| step.tokens_per_second).collect();
        let (done, total_steps) = run.steps();
        Self {
            out: task.out.display().to_string(),
            report: report.map(|path| path.display().to_string()),
            warnings,
            end,
            steps: done,
            total_steps,
            dropped: run.data.dropped,
            seconds: run.seconds(),
            loss_tokens: run.loss_tokens(),
            adapter_step: run.adapter_step(),
            first_loss: steps.first().map(|step| step.loss),
            last_loss: steps.last().map(|step| step.loss),
            held_out_loss: evals.filter(|eval| eval.step <= run.adapter_step()).last().map(|eval| eval.loss),
            tokens_per_second: ui::median(&speeds),
            micro_batch: run.plan.micro_batch,
            planned_bytes: run.plan.total(),
            reserved_bytes: gpu.allocated().map(|allocated| allocated.reserved),
            resident: run.plan.stream.resident,
            precision: gpu.into(),
            kept_layers: run.plan.kept_layers(),
            offloaded_streams: run.plan.offloaded().0,
            host_bytes: run.plan.offloaded().1,
            gpu: gpu.adapter().into(),
        }
    }

    fn text(&self) -> String {
        let loss = |loss: Option<f32>| loss.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.4}"));
        let held_out = self.held_out_loss.map_or_else(String::new, |loss| format!(", held-out loss {loss:.4}"));
        let ended = end_name(self.end);
        format!(
            "\n{ended}: {} of {} steps in {}, loss {} -> {}{held_out}\nadapter  {} (of step {})\nreport   {}\n",
            self.steps,
            self.total_steps,
            ui::duration(self.seconds),
            loss(self.first_loss),
            loss(self.last_loss),
            ui::one_line(&self.out),
            self.adapter_step,
            ui::one_line(self.report.as_deref().unwrap_or("could not be written")),
        )
    }
}

fn step_of(record: &Record) -> Option<&StepRecord> {
    if let Record::Step(step) = record { Some(step) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_named_and_the_others_are_counted() {
        let keys = |named: &[(&str, u64)], others| {
            let named = named.iter().map(|(key, lines)| ((*key).to_owned(), *lines)).collect();
            unknown_keys(&KeyCounts { named, others })
        };
        assert_eq!(keys(&[], 0), None);
        assert_eq!(keys(&[("id", 1), ("source", 2)], 0).unwrap(), "id (1 line), source (2 lines)");
        assert_eq!(keys(&[("id", 1)], 3000).unwrap(), "id (1 line), and others (3,000 times)");
    }

    #[test]
    fn a_step_leaves_columns_for_the_bar() {
        assert_eq!(step_text(2.390_36, 33.4), "loss 2.390  33 tok/s");
        assert_eq!(step_text(12.0, 123_456.0), "loss 12.000  123k tok/s");
        // ` 25 %  1234 of 5000 steps  2 h 13 min left` has 43 columns, `training ` has 9.
        assert!(step_text(12.0, 123_456.0).len() + 43 + 9 + 2 <= 80 - 3);
    }
}

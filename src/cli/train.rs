//! `nf4pack train`.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::Outcome;
use super::args::TrainArgs;
use super::device::{self, AdapterEntry};
use super::ui::{self, Meter, Table, Ui, Unit};
use crate::dequant::stream::PackSource;
use crate::gpu::Gpu;
use crate::train::data::{Dataset, show_batch};
use crate::train::plan::MemoryPlan;
use crate::train::record::{EvalRecord, Record, Report, StepRecord};
use crate::train::run::{DataFile, End, Event, Prepared, Run, Task, check_folder};
use crate::train::settings::{MicroBatch, Settings};

/// The settings that were used, in the adapter's folder.
const SETTINGS_FILE: &str = "nf4pack-train.toml";

#[derive(Serialize)]
struct Summary {
    out: String,
    report: String,
    end: End,
    steps: u64,
    total_steps: u64,
    seconds: f64,
    trained_tokens: u64,
    /// The step whose adapter is in the folder: the last one or, with an early stop, the best one.
    adapter_step: u64,
    first_loss: Option<f32>,
    last_loss: Option<f32>,
    held_out_loss: Option<f64>,
    tokens_per_second: Option<f64>,
    micro_batch: u32,
    gpu_bytes: u64,
    resident: bool,
    adapter: AdapterEntry,
}

pub fn run(args: &TrainArgs) -> Result<Outcome> {
    let ui = Ui::new(args.json);
    ui::handle_interrupts()?;
    let options = args.merged()?;
    let settings = options.settings()?;
    let data = read(options.data()?)?;
    let eval_data = options.eval_data.as_deref().map(read).transpose()?;
    let pack = PackSource::open(&args.pack, true)?;
    let base = args.pack.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let toml = options.to_toml()?;
    let files = [(SETTINGS_FILE, toml.as_bytes())];
    let out = if args.show_batch { Path::new("") } else { options.out()? };
    let task = Task {
        settings: &settings,
        data: data_file(options.data()?, &data),
        eval_data: options.eval_data.as_deref().zip(eval_data.as_deref()).map(|(path, bytes)| data_file(path, bytes)),
        out,
        base: &base,
        files: &files,
        now: ui::now(),
    };
    let resume = match &args.resume {
        None => None,
        Some(Some(checkpoint)) => Some(checkpoint.clone()),
        Some(None) => Some(Run::latest(out)?),
    };
    if !args.show_batch {
        check_folder(out, resume.as_deref())?;
    }
    let prepared = Prepared::new(pack, &task, resume.as_deref())?;
    tell_data(ui, "training data", &prepared.data);
    if let Some(held_out) = &prepared.held_out {
        tell_data(ui, "held out", held_out);
    }
    if args.show_batch {
        return show(&prepared, &settings);
    }
    let summary = device::with(&args.gpu, ui, |gpu| train(ui, gpu, prepared, &task))?;
    ui.result(&summary, || summary.text())?;
    Ok(Outcome::from(summary.end != End::Stopped))
}

/// The bytes of a file of samples.
pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// JSON Lines, unless the name says that it is plain text, or it does not begin like JSON.
pub fn data_file<'a>(path: &Path, bytes: &'a [u8]) -> DataFile<'a> {
    let named_text = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("txt") || e.eq_ignore_ascii_case("md"));
    let first = bytes.iter().find(|byte| !byte.is_ascii_whitespace());
    DataFile { bytes, json_lines: !named_text && first.is_none_or(|byte| b"{[".contains(byte)) }
}

/// How much there is, and what was cut.
pub fn tell_data(ui: Ui, what: &str, data: &Dataset) {
    let [samples, tokens, trained] = [data.samples.len() as u64, data.tokens(), data.trained_tokens()].map(ui::grouped);
    ui.stage(&format!("{what}: {samples} samples, {tokens} tokens, {trained} of them learned"));
    if data.cut.samples > 0 {
        let [samples, tokens] = [data.cut.samples, data.cut.tokens].map(ui::grouped);
        ui.warning(&format!("{samples} samples were longer than --max-length and lost {tokens} tokens at their ends"));
    }
}

fn show(prepared: &Prepared, settings: &Settings) -> Result<Outcome> {
    let rows = match settings.micro_batch {
        MicroBatch::Auto => 1,
        MicroBatch::Rows(rows) => rows,
    };
    let text = show_batch(&prepared.first_batch(settings, rows), &prepared.tokenizer)?;
    ui::print(&text)?;
    Ok(Outcome::Good)
}

/// What takes how much memory.
pub fn tell_plan(ui: Ui, plan: &MemoryPlan) {
    let mut table = Table::new(&["GPU memory", ">"]);
    for (what, bytes) in plan.parts() {
        table.row([&what, &ui::bytes(bytes as f64)]);
    }
    let budget = plan.budget.map_or_else(String::new, |budget| format!(" of {}", ui::bytes(budget as f64)));
    table.row([&"all", &format!("{}{budget}", ui::bytes(plan.total() as f64))]);
    let layers = match plan.stream.resident {
        true => "all layers stay in GPU memory".to_owned(),
        false => format!("the layers go through a ring of {}", plan.stream.slots),
    };
    ui.stage(&format!("\n{table}\n{} a forward pass; {layers}", ui::plural(plan.micro_batch.into(), "row")));
}

fn train(ui: Ui, gpu: &Gpu, prepared: Prepared, task: &Task<'_>) -> Result<Summary> {
    let plan = prepared.plan(gpu, task.settings)?;
    tell_plan(ui, &plan);
    let tokenized = format!("{} samples, {} tokens", prepared.data.samples.len(), ui::grouped(prepared.data.tokens()));
    let mut run = Run::start(gpu, prepared, task, plan)?;
    for path in &run.set_aside {
        ui.note(&format!("a later checkpoint is {} now", path.display()));
    }
    let meter = ui.meter_from("training", Unit::Steps, run.steps().0);
    let end = run.train(|event| {
        tell(&meter, &event);
        !ui::interrupted()
    })?;
    drop(meter);
    let summary = Summary::new(gpu, task, &run, end);
    let facts = [
        ("model", task.base.to_owned()),
        ("device", AdapterEntry::from(gpu.adapter()).to_string()),
        ("data", tokenized),
        ("rows of a forward pass", run.plan.micro_batch.to_string()),
        ("GPU memory, planned", ui::bytes(run.plan.total() as f64)),
        ("time", ui::duration(run.seconds())),
        ("tokens learned from", ui::grouped(run.trained_tokens())),
    ];
    run.write_report(&Report {
        title: format!("LoRA adapter on {}", task.base),
        settings: task.settings.clone(),
        facts: facts.map(|(name, value)| (name.to_owned(), value)).into(),
        records: run.records.clone(),
    })?;
    Ok(summary)
}

/// How far the training is.
fn tell(meter: &Meter, event: &Event<'_>) {
    match event {
        Event::Step(step, total) => {
            let (loss, lr, speed, memory) = (step.loss, step.lr, step.tokens_per_second, ui::bytes(step.gpu_bytes as f64));
            let text = format!("loss {loss:.4}  lr {lr:.2e}  {speed:.0} tokens/s  {memory}");
            meter.tell(step.step, *total, &text);
        }
        // Heard for the sake of Ctrl-C.
        Event::Evaluating(..) => {}
        Event::Eval(eval) => meter.line(&eval_line(eval)),
        Event::Saved(path) => meter.line(&format!("saved {}", path.display())),
    }
}

fn eval_line(eval: &EvalRecord) -> String {
    format!("step {}: held-out loss {:.4}, perplexity {:.2}", eval.step, eval.loss, eval.perplexity)
}

impl Summary {
    fn new(gpu: &Gpu, task: &Task<'_>, run: &Run, end: End) -> Self {
        let steps: Vec<&StepRecord> = run.records.iter().filter_map(step_of).collect();
        let mut evals =
            run.records.iter().filter_map(|record| if let Record::Eval(eval) = record { Some(eval) } else { None });
        let speeds: Vec<f64> = steps.iter().map(|step| step.tokens_per_second).collect();
        let (done, total_steps) = run.steps();
        Self {
            out: task.out.display().to_string(),
            report: task.out.join("report.html").display().to_string(),
            end,
            steps: done,
            total_steps,
            seconds: run.seconds(),
            trained_tokens: run.trained_tokens(),
            adapter_step: run.adapter_step(),
            first_loss: steps.first().map(|step| step.loss),
            last_loss: steps.last().map(|step| step.loss),
            held_out_loss: evals.next_back().map(|eval| eval.loss),
            tokens_per_second: ui::median(&speeds),
            micro_batch: run.plan.micro_batch,
            gpu_bytes: run.plan.total(),
            resident: run.plan.stream.resident,
            adapter: gpu.adapter().into(),
        }
    }

    fn text(&self) -> String {
        let loss = |loss: Option<f32>| loss.map_or_else(|| "-".to_owned(), |loss| format!("{loss:.4}"));
        let held_out = self.held_out_loss.map_or_else(String::new, |loss| format!(", held-out loss {loss:.4}"));
        let ended = match self.end {
            End::Stopped => "stopped; --resume goes on",
            End::EarlyStop => "ended early: the held-out loss did not fall any more",
            End::Complete => "done",
        };
        format!(
            "\n{ended}: {} of {} steps in {}, loss {} -> {}{held_out}\nadapter  {} (of step {})\nreport   {}\n",
            self.steps,
            self.total_steps,
            ui::duration(self.seconds),
            loss(self.first_loss),
            loss(self.last_loss),
            self.out,
            self.adapter_step,
            self.report,
        )
    }
}

fn step_of(record: &Record) -> Option<&StepRecord> {
    if let Record::Step(step) = record { Some(step) } else { None }
}

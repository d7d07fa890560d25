//! `nf4pack train`.

use std::fs;
use std::io::{self, IsTerminal};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::Outcome;
use super::args::{TrainArgs, TrainOptions};
use super::device::{self, AdapterEntry};
use super::ui::{self, Table, Ui};
use crate::dequant::stream::PackSource;
use crate::gpu::Gpu;
use crate::train::data::{Dataset, show_batch};
use crate::train::plan::MemoryPlan;
use crate::train::record::{EvalRecord, Record, Report, StepRecord};
use crate::train::run::{DataFile, End, Event, Prepared, Run, Task};
use crate::train::settings::{MicroBatch, Settings};

/// The settings that were used, in the adapter's folder.
const SETTINGS_FILE: &str = "nf4pack-train.toml";

#[derive(Serialize)]
struct Summary {
    out: String,
    report: String,
    end: &'static str,
    steps: u64,
    total_steps: u64,
    seconds: f64,
    trained_tokens: u64,
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
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
    let task = Task {
        settings: &settings,
        data: data_file(options.data()?, &data),
        eval_data: options.eval_data.as_deref().zip(eval_data.as_deref()).map(|(path, bytes)| data_file(path, bytes)),
        out,
        base: &base,
        files: &files,
        now,
    };
    let resume = match &args.resume {
        None => None,
        Some(Some(checkpoint)) => Some(checkpoint.clone()),
        Some(None) => Some(Run::latest(out)?),
    };
    let prepared = Prepared::new(pack, &task, resume.as_deref())?;
    tell_data(ui, "training data", &prepared.data);
    if let Some(held_out) = &prepared.held_out {
        tell_data(ui, "held out", held_out);
    }
    if args.show_batch {
        return show(&prepared, &settings);
    }
    let summary = device::with(&args.gpu, ui, |gpu| train(ui, gpu, prepared, &task, &options))?;
    let stopped = summary.end == "stopped";
    ui.result(&summary, || summary.text())?;
    Ok(Outcome::from(!stopped))
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

fn train(ui: Ui, gpu: &Gpu, prepared: Prepared, task: &Task<'_>, options: &TrainOptions) -> Result<Summary> {
    let plan = prepared.plan(gpu, task.settings)?;
    tell_plan(ui, &plan);
    let tokenized = format!("{} samples, {} tokens", prepared.data.samples.len(), ui::grouped(prepared.data.tokens()));
    let mut run = Run::start(gpu, prepared, task, plan)?;
    let (done, total) = run.steps();
    let progress = Progress::new(done, total);
    let end = run.train(|event| {
        progress.tell(ui, &event);
        !ui::interrupted()
    })?;
    progress.bar.finish_and_clear();
    let summary = Summary::new(gpu, task, &run, end);
    let toml = options.to_toml()?;
    let settings = toml.lines().filter_map(|line| line.split_once(" = "));
    let settings = settings.map(|(name, value)| (name.to_owned(), value.trim_matches('"').to_owned())).collect();
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
        settings,
        facts: facts.map(|(name, value)| (name.to_owned(), value)).into(),
        records: run.records.clone(),
        sample: None,
    })?;
    Ok(summary)
}

/// How far the training is.
struct Progress {
    bar: ProgressBar,
    terminal: bool,
    /// Steps between two lines where there is no terminal.
    every: u64,
}

impl Progress {
    fn new(done: u64, total: u64) -> Self {
        let terminal = io::stderr().is_terminal();
        let style = ProgressStyle::with_template("{pos}/{len} {wide_bar:.green/dim} {msg}  {eta} left")
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("━╸─");
        let target = if terminal { ProgressDrawTarget::stderr_with_hz(10) } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target).with_style(style).with_position(done);
        bar.enable_steady_tick(Duration::from_millis(250));
        Self { bar, terminal, every: (total / 20).max(1) }
    }

    fn tell(&self, ui: Ui, event: &Event<'_>) {
        match event {
            Event::Step(step, total) => self.step(ui, step, *total),
            Event::Eval(eval) => self.line(ui, &eval_line(eval)),
            Event::Saved(path) => self.line(ui, &format!("saved {}", path.display())),
        }
    }

    fn step(&self, ui: Ui, step: &StepRecord, total: u64) {
        let text = format!(
            "loss {:.4}  lr {:.2e}  {:.0} tokens/s  {}",
            step.loss,
            step.lr,
            step.tokens_per_second,
            ui::bytes(step.gpu_bytes as f64)
        );
        self.bar.set_position(step.step);
        if !self.terminal && (step.step == 1 || step.step == total || step.step.is_multiple_of(self.every)) {
            ui.stage(&format!("step {}/{total}  {text}", step.step));
        }
        self.bar.set_message(text);
    }

    fn line(&self, ui: Ui, text: &str) {
        self.bar.suspend(|| ui.stage(text));
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
            end: match end {
                End::Complete => "complete",
                End::EarlyStop => "early stop",
                End::Stopped => "stopped",
            },
            steps: done,
            total_steps,
            seconds: run.seconds(),
            trained_tokens: run.trained_tokens(),
            first_loss: steps.first().map(|step| step.loss),
            last_loss: steps.last().map(|step| step.loss),
            held_out_loss: evals.next_back().map(|eval| eval.loss),
            tokens_per_second: (!speeds.is_empty()).then(|| super::bench::median(speeds)),
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
            "stopped" => "stopped; --resume goes on".to_owned(),
            "early stop" => "ended early: the held-out loss did not fall any more".to_owned(),
            _ => "done".to_owned(),
        };
        format!(
            "\n{ended}: {} of {} steps in {}, loss {} -> {}{held_out}\nadapter  {}\nreport   {}\n",
            self.steps,
            self.total_steps,
            ui::duration(self.seconds),
            loss(self.first_loss),
            loss(self.last_loss),
            self.out,
            self.report,
        )
    }
}

fn step_of(record: &Record) -> Option<&StepRecord> {
    if let Record::Step(step) = record { Some(step) } else { None }
}

//! The report: one HTML file that loads nothing from a network. Its script only shows the values
//! under the mouse.

mod chart;
mod series;
mod settings;

use std::io;
use std::path::{Path, PathBuf};

use crate::io::folder::publish;
use crate::train::record::{EvalRecord, Record, RecordError, StepRecord};
use crate::train::settings::Settings;
use chart::{Chart, Curve, Look, grouped, significant};
pub use series::median;
use series::{drawable, last_mean, smooth, window};
use settings::rows;

/// The contents of a report.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Its title.
    pub title: String,
    /// The settings of the training.
    pub settings: Settings,
    /// Names and values of other facts, in order: model, device, data, memory.
    pub facts: Vec<(String, String)>,
    /// All records, in order.
    pub records: Vec<Record>,
}

/// Writes `report.html` into the folder of a run.
///
/// # Errors
/// [`RecordError::Write`].
pub fn write(report: &Report, out: &Path) -> Result<PathBuf, RecordError> {
    const NAME: &str = "report.html";
    let path = out.join(NAME);
    let failed = |source: io::Error| RecordError::Write { path: path.clone(), source };
    publish(out, &[(NAME, html(report).as_bytes())]).map_err(failed)?;
    Ok(path)
}

/// The report as one HTML file, with less than 1 MB of curves for any number of records. Texts are
/// escaped, and the file's content security policy keeps a browser from fetching anything.
fn html(report: &Report) -> String {
    let run = Run::new(&report.records);
    format!(
        include_str!("report/report.html"),
        title = escape(&report.title),
        css = include_str!("report/report.css"),
        summary = run.summary(),
        figures = run.figures(),
        charts = run.charts(),
        tables = table("Settings", &rows(&report.settings)) + &table("Run", &report.facts),
        version = env!("CARGO_PKG_VERSION"),
        script = include_str!("report/report.js"),
    )
}

/// The records by kind.
struct Run<'a> {
    steps: Vec<&'a StepRecord>,
    evals: Vec<&'a EvalRecord>,
}

impl<'a> Run<'a> {
    fn new(records: &'a [Record]) -> Self {
        let mut run = Self { steps: Vec::new(), evals: Vec::new() };
        for record in records {
            match record {
                Record::Step(step) => run.steps.push(step),
                Record::Eval(eval) => run.evals.push(eval),
            }
        }
        run
    }

    fn column(&self, of: impl Fn(&StepRecord) -> f64) -> Vec<f64> {
        self.steps.iter().map(|step| of(step)).collect()
    }

    fn losses(&self) -> Vec<f64> {
        self.column(|step| step.loss.into())
    }

    /// Steps, epochs and tokens.
    fn summary(&self) -> String {
        let Some(last) = self.steps.last() else { return "No step was recorded.".to_owned() };
        let total = |of: fn(&StepRecord) -> u64| self.steps.iter().fold(0, |sum: u64, s| sum.saturating_add(of(s))) as f64;
        let (tokens, learned) = (grouped(total(|s| s.tokens), 0), grouped(total(|s| s.loss_tokens), 0));
        let (steps, plural) = (grouped(last.step as f64, 0), if last.step == 1 { "" } else { "s" });
        let epochs = if drawable(last.epoch) { format!("{:.2}", last.epoch) } else { "?".to_owned() };
        format!("{steps} step{plural} · {epochs} epochs · {tokens} tokens, {learned} of them learned")
    }

    /// The final numbers.
    fn figures(&self) -> String {
        let mut figures = Vec::new();
        self.loss_figure(&mut figures);
        if let Some(last) = self.evals.last() {
            let at = |step: u64| {
                if step == 0 { "before training".to_owned() } else { format!("at step {}", grouped(step as f64, 0)) }
            };
            let finite = self.evals.iter().filter(|e| drawable(e.loss));
            let best = finite.min_by(|a, b| a.loss.total_cmp(&b.loss)).filter(|best| best.loss < last.loss);
            let note = best.map_or_else(
                || at(last.step),
                |b| format!("{}; best {} {}", at(last.step), significant(b.loss), at(b.step)),
            );
            figures.push(("Held-out loss", significant(last.loss), note));
            let tokens = grouped(last.tokens as f64, 0);
            figures.push(("Held-out perplexity", significant(last.perplexity), format!("over {tokens} tokens")));
        }
        if let Some(speed) = median(&self.column(|step| step.tokens_per_second)) {
            figures.push(("Tokens per second", significant(speed), "median of the steps".to_owned()));
        }
        if let Some(step) = self.steps.last() {
            figures.push(("Time", duration(step.seconds), String::new()));
            let peak = self.steps.iter().map(|s| s.gpu_bytes).max().unwrap_or(0);
            figures.push(("GPU memory", format!("{:.2} GiB", peak as f64 / f64::from(1 << 30)), "peak".to_owned()));
        }
        let figure = |(name, value, note): &(&str, String, String)| {
            format!("<div><dt>{name}</dt><dd>{value}<small>{note}</small></dd></div>\n")
        };
        format!("<dl class=\"figures\">\n{}</dl>\n", figures.iter().map(figure).collect::<String>())
    }

    fn loss_figure(&self, figures: &mut Vec<(&'static str, String, String)>) {
        let losses = self.losses();
        let (Some(&first), Some(&last)) = (losses.first(), losses.last()) else { return };
        let window = window(losses.len());
        // A run that ended in NaN must show that.
        let end = if drawable(last) { last_mean(&losses, window).unwrap_or(last) } else { last };
        let (first, end) = (significant(first), significant(end));
        match losses.len() {
            1 => figures.push(("Training loss", end, "of one step".to_owned())),
            _ if window == 1 => {
                figures.push(("Training loss", format!("{first} → {end}"), "first and last step".to_owned()))
            }
            _ => figures.push((
                "Training loss",
                format!("{first} → {end}"),
                format!("first step, mean of the last {}", grouped(window as f64, 0)),
            )),
        }
    }

    fn charts(&self) -> String {
        let limit = self.steps.last().map(|s| f64::from(s.clip)).filter(|clip| drawable(*clip) && *clip > 0.0);
        let limit = limit.map(|clip| (clip, format!("Clipped to {}", clip as f32)));
        let chart = |title, unit, from_zero, curves| Chart { title, unit, from_zero, curves, limit: None };
        let rate = self.curve("Learning rate", Look::Strong, self.column(|s| s.lr));
        let norms = self.smoothed(self.column(|s| s.grad_norm.into()));
        let speeds = self.smoothed(self.column(|s| s.tokens_per_second));
        [
            chart("Loss", "nats per token", false, self.loss_curves()).render(),
            chart("Learning rate", "", true, vec![rate]).render(),
            Chart { limit, ..chart("Gradient norm", "before clipping", true, norms) }.render(),
            chart("Speed", "tokens per second", true, speeds).render(),
        ]
        .concat()
    }

    fn loss_curves(&self) -> Vec<Curve> {
        let mut curves = self.smoothed(self.losses());
        if !self.evals.is_empty() {
            let (steps, values) = self.evals.iter().map(|e| (e.step, e.loss)).unzip();
            curves.push(Curve { name: "Held-out".to_owned(), look: Look::Points, steps, values });
        }
        curves
    }

    fn curve(&self, name: &str, look: Look, values: Vec<f64>) -> Curve {
        let steps = self.steps.iter().map(|s| s.step).collect();
        Curve { name: name.to_owned(), look, steps, values }
    }

    /// Each step as a faint line and a mean over several; with few steps only the steps.
    fn smoothed(&self, values: Vec<f64>) -> Vec<Curve> {
        let window = window(values.len());
        if window == 1 {
            return vec![self.curve("Each step", Look::Strong, values)];
        }
        let mean = smooth(&values, window);
        let name = format!("Mean of {} steps", grouped(window as f64, 0));
        vec![self.curve("Each step", Look::Faint, values), self.curve(&name, Look::Strong, mean)]
    }
}

fn table(name: &str, rows: &[(String, String)]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let row = |(name, value): &(String, String)| {
        format!("<tr><th scope=\"row\">{}</th><td>{}</td></tr>\n", escape(name), escape(value))
    };
    let rows: String = rows.iter().map(row).collect();
    format!("<section>\n<h2>{name}</h2>\n<table>\n{rows}</table>\n</section>\n")
}

/// Text for an element or an attribute of HTML.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// `3.1 ms`, `0.31 s`, `42 s`, `2 min 05 s`, `1 h 02 min`; `unknown` for an invalid time.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if !s.is_finite() || s < 0.0 => "unknown".to_owned(),
        s if s < 0.0995 => format!("{:.1} ms", 1e3 * s),
        s if s < 9.995 => format!("{s:.2} s"),
        s if s < 99.5 => format!("{s:.0} s"),
        s => {
            let whole = s.round() as u64;
            match whole / 3600 {
                0 => format!("{} min {:02} s", whole / 60, whole % 60),
                hours => format!("{} h {:02} min", grouped(hours as f64, 0), whole / 60 % 60),
            }
        }
    }
}

#[cfg(test)]
mod tests;

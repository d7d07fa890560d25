//! `nf4pack verify`.

use std::fmt::Write;

use clap::builder::styling::AnsiColor;
use serde::Serialize;

use super::args::VerifyArgs;
use super::failure;
use super::open;
use super::outcome::Outcome;
use super::ui::{self, Table, Ui, Unit};
use crate::verify::{self, AgainstReport, VerifyReport};

/// Maximum number of printed mismatches; another model has one for every tensor.
const SHOWN: usize = 10;

#[derive(Serialize)]
struct Document<'a> {
    file: String,
    /// Neither a fault nor a mismatch.
    good: bool,
    #[serde(flatten)]
    report: &'a VerifyReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    against: Option<&'a AgainstReport>,
    /// Whether the text lists each tensor.
    #[serde(skip)]
    tensors: bool,
    /// Why train, eval and generate cannot use the pack; empty if the pack is damaged.
    cannot_run: &'a [String],
}

pub fn run(args: &VerifyArgs) -> anyhow::Result<Outcome> {
    let ui = Ui::from(args.output);
    ui::handle_interrupts()?;
    let threads = args.threads.or_zero();
    let pack = open::read(&args.file, args.read)?;
    let meter = ui.meter("verifying", Unit::Bytes);
    let report = verify::verify(&pack, threads, &meter)?;
    drop(meter);
    let against = match &args.against {
        Some(source) => {
            let meter = ui.meter("comparing", Unit::Weights);
            Some(verify::against(&pack, source, args.config.as_deref(), threads, &meter)?)
        }
        None => None,
    };
    let mismatches = against.as_ref().map_or(0, |a| a.mismatches.len());
    let good = report.faults.is_empty() && mismatches == 0;
    let mut cannot_run = Vec::new();
    if report.faults.is_empty() {
        cannot_run = failure::cannot_run_pack(&pack)?;
    }
    let file = args.file.display().to_string();
    let (against, tensors) = (against.as_ref(), args.tensors);
    let document = Document { file, good, report: &report, against, tensors, cannot_run: &cannot_run };
    ui.result(&document, || document.text())?;
    cannot_run.iter().for_each(|reason| ui.note(reason));
    if !good {
        complain(&document);
    }
    Ok(Outcome::from(good))
}

/// Prints on stderr that the pack is not good, with the first fault, since `--quiet` prints nothing
/// else.
fn complain(document: &Document<'_>) {
    let file = &document.file;
    let and_more = |n: usize| if n > 1 { format!(" (and {} more)", n - 1) } else { String::new() };
    let faults = &document.report.faults;
    if let Some(first) = faults.first() {
        ui::labelled("error", AnsiColor::Red, &format!("{file} is damaged: {first}{}", and_more(faults.len())));
        ui::labelled("hint", AnsiColor::Cyan, "copy the file again, or convert the checkpoint again");
    }
    let mismatches = document.against.map_or(&[][..], |against| &against.mismatches);
    if let Some(first) = mismatches.first() {
        let more = and_more(mismatches.len());
        ui::labelled("error", AnsiColor::Red, &format!("{file} is not of this checkpoint: {first}{more}"));
        ui::labelled("hint", AnsiColor::Cyan, "`nf4pack inspect` shows the SHA-256 of the pack's source files");
    }
}

impl Document<'_> {
    fn text(&self) -> String {
        let Self { file, report, against, .. } = self;
        let mut text = String::new();
        if let Some(against) = against {
            compared(&mut text, against, self.tensors);
        }
        for fault in &report.faults {
            let _ = writeln!(text, "damaged: {}", ui::one_line(&fault.to_string()));
        }
        let (size, sections) = (ui::bytes(report.bytes as f64), ui::plural(report.sections, "section"));
        let rate = ui::bytes(report.bytes as f64 / report.seconds.max(1e-9));
        let time = ui::duration(report.seconds);
        let verdict = match report.faults.len() {
            0 if against.as_ref().is_some_and(|a| !a.mismatches.is_empty()) => {
                "undamaged, but not of this checkpoint".to_owned()
            }
            0 => "good".to_owned(),
            n => format!("damaged, {}", ui::plural(n as u64, "fault")),
        };
        let file = ui::one_line(file);
        let _ = writeln!(text, "{file}: {verdict} ({size}, {sections}, {time}, {rate}/s)");
        text
    }
}

/// The error of the worst block, and the mismatches; with `tensors` the errors of each tensor, too.
fn compared(text: &mut String, against: &AgainstReport, tensors: bool) {
    if tensors && !against.tensors.is_empty() {
        let _ = writeln!(text, "{}{}", table(against), ui::ERROR_COLUMNS);
    }
    let worst = against.tensors.iter().max_by(|a, b| a.max_block_error.total_cmp(&b.max_block_error));
    if let Some(worst) = worst {
        let (share, name) = (ui::share(worst.max_block_error), ui::one_line(&worst.name));
        let _ = writeln!(text, "worst block of all: {share}, block {} of {name}", worst.max_block);
    }
    for mismatch in against.mismatches.iter().take(SHOWN) {
        let _ = writeln!(text, "mismatch: {}", ui::one_line(&mismatch.to_string()));
    }
    if against.mismatches.len() > SHOWN {
        let _ = writeln!(text, "... and {} more (--json lists all)", against.mismatches.len() - SHOWN);
    }
    let (compared, identical) = (against.tensors.len() as u64, ui::grouped(against.identical));
    let verdict = match against.mismatches.len() {
        0 => "all fit the checkpoint".to_owned(),
        1 => "1 mismatch".to_owned(),
        n => format!("{n} mismatches"),
    };
    let quantised = ui::plural(compared, "quantised tensor");
    let _ = writeln!(text, "{quantised} compared, {identical} kept tensors and files byte for byte: {verdict}");
}

/// The errors of each tensor.
fn table(against: &AgainstReport) -> Table {
    let mut table = Table::new(&["tensor", ">weights", ">max error", ">RMS error", ">relative error", ">worst block"]);
    for tensor in &against.tensors {
        let weights = ui::count(tensor.weights as f64);
        let [max, rms, relative] =
            [f64::from(tensor.max_abs_error), tensor.rms_error, tensor.relative_error].map(ui::error_value);
        table.row([&tensor.name, &weights, &max, &rms, &relative, &ui::share(tensor.max_block_error)]);
    }
    table
}

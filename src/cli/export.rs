//! `nf4pack export`.

use serde::Serialize;

use super::args::ExportArgs;
use super::open;
use super::outcome::Outcome;
use super::ui::{self, Ui, Unit};
use crate::export::{ExportReport, Written, export};
use crate::format::FloatType;

#[derive(Serialize)]
struct Document<'a> {
    target: String,
    dtype: &'static str,
    #[serde(flatten)]
    report: &'a ExportReport,
}

pub fn run(args: &ExportArgs) -> anyhow::Result<Outcome> {
    let ui = Ui::from(args.output);
    ui::handle_interrupts()?;
    let dtype = FloatType::from(args.dtype);
    let pack = open::weights(&args.file, args.weights)?;
    let meter = ui.meter("exporting", Unit::Weights);
    let report = export(&pack, &args.target, dtype, &meter)?;
    drop(meter);
    let target = args.target.display().to_string();
    let document = Document { target, dtype: dtype.element_type().name(), report: &report };
    ui.result(&document, || document.text())?;
    Ok(Outcome::Good)
}

impl Document<'_> {
    fn text(&self) -> String {
        let Self { target, dtype, report } = self;
        let tensors = ui::plural(report.written.tensors, "tensor");
        let amounts = amounts(&report.written, report.seconds);
        let target = ui::one_line(target);
        format!("{target}: {tensors}, decoded to {dtype}: {amounts}\n{}", left_out(&report.written))
    }
}

/// What a snapshot lacks of the checkpoint.
pub fn left_out(written: &Written) -> String {
    match written.left_out.len() {
        0 => String::new(),
        n => format!(
            "left out at conversion, as no part of the model: {} ({})\n",
            ui::plural(n as u64, "tensor"),
            ui::one_line(&ui::first_of(&written.left_out))
        ),
    }
}

/// `1.19 GB in 1 weights file; 4 other files; 2.1 s, 570 MB/s`
pub fn amounts(written: &Written, seconds: f64) -> String {
    let (weights, files) = (written.weights_files.len() as u64, written.files.len() as u64);
    let (weights, files) = (ui::plural(weights, "weights file"), ui::plural(files, "other file"));
    let (size, rate) = (ui::bytes(written.bytes as f64), ui::bytes(written.bytes as f64 / seconds.max(1e-9)));
    format!("{size} in {weights}; {files}; {}, {rate}/s", ui::duration(seconds))
}

//! `nf4pack export`.

use serde::Serialize;

use super::Outcome;
use super::args::ExportArgs;
use super::ui::{self, Ui, Unit};
use crate::export::{ExportReport, export};
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
    let meter = ui.meter("exporting", Unit::Weights);
    let report = export(&args.file, &args.target, dtype, &meter)?;
    drop(meter);
    let target = args.target.display().to_string();
    let document = Document { target, dtype: dtype.element_type().name(), report: &report };
    ui.result(&document, || document.text())?;
    Ok(Outcome::Good)
}

impl Document<'_> {
    fn text(&self) -> String {
        let Self { target, dtype, report } = self;
        let (tensors, size) = (ui::plural(report.tensors, "tensor"), ui::bytes(report.bytes as f64));
        let (weights, files) = (report.weights_files.len() as u64, report.files.len() as u64);
        let (weights, files) = (ui::plural(weights, "weights file"), ui::plural(files, "other file"));
        let (time, rate) = (ui::duration(report.seconds), ui::bytes(report.bytes as f64 / report.seconds.max(1e-9)));
        format!("{target}: {tensors}, decoded to {dtype}: {size} in {weights}; {files}; {time}, {rate}/s\n")
    }
}

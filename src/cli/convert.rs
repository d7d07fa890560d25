//! `nf4pack convert`.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use serde::Serialize;

use super::args::ConvertArgs;
use super::failure;
use super::outcome::Outcome;
use super::ui::{self, Table, Ui, Unit};
use crate::convert::notice::{LeftOut, Notice};
use crate::convert::{Conversion, ConvertError, Kept, Report, partial_path};
use crate::format::{Role, Section, SectionKind};

pub fn run(args: &ConvertArgs) -> anyhow::Result<Outcome> {
    let ui = Ui::from(args.output);
    ui::handle_interrupts()?;
    let conversion = Conversion::prepare(&args.source, args.options())?;
    for notice in conversion.notices() {
        if notice.is_warning() { ui.warning(&notice.to_string()) } else { ui.note(&notice.to_string()) }
    }
    // A notice of its own.
    let not_runnable = conversion.notices().iter().any(|notice| matches!(notice, Notice::NotRunnable { .. }));
    let mut cannot_run = failure::bad_files(|name| conversion.file(name));
    if cannot_run.is_empty() && !not_runnable {
        let files: Vec<(&str, &[u8])> = conversion.files().collect();
        cannot_run.extend(failure::cannot_load(&files));
    }
    cannot_run.iter().for_each(|reason| ui.warning(reason));
    if args.dry_run {
        let preview = Preview { cannot_run, ..Preview::new(args, &conversion) };
        if preview.target_exists && !args.force {
            ui.warning(&format!("{} exists already: only --force replaces it", args.target.display()));
        }
        ui.result(&preview, || preview.text())?;
        return Ok(Outcome::Good);
    }
    let partial = partial_path(&args.target);
    if !args.resume && partial.is_file() {
        ui.note(&format!("{} keeps a part of an interrupted conversion: --resume continues it", partial.display()));
    }
    let meter = ui.meter("converting", Unit::Weights);
    let report = conversion.write(&args.target, &meter).inspect_err(|error| {
        if let Some(how) = continues_after(error).filter(|_| args.resume && partial.is_file()) {
            ui.note(&format!("{} keeps the finished part: {how} from it", partial.display()));
        }
    })?;
    drop(meter);
    match report.kept {
        Some(Kept { damaged: true, .. }) => ui.warning("the kept part was damaged, so the conversion began again"),
        Some(Kept { weights, .. }) => {
            let percent = 100.0 * weights as f64 / report.weights.max(1) as f64;
            ui.note(&format!("{percent:.0} % of the weights were kept from the interrupted conversion"));
        }
        None => {}
    }
    let document = Document { target: args.target.display().to_string(), report: &report, cannot_run };
    ui.result(&document, || summary(&args.target, conversion.config().family.model_type, &report))?;
    Ok(Outcome::Good)
}

/// The command that continues from the kept part, in words. After some errors there is none, or
/// another process continues.
fn continues_after(error: &ConvertError) -> Option<&'static str> {
    use ConvertError::{PartialDiffers, PartialInUse, PartialSource, TargetExists};
    match error {
        PartialDiffers { .. } | PartialInUse { .. } | PartialSource { .. } => None,
        TargetExists { .. } => Some("--force --resume replaces the file"),
        _ => Some("the same command continues"),
    }
}

#[derive(Serialize)]
struct Document<'a> {
    target: String,
    #[serde(flatten)]
    report: &'a Report,
    /// Why train, eval and generate cannot use the pack, except reasons that a notice names.
    cannot_run: Vec<String>,
}

fn summary(target: &Path, model_type: &str, report: &Report) -> String {
    let mut table = Table::new(&["projection", ">tensors", ">weights", ">bits/weight", ">relative error", ">worst block"]);
    for role in &report.roles {
        let (weights, error) = (ui::count(role.weights as f64), ui::error_value(role.relative_error));
        let (bits, worst) = (format!("{:.3}", role.bits_per_weight), ui::share(role.max_block_error));
        table.row([&role.role, &role.tensors, &weights, &bits, &error, &worst]);
    }
    let tensors: u64 = report.roles.iter().map(|role| role.tensors).sum();
    let bits = 8.0 * report.roles.iter().map(|role| role.bytes).sum::<u64>() as f64 / report.weights.max(1) as f64;
    let (weights, error) = (ui::count(report.weights as f64), ui::error_value(report.relative_error));
    table.rule();
    table.row([&"all", &tensors, &weights, &format!("{bits:.3}"), &error, &ui::share(report.max_block_error)]);

    let percent = 100.0 * report.pack_bytes as f64 / report.source_bytes.max(1) as f64;
    let [before, after, raw] = [report.source_bytes, report.pack_bytes, report.raw_bytes].map(|n| ui::bytes(n as f64));
    let kept = ui::plural(report.raw_tensors, "tensor");
    let time = ui::duration(report.seconds);
    let rate = ui::count(report.weights_per_second);
    let mut text = table.to_string();
    let _ = writeln!(text, "{}\n", ui::ERROR_COLUMNS);
    let _ = writeln!(
        text,
        "{}: {model_type}, {}",
        ui::one_line(&target.display().to_string()),
        ui::plural(u64::from(report.layers), "layer")
    );
    let _ = writeln!(text, "size   {before} -> {after} ({percent:.1} %), {raw} of it in {kept} kept as they are");
    if let Some(tensor) = &report.max_block_error_tensor {
        let _ = writeln!(text, "worst  block {}, in {}", ui::share(report.max_block_error), ui::one_line(tensor));
    }
    let _ = writeln!(text, "time   {time}, {rate} weights/s");
    text
}

/// The output of a conversion, by its plan.
#[derive(Serialize)]
struct Preview {
    dry_run: bool,
    target: String,
    target_exists: bool,
    source_bytes: u64,
    pack_bytes: u64,
    layers: u32,
    weights: u64,
    roles: Vec<RolePreview>,
    raw_tensors: u64,
    raw_bytes: u64,
    files: u64,
    file_bytes: u64,
    left_out: Vec<LeftOut>,
    kept_unused: Vec<String>,
    notices: Vec<String>,
    /// Why train, eval and generate cannot use the pack, except reasons that a notice names.
    cannot_run: Vec<String>,
}

#[derive(Debug, Default, Serialize)]
struct RolePreview {
    role: &'static str,
    tensors: u64,
    weights: u64,
    bytes: u64,
    bits_per_weight: f64,
}

impl Preview {
    fn new(args: &ConvertArgs, conversion: &Conversion) -> Self {
        let plan = conversion.plan();
        let of_kind = |kind| plan.layout.sections().iter().filter(move |s| s.kind == Some(kind));
        Self {
            dry_run: true,
            target: args.target.display().to_string(),
            target_exists: args.target.symlink_metadata().is_ok(),
            source_bytes: conversion.source_bytes(),
            pack_bytes: plan.layout.file_len(),
            layers: conversion.config().layers,
            weights: plan.weights,
            roles: role_previews(plan.layout.sections()),
            raw_tensors: of_kind(SectionKind::Raw).count() as u64,
            raw_bytes: of_kind(SectionKind::Raw).map(|s| s.length).sum(),
            files: of_kind(SectionKind::File).count() as u64,
            file_bytes: of_kind(SectionKind::File).map(|s| s.length).sum(),
            left_out: conversion.left_out().to_vec(),
            kept_unused: conversion.kept_unused().to_vec(),
            notices: conversion.notices().iter().map(Notice::to_string).collect(),
            cannot_run: Vec::new(),
        }
    }

    fn text(&self) -> String {
        let mut table = Table::new(&["projection", ">tensors", ">weights", ">bits/weight", ">bytes"]);
        for role in &self.roles {
            let (weights, bits) = (ui::count(role.weights as f64), format!("{:.3}", role.bits_per_weight));
            table.row([&role.role, &role.tensors, &weights, &bits, &ui::grouped(role.bytes)]);
        }
        table.rule();
        let headers = self.pack_bytes - self.raw_bytes - self.file_bytes - self.roles.iter().map(|r| r.bytes).sum::<u64>();
        table.row([&"kept as is", &self.raw_tensors, &"", &"", &ui::grouped(self.raw_bytes)]);
        table.row([&"files", &self.files, &"", &"", &ui::grouped(self.file_bytes)]);
        table.row([&"index, padding", &"", &"", &"", &ui::grouped(headers)]);
        table.rule();
        let percent = 100.0 * self.pack_bytes as f64 / self.source_bytes.max(1) as f64;
        table.row([&self.target, &"", &"", &"", &ui::grouped(self.pack_bytes)]);
        let before = ui::grouped(self.source_bytes);
        format!("{table}\n{percent:.1} % of the {before} bytes of the checkpoint's weights; dry run, nothing was written\n")
    }
}

fn role_previews(sections: &[Section]) -> Vec<RolePreview> {
    let mut roles: BTreeMap<Role, RolePreview> = BTreeMap::new();
    for section in sections {
        let (tensors, weights) = match section.kind {
            Some(SectionKind::Codes) => (1, section.shape.elements()),
            Some(SectionKind::Scales) => (0, 0),
            Some(SectionKind::Raw | SectionKind::File) | None => continue,
        };
        let sums = roles.entry(section.role).or_default();
        sums.role = section.role.name();
        sums.tensors += tensors;
        sums.weights += weights;
        sums.bytes += section.length;
        sums.bits_per_weight = 8.0 * sums.bytes as f64 / sums.weights as f64;
    }
    roles.into_values().collect()
}

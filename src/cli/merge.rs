//! `nf4pack merge`.

use serde::Serialize;

use super::adapter::CHANGES_NOTHING;
use super::args::MergeArgs;
use super::device;
use super::export::{amounts, left_out};
use super::open;
use super::outcome::Outcome;
use super::ui::{self, Ui, Unit};
use crate::PackSource;
use crate::arch::ModelConfig;
use crate::export::MAX_SHARD_LEN;
use crate::format::FloatType;
use crate::gpu::GpuError;
use crate::lora::Adapter;
use crate::merge::{Base, Comparison, MergeReport, Sources, compare, merge};
use crate::model::precision::MixedKernels;

#[derive(Serialize)]
struct Document<'a> {
    target: String,
    base: String,
    #[serde(flatten)]
    report: &'a MergeReport,
    /// Of logits.
    comparison: Option<Comparison>,
}

pub fn run(args: &MergeArgs) -> anyhow::Result<Outcome> {
    let ui = Ui::from(args.output);
    ui::handle_interrupts()?;
    let pack = open::weights(&args.file, args.weights)?;
    let sources = Sources { pack: &pack, adapter: &args.adapter, base: args.base()? };
    let meter = ui.meter("merging", Unit::Weights);
    let report = merge(&sources, &args.out, MAX_SHARD_LEN, &meter)?;
    drop(meter);
    warn(ui, sources.base, &report);
    let comparison = if args.no_compare { None } else { comparison(args, ui, pack) };
    let (target, base) = (args.out.display().to_string(), args.base.display().to_string());
    let document = Document { target, base, report: &report, comparison };
    ui.result(&document, || document.text())?;
    // The snapshot is complete, but the comparison was skipped.
    Ok(Outcome::from(!ui::interrupted()))
}

/// Compares logits. The snapshot is written already, so an error here is a warning.
fn comparison(args: &MergeArgs, ui: Ui, pack: PackSource) -> Option<Comparison> {
    match compared(args, ui, pack) {
        Ok(comparison) => return Some(comparison),
        Err(_) if ui::interrupted() => ui.note("the snapshot is written; logits were not compared, because of Ctrl-C"),
        Err(e) if matches!(e.downcast_ref(), Some(GpuError::NoAdapter)) => {
            ui.note("logits were not compared: there is no GPU");
        }
        Err(e) => ui.warning(&format!("the snapshot is written, but logits were not compared: {e:#}")),
    }
    None
}

fn compared(args: &MergeArgs, ui: Ui, pack: PackSource) -> anyhow::Result<Comparison> {
    let model = ModelConfig::of_pack(&pack)?;
    let adapter = Adapter::read(&args.adapter, &model)?;
    // The merged weights are in bfloat16.
    let kernels = MixedKernels::without_training(pack.index(), &model, Some(&adapter)).and_raw(FloatType::Bf16);
    device::with_precision(&args.gpu, args.compute.precision, &kernels, ui, |gpu| {
        let meter = ui.meter("comparing", Unit::Weights);
        Ok(compare(gpu, pack, &args.adapter, &args.out, &args.sample, &meter)?)
    })
}

/// Warnings about the snapshot.
fn warn(ui: Ui, base: Base<'_>, report: &MergeReport) {
    if let (Base::Checkpoint { path, .. }, [first, more @ ..]) = (base, report.other_files.as_slice()) {
        let more = if more.is_empty() { String::new() } else { format!(" (and {} more)", more.len()) };
        let path = path.display();
        ui.warning(&format!("{first}{more} of {path} differs, by SHA-256, from the files that the pack was made from"));
    }
    match (report.rounding_error, &report.worst) {
        (None, _) => ui.warning(CHANGES_NOTHING),
        (Some(error), Some(worst)) if error >= MergeReport::WORRYING => ui.warning(&format!(
            "bfloat16 is too coarse for this adapter: rounding removed {:.0} % of its change ({:.0} % of {}); use the adapter itself",
            100.0 * error,
            100.0 * worst.relative_error,
            worst.tensor
        )),
        _ => {}
    }
}

impl Document<'_> {
    fn text(&self) -> String {
        let Self { target, report, .. } = self;
        let (tensors, merged) = (ui::plural(report.written.tensors, "tensor"), ui::grouped(report.merged));
        let amounts = amounts(&report.written, report.seconds);
        let rounding = match (report.rounding_error, &report.worst) {
            (Some(error), Some(worst)) => format!(
                "rounding to bf16: {:.2} % of the change, at most {:.2} % ({})\n",
                100.0 * error,
                100.0 * worst.relative_error,
                ui::one_line(&worst.tensor)
            ),
            _ => String::new(),
        };
        let logits = self.comparison.as_ref().map_or_else(String::new, |c| {
            format!(
                "logits: largest difference {:.4}, RMS difference {:.4} of {:.4}, over {}; the top-1 token changed after {} of them; KL divergence {:.2e} nats\n",
                c.max_difference,
                c.rms_difference,
                c.rms_logit,
                ui::plural(c.tokens, "token"),
                c.top1_changed,
                c.kl
            )
        });
        let (target, left_out) = (ui::one_line(target), left_out(&report.written));
        format!("{target}: {tensors} in bf16, {merged} of them merged: {amounts}\n{left_out}{rounding}{logits}")
    }
}

//! `nf4pack eval`.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::adapter;
use super::args::EvalArgs;
use super::device::{self, AdapterEntry, PrecisionEntry};
use super::model;
use super::open;
use super::outcome::Outcome;
use super::train::{dropped_text, print_data, print_plan, warnings};
use super::ui::{self, Cancelled, Ui, Unit};
use crate::arch::config::ModelConfig;
use crate::convert::Progress as _;
use crate::data::memory;
use crate::data::options::Options;
use crate::data::sample::{Dataset, Dropped};
use crate::data::{DataFile, Tokenizer};
use crate::dequant::stream::PackSource;
use crate::gpu::Gpu;
use crate::lora::adapter::Adapter;
use crate::model::open::Passes;
use crate::model::plan::OffloadVocabulary;
use crate::model::precision::MixedKernels;
use crate::model::session::Session;

#[derive(Serialize)]
struct Evaluation {
    pack: String,
    adapter: Option<String>,
    data: String,
    samples: u64,
    /// Dropped samples.
    dropped: Dropped,
    /// Tokens that were predicted.
    tokens: u64,
    /// Mean negative log-likelihood, in nats a token.
    loss: f64,
    perplexity: f64,
    seconds: f64,
    /// Warnings about the data.
    warnings: Vec<String>,
    #[serde(flatten)]
    precision: PrecisionEntry,
    gpu: AdapterEntry,
}

pub fn run(args: &EvalArgs) -> Result<Outcome> {
    let ui = Ui::new(args.json);
    ui::handle_interrupts()?;
    let file = DataFile::open(&args.data)?;
    let pack = open::load(&args.pack, args.load)?;
    let model = model::read(&pack, ui)?;
    let max_length = args.max_length(&model);
    let adapter = adapter::read(args.adapter.as_deref(), &model, ui)?;
    // A fixed date for templates that print it, so losses can be compared.
    let tokenizer = Tokenizer::of_pack(&pack, &model, 0)?;
    let options = Options { train_on: args.train_on.into(), max_length, strict: args.strict, memory: memory::limit() };
    let meter = ui.meter("reading", Unit::Rows);
    let data = file.samples(&tokenizer, options, &mut |done, total| {
        meter.advance(done, total);
        !ui::interrupted()
    })?;
    drop(meter);
    print_data(ui, "data", "predicted", &data, &model);
    let kernels = MixedKernels::without_training(pack.index(), &model, adapter.as_ref());
    let evaluation = device::with_precision(&args.gpu, args.compute.precision, &kernels, ui, |gpu| {
        evaluate(args, ui, gpu, pack, &model, adapter.as_ref(), &data)
    })?;
    ui.result(&evaluation, || evaluation.text())?;
    Ok(Outcome::Good)
}

fn evaluate(
    args: &EvalArgs,
    ui: Ui,
    gpu: &Gpu,
    pack: PackSource,
    config: &ModelConfig,
    adapter: Option<&Adapter>,
    data: &Dataset,
) -> Result<Evaluation> {
    let length = args.max_length(config).min(u32::try_from(data.tokens()).unwrap_or(u32::MAX)).max(1);
    let passes = Passes {
        positions: data.longest(),
        rows: data.tokens().div_ceil(length.into()),
        micro_batch: args.micro_batch(),
        budget: args.vram_budget.map(|size| size.0),
        offload_vocabulary: OffloadVocabulary::Auto,
        ..Passes::one_row(length)
    };
    let plan = passes.plan(gpu, &pack, config, adapter)?;
    print_plan(ui, &plan);
    let mut session = Session::open(gpu, pack, adapter, &plan)?;
    let meter = ui.meter("evaluating", Unit::Rows);
    let started = std::time::Instant::now();
    let found = session.mean_loss(&data.samples, length, |done, total| {
        meter.advance(done, total);
        !ui::interrupted()
    })?;
    let (loss, tokens) = found.ok_or(Cancelled)?;
    let text = |path: &Path| path.display().to_string();
    Ok(Evaluation {
        pack: text(&args.pack),
        adapter: args.adapter.as_deref().map(text),
        data: text(&args.data),
        samples: data.samples.len() as u64,
        dropped: data.dropped,
        tokens,
        loss,
        perplexity: loss.exp(),
        seconds: started.elapsed().as_secs_f64(),
        warnings: warnings([data]),
        precision: gpu.into(),
        gpu: gpu.adapter().into(),
    })
}

impl Evaluation {
    fn text(&self) -> String {
        format!(
            "loss {:.4} nats a token, perplexity {:.3}, over {} predicted tokens of {}{} in {}\n",
            self.loss,
            self.perplexity,
            ui::grouped(self.tokens),
            ui::plural(self.samples, "sample"),
            dropped_text(self.dropped),
            ui::duration(self.seconds)
        )
    }
}

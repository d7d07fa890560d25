//! `nf4pack bench longest`.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::temporary_folder;
use super::train::{lora, peak, random_batch, trainer_of, write_pack};
use crate::PackSource;
use crate::arch::ModelConfig;
use crate::cli::args::{BenchLongestArgs, PrecisionArg};
use crate::cli::device::{self, AdapterEntry};
use crate::cli::outcome::Outcome;
use crate::cli::ui::{self, Table, Ui};
use crate::convert::synth::{Shape, model_index};
use crate::format::Index;
use crate::gpu::{Gpu, MatrixUnits};
use crate::lora::config::AdapterLayout;
use crate::model::host_memory::available_host_memory;
use crate::model::plan::{
    Demand, KeepActivations, MemoryError, MemoryPlan, MicroBatch, OffloadActivations, OffloadVocabulary,
};
use crate::model::precision::MixedKernels;
use crate::random::{Generator, Stream};

/// Tokens of the sample that compiles the kernels: as many kinds of products as in a long sample.
const WARM_UP: u32 = 1024;
/// The part of a budget, one of this many, for what the driver takes itself.
const OF_DRIVER: u64 = 32;
/// Does not affect the time.
const LEARNING_RATE: f64 = 1e-4;

#[derive(Serialize)]
struct Bench {
    /// `None` if nothing was run.
    gpu: Option<AdapterEntry>,
    shape: &'static str,
    rank: u32,
    /// `mixed` or `f32`.
    precision: &'static str,
    /// One for each budget.
    found: Vec<Found>,
}

/// The longest sample in a budget.
#[derive(Serialize)]
struct Found {
    budget: u64,
    /// 0: nothing fits.
    tokens: u32,
    /// Planned bytes of GPU memory, by part.
    planned_bytes: u64,
    planned: Vec<(&'static str, u64)>,
    /// Layers in GPU memory at a time, of all.
    slots: u32,
    layers: u32,
    /// Residual streams in host memory, and their bytes.
    offloaded_streams: u32,
    host_bytes: u64,
    /// Whether the embedding is not in GPU memory, and the parts in which the output projection
    /// passes through it, if it is not, either.
    embedding_on_host: bool,
    head_parts: u32,
    step: Option<Step>,
}

/// A step with the longest sample.
#[derive(Serialize)]
struct Step {
    seconds: f64,
    tokens_per_second: f64,
    /// Peak bytes in buffers, also those in host memory, and allocated by the driver for them, if
    /// the backend reports it.
    used_bytes: Option<u64>,
    reserved_bytes: Option<u64>,
    /// Peak bytes that the driver counts on the device, if it reports them.
    device_bytes: Option<u64>,
}

/// The limits that a plan depends on.
struct Device {
    max_buffer: u64,
    max_binding: u64,
    host_buffers: bool,
    /// Maximum bytes of these buffers. `None`: without a limit.
    host_memory: Option<u64>,
    units: Option<MatrixUnits>,
}

impl Device {
    /// A large GPU through Vulkan.
    const LARGE: Self = Self {
        max_buffer: u64::MAX,
        max_binding: i32::MAX as u64,
        host_buffers: true,
        host_memory: None,
        units: Some(MatrixUnits::Hardware),
    };

    fn of(gpu: &Gpu) -> Self {
        let limits = gpu.limits();
        Self {
            max_buffer: limits.max_buffer_size,
            max_binding: limits.max_storage_buffer_binding_size,
            host_buffers: gpu.has_host_buffers(),
            host_memory: available_host_memory(),
            units: gpu.matrix_units().ok(),
        }
    }

    /// The plan for one sample of `tokens` tokens.
    fn plan(&self, index: &Index, model: &ModelConfig, rank: u32, budget: u64, tokens: u32) -> Result<MemoryPlan> {
        let demand = Demand {
            index,
            model,
            max_buffer: self.max_buffer,
            max_binding: self.max_binding,
            budget: Some(budget),
            adapter: AdapterLayout::new(&lora(rank), model)?.len() as u64,
            rank,
            dropout: false,
            training: true,
            keep_activations: KeepActivations::None,
            offload_activations: OffloadActivations::Auto,
            offload_vocabulary: OffloadVocabulary::Auto,
            host_buffers: self.host_buffers,
            host_memory: self.host_memory,
            length: tokens,
            positions: tokens,
            rows: 1,
            reserved: budget / OF_DRIVER,
            units: self.units,
        };
        Ok(MemoryPlan::new(&demand, MicroBatch::Rows(1))?)
    }

    /// The plan for the longest sample, of at most the tokens of the arguments.
    fn longest(
        &self,
        index: &Index,
        model: &ModelConfig,
        args: &BenchLongestArgs,
        budget: u64,
    ) -> Result<Option<MemoryPlan>> {
        let (mut longest, mut too_long, mut found) = (1, args.max_tokens.saturating_add(1), None);
        while too_long - longest > 1 {
            ui::not_interrupted()?;
            let tokens = longest + (too_long - longest) / 2;
            match self.plan(index, model, args.rank, budget, tokens) {
                Ok(plan) => (longest, found) = (tokens, Some(plan)),
                Err(error) if error.is::<MemoryError>() => too_long = tokens,
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }
}

pub fn run(args: &BenchLongestArgs) -> Result<Outcome> {
    let ui = Ui::new(args.json);
    ui::handle_interrupts()?;
    let bench = if args.plan_only { plan(args)? } else { train(args, ui)? };
    ui.result(&bench, || bench.text())?;
    Ok(Outcome::Good)
}

fn plan(args: &BenchLongestArgs) -> Result<Bench> {
    let shape = Shape::from_name(args.shape.name()).context("no such shape")?;
    let (index, model) = (model_index(&shape)?, ModelConfig::parse(shape.config().to_string().as_bytes(), None)?);
    let units = (args.compute.precision != Some(PrecisionArg::F32)).then_some(MatrixUnits::Hardware);
    let on = Device { units, ..Device::LARGE };
    let find = |&budget: &u64| {
        let plan = on.longest(&index, &model, args, budget)?;
        Ok(Found::new(budget, plan.as_ref(), None))
    };
    let found = args.budget.iter().map(find).collect::<Result<_>>()?;
    Ok(Bench::new(args, None, units, found))
}

fn train(args: &BenchLongestArgs, ui: Ui) -> Result<Bench> {
    let dir = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let folder = temporary_folder(&dir)?;
    let pack = write_pack(folder.path(), args.shape.name(), ui)?;
    let source = PackSource::open(&pack)?;
    let model = ModelConfig::of_pack(&source)?;
    let kernels = MixedKernels::new(source.index(), &model, args.rank, true);
    let measure = |gpu: &Gpu| measure(args, ui, gpu, &pack, &model);
    device::with_precision(&args.gpu, args.compute.precision, &kernels, ui, measure)
}

fn measure(args: &BenchLongestArgs, ui: Ui, gpu: &Gpu, pack: &Path, model: &ModelConfig) -> Result<Bench> {
    let (source, on) = (PackSource::open(pack)?, Device::of(gpu));
    let mut found = Vec::new();
    for &budget in &args.budget {
        let plan = on.longest(source.index(), model, args, budget)?;
        let step = plan.as_ref().map(|plan| step(args.rank, ui, gpu, pack, plan)).transpose()?;
        found.push(Found::new(budget, plan.as_ref(), step));
        // The next plan needs the memory.
        gpu.wait()?;
    }
    Ok(Bench::new(args, Some(gpu), on.units, found))
}

/// A step by this plan.
fn step(rank: u32, ui: Ui, gpu: &Gpu, pack: &Path, plan: &MemoryPlan) -> Result<Step> {
    ui.stage(&format!("training with {} on {}", ui::plural(plan.length.into(), "token"), gpu.adapter()));
    let source = PackSource::open(pack)?;
    let vocab = ModelConfig::of_pack(&source)?.vocab;
    let mut trainer = trainer_of(gpu, source, &lora(rank), plan)?;
    let mut generator = Generator::new(0, Stream::Split);
    let short = random_batch([1, plan.length.min(WARM_UP)], &mut generator, vocab);
    trainer.step(std::slice::from_ref(&short), LEARNING_RATE)?;
    gpu.wait()?;
    let batch = random_batch([1, plan.length], &mut generator, vocab);
    let started = Instant::now();
    let allocated = peak(&mut trainer, gpu, &batch)?;
    gpu.wait()?;
    // Nothing is freed before the end of a step.
    let device_bytes = gpu.memory().and_then(|memory| memory.used);
    let seconds = started.elapsed().as_secs_f64();
    Ok(Step {
        seconds,
        tokens_per_second: f64::from(plan.length) / seconds.max(1e-9),
        used_bytes: allocated.as_ref().map(|allocated| allocated.used),
        reserved_bytes: allocated.as_ref().map(|allocated| allocated.reserved),
        device_bytes,
    })
}

impl Found {
    fn new(budget: u64, plan: Option<&MemoryPlan>, step: Option<Step>) -> Self {
        Self {
            budget,
            tokens: plan.map_or(0, |plan| plan.length),
            planned_bytes: plan.map_or(0, MemoryPlan::total),
            planned: plan.map_or_else(Vec::new, |plan| plan.parts().into()),
            slots: plan.map_or(0, |plan| plan.stream.slots),
            layers: plan.map_or(0, |plan| plan.stream.layers),
            offloaded_streams: plan.map_or(0, |plan| plan.offloaded().0),
            host_bytes: plan.map_or(0, |plan| plan.offloaded().1),
            embedding_on_host: plan.is_some_and(|plan| plan.offloaded_vocabulary().0),
            head_parts: plan.map_or(0, |plan| plan.offloaded_vocabulary().1),
            step,
        }
    }

    /// Where the vocabulary's tensors are.
    fn vocabulary(&self) -> String {
        match (self.embedding_on_host, self.head_parts) {
            _ if self.tokens == 0 => "nothing fits".to_owned(),
            (false, _) => "on the GPU".to_owned(),
            (true, 0) => "embedding on the host".to_owned(),
            (true, parts) => format!("on the host, head in {parts} parts"),
        }
    }
}

impl Bench {
    fn new(args: &BenchLongestArgs, gpu: Option<&Gpu>, units: Option<MatrixUnits>, found: Vec<Found>) -> Self {
        Self {
            gpu: gpu.map(|gpu| gpu.adapter().into()),
            shape: args.shape.name(),
            rank: args.rank,
            precision: MatrixUnits::precision(units),
            found,
        }
    }

    fn text(&self) -> String {
        let mut table = Table::new(&[
            "budget",
            ">tokens",
            ">planned",
            ">layers at a time",
            "vocabulary",
            ">in host memory",
            ">s a step",
            ">tokens/s",
            ">used",
            ">reserved",
            ">on the device",
        ]);
        let bytes = |bytes: Option<u64>| bytes.map_or_else(String::new, |bytes| ui::bytes(bytes as f64));
        for found in &self.found {
            let step = found.step.as_ref();
            table.row([
                &ui::bytes(found.budget as f64),
                &ui::grouped(found.tokens.into()),
                &ui::bytes(found.planned_bytes as f64),
                &format!("{} of {}", found.slots, found.layers),
                &found.vocabulary(),
                &ui::bytes(found.host_bytes as f64),
                &step.map_or_else(String::new, |step| format!("{:.2}", step.seconds)),
                &step.map_or_else(String::new, |step| format!("{:.0}", step.tokens_per_second)),
                &bytes(step.and_then(|step| step.used_bytes)),
                &bytes(step.and_then(|step| step.reserved_bytes)),
                &bytes(step.and_then(|step| step.device_bytes)),
            ]);
        }
        let gpu = self.gpu.as_ref().map_or_else(|| "planned, not run".to_owned(), ToString::to_string);
        format!("\n{gpu}\n{}, 1 sample, rank {}, {}\n\n{table}", self.shape, self.rank, self.precision)
    }
}

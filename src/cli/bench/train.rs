//! `nf4pack bench train`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Serialize;

use super::{median, temporary_folder, with_context};
use crate::PackSource;
use crate::arch::ModelConfig;
use crate::cli::args::{BenchTrainArgs, ShapeArg};
use crate::cli::device::{self, AdapterEntry, PrecisionEntry, selects_software};
use crate::cli::outcome::Outcome;
use crate::cli::ui::{self, Table, Ui, Unit};
use crate::convert::synth::{Shape, write_model_pack};
use crate::data::pack::{Batch, IGNORE_INDEX};
use crate::dequant::stream::default_budget;
use crate::gpu::{AllocatedMemory, Gpu};
use crate::lora::config::{AdapterLayout, LoraConfig, TARGETS};
use crate::lora::gpu::GpuAdapter;
use crate::model::host_memory::available_host_memory;
use crate::model::plan::{
    Demand, KeepActivations, MemoryError, MemoryPlan, MicroBatch, OffloadActivations, OffloadVocabulary,
};
use crate::model::precision::MixedKernels;
use crate::random::{Generator, Stream};
use crate::train::step::Phase;
use crate::train::trainer::{Hyperparameters, Trainer};

/// Does not affect the time.
const LEARNING_RATE: f64 = 1e-4;

#[derive(Serialize)]
struct Bench {
    gpu: AdapterEntry,
    shape: &'static str,
    batch: u32,
    seq: u32,
    rank: u32,
    /// One figure for each counted step.
    seconds: Vec<f64>,
    median_seconds: f64,
    tokens_per_second: f64,
    /// Of an extra step that waits for the device after each phase.
    ms_per_phase: Phases,
    /// Planned bytes of GPU memory, by part.
    planned_bytes: u64,
    planned: Vec<(&'static str, u64)>,
    /// Whether all layers stay in GPU memory.
    resident: bool,
    #[serde(flatten)]
    precision: PrecisionEntry,
    /// Layers, of all, that keep their activations for the backward pass.
    kept_layers: u32,
    layers: u32,
    /// Residual streams in host memory, and their bytes.
    offloaded_streams: u32,
    host_bytes: u64,
    /// Whether the embedding is not in GPU memory, and the parts in which the output projection
    /// passes through it, if it is not, either.
    embedding_on_host: bool,
    head_parts: u32,
    /// Peak bytes in buffers, also those in host memory, and allocated by the driver for them, if
    /// the backend reports it. It is read when the phases of a step are submitted but not finished.
    /// Buffers from before the first step are never freed, and those of a step (a batch) only when
    /// the device is done.
    used_bytes: Option<u64>,
    reserved_bytes: Option<u64>,
}

/// Milliseconds of each phase of a step.
#[derive(Default, Serialize)]
struct Phases {
    forward: f64,
    /// Head, loss, and their gradient.
    loss: f64,
    /// Including the recomputation of the layers.
    backward: f64,
    /// AdamW.
    optimizer: f64,
}

pub fn run(args: &BenchTrainArgs) -> Result<Outcome> {
    let ui = Ui::new(args.common.json);
    ui::handle_interrupts()?;
    let default = if selects_software(&args.common.gpu)? { ShapeArg::Tiny } else { ShapeArg::Qwen3_0_6b };
    let shape = args.shape.unwrap_or(default).name();
    let dir = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let folder = temporary_folder(&dir)?;
    let pack = PackSource::open(&write_pack(folder.path(), shape, ui)?)?;
    let kernels = MixedKernels::new(pack.index(), &ModelConfig::of_pack(&pack)?, args.rank, true);
    let measure = |gpu: &Gpu| measure(args, ui, gpu, shape, pack);
    let bench = device::with_precision(&args.common.gpu, args.compute.precision, &kernels, ui, measure)?;
    ui.result(&bench, || bench.text())?;
    Ok(Outcome::Good)
}

fn measure(args: &BenchTrainArgs, ui: Ui, gpu: &Gpu, shape: &'static str, pack: PackSource) -> Result<Bench> {
    let (mut trainer, plan, vocab) = trainer(args, gpu, pack)?;
    let mut generator = Generator::new(0, Stream::Split);
    let batch = random_batch([args.batch, args.seq], &mut generator, vocab);
    ui.stage(&format!("training on {}", gpu.adapter()));
    // It compiles the kernels, so its time does not count.
    let allocated = peak(&mut trainer, gpu, &batch)?;
    let mut seconds = Vec::new();
    for _ in 0..args.common.runs {
        ui::not_interrupted()?;
        let started = Instant::now();
        trainer.step(std::slice::from_ref(&batch), LEARNING_RATE)?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    let median_seconds = median(&seconds);
    let ms_per_phase = phases(&mut trainer, gpu, &batch)?;
    Ok(Bench {
        gpu: gpu.adapter().into(),
        shape,
        batch: args.batch,
        seq: args.seq,
        rank: args.rank,
        median_seconds,
        tokens_per_second: batch.tokens.len() as f64 / median_seconds.max(1e-9),
        seconds,
        ms_per_phase,
        planned_bytes: plan.total(),
        planned: plan.parts().into(),
        resident: plan.stream.resident,
        precision: gpu.into(),
        kept_layers: plan.kept_layers(),
        layers: plan.stream.layers,
        offloaded_streams: plan.offloaded().0,
        host_bytes: plan.offloaded().1,
        embedding_on_host: plan.offloaded_vocabulary().0,
        head_parts: plan.offloaded_vocabulary().1,
        used_bytes: allocated.map(|allocated| allocated.used),
        reserved_bytes: allocated.map(|allocated| allocated.reserved),
    })
}

/// A pack of random weights.
pub(super) fn write_pack(folder: &Path, shape: &str, ui: Ui) -> Result<PathBuf> {
    let sizes = Shape::from_name(shape).with_context(|| format!("no shape {shape}"))?;
    ui.stage(&format!("writing random weights in the shape of {shape} to {}", folder.display()));
    let pack = folder.join("model.nf4pack");
    with_context(write_model_pack(&pack, &sizes, 0, &ui.meter("writing", Unit::Bytes)), folder)?;
    Ok(pack)
}

/// An adapter on all projections.
pub(super) fn lora(rank: u32) -> LoraConfig {
    let (dropout, targets) = (0.0, TARGETS.to_vec());
    LoraConfig { rank, alpha: 2.0 * f64::from(rank), dropout, targets, rslora: false }
}

/// A trainer by this plan.
pub(super) fn trainer_of(gpu: &Gpu, source: PackSource, lora: &LoraConfig, plan: &MemoryPlan) -> Result<Trainer> {
    let (model, memory) = plan.reserve(gpu, source)?;
    let layout = AdapterLayout::new(lora, model.config())?;
    let adapter = GpuAdapter::new(gpu, lora, &layout, &layout.initial(0), true)?;
    let hyperparameters = Hyperparameters { clip: Some(1.0), ..Hyperparameters::default() };
    Ok(Trainer::new(model, adapter, memory, hyperparameters)?)
}

fn trainer(args: &BenchTrainArgs, gpu: &Gpu, source: PackSource) -> Result<(Trainer, MemoryPlan, u32)> {
    let config = ModelConfig::of_pack(&source)?;
    let (rank, lora) = (args.rank, lora(args.rank));
    let layout = AdapterLayout::new(&lora, &config)?;
    let demand = Demand {
        index: source.index(),
        model: &config,
        max_buffer: gpu.limits().max_buffer_size,
        max_binding: gpu.limits().max_storage_buffer_binding_size,
        budget: args.vram_budget.or_else(|| default_budget(gpu)),
        adapter: layout.len() as u64,
        rank,
        dropout: false,
        training: true,
        offload_activations: args.offload_activations.map_or(OffloadActivations::Auto, Into::into),
        offload_vocabulary: args.offload_vocabulary.map_or(OffloadVocabulary::Auto, Into::into),
        host_buffers: gpu.has_host_buffers(),
        host_memory: available_host_memory(),
        keep_activations: args.keep_activations.map_or(KeepActivations::Auto, |keep| keep.0),
        length: args.seq,
        positions: args.seq,
        rows: args.batch.into(),
        reserved: 0,
        units: gpu.matrix_units().ok(),
    };
    let plan = MemoryPlan::new(&demand, MicroBatch::Rows(args.batch)).map_err(in_own_flags)?;
    Ok((trainer_of(gpu, source, &lora, &plan)?, plan, config.vocab))
}

/// A plan's remedy uses flags of `nf4pack train`; some of `bench train` have other names.
fn in_own_flags(error: MemoryError) -> anyhow::Error {
    let remedy = error.remedy().map(|remedy| format!("; {} would fit", remedy.in_flags("--batch", "--seq")));
    anyhow::anyhow!("{}{}", error.with(None), remedy.unwrap_or_default())
}

/// Samples of random tokens; all are learned.
pub(super) fn random_batch([rows, length]: [u32; 2], generator: &mut Generator, vocab: u32) -> Batch {
    let seq = length as usize;
    let count = rows as usize * seq;
    let tokens: Vec<u32> = (0..count).map(|_| generator.below(vocab as usize) as u32).collect();
    let label = |i: usize| if (i + 1).is_multiple_of(seq) { IGNORE_INDEX } else { tokens[i + 1] };
    let labels: Vec<u32> = (0..count).map(label).collect();
    let starts = (0..count).map(|i| (i / seq * seq) as u32).collect();
    let loss_tokens = u64::from(rows) * u64::from(length - 1);
    Batch { rows, tokens, labels, starts, loss_tokens }
}

/// The peak memory of a step.
pub(super) fn peak(trainer: &mut Trainer, gpu: &Gpu, batch: &Batch) -> Result<Option<AllocatedMemory>> {
    let mut peak: Option<AllocatedMemory> = None;
    trainer.observed_step(std::slice::from_ref(batch), LEARNING_RATE, &mut |_| {
        if let Some(AllocatedMemory { used, reserved }) = gpu.allocated() {
            let before = peak.unwrap_or(AllocatedMemory { used, reserved });
            peak = Some(AllocatedMemory { used: used.max(before.used), reserved: reserved.max(before.reserved) });
        }
        Ok(())
    })?;
    Ok(peak)
}

/// Times the phases of a step.
fn phases(trainer: &mut Trainer, gpu: &Gpu, batch: &Batch) -> Result<Phases> {
    let mut phases = Phases::default();
    gpu.wait()?;
    let mut last = Instant::now();
    trainer.observed_step(std::slice::from_ref(batch), LEARNING_RATE, &mut |phase| {
        gpu.wait()?;
        let ms = match phase {
            Phase::Forward => &mut phases.forward,
            Phase::Loss => &mut phases.loss,
            Phase::Backward => &mut phases.backward,
            Phase::Optimizer => &mut phases.optimizer,
        };
        *ms += 1e3 * last.elapsed().as_secs_f64();
        last = Instant::now();
        Ok(())
    })?;
    Ok(phases)
}

impl Bench {
    fn text(&self) -> String {
        let mut phases = Table::new(&["phase", ">ms"]);
        let Phases { forward, loss, backward, optimizer } = &self.ms_per_phase;
        let rows = [
            ("forward", forward),
            ("loss and its gradient", loss),
            ("backward, recomputing", backward),
            ("AdamW", optimizer),
        ];
        for (phase, ms) in rows {
            phases.row([&phase, &format!("{ms:.1}")]);
        }
        let mut memory = Table::new(&["GPU memory", ">"]);
        for (what, bytes) in &self.planned {
            memory.row([what, &ui::bytes(*bytes as f64)]);
        }
        if self.host_bytes > 0 {
            memory.row([&"in host memory", &ui::bytes(self.host_bytes as f64)]);
        }
        memory.row([&"planned", &ui::bytes(self.planned_bytes as f64)]);
        for (what, bytes) in [("used", self.used_bytes), ("reserved", self.reserved_bytes)] {
            if let Some(bytes) = bytes {
                memory.row([&what, &ui::bytes(bytes as f64)]);
            }
        }
        format!(
            "\n{}\n{}, {} x {} tokens, rank {}: {:.0} tokens/s, {:.1} ms a step (median of {}), {} of {} layers keep their activations\n\n{phases}\n{memory}",
            self.gpu,
            self.shape,
            self.batch,
            self.seq,
            self.rank,
            self.tokens_per_second,
            1e3 * self.median_seconds,
            ui::plural(self.seconds.len() as u64, "run"),
            self.kept_layers,
            self.layers,
        )
    }
}

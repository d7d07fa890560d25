//! `nf4pack bench train`.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use serde::Serialize;

use super::{median, not_interrupted, temporary_folder};
use crate::cli::Outcome;
use crate::cli::args::{BenchTrainArgs, ShapeArg};
use crate::cli::device::{self, AdapterEntry, is_software};
use crate::cli::ui::{self, Table, Ui, Unit};
use crate::convert::encode::Encoder;
use crate::convert::synth::{self, Shape};
use crate::convert::{self, Options};
use crate::dequant::stream::{PackSource, StreamOptions, default_budget};
use crate::gpu::Gpu;
use crate::train::data::{Batch, UNTRAINED};
use crate::train::gpu_adapter::GpuAdapter;
use crate::train::lora::{AdapterLayout, LoraConfig, TARGETS};
use crate::train::model::{Model, read_config};
use crate::train::plan::{Demand, MemoryPlan};
use crate::train::random::{Generator, Stream};
use crate::train::settings::MicroBatch;
use crate::train::step::{Hyperparameters, Phase, Trainer};
use crate::train::workspace::{Memory, Sizes};

/// Does not matter to the time.
const LEARNING_RATE: f64 = 1e-4;

#[derive(Serialize)]
struct Bench {
    adapter: AdapterEntry,
    shape: &'static str,
    batch: u32,
    seq: u32,
    rank: u32,
    /// Of every step that was counted.
    seconds: Vec<f64>,
    median_seconds: f64,
    tokens_per_second: f64,
    /// Of a step more, in which the device was waited for after each phase: forward, loss, backward, optimizer.
    phase_seconds: [f64; 4],
    /// Bytes of GPU memory by the plan, and what for.
    planned_bytes: u64,
    planned: Vec<(&'static str, u64)>,
    /// Whether all layers stay in GPU memory.
    resident: bool,
    /// Bytes that buffers use after the last step, and what was taken of the driver for them, where the backend tells.
    used_bytes: Option<u64>,
    reserved_bytes: Option<u64>,
}

pub fn run(args: &BenchTrainArgs) -> Result<Outcome> {
    let ui = Ui::new(args.common.json);
    ui::handle_interrupts()?;
    let bench = device::with(&args.common.gpu, ui, |gpu| measure(args, ui, gpu))?;
    ui.result(&bench, || bench.text())?;
    Ok(Outcome::Good)
}

fn measure(args: &BenchTrainArgs, ui: Ui, gpu: &Gpu) -> Result<Bench> {
    let default = if is_software(gpu) { ShapeArg::Tiny } else { ShapeArg::Qwen3_0_6b };
    let shape = args.shape.unwrap_or(default).name();
    let dir = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let folder = temporary_folder(&dir)?;
    let pack = write_pack(folder.path(), shape, ui)?;
    let (mut trainer, plan, vocab) = trainer(args, gpu, &pack)?;
    let mut generator = Generator::new(0, Stream::Split);
    let batch = random_batch(args, &mut generator, vocab);
    ui.stage(&format!("training on {}", gpu.adapter()));
    let mut seconds = Vec::new();
    for _ in 0..=args.common.runs {
        not_interrupted()?;
        let started = Instant::now();
        trainer.step(std::slice::from_ref(&batch), LEARNING_RATE)?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    // The first one compiled the kernels.
    let seconds = seconds.split_off(1);
    let median_seconds = median(seconds.clone());
    let phase_seconds = phases(&mut trainer, gpu, &batch)?;
    let allocated = gpu.allocated();
    Ok(Bench {
        adapter: gpu.adapter().into(),
        shape,
        batch: args.batch,
        seq: args.seq,
        rank: args.rank,
        median_seconds,
        tokens_per_second: batch.tokens.len() as f64 / median_seconds.max(1e-9),
        seconds,
        phase_seconds,
        planned_bytes: plan.total(),
        planned: plan.parts().into(),
        resident: plan.stream.resident,
        used_bytes: allocated.map(|allocated| allocated.used),
        reserved_bytes: allocated.map(|allocated| allocated.reserved),
    })
}

/// A pack of random weights.
fn write_pack(folder: &Path, shape: &str, ui: Ui) -> Result<PathBuf> {
    let sizes = Shape::from_name(shape).with_context(|| format!("no shape {shape}"))?;
    let (checkpoint, pack) = (folder.join("checkpoint"), folder.join("model.nf4pack"));
    ui.stage(&format!("writing random weights in the shape of {shape} to {}", folder.display()));
    synth::write(&checkpoint, &sizes, 0, None).context("cannot write the weights (--dir names another place)")?;
    let options = Options { encoder: Encoder::Absmax, ..Options::default() };
    convert::convert(&checkpoint, &pack, options, &ui.meter("converting", Unit::Weights))?;
    std::fs::remove_dir_all(&checkpoint).context("cannot remove the weights")?;
    Ok(pack)
}

fn trainer(args: &BenchTrainArgs, gpu: &Gpu, pack: &Path) -> Result<(Trainer, MemoryPlan, u32)> {
    let source = PackSource::open(pack, true)?;
    let config = read_config(&source)?;
    let (rank, dropout, targets) = (args.rank, 0.0, TARGETS.to_vec());
    let lora = LoraConfig { rank, alpha: 2.0 * f64::from(rank), dropout, targets, rslora: false };
    let layout = AdapterLayout::new(&lora, &config)?;
    let demand = Demand {
        index: source.index(),
        model: &config,
        max_buffer: gpu.limits().max_buffer_size,
        budget: default_budget(gpu),
        adapter: layout.len() as u64,
        rank,
        dropout: false,
        training: true,
        length: args.seq,
        rows: args.batch.into(),
    };
    let plan = MemoryPlan::new(&demand, MicroBatch::Rows(args.batch))?;
    let stream = StreamOptions { budget: Some(plan.stream.needed_bytes), ..StreamOptions::default() };
    let model = Model::new(gpu, source, args.seq, &stream)?;
    let tokens = args.batch.saturating_mul(args.seq);
    let memory = Memory::new(gpu, &config, Sizes { tokens, rank, dropout: false, training: true })?;
    let adapter = GpuAdapter::new(gpu, &lora, &layout, &layout.initial(0), true)?;
    let hyperparameters = Hyperparameters { clip: Some(1.0), ..Hyperparameters::default() };
    Ok((Trainer::new(model, adapter, memory, hyperparameters)?, plan, config.vocab))
}

/// Samples of random tokens, all of which are learned.
fn random_batch(args: &BenchTrainArgs, generator: &mut Generator, vocab: u32) -> Batch {
    let seq = args.seq as usize;
    let count = args.batch as usize * seq;
    let tokens: Vec<u32> = (0..count).map(|_| generator.below(vocab as usize) as u32).collect();
    let label = |i: usize| if (i + 1).is_multiple_of(seq) { UNTRAINED } else { tokens[i + 1] };
    let labels: Vec<u32> = (0..count).map(label).collect();
    let starts = (0..count).map(|i| (i / seq * seq) as u32).collect();
    let trained = u64::from(args.batch) * u64::from(args.seq - 1);
    Batch { rows: args.batch, tokens, labels, starts, trained }
}

/// Seconds of each phase of a step.
fn phases(trainer: &mut Trainer, gpu: &Gpu, batch: &Batch) -> Result<[f64; 4]> {
    let mut seconds = [0.0; 4];
    gpu.wait()?;
    let mut last = Instant::now();
    trainer.observed_step(std::slice::from_ref(batch), LEARNING_RATE, &mut |phase| {
        gpu.wait()?;
        let at = match phase {
            Phase::Forward => 0,
            Phase::Loss => 1,
            Phase::Backward => 2,
            Phase::Optimizer => 3,
        };
        seconds[at] += last.elapsed().as_secs_f64();
        last = Instant::now();
        Ok(())
    })?;
    Ok(seconds)
}

impl Bench {
    fn text(&self) -> String {
        let mut phases = Table::new(&["phase", ">ms"]);
        for (phase, seconds) in
            ["forward", "loss and its gradient", "backward, recomputing", "AdamW"].iter().zip(self.phase_seconds)
        {
            phases.row([phase, &format!("{:.1}", 1e3 * seconds)]);
        }
        let mut memory = Table::new(&["GPU memory", ">"]);
        for (what, bytes) in &self.planned {
            memory.row([what, &ui::bytes(*bytes as f64)]);
        }
        memory.row([&"planned", &ui::bytes(self.planned_bytes as f64)]);
        for (what, bytes) in [("used", self.used_bytes), ("reserved", self.reserved_bytes)] {
            if let Some(bytes) = bytes {
                memory.row([&what, &ui::bytes(bytes as f64)]);
            }
        }
        format!(
            "\n{}\n{}, {} x {} tokens, rank {}: {:.0} tokens/s, {:.1} ms a step (median of {})\n\n{phases}\n{memory}",
            self.adapter,
            self.shape,
            self.batch,
            self.seq,
            self.rank,
            self.tokens_per_second,
            1e3 * self.median_seconds,
            ui::plural(self.seconds.len() as u64, "run"),
        )
    }
}

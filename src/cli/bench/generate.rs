//! `nf4pack bench generate`.

use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::dequant::{gigabytes, percent};
use super::gpu::{copy_speed, warm_up};
use super::train::write_pack;
use super::{median, temporary_folder};
use crate::PackSource;
use crate::arch::ModelConfig;
use crate::cli::args::{BenchGenerateArgs, ShapeArg};
use crate::cli::device::{self, AdapterEntry, PrecisionEntry, is_software, selects_software};
use crate::cli::outcome::Outcome;
use crate::cli::ui::{self, Table, Ui};
use crate::format::{Index, Role};
use crate::gpu::Gpu;
use crate::model::generate::sampling::Sampler;
use crate::model::generate::{Generated, TextGenerator};
use crate::model::precision::MixedKernels;
use crate::random::{Generator, Stream};

/// Bytes of the copy that is measured: more than a cache of a GPU holds.
const COPY_BYTES: u64 = 256 << 20;
/// The same on a software GPU.
const SMALL_COPY_BYTES: u64 = 32 << 20;

#[derive(Serialize)]
struct Bench {
    gpu: AdapterEntry,
    shape: &'static str,
    /// Tokens of an answer.
    answer: u32,
    runs: u16,
    /// Whether all layers stay in GPU memory.
    resident: bool,
    #[serde(flatten)]
    precision: PrecisionEntry,
    /// Bytes of weights that a token reads.
    weight_bytes: u64,
    /// Bytes read and written per second by a kernel that copies.
    copy_bytes_per_second: f64,
    texts: Vec<Text>,
}

/// The medians of the texts with a prompt of one length.
#[derive(Serialize)]
struct Text {
    /// Tokens of the prompt.
    prompt: u32,
    prompt_seconds: f64,
    prompt_tokens_per_second: f64,
    /// Of the tokens after the first.
    tokens_per_second: f64,
    ms_per_token: f64,
    /// Bytes that a token in the middle of the answer reads: weights, keys and values.
    bytes_per_token: u64,
    /// Tokens per second, if a token took the time of its bytes at the speed of the copy.
    limit_tokens_per_second: f64,
    of_limit: f64,
}

pub fn run(args: &BenchGenerateArgs) -> Result<Outcome> {
    let ui = Ui::new(args.common.json);
    ui::handle_interrupts()?;
    let default = if selects_software(&args.common.gpu)? { ShapeArg::Tiny } else { ShapeArg::Qwen3_0_6b };
    let shape = args.shape.unwrap_or(default).name();
    let dir = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let folder = temporary_folder(&dir)?;
    let pack = write_pack(folder.path(), shape, ui)?;
    let source = PackSource::open(&pack)?;
    let kernels = MixedKernels::new(source.index(), &ModelConfig::of_pack(&source)?, 0, false);
    let measure = |gpu: &Gpu| measure(args, ui, gpu, shape, &pack);
    let bench = device::with_precision(&args.common.gpu, args.compute.precision, &kernels, ui, measure)?;
    ui.result(&bench, || bench.text())?;
    Ok(Outcome::Good)
}

fn measure(args: &BenchGenerateArgs, ui: Ui, gpu: &Gpu, shape: &'static str, pack: &Path) -> Result<Bench> {
    let copied = if is_software(gpu) { SMALL_COPY_BYTES } else { COPY_BYTES };
    let source = PackSource::open(pack)?;
    let (model, weight_bytes) = (ModelConfig::of_pack(&source)?, weight_bytes(source.index()));
    ui.stage(&format!("generating on {}", gpu.adapter()));
    warm_up(gpu, copied)?;
    let copy_bytes_per_second = copy_speed(gpu, copied, args.common.runs)?;
    let (mut texts, mut resident) = (Vec::new(), true);
    for &prompt in &args.prompt {
        let runs = Runs { args, gpu, pack, model: &model, prompt };
        let (generated, is_resident) = runs.measure()?;
        resident &= is_resident;
        texts.push(Text::new(prompt, &generated, weight_bytes + runs.cache_bytes(), copy_bytes_per_second));
    }
    Ok(Bench {
        gpu: gpu.adapter().into(),
        shape,
        answer: args.answer,
        runs: args.common.runs,
        resident,
        precision: gpu.into(),
        weight_bytes,
        copy_bytes_per_second,
        texts,
    })
}

/// The texts with a prompt of one length.
struct Runs<'a> {
    args: &'a BenchGenerateArgs,
    gpu: &'a Gpu,
    pack: &'a Path,
    model: &'a ModelConfig,
    prompt: u32,
}

impl Runs<'_> {
    /// Generates the texts, and one before them that does not count: it compiles the kernels and
    /// loads the layers. Returns whether all layers are resident, too.
    fn measure(&self) -> Result<(Vec<Generated>, bool)> {
        let (capacity, source) = (self.prompt + self.args.answer, PackSource::open(self.pack)?);
        let mut generator = TextGenerator::open(self.gpu, source, None, None, capacity, None)?;
        // A random model may choose an end token.
        generator.ignore_ends();
        let mut random = Generator::new(u64::from(self.prompt), Stream::Split);
        let mut texts = Vec::new();
        for _ in 0..=self.args.common.runs {
            let prompt: Vec<u32> = (0..self.prompt).map(|_| random.below(self.model.vocab as usize) as u32).collect();
            let mut sampler = Sampler::new(self.args.sampling.over(None))?;
            texts.push(generator.answer(&prompt, self.args.answer, &mut sampler, |_| -> Result<_> {
                ui::not_interrupted()?;
                Ok(ControlFlow::Continue(()))
            })?);
        }
        texts.remove(0);
        Ok((texts, generator.plan().resident))
    }

    /// Bytes of keys and values that a token in the middle of the answer reads.
    fn cache_bytes(&self) -> u64 {
        let tokens = u64::from(self.prompt) + u64::from(self.args.answer / 2);
        2 * 4 * tokens * u64::from(self.model.keys()) * u64::from(self.model.layers)
    }
}

/// Bytes of the sections that every token reads: all layers, the final norm and the head.
fn weight_bytes(index: &Index) -> u64 {
    let head = if index.has(Role::LmHead) { Role::LmHead } else { Role::Embedding };
    let read = index.tensors().filter(|(_, s)| s.layer.is_some() || s.role == head || s.role == Role::FinalNorm);
    read.map(|(_, section)| section.length).sum()
}

impl Text {
    fn new(prompt: u32, generated: &[Generated], bytes_per_token: u64, copy_bytes_per_second: f64) -> Self {
        let of = |value: fn(&Generated) -> f64| median(&generated.iter().map(value).collect::<Vec<_>>());
        let prompt_seconds = of(|text| text.prompt_seconds).max(1e-9);
        let tokens_per_second = of(|text| text.tokens_per_second().unwrap_or_default());
        let limit_tokens_per_second = copy_bytes_per_second / (bytes_per_token as f64).max(1.0);
        Self {
            prompt,
            prompt_seconds,
            prompt_tokens_per_second: f64::from(prompt) / prompt_seconds,
            tokens_per_second,
            ms_per_token: 1e3 / tokens_per_second.max(1e-9),
            bytes_per_token,
            limit_tokens_per_second,
            of_limit: tokens_per_second / limit_tokens_per_second,
        }
    }
}

impl Bench {
    fn text(&self) -> String {
        let mut table =
            Table::new(&[">prompt", ">ms", ">tokens/s", ">answer tokens/s", ">ms a token", ">limit", ">of limit"]);
        for text in &self.texts {
            table.row([
                &ui::grouped(text.prompt.into()),
                &format!("{:.1}", 1e3 * text.prompt_seconds),
                &format!("{:.0}", text.prompt_tokens_per_second),
                &format!("{:.1}", text.tokens_per_second),
                &format!("{:.3}", text.ms_per_token),
                &format!("{:.0}", text.limit_tokens_per_second),
                &percent(text.of_limit),
            ]);
        }
        format!(
            "\n{}\n{}, answers of {} tokens, median of {}{}\n\n{table}(limit: {} of weights for each token, its keys and \
             values, at the {} GB/s of a copy)",
            self.gpu,
            self.shape,
            self.answer,
            ui::plural(self.runs.into(), "run"),
            if self.resident { "" } else { ", layers are streamed" },
            ui::bytes(self.weight_bytes as f64),
            gigabytes(self.copy_bytes_per_second),
        )
    }
}

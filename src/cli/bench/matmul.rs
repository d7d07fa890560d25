//! `nf4pack bench matmul`.

use std::fmt::Write as _;

use anyhow::Result;
use serde::Serialize;

use super::gpu::Tensor;
use super::median;
use crate::cli::args::{BenchMatmulArgs, Matrices, parse_matrices};
use crate::cli::device::{self, AdapterEntry, is_software};
use crate::cli::outcome::Outcome;
use crate::cli::ui::{self, Table, Ui};
use crate::format::nf4::{DEFAULT_BLOCK_SIZE, ScaleType};
use crate::gpu::{Commands, Gpu, MatrixUnits};
use crate::ops::matmul::{Elements, Matmul, Weight};
use crate::ops::{Mat, OpError};

/// Tokens of a pass.
const TOKENS: [u32; 3] = [512, 2048, 8192];
const SOFTWARE_TOKENS: [u32; 1] = [70];
/// Products of a run, to hide the overhead of a submission.
const CALLS: u32 = 8;

#[derive(Serialize)]
struct Bench {
    gpu: AdapterEntry,
    shape: String,
    runs: u16,
    /// Why there are no products in mixed precision, if there are none.
    without_mixed: Option<String>,
    products: Vec<Figures>,
}

/// The speed of one product.
#[derive(Debug, Serialize)]
struct Figures {
    product: &'static str,
    precision: &'static str,
    tokens: u32,
    outputs: u64,
    inputs: u64,
    /// One figure per run.
    seconds: Vec<f64>,
    operations_per_second: f64,
}

pub fn run(args: &BenchMatmulArgs) -> Result<Outcome> {
    let ui = Ui::new(args.common.json);
    ui::handle_interrupts()?;
    let bench = device::with(&args.common.gpu, ui, |gpu| measure(args, ui, gpu))?;
    ui.result(&bench, || bench.text())?;
    Ok(Outcome::Good)
}

fn measure(args: &BenchMatmulArgs, ui: Ui, gpu: &Gpu) -> Result<Bench> {
    let default = if is_software(gpu) { "128x256" } else { "qwen3-4b" };
    let Matrices { name, mut shapes } = match &args.shape {
        Some(shape) => shape.clone(),
        None => parse_matrices(default).map_err(anyhow::Error::msg)?,
    };
    ui.stage(&format!("measuring {name} on {}", gpu.adapter()));
    shapes.sort_unstable();
    shapes.dedup();
    let tokens = match args.tokens {
        Some(tokens) => vec![tokens],
        None if is_software(gpu) => SOFTWARE_TOKENS.to_vec(),
        None => TOKENS.to_vec(),
    };
    let units = gpu.matrix_units();
    let mut kernels = vec![("f32", Matmul::new(gpu, None)?)];
    if let Ok(units) = units {
        kernels.push((precision(units), Matmul::new(gpu, Some(units))?));
    }
    let mut products = Vec::new();
    for (shape, tokens) in shapes.iter().flat_map(|shape| tokens.iter().map(move |tokens| (shape, *tokens))) {
        products.append(&mut of_shape(gpu, &kernels, *shape, tokens, args.common.runs)?);
    }
    let without_mixed = units.err().map(str::to_owned);
    Ok(Bench { gpu: gpu.adapter().into(), shape: name, runs: args.common.runs, without_mixed, products })
}

fn precision(units: MatrixUnits) -> &'static str {
    match units {
        MatrixUnits::Hardware => "mixed",
        MatrixUnits::Loops => "mixed (loops)",
    }
}

/// Both products of a weight, in each precision, in turn.
fn of_shape(
    gpu: &Gpu,
    kernels: &[(&'static str, Matmul)],
    [outputs, inputs]: [u64; 2],
    tokens: u32,
    runs: u16,
) -> Result<Vec<Figures>> {
    let tensor = Tensor::new(gpu, outputs * inputs, DEFAULT_BLOCK_SIZE)?;
    let Some(weights) = tensor.under(ScaleType::Bf16) else { return Ok(Vec::new()) };
    let [rows, columns] = [u32::try_from(outputs)?, u32::try_from(inputs)?];
    let weight = Weight::new(Elements::Quantized(weights), rows, columns);
    let (x, y) = (filled(gpu, tokens, columns)?, filled(gpu, tokens, rows)?);
    let mut figures = Vec::new();
    for &(precision, ref matmul) in kernels {
        let forward = |commands: &mut Commands| matmul.forward(commands, &x, &weight, None, false, &y);
        let backward = |commands: &mut Commands| matmul.backward(commands, &y, &weight, false, &x);
        let both: [(&str, &dyn Fn(&mut Commands) -> Result<(), OpError>); 2] = [("x W^T", &forward), ("dy W", &backward)];
        for (product, record) in both {
            let seconds = timed(gpu, runs, record)?;
            let operations = 2.0 * f64::from(tokens) * outputs as f64 * inputs as f64;
            let operations_per_second = operations / median(&seconds).max(1e-12);
            figures.push(Figures { product, precision, tokens, outputs, inputs, seconds, operations_per_second });
        }
    }
    Ok(figures)
}

/// A matrix of small numbers: the speed of matrix units depends on the bits that change.
fn filled(gpu: &Gpu, rows: u32, columns: u32) -> Result<Mat> {
    let mut state = 1_u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1_u32 << 23) as f32 - 1.0
    };
    let elements: Vec<f32> = std::iter::repeat_with(next).take(rows as usize * columns as usize).collect();
    Ok(Mat::from_slice(gpu, "operand", rows, columns, &elements)?)
}

/// Seconds of a product in each run. The first run compiles and does not count.
fn timed(gpu: &Gpu, runs: u16, record: &dyn Fn(&mut Commands) -> Result<(), OpError>) -> Result<Vec<f64>> {
    let mut seconds = Vec::new();
    for _ in 0..=runs {
        ui::not_interrupted()?;
        let mut commands = gpu.commands("products");
        (0..CALLS).try_for_each(|_| record(&mut commands))?;
        seconds.push(commands.submit_timed()?.elapsed(gpu)?.as_secs_f64() / f64::from(CALLS));
    }
    Ok(seconds.split_off(1))
}

impl Bench {
    fn text(&self) -> String {
        let mut table = Table::new(&["product", ">tokens", ">outputs", ">inputs", "precision", ">µs", ">TFLOP/s"]);
        for of in &self.products {
            let micros = format!("{:.1}", 1e6 * median(&of.seconds));
            let rate = format!("{:.1}", of.operations_per_second / 1e12);
            table.row([&of.product, &of.tokens, &of.outputs, &of.inputs, &of.precision, &micros, &rate]);
        }
        let mut text =
            format!("\n{}\n{}, median of {}\n\n{table}", self.gpu, self.shape, ui::plural(self.runs.into(), "run"));
        if let Some(reason) = &self.without_mixed {
            let _ = writeln!(text, "(no mixed precision: {reason})");
        }
        text
    }
}

//! `nf4pack doctor`.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::args::{DoctorArgs, ReadArgs};
use super::bench::dequant::{gigabytes, percent};
use super::bench::{gpu as decode, upload};
use super::device::{self, AdapterEntry, PrecisionEntry, is_software};
use super::failure::{self, Advice, Failure};
use super::open;
use super::outcome::Outcome;
use super::ui::{self, Table, Ui};
use crate::arch::ModelConfig;
use crate::convert::plan::scale_type_name;
use crate::dequant::stream::{Globals, StreamError, StreamPlan, default_budget};
use crate::dequant::{Dequantizer, KernelChoice, Output};
use crate::format::SectionKind;
use crate::format::nf4::{DEFAULT_BLOCK_SIZE, ScaleType};
use crate::gpu::{self, Gpu, MatrixUnits};
use crate::model::ModelError;
use crate::model::precision::MixedKernels;
use crate::ops::mixed_test;

/// Number of measurements: a quick look, not a benchmark.
const RUNS: u16 = 3;

pub fn run(args: &DoctorArgs) -> Result<Outcome> {
    let ui = Ui::new(args.json);
    ui::handle_interrupts()?;
    let adapters = gpu::adapters().iter().map(AdapterEntry::from).collect();
    let mut document = Document { adapters, ..Document::default() };
    // A failure must not hide the results so far.
    if let Err(error) = device::with(&args.gpu, ui, |gpu| document.examine(args, ui, gpu)) {
        ui::not_interrupted()?;
        document.failure = Some(Failure::new(&error, Advice::DOCTOR));
    }
    if let (None, Some(pack)) = (&document.failure, document.pack.as_ref().filter(|pack| pack.plan.is_none())) {
        document.failure = Some(Failure::new(&pack.too_small().into(), Advice::DOCTOR));
    }
    ui.result(&document, || document.text())?;
    if let Some(failure) = &document.failure {
        failure.print();
    }
    Ok(Outcome::from(document.failure.is_none()))
}

/// The results so far.
#[derive(Default, Serialize)]
struct Document {
    adapters: Vec<AdapterEntry>,
    /// `None` if no device could be opened.
    #[serde(flatten)]
    device: Option<Device>,
    /// Empty if the kernels could not run or compute wrong values.
    kernels: Vec<KernelEntry>,
    /// `None` if it was not measured.
    speed: Option<Speed>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pack: Option<PackEntry>,
    /// The failure that ended the examination.
    #[serde(flatten)]
    failure: Option<Failure>,
}

/// The device in use.
#[derive(Serialize)]
struct Device {
    /// Its adapter's index.
    adapter: usize,
    limits: Limits,
    memory: Memory,
    features: Vec<&'static str>,
    /// What `--precision auto` takes, and why.
    #[serde(flatten)]
    precision: PrecisionEntry,
    /// The tests of the kernels for matrix units; none on a device without them.
    mixed_kernels: Vec<MixedEntry>,
    /// Whether kernels run with wgpu's runtime checks (`NF4PACK_CHECKED=1`).
    checked: bool,
}

#[derive(Serialize)]
struct Limits {
    buffer_bytes: u64,
    binding_bytes: u64,
    workgroup_bytes: u32,
    workgroup_threads: u32,
    smallest_subgroup: u32,
    largest_subgroup: u32,
}

/// Bytes of the device's memory, if its driver reports them.
#[derive(Serialize)]
struct Memory {
    total: Option<u64>,
    available: Option<u64>,
}

#[derive(Serialize)]
struct KernelEntry {
    output: String,
    scales: &'static str,
    fast: bool,
    /// Why the fast kernel is not used.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

/// The test of a kernel for matrix units.
#[derive(Serialize)]
struct MixedEntry {
    kernel: String,
    /// What was compared with the CPU.
    covers: String,
    /// Why it cannot be used.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
}

#[derive(Serialize)]
struct Speed {
    upload: upload::UploadFigures,
    dequant: decode::Figures,
}

#[derive(Serialize)]
struct PackEntry {
    file: String,
    layers: u32,
    /// GPU bytes of all layers, and of the largest.
    layers_bytes: u64,
    largest_layer_bytes: u64,
    /// File bytes of the global tensors: embedding, final norm, lm_head.
    globals_bytes: u64,
    /// GPU memory for the plan, if it is known.
    budget_bytes: Option<u64>,
    /// Bytes to keep all layers, and to stream them through a ring of two, including staging.
    resident_bytes: u64,
    smallest_bytes: u64,
    /// The plan; `None` if the budget is too small.
    plan: Option<PlanEntry>,
    /// Why train, eval and generate cannot use the pack.
    cannot_run: Vec<String>,
    /// Elements of an attention head, if they are known.
    #[serde(skip)]
    head_dim: Option<u32>,
}

#[derive(Serialize)]
struct PlanEntry {
    resident: bool,
    /// Layers in GPU memory at a time.
    slots: u32,
    staging_bytes: u64,
    needed_bytes: u64,
}

impl Document {
    fn examine(&mut self, args: &DoctorArgs, ui: Ui, gpu: &Gpu) -> Result<()> {
        let device = self.device.insert(Device::new(gpu));
        let budget = args.budget.or_else(|| default_budget(gpu));
        // Before the tests and measurements, since it finds damaged packs and wrong names.
        let pack = args.pack.as_deref().map(|file| PackEntry::new(file, args.read, gpu, budget)).transpose()?;
        let head_dim = pack.as_ref().and_then(|pack| pack.head_dim);
        self.pack = pack;
        device.test_mixed(gpu, &args.gpu.options(), head_dim, ui)?;
        let kernels = Dequantizer::new(gpu)?;
        self.kernels = kernels.choices().into_iter().map(KernelEntry::from).collect();
        ui.stage("measuring");
        self.speed = Some(Speed::new(gpu, &kernels).context("the speed cannot be measured")?);
        Ok(())
    }

    fn text(&self) -> String {
        let mut text = String::new();
        if !self.adapters.is_empty() {
            self.adapters(&mut text);
        }
        if let Some(device) = &self.device {
            device.text(&mut text);
        }
        if !self.kernels.is_empty() {
            self.kernels(&mut text);
        }
        if let Some(speed) = &self.speed {
            speed.text(&mut text);
        }
        if let Some(pack) = &self.pack {
            pack.text(&mut text);
        }
        text
    }

    fn adapters(&self, text: &mut String) {
        let used = self.device.as_ref().map(|device| device.adapter);
        let mut table = Table::new(&["", ">#", "GPU", "kind", "backend", "driver"]);
        for a in &self.adapters {
            let mark = if used == Some(a.index) { "*" } else { "" };
            table.row([&mark, &a.index, &a.name, &a.kind, &a.backend, &a.driver]);
        }
        let note = match used {
            Some(_) => "* in use; --gpu or NF4PACK_ADAPTER names another GPU",
            None => "none in use; --gpu or NF4PACK_ADAPTER names a GPU",
        };
        let _ = writeln!(text, "{table}({note})");
    }

    fn kernels(&self, text: &mut String) {
        let mut table = Table::new(&["kernels", "f32 scales", "bf16 scales", "dq8 scales"]);
        let of = |output: Output, scales| {
            let output = output.to_string();
            let found = self.kernels.iter().find(|k| k.output == output && k.scales == scale_type_name(scales));
            if found.is_some_and(|k| k.fast) { "fast" } else { "plain" }
        };
        for output in Output::ALL {
            let [f32, bf16, dq8] = [ScaleType::F32, ScaleType::Bf16, ScaleType::Dq8].map(|scales| of(output, scales));
            table.row([&format!("to {output}"), &f32, &bf16, &dq8]);
        }
        let slow: Vec<&KernelEntry> = self.kernels.iter().filter(|k| !k.fast).collect();
        let verdict = match slow.len() {
            0 => "all equal the CPU".to_owned(),
            n => format!("{n} fast kernels failed, the plain ones equal the CPU"),
        };
        let _ = writeln!(text, "\n{table}(self-test on this device: {verdict})");
        for k in slow {
            let reason = k.reason.as_deref().unwrap_or("unknown reason");
            let _ = writeln!(text, "{} from {} scales: {}", k.output, k.scales, ui::one_line(reason));
        }
    }
}

impl Device {
    fn new(gpu: &Gpu) -> Self {
        let memory = gpu.memory();
        let (smallest_subgroup, largest_subgroup) = gpu.subgroup_sizes();
        Self {
            adapter: gpu.adapter().index,
            limits: Limits {
                buffer_bytes: gpu.limits().max_buffer_size,
                binding_bytes: gpu.limits().max_storage_buffer_binding_size,
                workgroup_bytes: gpu.limits().max_compute_workgroup_storage_size,
                workgroup_threads: gpu.limits().max_compute_invocations_per_workgroup,
                smallest_subgroup,
                largest_subgroup,
            },
            memory: Memory { total: memory.map(|m| m.total), available: memory.and_then(|m| m.available) },
            features: gpu.feature_names(),
            precision: gpu.into(),
            mixed_kernels: Vec::new(),
            checked: gpu.is_checked(),
        }
    }

    fn text(&self, text: &mut String) {
        let binary = |bytes: u64| ui::bytes(bytes as f64);
        let memory = match (self.memory.total, self.memory.available) {
            (Some(total), Some(available)) => format!("{}, {} of it free", binary(total), binary(available)),
            (Some(total), None) => binary(total),
            _ => "not reported by the driver".to_owned(),
        };
        let Limits { buffer_bytes, binding_bytes, workgroup_bytes, workgroup_threads, .. } = self.limits;
        let (smallest, largest) = (self.limits.smallest_subgroup, self.limits.largest_subgroup);
        let subgroups = if smallest == largest { smallest.to_string() } else { format!("{smallest} to {largest}") };
        let rows = [
            ("memory", memory),
            ("largest buffer", format!("{}; bound at once: {}", binary(buffer_bytes), binary(binding_bytes))),
            (
                "workgroups",
                format!("{workgroup_threads} threads, {workgroup_bytes} bytes of memory; subgroups of {subgroups}"),
            ),
            ("features", if self.features.is_empty() { "none".to_owned() } else { self.features.join(", ") }),
            (
                "precision",
                ui::one_line(&format!("{}: {}", self.precision.precision, self.precision.precision_reason)).to_string(),
            ),
            (
                "checks",
                if self.checked { "on in all kernels (NF4PACK_CHECKED=1)" } else { "off in fast kernels" }.to_owned(),
            ),
        ];
        text.push('\n');
        for (name, value) in rows {
            let _ = writeln!(text, "{name:<15} {value}");
        }
        self.mixed_tests(text);
    }

    /// What the tests of the kernels for matrix units compared with the CPU.
    fn mixed_tests(&self, text: &mut String) {
        let mut rest: Vec<&MixedEntry> = self.mixed_kernels.iter().collect();
        let mut name = "matrix units";
        while let Some(covers) = rest.first().map(|test| &test.covers) {
            let (same, others): (Vec<&MixedEntry>, Vec<&MixedEntry>) = rest.iter().partition(|test| &test.covers == covers);
            let failed = match same.iter().filter(|test| test.reason.is_some()).count() {
                0 => String::new(),
                failed => format!(" ({failed} failed)"),
            };
            let _ = writeln!(text, "{name:<15} {} tested{failed}: {covers}", ui::plural(same.len() as u64, "kernel"));
            (name, rest) = ("", others);
        }
    }
}

impl Device {
    /// Tests the kernels for matrix units. `gpu` keeps the results, so that later runs find them.
    fn test_mixed(&mut self, gpu: &Gpu, options: &gpu::Options, head_dim: Option<u32>, ui: Ui) -> Result<()> {
        let Ok(units) = gpu.matrix_units() else { return Ok(()) };
        // A device of their own, since they may lose it, and without the results of earlier runs.
        let own = Gpu::open(&gpu::Options { cache: None, ..options.clone() })?;
        let tests = MixedKernels::all(head_dim).tests(&own, units).map_err(ModelError::from)?;
        ui.stage("compiling and testing kernels for matrix units");
        mixed_test::compile(&tests);
        for test in tests {
            ui::not_interrupted()?;
            let unfit = |error| mixed_test::reason(&error).ok_or(ModelError::Op(error));
            let reason = test.run(gpu).err().map(unfit).transpose()?;
            self.mixed_kernels.push(MixedEntry { kernel: test.kernel, covers: test.covers, reason });
        }
        if let Some(reason) = self.mixed_kernels.iter().find_map(|kernel| kernel.reason.as_ref()) {
            let reason = format!("{reason}; models without that kernel run in mixed precision");
            self.precision = PrecisionEntry { precision: MatrixUnits::precision(None), precision_reason: reason };
        }
        Ok(())
    }
}

impl From<KernelChoice> for KernelEntry {
    fn from(k: KernelChoice) -> Self {
        let (output, scales) = (k.output.to_string(), scale_type_name(k.scale_type));
        Self { output, scales, fast: k.fast, reason: k.reason }
    }
}

impl Speed {
    fn new(gpu: &Gpu, kernels: &Dequantizer) -> Result<Self> {
        let sizes = if is_software(gpu) { (16 << 20, 1 << 20, 8 << 20) } else { (256 << 20, 1 << 26, 256 << 20) };
        let (upload_bytes, weights, beyond_caches) = sizes;
        let threads = super::bench::cores().min(8) as u16;
        let upload = upload::Task::new(gpu, upload_bytes)?.measure(threads, RUNS)?;
        let wanted = |k: &KernelChoice| k.scale_type == ScaleType::Bf16;
        let task = decode::Task { tensors: &[weights], block_size: DEFAULT_BLOCK_SIZE, runs: RUNS, beyond_caches, wanted };
        decode::warm_up(gpu, beyond_caches)?;
        Ok(Self { upload, dequant: task.measure(gpu, kernels)? })
    }

    fn text(&self, text: &mut String) {
        let mut table = Table::new(&["quick measurement", ">GB/s", "baseline"]);
        let memcpy = format!("memcpy {} GB/s", gigabytes(self.upload.memcpy_bytes_per_second));
        let threads = ui::plural(self.upload.threads.into(), "thread");
        table.row([&format!("upload, {threads}"), &gigabytes(self.upload.bytes_per_second), &memcpy]);
        let copy = format!("copy {} GB/s", gigabytes(self.dequant.copy.kernel_bytes_per_second));
        for k in &self.dequant.kernels {
            let name = format!("decode to {}, {} scales", k.output, k.scales);
            table.row([&name, &gigabytes(k.bytes_per_second), &format!("{copy}: {}", percent(k.of_copy))]);
        }
        let _ = write!(text, "\n{table}");
    }
}

impl PackEntry {
    fn new(file: &Path, args: ReadArgs, gpu: &Gpu, budget: Option<u64>) -> Result<Self> {
        let pack = open::read(file, args)?;
        let index = pack.index();
        let max_buffer = gpu.limits().max_buffer_size;
        let whole = StreamPlan::new(index, max_buffer, None, Globals::None)?;
        let plan = match StreamPlan::new(index, max_buffer, budget, Globals::None) {
            Ok(plan) => Some(PlanEntry::from(&plan)),
            Err(StreamError::Budget { .. }) => None,
            Err(e) => return Err(e.into()),
        };
        let global = index.sections().iter().filter(|s| s.layer.is_none() && s.kind.is_some_and(|k| k != SectionKind::File));
        Ok(Self {
            file: file.display().to_string(),
            layers: whole.layers,
            layers_bytes: whole.weights_bytes,
            largest_layer_bytes: whole.layer_bytes,
            globals_bytes: global.map(|s| s.length).sum(),
            budget_bytes: budget,
            resident_bytes: whole.needed_bytes,
            smallest_bytes: whole.minimum_bytes,
            plan,
            cannot_run: failure::cannot_run_pack(&pack)?,
            head_dim: ModelConfig::of_pack(&pack).ok().map(|model| model.head_dim),
        })
    }

    /// Why there is no plan.
    fn too_small(&self) -> StreamError {
        let (budget, needed) = (self.budget_bytes.unwrap_or_default(), self.smallest_bytes);
        StreamError::Budget { budget, needed, layer: self.largest_layer_bytes, globals: 0 }
    }

    fn text(&self, text: &mut String) {
        let bytes = |n: u64| ui::bytes(n as f64);
        let (layers, all) = (ui::plural(u64::from(self.layers), "layer"), bytes(self.layers_bytes));
        let (largest, globals) = (bytes(self.largest_layer_bytes), bytes(self.globals_bytes));
        let _ = writeln!(
            text,
            "\n{}: {layers}, {all}, the largest {largest}; global tensors: {globals}",
            ui::one_line(&self.file)
        );
        let within = self.budget_bytes.map_or("memory of unknown size".to_owned(), bytes);
        let verdict = match &self.plan {
            Some(plan) if plan.resident => format!("all layers fit in {within} and take {}", bytes(plan.needed_bytes)),
            Some(plan) => {
                let (slots, needed) = (plan.slots, bytes(plan.needed_bytes));
                format!("{within} holds {slots} of {layers} at a time ({needed}); the layers are streamed")
            }
            None => format!("does not run in {within}"),
        };
        let _ = writeln!(text, "{:<15} {verdict}", "layers");
        let (resident, smallest) = (bytes(self.resident_bytes), bytes(self.smallest_bytes));
        let (all, ring) = (self.resident_bytes, self.smallest_bytes);
        let _ = writeln!(
            text,
            "{:<15} {resident} for all layers (--budget {all}), {smallest} for a ring of two (--budget {ring});",
            "needs"
        );
        let _ = writeln!(text, "{:<15} including staging buffers, without the global tensors", "");
        for (i, reason) in self.cannot_run.iter().enumerate() {
            let _ = writeln!(text, "{:<15} {}", if i == 0 { "does not run" } else { "" }, ui::one_line(reason));
        }
    }
}

impl From<&StreamPlan> for PlanEntry {
    fn from(plan: &StreamPlan) -> Self {
        let StreamPlan { resident, slots, staging_bytes, needed_bytes, .. } = *plan;
        Self { resident, slots, staging_bytes, needed_bytes }
    }
}

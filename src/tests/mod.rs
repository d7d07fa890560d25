//! Tests of the model and of the trainer below the public API, against the results of transformers
//! and PEFT: a checkpoint whose weights NF4 represents exactly, and the expected results with the
//! same weights.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod architectures;
mod generation;
mod mixed;
mod oracle;
mod precision;
mod vocabulary;
mod windows;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use crate::arch::ModelConfig;
use crate::convert::{self, encode::Encoder};
use crate::data::pack::{Batch, IGNORE_INDEX};
use crate::dequant::stream::{Globals, PackSource, StreamOptions, StreamPlan};
use crate::format::Role;
use crate::format::nf4::ScaleType;
use crate::gpu::{Gpu, UseMatrixUnits};
use crate::lora::Adapter;
use crate::lora::config::AdapterLayout;
use crate::lora::gpu::GpuAdapter;
use crate::model::Session;
use crate::model::decoder::Model;
use crate::model::workspace::{Memory, Sizes, WINDOW, chunk};
use crate::ops::testing::{gpu, gpu_with};
use crate::train::trainer::{Hyperparameters, Trainer};
use safetensors::SafeTensors;
use serde_json::Value;

/// A file or folder of the fixtures.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

/// The tensors of a safetensors file, all of them float32.
pub fn floats(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(path).unwrap();
    let decode = |data: &[u8]| data.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors.iter().map(|(name, view)| (name.to_owned(), decode(view.data()))).collect()
}

/// Runs a test in float32 and, on a device with matrix units, in mixed precision.
pub fn in_each_precision(test: impl Fn(Gpu)) {
    static EXACT: OnceLock<Option<Gpu>> = OnceLock::new();
    let Some(gpu) = gpu() else { return };
    if gpu.matrix_units().is_ok() {
        let exact = EXACT.get_or_init(|| gpu_with(|options| options.matrix_units = UseMatrixUnits::Off));
        exact.clone().into_iter().for_each(&test);
    }
    test(gpu);
}

/// Half of how far PEFT in bfloat16 is from float32, by part of the results and name: the bounds of
/// mixed precision. Each model has its own: `bf16.json` in its folder, by interop/precision.py.
#[derive(Clone)]
pub struct HalfOfBf16(BTreeMap<String, BTreeMap<String, f64>>);

impl HalfOfBf16 {
    pub fn of(folder: &Path) -> Self {
        let table = json(&folder.join("bf16.json"));
        let parts = table.as_object().unwrap().iter().filter(|(_, part)| part.is_object());
        let half = |part: &Value| -> BTreeMap<String, f64> {
            part.as_object().unwrap().iter().map(|(name, x)| (name.clone(), x.as_f64().unwrap() / 2.0)).collect()
        };
        Self(parts.map(|(part, values)| (part.clone(), half(values))).collect())
    }

    /// The largest of a part.
    pub fn largest(&self, part: &str) -> f64 {
        self.0[part].values().copied().fold(0.0, f64::max)
    }

    /// That of a matrix.
    pub fn matrix(&self, part: &str, name: &str) -> f64 {
        self.0[part][name]
    }
}

/// A JSON file.
pub fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// The numbers of a list.
pub fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect()
}

/// The tokens of a list.
pub fn tokens(value: &Value) -> Vec<u32> {
    numbers(value).iter().map(|&id| id as u32).collect()
}

/// Rows of as many tokens and labels as a batch of ours: their labels stand at the token itself,
/// ours at the one before.
pub fn batch<'a>(rows: impl IntoIterator<Item = [&'a Value; 2]>) -> Batch {
    let mut batch = Batch { rows: 0, tokens: Vec::new(), labels: Vec::new(), starts: Vec::new(), loss_tokens: 0 };
    for [row, labels] in rows {
        batch.rows += 1;
        batch.tokens.extend(tokens(row));
        let shifted = numbers(labels).into_iter().skip(1).chain([-100.0]);
        batch.labels.extend(shifted.map(|n| if n < 0.0 { IGNORE_INDEX } else { n as u32 }));
        batch.starts.resize(batch.tokens.len(), batch.starts.len() as u32);
    }
    batch.loss_tokens = batch.labels.iter().filter(|&&label| label != IGNORE_INDEX).count() as u64;
    batch
}

/// Converts a checkpoint. Those of the fixtures do not change, so each is converted once for all
/// tests: the encoder is slow without optimisation.
fn convert_once(checkpoint: &Path, pack: &Path, options: convert::Options) {
    static PACKS: Mutex<BTreeMap<String, Vec<u8>>> = Mutex::new(BTreeMap::new());
    let key = checkpoint.starts_with(fixture("")).then(|| format!("{} {options:?}", checkpoint.display()));
    let mut packs = PACKS.lock().unwrap();
    if let Some(bytes) = key.as_ref().and_then(|key| packs.get(key)) {
        return std::fs::write(pack, bytes).unwrap();
    }
    convert::convert(checkpoint, pack, options, &()).unwrap();
    packs.extend(key.map(|key| (key, std::fs::read(pack).unwrap())));
}

/// A checkpoint as a pack without loss, and the folder of what is expected of it.
pub struct Fixture {
    gpu: Gpu,
    folder: PathBuf,
    pub pack: PathBuf,
    pub config: ModelConfig,
    length: u32,
    rank: u32,
    _scratch: tempfile::TempDir,
}

impl Fixture {
    /// For rows of `length` tokens, and adapters of rank `rank`.
    pub fn new(gpu: Gpu, checkpoint: &Path, folder: PathBuf, length: usize, rank: u32) -> Self {
        let options =
            convert::Options { encoder: Encoder::Absmax, scale_type: ScaleType::F32, ..convert::Options::default() };
        Self::converted(gpu, checkpoint, folder, length, rank, options)
    }

    /// As [`Fixture::new`], with other options of the conversion.
    pub fn converted(
        gpu: Gpu,
        checkpoint: &Path,
        folder: PathBuf,
        length: usize,
        rank: u32,
        options: convert::Options,
    ) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let pack = scratch.path().join("model.nf4pack");
        convert_once(checkpoint, &pack, options);
        let config = ModelConfig::of_pack(&PackSource::open(&pack).unwrap()).unwrap();
        Self { gpu, folder, pack, config, length: length as u32, rank, _scratch: scratch }
    }

    /// The maximum error of results: `exact` in float32; in mixed precision half of what bfloat16
    /// has in this part of the results, relative to them.
    pub fn bound(&self, exact: f64, part: &str) -> f64 {
        if self.is_mixed() { self.half_of_bf16().largest(part) } else { exact }
    }

    pub fn half_of_bf16(&self) -> HalfOfBf16 {
        HalfOfBf16::of(&self.folder)
    }

    /// Compares the gradient of every matrix of an adapter with PEFT's: its relative error is at
    /// most `exact` in float32, and in mixed precision half of what bfloat16 has for this matrix.
    /// Both have the same matrices.
    #[track_caller]
    pub fn assert_gradients(
        &self,
        layout: &AdapterLayout,
        gradient: &[f32],
        expected: &BTreeMap<String, Vec<f32>>,
        exact: f64,
    ) {
        let mixed = self.is_mixed().then(|| self.half_of_bf16());
        let mut compared = 0;
        for (layer, role, place) in layout.places() {
            let block = if [Role::GateProj, Role::UpProj, Role::GateUpProj, Role::DownProj].contains(&role) {
                "mlp"
            } else {
                "self_attn"
            };
            for (matrix, range) in [("A", place.a), ("B", place.b)] {
                let name = format!("layers.{layer}.{block}.{role}.lora_{matrix}.weight");
                let found = &gradient[range];
                assert!(found.iter().any(|&g| g != 0.0), "{name} has no gradient");
                let error = relative(found, &expected[&format!("base_model.model.model.{name}")]);
                let bound = mixed.as_ref().map_or(exact, |half| half.matrix("gradients", &name));
                assert!(error <= bound, "{name}: {error}, bound {bound}");
                compared += 1;
            }
        }
        assert_eq!(compared, expected.keys().filter(|name| name.contains(".lora_")).count());
    }

    pub fn is_mixed(&self) -> bool {
        self.gpu.matrix_units().is_ok()
    }

    /// Compares numbers with the expected ones: each within 2e-4 in float32, and all together in
    /// mixed precision.
    #[track_caller]
    pub fn assert_near(&self, what: &str, found: &[f32], expected: &[f32]) {
        match self.is_mixed() {
            false => assert_near(what, found, expected),
            true => {
                let (error, bound) = (relative(found, expected), self.half_of_bf16().largest("logits"));
                assert!(error <= bound, "{what}: {error}, bound {bound}");
            }
        }
    }

    /// Compares a loss with the expected one: within `exact` in float32.
    #[track_caller]
    pub fn assert_loss(&self, what: &str, found: f64, expected: f64, exact: f64) {
        let bound = if self.is_mixed() { self.half_of_bf16().largest("losses") * expected } else { exact };
        assert!((found - expected).abs() <= bound, "{what}: {found}, expected {expected}, bound {bound}");
    }

    pub fn model(&self, ring: bool) -> Model {
        self.model_with(Globals::All, ring)
    }

    /// As [`Fixture::model`], with these global tensors in GPU memory.
    pub fn model_with(&self, globals: Globals, ring: bool) -> Model {
        let source = PackSource::open(&self.pack).unwrap();
        let least = StreamPlan::new(source.index(), u64::MAX, None, globals).unwrap().minimum_bytes;
        let options = StreamOptions { budget: ring.then_some(least), globals, ..StreamOptions::default() };
        let model = Model::new(&self.gpu, source, self.length, &options).unwrap();
        assert_eq!(model.plan().resident, !ring);
        model
    }

    pub fn memory(&self, rows: usize) -> Memory {
        self.memory_keeping(rows, [0, 0])
    }

    /// The last `kept` layers keep their activations, and the first `offloaded` residual streams
    /// are in host memory.
    pub fn memory_keeping(&self, rows: usize, kept: [u32; 2]) -> Memory {
        self.memory_of_windows(rows, kept, WINDOW)
    }

    /// As [`Fixture::memory_keeping`], with windows of this many tokens.
    pub fn memory_of_windows(&self, rows: usize, [kept, offloaded]: [u32; 2], window: u32) -> Memory {
        Memory::new(&self.gpu, &self.config, Sizes { kept, offloaded, window, ..self.sizes(rows) }).unwrap()
    }

    /// For training, with everything computed again and nothing offloaded.
    pub fn sizes(&self, rows: usize) -> Sizes {
        let tokens = rows as u32 * self.length;
        Sizes {
            tokens,
            rank: self.rank,
            dropout: true,
            training: true,
            kept: 0,
            offloaded: 0,
            halves: self.is_mixed(),
            window: WINDOW,
            chunk: chunk(&self.config, tokens),
        }
    }

    pub fn adapter(&self, name: &str) -> Adapter {
        Adapter::read(&self.folder.join(name), &self.config).unwrap()
    }

    pub fn session(&self, adapter: Option<&Adapter>, ring: bool) -> Session {
        let adapter = adapter.map(|a| GpuAdapter::new(&self.gpu, &a.config, &a.layout, &a.vector, false).unwrap());
        Session { model: self.model(ring), adapter, memory: self.memory(3) }
    }

    pub fn trainer(&self, adapter: &Adapter, ring: bool, rows: usize) -> Trainer {
        self.trainer_of(adapter, self.model(ring), self.memory(rows))
    }

    /// With the model and the memory of a session: another model takes seconds on a software
    /// driver.
    pub fn trainer_of(&self, adapter: &Adapter, model: Model, memory: Memory) -> Trainer {
        let on_gpu = GpuAdapter::new(&self.gpu, &adapter.config, &adapter.layout, &adapter.vector, true).unwrap();
        let hyperparameters = Hyperparameters { weight_decay: 0.01, clip: Some(1.0), ..Hyperparameters::default() };
        Trainer::new(model, on_gpu, memory, hyperparameters).unwrap()
    }
}

/// The norm of the difference over the norm of what is expected.
pub fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |x: f64| x * x;
    let difference: f64 = found.iter().zip(expected).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = expected.iter().map(|&b| square(b.into())).sum();
    (difference / norm).sqrt()
}

/// Compares every number with the expected one, within 2e-4.
#[track_caller]
pub fn assert_near(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        // NaN is not near anything.
        assert!((found - expected).abs() <= 2e-4, "{what}: element {i} is {found}, expected {expected}");
    }
}

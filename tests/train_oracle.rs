//! The model and its training step against transformers, PEFT and bitsandbytes in float32 on tiny-qwen3: fixtures/oracle, whose
//! weights are those of a pack with absmax scales in float32, bit for bit.
#![cfg(all(feature = "train", feature = "convert"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "common/gpu.rs"]
mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use half::bf16;
use nf4pack::convert::{self, encode::Encoder};
use nf4pack::dequant::stream::{PackSource, StreamOptions, StreamPlan};
use nf4pack::format::Role;
use nf4pack::format::nf4::ScaleType;
use nf4pack::gpu::Gpu;
use nf4pack::train::adapter::Adapter;
use nf4pack::train::config::ModelConfig;
use nf4pack::train::data::{Batch, UNTRAINED};
use nf4pack::train::gpu_adapter::GpuAdapter;
use nf4pack::train::lora::{LoraConfig, TARGETS};
use nf4pack::train::model::{Model, read_config};
use nf4pack::train::session::Session;
use nf4pack::train::step::StepResult;
use nf4pack::train::trainer::{Hyperparameters, Trainer};
use nf4pack::train::workspace::{Memory, Sizes};
use safetensors::SafeTensors;
use serde_json::Value;

const LENGTH: usize = 48;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

fn floats(file: &str) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(fixture("oracle").join(file)).unwrap();
    let decode = |data: &[u8]| data.as_chunks::<4>().0.iter().map(|&b| f32::from_le_bytes(b)).collect();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors.iter().map(|(name, view)| (name.to_owned(), decode(view.data()))).collect()
}

fn oracle() -> Value {
    serde_json::from_slice(&std::fs::read(fixture("oracle/oracle.json")).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect()
}

/// Rows of the oracle's batch as a batch of ours: their labels stand at the token itself, ours at the one before.
fn batch(oracle: &Value, number: usize, rows: &[usize]) -> Batch {
    let mut batch =
        Batch { rows: rows.len() as u32, tokens: Vec::new(), labels: Vec::new(), starts: Vec::new(), trained: 0 };
    for (i, &row) in rows.iter().enumerate() {
        let labels = numbers(&oracle["labels"][number][row]);
        batch.tokens.extend(numbers(&oracle["batches"][number][row]).iter().map(|&id| id as u32));
        let shifted = labels.iter().skip(1).chain([&-100.0]).map(|&n| if n < 0.0 { UNTRAINED } else { n as u32 });
        batch.labels.extend(shifted);
        batch.starts.extend([(i * LENGTH) as u32; LENGTH]);
    }
    batch.trained = batch.labels.iter().filter(|&&label| label != UNTRAINED).count() as u64;
    batch
}

/// tiny-qwen3 with the oracle's weights.
struct Fixture {
    gpu: Gpu,
    pack: PathBuf,
    config: ModelConfig,
    _folder: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Option<Self> {
        let gpu = common::gpu()?;
        let folder = tempfile::tempdir().unwrap();
        let pack = folder.path().join("tiny.nf4pack");
        let options =
            convert::Options { encoder: Encoder::Absmax, scale_type: ScaleType::F32, ..convert::Options::default() };
        convert::convert(&fixture("tiny-qwen3"), &pack, options, &()).unwrap();
        let config = read_config(&PackSource::open(&pack, true).unwrap()).unwrap();
        Some(Self { gpu, pack, config, _folder: folder })
    }

    fn model(&self, ring: bool) -> Model {
        let source = PackSource::open(&self.pack, true).unwrap();
        let least = StreamPlan::new(source.index(), u64::MAX, None, true).unwrap().minimum_bytes;
        let options = StreamOptions { budget: ring.then_some(least), ..StreamOptions::default() };
        let model = Model::new(&self.gpu, source, LENGTH as u32, &options).unwrap();
        assert_eq!(model.plan().resident, !ring);
        model
    }

    fn memory(&self, rows: usize) -> Memory {
        let sizes = Sizes { tokens: (rows * LENGTH) as u32, rank: 8, dropout: true, training: true };
        Memory::new(&self.gpu, &self.config, sizes).unwrap()
    }

    fn adapter(&self, name: &str) -> Adapter {
        Adapter::read(&fixture("oracle").join(name), &self.config).unwrap()
    }

    fn session(&self, adapter: Option<&Adapter>, ring: bool) -> Session {
        let adapter = adapter.map(|a| GpuAdapter::new(&self.gpu, &a.config, &a.layout, &a.vector, false).unwrap());
        Session { model: self.model(ring), adapter, memory: self.memory(2) }
    }

    fn trainer(&self, adapter: &Adapter, ring: bool, rows: usize) -> Trainer {
        let on_gpu = GpuAdapter::new(&self.gpu, &adapter.config, &adapter.layout, &adapter.vector, true).unwrap();
        let hyperparameters = Hyperparameters { weight_decay: 0.01, clip: Some(1.0), ..Hyperparameters::default() };
        Trainer::new(self.model(ring), on_gpu, self.memory(rows), hyperparameters).unwrap()
    }
}

fn most(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().all(|x| x.is_finite()), "not all are finite");
    found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn relative(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let square = |x: f64| x * x;
    let difference: f64 = found.iter().zip(expected).map(|(&a, &b)| square(f64::from(a) - f64::from(b))).sum();
    let norm: f64 = expected.iter().map(|&b| square(b.into())).sum();
    (difference / norm).sqrt()
}

/// The final norm of tiny-qwen3, in float64.
fn final_norm(config: &ModelConfig, x: &[f32]) -> Vec<f32> {
    let bytes = std::fs::read(fixture("tiny-qwen3/model.safetensors")).unwrap();
    let weights = SafeTensors::deserialize(&bytes).unwrap();
    let gamma = weights.tensor("model.norm.weight").unwrap().data().as_chunks::<2>().0;
    let gamma: Vec<f64> = gamma.iter().map(|&b| bf16::from_le_bytes(b).to_f64()).collect();
    let norm = |row: &[f32]| {
        let square = row.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / row.len() as f64;
        let scale = 1.0 / (square + config.rms_norm_eps).sqrt();
        row.iter().zip(&gamma).map(|(&x, gamma)| (f64::from(x) * scale * gamma) as f32).collect::<Vec<_>>()
    };
    x.chunks(gamma.len()).flat_map(norm).collect()
}

/// Both rows of the oracle's first batch.
fn first_rows(oracle: &Value) -> [Vec<u32>; 2] {
    [0, 1].map(|row| numbers(&oracle["batches"][0][row]).iter().map(|&id| id as u32).collect())
}

#[test]
fn hidden_states_and_logits_are_those_of_transformers() {
    let Some(fixture) = Fixture::new() else { return };
    let (oracle, expected) = (oracle(), floats("forward_no_lora.safetensors"));
    let hidden = fixture.config.hidden as usize;
    let mut session = fixture.session(None, false);
    for (row, tokens) in first_rows(&oracle).iter().enumerate() {
        let states = session.hidden_states(tokens).unwrap();
        assert_eq!(states.len(), fixture.config.layers as usize + 1);
        for (number, state) in states.iter().enumerate() {
            // transformers has the last one after the final norm.
            let last = number == fixture.config.layers as usize;
            let state = if last { &final_norm(&fixture.config, state) } else { state };
            let all = &expected[&format!("hidden.{number}")];
            let difference = most(state, &all[row * LENGTH * hidden..][..LENGTH * hidden]);
            assert!(difference <= 2e-4, "row {row}, hidden state {number}: {difference}");
        }
        let vocab = fixture.config.vocab as usize;
        let logits = session.logits(tokens).unwrap();
        let difference = most(&logits, &expected["logits"][row * LENGTH * vocab..][..LENGTH * vocab]);
        assert!(difference <= 2e-4, "row {row}, logits: {difference}");
    }
    let loss = session.loss(&batch(&oracle, 0, &[0, 1])).unwrap();
    assert!((loss - expected["loss"][0]).abs() <= 1e-4, "{loss}, expected {}", expected["loss"][0]);
}

#[test]
fn logits_with_an_adapter_are_those_of_peft() {
    let Some(fixture) = Fixture::new() else { return };
    let expected = &floats("forward_lora_init.safetensors")["logits"];
    let mut session = fixture.session(Some(&fixture.adapter("adapter_init")), false);
    let vocab = fixture.config.vocab as usize;
    for (row, tokens) in first_rows(&oracle()).iter().enumerate() {
        let difference = most(&session.logits(tokens).unwrap(), &expected[row * LENGTH * vocab..][..LENGTH * vocab]);
        assert!(difference <= 2e-4, "row {row}: {difference}");
    }
}

#[test]
fn an_adapter_whose_b_is_zero_changes_no_bit() {
    let Some(fixture) = Fixture::new() else { return };
    let config = fixture.adapter("adapter_init").config;
    let fresh = Adapter::new(config, None, &fixture.config, 7).unwrap();
    assert!(fresh.vector.iter().any(|&x| x != 0.0));
    let tokens = &first_rows(&oracle())[0];
    let with = fixture.session(Some(&fresh), false).logits(tokens).unwrap();
    let without = fixture.session(None, false).logits(tokens).unwrap();
    assert!(with.iter().zip(&without).all(|(a, b)| a == b), "{}", most(&with, &without));
}

#[test]
fn the_gradients_of_the_first_step_are_those_of_peft() {
    let Some(fixture) = Fixture::new() else { return };
    let (oracle, expected) = (oracle(), floats("grads_step0.safetensors"));
    let adapter = fixture.adapter("adapter_init");
    let mut trainer = fixture.trainer(&adapter, false, 2);
    let result = trainer.step(&[batch(&oracle, 0, &[0, 1])], 1e-3).unwrap();
    let norm = oracle["grad_norms_before_clip"][0].as_f64().unwrap();
    assert!((f64::from(result.grad_norm) / norm - 1.0).abs() <= 1e-3, "{}, expected {norm}", result.grad_norm);
    let gradient = trainer.gradient().unwrap();
    let mut compared = 0;
    for (layer, role, place) in adapter.layout.places() {
        let block = if [Role::GateProj, Role::UpProj, Role::DownProj].contains(&role) { "mlp" } else { "self_attn" };
        for (matrix, range) in [("A", place.a), ("B", place.b)] {
            let name = format!("base_model.model.model.layers.{layer}.{block}.{role}.lora_{matrix}.weight");
            let found = &gradient[range];
            assert!(found.iter().any(|&g| g != 0.0), "{name} has no gradient");
            let error = relative(found, &expected[&name]);
            assert!(error <= 1e-3, "{name}: {error}");
            compared += 1;
        }
    }
    assert_eq!(compared, expected.len());
}

/// The oracle's first steps.
fn train(fixture: &Fixture, ring: bool, steps: usize) -> (Vec<StepResult>, Vec<f32>) {
    let oracle = oracle();
    let mut trainer = fixture.trainer(&fixture.adapter("adapter_init"), ring, 2);
    let steps = (0..steps).map(|step| trainer.step(&[batch(&oracle, step % 4, &[0, 1])], 1e-3).unwrap()).collect();
    let [parameters, ..] = trainer.read().unwrap();
    (steps, parameters)
}

#[test]
fn twenty_steps_have_the_losses_and_the_adapter_of_peft() {
    let Some(fixture) = Fixture::new() else { return };
    let oracle = oracle();
    let (steps, parameters) = train(&fixture, false, 20);
    let (losses, norms) = (numbers(&oracle["losses"]), numbers(&oracle["grad_norms_before_clip"]));
    assert_eq!(losses.len(), steps.len());
    for (step, ((found, loss), norm)) in steps.iter().zip(losses).zip(norms).enumerate() {
        assert!((f64::from(found.loss) - loss).abs() <= 1e-3, "step {step}: loss {}, expected {loss}", found.loss);
        assert!((f64::from(found.grad_norm) / norm - 1.0).abs() <= 1e-2, "step {step}: norm {}", found.grad_norm);
    }
    let last = fixture.adapter("adapter_final");
    for (layer, role, place) in last.layout.places() {
        for range in [place.a, place.b] {
            let error = relative(&parameters[range.clone()], &last.vector[range]);
            assert!(error <= 1e-2, "layer {layer}, {role}: {error}");
        }
    }
}

#[test]
fn a_ring_of_two_layers_changes_no_bit() {
    let Some(fixture) = Fixture::new() else { return };
    let (resident, parameters) = train(&fixture, false, 2);
    let (through_ring, of_ring) = train(&fixture, true, 2);
    assert_eq!(through_ring, resident);
    assert!(of_ring.iter().zip(&parameters).all(|(a, b)| a.to_bits() == b.to_bits()));
}

#[test]
fn accumulated_micro_batches_are_one_batch() {
    let Some(fixture) = Fixture::new() else { return };
    let oracle = oracle();
    let adapter = fixture.adapter("adapter_init");
    let gradient = |batches: &[Batch], rows| {
        let mut trainer = fixture.trainer(&adapter, false, rows);
        let result = trainer.step(batches, 1e-3).unwrap();
        (result, trainer.gradient().unwrap())
    };
    // Different numbers of trained tokens in each, so that a mean of means would be wrong.
    let rows = [(0, 0), (0, 1), (1, 0), (1, 1)];
    let mut one = batch(&oracle, 0, &[0, 1]);
    let other = batch(&oracle, 1, &[0, 1]);
    one.rows += 2;
    one.starts.extend(other.starts.iter().map(|start| start + 2 * LENGTH as u32));
    one.tokens.extend(other.tokens);
    one.labels.extend(other.labels);
    one.trained += other.trained;
    let (whole, expected) = gradient(&[one], 4);
    let parts: Vec<Batch> = rows.iter().map(|&(number, row)| batch(&oracle, number, &[row])).collect();
    let (accumulated, found) = gradient(&parts, 1);
    assert!((whole.loss - accumulated.loss).abs() <= 1e-5, "{} and {}", whole.loss, accumulated.loss);
    let error = relative(&found, &expected);
    assert!(error <= 1e-5, "{error}");
}

/// The oracle drops nothing: here the loss itself says what the gradient is, with dropped inputs, and at a rank that is no power of two.
#[test]
fn gradients_with_dropped_inputs_are_those_of_finite_differences() {
    let Some(fixture) = Fixture::new() else { return };
    let batch = batch(&oracle(), 0, &[0]);
    let dropout = |p| LoraConfig { rank: 5, dropout: p, ..fixture.adapter("adapter_init").config };
    let mut adapter = Adapter::new(dropout(0.3), None, &fixture.config, 3).unwrap();
    // Where B is zero, A has no gradient.
    let last = fixture.adapter("adapter_final");
    for (layer, role, place) in adapter.layout.places().collect::<Vec<_>>() {
        let trained = &last.vector[last.layout.place(layer, role).unwrap().b];
        adapter.vector[place.b].iter_mut().zip(trained).for_each(|(b, &trained)| *b = 3.0 * trained);
    }
    let step = |adapter: &Adapter| {
        let mut trainer = fixture.trainer(adapter, false, 1);
        let loss = trainer.step(std::slice::from_ref(&batch), 0.0).unwrap().loss;
        (f64::from(loss), trainer.gradient().unwrap())
    };
    let (loss, gradient) = step(&adapter);
    let (undropped, _) = step(&Adapter { config: dropout(0.0), ..adapter.clone() });
    assert!((loss - undropped).abs() > 1e-3, "inputs are dropped: {loss} and {undropped}");
    for role in TARGETS {
        // Along the gradient of one projection, in all layers: the loss changes by its norm.
        let mut direction = vec![0.0; gradient.len()];
        for (_, _, place) in adapter.layout.places().filter(|(_, found, _)| *found == role) {
            for range in [place.a, place.b] {
                direction[range.clone()].copy_from_slice(&gradient[range]);
            }
        }
        let norm = direction.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let moved = |length: f64| {
            let by = (length / norm) as f32;
            let vector = adapter.vector.iter().zip(&direction).map(|(x, d)| x + by * d).collect();
            step(&Adapter { vector, ..adapter.clone() }).0
        };
        let length = 0.004;
        let slope = (moved(length) - moved(-length)) / (2.0 * length);
        assert!((slope / norm - 1.0).abs() <= 1e-2, "{role}: {slope} by differences, {norm} by the gradient");
    }
}

#[test]
fn a_gradient_that_is_not_finite_names_its_layer() {
    let Some(fixture) = Fixture::new() else { return };
    let mut adapter = fixture.adapter("adapter_init");
    let place = adapter.layout.place(1, Role::VProj).unwrap();
    // Nothing times something huge, forward; something huge, backward.
    adapter.vector[place.a].fill(0.0);
    adapter.vector[place.b].fill(3e38);
    let error = fixture.trainer(&adapter, false, 1).step(&[batch(&oracle(), 0, &[0])], 1e-3).unwrap_err().to_string();
    assert!(error.starts_with("step 1: the norm of the gradient is not finite; "), "{error}");
    assert!(error.ends_with("it arose first in the gradients of layer 1"), "{error}");
}

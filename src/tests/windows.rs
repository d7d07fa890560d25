//! Passes in several windows of tokens, against the same passes in one.

use super::{Fixture, fixture, in_each_precision, relative};
use crate::data::pack::{Batch, IGNORE_INDEX};
use crate::gpu::Gpu;
use crate::lora::Adapter;
use crate::lora::config::LoraConfig;
use crate::model::Session;
use crate::model::workspace::{Memory, WINDOW};
use crate::ops::testing::random;
use crate::train::step::StepResult;

/// Samples that begin and end within windows, before and after them.
const SAMPLES: [u32; 3] = [150, 1, 40];
const LENGTH: usize = 191;
const RANK: u32 = 4;
/// Norms of heads, or none; windows of attention; norms of outputs; factors; layers without
/// rotation.
const MODELS: [&str; 5] = ["llama", "qwen3_windows", "gemma3", "granite", "smollm3_windows"];

fn model(gpu: Gpu, name: &str) -> Fixture {
    let folder = fixture("architectures").join(name);
    Fixture::new(gpu, &folder, folder.clone(), LENGTH, RANK)
}

fn batch(vocab: u32) -> Batch {
    let mut batch = Batch { rows: 1, tokens: Vec::new(), labels: Vec::new(), starts: Vec::new(), loss_tokens: 0 };
    for length in SAMPLES {
        let start = batch.tokens.len() as u32;
        let uniform = random(u64::from(start), length as usize).into_iter();
        let tokens: Vec<u32> = uniform.map(|x| ((x + 1.0) / 2.0 * vocab as f32) as u32 % vocab).collect();
        batch.labels.extend(tokens.iter().skip(1).copied().chain([IGNORE_INDEX]));
        batch.starts.extend(tokens.iter().map(|_| start));
        batch.tokens.extend(tokens);
    }
    batch.loss_tokens = batch.labels.iter().filter(|&&label| label != IGNORE_INDEX).count() as u64;
    batch
}

/// A step, its gradient, and the logits before it.
fn step(model: &Fixture, adapter: &Adapter, memory: Memory) -> (StepResult, Vec<f32>, Vec<f32>) {
    let batch = batch(model.config.vocab);
    let mut trainer = model.trainer_of(adapter, model.model(false), memory);
    let result = trainer.step(std::slice::from_ref(&batch), 1e-3).unwrap();
    let gradient = trainer.gradient().unwrap();
    let sample: Vec<u32> = batch.tokens.into_iter().take(SAMPLES[0] as usize).collect();
    let logits = trainer.session().logits(&sample).unwrap();
    (result, gradient, logits)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// The order of sums over tokens changes, and nothing beyond that. What is kept or in host memory
/// changes no bit.
#[test]
fn windows_of_tokens_give_the_same_results_in_every_architecture() {
    in_each_precision(|gpu| {
        for name in MODELS {
            let model = model(gpu.clone(), name);
            let adapter = model.adapter("adapter");
            let of = |kept, window| step(&model, &adapter, model.memory_of_windows(1, kept, window));
            let (whole, expected, expected_logits) = of([0, 0], WINDOW);
            for window in [64, 128] {
                let what = format!("{name} in windows of {window}");
                let (found, gradient, logits) = of([0, 0], window);
                model.assert_loss(&what, found.loss.into(), whole.loss.into(), 1e-5);
                let error = relative(&gradient, &expected);
                assert!(error <= model.bound(1e-5, "gradients"), "{what}: {error}");
                model.assert_near(&what, &logits, &expected_logits);
                let layers = model.config.layers;
                for kept in [[layers, 0], [1, layers - 1]] {
                    let (again, same, _) = of(kept, window);
                    assert_eq!(again, found, "{what}: {kept:?}");
                    assert!(bits(&same) == bits(&gradient), "{what}: {kept:?}");
                }
            }
        }
    });
}

/// Each window drops other inputs: the same ones forward, in the recomputation and backward.
#[test]
fn gradients_with_dropped_inputs_of_windows_are_those_of_finite_differences() {
    in_each_precision(|gpu| {
        let model = model(gpu, "qwen3_windows");
        let mut adapter = model.adapter("adapter");
        adapter.config = LoraConfig { dropout: 0.3, ..adapter.config };
        let memory = || model.memory_of_windows(1, [0, 0], 64);
        let (found, gradient, _) = step(&model, &adapter, memory());
        let (kept, same, _) = step(&model, &adapter, model.memory_of_windows(1, [model.config.layers, 0], 64));
        assert_eq!(kept, found);
        assert!(bits(&same) == bits(&gradient));
        let norm = gradient.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
        let length = 0.004;
        let moved = |length: f64| {
            let by = (length / norm) as f32;
            let vector = adapter.vector.iter().zip(&gradient).map(|(x, d)| x + by * d).collect();
            f64::from(step(&model, &Adapter { vector, ..adapter.clone() }, memory()).0.loss)
        };
        let slope = (moved(length) - moved(-length)) / (2.0 * length);
        let error = (slope / norm - 1.0).abs();
        assert!(error <= model.bound(1e-2, "gradients"), "{slope} by differences, {norm} by the gradient");
    });
}

/// A pass of fewer tokens than the memory has, of one window, after one of several.
#[test]
fn shorter_passes_use_the_first_windows() {
    in_each_precision(|gpu| {
        let model = model(gpu, "llama");
        let tokens: Vec<u32> = batch(model.config.vocab).tokens;
        let session = |window| Session {
            model: model.model(false),
            adapter: None,
            memory: model.memory_of_windows(1, [0, 0], window),
        };
        let (mut windows, mut whole) = (session(64), session(WINDOW));
        for length in [150, 64, 65, 10] {
            let (found, expected) = (windows.logits(&tokens[..length]), whole.logits(&tokens[..length]));
            model.assert_near(&format!("{length} tokens"), &found.unwrap(), &expected.unwrap());
        }
    });
}

//! Tests the model and its training step against transformers, PEFT and bitsandbytes in float32 on
//! tiny-qwen3. The weights of fixtures/oracle equal those of a pack with absmax scales in float32,
//! bit for bit.

use std::collections::BTreeMap;

use super::{Fixture, fixture, in_each_precision, json, numbers, relative};
use crate::arch::ModelConfig;
use crate::arch::family::PROJECTIONS;
use crate::data::Tokenizer;
use crate::data::pack::{Batch, IGNORE_INDEX};
use crate::data::sample::Sample;
use crate::dequant::stream::PackSource;
use crate::format::Role;
use crate::lora::Adapter;
use crate::lora::config::LoraConfig;
use crate::model::text::{Sampler, SamplerOptions};
use crate::model::workspace::Memory;
use crate::model::{GenerateError, MemoryPlan, ModelError, NonFiniteAt, Session, TextGenerator};
use crate::train::step::StepResult;
use half::bf16;
use safetensors::SafeTensors;
use serde_json::Value;

pub(super) const LENGTH: usize = 48;

fn floats(file: &str) -> BTreeMap<String, Vec<f32>> {
    super::floats(&fixture("oracle").join(file))
}

pub(super) fn oracle() -> Value {
    json(&fixture("oracle/oracle.json"))
}

/// Rows of a batch of the oracle.
pub(super) fn batch(oracle: &Value, number: usize, rows: &[usize]) -> Batch {
    super::batch(rows.iter().map(|&row| [&oracle["batches"][number][row], &oracle["labels"][number][row]]))
}

/// Runs a test of tiny-qwen3 with the weights of the oracle, in each precision.
fn of_tiny_qwen3(test: impl Fn(&Fixture)) {
    in_each_precision(|gpu| test(&Fixture::new(gpu, &fixture("tiny-qwen3"), fixture("oracle"), LENGTH, 8)));
}

/// The final norm of tiny-qwen3 in float64.
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

/// Both rows of the first batch of the oracle.
pub(super) fn first_rows(oracle: &Value) -> [Vec<u32>; 2] {
    [0, 1].map(|row| super::tokens(&oracle["batches"][0][row]))
}

#[test]
fn hidden_states_and_logits_are_those_of_transformers() {
    of_tiny_qwen3(|fixture| {
        let (oracle, expected) = (oracle(), floats("forward_no_lora.safetensors"));
        let hidden = fixture.config.hidden as usize;
        let mut session = fixture.session(None, false);
        for (row, tokens) in first_rows(&oracle).iter().enumerate() {
            let states = session.hidden_states(tokens).unwrap();
            assert_eq!(states.len(), fixture.config.layers as usize + 1);
            for (number, state) in states.iter().enumerate() {
                // transformers returns the last hidden state after the final norm.
                let last = number == fixture.config.layers as usize;
                let state = if last { &final_norm(&fixture.config, state) } else { state };
                let all = &expected[&format!("hidden.{number}")];
                fixture.assert_near(
                    &format!("row {row}, hidden state {number}"),
                    state,
                    &all[row * LENGTH * hidden..][..LENGTH * hidden],
                );
            }
            let vocab = fixture.config.vocab as usize;
            let logits = session.logits(tokens).unwrap();
            fixture.assert_near(
                &format!("row {row}, logits"),
                &logits,
                &expected["logits"][row * LENGTH * vocab..][..LENGTH * vocab],
            );
        }
        let loss = session.loss(&batch(&oracle, 0, &[0, 1])).unwrap();
        fixture.assert_loss("loss", loss.into(), expected["loss"][0].into(), 1e-4);
    });
}

#[test]
fn logits_with_an_adapter_are_those_of_peft() {
    of_tiny_qwen3(|fixture| {
        let expected = &floats("forward_lora_init.safetensors")["logits"];
        let mut session = fixture.session(Some(&fixture.adapter("adapter_init")), false);
        let vocab = fixture.config.vocab as usize;
        for (row, tokens) in first_rows(&oracle()).iter().enumerate() {
            let logits = session.logits(tokens).unwrap();
            fixture.assert_near(&format!("row {row}"), &logits, &expected[row * LENGTH * vocab..][..LENGTH * vocab]);
        }
    });
}

#[test]
fn an_adapter_whose_b_is_zero_changes_no_bit() {
    of_tiny_qwen3(|fixture| {
        let config = fixture.adapter("adapter_init").config;
        let fresh = Adapter::new(config, None, &fixture.config, 7).unwrap();
        assert!(fresh.vector.iter().any(|&x| x != 0.0));
        let tokens = &first_rows(&oracle())[0];
        let with = fixture.session(Some(&fresh), false).logits(tokens).unwrap();
        let without = fixture.session(None, false).logits(tokens).unwrap();
        assert!(with.iter().zip(&without).all(|(a, b)| a == b));
    });
}

#[test]
fn the_gradients_of_the_first_step_are_those_of_peft() {
    of_tiny_qwen3(|fixture| {
        let (oracle, expected) = (oracle(), floats("grads_step0.safetensors"));
        let adapter = fixture.adapter("adapter_init");
        let mut trainer = fixture.trainer(&adapter, false, 2);
        let result = trainer.step(&[batch(&oracle, 0, &[0, 1])], 1e-3).unwrap();
        let norm = oracle["grad_norms_before_clip"][0].as_f64().unwrap();
        let bound = fixture.bound(1e-3, "gradients");
        assert!((f64::from(result.grad_norm) / norm - 1.0).abs() <= bound, "{}, expected {norm}", result.grad_norm);
        let gradient = trainer.gradient().unwrap();
        fixture.assert_gradients(&adapter.layout, &gradient, &expected, 1e-3);
    });
}

/// The first steps of the oracle.
fn train(fixture: &Fixture, ring: bool, steps: usize) -> (Vec<StepResult>, Vec<f32>) {
    train_keeping(fixture, ring, steps, [0, 0])
}

/// As [`train`]; some layers keep their activations, and some residual streams are offloaded.
fn train_keeping(fixture: &Fixture, ring: bool, steps: usize, kept: [u32; 2]) -> (Vec<StepResult>, Vec<f32>) {
    let oracle = oracle();
    let memory = fixture.memory_keeping(2, kept);
    let mut trainer = fixture.trainer_of(&fixture.adapter("adapter_init"), fixture.model(ring), memory);
    let steps = (0..steps).map(|step| trainer.step(&[batch(&oracle, step % 4, &[0, 1])], 1e-3).unwrap()).collect();
    let [parameters, ..] = trainer.read().unwrap();
    (steps, parameters)
}

#[test]
fn twenty_steps_have_the_losses_and_the_adapter_of_peft() {
    of_tiny_qwen3(|fixture| {
        let oracle = oracle();
        let (steps, parameters) = train(fixture, false, 20);
        let (losses, norms) = (numbers(&oracle["losses"]), numbers(&oracle["grad_norms_before_clip"]));
        assert_eq!(losses.len(), steps.len());
        for (step, ((found, loss), norm)) in steps.iter().zip(losses).zip(norms).enumerate() {
            fixture.assert_loss(&format!("step {step}: loss"), found.loss.into(), loss, 1e-3);
            let bound = fixture.bound(1e-2, "gradients");
            assert!((f64::from(found.grad_norm) / norm - 1.0).abs() <= bound, "step {step}: norm {}", found.grad_norm);
        }
        let last = fixture.adapter("adapter_final");
        for (layer, role, place) in last.layout.places() {
            for range in [place.a, place.b] {
                let error = relative(&parameters[range.clone()], &last.vector[range]);
                assert!(error <= fixture.bound(1e-2, "adapter"), "layer {layer}, {role}: {error}");
            }
        }
    });
}

#[test]
fn a_ring_of_two_layers_changes_no_bit() {
    of_tiny_qwen3(|fixture| {
        let (resident, parameters) = train(fixture, false, 2);
        let (through_ring, of_ring) = train(fixture, true, 2);
        assert_eq!(through_ring, resident);
        assert!(of_ring.iter().zip(&parameters).all(|(a, b)| a.to_bits() == b.to_bits()));
    });
}

#[test]
fn kept_activations_change_no_bit() {
    of_tiny_qwen3(|fixture| {
        let layers = fixture.config.layers;
        assert!(layers > 2);
        // The second step begins with what the first one wrote.
        let (computed_again, parameters) = train(fixture, false, 2);
        let most = layers - 2;
        for (ring, kept) in [(false, [1, 0]), (false, [layers, 0]), (true, [1, 0]), (false, [0, most]), (true, [1, most])] {
            if kept[1] > 0 && !fixture.gpu.has_host_buffers() {
                continue;
            }
            let (steps, found) = train_keeping(fixture, ring, 2, kept);
            assert_eq!(steps, computed_again, "{kept:?} of {layers} layers kept and offloaded");
            assert!(found.iter().zip(&parameters).all(|(a, b)| a.to_bits() == b.to_bits()), "{kept:?} of {layers} layers");
        }
    });
}

/// Windows of the feed-forward block change the order of sums, and no results beyond that. Kept
/// activations change no bit of them, either.
#[test]
fn windows_of_tokens_give_the_same_gradients() {
    of_tiny_qwen3(|fixture| {
        let (oracle, adapter) = (oracle(), fixture.adapter("adapter_init"));
        let step = |memory: Memory| {
            let mut trainer = fixture.trainer_of(&adapter, fixture.model(false), memory);
            let result = trainer.step(&[batch(&oracle, 0, &[0, 1])], 1e-3).unwrap();
            (result, trainer.gradient().unwrap())
        };
        let (whole, expected) = step(fixture.memory(2));
        // Of 96 tokens.
        let (windows, found) = step(fixture.memory_of_windows(2, [0, 0], 64));
        // In mixed precision, the products of few tokens are in float32.
        fixture.assert_loss("windows", windows.loss.into(), whole.loss.into(), 1e-5);
        let error = relative(&found, &expected);
        assert!(error <= fixture.bound(1e-5, "gradients"), "{error}");
        let (kept, again) = step(fixture.memory_of_windows(2, [2, 0], 64));
        assert_eq!(kept, windows);
        assert!(again.iter().zip(&found).all(|(a, b)| a.to_bits() == b.to_bits()));
    });
}

#[test]
fn accumulated_micro_batches_are_one_batch() {
    of_tiny_qwen3(|fixture| {
        let oracle = oracle();
        let adapter = fixture.adapter("adapter_init");
        let gradient = |batches: &[Batch], rows| {
            let mut trainer = fixture.trainer(&adapter, false, rows);
            let result = trainer.step(batches, 1e-3).unwrap();
            (result, trainer.gradient().unwrap())
        };
        // Each has a different number of labels, so a mean of means would be wrong.
        let rows = [(0, 0), (0, 1), (1, 0), (1, 1)];
        let mut one = batch(&oracle, 0, &[0, 1]);
        let other = batch(&oracle, 1, &[0, 1]);
        one.rows += 2;
        one.starts.extend(other.starts.iter().map(|start| start + 2 * LENGTH as u32));
        one.tokens.extend(other.tokens);
        one.labels.extend(other.labels);
        one.loss_tokens += other.loss_tokens;
        let (whole, expected) = gradient(&[one], 4);
        let parts: Vec<Batch> = rows.iter().map(|&(number, row)| batch(&oracle, number, &[row])).collect();
        let (accumulated, found) = gradient(&parts, 1);
        fixture.assert_loss("accumulated", accumulated.loss.into(), whole.loss.into(), 1e-5);
        let error = relative(&found, &expected);
        assert!(error <= fixture.bound(1e-5, "gradients"), "{error}");
    });
}

/// The oracle has no dropout. This test checks gradients with dropout against differences of the
/// loss, at a rank that is not a power of two.
#[test]
fn gradients_with_dropped_inputs_are_those_of_finite_differences() {
    of_tiny_qwen3(|fixture| {
        let mut batch = batch(&oracle(), 0, &[0]);
        // Half of the row is enough.
        [&mut batch.tokens, &mut batch.labels, &mut batch.starts].into_iter().for_each(|row| row.truncate(LENGTH / 2));
        batch.loss_tokens = batch.labels.iter().filter(|&&label| label != IGNORE_INDEX).count() as u64;
        let dropout = |p| LoraConfig { rank: 5, dropout: p, ..fixture.adapter("adapter_init").config };
        let mut adapter = Adapter::new(dropout(0.3), None, &fixture.config, 3).unwrap();
        // If B is zero, A has no gradient.
        let last = fixture.adapter("adapter_final");
        for (layer, role, place) in adapter.layout.places().collect::<Vec<_>>() {
            let trained = &last.vector[last.layout.place(layer, role).unwrap().b];
            adapter.vector[place.b].iter_mut().zip(trained).for_each(|(b, &trained)| *b = 3.0 * trained);
        }
        let mut parts = Some((fixture.model(false), fixture.memory(1)));
        let mut step = |adapter: &Adapter| {
            let (model, memory) = parts.take().unwrap();
            let mut trainer = fixture.trainer_of(adapter, model, memory);
            let loss = trainer.step(std::slice::from_ref(&batch), 0.0).unwrap().loss;
            let gradient = trainer.gradient().unwrap();
            let Session { model, memory, .. } = trainer.into_session();
            parts = Some((model, memory));
            (f64::from(loss), gradient)
        };
        let (loss, gradient) = step(&adapter);
        let (undropped, _) = step(&Adapter { config: dropout(0.0), ..adapter.clone() });
        assert!((loss - undropped).abs() > 1e-3, "inputs are dropped: {loss} and {undropped}");
        for role in PROJECTIONS {
            // Along the gradient of one projection in all layers, the slope of the loss is the norm
            // of the gradient.
            let mut direction = vec![0.0; gradient.len()];
            for (_, _, place) in adapter.layout.places().filter(|(_, found, _)| *found == role) {
                for range in [place.a, place.b] {
                    direction[range.clone()].copy_from_slice(&gradient[range]);
                }
            }
            let norm = direction.iter().map(|&g| f64::from(g).powi(2)).sum::<f64>().sqrt();
            let mut moved = |length: f64| {
                let by = (length / norm) as f32;
                let vector = adapter.vector.iter().zip(&direction).map(|(x, d)| x + by * d).collect();
                step(&Adapter { vector, ..adapter.clone() }).0
            };
            let length = 0.004;
            let slope = (moved(length) - moved(-length)) / (2.0 * length);
            let error = (slope / norm - 1.0).abs();
            let bound = fixture.bound(1e-2, "gradients");
            assert!(error <= bound, "{role}: {slope} by differences, {norm} by the gradient");
        }
    });
}

#[test]
fn a_gradient_that_is_not_finite_names_its_layer() {
    of_tiny_qwen3(|fixture| {
        let mut adapter = fixture.adapter("adapter_init");
        let place = adapter.layout.place(1, Role::VProj).unwrap();
        // Forward, zero times a huge number; backward, a huge number.
        adapter.vector[place.a].fill(0.0);
        adapter.vector[place.b].fill(3e38);
        let error = fixture.trainer(&adapter, false, 1).step(&[batch(&oracle(), 0, &[0])], 1e-3).unwrap_err().to_string();
        assert!(error.starts_with("step 1: the norm of the gradient is not finite; "), "{error}");
        assert!(error.ends_with("it arose first in the gradients of layer 1"), "{error}");
    });
}

/// In inference, the residual streams share two buffers. The error still names the layer.
#[test]
fn what_is_not_finite_is_named_by_its_layer_without_training() {
    of_tiny_qwen3(|fixture| {
        let pack = || PackSource::open(&fixture.pack).unwrap();
        let tokenizer = Tokenizer::of_pack(&pack(), &fixture.config, 0).unwrap();
        let prompt = tokenizer.encode("Once upon a time", true).unwrap();
        let sample = Sample { line: 1, tokens: prompt.clone(), loss_mask: vec![true; prompt.len()] };
        // One layer for each of the two buffers.
        for number in [0, 3] {
            let mut adapter = fixture.adapter("adapter_final");
            let place = adapter.layout.place(number, Role::DownProj).unwrap();
            adapter.vector[place.b].fill(f32::NAN);
            let expected = NonFiniteAt::Layer(number);
            let plan = MemoryPlan::one_row(&fixture.gpu, &pack(), &fixture.config, Some(&adapter), LENGTH as u32).unwrap();
            let mut session = Session::open(&fixture.gpu, pack(), Some(&adapter), &plan).unwrap();
            match session.mean_loss(std::slice::from_ref(&sample), LENGTH as u32, |_, _| true).unwrap_err() {
                ModelError::NotFinite { layer, step: None, .. } => assert_eq!(layer, Some(expected)),
                other => panic!("{other}"),
            }
            let mut generator =
                TextGenerator::open(&fixture.gpu, pack(), Some(&adapter), None, LENGTH as u32, None).unwrap();
            let mut sampler = Sampler::new(SamplerOptions::GREEDY).unwrap();
            let keep_going = |_| Ok::<_, GenerateError>(std::ops::ControlFlow::Continue(()));
            match generator.answer(&prompt, 3, &mut sampler, keep_going).unwrap_err() {
                GenerateError::Model(ModelError::NotFinite { layer, .. }) => assert_eq!(layer, Some(expected)),
                other => panic!("{other}"),
            }
        }
    });
}

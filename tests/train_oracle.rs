//! The model and its training step against transformers, PEFT and bitsandbytes in float32 on tiny-qwen3: fixtures/oracle, whose
//! weights are those of a pack with absmax scales in float32, bit for bit.
#![cfg(all(feature = "train", feature = "convert"))]
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "common/gpu.rs"]
mod common;
#[path = "common/oracle.rs"]
mod shared;

use std::collections::BTreeMap;

use nf4pack::train::adapter::Adapter;
use nf4pack::train::data::Batch;
use nf4pack::train::step::StepResult;
use serde_json::Value;
use shared::{Fixture, assert_gradients, fixture, json, numbers, relative};

const LENGTH: usize = 48;

fn floats(file: &str) -> BTreeMap<String, Vec<f32>> {
    shared::floats(&fixture("oracle").join(file))
}

fn oracle() -> Value {
    json(&fixture("oracle/oracle.json"))
}

/// Rows of the oracle's batch.
fn batch(oracle: &Value, number: usize, rows: &[usize]) -> Batch {
    shared::batch(rows.iter().map(|&row| [&oracle["batches"][number][row], &oracle["labels"][number][row]]))
}

/// tiny-qwen3 with the oracle's weights.
fn tiny_qwen3() -> Option<Fixture> {
    Some(Fixture::new(common::gpu()?, &fixture("tiny-qwen3"), fixture("oracle"), LENGTH, 8))
}

fn most(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    // NaN is no difference that passes.
    differences.fold(0.0, |most, d| if d <= most { most } else { d })
}

/// Both rows of the oracle's first batch.
fn first_rows(oracle: &Value) -> [Vec<u32>; 2] {
    [0, 1].map(|row| shared::tokens(&oracle["batches"][0][row]))
}

#[test]
fn hidden_states_and_logits_are_those_of_transformers() {
    let Some(fixture) = tiny_qwen3() else { return };
    let (oracle, expected) = (oracle(), floats("forward_no_lora.safetensors"));
    let hidden = fixture.config.hidden as usize;
    let mut session = fixture.session(None, false);
    for (row, tokens) in first_rows(&oracle).iter().enumerate() {
        let states = session.hidden_states(tokens).unwrap();
        assert_eq!(states.len(), fixture.config.layers as usize + 1);
        // transformers has the last one after the final norm: the logits tell.
        for (number, state) in states.iter().enumerate().take(fixture.config.layers as usize) {
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
    let Some(fixture) = tiny_qwen3() else { return };
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
    let Some(fixture) = tiny_qwen3() else { return };
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
    let Some(fixture) = tiny_qwen3() else { return };
    let (oracle, expected) = (oracle(), floats("grads_step0.safetensors"));
    let adapter = fixture.adapter("adapter_init");
    let mut trainer = fixture.trainer(&adapter, false, 2);
    let result = trainer.step(&[batch(&oracle, 0, &[0, 1])], 1e-3).unwrap();
    let norm = oracle["grad_norms_before_clip"][0].as_f64().unwrap();
    assert!((f64::from(result.grad_norm) / norm - 1.0).abs() <= 1e-3, "{}, expected {norm}", result.grad_norm);
    let gradient = trainer.gradient().unwrap();
    assert_gradients(&adapter.layout, &gradient, &expected);
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
    let Some(fixture) = tiny_qwen3() else { return };
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
    let Some(fixture) = tiny_qwen3() else { return };
    let (resident, parameters) = train(&fixture, false, 2);
    let (through_ring, of_ring) = train(&fixture, true, 2);
    assert_eq!(through_ring, resident);
    assert!(of_ring.iter().zip(&parameters).all(|(a, b)| a.to_bits() == b.to_bits()));
}

#[test]
fn accumulated_micro_batches_are_one_batch() {
    let Some(fixture) = tiny_qwen3() else { return };
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

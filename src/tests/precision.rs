//! How far mixed precision is from float32 on tiny-qwen3, against PEFT in bfloat16
//! (fixtures/oracle/bf16.json, by tests/interop/precision.py): at most half as far, in the logits,
//! in the gradient of each matrix, in 20 losses and in each matrix of the adapter after them.

use std::collections::BTreeMap;

use serde_json::Value;

use super::oracle::{LENGTH, batch, first_rows, oracle};
use super::{Fixture, fixture, json, relative};
use crate::gpu::{Gpu, UseMatrixUnits};
use crate::lora::Adapter;
use crate::ops::testing::gpu_with;

/// Names of the parts, as bf16.json has them.
const PARTS: [&str; 4] = ["logits", "gradients", "losses", "adapter"];

/// The numbers of a run, by part and name.
type Numbers = BTreeMap<&'static str, BTreeMap<String, Vec<f32>>>;

/// Runs the oracle's 20 steps.
fn run(gpu: Gpu) -> Numbers {
    // Both rows as one sample: with fewer rows, the products are in float32.
    let fixture = Fixture::new(gpu, &fixture("tiny-qwen3"), fixture("oracle"), 2 * LENGTH, 8);
    let (oracle, adapter) = (oracle(), fixture.adapter("adapter_init"));
    let mut session = fixture.session(Some(&adapter), false);
    let logits = session.logits(&first_rows(&oracle).concat()).unwrap();
    let mut trainer = fixture.trainer(&adapter, false, 2);
    let (mut losses, mut gradients) = (BTreeMap::new(), BTreeMap::new());
    for step in 0..20 {
        let result = trainer.step(&[batch(&oracle, step % 4, &[0, 1])], 1e-3).unwrap();
        losses.insert(step.to_string(), vec![result.loss]);
        if step == 0 {
            gradients = matrices(&adapter, &trainer.gradient().unwrap());
        }
    }
    let [parameters, ..] = trainer.read().unwrap();
    let parts = [BTreeMap::from([("all".to_owned(), logits)]), gradients, losses, matrices(&adapter, &parameters)];
    PARTS.into_iter().zip(parts).collect()
}

/// The matrices of an adapter's vector, by PEFT's names.
fn matrices(adapter: &Adapter, vector: &[f32]) -> BTreeMap<String, Vec<f32>> {
    let places = adapter.layout.places().flat_map(|(layer, role, place)| {
        let block = if ["gate_proj", "up_proj", "down_proj"].contains(&role.name()) { "mlp" } else { "self_attn" };
        [("A", place.a), ("B", place.b)]
            .map(|(matrix, range)| (format!("layers.{layer}.{block}.{role}.lora_{matrix}.weight"), vector[range].to_vec()))
    });
    places.collect()
}

/// The relative deviation of each.
fn deviations(found: &Numbers, expected: &Numbers, part: &str) -> BTreeMap<String, f64> {
    let expected = &expected[part];
    assert_eq!(found[part].len(), expected.len());
    expected.iter().map(|(name, expected)| (name.clone(), relative(&found[part][name], expected))).collect()
}

fn largest(values: impl IntoIterator<Item = f64>) -> f64 {
    values.into_iter().fold(0.0, f64::max)
}

fn check(gpu: Option<Gpu>) {
    let Some((gpu, exact)) = gpu.zip(gpu_with(|options| options.matrix_units = UseMatrixUnits::Off)) else { return };
    // Without matrix units, there is nothing to compare.
    let Ok(units) = gpu.matrix_units() else { return };
    let (exact, mixed) = (run(exact), run(gpu));
    let bf16: Value = json(&fixture("oracle/bf16.json"));
    let mut table = String::new();
    for part in PARTS {
        let found = deviations(&mixed, &exact, part);
        let bf16: BTreeMap<String, f64> = serde_json::from_value(bf16[part].clone()).unwrap();
        assert_eq!(found.keys().collect::<Vec<_>>(), bf16.keys().collect::<Vec<_>>(), "{part}");
        let (of_found, of_bf16) = (largest(found.values().copied()), largest(bf16.values().copied()));
        table += &format!("{units:?}, {part}: at most {of_found:.2e}, bfloat16 {of_bf16:.2e}\n");
        assert!(of_found > 0.0, "{part} are those of float32: mixed precision did not run");
        assert!(of_found <= of_bf16 / 2.0, "{part}: {of_found}, bfloat16 {of_bf16}");
        // A single loss of bfloat16 may be right by chance; the norms of matrices are not.
        for (name, found) in found.iter().filter(|_| part != "losses") {
            assert!(*found <= bf16[name] / 2.0, "{part}, {name}: {found}, bfloat16 {}", bf16[name]);
        }
    }
    // For docs: the figures of this device.
    if let Some(path) = std::env::var_os("NF4PACK_PRECISION_TABLE") {
        std::fs::write(path, table).unwrap();
    }
}

#[test]
#[ignore = "2.4 minutes of a core on a software driver; `mixed` has the same bounds on a small model"]
fn mixed_precision_is_at_most_half_as_far_from_float32_as_bfloat16() {
    check(gpu_with(|options| options.matrix_units = UseMatrixUnits::Loops));
}

#[test]
fn mixed_precision_on_matrix_units_is_at_most_half_as_far_from_float32_as_bfloat16() {
    check(gpu_with(|options| options.matrix_units = UseMatrixUnits::Auto));
}

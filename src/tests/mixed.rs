//! Mixed precision of whole models on any device: with loops in place of matrix units, on small
//! models whose kernels software drivers compile in seconds.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use super::architectures::{COPIES, check_folder};
use super::{Fixture, HalfOfBf16, batch, fixture, floats, json, relative};
use crate::data::pack::Batch;
use crate::dequant::stream::PackSource;
use crate::gpu::{Gpu, UseMatrixUnits};
use crate::model::precision::MixedKernels;
use crate::model::workspace::WINDOW;
use crate::ops::testing::gpu_with;
use crate::train::trainer::Trainer;

const LENGTH: usize = 24;
const RANK: u32 = 4;

fn loops() -> Option<Gpu> {
    static LOOPS: OnceLock<Option<Gpu>> = OnceLock::new();
    let open = || gpu_with(|options| options.matrix_units = UseMatrixUnits::Loops);
    LOOPS.get_or_init(open).clone().filter(|gpu| gpu.matrix_units().is_ok())
}

fn llama(gpu: Gpu) -> Fixture {
    let folder = fixture("architectures/llama");
    Fixture::new(gpu, &folder, folder.clone(), LENGTH, RANK)
}

/// Copies of the expected row. Each has another first token that is learned.
fn batches(folder: &Path, count: usize) -> Vec<Batch> {
    let row = json(&folder.join("expected.json"));
    let of = |first: usize| {
        let mut labels = row["labels"].as_array().unwrap().clone();
        labels.iter_mut().take(first).for_each(|label| *label = (-100).into());
        let labels = labels.into();
        batch(vec![[&row["tokens"], &labels]; COPIES])
    };
    (0..count).map(|number| of(3 * number)).collect()
}

#[test]
fn an_architecture_has_the_results_of_transformers() {
    let Some(gpu) = loops() else { return };
    check_folder(gpu, &fixture("architectures/llama"));
}

/// The tests before a run know every kernel that a step and an evaluation use.
#[test]
fn all_kernels_of_a_step_are_tested_before_a_run() {
    let Some(gpu) = loops() else { return };
    let units = gpu.matrix_units().unwrap();
    let model = llama(gpu.clone());
    let mut trainer = model.trainer(&model.adapter("adapter"), false, COPIES);
    let batches = batches(&model.folder, 1);
    trainer.step(&batches, 1e-3).unwrap();
    trainer.session().loss(&batches[0]).unwrap();
    let used: BTreeSet<String> = trainer.session().model.used_mixed_kernels().into_iter().collect();
    let pack = PackSource::open(&model.pack).unwrap();
    let kernels = MixedKernels::new(pack.index(), &model.config, RANK, true);
    let tested: BTreeSet<String> = kernels.tests(&gpu, units).unwrap().into_iter().map(|test| test.kernel).collect();
    assert!(!used.is_empty() && used.is_subset(&tested), "used: {used:?}, tested: {tested:?}");
    assert!(tested.contains(&format!("attention with heads of {}", model.config.head_dim)), "{tested:?}");
}

#[test]
fn a_restored_trainer_continues_bit_for_bit() {
    let Some(gpu) = loops() else { return };
    let model = llama(gpu);
    let (adapter, batches) = (model.adapter("adapter"), batches(&model.folder, 3));
    let step = |trainer: &mut Trainer, number: usize| trainer.step(&batches[number..=number], 1e-2).unwrap();
    let mut whole = model.trainer(&adapter, false, COPIES);
    step(&mut whole, 0);
    let [vector, exp_avg, exp_avg_sq] = whole.read().unwrap();
    let (steps, micro_batches) = whole.counts();
    let expected = [1, 2].map(|number| step(&mut whole, number));

    let adapter = crate::lora::Adapter { vector, ..adapter };
    let mut resumed = model.trainer(&adapter, false, COPIES);
    resumed.restore(&exp_avg, &exp_avg_sq, steps, micro_batches).unwrap();
    assert_eq!([1, 2].map(|number| step(&mut resumed, number)), expected);
    let bits =
        |trainer: &Trainer| trainer.read().unwrap().map(|values| values.into_iter().map(f32::to_bits).collect::<Vec<_>>());
    assert!(bits(&resumed) == bits(&whole));
}

/// Gradients are computed from activations in f16, which a layer keeps or computes again: with
/// norms per head, with norms of outputs, and in windows of tokens; with residual streams in host
/// memory.
#[test]
fn kept_activations_change_no_bit() {
    let Some(gpu) = loops() else { return };
    for name in ["llama", "gemma3"] {
        let folder = fixture("architectures").join(name);
        let fixture = Fixture::new(gpu.clone(), &folder, folder.clone(), LENGTH, RANK);
        let (adapter, batches) = (fixture.adapter("adapter"), batches(&folder, 1));
        let mut model = Some(fixture.model(false));
        let mut step = |kept, window| {
            let memory = fixture.memory_of_windows(COPIES, kept, window);
            let mut trainer = fixture.trainer_of(&adapter, model.take().unwrap(), memory);
            let result = trainer.step(&batches, 1e-3).unwrap();
            let gradient: Vec<u32> = trainer.gradient().unwrap().into_iter().map(f32::to_bits).collect();
            model = Some(trainer.into_session().model);
            (result, gradient)
        };
        let layers = fixture.config.layers;
        for window in [WINDOW, 64] {
            let none = step([0, 0], window);
            assert!(none.0.loss.is_finite() && none.1.iter().any(|&bits| bits != 0));
            for kept in [[1, 0], [layers, 0], [0, layers - 1]] {
                if kept[1] > 0 && !gpu.has_host_buffers() {
                    continue;
                }
                assert!(step(kept, window) == none, "{name}, windows of {window}: {kept:?} of {layers} layers");
            }
        }
    }
}

#[test]
fn accumulated_micro_batches_are_one_batch() {
    let Some(gpu) = loops() else { return };
    let model = llama(gpu);
    let (adapter, parts) = (model.adapter("adapter"), batches(&model.folder, 2));
    let [mut one, other] = [parts[0].clone(), parts[1].clone()];
    let tokens = one.tokens.len() as u32;
    one.rows += other.rows;
    one.starts.extend(other.starts.iter().map(|start| start + tokens));
    one.tokens.extend(other.tokens);
    one.labels.extend(other.labels);
    one.loss_tokens += other.loss_tokens;
    assert_ne!(parts[0].loss_tokens, parts[1].loss_tokens);
    let gradient = |batches: &[Batch]| {
        let mut trainer = model.trainer(&adapter, false, 2 * COPIES);
        (trainer.step(batches, 1e-3).unwrap().loss, trainer.gradient().unwrap())
    };
    let ((whole, expected), (accumulated, found)) = (gradient(&[one]), gradient(&parts));
    // Sums of another order round operands otherwise.
    assert!((whole - accumulated).abs() <= 1e-4 * whole, "{whole} and {accumulated}");
    let error = relative(&found, &expected);
    assert!(error <= 1e-3, "{error}");
}

/// A copy of the model, in which elements of some tensors have a factor by row and column.
fn scaled_copy(to: &Path, factor: impl Fn(&str, usize, usize) -> f32) {
    let from = fixture("architectures/llama");
    let bytes = fs::read(from.join("model.safetensors")).unwrap();
    let shapes = SafeTensors::deserialize(&bytes).unwrap();
    let scaled = floats(&from.join("model.safetensors")).into_iter().map(|(name, values)| {
        let shape = shapes.tensor(&name).unwrap().shape().to_vec();
        let columns = shape.last().copied().unwrap();
        let at = |(i, x): (usize, f32)| (x * factor(&name, i / columns, i % columns)).to_le_bytes();
        let bytes: Vec<u8> = values.into_iter().enumerate().flat_map(at).collect();
        (name, shape, bytes)
    });
    let scaled: Vec<_> = scaled.collect();
    let views = scaled.iter().map(|(name, shape, bytes)| (name, TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap()));
    fs::write(to.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    fs::copy(from.join("config.json"), to.join("config.json")).unwrap();
}

/// Columns of up to 1e6 in front of the feed-forward block, and tokens whose embedding is down to
/// 1e-8: hidden states and gradients stay as near to float32 as ordinary ones, and no row is lost.
#[test]
fn outliers_of_a_layer_stay_exact() {
    let Some((gpu, exact)) = loops().zip(gpu_with(|options| options.matrix_units = UseMatrixUnits::Off)) else { return };
    let scratch = tempfile::tempdir().unwrap();
    scaled_copy(scratch.path(), |name, row, column| match name {
        _ if name.ends_with("post_attention_layernorm.weight") && column % 17 == 3 => [1e2, 1e4, 1e6][column / 17 % 3],
        "model.embed_tokens.weight" => [1.0, 1e-3, 1e-8, 1.0][row % 4],
        _ => 1.0,
    });
    let folder = fixture("architectures/llama");
    let run = |gpu: Gpu| {
        let model = Fixture::new(gpu, scratch.path(), folder.clone(), COPIES * LENGTH, RANK);
        let batches = batches(&folder, 1);
        let mut session = model.session(None, false);
        let states = session.hidden_states(&batches[0].tokens).unwrap();
        let adapter = model.adapter("adapter");
        let mut trainer = model.trainer_of(&adapter, session.model, session.memory);
        let loss = trainer.step(&batches, 0.0).unwrap().loss;
        let gradient = trainer.gradient().unwrap();
        let parts =
            adapter.layout.places().flat_map(|(layer, role, place)| [(layer, role, place.a), (layer, role, place.b)]);
        let parts: Vec<_> =
            parts.map(|(layer, role, range)| (format!("layer {layer}, {role}"), gradient[range].to_vec())).collect();
        (model.config.hidden as usize, states, loss, parts)
    };
    let ((hidden, expected, loss, gradients), (_, found, found_loss, found_gradients)) = (run(exact), run(gpu));
    assert_eq!(expected.len(), 3);
    let half_of_bf16 = HalfOfBf16::of(&folder);
    let half_of_bf16 = |part| half_of_bf16.largest(part);
    for (layer, (found, expected)) in found.iter().zip(&expected).enumerate() {
        let error = relative(found, expected);
        assert!(error <= half_of_bf16("logits"), "before layer {layer}: {error:e}");
        for (row, (found, expected)) in found.chunks(hidden).zip(expected.chunks(hidden)).enumerate() {
            // A column of 1e6 amplifies an element that may be small in its row, and with it the
            // error of that row.
            let error = relative(found, expected);
            assert!(error <= 0.1, "row {row} before layer {layer}: {error:e}");
        }
    }
    assert!(f64::from((found_loss - loss).abs()) <= half_of_bf16("losses") * f64::from(loss), "{found_loss}, {loss}");
    for ((name, expected), (_, found)) in gradients.iter().zip(&found_gradients) {
        let error = relative(found, expected);
        assert!(error <= half_of_bf16("gradients"), "{name}: {error:e}");
    }
}

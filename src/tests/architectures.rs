//! Tests models of every supported architecture against transformers and PEFT in float32.
//! interop/architectures.py writes fixtures/architectures. Together the models have every bias,
//! tied and untied heads, several ratios of query heads to key heads, every scaling of the rotary
//! embedding, layers without it, windows in all layers and in some, and every factor.

use std::fs;
use std::path::Path;

use super::{Fixture, fixture, floats, in_each_precision, json, relative};
use crate::MappedPack;
use crate::arch::ModelConfig;
use crate::arch::family::PROJECTION_TENSORS;
use crate::convert::Options;
use crate::data::pack::{Batch, IGNORE_INDEX};
use crate::dequant::dequantize;
use crate::dequant::stream::PackSource;
use crate::export::export;
use crate::format::FloatType;
use crate::format::nf4::ScaleType;
use crate::gpu::Gpu;
use crate::model::text::{Sampler, SamplerOptions};
use crate::model::{GenerateError, TextGenerator};
use crate::train::trainer::Trainer;
use regex::Regex;
use serde_json::Value;

const LENGTH: usize = 24;
const RANK: u32 = 4;
/// Copies of a row whose products run on matrix units.
pub(super) const COPIES: usize = 3;

/// Asserts that the projections of each layer are quantised and decode to the bits of the
/// checkpoint.
fn assert_exact(pack: &Path, checkpoint: &Path, model: &ModelConfig) {
    let (mapped, weights) = (MappedPack::read(pack).unwrap(), floats(checkpoint));
    let mut compared = 0;
    for projection in mapped.pack().quantized_tensors() {
        let mut decoded = vec![0.0; projection.data.elements as usize];
        dequantize(&projection.data, 0, &mut decoded).unwrap();
        let differ = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
        let expected = &weights[projection.name];
        assert_eq!(decoded.len(), expected.len());
        assert!(!decoded.iter().zip(expected).any(differ), "{} differs from the checkpoint", projection.name);
        compared += 1;
    }
    let of_layer = PROJECTION_TENSORS.iter().filter(|&&role| model.projection(role).is_some()).count();
    assert_eq!(compared, of_layer * model.layers as usize);
}

/// Asserts that a row and its end give the same loss and gradient packed in one batch as one after
/// another.
fn assert_packed_as_alone(model: &Fixture, trainer: &mut Trainer, row: &Value) {
    // From the middle of a window.
    let end = |key: &str| serde_json::json!(row[key].as_array().unwrap()[5..]);
    let (tokens, labels) = (end("tokens"), end("labels"));
    let samples = [[&row["tokens"], &row["labels"]], [&tokens, &labels]];
    let mut run = |batches: &[_]| {
        let step = trainer.step(batches, 0.0).unwrap();
        (step.loss, trainer.gradient().unwrap())
    };
    let (loss, gradient) = run(&samples.map(|sample| super::batch([sample])));
    let (packed_loss, packed_gradient) = run(&[super::batch(samples)]);
    model.assert_loss("packed", packed_loss.into(), loss.into(), 1e-5);
    let error = relative(&packed_gradient, &gradient);
    assert!(error <= model.bound(1e-5, "gradients"), "the gradients of packed samples are {error} off");
}

/// Converts a model, and compares its results with the expected ones.
fn check(name: &str) {
    in_each_precision(|gpu| check_folder(gpu, &fixture("architectures").join(name)));
}

pub(super) fn check_folder(gpu: Gpu, folder: &Path) {
    let model = Fixture::new(gpu, folder, folder.to_owned(), LENGTH, RANK);
    assert_exact(&model.pack, &folder.join("model.safetensors"), &model.config);
    let (row, expected) = (json(&folder.join("expected.json")), floats(&folder.join("expected.safetensors")));
    let tokens = super::tokens(&row["tokens"]);
    assert_eq!(tokens.len(), LENGTH);

    let mut session = model.session(None, false);
    let states = session.hidden_states(&tokens).unwrap();
    assert_eq!(states.len(), model.config.layers as usize + 1);
    for (number, state) in states.iter().enumerate() {
        model.assert_near(&format!("hidden state {number}"), state, &expected[&format!("hidden.{number}")]);
    }
    model.assert_near("logits", &session.logits(&tokens).unwrap(), &expected["logits"]);

    let adapter = model.adapter("adapter");
    let mut trainer = model.trainer_of(&adapter, session.model, session.memory);
    assert_packed_as_alone(&model, &mut trainer, &row);
    // In mixed precision, the products of few tokens are in float32.
    let copies = if model.is_mixed() { COPIES } else { 1 };
    let batch = [super::batch(vec![[&row["tokens"], &row["labels"]]; copies])];
    let step = trainer.step(&batch, 1e-3).unwrap();
    let losses = super::numbers(&row["losses"]);
    model.assert_loss("loss", step.loss.into(), losses[0], 1e-4);
    let gradient = trainer.gradient().unwrap();
    model.assert_gradients(&adapter.layout, &gradient, &expected, 1e-3);

    let kept = model.memory_keeping(copies, [model.config.layers, 0]);
    let mut trainer = model.trainer_of(&adapter, trainer.into_session().model, kept);
    assert_eq!(trainer.step(&batch, 1e-3).unwrap(), step, "with kept activations");
    let same = trainer.gradient().unwrap().iter().zip(&gradient).all(|(a, b)| a.to_bits() == b.to_bits());
    assert!(same, "kept activations change the gradient");
    for (number, &loss) in losses.iter().enumerate().skip(1) {
        let step = trainer.step(&batch, 1e-3).unwrap();
        model.assert_loss(&format!("loss {number}"), step.loss.into(), loss, 1e-3);
    }
}

/// A stored output projection gives logits and gradients, regardless of config.json.
#[test]
fn a_stored_head_counts_where_config_json_calls_it_tied() {
    let (from, folder) = (fixture("architectures").join("llama"), tempfile::tempdir().unwrap());
    let copy = folder.path().join("llama");
    fs::create_dir_all(copy.join("adapter")).unwrap();
    let adapter = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json"];
    for name in ["model.safetensors", "expected.safetensors", "expected.json", "bf16.json"].into_iter().chain(adapter) {
        fs::copy(from.join(name), copy.join(name)).unwrap();
    }
    let config = fs::read_to_string(from.join("config.json")).unwrap();
    let tied = config.replace("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
    assert_ne!(tied, config);
    fs::write(copy.join("config.json"), tied).unwrap();
    in_each_precision(|gpu| check_folder(gpu, &copy));
}

/// Tests embedding and head in 4 bits, decoded in the kernels, against the same values in floats,
/// decoded by the CPU.
#[test]
fn a_quantised_embedding_computes_what_its_decoded_values_do() {
    in_each_precision(|gpu| {
        // The head of the one is tied, that of the other is not.
        let (ends, everything) = (Regex::new("embed_tokens|lm_head").unwrap(), Regex::new(".").unwrap());
        for (name, scale_type) in [("qwen2", ScaleType::Dq8), ("llama", ScaleType::Bf16)] {
            let (folder, scratch) = (fixture("architectures").join(name), tempfile::tempdir().unwrap());
            let quantize = Some(ends.clone());
            let options = Options { quantize, scale_type, ..Options::default() };
            let four_bits = Fixture::converted(gpu.clone(), &folder, folder.clone(), LENGTH, RANK, options);
            let decoded = scratch.path().join("decoded");
            export(&PackSource::open(&four_bits.pack).unwrap(), &decoded, FloatType::F32, &()).unwrap();
            let options = Options { keep: Some(everything.clone()), ..Options::default() };
            let floats = Fixture::converted(gpu.clone(), &decoded, folder.clone(), LENGTH, RANK, options);
            let row = json(&folder.join("expected.json"));
            let (tokens, batch) = (super::tokens(&row["tokens"]), super::batch([[&row["tokens"], &row["labels"]]]));
            let run = |fixture: &Fixture| {
                let mut session = fixture.session(None, false);
                let logits = session.logits(&tokens).unwrap();
                let adapter = fixture.adapter("adapter");
                let mut trainer = fixture.trainer_of(&adapter, session.model, session.memory);
                let loss = trainer.step(std::slice::from_ref(&batch), 1e-3).unwrap().loss;
                (logits, loss, trainer.gradient().unwrap())
            };
            let (found, expected) = (run(&four_bits), run(&floats));
            floats.assert_near(&format!("{name}: logits"), &found.0, &expected.0);
            floats.assert_loss(&format!("{name}: loss"), found.1.into(), expected.1.into(), 1e-5);
            assert!(relative(&found.2, &expected.2) <= floats.bound(1e-4, "gradients"), "{name}: gradient");
        }
    });
}

#[test]
fn llama_with_all_biases_an_untied_head_and_llama3_scaling() {
    check("llama");
}

#[test]
fn mistral_with_windows_an_untied_head_and_linear_scaling() {
    check("mistral");
}

#[test]
fn qwen2_with_biases_a_tied_head_and_yarn_scaling() {
    check("qwen2");
}

#[test]
fn qwen3_with_biases_an_untied_head_and_dynamic_scaling() {
    check("qwen3");
}

/// Texts in one batch. Each token except the first of a text is a label.
fn packed(texts: &[&[u32]]) -> Batch {
    let mut batch = Batch { rows: 1, tokens: Vec::new(), labels: Vec::new(), starts: Vec::new(), loss_tokens: 0 };
    for text in texts {
        let start = batch.tokens.len();
        batch.tokens.extend_from_slice(text);
        batch.labels.extend(text.iter().skip(1).chain([&IGNORE_INDEX]));
        batch.starts.resize(batch.tokens.len(), start as u32);
        batch.loss_tokens += text.len() as u64 - 1;
    }
    batch
}

/// Texts shorter than the trained length of the model, equal to it, and longer. Packed in a batch,
/// each has the loss that transformers computes for it alone. Generated texts grow past that
/// length.
#[test]
fn dynamic_scaling_is_by_the_length_of_each_text() {
    in_each_precision(|gpu| {
        let folder = fixture("architectures/qwen3");
        let model = Fixture::new(gpu.clone(), &folder, folder.clone(), 64, RANK);
        let (row, expected) = (json(&folder.join("expected.json")), json(&folder.join("lengths.json")));
        let tokens = super::tokens(&row["tokens"]);
        let losses: Vec<(usize, f64)> = expected["losses"]
            .as_array()
            .unwrap()
            .iter()
            .map(|of| (of["length"].as_u64().unwrap() as usize, of["loss"].as_f64().unwrap()))
            .collect();
        let mut session = model.session(None, false);
        for &(length, expected) in &losses {
            let loss = f64::from(session.loss(&packed(&[&tokens[..length]])).unwrap());
            model.assert_loss(&format!("{length} tokens: loss"), loss, expected, 1e-4);
        }
        let texts: Vec<&[u32]> = losses.iter().map(|&(length, _)| &tokens[..length]).collect();
        let (sum, count) = losses.iter().fold((0.0, 0.0), |(sum, count), &(length, loss)| {
            let trained = length as f64 - 1.0;
            (sum + trained * loss, count + trained)
        });
        let loss = f64::from(session.loss(&packed(&texts)).unwrap());
        model.assert_loss("packed: loss", loss, sum / count, 1e-4);

        for of in expected["generated"].as_array().unwrap() {
            let pack = PackSource::open(&model.pack).unwrap();
            let mut generator = TextGenerator::open(&gpu, pack, None, None, 64, None).unwrap();
            let prompt = &tokens[..of["prompt"].as_u64().unwrap() as usize];
            let expected: Vec<u32> =
                of["tokens"].as_array().unwrap().iter().map(|of| of["token"].as_u64().unwrap() as u32).collect();
            let mut sampler = Sampler::new(SamplerOptions::GREEDY).unwrap();
            let keep_going = |_| Ok::<_, GenerateError>(std::ops::ControlFlow::Continue(()));
            let found = generator.answer(prompt, expected.len() as u32, &mut sampler, keep_going).unwrap();
            assert_eq!(found.tokens, expected, "after {}", prompt.len());
        }
    });
}

#[test]
fn qwen2_with_windows_from_a_layer_on() {
    check("qwen2_windows");
}

#[test]
fn qwen3_with_windows_by_layer_types_and_rope_scaling_before_rope_parameters() {
    check("qwen3_windows");
}

#[test]
fn granite_with_its_four_factors_all_biases_and_a_tied_head() {
    check("granite");
}

#[test]
fn smollm3_without_rotary_embedding_in_every_fourth_layer() {
    check("smollm3");
}

#[test]
fn smollm3_with_windows_where_no_rotary_embedding_is() {
    check("smollm3_windows");
}

#[test]
fn seed_oss_with_biases_of_queries_keys_values_and_feed_forward() {
    check("seed_oss");
}

#[test]
fn seed_oss_with_a_bias_of_the_output_of_attention() {
    check("seed_oss_out_bias");
}

#[test]
fn gemma_with_an_older_name_of_its_activation_and_biases() {
    check("gemma");
}

#[test]
fn gemma3_with_a_rotary_embedding_of_windowed_layers_and_four_norms() {
    check("gemma3");
}

#[test]
fn gemma3_with_rope_parameters_of_each_kind_biases_and_an_untied_head() {
    check("gemma3_kinds");
}

#[test]
fn phi3_with_fused_projections_and_a_rotary_embedding_of_a_part_of_each_head() {
    check("phi3");
}

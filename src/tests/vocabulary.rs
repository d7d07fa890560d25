//! Embedding tables and output projections that are not in GPU memory.

use super::architectures::COPIES;
use super::mixed::loops;
use super::{Fixture, fixture, json, tokens};
use crate::dequant::stream::{Globals, PackSource, StreamOptions};
use crate::format::{Role, SectionKind};
use crate::gpu::Gpu;
use crate::model::ModelError;
use crate::model::decoder::Model;
use crate::model::workspace::{Memory, Sizes};
use crate::ops::testing::gpu;
use crate::train::step::StepResult;

const LENGTH: usize = 24;
const RANK: u32 = 4;
/// Columns of a chunk of logits: of 96, so that the last chunk is smaller.
const CHUNK: u32 = 40;

const ELSEWHERE: [Globals; 2] = [Globals::WithoutEmbedding, Globals::HeadInParts { rows: CHUNK }];

/// One model with factors and a tied output projection, one with an output projection of its own.
fn models() -> Option<[Fixture; 2]> {
    let gpu = gpu()?;
    Some(["granite", "llama"].map(|name| model(gpu.clone(), name)))
}

fn model(gpu: Gpu, name: &str) -> Fixture {
    let folder = fixture("architectures").join(name);
    Fixture::new(gpu, &folder, folder.clone(), LENGTH, RANK)
}

impl Fixture {
    fn chunked_memory(&self, rows: usize) -> Memory {
        Memory::new(&self.gpu, &self.config, Sizes { chunk: CHUNK, ..self.sizes(rows) }).unwrap()
    }

    /// The logits of a row, and then the steps, the last gradient and the adapter of a training
    /// with this number of rows.
    fn results(&self, model: Model, rows: usize) -> (Vec<u32>, Vec<StepResult>, Vec<u32>) {
        let bits = |floats: Vec<f32>| floats.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let row = json(&self.folder.join("expected.json"));
        let (adapter, batch) = (self.adapter("adapter"), [super::batch(vec![[&row["tokens"], &row["labels"]]; rows])]);
        let mut trainer = self.trainer_of(&adapter, model, self.chunked_memory(rows));
        let logits = trainer.session().logits(&tokens(&row["tokens"])).unwrap();
        let steps = (0..2).map(|_| trainer.step(&batch, 1e-3).unwrap()).collect();
        let (gradient, [parameters, ..]) = (trainer.gradient().unwrap(), trainer.read().unwrap());
        (bits(logits), steps, [bits(gradient), bits(parameters)].concat())
    }
}

#[test]
fn a_vocabulary_outside_of_gpu_memory_changes_no_bit() {
    let Some(models) = models() else { return };
    for model in models {
        let expected = model.results(model.model(false), 1);
        let tied = model.model(false).config().tied;
        for globals in ELSEWHERE {
            let other = model.model_with(globals, false);
            let parts = other.plan().head().map(|head| head.count());
            assert_eq!(parts, (globals == ELSEWHERE[1]).then_some(3));
            assert_eq!(other.plan().embedding_on_host, !tied || parts.is_some());
            assert!(model.results(other, 1) == expected, "{globals:?}, tied {tied}");
        }
    }
}

/// The vocabulary leaves GPU memory where layers stream, too.
#[test]
fn a_vocabulary_outside_of_gpu_memory_changes_no_bit_next_to_a_ring_of_layers() {
    let Some(gpu) = gpu() else { return };
    let model = model(gpu, "gemma3");
    let expected = model.results(model.model(false), 1);
    for globals in ELSEWHERE {
        assert!(model.results(model.model_with(globals, true), 1) == expected, "{globals:?}");
    }
}

/// With as many rows as products on matrix units need. Parts of the output projection have powers
/// of two of their own.
#[test]
fn a_vocabulary_outside_of_gpu_memory_changes_no_bit_on_matrix_units() {
    let Some(gpu) = loops() else { return };
    for (name, ring) in [("llama", false), ("gemma3", true)] {
        let model = model(gpu.clone(), name);
        let expected = model.results(model.model(false), COPIES);
        for globals in ELSEWHERE {
            let other = model.model_with(globals, ring);
            assert!(model.results(other, COPIES) == expected, "{name}, {globals:?}");
        }
    }
}

/// A byte of the first or the last part of the embedding or of the output projection.
#[test]
fn damage_is_found_where_the_tensor_is_read() {
    let Some([_, model]) = models() else { return };
    let bytes = std::fs::read(&model.pack).unwrap();
    for (role, at) in [(Role::Embedding, 0), (Role::LmHead, 0), (Role::LmHead, 80 * 60 * 4)] {
        let is = |s: &&crate::format::Section| s.role == role && s.kind == Some(SectionKind::Raw);
        let source = PackSource::open(&model.pack).unwrap();
        let offset = source.index().sections().iter().find(is).unwrap().offset + at;
        let mut damaged = bytes.clone();
        damaged[offset as usize] ^= 1;
        std::fs::write(&model.pack, &damaged).unwrap();
        let failed = |error: &ModelError| matches!(error, ModelError::Stream(_)) && error.to_string().contains("checksum");
        let options = StreamOptions { globals: ELSEWHERE[1], ..Default::default() };
        let opened = Model::new(&model.gpu, PackSource::open(&model.pack).unwrap(), LENGTH as u32, &options);
        if role == Role::Embedding {
            assert!(failed(&opened.unwrap_err()));
        } else {
            let row = json(&model.folder.join("expected.json"));
            let batch = [super::batch([[&row["tokens"], &row["labels"]]])];
            let mut trainer = model.trainer_of(&model.adapter("adapter"), opened.unwrap(), model.chunked_memory(1));
            for _ in 0..2 {
                let error = trainer.step(&batch, 1e-3).unwrap_err();
                assert!(failed(&error), "{error}");
            }
        }
        std::fs::write(&model.pack, &bytes).unwrap();
    }
}

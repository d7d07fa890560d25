//! Embedding tables and output projections that are not in GPU memory.

use super::{Fixture, fixture, json, tokens};
use crate::dequant::stream::{Globals, PackSource, StreamOptions};
use crate::format::{Role, SectionKind};
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
    Some(["granite", "llama"].map(|name| {
        let folder = fixture("architectures").join(name);
        Fixture::new(gpu.clone(), &folder, folder.clone(), LENGTH, RANK)
    }))
}

impl Fixture {
    fn chunked_memory(&self) -> Memory {
        Memory::new(&self.gpu, &self.config, Sizes { chunk: CHUNK, ..self.sizes(1) }).unwrap()
    }

    /// The logits of a row, and then the steps, the last gradient and the adapter of a training.
    fn results(&self, model: Model) -> (Vec<u32>, Vec<StepResult>, Vec<u32>) {
        let bits = |floats: Vec<f32>| floats.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let row = json(&self.folder.join("expected.json"));
        let (adapter, batch) = (self.adapter("adapter"), [super::batch([[&row["tokens"], &row["labels"]]])]);
        let mut trainer = self.trainer_of(&adapter, model, self.chunked_memory());
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
        let expected = model.results(model.model(false));
        let tied = model.model(false).config().tied;
        for globals in ELSEWHERE {
            let other = model.model_with(globals, false);
            let parts = other.plan().head().map(|head| head.count());
            assert_eq!(parts, (globals == ELSEWHERE[1]).then_some(3));
            assert_eq!(other.plan().embedding_on_host, !tied || parts.is_some());
            assert!(model.results(other) == expected, "{globals:?}, tied {tied}");
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
            let mut trainer = model.trainer_of(&model.adapter("adapter"), opened.unwrap(), model.chunked_memory());
            for _ in 0..2 {
                let error = trainer.step(&batch, 1e-3).unwrap_err();
                assert!(failed(&error), "{error}");
            }
        }
        std::fs::write(&model.pack, &bytes).unwrap();
    }
}

//! Texts that follow one another. With resident layers, each pass is submitted before the host
//! knows its token; with a ring of layers, afterwards. The texts are the same.

use std::ops::ControlFlow;
use std::path::Path;

use super::{Fixture, fixture};
use crate::dequant::stream::PackSource;
use crate::gpu::Gpu;
use crate::model::text::{Ending, Event, Sampler, SamplerOptions};
use crate::model::{GenerateError, TextGenerator};
use crate::ops::testing::gpu;

/// Tokens of the KV cache.
const CAPACITY: u32 = 96;
const SAMPLED: [SamplerOptions; 2] = [
    SamplerOptions { temperature: 0.8, top_k: 20, top_p: 0.95, min_p: 0.0, seed: 3 },
    // Many of its choices are not certain on the device.
    SamplerOptions { temperature: 2.0, top_k: 0, top_p: 0.99, min_p: 0.0, seed: 4 },
];

fn generator(gpu: &Gpu, pack: &Path, eos: Option<u32>, budget: Option<u64>) -> Result<TextGenerator, GenerateError> {
    TextGenerator::open(gpu, PackSource::open(pack).unwrap(), None, eos, CAPACITY, budget)
}

/// Texts of one generator, each of them with the sampler of the text before it.
fn texts(mut generator: TextGenerator, options: &[SamplerOptions], vocab: u32) -> Vec<(Vec<u32>, Ending)> {
    let tokens = |count: u32, step: u32| -> Vec<u32> { (0..count).map(|i| (i * step + 11) % vocab).collect() };
    let (long, other) = (tokens(90, 37), tokens(70, 41));
    let mut texts = Vec::new();
    for options in options {
        let mut sampler = Sampler::new(*options).unwrap();
        // Prompts longer and shorter than a pass of one submission, texts that the observer stops,
        // that get no token, and that fill the cache.
        for (prompt, max_tokens, stop) in
            [(&long[..70], 6, 9), (&long[..20], 9, 3), (&other[..], 5, 9), (&other[..50], 0, 9), (&long[..], 90, 90)]
        {
            let mut seen = 0;
            let observe = |event| {
                seen += u32::from(matches!(event, Event::Token(_)));
                Ok::<_, GenerateError>(if seen < stop { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
            };
            let text = generator.answer(prompt, max_tokens, &mut sampler, observe).unwrap();
            texts.push((text.tokens, text.ending));
        }
    }
    texts
}

#[test]
fn a_pass_ahead_of_its_token_changes_no_text() {
    let Some(gpu) = gpu() else { return };
    let model = Fixture::new(gpu.clone(), &fixture("tiny-qwen3"), fixture("oracle"), 48, 8);
    let both = |options: &[SamplerOptions], eos| {
        let Err(GenerateError::Budget { needed, .. }) = generator(&gpu, &model.pack, eos, Some(1)) else { panic!() };
        let [ahead, after] = [None, Some(needed)].map(|budget| generator(&gpu, &model.pack, eos, budget).unwrap());
        assert!(ahead.plan().resident && !after.plan().resident);
        let [ahead, after] = [ahead, after].map(|generator| texts(generator, options, model.config.vocab));
        assert_eq!(ahead, after);
        ahead
    };
    let without = both(&SAMPLED, None);
    for of_options in without.chunks(5) {
        let endings: Vec<Ending> = of_options.iter().map(|(_, ending)| *ending).collect();
        use Ending::{ContextFull, MaxTokens, Stopped};
        assert_eq!(endings, [MaxTokens, Stopped, MaxTokens, MaxTokens, ContextFull]);
        let lengths: Vec<usize> = of_options.iter().map(|(tokens, _)| tokens.len()).collect();
        assert_eq!(lengths, [6, 3, 5, 0, 7]);
    }
    // A token of a sampled text ends it now.
    let with_end = both(&SAMPLED[..1], Some(without[0].0[2]));
    assert_eq!(with_end[0].1, Ending::EndToken);
    assert_eq!(with_end[0].0, without[0].0[..with_end[0].0.len()]);
}

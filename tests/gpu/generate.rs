//! Tests generation with a KV cache against a full forward pass for each token.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use nf4pack::arch::ModelConfig;
use nf4pack::convert::{Options, convert};
use nf4pack::data::Tokenizer;
use nf4pack::dequant::stream::PackSource;
use nf4pack::gpu::Gpu;
use nf4pack::lora::Adapter;
use nf4pack::model::text::{Ending, Event, Sampler, SamplerOptions};
use nf4pack::model::{GenerateError, MemoryPlan, Session, TextGenerator};
use tempfile::TempDir;

/// Maximum tokens of a text.
const CAPACITY: u32 = 400;

/// A fixture as a pack, and an adapter with an effect.
struct Fixture {
    _folder: TempDir,
    path: PathBuf,
    adapter: PathBuf,
}

impl Fixture {
    fn new() -> Self {
        Self::with("oracle/adapter_final", common::write_tiny)
    }

    /// The fixture of a checkpoint and an adapter.
    fn of(checkpoint: &str, adapter: &str) -> Self {
        let source = Path::new("tests/fixtures").join(checkpoint);
        Self::with(adapter, |path| drop(convert(&source, path, Options::default(), &()).unwrap()))
    }

    fn with(adapter: &str, write: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.nf4pack");
        write(&path);
        Self { _folder: folder, path, adapter: Path::new("tests/fixtures").join(adapter) }
    }

    fn pack(&self) -> PackSource {
        PackSource::open(&self.path).unwrap()
    }

    fn tokenizer(&self) -> Tokenizer {
        Tokenizer::of_pack(&self.pack(), &ModelConfig::of_pack(&self.pack()).unwrap(), 0).unwrap()
    }

    fn adapter(&self) -> Adapter {
        Adapter::read(&self.adapter, &ModelConfig::of_pack(&self.pack()).unwrap()).unwrap()
    }

    fn generator(&self, gpu: &Gpu, adapter: Option<&Adapter>, budget: Option<u64>) -> TextGenerator {
        // The small models of tests/fixtures/architectures have no tokenizer.
        let eos = self.pack().file("tokenizer.json").unwrap().and_then(|_| self.tokenizer().eos());
        TextGenerator::open(gpu, self.pack(), adapter, eos, CAPACITY, budget).unwrap()
    }

    /// The model without a KV cache.
    fn session(&self, gpu: &Gpu, adapter: Option<&Adapter>) -> Session {
        let model = ModelConfig::of_pack(&self.pack()).unwrap();
        let plan = MemoryPlan::one_row(gpu, &self.pack(), &model, adapter, CAPACITY).unwrap();
        Session::open(gpu, self.pack(), adapter, &plan).unwrap()
    }
}

/// Asserts that each token of `answer` is the most likely one after the tokens before it, and ends
/// no text. One full forward pass has the logits after every token.
#[track_caller]
fn assert_most_likely(session: &mut Session, prompt: &[u32], answer: &[u32]) {
    let (vocab, ends) = (session.config().vocab as usize, session.config().eos_token_ids.clone());
    let text = [prompt, answer].concat();
    let logits = session.logits(&text[..text.len() - 1]).unwrap();
    let mut sampler = Sampler::new(SamplerOptions::GREEDY).unwrap();
    let rows = logits.chunks(vocab).skip(prompt.len() - 1);
    assert_eq!(rows.len(), answer.len());
    let expected: Vec<u32> = rows.map(|row| sampler.sample(row).unwrap()).collect();
    assert_eq!(answer, expected, "after {} tokens", prompt.len());
    assert!(answer.iter().all(|token| !ends.contains(token)));
}

/// The most likely tokens after `prompt`, and the reason for the end.
fn greedy(generator: &mut TextGenerator, prompt: &[u32], max: u32) -> Result<(Vec<u32>, Ending), GenerateError> {
    let mut sampler = Sampler::new(SamplerOptions::GREEDY).unwrap();
    let mut shown = Vec::new();
    let generated = generator.answer(prompt, max, &mut sampler, |event| -> Result<_, GenerateError> {
        if let Event::Token(token) = event {
            shown.push(token);
        }
        Ok(ControlFlow::Continue(()))
    })?;
    assert_eq!(shown, generated.tokens);
    Ok((generated.tokens, generated.ending))
}

/// A short prompt, one that ends inside a word, and one that is read in two pieces.
fn prompts(tokenizer: &Tokenizer) -> Vec<Vec<u32>> {
    let encode = |text: &str| tokenizer.encode(text, true).unwrap();
    let mut long = encode(&"Once upon a time there was a little bear who liked honey. ".repeat(40));
    long.truncate(300);
    assert_eq!(long.len(), 300);
    vec![encode("a"), encode("Once upon a ti"), long]
}

/// Asserts that the model gives the same tokens with and without a cache.
fn assert_agree(fixture: &Fixture, gpu: &Gpu, adapter: Option<&Adapter>, prompts: &[Vec<u32>]) {
    let mut generator = fixture.generator(gpu, adapter, None);
    let mut session = fixture.session(gpu, adapter);
    for prompt in prompts {
        let (answer, ending) = greedy(&mut generator, prompt, 12).unwrap();
        assert_eq!((answer.len(), ending), (12, Ending::MaxTokens), "it should not end early");
        assert_most_likely(&mut session, prompt, &answer);
    }
}

#[test]
fn the_cache_changes_nothing() {
    let Some(gpu) = common::gpu() else { return };
    let fixture = Fixture::new();
    assert_agree(&fixture, &gpu, None, &prompts(&fixture.tokenizer()));
    assert_agree(&fixture, &gpu, Some(&fixture.adapter()), &prompts(&fixture.tokenizer())[..2]);
}

/// Windows in all layers and in some, layers without rotary embedding, factors, fused projections
/// with a rotary embedding of a part of each head, rotary embeddings by the kind of layer.
#[test]
fn the_cache_changes_nothing_where_layers_differ() {
    let Some(gpu) = common::gpu() else { return };
    for name in ["mistral", "qwen2_windows", "smollm3", "smollm3_windows", "granite", "phi3", "gemma3", "gemma3_kinds"] {
        let fixture = Fixture::of(&format!("architectures/{name}"), &format!("architectures/{name}/adapter"));
        // A prompt shorter than each window, a longer one, and one that is read in two pieces.
        let prompts = [3, 40, 300].map(|length| (0..length).map(|i| (17 + 31 * i + i * i / 3) % 96).collect());
        assert_agree(&fixture, &gpu, Some(&fixture.adapter()), &prompts);
        assert_agree(&fixture, &gpu, None, &prompts[1..2]);
    }
}

#[test]
fn a_ring_of_two_layers_is_as_good_as_all() {
    let Some(gpu) = common::gpu() else { return };
    let fixture = Fixture::new();
    let adapter = fixture.adapter();
    let refused = TextGenerator::open(&gpu, fixture.pack(), Some(&adapter), None, CAPACITY, Some(1)).unwrap_err();
    let GenerateError::Budget { budget: 1, needed, capacity: CAPACITY } = refused else { panic!("{refused}") };
    let mut ring = fixture.generator(&gpu, Some(&adapter), Some(needed));
    assert_eq!(ring.plan().slots, 2);
    let mut resident = fixture.generator(&gpu, Some(&adapter), None);
    assert_eq!(resident.plan().slots, 4);
    for prompt in prompts(&fixture.tokenizer()) {
        assert_eq!(greedy(&mut ring, &prompt, 6).unwrap(), greedy(&mut resident, &prompt, 6).unwrap());
    }
}

#[test]
fn a_conversation_uses_what_it_has_in_the_cache() {
    let Some(gpu) = common::gpu() else { return };
    let fixture = Fixture::new();
    let (mut generator, mut session) = (fixture.generator(&gpu, None, None), fixture.session(&gpu, None));
    let first = fixture.tokenizer().encode("Once upon a ti", true).unwrap();
    let (answer, _) = greedy(&mut generator, &first, 8).unwrap();
    assert_eq!(answer.len(), 8);
    // The prompt continues the answer, whose last token is not in the cache yet. Then it continues
    // another answer, and the first again.
    let second = [first.clone(), answer, vec![17, 18, 19]].concat();
    let other = [first.clone(), vec![40, 41]].concat();
    let mut sampler = Sampler::new(SamplerOptions::GREEDY).unwrap();
    for (prompt, new) in [(&second, 4), (&other, 2), (&second, 11), (&second, 1), (&first, 1)] {
        let keep_going = |_| -> Result<_, GenerateError> { Ok(ControlFlow::Continue(())) };
        let found = generator.answer(prompt, 1, &mut sampler, keep_going).unwrap();
        assert_eq!(found.tokens.len(), 1);
        assert_most_likely(&mut session, prompt, &found.tokens);
        assert_eq!(found.prompt_tokens, new, "of {}", prompt.len());
    }
}

#[test]
fn texts_end_and_do_not_pass_the_cache() {
    let Some(gpu) = common::gpu() else { return };
    let fixture = Fixture::new();
    let [_, prompt, long] = prompts(&fixture.tokenizer()).try_into().unwrap();
    let open = |eos, capacity| TextGenerator::open(&gpu, fixture.pack(), None, eos, capacity, None).unwrap();
    let mut generator = open(None, CAPACITY);
    let (all, ending) = greedy(&mut generator, &prompt, 12).unwrap();
    assert_eq!((all.len(), ending), (12, Ending::MaxTokens));
    assert_eq!(greedy(&mut generator, &prompt, 0).unwrap(), (vec![], Ending::MaxTokens));
    assert!(matches!(greedy(&mut generator, &[], 1), Err(GenerateError::NoPrompt)));
    let mut sampler = Sampler::new(SamplerOptions::GREEDY).unwrap();
    let stop = |_| -> Result<_, GenerateError> { Ok(ControlFlow::Break(())) };
    let stopped = generator.answer(&prompt, 12, &mut sampler, stop).unwrap();
    assert_eq!((stopped.tokens, stopped.ending), (all[..1].to_vec(), Ending::Stopped));
    // A long prompt is read in pieces and can be stopped between them. Read pieces stay in the
    // cache.
    let mut heard = Vec::new();
    let stop_early = |event| -> Result<_, GenerateError> {
        heard.push(event);
        Ok(ControlFlow::Break(()))
    };
    let stopped = generator.answer(&long, 12, &mut sampler, stop_early).unwrap();
    assert_eq!((stopped.tokens.len(), stopped.ending, stopped.prompt_tokens), (0, Ending::Stopped, 256));
    assert_eq!((heard, stopped.tokens_per_second()), (vec![Event::Read(256)], None));
    let rest = generator.answer(&long, 3, &mut sampler, |_| -> Result<_, GenerateError> { Ok(ControlFlow::Continue(())) });
    let rest = rest.unwrap();
    // It starts with the same five tokens as the previous prompt.
    assert_eq!((rest.prompt_tokens, rest.tokens.len(), rest.passes), (300 - 5 - 256, 3, 2));
    assert!(rest.tokens_per_second().unwrap() > 0.0 && rest.prompt_tokens_per_second().unwrap() > 0.0);
    // A full cache still gives one more token, but no token after that. An end token of the
    // tokenizer also ends a text.
    let capacity = prompt.len() as u32 + 4;
    let mut small = open(Some(all[5]), capacity);
    let end = all.iter().position(|&token| token == all[5]).unwrap();
    let expected = if end < 5 { (all[..end].to_vec(), Ending::EndToken) } else { (all[..5].to_vec(), Ending::ContextFull) };
    assert_eq!(greedy(&mut small, &prompt, 12).unwrap(), expected);
    assert_eq!(greedy(&mut small, &[&prompt[..], &all[..4]].concat(), 12).unwrap().1, expected.1);
    let too_long = greedy(&mut small, &long, 1).unwrap_err();
    assert!(
        matches!(too_long, GenerateError::TooLong { tokens: 300, capacity: found, max_position_embeddings: 1024 } if found == capacity),
        "{too_long}"
    );
}

/// The tokens that the CPU samples from the logits of full forward passes, up to an end token.
fn by_cpu(session: &mut Session, prompt: &[u32], max: usize, sampler: &mut Sampler, end: Option<u32>) -> Vec<u32> {
    let (vocab, ends) = (session.config().vocab as usize, session.config().eos_token_ids.clone());
    let mut text = prompt.to_vec();
    while text.len() < prompt.len() + max {
        let logits = session.logits(&text).unwrap();
        let token = sampler.sample(&logits[logits.len() - vocab..]).unwrap();
        if end == Some(token) || ends.contains(&token) {
            break;
        }
        text.push(token);
    }
    text.split_off(prompt.len())
}

/// A seed gives the tokens of the CPU, whether or not the device knows its choice for certain. Two
/// texts share a sampler: a text that ends takes no random number of the next one.
#[test]
fn sampled_tokens_are_those_of_the_cpu() {
    let Some(gpu) = common::gpu() else { return };
    let fixture = Fixture::new();
    let prompts = &prompts(&fixture.tokenizer())[..2];
    let mut session = fixture.session(&gpu, None);
    let refused = TextGenerator::open(&gpu, fixture.pack(), None, None, CAPACITY, Some(1)).unwrap_err();
    let GenerateError::Budget { needed, .. } = refused else { panic!("{refused}") };
    for (temperature, top_k, top_p, min_p, seed) in [
        (0.8, 0, 1.0, 0.0, 1),
        (1.0, 20, 1.0, 0.0, 2),
        (0.7, 0, 0.9, 0.0, 3),
        (5.0, 40, 0.95, 0.0, 4),
        (1.0, 0, 1.0, 0.3, 5),
    ] {
        let options = SamplerOptions { temperature, top_k, top_p, min_p, seed };
        let start = Sampler::new(options).unwrap();
        let end = by_cpu(&mut session, &prompts[0], 4, &mut start.clone(), None).last().copied();
        let cases = if seed == 1 { vec![(None, None), (end, None), (end, Some(needed))] } else { vec![(None, None)] };
        for (end, budget) in cases {
            let mut generator = TextGenerator::open(&gpu, fixture.pack(), None, end, CAPACITY, budget).unwrap();
            let (mut sampler, mut expected) = (start.clone(), start.clone());
            for prompt in prompts {
                let keep_going = |_| -> Result<_, GenerateError> { Ok(ControlFlow::Continue(())) };
                let found = generator.answer(prompt, 6, &mut sampler, keep_going).unwrap();
                assert_eq!(found.tokens, by_cpu(&mut session, prompt, 6, &mut expected, end), "{options:?} {end:?}");
            }
        }
    }
}

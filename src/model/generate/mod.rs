//! Generates text: fills a KV cache with the prompt, then chooses one token after another.

pub mod sampling;

use std::ops::ControlFlow;
use std::time::Instant;

use thiserror::Error;

use super::ModelError;
use crate::arch::ModelConfig;
use crate::dequant::stream::{PackSource, StreamPlan};
use crate::gpu::Gpu;
use crate::lora::adapter::Adapter;
use crate::model::generate::sampling::{Sampler, SamplingError};
use crate::model::kv_cache::KvCache;
use crate::model::open::Passes;
use crate::model::plan::MemoryError;
use crate::model::session::Session;

/// Tokens of a prompt in one pass.
const CHUNK: u32 = 256;

/// An error of text generation.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The model cannot be run.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// No token can be chosen.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The budget of GPU memory is too small.
    #[error(
        "a budget of {budget} bytes is too small: two layers, what belongs to none, the keys and values of {capacity} tokens, and \
         working memory take {needed}"
    )]
    Budget {
        /// Maximum bytes.
        budget: u64,
        /// Bytes needed.
        needed: u64,
        /// Tokens of the KV cache.
        capacity: u32,
    },
    /// A matrix or the layers of the pack do not fit on the device.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The prompt has no tokens.
    #[error("the prompt has no tokens")]
    NoPrompt,
    /// The prompt exceeds the KV cache.
    #[error("the prompt has {tokens} tokens, and only {capacity} are remembered")]
    TooLong {
        /// Tokens of the prompt.
        tokens: u64,
        /// Tokens of the KV cache.
        capacity: u32,
        /// Tokens that the model supports.
        max_position_embeddings: u32,
    },
}

/// Progress of [`TextGenerator::answer`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Tokens of the prompt read so far, fewer than all.
    Read(u64),
    /// The next token of the text.
    Token(u32),
}

/// The reason why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The model chose an end token.
    EndToken,
    /// The text has the requested number of tokens.
    MaxTokens,
    /// The cache is full.
    ContextFull,
    /// The observer stopped the generation.
    Stopped,
}

impl Ending {
    /// The name for users and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::EndToken => "end",
            Self::MaxTokens => "max tokens",
            Self::ContextFull => "context full",
            Self::Stopped => "stopped",
        }
    }
}

/// A text and its timing.
#[derive(Debug, Clone)]
pub struct Generated {
    /// Tokens of the text, without the end token.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt that were not in the cache.
    pub prompt_tokens: u64,
    /// The reason why it ended.
    pub ending: Ending,
    /// Seconds for the prompt, up to the choice of the first token.
    pub prompt_seconds: f64,
    /// Passes of one token each. The first token of the text comes from the pass of the prompt.
    pub passes: u64,
    /// Seconds of these passes and of the choice of each token.
    pub seconds: f64,
}

impl Generated {
    /// Speed of the prompt. `None` if the cache contained all of it.
    pub fn prompt_tokens_per_second(&self) -> Option<f64> {
        rate(self.prompt_tokens, self.prompt_seconds)
    }

    /// Speed of the text after its first token. `None` without further tokens.
    pub fn tokens_per_second(&self) -> Option<f64> {
        rate(self.passes, self.seconds)
    }
}

fn rate(count: u64, seconds: f64) -> Option<f64> {
    (count > 0).then(|| count as f64 / seconds.max(1e-9))
}

/// Continues texts.
#[derive(Debug)]
pub struct TextGenerator {
    session: Session,
    cache: KvCache,
    /// The tokens in the cache.
    cached: Vec<u32>,
    /// Tokens that end a text.
    ends: Vec<u32>,
}

impl TextGenerator {
    /// Opens the model of a pack, with or without an adapter, for texts of at most `capacity`
    /// tokens, including the prompt. A text ends with an end token of the model or with `eos`, the
    /// end token of the tokenizer. `budget` is the maximum GPU memory in bytes; `None`: the
    /// available memory of the device. Layers that do not fit are streamed.
    ///
    /// # Errors
    /// [`GenerateError::Budget`]; errors of the pack, the adapter and the device.
    pub fn open(
        gpu: &Gpu,
        pack: PackSource,
        adapter: Option<&Adapter>,
        eos: Option<u32>,
        capacity: u32,
        budget: Option<u64>,
    ) -> Result<Self, GenerateError> {
        let config = ModelConfig::of_pack(&pack)?;
        let (needed, limit) = (KvCache::matrix_bytes(&config, capacity), gpu.limits().max_storage_buffer_binding_size);
        if needed > limit {
            return Err(MemoryError::Matrix { limit, needed, remedy: None }.into());
        }
        let reserved = KvCache::bytes(&config, capacity);
        let passes = Passes { positions: capacity, reserved, budget, ..Passes::one_row(CHUNK.min(capacity.max(1))) };
        let plan = passes.plan(gpu, &pack, &config, adapter).map_err(|error| match error {
            MemoryError::Budget { budget, needed, .. } => GenerateError::Budget { budget, needed, capacity },
            error => error.into(),
        })?;
        let session = Session::open(gpu, pack, adapter, &plan)?;
        let cache = KvCache::new(gpu, &config, capacity).map_err(ModelError::from)?;
        let ends = config.eos_token_ids.iter().copied().chain(eos).collect();
        Ok(Self { session, cache, cached: Vec::new(), ends })
    }

    /// The plan of the layer stream.
    pub fn plan(&self) -> &StreamPlan {
        self.session.model.plan()
    }

    /// Continues `prompt`, the whole text so far, by at most `max_tokens` tokens. It uses the
    /// longest prefix that earlier calls left in the cache. `observe` gets the progress of a long
    /// prompt and every token, and can stop the generation.
    ///
    /// # Errors
    /// [`GenerateError`]; the errors of `observe`.
    pub fn answer<E: From<GenerateError>>(
        &mut self,
        prompt: &[u32],
        max_tokens: u32,
        sampler: &mut Sampler,
        mut observe: impl FnMut(Event) -> Result<ControlFlow<()>, E>,
    ) -> Result<Generated, E> {
        let start = Instant::now();
        let (logits, prompt_tokens) = self.read(prompt, &mut observe)?;
        let prompt_seconds = start.elapsed().as_secs_f64();
        let (tokens, ending) = (Vec::new(), Ending::Stopped);
        let mut text = Generated { tokens, prompt_tokens, ending, prompt_seconds, passes: 0, seconds: 0.0 };
        let start = Instant::now();
        if let Some(logits) = logits {
            text.ending = self.decode_loop(logits, max_tokens, sampler, &mut observe, &mut text)?;
        }
        text.seconds = start.elapsed().as_secs_f64();
        Ok(text)
    }

    /// Samples tokens into `text`, the first one from `logits`. Returns why the text ended.
    fn decode_loop<E: From<GenerateError>>(
        &mut self,
        mut logits: Vec<f32>,
        max_tokens: u32,
        sampler: &mut Sampler,
        observe: &mut impl FnMut(Event) -> Result<ControlFlow<()>, E>,
        text: &mut Generated,
    ) -> Result<Ending, E> {
        loop {
            if text.tokens.len() as u64 >= max_tokens.into() {
                return Ok(Ending::MaxTokens);
            }
            let token = sampler.sample(&logits).map_err(GenerateError::from)?;
            if self.ends.contains(&token) {
                return Ok(Ending::EndToken);
            }
            text.tokens.push(token);
            if observe(Event::Token(token))?.is_break() {
                return Ok(Ending::Stopped);
            }
            // The logits after the last token are not needed.
            if (text.tokens.len() as u64) < max_tokens.into() {
                if self.cached.len() as u64 >= self.cache.capacity().into() {
                    return Ok(Ending::ContextFull);
                }
                logits = self.advance(&[token], self.cached.len() + 1)?;
                text.passes += 1;
            }
        }
    }

    /// Fills the cache with a text. Returns the logits of the next token, unless the observer
    /// stopped, and the number of new tokens.
    fn read<E: From<GenerateError>>(
        &mut self,
        text: &[u32],
        observe: &mut impl FnMut(Event) -> Result<ControlFlow<()>, E>,
    ) -> Result<(Option<Vec<f32>>, u64), E> {
        let (tokens, capacity) = (text.len() as u64, self.cache.capacity());
        if tokens > capacity.into() {
            let max_position_embeddings = self.session.model.config().max_position_embeddings;
            return Err(GenerateError::TooLong { tokens, capacity, max_position_embeddings }.into());
        }
        // The last token passes through the model again, because its logits were not kept.
        let (_, before_last) = text.split_last().ok_or(GenerateError::NoPrompt)?;
        let same = before_last.iter().zip(&self.cached).take_while(|(a, b)| a == b).count();
        self.cached.truncate(same);
        let mut logits = None;
        while let Some(rest) = text.get(self.cached.len()..).filter(|rest| !rest.is_empty()) {
            if self.cached.len() > same && observe(Event::Read((self.cached.len() - same) as u64))?.is_break() {
                return Ok((None, (self.cached.len() - same) as u64));
            }
            let chunk = rest.len().min(self.session.memory.sizes().tokens.max(1) as usize);
            logits = Some(self.advance(rest.get(..chunk).unwrap_or_default(), text.len())?);
        }
        Ok((logits, (text.len() - same) as u64))
    }

    /// Adds tokens of a text of `length` tokens to the cache, which must have room for them.
    /// Returns the logits of the next token.
    fn advance(&mut self, tokens: &[u32], length: usize) -> Result<Vec<f32>, GenerateError> {
        let (past, length) = (self.cached.len() as u32, length as u32);
        let logits = self.session.next_logits(tokens, &self.cache, past, length)?;
        self.cached.extend_from_slice(tokens);
        Ok(logits)
    }
}

//! Text from a model: a prompt read into a cache of keys and values, then token after token.

pub mod sampling;

use std::ops::ControlFlow;
use std::time::Instant;

use thiserror::Error;

use super::ModelError;
use crate::dequant::stream::{PackSource, StreamPlan};
use crate::gpu::Gpu;
use crate::lora::adapter::Adapter;
use crate::model::decoder::read_config;
use crate::model::generate::sampling::{Sampler, SamplingError};
use crate::model::kv_cache::KvCache;
use crate::model::open::Passes;
use crate::model::plan::MemoryError;
use crate::model::session::Session;

/// Tokens of a prompt that go through the model together.
const CHUNK: u32 = 256;

/// Why there is no text.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The model cannot be run.
    #[error(transparent)]
    Train(#[from] ModelError),
    /// No token can be chosen.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// Not enough GPU memory was allowed.
    #[error(
        "a budget of {budget} bytes is too small: two layers, what belongs to none, the keys and values of {capacity} tokens, and \
         working memory take {needed}"
    )]
    Budget {
        /// Bytes allowed.
        budget: u64,
        /// Bytes needed.
        needed: u64,
        /// Tokens that are remembered.
        capacity: u32,
    },
    /// The device takes no matrix of that size, or no layers of this pack.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A prompt without tokens: there is nothing to go on with.
    #[error("the prompt has no tokens")]
    NoPrompt,
    /// A prompt that passes the cache.
    #[error("the prompt has {tokens} tokens, and only {capacity} are remembered")]
    TooLong {
        /// Its tokens.
        tokens: u64,
        /// Those that the cache holds.
        capacity: u32,
        /// Those that the model was made for.
        most: u32,
    },
}

/// What [`TextGenerator::answer`] tells while it goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// So many tokens of the prompt are read, not all of them.
    Read(u64),
    /// The next token of the text.
    Token(u32),
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The model ended it.
    EndToken,
    /// It has as many tokens as were asked for.
    MaxTokens,
    /// The cache is full.
    ContextFull,
    /// Whoever was shown it had enough.
    Stopped,
}

impl Ending {
    /// For people and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::EndToken => "end",
            Self::MaxTokens => "max tokens",
            Self::ContextFull => "context full",
            Self::Stopped => "stopped",
        }
    }
}

/// A text, and how long it took.
#[derive(Debug, Clone)]
pub struct Generated {
    /// Its tokens, without that of its end.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt that were not in the cache yet.
    pub prompt_tokens: u64,
    /// Why it ended.
    pub ending: Ending,
    /// Seconds for the prompt, up to the choice of the first token.
    pub prompt_seconds: f64,
    /// Tokens of the text that went through the model, for the next one. The first token is the prompt's work.
    pub passes: u64,
    /// Seconds for them, and for the choice of each token.
    pub seconds: f64,
}

impl Generated {
    /// How fast the prompt was read; `None` where none of it was.
    pub fn prompt_tokens_per_second(&self) -> Option<f64> {
        rate(self.prompt_tokens, self.prompt_seconds)
    }

    /// How fast the text came after its first token; `None` where there was no more.
    pub fn tokens_per_second(&self) -> Option<f64> {
        rate(self.passes, self.seconds)
    }
}

fn rate(count: u64, seconds: f64) -> Option<f64> {
    (count > 0).then(|| count as f64 / seconds.max(1e-9))
}

/// Goes on with texts.
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
    /// Opens the model of a pack, with an adapter or without, for texts of `capacity` tokens, prompt included; they end with one of the
    /// model's end tokens or with `eos`, that of the tokenizer. `budget` are the bytes of GPU memory that all of it may take; `None`:
    /// what the device has. Layers that do not fit are streamed.
    ///
    /// # Errors
    /// [`GenerateError::Budget`]; what is wrong with pack or adapter, and what the device cannot.
    pub fn open(
        gpu: &Gpu,
        pack: PackSource,
        adapter: Option<&Adapter>,
        eos: Option<u32>,
        capacity: u32,
        budget: Option<u64>,
    ) -> Result<Self, GenerateError> {
        let config = read_config(&pack)?;
        let (needed, most) = (KvCache::matrix_bytes(&config, capacity), gpu.limits().max_storage_buffer_binding_size);
        if needed > most {
            return Err(MemoryError::Matrix { most, needed, remedy: None }.into());
        }
        let reserved = KvCache::bytes(&config, capacity);
        let passes = Passes { positions: capacity, reserved, budget, ..Passes::of_one(CHUNK.min(capacity.max(1))) };
        let plan = passes.plan(gpu, &pack, &config, adapter).map_err(|error| match error {
            MemoryError::Budget { budget, needed, .. } => GenerateError::Budget { budget, needed, capacity },
            error => error.into(),
        })?;
        let session = Session::open(gpu, pack, adapter, &plan)?;
        let cache = KvCache::new(gpu, &config, capacity).map_err(ModelError::from)?;
        let ends = config.eos_token_ids.iter().copied().chain(eos).collect();
        Ok(Self { session, cache, cached: Vec::new(), ends })
    }

    /// How the layers go through GPU memory.
    pub fn plan(&self) -> &StreamPlan {
        self.session.model.plan()
    }

    /// Goes on after `prompt`, all of the text so far, with `max_tokens` tokens at most; of what earlier calls have left in the cache,
    /// the start that is the same is used again. `observe` hears of each piece of a long prompt and gets every token, and says whether to
    /// go on.
    ///
    /// # Errors
    /// [`GenerateError`], and what `observe` gives.
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
            text.ending = self.go_on(logits, max_tokens, sampler, &mut observe, &mut text)?;
        }
        text.seconds = start.elapsed().as_secs_f64();
        Ok(text)
    }

    /// Adds tokens to `text`, the first one by `logits`; why that ended.
    fn go_on<E: From<GenerateError>>(
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
            // Nobody asks what follows the last token.
            if (text.tokens.len() as u64) < max_tokens.into() {
                if self.cached.len() as u64 >= self.cache.capacity().into() {
                    return Ok(Ending::ContextFull);
                }
                logits = self.advance(&[token], self.cached.len() + 1)?;
                text.passes += 1;
            }
        }
    }

    /// Brings a text into the cache; the logits of its next token, unless it was stopped, and how many tokens were new.
    fn read<E: From<GenerateError>>(
        &mut self,
        text: &[u32],
        observe: &mut impl FnMut(Event) -> Result<ControlFlow<()>, E>,
    ) -> Result<(Option<Vec<f32>>, u64), E> {
        let (tokens, capacity) = (text.len() as u64, self.cache.capacity());
        if tokens > capacity.into() {
            let most = self.session.model.config().max_position_embeddings;
            return Err(GenerateError::TooLong { tokens, capacity, most }.into());
        }
        // The last token is read again: its logits are not kept.
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

    /// Brings further tokens of a text of `length` tokens, for which there is room, into the cache; the logits of the next one.
    fn advance(&mut self, tokens: &[u32], length: usize) -> Result<Vec<f32>, GenerateError> {
        let (past, length) = (self.cached.len() as u32, length as u32);
        let logits = self.session.next_logits(tokens, &self.cache, past, length)?;
        self.cached.extend_from_slice(tokens);
        Ok(logits)
    }
}

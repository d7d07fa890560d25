//! Generates text: fills a KV cache with the prompt, then chooses one token after another.
//!
//! The device chooses each token, and the next pass takes it from there. If all layers are
//! resident, that pass is submitted before the host knows the token, so the device never waits for
//! the host. A pass after the end of a text is in vain; nothing of it is kept.

mod chooser;
pub mod sampling;

use std::ops::ControlFlow;
use std::time::Instant;

use thiserror::Error;

use super::ModelError;
use crate::arch::ModelConfig;
use crate::dequant::stream::{PackSource, StreamPlan};
use crate::gpu::Gpu;
use crate::lora::adapter::Adapter;
use crate::model::generate::chooser::{Chooser, Pending};
use crate::model::generate::sampling::{Sampler, SamplingError};
use crate::model::kv_cache::{KvCache, Past};
use crate::model::open::Passes;
use crate::model::plan::{MemoryError, MemoryPlan};
use crate::model::session::{NewTokens, Session};

/// Tokens of a prompt in one pass, if working memory for more would displace layers.
const CHUNK: u32 = 256;
/// Tokens of a prompt in one pass of texts that are long enough.
const LONG_CHUNK: u32 = 2048;

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
    chooser: Chooser,
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
        let plan = Self::plan_passes(gpu, &pack, &config, adapter, capacity, budget)?;
        let session = Session::open(gpu, pack, adapter, &plan)?;
        let cache = KvCache::new(gpu, &config, capacity).map_err(ModelError::from)?;
        let chooser = Chooser::new(gpu, &config).map_err(ModelError::from)?;
        let ends = config.eos_token_ids.iter().copied().chain(eos).collect();
        Ok(Self { session, cache, chooser, cached: Vec::new(), ends })
    }

    /// Plans the memory. Passes have [`LONG_CHUNK`] tokens if all layers stay resident with that.
    fn plan_passes(
        gpu: &Gpu,
        pack: &PackSource,
        config: &ModelConfig,
        adapter: Option<&Adapter>,
        capacity: u32,
        budget: Option<u64>,
    ) -> Result<MemoryPlan, GenerateError> {
        let reserved = KvCache::bytes(config, capacity).saturating_add(Chooser::bytes(config));
        let plan = |chunk: u32| {
            let passes = Passes { positions: capacity, reserved, budget, ..Passes::one_row(chunk.min(capacity.max(1))) };
            passes.plan(gpu, pack, config, adapter)
        };
        let long = (capacity >= LONG_CHUNK).then(|| plan(LONG_CHUNK).ok()).flatten();
        match long.filter(|plan| plan.stream.resident) {
            Some(plan) => Ok(plan),
            None => plan(CHUNK).map_err(|error| match error {
                MemoryError::Budget { budget, needed, .. } => GenerateError::Budget { budget, needed, capacity },
                error => error.into(),
            }),
        }
    }

    /// From here on, texts have as many tokens as requested: no token ends them.
    pub(crate) fn ignore_ends(&mut self) {
        self.ends.clear();
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
        let mut text = Generated {
            tokens: Vec::new(),
            prompt_tokens: 0,
            ending: Ending::Stopped,
            prompt_seconds: 0.0,
            passes: 0,
            seconds: 0.0,
        };
        let start = Instant::now();
        let pending = self.read(prompt, sampler, &mut observe, &mut text)?;
        text.prompt_seconds = start.elapsed().as_secs_f64();
        if let Some(pending) = pending {
            text.ending = self.decode_loop(pending, (start, max_tokens), sampler, &mut observe, &mut text)?;
        }
        text.seconds = start.elapsed().as_secs_f64() - text.prompt_seconds;
        Ok(text)
    }

    /// Adds tokens to `text`, at most `max_tokens`. `pending` is the choice of the first,
    /// `start` the start of the prompt. Returns why the text ended.
    fn decode_loop<E: From<GenerateError>>(
        &mut self,
        mut pending: Pending,
        (start, max_tokens): (Instant, u32),
        sampler: &mut Sampler,
        observe: &mut impl FnMut(Event) -> Result<ControlFlow<()>, E>,
        text: &mut Generated,
    ) -> Result<Ending, E> {
        if max_tokens == 0 {
            *sampler = pending.before;
            return Ok(Ending::MaxTokens);
        }
        let ahead = self.plan().resident;
        loop {
            // The logits after the last token are not needed.
            let is_last = text.tokens.len() as u64 + 1 >= max_tokens.into();
            let is_full = self.cached.len() as u64 >= self.cache.capacity().into();
            let goes_on = !is_last && !is_full;
            let mut next = (ahead && goes_on).then(|| self.submit_next(sampler)).transpose()?;
            let token = self.finish(pending, &mut next, sampler)?;
            if text.tokens.is_empty() {
                text.prompt_seconds = start.elapsed().as_secs_f64();
            }
            let ended = self.ends.contains(&token);
            if !ended {
                text.tokens.push(token);
            }
            if ended || observe(Event::Token(token))?.is_break() {
                // The choice after the last token takes no random number.
                next.into_iter().for_each(|next| *sampler = next.before);
                return Ok(if ended { Ending::EndToken } else { Ending::Stopped });
            }
            if !goes_on {
                return Ok(if is_last { Ending::MaxTokens } else { Ending::ContextFull });
            }
            pending = match next {
                Some(next) => next,
                None => self.submit_next(sampler)?,
            };
            self.cached.push(token);
            text.passes += 1;
        }
    }

    /// Fills the cache with a text. Returns the choice of the next token, unless the observer
    /// stopped or `text` gets no token.
    fn read<E: From<GenerateError>>(
        &mut self,
        prompt: &[u32],
        sampler: &mut Sampler,
        observe: &mut impl FnMut(Event) -> Result<ControlFlow<()>, E>,
        text: &mut Generated,
    ) -> Result<Option<Pending>, E> {
        let (tokens, capacity) = (prompt.len() as u64, self.cache.capacity());
        if tokens > capacity.into() {
            let max_position_embeddings = self.session.model.config().max_position_embeddings;
            return Err(GenerateError::TooLong { tokens, capacity, max_position_embeddings }.into());
        }
        // The last token passes through the model again, because its logits were not kept.
        let (_, before_last) = prompt.split_last().ok_or(GenerateError::NoPrompt)?;
        let same = before_last.iter().zip(&self.cached).take_while(|(a, b)| a == b).count();
        self.cached.truncate(same);
        loop {
            let rest = prompt.get(self.cached.len()..).unwrap_or_default();
            let (chunk, later) = rest.split_at(rest.len().min(self.session.memory.sizes().tokens.max(1) as usize));
            let pending = self.submit(NewTokens::Known(chunk), prompt.len(), later.is_empty().then_some(&mut *sampler))?;
            self.cached.extend_from_slice(chunk);
            text.prompt_tokens = (self.cached.len() - same) as u64;
            if later.is_empty() {
                return Ok(pending);
            }
            if observe(Event::Read(text.prompt_tokens))?.is_break() {
                return Ok(None);
            }
        }
    }

    /// Submits the pass of the token that the device has chosen, and the choice after it.
    fn submit_next(&mut self, sampler: &mut Sampler) -> Result<Pending, GenerateError> {
        let token = self.chooser.token().clone();
        let length = self.cached.len() + 1;
        let pending = self.submit(NewTokens::Chosen(&token), length, Some(sampler))?;
        pending.ok_or(SamplingError::NoToken.into())
    }

    /// Submits a pass over tokens of a text of `length` tokens, for which the cache must have room.
    /// With a sampler, the pass ends with the choice of the next token.
    fn submit(
        &mut self,
        tokens: NewTokens<'_>,
        length: usize,
        sampler: Option<&mut Sampler>,
    ) -> Result<Option<Pending>, GenerateError> {
        let (past, length) = (Past { cache: &self.cache, tokens: self.cached.len() as u32 }, length as u32);
        let Some(sampler) = sampler else {
            self.session.extend(tokens, past, length, None)?.submit().map_err(ModelError::from)?;
            return Ok(None);
        };
        let before = sampler.clone();
        let draw = sampler.draw();
        let logits = self.chooser.next_logits();
        let commands = self.session.extend(tokens, past, length, Some(&logits))?;
        let read = self.chooser.submit(commands, &logits, &sampler.rules(draw)).map_err(ModelError::from)?;
        let inputs = match tokens {
            NewTokens::Known(tokens) => tokens.len(),
            NewTokens::Chosen(_) => 1,
        };
        Ok(Some(Pending { read, logits, draw, before, inputs, length }))
    }

    /// Waits for a choice, whose inputs are the last tokens of the cache. If the device is not
    /// certain, the host chooses from the same logits, and replaces `next`, the pass after it.
    fn finish(&mut self, pending: Pending, next: &mut Option<Pending>, sampler: &mut Sampler) -> Result<u32, GenerateError> {
        let Pending { read, logits, draw, inputs, length, .. } = pending;
        let choice = Chooser::finish(read).map_err(ModelError::from)?;
        if choice.certain {
            return Ok(choice.token);
        }
        let logits = logits.read(self.session.model.gpu()).map_err(ModelError::from)?;
        if !logits.iter().all(|x| x.is_finite()) {
            let past = self.cached.len().saturating_sub(inputs);
            let tokens = self.cached.split_off(past);
            let past = Past { cache: &self.cache, tokens: past as u32 };
            return Err(self.session.not_finite(&tokens, past, length).into());
        }
        let token = sampler.choose(&logits, draw)?;
        if token != choice.token {
            self.chooser.set_token(self.session.model.gpu(), token).map_err(ModelError::from)?;
            if let Some(wrong) = next.take() {
                *sampler = wrong.before;
                *next = Some(self.submit_next(sampler)?);
            }
        }
        Ok(token)
    }
}

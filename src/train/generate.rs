//! Text from a model: a prompt read into a cache of keys and values, then token after token.

use std::ops::ControlFlow;
use std::time::Instant;

use thiserror::Error;

use super::TrainError;
use super::adapter::Adapter;
use super::gpu_adapter::GpuAdapter;
use super::kv_cache::KvCache;
use super::model::{Model, read_config};
use super::sampling::{Sampler, SamplingError};
use super::session::Session;
use super::workspace::{Memory, Sizes, WorkspaceBytes};
use crate::dequant::stream::{PackSource, StreamError, StreamOptions, StreamPlan, default_budget};
use crate::gpu::Gpu;

/// Tokens of a prompt that go through the model together.
const CHUNK: u32 = 256;

/// Why there is no text.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum GenerateError {
    /// The model cannot be run.
    #[error(transparent)]
    Train(#[from] TrainError),
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
    },
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
    /// Seconds for the text.
    pub seconds: f64,
}

impl Generated {
    /// How fast the text came.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens.len() as f64 / self.seconds.max(1e-9)
    }
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
    /// [`GenerateError::Budget`]; [`TrainError::Config`] where `capacity` passes what the model's layers see; what is wrong with pack
    /// or adapter, and what the device cannot.
    pub fn open(
        gpu: &Gpu,
        pack: PackSource,
        adapter: Option<&Adapter>,
        eos: Option<u32>,
        capacity: u32,
        budget: Option<u64>,
    ) -> Result<Self, GenerateError> {
        let config = read_config(&pack)?;
        let rank = adapter.map_or(0, |adapter| adapter.layout.rank());
        let sizes = Sizes { tokens: CHUNK.min(capacity.max(1)), rank, dropout: false, training: false };
        let parameters = adapter.map_or(0, |adapter| 4 * adapter.layout.parameters());
        let beside = KvCache::bytes(&config, capacity) + WorkspaceBytes::of(&config, sizes).total() + parameters;
        let budget = budget.or_else(|| default_budget(gpu));
        let weights = budget.map(|budget| budget.saturating_sub(beside));
        let options = StreamOptions { budget: weights, ..StreamOptions::default() };
        let model = Model::new(gpu, pack, capacity, &options).map_err(|error| match error {
            TrainError::Stream(StreamError::Budget { needed, .. }) => {
                GenerateError::Budget { budget: budget.unwrap_or_default(), needed: needed + beside, capacity }
            }
            error => error.into(),
        })?;
        let adapter = adapter.map(|a| GpuAdapter::new(gpu, &a.config, &a.layout, &a.vector, false)).transpose()?;
        let memory = Memory::new(gpu, &config, sizes).map_err(TrainError::from)?;
        let cache = KvCache::new(gpu, &config, capacity)?;
        let ends = config.eos_token_ids.iter().copied().chain(eos).collect();
        Ok(Self { session: Session { model, adapter, memory }, cache, cached: Vec::new(), ends })
    }

    /// How the layers go through GPU memory.
    pub fn plan(&self) -> &StreamPlan {
        self.session.model.plan()
    }

    /// Goes on after `prompt`, all of the text so far, with `max_tokens` tokens at most; of what earlier calls have left in the cache,
    /// the start that is the same is used again. `show` gets every token and says whether to go on.
    ///
    /// # Errors
    /// [`GenerateError`], and what `show` gives.
    pub fn answer<E: From<GenerateError>>(
        &mut self,
        prompt: &[u32],
        max_tokens: u32,
        sampler: &mut Sampler,
        mut show: impl FnMut(u32) -> Result<ControlFlow<()>, E>,
    ) -> Result<Generated, E> {
        let start = Instant::now();
        let (mut logits, prompt_tokens) = self.read(prompt)?;
        let prompt_seconds = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let mut tokens = Vec::new();
        let ending = loop {
            if tokens.len() as u64 >= max_tokens.into() {
                break Ending::MaxTokens;
            }
            let token = sampler.sample(&logits).map_err(GenerateError::from)?;
            if self.ends.contains(&token) {
                break Ending::EndToken;
            }
            tokens.push(token);
            if show(token)?.is_break() {
                break Ending::Stopped;
            }
            // Nobody asks what follows the last token.
            if (tokens.len() as u64) < max_tokens.into() {
                if self.cached.len() as u64 >= self.cache.capacity().into() {
                    break Ending::ContextFull;
                }
                logits = self.advance(&[token])?;
            }
        };
        let seconds = start.elapsed().as_secs_f64();
        Ok(Generated { tokens, prompt_tokens, ending, prompt_seconds, seconds })
    }

    /// Brings a text into the cache; the logits of its next token, and how many tokens were new.
    fn read(&mut self, text: &[u32]) -> Result<(Vec<f32>, u64), GenerateError> {
        let (tokens, capacity) = (text.len() as u64, self.cache.capacity());
        if tokens > capacity.into() {
            return Err(GenerateError::TooLong { tokens, capacity });
        }
        // The last token is read again: its logits are not kept.
        let before_last = text.get(..text.len().saturating_sub(1)).unwrap_or_default();
        let same = before_last.iter().zip(&self.cached).take_while(|(a, b)| a == b).count();
        self.cached.truncate(same);
        let new = text.get(same..).unwrap_or_default();
        let mut logits = Err(GenerateError::NoPrompt);
        for chunk in new.chunks(self.session.memory.sizes().tokens.max(1) as usize) {
            logits = Ok(self.advance(chunk)?);
        }
        Ok((logits?, new.len() as u64))
    }

    /// Brings further tokens, for which there is room, into the cache; the logits of the next one.
    fn advance(&mut self, tokens: &[u32]) -> Result<Vec<f32>, GenerateError> {
        let past = self.cached.len() as u32;
        let logits = self.session.next_logits(tokens, &self.cache, past)?;
        self.cached.extend_from_slice(tokens);
        Ok(logits)
    }
}

//! Text from a model: a prompt read into a cache of keys and values, then token after token.

use std::ops::ControlFlow;
use std::time::Instant;

use thiserror::Error;

use super::TrainError;
use super::config::ModelConfig;
use super::model::Model;
use super::ops::Mat;
use super::sampling::{Sampler, SamplingError};
use crate::gpu::{Commands, Gpu, GpuError};

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

/// The keys (rotated) and values of the tokens of one text, of every layer: [capacity, kv_heads * head_dim] each, in float32.
#[derive(Debug)]
pub struct KvCache {
    layers: Vec<[Mat; 2]>,
    capacity: u32,
}

impl KvCache {
    /// Memory for `capacity` tokens.
    ///
    /// # Errors
    /// [`GpuError::TooLarge`], [`GpuError::OutOfMemory`].
    pub fn new(gpu: &Gpu, model: &ModelConfig, capacity: u32) -> Result<Self, GpuError> {
        let mat = |name| Mat::new(gpu, name, capacity, model.keys());
        let layers = (0..model.layers).map(|_| Ok([mat("cached keys")?, mat("cached values")?]));
        Ok(Self { layers: layers.collect::<Result<_, GpuError>>()?, capacity })
    }

    /// Bytes of a cache.
    pub fn bytes(model: &ModelConfig, capacity: u32) -> u64 {
        2 * 4 * u64::from(model.layers) * u64::from(model.keys()) * u64::from(capacity)
    }

    /// Tokens that it has room for.
    pub fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Keys and values of a layer.
    pub(super) fn layer(&self, number: u32) -> Option<&[Mat; 2]> {
        self.layers.get(number as usize)
    }
}

/// A text that a model goes on with.
#[derive(Debug)]
pub struct Session {
    model: Model,
    cache: KvCache,
    /// The tokens in the cache.
    cached: Vec<u32>,
    /// Tokens that end a text.
    ends: Vec<u32>,
}

impl Session {
    /// The model's last layer makes no part of a text end but its own end tokens, and `eos`, that of the tokenizer.
    ///
    /// # Errors
    /// [`TrainError::Config`] where `capacity` passes what the model's layers see; [`TrainError::Gpu`].
    pub fn new(model: Model, eos: Option<u32>, capacity: u32) -> Result<Self, TrainError> {
        todo!()
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
            if self.cached.len() as u64 >= self.cache.capacity().into() {
                break Ending::ContextFull;
            }
            logits = self.advance(&[token])?;
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
        for chunk in new.chunks(CHUNK as usize) {
            logits = Ok(self.advance(chunk)?);
        }
        Ok((logits?, new.len() as u64))
    }

    /// Brings at most [`CHUNK`] further tokens, for which there is room, into the cache; the logits of the next one.
    fn advance(&mut self, tokens: &[u32]) -> Result<Vec<f32>, GenerateError> {
        let past = self.cached.len() as u32;
        let logits = self.model.next_logits(tokens, past, &self.cache)?;
        self.cached.extend_from_slice(tokens);
        Ok(logits)
    }
}

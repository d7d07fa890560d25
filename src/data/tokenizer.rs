//! The tokenizer of a pack, with its special tokens and its chat template.

use std::fmt;
use std::ops::Range;

use serde_json::{Map, Value};

use super::DataError;
use super::template::ChatTemplate;
use crate::arch::config::ModelConfig;

/// The special tokens that chat templates know as variables.
const TEMPLATE_TOKENS: [&str; 4] = ["bos_token", "eos_token", "pad_token", "unk_token"];

/// The files of a pack that text is tokenised by.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenizerFiles<'a> {
    /// tokenizer.json.
    pub tokenizer: &'a [u8],
    /// tokenizer_config.json.
    pub config: Option<&'a [u8]>,
    /// chat_template.jinja, which goes before the template of tokenizer_config.json.
    pub chat_template: Option<&'a [u8]>,
}

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: &'static str,
    /// What is said.
    pub content: String,
}

/// Text to tokens and back.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pub(super) template: Option<ChatTemplate>,
    /// The token that ends a text.
    eos: Option<u32>,
    vocab: u32,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { inner: _, template, eos, vocab } = self;
        f.debug_struct("Tokenizer").field("template", template).field("eos", eos).field("vocab", vocab).finish()
    }
}

/// The tokens of a text, and the bytes of the text that each stands for; empty at 0 for tokens that are not in the text.
pub(super) struct Encoded {
    pub(super) tokens: Vec<u32>,
    pub(super) spans: Vec<Range<usize>>,
}

impl Tokenizer {
    /// Reads a pack's files. `now`, in seconds since the Unix epoch, is the date that some chat templates show to the model:
    /// one that is kept over a resumed training.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`], [`DataError::TokenizerConfig`], [`DataError::Template`].
    pub fn new(files: TokenizerFiles<'_>, model: &ModelConfig, now: i64) -> Result<Self, DataError> {
        let mut inner = tokenizers::Tokenizer::from_bytes(files.tokenizer).map_err(DataError::Tokenizer)?;
        // Cutting and padding are the trainer's: a tokenizer.json may ask for both.
        inner.with_truncation(None).map_err(DataError::Tokenizer)?;
        inner.with_padding(None);
        let config: Map<String, Value> = match files.config {
            Some(bytes) => serde_json::from_slice(bytes).map_err(DataError::TokenizerConfig)?,
            None => Map::new(),
        };
        let special = |name: &str| special_token(&config, name);
        let eos = special("eos_token").and_then(|token| inner.token_to_id(&token));
        let source = match files.chat_template {
            Some(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
            None => chat_template(&config),
        };
        let tokens = TEMPLATE_TOKENS.iter().filter_map(|&name| Some((name.to_owned(), special(name)?))).collect();
        let template = source.map(|source| ChatTemplate::new(&source, tokens, now)).transpose();
        Ok(Self {
            inner,
            template: template.map_err(DataError::Template)?,
            eos: eos.or(model.eos_token_ids.first().copied()),
            vocab: model.vocab,
        })
    }

    /// The token that ends a text, if the model has one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether there is a chat template.
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// Tokens of a text; with `special`, those that the tokenizer puts around every text, such as that of its beginning.
    ///
    /// # Errors
    /// [`DataError::Encode`]; [`DataError::TokenId`] for a token that the model does not have.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, DataError> {
        self.encode_spans(text, special).map(|encoded| encoded.tokens)
    }

    pub(super) fn encode_spans(&self, text: &str, special: bool) -> Result<Encoded, DataError> {
        let encoding = self.inner.encode(text, special).map_err(DataError::Encode)?;
        let tokens = encoding.get_ids().to_vec();
        if let Some(&id) = tokens.iter().find(|&&id| id >= self.vocab) {
            return Err(DataError::TokenId { id, vocab: self.vocab });
        }
        Ok(Encoded { tokens, spans: encoding.get_offsets().iter().map(|&(start, end)| start..end).collect() })
    }

    /// The text of tokens, special ones included.
    ///
    /// # Errors
    /// [`DataError::Encode`].
    pub fn decode(&self, tokens: &[u32]) -> Result<String, DataError> {
        self.inner.decode(tokens, false).map_err(DataError::Encode)
    }

    /// The text of tokens without special ones.
    pub(super) fn decode_words(&self, tokens: &[u32]) -> Result<String, DataError> {
        self.inner.decode(tokens, true).map_err(DataError::Encode)
    }

    /// Tokens of a conversation up to where the assistant's answer starts.
    ///
    /// # Errors
    /// [`DataError::NoChatTemplate`]; [`DataError::Chat`], for many templates refuse orders of roles; [`DataError::Encode`],
    /// [`DataError::TokenId`].
    pub fn chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>, DataError> {
        let template = self.template.as_ref().ok_or(DataError::NoChatTemplate)?;
        let value = |m: &Message| minijinja::Value::from_pairs([("role", m.role), ("content", m.content.as_str())]);
        let messages: Vec<_> = messages.iter().map(value).collect();
        let text = template.render(&messages, &().into(), true).map_err(DataError::Chat)?;
        // A template writes the special tokens itself.
        self.encode(&text, false)
    }
}

/// A special token of tokenizer_config.json: a string, or an object with its `content`.
fn special_token(config: &Map<String, Value>, name: &str) -> Option<String> {
    let value = config.get(name)?;
    value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
}

/// The template of tokenizer_config.json: a string, or the one named `default` of a list.
fn chat_template(config: &Map<String, Value>) -> Option<String> {
    let found = config.get("chat_template")?;
    let default = |entry: &&Value| entry.get("name").and_then(Value::as_str) == Some("default");
    let listed = || found.as_array()?.iter().find(default)?.get("template")?.as_str();
    found.as_str().or_else(listed).map(str::to_owned)
}

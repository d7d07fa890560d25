//! The tokenizer of a pack, with its special tokens and its chat template.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use tokenizers::{DecoderWrapper, ModelWrapper, NormalizerWrapper, PostProcessorWrapper, TokenizerImpl};

use super::components;
use super::components::error::TokenizerError;
use super::error::DataError;
use super::files::TokenizerFiles;
use super::jinja::{TemplateError, Value};
use super::special::{SpecialTokens, chat_templates};
use super::split::PreTokenizers;
use super::template::ChatTemplate;
use crate::arch::config::ModelConfig;
use crate::panics::caught;

/// The template of conversations, and that of conversations with tools.
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: &'static str,
    /// Its text.
    pub content: String,
}

/// The library's tokenizer, with the pre-tokenizers of this module.
type Inner = TokenizerImpl<ModelWrapper, NormalizerWrapper, PreTokenizers, PostProcessorWrapper, DecoderWrapper>;

/// Text to tokens and back. A clone is cheap.
#[derive(Clone)]
pub struct Tokenizer {
    inner: Arc<Inner>,
    /// The chat templates that are used, by name; one that is broken is an error where it is
    /// needed.
    templates: Arc<[(String, Result<ChatTemplate, TemplateError>)]>,
    /// The token that ends a text.
    eos: Option<u32>,
    /// All tokens that generation stops at.
    ends: Vec<u32>,
    /// The tokens that the tokenizer adds before and after every text.
    around: [Vec<u32>; 2],
    vocab: u32,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { inner: _, templates, eos, ends, around, vocab } = self;
        let mut fields = f.debug_struct("Tokenizer");
        fields.field("templates", templates).field("eos", eos).field("ends", ends);
        fields.field("around", around).field("vocab", vocab).finish()
    }
}

/// The tokens of a text, and the bytes of the text for each; `0..0` for tokens that the tokenizer
/// added.
pub(super) struct Encoded {
    pub(super) tokens: Vec<u32>,
    pub(super) spans: Vec<Range<usize>>,
    /// Whether the text begins with what the tokenizer puts before every text; it is there once.
    pub(super) doubled_bos: bool,
}

/// What a piece is of a text that is tokenised piece by piece.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// It is the first one.
    pub(super) first: bool,
    /// It is the last one.
    pub(super) last: bool,
}

impl Tokenizer {
    /// Reads a pack's files. `now`, in seconds since the Unix epoch, is the date that some chat
    /// templates write; a resumed run keeps it.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`], [`DataError::TokenizerRefused`], [`DataError::TokenizerJson`].
    pub(crate) fn new(files: TokenizerFiles<'_>, model: &ModelConfig, now: i64) -> Result<Self, DataError> {
        components::check(files.tokenizer).map_err(|flaw| match flaw {
            TokenizerError::Json(error) => DataError::Tokenizer(error.into()),
            flaw => DataError::TokenizerRefused(flaw),
        })?;
        let special = SpecialTokens::read(&files)?;
        let inner = without_panic(|| loaded(files.tokenizer, &special, model.vocab)).map_err(DataError::Tokenizer)?;
        let eos = special.get("eos_token").and_then(|token| inner.token_to_id(&token)).filter(|&eos| eos < model.vocab);
        let variables: Arc<[(String, Value)]> = special.variables().into();
        let sources = chat_templates(&files, &special)?;
        let compiled = |(name, source): (String, String)| (name, ChatTemplate::new(&source, variables.clone(), now));
        Ok(Self {
            templates: sources.into_iter().map(compiled).collect(),
            eos: eos.or(model.eos_token_ids.first().copied()),
            ends: model.eos_token_ids.iter().copied().chain(eos).collect(),
            around: tokens_around(&inner)?,
            vocab: model.vocab,
            inner: inner.into(),
        })
    }

    /// The token that ends a text, if the model has one.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Whether generation stops at a token.
    pub(super) fn is_end(&self, token: u32) -> bool {
        self.ends.contains(&token)
    }

    /// The tokens that generation stops at, as texts have them.
    pub(super) fn end_tokens(&self) -> Vec<String> {
        self.ends.iter().filter_map(|&id| self.inner.id_to_token(id)).collect()
    }

    /// Whether there is a chat template.
    pub fn has_template(&self) -> bool {
        !self.templates.is_empty()
    }

    /// Whether a chat template may read a key of messages, such as `messages[].name`.
    pub(super) fn may_read(&self, key: &str) -> bool {
        let name = key.rsplit('.').next().unwrap_or(key);
        self.templates.iter().any(|(_, template)| template.as_ref().is_ok_and(|template| template.mentions(name)))
    }

    /// The chat template of a conversation: `tool_use` where tools are given, if there is one of
    /// that name, or else `default`.
    ///
    /// # Errors
    /// [`DataError::NoChatTemplate`], [`DataError::NoDefaultTemplate`], [`DataError::Template`].
    pub(super) fn template(&self, tools: &Value) -> Result<&ChatTemplate, DataError> {
        let named = |name: &str| self.templates.iter().find(|(known, _)| known == name).map(|(_, template)| template);
        let with_tools = if tools.is_none() { None } else { named(TOOL_USE) };
        match with_tools.or_else(|| named(DEFAULT)) {
            Some(Ok(template)) => Ok(template),
            Some(Err(error)) => Err(DataError::of_template(error.clone(), DataError::Template)),
            None if self.templates.is_empty() => Err(DataError::NoChatTemplate),
            None => {
                let names = self.templates.iter().map(|(name, _)| name.clone()).collect();
                Err(DataError::NoDefaultTemplate { names })
            }
        }
    }

    /// Tokens of a text; with `special`, also the tokens that the tokenizer adds to every text,
    /// such as BOS.
    ///
    /// # Errors
    /// [`DataError::Encode`]; [`DataError::TokenId`] for a token that the model does not have.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, DataError> {
        self.encode_spans(text, special).map(|encoded| encoded.tokens)
    }

    pub(super) fn encode_spans(&self, text: &str, special: bool) -> Result<Encoded, DataError> {
        let encoding = without_panic(|| self.inner.encode(text, special)).map_err(DataError::Encode)?;
        let mut tokens = encoding.get_ids().to_vec();
        let mut spans: Vec<Range<usize>> = encoding.get_offsets().iter().map(|&(start, end)| start..end).collect();
        let mut doubled_bos = false;
        if special {
            let single = self.without_doubled(&tokens);
            doubled_bos = single.start > 0;
            tokens = tokens.get(single.clone()).unwrap_or_default().to_vec();
            spans = spans.get(single).unwrap_or_default().to_vec();
        }
        if let Some(&id) = tokens.iter().find(|&&id| id >= self.vocab) {
            let token = self.inner.id_to_token(id).unwrap_or_default();
            return Err(DataError::TokenId { line: None, id, token, vocab: self.vocab });
        }
        Ok(Encoded { tokens, spans, doubled_bos })
    }

    /// Tokens of a piece of a text. The tokens that the tokenizer adds to every text stand before
    /// the first piece and after the last one.
    pub(super) fn encode_piece(&self, piece: &str, place: Place) -> Result<Encoded, DataError> {
        if place.first && place.last {
            return self.encode_spans(piece, true);
        }
        let mut encoded = self.encode_spans(piece, false)?;
        let [before, after] = &self.around;
        if place.first {
            encoded.doubled_bos = !before.is_empty() && encoded.tokens.starts_with(before);
            let missing = if encoded.doubled_bos { 0 } else { before.len() };
            encoded.tokens.splice(0..0, before.iter().copied().take(missing));
        }
        if place.last && !encoded.tokens.ends_with(after) {
            encoded.tokens.extend(after);
        }
        Ok(encoded)
    }

    /// The range of tokens without a second BOS or EOS: a tokenizer also adds them to a text that
    /// has them already.
    fn without_doubled(&self, tokens: &[u32]) -> Range<usize> {
        let [before, after] = &self.around;
        let rest = tokens.strip_prefix(before.as_slice()).unwrap_or_default();
        let start = if !before.is_empty() && rest.starts_with(before) { before.len() } else { 0 };
        let rest = tokens.get(start..).and_then(|tokens| tokens.strip_suffix(after.as_slice())).unwrap_or_default();
        let end = if !after.is_empty() && rest.ends_with(after) { after.len() } else { 0 };
        start..tokens.len() - end
    }

    /// The text of tokens, special ones included.
    ///
    /// # Errors
    /// [`DataError::Encode`].
    pub fn decode(&self, tokens: &[u32]) -> Result<String, DataError> {
        without_panic(|| self.inner.decode(tokens, false)).map_err(DataError::Encode)
    }

    /// The text of tokens without special ones.
    pub(super) fn decode_words(&self, tokens: &[u32]) -> Result<String, DataError> {
        without_panic(|| self.inner.decode(tokens, true)).map_err(DataError::Encode)
    }

    /// Tokens of a conversation up to the start of the assistant's answer.
    ///
    /// # Errors
    /// [`DataError::NoChatTemplate`], [`DataError::NoDefaultTemplate`], [`DataError::Template`];
    /// [`DataError::Chat`] (many templates refuse some orders of roles); [`DataError::Encode`],
    /// [`DataError::TokenId`].
    pub fn chat_prompt(&self, messages: &[Message]) -> Result<Vec<u32>, DataError> {
        let template = self.template(&Value::None)?;
        let text = template
            .render(&values(messages), &Value::None, true)
            .map_err(|source| DataError::of_template(source, DataError::Chat))?;
        // A template writes the special tokens itself.
        self.encode(&text, false)
    }
}

/// Runs work of the library; a panic is an error. It indexes and unwraps by what a file has.
fn without_panic<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> tokenizers::Result<T> {
    caught(work).unwrap_or_else(|message| Err(format!("the library tokenizers stopped: {message}").into()))
}

/// The tokenizer of a tokenizer.json that was checked.
fn loaded(json: &[u8], special: &SpecialTokens, vocab: u32) -> tokenizers::Result<Inner> {
    let mut inner: Inner = serde_json::from_slice(json)?;
    // The trainer cuts and pads; a tokenizer.json may have settings for both.
    inner.with_truncation(None)?;
    inner.with_padding(None);
    add_tokens(&mut inner, special, vocab)?;
    inner.set_encode_special_tokens(special.are_split());
    Ok(inner)
}

/// Adds the tokens that other files have and tokenizer.json lacks, as transformers does. A special
/// token without a row in the model is not added: the text of such a token is split.
fn add_tokens(inner: &mut Inner, special: &SpecialTokens, vocab: u32) -> tokenizers::Result<()> {
    let added = special.added(|token| inner.get_added_vocabulary().get_vocab().contains_key(token));
    inner.add_tokens(added)?;
    // All at once: the library builds its tables again with every call.
    let (mut next, mut new, mut seen) = (inner.get_vocab_size(true), Vec::new(), HashSet::new());
    for token in special.special() {
        let is_known = inner.get_added_vocabulary().get_vocab().contains_key(&token.content);
        if is_known || token.content.is_empty() || !seen.insert(token.content.clone()) {
            continue;
        }
        let own = inner.token_to_id(&token.content);
        if own.map_or(next, |id| id as usize) < vocab as usize {
            next += usize::from(own.is_none());
            new.push(token);
        }
    }
    inner.add_tokens(new)?;
    Ok(())
}

/// Messages as templates read them.
pub(super) fn values(messages: &[Message]) -> Vec<Value> {
    let value = |m: &Message| Value::from_pairs([("role", m.role), ("content", m.content.as_str())]);
    messages.iter().map(value).collect()
}

/// The tokens that a tokenizer adds before and after every text, found with a text of one letter.
fn tokens_around(inner: &Inner) -> Result<[Vec<u32>; 2], DataError> {
    let encode = |special| {
        let encoding = without_panic(|| inner.encode("a", special));
        encoding.map(|encoding| encoding.get_ids().to_vec()).map_err(DataError::Encode)
    };
    let (with, without) = (encode(true)?, encode(false)?);
    let start = with.windows(without.len().max(1)).position(|window| window == without);
    Ok(start.map_or_else(Default::default, |start| {
        let (before, rest) = with.split_at(start);
        [before, rest.get(without.len()..).unwrap_or_default()].map(<[u32]>::to_vec)
    }))
}

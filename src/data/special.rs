//! The special tokens and chat templates of a tokenizer's files, as transformers reads them.

use std::collections::HashSet;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::components::MAX_ADDED_TOKENS;
use super::error::DataError;
use super::files::TokenizerFiles;
use super::jinja::Value as TemplateValue;

/// The special tokens that transformers knows by name.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// The list of further special tokens.
const ADDITIONAL: &str = "additional_special_tokens";
/// Keys with further special tokens: lists, or objects with names.
const EXTRA: [&str; 3] = ["extra_special_tokens", "model_specific_special_tokens", ADDITIONAL];
/// Tokens that the tokenizer finds in a text before it splits the text, by their indices.
const DECODER: &str = "added_tokens_decoder";

/// Bytes of a file next to tokenizer.json, at most. The largest ones have some 6 MB.
const MAX_BYTES: usize = 16 << 20;

/// The files that have special tokens; if the first one lacks a token, the second one may have it.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    files: [Map<String, Value>; 2],
    /// The tokens of `added_tokens_decoder`. They go before those of tokenizer.json.
    decoder: Option<Vec<AddedToken>>,
    /// The tokens of added_tokens.json.
    listed: Map<String, Value>,
}

impl SpecialTokens {
    /// # Errors
    /// [`DataError::TokenizerJson`], [`DataError::TokenizerFile`].
    pub(super) fn read(files: &TokenizerFiles<'_>) -> Result<Self, DataError> {
        let config = object("tokenizer_config.json", files.config)?;
        let map = object("special_tokens_map.json", files.special_tokens_map)?;
        let decoder = config.get(DECODER).and_then(Value::as_object).map(in_order);
        let listed = object("added_tokens.json", files.added_tokens.filter(|_| decoder.is_none()))?;
        let files = if decoder.is_some() { [config, map] } else { [map, config] };
        Ok(Self { files, decoder, listed })
    }

    /// A special token by its name.
    pub(super) fn get(&self, name: &str) -> Option<String> {
        self.files.iter().find_map(|file| text(file.get(name)?))
    }

    /// Whether special tokens in a text are split as words are.
    pub(super) fn are_split(&self) -> bool {
        self.files.iter().any(|file| file.get("split_special_tokens") == Some(&Value::Bool(true)))
    }

    /// The tokens that the tokenizer must find in a text before it splits the text, in the order in
    /// which transformers adds them. `is_known` says whether tokenizer.json has such a token.
    pub(super) fn added(&self, is_known: impl Fn(&str) -> bool) -> Vec<AddedToken> {
        match &self.decoder {
            Some(decoder) => decoder.clone(),
            None => self.listed().into_iter().filter(|token| !is_known(&token.content)).collect(),
        }
    }

    /// The tokens of added_tokens.json in the order of their indices.
    fn listed(&self) -> Vec<AddedToken> {
        let special: HashSet<String> = self.special().into_iter().map(|token| token.content).collect();
        let mut listed: Vec<(u64, &String)> =
            self.listed.iter().filter_map(|(token, index)| Some((index.as_u64()?, token))).collect();
        listed.sort_unstable();
        listed.into_iter().map(|(_, token)| AddedToken::from(token.as_str(), special.contains(token.as_str()))).collect()
    }

    /// All special tokens: those with names, then the others.
    pub(super) fn special(&self) -> Vec<AddedToken> {
        let keys = || self.files.iter().flat_map(Map::keys).map(String::as_str);
        let models = keys().filter(|key| key.ends_with("_token") && !NAMED.contains(key));
        let named = NAMED.into_iter().chain(models);
        let named = named.filter_map(|name| self.files.iter().find_map(|file| added_token(file.get(name)?, true)));
        let extra = self.files.iter().flat_map(|file| EXTRA.iter().filter_map(|key| file.get(*key)));
        let extra = extra.flat_map(|extra| match extra {
            Value::Array(tokens) => tokens.iter().collect::<Vec<_>>(),
            Value::Object(tokens) => tokens.values().collect(),
            _ => Vec::new(),
        });
        named.chain(extra.filter_map(|token| added_token(token, true))).collect()
    }

    /// The variables that chat templates have of them: every token by its name, and the list of
    /// tokens without a name.
    pub(super) fn variables(&self) -> Vec<(String, TemplateValue)> {
        let keys = self.files.iter().flat_map(Map::keys).filter(|key| key.ends_with("_token")).map(String::as_str);
        let mut names: Vec<&str> = NAMED.into_iter().chain(keys).collect();
        names.sort_unstable();
        names.dedup();
        let mut variables: Vec<(String, TemplateValue)> =
            names.into_iter().filter_map(|name| Some((name.to_owned(), self.get(name)?.into()))).collect();
        let nested = self.files.iter().flat_map(|file| EXTRA.iter().filter_map(|key| file.get(*key)?.as_object()));
        let mut known: HashSet<String> = variables.iter().map(|(name, _)| name.clone()).collect();
        for (name, token) in nested.flatten() {
            let Some(token) = text(token).filter(|_| !known.contains(name)) else { continue };
            known.insert(name.clone());
            variables.push((name.clone(), token.into()));
        }
        let listed = self.files.iter().find_map(|file| file.get(ADDITIONAL)?.as_array());
        variables.extend(listed.map(|tokens| {
            let tokens: Vec<TemplateValue> = tokens.iter().filter_map(text).map(TemplateValue::from).collect();
            (ADDITIONAL.to_owned(), tokens.into())
        }));
        variables
    }
}

/// A special token: a string, or an object with its `content`.
fn text(token: &Value) -> Option<String> {
    token.as_str().or_else(|| token.get("content")?.as_str()).map(str::to_owned)
}

/// A token as the tokenizer finds it in a text. A string gets the defaults of transformers.
fn added_token(token: &Value, is_special: bool) -> Option<AddedToken> {
    let flag = |name: &str| token.get(name).and_then(Value::as_bool);
    let special = is_special || flag("special").unwrap_or_default();
    let mut added = AddedToken::from(text(token)?, special);
    added.single_word = flag("single_word").unwrap_or(added.single_word);
    added.lstrip = flag("lstrip").unwrap_or(added.lstrip);
    added.rstrip = flag("rstrip").unwrap_or(added.rstrip);
    added.normalized = flag("normalized").unwrap_or(added.normalized);
    Some(added).filter(|added| !added.content.is_empty())
}

/// The tokens of `added_tokens_decoder` in the order of their indices.
fn in_order(decoder: &Map<String, Value>) -> Vec<AddedToken> {
    let mut tokens: Vec<(u64, AddedToken)> =
        decoder.iter().filter_map(|(index, token)| Some((index.parse().ok()?, added_token(token, false)?))).collect();
    tokens.sort_by_key(|(index, _)| *index);
    tokens.into_iter().map(|(_, token)| token).collect()
}

/// A file next to tokenizer.json: an object, with no more tokens than a tokenizer has.
fn object(file: &'static str, bytes: Option<&[u8]>) -> Result<Map<String, Value>, DataError> {
    let Some(bytes) = bytes else { return Ok(Map::new()) };
    let check = |what, found, limit| match found > limit {
        true => Err(DataError::TokenizerFile { file, what, found, limit }),
        false => Ok(()),
    };
    check("bytes", bytes.len(), MAX_BYTES)?;
    let object: Map<String, Value> =
        serde_json::from_slice(bytes).map_err(|source| DataError::TokenizerJson { file, source })?;
    let len = |value: &Value| value.as_array().map(Vec::len).or(value.as_object().map(Map::len)).unwrap_or_default();
    let lists = EXTRA.iter().chain([&DECODER]).filter_map(|key| object.get(*key));
    check("tokens", object.len() + lists.map(len).sum::<usize>(), MAX_ADDED_TOKENS)?;
    Ok(object)
}

/// The sources of a model's chat templates by their names. `default` and `tool_use` have a meaning.
///
/// The files of additional_chat_templates go before chat_template.jinja, that before
/// tokenizer_config.json, and that before chat_template.json.
///
/// # Errors
/// [`DataError::TokenizerJson`], [`DataError::TokenizerFile`].
pub(super) fn chat_templates(
    files: &TokenizerFiles<'_>,
    special: &SpecialTokens,
) -> Result<Vec<(String, String)>, DataError> {
    let own = files.chat_template.map(|bytes| ("default", bytes));
    let mut templates: Vec<(String, String)> = Vec::new();
    let mut add = |name: &str, source: String| {
        if !templates.iter().any(|(known, _)| known == name) {
            templates.push((name.to_owned(), source));
        }
    };
    for (name, bytes) in files.additional_templates.iter().copied().chain(own) {
        add(name, String::from_utf8_lossy(bytes).into_owned());
    }
    // A file with the default template replaces all that the JSON files have.
    if own.is_none() {
        let processor = object("chat_template.json", files.processor_template)?;
        let listed =
            special.files.iter().chain([&processor]).find_map(|file| file.get("chat_template").filter(|t| !t.is_null()));
        listed.map(named_templates).unwrap_or_default().into_iter().for_each(|(name, source)| add(&name, source));
    }
    Ok(templates)
}

/// A template, or a list or map of templates with names.
fn named_templates(value: &Value) -> Vec<(String, String)> {
    let pair = |name: &str, source: &Value| Some((name.to_owned(), source.as_str()?.to_owned()));
    match value {
        Value::String(source) => vec![("default".to_owned(), source.clone())],
        Value::Array(entries) => {
            entries.iter().filter_map(|entry| pair(entry.get("name")?.as_str()?, entry.get("template")?)).collect()
        }
        Value::Object(entries) => entries.iter().filter_map(|(name, source)| pair(name, source)).collect(),
        _ => Vec::new(),
    }
}

//! The special tokens and chat templates of a tokenizer's files, as transformers reads them.

use serde_json::{Map, Value};

use super::jinja::Value as TemplateValue;
use super::tokenizer::TokenizerFiles;
use super::{DataError, TokenizerFile};

/// The special tokens that transformers knows by name.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// The list of further special tokens.
const ADDITIONAL: &str = "additional_special_tokens";
/// Where further special tokens have names.
const WITH_NAMES: [&str; 2] = ["extra_special_tokens", "model_specific_special_tokens"];

/// The files that have special tokens; what the first one lacks, the second one may have.
#[derive(Debug)]
pub(super) struct SpecialTokens {
    config: Map<String, Value>,
    map: Map<String, Value>,
}

impl SpecialTokens {
    /// # Errors
    /// [`DataError::TokenizerJson`].
    pub(super) fn read(files: &TokenizerFiles<'_>) -> Result<Self, DataError> {
        Ok(Self {
            config: object(TokenizerFile::Config, files.config)?,
            map: object(TokenizerFile::SpecialTokensMap, files.special_tokens_map)?,
        })
    }

    /// A special token by its name.
    pub(super) fn get(&self, name: &str) -> Option<String> {
        [&self.config, &self.map].into_iter().find_map(|file| text(file.get(name)?))
    }

    /// The variables that chat templates have of them: every token by its name, and the list of
    /// those without one.
    pub(super) fn variables(&self) -> Vec<(String, TemplateValue)> {
        let files = [&self.config, &self.map];
        let keys = files.into_iter().flat_map(Map::keys).filter(|key| key.ends_with("_token")).map(String::as_str);
        let mut names: Vec<&str> = NAMED.into_iter().chain(keys).collect();
        names.sort_unstable();
        names.dedup();
        let mut variables: Vec<(String, TemplateValue)> =
            names.into_iter().filter_map(|name| Some((name.to_owned(), self.get(name)?.into()))).collect();
        let nested = files.into_iter().flat_map(|file| WITH_NAMES.iter().filter_map(|key| file.get(*key)?.as_object()));
        for (name, token) in nested.flatten() {
            let known = variables.iter().any(|(known, _)| known == name);
            variables.extend(text(token).filter(|_| !known).map(|token| (name.clone(), token.into())));
        }
        let listed = files.into_iter().find_map(|file| file.get(ADDITIONAL)?.as_array());
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

fn object(file: TokenizerFile, bytes: Option<&[u8]>) -> Result<Map<String, Value>, DataError> {
    match bytes {
        Some(bytes) => serde_json::from_slice(bytes).map_err(|source| DataError::TokenizerJson { file, source }),
        None => Ok(Map::new()),
    }
}

/// The sources of a model's chat templates by their names, of which `default` and `tool_use` have a
/// meaning.
///
/// Files of their own go before tokenizer_config.json, and that before chat_template.json.
///
/// # Errors
/// [`DataError::TokenizerJson`].
pub(super) fn chat_templates(
    files: &TokenizerFiles<'_>,
    special: &SpecialTokens,
) -> Result<Vec<(String, String)>, DataError> {
    let of_files = [("default", files.chat_template), ("tool_use", files.tool_use_template)];
    let mut templates: Vec<(String, String)> = Vec::new();
    for (name, bytes) in of_files {
        templates.extend(bytes.map(|bytes| (name.to_owned(), String::from_utf8_lossy(bytes).into_owned())));
    }
    let own_default = templates.iter().any(|(name, _)| name == "default");
    let processor = object(TokenizerFile::ChatTemplate, files.processor_template)?;
    let listed =
        [&special.config, &processor].into_iter().find_map(|file| file.get("chat_template").filter(|t| !t.is_null()));
    // A file with the default template replaces all that is listed.
    for (name, source) in listed.filter(|_| !own_default).map(named_templates).unwrap_or_default() {
        if !templates.iter().any(|(known, _)| *known == name) {
            templates.push((name, source));
        }
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

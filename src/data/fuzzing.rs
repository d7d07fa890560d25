//! What the fuzz targets call below the public API.

pub use super::files::TokenizerFiles;
pub use super::options::Options;
pub use super::sample::Dataset;

use super::error::DataError;
use super::file::DataFile;
use super::jinja::{TemplateError, Value};
use super::template::ChatTemplate;
use super::tokenizer::Tokenizer;
use crate::arch::config::ModelConfig;

/// The tokenizer of these files.
///
/// # Errors
/// As for the files of a pack.
pub fn tokenizer(files: TokenizerFiles<'_>, model: &ModelConfig) -> Result<Tokenizer, DataError> {
    Tokenizer::new(files, model, 0)
}

/// The samples of a file.
///
/// # Errors
/// As for the file of a training.
pub fn file_samples(file: &DataFile, tokenizer: &Tokenizer, options: Options) -> Result<Dataset, DataError> {
    file.samples(tokenizer, options, &mut |_, _| true)
}

/// What a chat template makes of a conversation, a JSON list of messages.
///
/// # Errors
/// What a pack's template would be refused for.
pub fn render(source: &str, messages: &str) -> Result<String, TemplateError> {
    let names = ["bos_token", "eos_token"].map(|name| (name.to_owned(), Value::from("<s>")));
    let template = ChatTemplate::new(source, names.into_iter().collect(), 0)?;
    let messages: Vec<Value> = serde_json::from_str(messages).unwrap_or_default();
    template.render(&messages, &Value::None, true)
}

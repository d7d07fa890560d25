//! Training data: files of people's forms, to tokens with a mark on those to be learned, to packed batches.

mod file;
mod formats;
mod pack;
mod sample;
mod show;
mod spans;
mod stream;
mod template;
mod tokenizer;

use std::path::PathBuf;

use thiserror::Error;

pub use file::DataFile;
pub use formats::Form;
pub use pack::{Batch, UNTRAINED, batch, epoch_order, rows};
pub use sample::{Cut, Dataset, Options, Sample, TrainOn};
pub use show::{Part, ShownSample, show_batch};
pub use stream::TokenStream;
pub use tokenizer::{Message, Tokenizer, TokenizerFiles};

/// Why data cannot be trained on. Lines count from 1.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DataError {
    /// What is wrong with a file.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<DataError>,
    },
    /// The caller asked to stop.
    #[error("stopped while the data was read; nothing was written")]
    Cancelled,
    /// Nothing but blank lines.
    #[error("the file has no samples")]
    Empty,
    /// One JSON array instead of a line for each sample.
    #[error("the file is a JSON array: write one object a line (jq -c '.[]' does it)")]
    Array,
    /// A line that is not JSON in UTF-8.
    #[error("line {line} is not JSON: {source}")]
    Json {
        /// The line.
        line: u64,
        /// Where it is broken.
        source: serde_json::Error,
    },
    /// A line with some other JSON value.
    #[error("line {line} is not a JSON object")]
    NotAnObject {
        /// The line.
        line: u64,
    },
    /// A first line without the keys of a known form.
    #[error(
        "line {line} has the keys of no known form: \"text\"; \"prompt\", \"completion\"; \"messages\"; \"instruction\", \
         \"output\"; \"conversations\"; it has {}", found.join(", ")
    )]
    UnknownForm {
        /// The line.
        line: u64,
        /// Its keys.
        found: Vec<String>,
    },
    /// A later line of another form.
    #[error("line {line} has no {}: every line has the form of the first one", form.keys().join("/"))]
    OtherForm {
        /// The line.
        line: u64,
        /// That of the first one.
        form: Form,
    },
    /// A value that is not what the form of the file has there.
    #[error("line {line}: {key:?} should be {expected}")]
    Value {
        /// The line.
        line: u64,
        /// The key.
        key: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Text that is not UTF-8.
    #[error("the text is not UTF-8 from byte {byte} on")]
    Utf8 {
        /// The first byte that is not.
        byte: u64,
    },
    /// tokenizer.json cannot be used.
    #[error("tokenizer.json: {0}")]
    Tokenizer(tokenizers::Error),
    /// tokenizer_config.json is not a JSON object.
    #[error("tokenizer_config.json is not a JSON object: {0}")]
    TokenizerConfig(serde_json::Error),
    /// The chat template is broken.
    #[error("the chat template is broken: {}", with_detail(.0))]
    Template(minijinja::Error),
    /// Conversations, and a model without a chat template.
    #[error("line {line} is a conversation, and the model has no chat template")]
    NoTemplate {
        /// The line.
        line: u64,
    },
    /// The chat template refuses a conversation.
    #[error("line {line}: the chat template refuses the conversation: {}", with_detail(.source))]
    Render {
        /// The line.
        line: u64,
        /// What it says.
        source: minijinja::Error,
    },
    /// A conversation to go on with, and a model without a chat template.
    #[error("the model has no chat template")]
    NoChatTemplate,
    /// The chat template refuses a conversation to go on with.
    #[error("the chat template refuses the conversation: {}", with_detail(.0))]
    Chat(minijinja::Error),
    /// Where the words of the assistant stand in the text cannot be told.
    #[error(
        "line {line}: the chat template changes what stands before message {message}, so that what the assistant says cannot be \
         told from the rest"
    )]
    Spans {
        /// The line.
        line: u64,
        /// The message, from 0.
        message: usize,
    },
    /// Text cannot be tokenised, or tokens not be read.
    #[error("the tokenizer: {0}")]
    Encode(tokenizers::Error),
    /// A token that the model does not have.
    #[error("the tokenizer has the token {id}, the model only {vocab}: they are not of one model")]
    TokenId {
        /// The token.
        id: u32,
        /// Tokens of the model.
        vocab: u32,
    },
    /// A share of the samples is to be held out, and there are not two.
    #[error("nothing can be held out for evaluation: the data is one sample")]
    NothingHeldOut,
    /// A sample from which nothing can be learned.
    #[error("line {line} has no token to be learned{}:\n{text}", cut_reason(*.length, *.max_length))]
    NothingTrained {
        /// The line.
        line: u64,
        /// Tokens before it was cut.
        length: u64,
        /// Tokens to which it was cut.
        max_length: u32,
        /// The sample as the model sees it.
        text: String,
    },
}

/// The message with the line of the template and what else minijinja knows.
fn with_detail(error: &minijinja::Error) -> String {
    format!("{error:#}")
}

fn cut_reason(length: u64, max_length: u32) -> String {
    if length <= u64::from(max_length) {
        return String::new();
    }
    format!(" within the maximum length of {max_length}: it has {length} tokens")
}

#[cfg(test)]
mod tests;

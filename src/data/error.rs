//! The errors of data.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::checksum::FileChecksum;
use super::components::error::TokenizerError;
use super::jinja::{ErrorKind, TemplateError};
use super::notice::SpanFlaw;

/// Why data cannot be used. Lines count from 1.
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
    /// The system starts no thread.
    #[error("the system starts no thread: {0}")]
    NoThread(io::Error),
    /// A thread ended in a panic.
    #[error("this is a bug in nf4pack: reading the data ended in a panic")]
    Panicked,
    /// The caller stopped the work.
    #[error("stopped while reading the data; nothing was written")]
    Cancelled,
    /// The system refuses to read on.
    #[error("cannot be read: {0}")]
    Read(io::Error),
    /// All lines are blank.
    #[error("the file has no samples")]
    Empty,
    /// The file was changed between the two times that it is read.
    #[error("the file changed while it was read: {0}")]
    Changed(Change),
    /// The samples take more memory than they may.
    #[error("the samples take more than {limit} bytes of memory, which is their limit here; the first {samples} fit")]
    Memory {
        /// Samples that fit.
        samples: u64,
        /// Bytes that samples may take.
        limit: u64,
    },
    /// A file that is neither JSON Lines nor plain text.
    #[error("the file is {0}; samples are read from JSON Lines (.jsonl, .json, .ndjson) and plain text (.txt, .md)")]
    Foreign(Foreign),
    /// One JSON array instead of one line per sample.
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
    /// A line that is too long.
    #[error("line {line} has more than {limit} bytes")]
    LineBytes {
        /// The line.
        line: u64,
        /// The limit.
        limit: usize,
    },
    /// A conversation with too many messages.
    #[error("line {line} is a conversation of {found} messages; the limit is {limit}")]
    Messages {
        /// The line.
        line: u64,
        /// Its messages.
        found: usize,
        /// The limit.
        limit: usize,
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
         \"output\"; \"conversations\"; it has {}{}", found.join(", "), and_others(*.others)
    )]
    UnknownForm {
        /// The line.
        line: u64,
        /// Its first keys.
        found: Vec<String>,
        /// The number of its other keys.
        others: usize,
    },
    /// A later line of another form.
    #[error("line {line} has no {}: every line has the form of the first one", keys.join("/"))]
    OtherForm {
        /// The line.
        line: u64,
        /// The keys of the first line's form.
        keys: &'static [&'static str],
    },
    /// A value of the wrong kind for the form of the file.
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
    #[error("the pack's tokenizer.json cannot be used: {0}")]
    Tokenizer(tokenizers::Error),
    /// tokenizer.json has what the tokenizers of supported models do not have.
    #[error("the pack's tokenizer.json is refused: {0}")]
    TokenizerRefused(TokenizerError),
    /// A file next to it is not a JSON object.
    #[error("{file} is not a JSON object: {source}")]
    TokenizerJson {
        /// Its name.
        file: &'static str,
        /// Where it is broken.
        source: serde_json::Error,
    },
    /// A file next to it has too much of something.
    #[error("{file} has {found} {what}; the limit is {limit}")]
    TokenizerFile {
        /// Its name.
        file: &'static str,
        /// Bytes or tokens.
        what: &'static str,
        /// Its bytes or tokens.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// The chat template is broken.
    #[error("the pack's chat template cannot be used: {0}")]
    Template(TemplateError),
    /// Several chat templates without a default.
    #[error("the model has the chat templates {}, and none that is named default", names.join(", "))]
    NoDefaultTemplate {
        /// Their names.
        names: Vec<String>,
    },
    /// Conversations, and a model without a chat template.
    #[error("line {line} is a conversation, and the model has no chat template")]
    NoTemplate {
        /// The line.
        line: u64,
    },
    /// The chat template refuses a conversation.
    #[error("line {line}: the pack's chat template refuses the conversation: {source}")]
    Render {
        /// The line.
        line: u64,
        /// What it says.
        source: TemplateError,
    },
    /// A conversation to continue, and a model without a chat template.
    #[error("the model has no chat template")]
    NoChatTemplate,
    /// The chat template refuses a conversation to continue.
    #[error("the pack's chat template refuses the conversation: {0}")]
    Chat(TemplateError),
    /// The span of an answer in the text is unknown.
    #[error(
        "line {line}: what the assistant says in message {message} (from 0) cannot be separated from the rest of the text: {flaw}"
    )]
    Spans {
        /// The line.
        line: u64,
        /// The message, from 0.
        message: usize,
        /// Why.
        flaw: SpanFlaw,
    },
    /// Text cannot be tokenised, or tokens cannot be decoded.
    #[error("the pack's tokenizer: {0}")]
    Encode(tokenizers::Error),
    /// A token that the model does not have.
    #[error(
        "{}the text has the token {id} ({token:?}), and the model has {vocab} tokens, from 0 to {}: tokens were added to the \
         tokenizer, and no rows to the model's embedding", at_line(*.line), vocab.saturating_sub(1)
    )]
    TokenId {
        /// The line, where the text is of a file.
        line: Option<u64>,
        /// The token.
        id: u32,
        /// Its text.
        token: String,
        /// Tokens of the model.
        vocab: u32,
    },
    /// Messages that are not learned, although everything is to be learned.
    #[error("line {line} has messages that are not to be learned, and every token is to be learned")]
    Unlearned {
        /// The line.
        line: u64,
    },
    /// All samples of a file were dropped.
    #[error("nothing can be learned from any of {samples} samples; the first one: {first}")]
    AllDropped {
        /// Number of samples.
        samples: u64,
        /// Why the first one was dropped.
        first: Box<DataError>,
    },
    /// A share of the samples cannot be held out: there is only one.
    #[error("nothing can be held out for evaluation: the data is one sample")]
    NothingHeldOut,
    /// A sample from which nothing can be learned.
    #[error("line {line} has no token to be learned{}:\n{text}", cut_reason(*.length, *.max_length))]
    NothingLearned {
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

/// A kind of file that is not read as samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Foreign {
    /// Compressed by gzip.
    #[error("compressed by gzip")]
    Gzip,
    /// Compressed by zstd.
    #[error("compressed by zstd")]
    Zstandard,
    /// A ZIP archive.
    #[error("a ZIP archive")]
    Zip,
    /// A Parquet file.
    #[error("a Parquet file")]
    Parquet,
    /// An Arrow file.
    #[error("an Arrow file")]
    Arrow,
    /// Text in UTF-16.
    #[error("text in UTF-16")]
    Utf16,
    /// A table with separators, by its name.
    #[error("a table (.csv, .tsv), by its name")]
    Table,
    /// It has NUL bytes.
    #[error("a binary file: it has NUL bytes")]
    Binary,
    /// Its name ends in neither a text's nor JSON Lines' ending, and it begins like no JSON.
    #[error("neither JSON Lines nor plain text, by its name")]
    Unknown,
}

/// How a file differs from what it was when it was read before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Change {
    /// In its length.
    #[error("it had {first} bytes, then {second}")]
    Length {
        /// Bytes at first.
        first: u64,
        /// Bytes later.
        second: u64,
    },
    /// The time of its last change is another one.
    #[error("it was written to")]
    Written,
    /// In what it says.
    #[error("its checksum was {first:08x}, then {second:08x}")]
    Bytes {
        /// The CRC-32 at first.
        first: u32,
        /// The CRC-32 later.
        second: u32,
    },
    /// In a line, which is broken now and was not at first.
    #[error("line {line} was another one")]
    Line {
        /// The line.
        line: u64,
    },
}

impl Change {
    /// That between two different checksums.
    pub(super) fn between(first: FileChecksum, second: FileChecksum) -> Self {
        match (first.len, second.len) {
            (first, second) if first != second => Self::Length { first, second },
            _ => Self::Bytes { first: first.crc32, second: second.crc32 },
        }
    }
}

impl DataError {
    /// What `refused` makes of the error of a template, unless the template never ran.
    pub(super) fn of_template(source: TemplateError, refused: impl FnOnce(TemplateError) -> Self) -> Self {
        match source.kind {
            ErrorKind::NoThread(reason) => Self::NoThread(io::Error::other(reason)),
            _ => refused(source),
        }
    }

    /// What it means that a line is broken in the second reading: all lines were read before.
    pub(super) fn of_second_reading(self) -> Self {
        match self {
            Self::Json { line, .. }
            | Self::LineBytes { line, .. }
            | Self::Messages { line, .. }
            | Self::NotAnObject { line }
            | Self::OtherForm { line, .. }
            | Self::Value { line, .. } => Self::Changed(Change::Line { line }),
            other => other,
        }
    }

    /// What is wrong with the text or the conversation of a line.
    pub(super) fn of_line(self, line: u64) -> Self {
        match self {
            Self::TokenId { id, token, vocab, .. } => Self::TokenId { line: Some(line), id, token, vocab },
            Self::NoChatTemplate => Self::NoTemplate { line },
            Self::Encode(error) => Self::Encode(format!("line {line}: {error}").into()),
            other => other,
        }
    }
}

fn and_others(others: usize) -> String {
    if others > 0 { format!(" and {others} others") } else { String::new() }
}

fn at_line(line: Option<u64>) -> String {
    line.map_or_else(String::new, |line| format!("line {line}: "))
}

fn cut_reason(length: u64, max_length: u32) -> String {
    if length <= u64::from(max_length) {
        return String::new();
    }
    format!(" within the maximum length of {max_length}: it has {length} tokens")
}

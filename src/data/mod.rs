//! Training data: files of several forms become tokens with a loss mask, and these become packed
//! batches.

mod calls;
pub(crate) mod checksum;
mod components;
pub(crate) mod error;
pub(crate) mod file;
pub(crate) mod files;
pub(crate) mod form;
mod formats;
#[cfg(any(fuzzing, test))]
pub(crate) mod fuzzing;
pub(crate) mod interruptible;
mod jinja;
pub(crate) mod keys;
mod kind;
mod lines;
mod literals;
pub(crate) mod memory;
mod messages;
pub(crate) mod notice;
pub(crate) mod options;
pub(crate) mod pack;
mod probe;
mod record;
mod rendering;
pub(crate) mod sample;
mod seam;
#[cfg(any(feature = "cli", test))]
pub(crate) mod show;
mod spans;
mod special;
mod split;
pub(crate) mod stream;
mod style;
mod survey;
mod template;
pub(crate) mod tokenizer;

pub use components::error::TokenizerError;
pub use error::{Change, DataError, Foreign};
pub use file::DataFile;
pub use jinja::{ErrorKind as TemplateErrorKind, TemplateError};
pub use notice::SpanFlaw;
pub use options::TrainOn;
pub use stream::TokenStream;
pub use tokenizer::{Message, Tokenizer};

#[cfg(test)]
mod tests;

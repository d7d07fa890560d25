//! Training data: files of several forms become tokens with a loss mask, and these become packed
//! batches.

mod error;
mod file;
mod files;
mod form;
mod formats;
mod jinja;
mod literals;
mod messages;
mod notice;
mod options;
mod pack;
mod probe;
mod record;
mod sample;
mod seam;
mod show;
mod spans;
mod special;
mod stream;
mod style;
mod template;
mod tokenizer;

pub use error::DataError;
pub use file::DataFile;
pub use files::{TokenizerFile, TokenizerFiles};
pub use form::Form;
pub use jinja::{ErrorKind as TemplateErrorKind, TemplateError};
pub use notice::{Concern, LeftOut, Notice, SpanFlaw};
pub use options::{Options, TrainOn};
pub use pack::{Batch, IGNORE_INDEX, batch, epoch_order, rows};
pub use sample::{Cut, Dataset, Dropped, Sample};
pub use show::{Part, ShownSample, show_batch};
pub use stream::TokenStream;
pub use tokenizer::{Message, Tokenizer};

#[cfg(test)]
mod tests;

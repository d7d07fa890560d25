//! Why a tokenizer.json is refused.

use thiserror::Error;

/// Why a tokenizer.json is refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The file is too large.
    #[error("the file has {found} bytes; the limit is {limit}")]
    Bytes {
        /// Its bytes.
        found: usize,
        /// The limit.
        limit: usize,
    },
    /// It is not JSON of a tokenizer.
    #[error("{0}")]
    Json(serde_json::Error),
    /// A component that tokenizers of supported models do not use.
    #[error("the {section} {found:?} is not supported; supported are {}", known.join(", "))]
    Component {
        /// The section that it is in.
        section: &'static str,
        /// Its type.
        found: String,
        /// The supported types.
        known: &'static [&'static str],
    },
    /// A value that the library does not take, or that does harm.
    #[error("the {section} {component}: {key:?} should be {expected}")]
    Value {
        /// The section that the component is in.
        section: &'static str,
        /// The type of the component.
        component: String,
        /// The key of the value.
        key: &'static str,
        /// What the value should be.
        expected: String,
    },
    /// A key without a meaning in a component.
    #[error("the {section} {component} has the unknown key {key:?}")]
    Key {
        /// The section that the component is in.
        section: &'static str,
        /// The type of the component.
        component: String,
        /// The key.
        key: String,
    },
    /// More of something than is allowed.
    #[error("the {section} has more than {limit} {what}")]
    Limit {
        /// The section.
        section: &'static str,
        /// What is counted.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
    /// A section makes texts much longer.
    #[error("the {section} makes a text more than {limit} times as long")]
    Growth {
        /// The section.
        section: &'static str,
        /// The limit.
        limit: u64,
    },
}

pub(super) type Result<T> = std::result::Result<T, TokenizerError>;

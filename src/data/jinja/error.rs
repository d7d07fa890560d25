//! What is wrong with a template, or with a rendering of it.

use thiserror::Error;

/// Why a template cannot be compiled, or a conversation cannot be rendered.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{kind} (line {line} of the template)")]
pub struct TemplateError {
    /// What is wrong.
    pub kind: ErrorKind,
    /// The line of the template, from 1.
    pub line: u32,
}

/// What is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The template is not Jinja.
    #[error("syntax error: {0}")]
    Syntax(String),
    /// The template itself refuses, by `raise_exception`.
    #[error("{0}")]
    Raised(String),
    /// A value that is not there is used.
    #[error("{0}")]
    Undefined(String),
    /// Python would raise an exception here.
    #[error("{0}")]
    Invalid(String),
    /// A filter, a test or a statement that transformers does not have either.
    #[error("there is no {what} {name:?}")]
    Unknown {
        /// A filter, a test or a statement.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// What transformers can do and this program cannot.
    #[error("nf4pack does not support {0} in chat templates")]
    Unsupported(String),
    /// The template works for too long, or writes too much.
    #[error("the template {0}")]
    Limit(&'static str),
    /// The system starts no thread for the template.
    #[error("the system starts no thread: {0}")]
    NoThread(String),
}

impl ErrorKind {
    pub(super) fn at(self, line: u32) -> TemplateError {
        TemplateError { kind: self, line }
    }
}

/// What the evaluation of an expression gives.
pub(super) type Result<T> = std::result::Result<T, ErrorKind>;

/// A `TypeError`, `ValueError` or the like of Python.
pub(super) fn invalid<T>(message: impl Into<String>) -> Result<T> {
    Err(ErrorKind::Invalid(message.into()))
}

pub(super) fn unsupported<T>(what: impl Into<String>) -> Result<T> {
    Err(ErrorKind::Unsupported(what.into()))
}

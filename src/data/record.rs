//! One line of JSON Lines: access to its keys, and errors that name them.

use super::error::DataError;
use super::jinja::{Dict, Value};

/// A line.
#[derive(Debug, Clone, Copy)]
pub(super) struct Record<'a> {
    /// Its number, from 1.
    pub(super) line: u64,
    /// Its keys and values.
    pub(super) dict: &'a Dict,
}

impl Record<'_> {
    /// The error of a value that is not what it should be.
    pub(super) fn bad(&self, key: &str, expected: &'static str) -> DataError {
        DataError::Value { line: self.line, key: key.to_owned(), expected }
    }

    pub(super) fn string(&self, of: &Dict, key: &str) -> Result<String, DataError> {
        of.get_str(key).and_then(Value::as_str).map(str::to_owned).ok_or_else(|| self.bad(key, "a string"))
    }

    pub(super) fn optional_string(&self, key: &str) -> Result<Option<String>, DataError> {
        given(self.dict, key).map(|_| self.string(self.dict, key)).transpose()
    }
}

/// The role of a message.
pub(super) fn role(message: &Dict) -> Option<&str> {
    message.get_str("role").and_then(Value::as_str)
}

/// A key of a map that is there and not null: programs that write tables as JSON write every column
/// in every line.
pub(super) fn given<'a>(dict: &'a Dict, key: &str) -> Option<&'a Value> {
    dict.get_str(key).filter(|value| !value.is_none())
}

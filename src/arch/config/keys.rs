//! The one reader of JSON configurations: typed access to the keys of an object.

use serde_json::{Map, Value};

use super::error::ConfigError;

/// A JSON object of a configuration file, or one inside it.
#[derive(Debug, Clone)]
pub(crate) struct Keys<'a> {
    file: &'static str,
    /// The prefix of keys in messages: empty, or the key of this object and a dot.
    prefix: String,
    object: &'a Map<String, Value>,
    /// The model type, for messages about missing keys; "all" while it is not known.
    pub model_type: &'static str,
}

impl<'a> Keys<'a> {
    pub fn new(file: &'static str, object: &'a Map<String, Value>) -> Self {
        Self { file, prefix: String::new(), object, model_type: "all" }
    }

    /// The object under `key`; `None` if it is absent or null.
    pub fn inner(&self, key: &str) -> Result<Option<Self>, ConfigError> {
        self.given(key).map(|found| self.object_under(key, found)).transpose()
    }

    /// The object under `key`; `None` if it is absent, or a value that Python takes for false:
    /// an empty object, null, false, 0.
    pub fn truthy_inner(&self, key: &str) -> Result<Option<Self>, ConfigError> {
        self.truthy(key).map(|found| self.object_under(key, found)).transpose()
    }

    /// The value of a present key that Python takes for true.
    pub fn truthy(&self, key: &str) -> Option<&'a Value> {
        self.get(key).filter(|found| is_truthy(found))
    }

    fn object_under(&self, key: &str, found: &'a Value) -> Result<Self, ConfigError> {
        let object = found.as_object().ok_or_else(|| self.bad(key, "an object", found))?;
        Ok(Self { prefix: self.full(key) + ".", object, ..*self })
    }

    /// Another object, under `key` in messages.
    pub fn nested<'b>(&self, key: &str, object: &'b Map<String, Value>) -> Keys<'b> {
        Keys { file: self.file, prefix: self.full(key) + ".", object, model_type: self.model_type }
    }

    /// A copy of the object.
    pub fn to_map(&self) -> Map<String, Value> {
        self.object.clone()
    }

    /// All keys and values.
    pub fn entries(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        self.object.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// A key as messages name it.
    pub fn full(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key)
    }

    /// The value of a present key that is not null.
    pub fn given(&self, key: &str) -> Option<&'a Value> {
        self.get(key).filter(|value| !value.is_null())
    }

    pub fn missing(&self, key: &str) -> ConfigError {
        ConfigError::MissingKey { model_type: self.model_type, key: self.full(key) }
    }

    pub fn bad(&self, key: &str, expected: impl Into<Box<str>>, found: &Value) -> ConfigError {
        ConfigError::BadValue { file: self.file, key: self.full(key), expected: expected.into(), found: found.clone() }
    }

    /// A whole number from 1 on.
    pub fn size(&self, key: &str) -> Result<u32, ConfigError> {
        let found = self.get(key).ok_or_else(|| self.missing(key))?;
        self.whole(key, found, 1, SIZE)
    }

    /// A whole number from 1 on, or `None` if the key is absent or null.
    pub fn optional_size(&self, key: &str) -> Result<Option<u32>, ConfigError> {
        self.given(key).map(|found| self.whole(key, found, 1, SIZE)).transpose()
    }

    /// A whole number, or `None` if the key is absent or null.
    pub fn optional_count(&self, key: &str) -> Result<Option<u32>, ConfigError> {
        self.given(key).map(|found| self.whole(key, found, 0, "a whole number from 0 to 4294967295")).transpose()
    }

    fn whole(&self, key: &str, found: &Value, min: u32, expected: &'static str) -> Result<u32, ConfigError> {
        let number = found.as_u64().and_then(|n| u32::try_from(n).ok()).filter(|&n| n >= min);
        number.ok_or_else(|| self.bad(key, expected, found))
    }

    /// A finite number that `valid` accepts.
    pub fn number(&self, key: &str, expected: &'static str, valid: fn(f64) -> bool) -> Result<f64, ConfigError> {
        self.optional_number(key, expected, valid)?.ok_or_else(|| self.missing(key))
    }

    /// A finite number that `valid` accepts, or `None` if the key is absent or null.
    pub fn optional_number(
        &self,
        key: &str,
        expected: &'static str,
        valid: fn(f64) -> bool,
    ) -> Result<Option<f64>, ConfigError> {
        self.given(key).map(|found| self.finite(key, found, expected, valid)).transpose()
    }

    /// A finite number that `valid` accepts, or `None` if the key is absent; a null is an error.
    pub fn number_if_present(
        &self,
        key: &str,
        expected: &'static str,
        valid: fn(f64) -> bool,
    ) -> Result<Option<f64>, ConfigError> {
        self.get(key).map(|found| self.finite(key, found, expected, valid)).transpose()
    }

    fn finite(&self, key: &str, found: &Value, expected: &'static str, valid: fn(f64) -> bool) -> Result<f64, ConfigError> {
        let number = found.as_f64().filter(|&x| x.is_finite() && valid(x));
        number.ok_or_else(|| self.bad(key, expected, found))
    }

    /// A boolean, or `default` if the key is absent.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool, ConfigError> {
        let bad = |found| self.bad(key, "true or false", found);
        self.get(key).map_or(Ok(default), |found| found.as_bool().ok_or_else(|| bad(found)))
    }

    /// A list with `len` elements or more; `element` reads each. `None` if the key is absent or
    /// null.
    pub fn list<T>(
        &self,
        key: &str,
        len: usize,
        expected: &'static str,
        element: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, ConfigError> {
        let Some(found) = self.given(key) else { return Ok(None) };
        let read = |list: &Vec<Value>| list.iter().map(&element).collect::<Option<Vec<T>>>();
        let list = found.as_array().filter(|list| list.len() >= len).and_then(read);
        list.map(Some).ok_or_else(|| self.bad(key, expected, found))
    }

    /// One of the strings of `known`; `default` if the key is absent.
    pub fn one_of(
        &self,
        key: &str,
        default: &'static str,
        known: &[&'static str],
        expected: impl Into<Box<str>>,
    ) -> Result<&'static str, ConfigError> {
        let Some(found) = self.get(key) else { return Ok(default) };
        let named = |name: &&'static str| found.as_str() == Some(name);
        known.iter().copied().find(named).ok_or_else(|| self.bad(key, expected, found))
    }

    /// A token id or a list of them; `None` if the key is absent, an empty list if it is
    /// null.
    pub fn token_ids(&self, key: &str) -> Result<Option<Vec<u32>>, ConfigError> {
        let expected = "a token id or a list of token ids";
        let Some(found) = self.get(key) else { return Ok(None) };
        let ids = match found {
            Value::Null => Ok(Vec::new()),
            Value::Array(ids) => ids.iter().map(|id| self.whole(key, id, 0, expected)).collect(),
            // The value of older configurations without such a token.
            Value::Number(id) if id.as_i64() == Some(-1) => Ok(Vec::new()),
            id => self.whole(key, id, 0, expected).map(|id| vec![id]),
        };
        ids.map(Some)
    }
}

/// Whether Python takes a value for true.
fn is_truthy(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(flag) => *flag,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(entries) => !entries.is_empty(),
    }
}

const SIZE: &str = "a whole number from 1 to 4294967295";

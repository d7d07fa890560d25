//! Python's `json.dumps` and `json.loads`.

use super::error::{Result, invalid};
use super::ops::sort_by_key;
use super::steps::{self, Writer};
use super::text::float_repr;
use super::value::{Dict, Value};

/// How `json.dumps` writes.
#[derive(Debug, Default)]
pub(super) struct JsonStyle {
    pub(super) ensure_ascii: bool,
    /// What a level of lists and dicts is indented by.
    pub(super) indent: Option<String>,
    /// Between items, and between key and value.
    pub(super) separators: Option<(String, String)>,
    pub(super) sort_keys: bool,
}

impl JsonStyle {
    /// Python's `json.dumps`.
    pub(super) fn dumps(&self, value: &Value) -> Result<String> {
        let mut out = Writer::default();
        self.write(value, 0, &mut out)?;
        Ok(out.finish())
    }

    fn item_separator(&self) -> &str {
        match &self.separators {
            Some((separator, _)) => separator,
            None if self.indent.is_some() => ",",
            None => ", ",
        }
    }

    fn write(&self, value: &Value, depth: usize, out: &mut Writer) -> Result<()> {
        steps::spend(1)?;
        match value {
            Value::None => out.push_str("null"),
            Value::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
            Value::Int(value) => out.push_str(&value.to_string()),
            Value::Float(value) => out.push_str(&json_float(*value)),
            Value::Str(text) | Value::Markup(text) => self.write_string(text, out),
            Value::List(items) | Value::Tuple(items) => {
                self.write_all(['[', ']'], items, depth, out, |item, out| self.write(item, depth + 1, out))
            }
            Value::Dict(dict) => {
                let mut entries: Vec<&(Value, Value)> = dict.entries().iter().collect();
                if self.sort_keys {
                    sort_by_key(&mut entries, false, |(key, _)| Ok(key.clone()))?;
                }
                let separator = self.separators.as_ref().map_or(": ", |(_, separator)| separator);
                self.write_all(['{', '}'], &entries, depth, out, |(key, value), out| {
                    self.write_string(&json_key(key)?, out)?;
                    out.push_str(separator)?;
                    self.write(value, depth + 1, out)
                })
            }
            other => invalid(format!("an object of type {} is not JSON serializable", other.type_name())),
        }
    }

    fn write_all<T>(
        &self,
        [open, close]: [char; 2],
        items: &[T],
        depth: usize,
        out: &mut Writer,
        mut write: impl FnMut(&T, &mut Writer) -> Result<()>,
    ) -> Result<()> {
        out.push(open)?;
        let line = |depth: usize, out: &mut Writer| {
            let Some(indent) = self.indent.as_ref().filter(|_| !items.is_empty()) else { return Ok(()) };
            out.push('\n')?;
            (0..depth).try_for_each(|_| out.push_str(indent))
        };
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.push_str(self.item_separator())?;
            }
            line(depth + 1, out)?;
            write(item, out)?;
        }
        line(depth, out)?;
        out.push(close)
    }

    fn write_string(&self, text: &str, out: &mut Writer) -> Result<()> {
        out.push('"')?;
        out.push_escaped(text, |c| match c {
            '"' => Some("\\\"".into()),
            '\\' => Some("\\\\".into()),
            '\n' => Some("\\n".into()),
            '\r' => Some("\\r".into()),
            '\t' => Some("\\t".into()),
            '\x08' => Some("\\b".into()),
            '\x0c' => Some("\\f".into()),
            c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                let mut units = [0; 2];
                let units = c.encode_utf16(&mut units).iter();
                Some(units.map(|unit| format!("\\u{unit:04x}")).collect::<String>().into())
            }
            _ => None,
        })?;
        out.push('"')
    }
}

fn json_float(value: f64) -> String {
    match value {
        value if value.is_nan() => "NaN".to_owned(),
        f64::INFINITY => "Infinity".to_owned(),
        f64::NEG_INFINITY => "-Infinity".to_owned(),
        value => float_repr(value),
    }
}

fn json_key(key: &Value) -> Result<String> {
    Ok(match key {
        Value::Str(text) | Value::Markup(text) => text.to_string(),
        Value::None => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Float(value) => json_float(*value),
        other => return invalid(format!("a key of JSON cannot be a {}", other.type_name())),
    })
}

/// Digits of the shortest integer that does not fit into 64 bits.
const LONG: usize = 19;

/// Python's `json.loads`: integers keep all their digits.
///
/// # Errors
/// Where it is not JSON in UTF-8.
pub fn loads(json: &[u8]) -> std::result::Result<Value, serde_json::Error> {
    let value = serde_json::from_slice(json)?;
    // serde_json reads an integer of more than 64 bits as a float.
    let is_long = json.split(|byte| !byte.is_ascii_digit()).any(|digits| digits.len() >= LONG);
    let exact = if is_long { std::str::from_utf8(json).ok().and_then(|json| Reader { rest: json }.value()) } else { None };
    Ok(exact.unwrap_or(value))
}

/// Reads JSON that is known to be correct.
struct Reader<'a> {
    rest: &'a str,
}

impl<'a> Reader<'a> {
    /// The next character that is not blank; it stays.
    fn peek(&mut self) -> Option<char> {
        self.rest = self.rest.trim_start();
        self.rest.chars().next()
    }

    fn skip(&mut self, c: char) -> Option<()> {
        self.peek()?;
        self.rest = self.rest.strip_prefix(c)?;
        Some(())
    }

    fn take(&mut self, length: usize) -> Option<&'a str> {
        let (taken, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(taken)
    }

    fn value(&mut self) -> Option<Value> {
        match self.peek()? {
            '{' => self.dict(),
            '[' => self.list(),
            '"' => self.string().map(Value::from),
            _ => {
                let length = self.rest.find([',', ']', '}', ' ', '\t', '\n', '\r']).unwrap_or(self.rest.len());
                let scalar = self.take(length)?;
                let integer = scalar.parse().ok().map(Value::Int);
                integer.or_else(|| serde_json::from_str(scalar).ok())
            }
        }
    }

    fn string(&mut self) -> Option<String> {
        self.peek()?;
        let mut escaped = false;
        let end = self.rest.char_indices().skip(1).find(|&(_, c)| {
            let ends = c == '"' && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        serde_json::from_str(self.take(end?.0 + 1)?).ok()
    }

    fn list(&mut self) -> Option<Value> {
        self.skip('[')?;
        let mut items = Vec::new();
        while self.peek()? != ']' {
            items.push(self.value()?);
            self.skip(',');
        }
        self.skip(']')?;
        Some(items.into())
    }

    fn dict(&mut self) -> Option<Value> {
        self.skip('{')?;
        let mut dict = Dict::default();
        while self.peek()? != '}' {
            let key = self.string()?;
            self.skip(':')?;
            dict.insert(key.into(), self.value()?);
            self.skip(',');
        }
        self.skip('}')?;
        Some(dict.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_keep_all_their_digits() {
        let json = r#" {"a\\\"": [1180591620717411303424, -18446744073709551616, 1.5, 18446744073709551615, 1e30, {}, []],
            "b": "1180591620717411303424 \u00e9\n", "b": null, "c" : [ true , "" ] } "#;
        let found = JsonStyle::default().dumps(&loads(json.as_bytes()).unwrap()).unwrap();
        let expected = r#"{"a\\\"": [1180591620717411303424, -18446744073709551616, 1.5, 18446744073709551615, 1e+30, {}, []], "b": null, "c": [true, ""]}"#;
        assert_eq!(found, expected);
        assert_eq!(loads(b"1180591620717411303424").unwrap(), Value::Int(1 << 70));
        loads(b"[1180591620717411303424").unwrap_err();
        loads(b"[1180591620717411303424, \"\xff\"]").unwrap_err();
    }
}

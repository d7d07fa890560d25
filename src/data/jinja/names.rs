//! The names of the methods of Python's strings, lists, tuples and dicts.

use std::sync::Arc;

use super::value::Value;

const OF_STRINGS: [&str; 47] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "maketrans",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
];
const OF_LISTS: [&str; 3] = ["copy", "count", "index"];
const OF_TUPLES: [&str; 2] = ["count", "index"];
const OF_DICTS: [&str; 6] = ["copy", "fromkeys", "get", "items", "keys", "values"];
const OF_VIEWS: [&str; 2] = ["isdisjoint", "mapping"];
const OF_NUMBERS: [&str; 12] = [
    "as_integer_ratio",
    "bit_count",
    "bit_length",
    "conjugate",
    "denominator",
    "from_bytes",
    "fromhex",
    "hex",
    "imag",
    "is_integer",
    "numerator",
    "real",
];
/// What changes a value: the sandbox of Jinja2 hides it.
const CHANGE_LISTS: [&str; 8] = ["append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"];
const CHANGE_DICTS: [&str; 5] = ["clear", "pop", "popitem", "setdefault", "update"];

/// A method by its name: `None` where the value has none of that name, `Some(None)` where it is
/// hidden.
pub(super) fn method(value: &Value, name: &str) -> Option<Option<Value>> {
    let (methods, hidden): (&[&'static str], &[&str]) = match value {
        Value::Str(_) | Value::Markup(_) => (&OF_STRINGS, &[]),
        Value::List(_) => (&OF_LISTS, &CHANGE_LISTS),
        Value::Tuple(_) | Value::Range(..) => (&OF_TUPLES, &[]),
        Value::Dict(_) => (&OF_DICTS, &CHANGE_DICTS),
        Value::View(..) => (&OF_VIEWS, &[]),
        Value::Bool(_) | Value::Int(_) | Value::Float(_) => (&OF_NUMBERS, &[]),
        _ => return None,
    };
    if hidden.contains(&name) {
        return Some(None);
    }
    let name = methods.iter().find(|known| **known == name)?;
    Some(Some(Value::Method(Arc::new((value.clone(), name)))))
}

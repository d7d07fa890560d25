//! A good JSON document with some of its values changed, removed, added or exchanged.

use arbitrary::{Result, Unstructured};
use serde_json::{Map, Value, json};

/// Numbers at the edges of what programs expect.
const NUMBERS: [&str; 22] = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "8",
    "64",
    "127",
    "256",
    "65535",
    "65537",
    "2147483648",
    "4294967295",
    "4294967296",
    "9007199254740993",
    "18446744073709551615",
    "18446744073709551616",
    "0.5",
    "-0.0",
    "1e-320",
    "1.7976931348623157e308",
];

/// Strings that mean something somewhere.
const STRINGS: [&str; 16] = [
    "",
    " ",
    "a",
    ".",
    "..",
    "../a",
    "/dev/zero",
    "a\u{0}b",
    "\u{1b}[2J",
    "\u{202e}",
    "\u{feff}",
    "{{ x }}",
    "(a|a)*$",
    "NaN",
    "<|im_end|>",
    "\u{1f980}",
];

/// Changes up to six values; a new key is one of `keys`, or any.
pub fn edit(u: &mut Unstructured<'_>, document: &mut Value, keys: &[&str]) -> Result<()> {
    for _ in 0..u.int_in_range(0..=6)? {
        let other = inner(u, document)?.clone();
        let place = inner(u, document)?;
        match u.int_in_range(0..=5)? {
            0 | 1 => *place = value(u)?,
            2 => *place = other,
            3 => remove(u, place)?,
            _ => add(u, place, keys)?,
        }
    }
    Ok(())
}

/// A value anywhere in the document.
fn inner<'a>(u: &mut Unstructured<'_>, mut value: &'a mut Value) -> Result<&'a mut Value> {
    while u.ratio(5, 6)? {
        let len = match value {
            Value::Object(map) => map.len(),
            Value::Array(list) => list.len(),
            _ => 0,
        };
        if len == 0 {
            break;
        }
        let chosen = u.choose_index(len)?;
        // The lengths were just asked for.
        value = match value {
            Value::Object(map) => map.values_mut().nth(chosen).ok_or(arbitrary::Error::IncorrectFormat)?,
            Value::Array(list) => &mut list[chosen],
            _ => return Err(arbitrary::Error::IncorrectFormat),
        };
    }
    Ok(value)
}

fn remove(u: &mut Unstructured<'_>, place: &mut Value) -> Result<()> {
    match place {
        Value::Object(map) if !map.is_empty() => {
            let chosen = u.choose_index(map.len())?;
            if let Some(key) = map.keys().nth(chosen).cloned() {
                map.remove(&key);
            }
        }
        Value::Array(list) if !list.is_empty() => {
            list.remove(u.choose_index(list.len())?);
        }
        other => *other = Value::Null,
    }
    Ok(())
}

fn add(u: &mut Unstructured<'_>, place: &mut Value, keys: &[&str]) -> Result<()> {
    match place {
        Value::Object(map) => {
            let key = if keys.is_empty() || u.ratio(1, 8)? { string(u)? } else { (*u.choose(keys)?).to_owned() };
            map.insert(key, value(u)?);
        }
        Value::Array(list) => list.push(value(u)?),
        other => *other = value(u)?,
    }
    Ok(())
}

/// Any value.
pub fn value(u: &mut Unstructured<'_>) -> Result<Value> {
    Ok(match u.int_in_range(0..=11)? {
        0 => Value::Null,
        1 => Value::Bool(u.arbitrary()?),
        2..=4 => number(u)?,
        5..=7 => Value::String(string(u)?),
        8 => Value::Array((0..u.int_in_range(0..=4)?).map(|_| number(u)).collect::<Result<_>>()?),
        9 => Value::Array((0..u.int_in_range(0..=4)?).map(|_| string(u).map(Value::String)).collect::<Result<_>>()?),
        10 => Value::Object(Map::from_iter([(string(u)?, value(u)?)])),
        _ => (0..u.int_in_range(0..=120)?).fold(json!([]), |inner, _| json!([inner])),
    })
}

fn number(u: &mut Unstructured<'_>) -> Result<Value> {
    let text = *u.choose(&NUMBERS)?;
    let edge = serde_json::from_str(text).map_err(|_| arbitrary::Error::IncorrectFormat);
    Ok(match u.int_in_range(0..=3)? {
        0 => u.arbitrary::<i64>()?.into(),
        1 => u.arbitrary::<u8>()?.into(),
        2 => u.arbitrary::<f64>()?.into(),
        _ => edge?,
    })
}

/// Any string; at times a long one.
pub fn string(u: &mut Unstructured<'_>) -> Result<String> {
    Ok(match u.int_in_range(0..=7)? {
        0 => u.arbitrary::<&str>()?.to_owned(),
        1 => u.choose(&STRINGS)?.repeat(u.int_in_range(1..=300)?),
        _ => (*u.choose(&STRINGS)?).to_owned(),
    })
}

/// The document as bytes, with one of them changed at times: what is no JSON, or a repeated key.
pub fn bytes(u: &mut Unstructured<'_>, document: &Value) -> Result<Vec<u8>> {
    let mut bytes = document.to_string().into_bytes();
    if u.ratio(1, 16)? && !bytes.is_empty() {
        let at = u.choose_index(bytes.len())?;
        bytes[at] = u.arbitrary()?;
    }
    if u.ratio(1, 32)? {
        bytes.truncate(u.choose_index(bytes.len().max(1))?);
    }
    Ok(bytes)
}

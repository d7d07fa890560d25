//! The methods of Python's strings, lists, tuples and dicts.

use std::sync::Arc;

use super::args::{Args, flag_or, integer_or, text_of};
use super::budget;
use super::error::{Result, invalid, unsupported};
use super::format::str_format;
use super::steps::{self, Length, checked_length};
use super::text::{escape, is_printable, is_space, title_case};
use super::value::{Dict, Value, View};

/// Calls a method.
pub(super) fn call(receiver: &Value, name: &'static str, args: Args) -> Result<Value> {
    budget::spend_text(receiver)?;
    let result = apply(receiver, name, args)?;
    budget::spend_text(&result)?;
    Ok(result)
}

fn apply(receiver: &Value, name: &'static str, args: Args) -> Result<Value> {
    match receiver {
        Value::Str(text) => of_string(text, false, name, args),
        Value::Markup(text) => {
            // Methods that give strings give ones that are marked as safe, too.
            let marked = |value: &Value| value.as_str().map(|text| Value::Markup(text.into()));
            Ok(match of_string(text, true, name, args)? {
                Value::Str(text) => Value::Markup(text),
                Value::List(items) => {
                    Value::from(items.iter().map(|item| marked(item).unwrap_or_default()).collect::<Vec<_>>())
                }
                other => other,
            })
        }
        Value::Dict(dict) => of_dict(dict, name, args),
        Value::List(_) | Value::Tuple(_) | Value::Range(..) => of_list(receiver, name, args),
        Value::Float(value) if name == "is_integer" => {
            let [] = args.bind(name, 0, [])?;
            Ok(Value::Bool(value.is_finite() && value.fract() == 0.0))
        }
        other => unsupported(format!("the method {name} of a {}", other.type_name())),
    }
}

fn of_dict(dict: &Arc<Dict>, name: &'static str, args: Args) -> Result<Value> {
    if name == "get" {
        if !args.named.is_empty() {
            return invalid("dict.get() takes no keyword arguments");
        }
        let [key, default] = args.bind(name, 1, ["key", "default"])?;
        let key = key.unwrap_or_default();
        if !key.is_hashable() {
            return invalid(format!("a {} cannot be a key", key.type_name()));
        }
        budget::spend_lookup(dict, &key)?;
        return Ok(dict.get(&key).cloned().or(default).unwrap_or(Value::None));
    }
    if name == "fromkeys" {
        return unsupported("the method fromkeys");
    }
    let [] = args.bind(name, 0, [])?;
    Ok(match name {
        "keys" => Value::View(View::Keys, dict.clone()),
        "values" => Value::View(View::Values, dict.clone()),
        "items" => Value::View(View::Items, dict.clone()),
        _ => Value::Dict(dict.clone()),
    })
}

fn of_list(list: &Value, name: &'static str, args: Args) -> Result<Value> {
    if name == "copy" {
        let [] = args.bind(name, 0, [])?;
        return Ok(list.clone());
    }
    steps::spend_items(list.len().unwrap_or_default())?;
    budget::spend_walk(list)?;
    let items = list.items().unwrap_or_default();
    let [value, start, stop] = args.bind(name, 1, ["value", "start", "stop"])?;
    let value = value.unwrap_or_default();
    if name == "count" {
        return Ok(Value::from(items.iter().filter(|item| **item == value).count()));
    }
    let (start, stop) = bounds(name, items.len(), start.as_ref(), stop.as_ref())?;
    match items.get(start..stop).unwrap_or_default().iter().position(|item| *item == value) {
        Some(at) => Ok(Value::from(start + at)),
        None => invalid("the value is not in the list"),
    }
}

/// `start` and `stop` as Python's slices take them.
fn bounds(name: &str, length: usize, start: Option<&Value>, stop: Option<&Value>) -> Result<(usize, usize)> {
    let given = |value: Option<&Value>, default: usize| -> Result<usize> {
        let index = integer_or(name, value.filter(|value| !value.is_none()), default as i128)?;
        let index = if index < 0 { index + length as i128 } else { index };
        Ok(usize::try_from(index.max(0)).unwrap_or(usize::MAX).min(length))
    };
    Ok((given(start, 0)?, given(stop, length)?))
}

fn of_string(text: &str, safe: bool, name: &'static str, args: Args) -> Result<Value> {
    match name {
        "upper" | "lower" | "title" | "capitalize" | "swapcase" | "casefold" => {
            let [] = args.bind(name, 0, [])?;
            changed_case(text, name)
        }
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = args.bind(name, 0, ["chars"])?;
            strip(text, name, chars.as_ref())
        }
        "removeprefix" | "removesuffix" => {
            let [part] = args.bind(name, 1, ["part"])?;
            let part = text_of(name, &part.unwrap_or_default())?;
            let found = if name == "removeprefix" { text.strip_prefix(&part) } else { text.strip_suffix(&part) };
            Ok(found.unwrap_or(text).into())
        }
        "split" | "rsplit" | "splitlines" | "partition" | "rpartition" => split_by(text, name, args),
        "replace" => {
            let [old, new, count] = args.bind(name, 2, ["old", "new", "count"])?;
            let [old, new] = [old, new].map(|value| text_of(name, &value.unwrap_or_default()));
            let new = if safe { escape(&new?) } else { new? };
            replace(text, &old?, &new, integer_or(name, count.as_ref(), -1)?)
        }
        "find" | "rfind" | "index" | "rindex" | "count" | "startswith" | "endswith" => search(text, name, args),
        "join" => {
            let [items] = args.bind(name, 1, ["iterable"])?;
            join(text, &items.unwrap_or_default())
        }
        "ljust" | "rjust" | "center" | "zfill" => {
            let [width, fill] = args.bind(name, 1, ["width", "fillchar"])?;
            justified(text, name, integer_or(name, width.as_ref(), 0)?, fill.as_ref())
        }
        "expandtabs" => {
            let [size] = args.bind(name, 0, ["tabsize"])?;
            Ok(expand_tabs(text, integer_or(name, size.as_ref(), 8)?)?.into())
        }
        "format" => Ok(str_format(text, safe, &args)?.into()),
        name if name.starts_with("is") => {
            let [] = args.bind(name, 0, [])?;
            is(text, name).map(Value::Bool)
        }
        name => unsupported(format!("the method {name} of strings")),
    }
}

/// The methods that split a string.
fn split_by(text: &str, name: &'static str, args: Args) -> Result<Value> {
    // There may be a part for every second character.
    if !name.ends_with("partition") {
        steps::spend(text.len() / 4)?;
    }
    match name {
        "split" | "rsplit" => {
            let [separator, limit] = args.bind(name, 0, ["sep", "maxsplit"])?;
            split(text, name == "rsplit", separator.as_ref(), limit.as_ref())
        }
        "splitlines" => {
            let [keep] = args.bind(name, 0, ["keepends"])?;
            Ok(lines(text, flag_or(keep.as_ref(), false)).into_iter().map(Value::from).collect::<Vec<_>>().into())
        }
        _ => {
            let [separator] = args.bind(name, 1, ["sep"])?;
            partition(text, name == "rpartition", &text_of(name, &separator.unwrap_or_default())?)
        }
    }
}

/// The methods that search a string.
fn search(text: &str, name: &'static str, args: Args) -> Result<Value> {
    match name {
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let [part, start, stop] = args.bind(name, 1, ["sub", "start", "end"])?;
            find(text, name, &text_of(name, &part.unwrap_or_default())?, start.as_ref(), stop.as_ref())
        }
        _ => {
            let [part, start, stop] = args.bind(name, 1, ["prefix", "start", "end"])?;
            borders(text, name, &part.unwrap_or_default(), start.as_ref(), stop.as_ref())
        }
    }
}

pub(super) fn changed_case(text: &str, name: &str) -> Result<Value> {
    let mut after_letter = false;
    Ok(match name {
        "upper" => text.to_uppercase().into(),
        "lower" => text.to_lowercase().into(),
        "capitalize" => {
            let mut chars = text.chars();
            let first = chars.next().map(title_case).unwrap_or_default();
            // The final sigma depends on what stands before it.
            let lower = text.to_lowercase();
            let skipped = text.chars().next().map_or(0, |first| first.to_lowercase().count());
            format!("{first}{}", lower.chars().skip(skipped).collect::<String>()).into()
        }
        "title" => {
            let mut out = String::new();
            for c in text.chars() {
                let cased = c.is_lowercase() || c.is_uppercase();
                if after_letter {
                    out.extend(c.to_lowercase())
                } else {
                    out.push_str(&title_case(c))
                }
                after_letter = cased;
            }
            out.into()
        }
        "swapcase" => {
            let swap = |c: char| -> String {
                if c.is_uppercase() { c.to_lowercase().collect() } else { c.to_uppercase().collect() }
            };
            text.chars().map(swap).collect::<String>().into()
        }
        _ if text.is_ascii() => text.to_lowercase().into(),
        _ => text.to_lowercase().replace('ß', "ss").replace('ς', "σ").into(),
    })
}

fn strip(text: &str, name: &str, chars: Option<&Value>) -> Result<Value> {
    let set = match chars {
        None | Some(Value::None) => None,
        Some(value) => Some(text_of(name, value)?),
    };
    let strips = |c: char| set.as_ref().map_or_else(|| is_space(c), |set| set.contains(c));
    let text = if name == "rstrip" { text } else { text.trim_start_matches(strips) };
    Ok((if name == "lstrip" { text } else { text.trim_end_matches(strips) }).into())
}

/// `strip`, as the filter `trim` has it.
pub(super) fn trimmed(text: &str, chars: Option<&Value>) -> Result<Value> {
    strip(text, "strip", chars)
}

fn split(text: &str, from_right: bool, separator: Option<&Value>, limit: Option<&Value>) -> Result<Value> {
    let limit = usize::try_from(integer_or("split", limit, -1)?).unwrap_or(usize::MAX);
    let parts: Vec<&str> = match separator {
        None | Some(Value::None) => words(text, from_right, limit),
        Some(separator) => {
            let separator = text_of("split", separator)?;
            if separator.is_empty() {
                return invalid("empty separator");
            }
            let pieces = limit.saturating_add(1);
            if from_right {
                let mut parts: Vec<&str> = text.rsplitn(pieces, separator.as_str()).collect();
                parts.reverse();
                parts
            } else {
                text.splitn(pieces, separator.as_str()).collect()
            }
        }
    };
    Ok(parts.into_iter().map(Value::from).collect::<Vec<_>>().into())
}

/// Parts between blanks. The rest after `limit` cuts keeps its inner blanks.
fn words(text: &str, from_right: bool, limit: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = if from_right { text.trim_end_matches(is_space) } else { text.trim_start_matches(is_space) };
    while !rest.is_empty() {
        if parts.len() == limit {
            parts.push(if from_right { rest.trim_start_matches(is_space) } else { rest.trim_end_matches(is_space) });
            parts.retain(|part| !part.is_empty());
            break;
        }
        let (word, after) = match from_right {
            true => {
                let start = rest.char_indices().rev().find(|(_, c)| is_space(*c)).map_or(0, |(i, c)| i + c.len_utf8());
                let (after, word) = rest.split_at(start);
                (word, after.trim_end_matches(is_space))
            }
            false => {
                let (word, after) = rest.split_at(rest.find(is_space).unwrap_or(rest.len()));
                (word, after.trim_start_matches(is_space))
            }
        };
        parts.push(word);
        rest = after;
    }
    if from_right {
        parts.reverse();
    }
    parts
}

/// Python's `str.splitlines`.
pub(super) fn lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let ends = ['\n', '\r', '\x0b', '\x0c', '\x1c', '\x1d', '\x1e', '\u{85}', '\u{2028}', '\u{2029}'];
    let mut lines = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find(ends) {
        let end = rest.get(at..).unwrap_or_default();
        let length = if end.starts_with("\r\n") { 2 } else { end.chars().next().map_or(0, char::len_utf8) };
        lines.push(rest.get(..at + if keep_ends { length } else { 0 }).unwrap_or_default());
        rest = rest.get(at + length..).unwrap_or_default();
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

fn partition(text: &str, from_right: bool, separator: &str) -> Result<Value> {
    if separator.is_empty() {
        return invalid("empty separator");
    }
    let found = if from_right { text.rsplit_once(separator) } else { text.split_once(separator) };
    let parts = match found {
        Some((before, after)) => [before, separator, after],
        None if from_right => ["", "", text],
        None => [text, "", ""],
    };
    Ok(Value::tuple(parts.map(Value::from).into()))
}

pub(super) fn replace(text: &str, old: &str, new: &str, count: i128) -> Result<Value> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let matches = if old.is_empty() { text.chars().count() + 1 } else { text.matches(old).count() }.min(count);
    checked_length(matches.saturating_mul(new.len()))?;
    Ok(text.replacen(old, new, count).into())
}

fn find(text: &str, name: &str, part: &str, start: Option<&Value>, stop: Option<&Value>) -> Result<Value> {
    let Some((within, start)) = within(text, name, start, stop)? else {
        return match name {
            "count" => Ok(Value::Int(0)),
            "index" | "rindex" => invalid("substring not found"),
            _ => Ok(Value::Int(-1)),
        };
    };
    if name == "count" {
        let count = if part.is_empty() { within.chars().count() + 1 } else { within.matches(part).count() };
        return Ok(Value::from(count));
    }
    let found = if name.starts_with('r') { within.rfind(part) } else { within.find(part) };
    match found {
        Some(at) => Ok(Value::from(start + within.get(..at).unwrap_or_default().chars().count())),
        None if name.ends_with("index") => invalid("substring not found"),
        None => Ok(Value::Int(-1)),
    }
}

/// `text[start:stop]` and where it begins; `None` where it begins after the end.
fn within<'a>(text: &'a str, name: &str, start: Option<&Value>, stop: Option<&Value>) -> Result<Option<(&'a str, usize)>> {
    let length = text.chars().count();
    if start.and_then(Value::as_int).is_some_and(|start| start > length as i128) {
        return Ok(None);
    }
    let (start, stop) = bounds(name, length, start, stop)?;
    if start > stop {
        return Ok(None);
    }
    let byte = |index: usize| text.char_indices().nth(index).map_or(text.len(), |(at, _)| at);
    Ok(text.get(byte(start)..byte(stop)).map(|within| (within, start)))
}

fn borders(text: &str, name: &str, part: &Value, start: Option<&Value>, stop: Option<&Value>) -> Result<Value> {
    let parts = match part {
        Value::Tuple(parts) => parts.iter().map(|part| text_of(name, part)).collect::<Result<Vec<_>>>()?,
        part => vec![text_of(name, part)?],
    };
    let Some((within, _)) = within(text, name, start, stop)? else { return Ok(Value::Bool(false)) };
    let fits = |part: &String| if name == "startswith" { within.starts_with(part) } else { within.ends_with(part) };
    Ok(Value::Bool(parts.iter().any(fits)))
}

fn join(separator: &str, items: &Value) -> Result<Value> {
    let Some(items) = items.items() else { return invalid(format!("join cannot go through a {}", items.type_name())) };
    let mut length = Length::default();
    let mut text = |item: &Value| {
        let text = text_of("join", item)?;
        length.add(text.len() + separator.len())?;
        Ok(text)
    };
    steps::spend_items(items.len())?;
    let texts = items.iter().map(&mut text).collect::<Result<Vec<_>>>()?;
    Ok(texts.join(separator).into())
}

pub(super) fn justified(text: &str, name: &str, width: i128, fill: Option<&Value>) -> Result<Value> {
    let fill = match fill {
        Some(fill) if name != "zfill" => text_of(name, fill)?,
        Some(_) => return invalid("zfill takes one argument"),
        None if name == "zfill" => "0".to_owned(),
        None => " ".to_owned(),
    };
    if fill.chars().count() != 1 || width > 1 << 20 {
        return invalid("the fill is one character, and the width has a bound");
    }
    let width = usize::try_from(width).unwrap_or_default();
    let missing = width.saturating_sub(text.chars().count());
    let blanks = |count: usize| fill.repeat(count);
    Ok(match name {
        "ljust" => format!("{text}{}", blanks(missing)),
        "rjust" => format!("{}{text}", blanks(missing)),
        // Python puts the odd one on the left where the width is odd.
        "center" => {
            let left = missing / 2 + (missing & width & 1);
            format!("{}{text}{}", blanks(left), blanks(missing - left))
        }
        _ => {
            let sign = usize::from(text.starts_with(['+', '-']));
            let (sign, digits) = text.split_at(sign);
            format!("{sign}{}{digits}", blanks(missing))
        }
    }
    .into())
}

fn expand_tabs(text: &str, size: i128) -> Result<String> {
    let size = usize::try_from(size.max(0)).unwrap_or(usize::MAX);
    let tabs = text.bytes().filter(|&byte| byte == b'\t').count();
    Length::default().add(text.len().saturating_add(tabs.saturating_mul(size)))?;
    let (mut out, mut column) = (String::new(), 0);
    for c in text.chars() {
        match c {
            '\t' if size > 0 => {
                let blanks = size - column % size;
                out.push_str(&" ".repeat(blanks));
                column += blanks;
            }
            '\t' => {}
            '\n' | '\r' => {
                out.push(c);
                column = 0;
            }
            c => {
                out.push(c);
                column += 1;
            }
        }
    }
    Ok(out)
}

fn is(text: &str, name: &str) -> Result<bool> {
    let every = |test: fn(char) -> bool| !text.is_empty() && text.chars().all(test);
    let cased = || text.chars().any(|c| c.is_lowercase() || c.is_uppercase());
    Ok(match name {
        "isascii" => text.is_ascii(),
        "isspace" => every(is_space),
        "isprintable" => text.chars().all(is_printable),
        "islower" => cased() && !text.chars().any(char::is_uppercase),
        "isupper" => cased() && !text.chars().any(char::is_lowercase),
        "istitle" => is_title(text),
        "isalpha" => every(char::is_alphabetic),
        "isidentifier" => {
            text.starts_with(|c: char| c == '_' || c.is_alphabetic())
                && text.chars().all(|c| c == '_' || c.is_alphanumeric())
        }
        // Rust does not know which of its numeric characters are digits for Python.
        _ if text.chars().any(|c| !c.is_ascii() && c.is_numeric() && !is_known_digit(c)) => {
            return unsupported(format!("the method {name} of characters that are neither letters nor ASCII digits"));
        }
        "isalnum" => every(char::is_alphanumeric),
        "isdecimal" => {
            every(|c| c.is_ascii_digit() || (c.is_numeric() && !SUPERSCRIPTS.contains(c) && !FRACTIONS.contains(c)))
        }
        "isdigit" => every(|c| c.is_ascii_digit() || (c.is_numeric() && !FRACTIONS.contains(c))),
        _ => every(char::is_numeric),
    })
}

const SUPERSCRIPTS: &str = "²³¹⁰⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉";
const FRACTIONS: &str = "¼½¾⅓⅔⅛⅜⅝⅞";

fn is_known_digit(c: char) -> bool {
    SUPERSCRIPTS.contains(c)
        || FRACTIONS.contains(c)
        // Decimal digits of Arabic, Devanagari, Bengali, Thai, and wide ones.
        || ['\u{660}', '\u{6f0}', '\u{966}', '\u{9e6}', '\u{e50}', '\u{ff10}'].iter().any(|zero| {
            (u32::from(*zero)..u32::from(*zero) + 10).contains(&u32::from(c))
        })
}

fn is_title(text: &str) -> bool {
    let (mut after_letter, mut any) = (false, false);
    for c in text.chars() {
        if (c.is_uppercase() && after_letter) || (c.is_lowercase() && !after_letter) {
            return false;
        }
        after_letter = c.is_uppercase() || c.is_lowercase();
        any |= after_letter;
    }
    any
}

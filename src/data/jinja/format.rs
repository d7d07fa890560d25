//! `'{}'.format(x)`.

use super::args::Args;
use super::error::{Result, invalid, unsupported};
use super::ops;
use super::spec::{Field, Spec, float_text, integer_text, pad, with_sign};
use super::steps::{self, Length};
use super::text::{escape, float_repr};
use super::value::Value;

/// `text.format(..)`.
pub(super) fn str_format(text: &str, safe: bool, args: &Args) -> Result<String> {
    let mut out = String::new();
    let mut automatic = 0;
    let mut chars = text.char_indices().peekable();
    let mut length = Length::default();
    while let Some((i, c)) = chars.next() {
        match c {
            '{' | '}' if chars.peek().is_some_and(|(_, next)| *next == c) => {
                chars.next();
                out.push(c);
            }
            '}' => return invalid("a single '}' in a format string"),
            '{' => {
                let mut depth = 1;
                let end = chars.by_ref().find_map(|(at, c)| {
                    depth += match c {
                        '{' => 1,
                        '}' => -1,
                        _ => 0,
                    };
                    (depth == 0).then_some(at)
                });
                let Some(end) = end else { return invalid("expected '}' before the end of a format string") };
                let field = text.get(i + 1..end).unwrap_or_default();
                steps::spend(1 + field.len() / 16)?;
                let value = replaced(field, args, &mut automatic)?;
                length.add(value.len())?;
                out.push_str(&if safe { escape(&value) } else { value });
            }
            c => out.push(c),
        }
    }
    Ok(out)
}

/// What stands for `field` of `{field}`.
fn replaced(field: &str, args: &Args, automatic: &mut usize) -> Result<String> {
    let (head, spec) = field.split_once(':').unwrap_or((field, ""));
    let (path, conversion) = head.split_once('!').unwrap_or((head, ""));
    let first = path.find(['.', '[']).unwrap_or(path.len());
    let (name, path) = path.split_at(first);
    let position = match name {
        "" => {
            *automatic += 1;
            Some(*automatic - 1)
        }
        name => name.parse().ok(),
    };
    let value = match position {
        Some(position) => args.positional.get(position).cloned(),
        None => args.named.iter().find(|(known, _)| known == name).map(|(_, value)| value.clone()),
    };
    let Some(mut value) = value else { return invalid(format!("a format string has no argument {name:?}")) };
    let mut path = path;
    while !path.is_empty() {
        let (step, rest) = match path.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((key, rest)) => {
                let key = key.parse::<usize>().map_or_else(|_| Value::from(key), Value::from);
                (ops::item(&value, &key)?, rest)
            }
            None => {
                let name = path.strip_prefix('.').unwrap_or(path);
                let (name, rest) = name.split_at(name.find(['.', '[']).unwrap_or(name.len()));
                (ops::attribute(&value, name)?, rest)
            }
        };
        (value, path) = (step, rest);
    }
    let value = match conversion {
        "" => value,
        "s" => Value::Str(value.to_text()?),
        "r" => Value::from(value.repr()?),
        other => return unsupported(format!("!{other} in a format string")),
    };
    if spec.contains('{') {
        return unsupported("a field within a field of a format string");
    }
    formatted(&value, spec)
}

/// Python's `format(value, spec)`.
fn formatted(value: &Value, text: &str) -> Result<String> {
    if text.is_empty() {
        return Ok(value.to_text()?.to_string());
    }
    let spec = parsed(text)?;
    match value {
        Value::Str(text) | Value::Markup(text) => {
            if spec.kind.is_some_and(|kind| kind != 's') || spec.sign.is_some() || spec.align == Some('=') {
                return invalid("a format of numbers for a string");
            }
            Ok(pad(&text.chars().take(spec.precision.unwrap_or(usize::MAX)).collect::<String>(), &spec, '<'))
        }
        Value::Bool(_) | Value::Int(_) | Value::Float(_) => number_formatted(value, &spec),
        other => invalid(format!("a {} takes no format", other.type_name())),
    }
}

fn number_formatted(value: &Value, spec: &Spec) -> Result<String> {
    let float = value.as_number().unwrap_or_default();
    let text = match (value, spec.kind) {
        (Value::Bool(_), None) if spec.width == 0 && spec.precision.is_none() => value.to_text()?.to_string(),
        (Value::Int(_) | Value::Bool(_), None | Some('d' | 'x' | 'X' | 'o' | 'b')) => {
            if spec.precision.is_some() {
                return invalid("precision is not allowed for integers");
            }
            integer_text(value, spec.kind.unwrap_or('d'), spec)
        }
        (_, Some('e' | 'E' | 'f' | 'F' | 'g' | 'G')) => {
            let spec = Spec { precision: spec.precision.or(Some(6)), ..spec.clone() };
            float_text(float, spec.kind.unwrap_or('f'), &spec)
        }
        (_, Some('%')) => {
            let spec = Spec { precision: spec.precision.or(Some(6)), ..spec.clone() };
            format!("{}%", float_text(float * 100.0, 'f', &spec))
        }
        (Value::Float(value), None) if spec.precision.is_none() => {
            with_sign(float_repr(value.abs()), value.is_sign_negative(), spec)
        }
        (Value::Float(_), None) => return unsupported("a precision without a type in a format string"),
        (_, Some(kind)) => return unsupported(format!("the type {kind:?} in a format string")),
        _ => return invalid("a number takes no such format"),
    };
    Ok(pad(&text, spec, '>'))
}

/// `[[fill]align][sign][#][0][width][grouping][.precision][type]`.
fn parsed(text: &str) -> Result<Spec> {
    let mut spec = Spec::default();
    let mut chars = Field(text);
    let is_align = |c: char| "<>=^".contains(c);
    let mut two = text.chars();
    match (two.next(), two.next()) {
        (Some(fill), Some(align)) if is_align(align) => {
            (spec.fill, spec.align) = (Some(fill), Some(align));
            chars.next();
            chars.next();
        }
        (Some(align), _) if is_align(align) => spec.align = chars.next(),
        _ => {}
    }
    spec.sign = chars.next_of("+- ");
    spec.alternate = chars.next_of("#").is_some();
    if chars.next_of("0").is_some() {
        spec.fill = spec.fill.or(Some('0'));
        spec.align = spec.align.or(Some('='));
    }
    spec.width = chars.number()?.unwrap_or_default();
    spec.grouping = chars.next_of(",_");
    if chars.next_of(".").is_some() {
        spec.precision = chars.number()?;
    }
    spec.kind = chars.next();
    if chars.next().is_some() { invalid(format!("the format {text:?}")) } else { Ok(spec) }
}

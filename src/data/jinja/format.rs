//! `'%s' % x` and `'{}'.format(x)`.

use super::args::Args;
use super::error::{Result, invalid, unsupported};
use super::ops;
use super::text::{escape, shortest_digits};
use super::value::Value;

/// Characters that a field may be wide, or digits that a number may have.
const MAX_WIDTH: usize = 100_000;

/// How a value is written.
#[derive(Debug, Default, Clone)]
struct Spec {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

/// `text % value`.
pub(super) fn printf(text: &str, value: &Value) -> Result<String> {
    let mut values = match value {
        Value::Tuple(items) => items.as_ref().clone(),
        other => vec![other.clone()],
    }
    .into_iter();
    let mut used_mapping = false;
    let mut out = String::new();
    let mut rest = text;
    while let Some((before, field)) = rest.split_once('%') {
        out.push_str(before);
        let mut chars = Field(field);
        let key = chars.key()?;
        let mut spec = Spec { align: Some('>'), ..Spec::default() };
        while let Some(flag) = chars.next_of("-+ #0") {
            match flag {
                '-' => spec.align = Some('<'),
                '#' => spec.alternate = true,
                '0' => spec.fill = Some('0'),
                sign => spec.sign = Some(if spec.sign == Some('+') { '+' } else { sign }),
            }
        }
        let mut star = |chars: &mut Field<'_>| -> Result<Option<i128>> {
            match chars.next_of("*") {
                Some(_) => match values.next().as_ref().and_then(Value::as_int) {
                    Some(number) => Ok(Some(number)),
                    None => invalid("* wants an integer"),
                },
                None => Ok(None),
            }
        };
        spec.width = match star(&mut chars)? {
            Some(width) => {
                if width < 0 {
                    spec.align = Some('<');
                }
                checked_width(usize::try_from(width.unsigned_abs()).ok())?
            }
            None => chars.number()?.unwrap_or_default(),
        };
        if chars.next_of(".").is_some() {
            spec.precision = match star(&mut chars)? {
                Some(precision) => Some(checked_width(usize::try_from(precision.max(0)).ok())?),
                None => Some(chars.number()?.unwrap_or_default()),
            };
        }
        while chars.next_of("hlL").is_some() {}
        let Some(kind) = chars.next() else { return invalid("an incomplete format") };
        rest = chars.0;
        if kind == '%' {
            out.push('%');
            continue;
        }
        let value = match key {
            Some(key) => {
                used_mapping = true;
                match value.as_dict().map(|dict| dict.get_str(key)) {
                    Some(Some(value)) => value.clone(),
                    Some(None) => return invalid(format!("the key {key:?} of a format is missing")),
                    None => return invalid("a format with keys requires a dict"),
                }
            }
            None => match values.next() {
                Some(value) => value,
                None => return invalid("not enough arguments for a format string"),
            },
        };
        out.push_str(&printf_field(kind, spec, &value)?);
    }
    out.push_str(rest);
    if !used_mapping && values.next().is_some() && !matches!(value, Value::Dict(_) | Value::List(_)) {
        return invalid("not all arguments were converted during string formatting");
    }
    Ok(out)
}

fn printf_field(kind: char, mut spec: Spec, value: &Value) -> Result<String> {
    let number = || match value.as_number() {
        Some(_) => Ok(value),
        None => invalid(format!("%{kind} requires a number, not a {}", value.type_name())),
    };
    let text = match kind {
        's' | 'r' | 'a' => {
            let text = if kind == 's' { value.to_text()?.to_string() } else { value.repr()? };
            if kind == 'a' && !text.is_ascii() {
                return unsupported("%a of characters that are not ASCII");
            }
            spec.fill = None;
            return Ok(pad(&text.chars().take(spec.precision.unwrap_or(usize::MAX)).collect::<String>(), &spec, '>'));
        }
        'c' => match (value.as_str(), value.as_int()) {
            (Some(text), _) if text.chars().count() == 1 => text.to_owned(),
            (_, Some(code)) => match u32::try_from(code).ok().and_then(char::from_u32) {
                Some(c) => c.to_string(),
                None => return invalid("%c requires a character"),
            },
            _ => return invalid("%c requires a character"),
        },
        'd' | 'i' | 'u' => integer_text(&truncated(number()?)?, 'd', &spec),
        'x' | 'X' | 'o' if value.as_int().is_some() => integer_text(value, kind, &spec),
        'x' | 'X' | 'o' => return invalid(format!("%{kind} requires an integer, not a {}", value.type_name())),
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => float_text(
            number()?.as_number().unwrap_or_default(),
            kind,
            &Spec { precision: spec.precision.or(Some(6)), ..spec.clone() },
        ),
        other => return invalid(format!("unsupported format character {other:?}")),
    };
    if spec.fill == Some('0') && spec.align == Some('>') {
        spec.align = Some('=');
    } else {
        spec.fill = None;
    }
    Ok(pad(&text, &spec, '>'))
}

/// An integer of a number, as `%d` takes it.
fn truncated(value: &Value) -> Result<Value> {
    match value {
        Value::Float(value) if value.is_finite() && value.abs() < 1e38 => Ok(Value::Int(value.trunc() as i128)),
        Value::Float(_) => invalid("a float has no integer"),
        other => Ok(other.clone()),
    }
}

/// What is left of a field of `%`.
struct Field<'a>(&'a str);

impl<'a> Field<'a> {
    fn next(&mut self) -> Option<char> {
        let c = self.0.chars().next()?;
        self.0 = self.0.get(c.len_utf8()..).unwrap_or_default();
        Some(c)
    }

    fn next_of(&mut self, set: &str) -> Option<char> {
        if self.0.starts_with(|c: char| set.contains(c)) { self.next() } else { None }
    }

    fn number(&mut self) -> Result<Option<usize>> {
        let length = self.0.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.0.len());
        let (digits, rest) = self.0.split_at(length);
        self.0 = rest;
        if digits.is_empty() { Ok(None) } else { checked_width(digits.parse().ok()).map(Some) }
    }

    /// `(key)`.
    fn key(&mut self) -> Result<Option<&'a str>> {
        let Some(rest) = self.0.strip_prefix('(') else { return Ok(None) };
        match rest.split_once(')') {
            Some((key, rest)) => {
                self.0 = rest;
                Ok(Some(key))
            }
            None => invalid("the key of a format has no end"),
        }
    }
}

fn checked_width(width: Option<usize>) -> Result<usize> {
    match width.filter(|width| *width <= MAX_WIDTH) {
        Some(width) => Ok(width),
        None => invalid("the width of a format is too large"),
    }
}

/// `text.format(..)`.
pub(super) fn str_format(text: &str, safe: bool, args: &Args) -> Result<String> {
    let mut out = String::new();
    let mut automatic = 0;
    let mut chars = text.char_indices().peekable();
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
                let value = replaced(field, args, &mut automatic)?;
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
            with_sign(super::text::float_repr(value.abs()), value.is_sign_negative(), spec)
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

fn with_sign(digits: String, negative: bool, spec: &Spec) -> String {
    let sign = match (negative, spec.sign) {
        (true, _) => "-",
        (false, Some('+')) => "+",
        (false, Some(' ')) => " ",
        _ => "",
    };
    let digits = match spec.grouping {
        Some(separator) => grouped(&digits, separator),
        None => digits,
    };
    format!("{sign}{digits}")
}

/// Digits in groups of three, as far as the point.
fn grouped(digits: &str, separator: char) -> String {
    let whole = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    let (whole, rest) = digits.split_at(whole);
    let mut out = String::new();
    for (i, c) in whole.chars().enumerate() {
        if i > 0 && (whole.len() - i) % 3 == 0 {
            out.push(separator);
        }
        out.push(c);
    }
    out + rest
}

fn integer_text(value: &Value, kind: char, spec: &Spec) -> String {
    let value = value.as_int().unwrap_or_default();
    let magnitude = value.unsigned_abs();
    let digits = match kind {
        'x' => format!("{magnitude:x}"),
        'X' => format!("{magnitude:X}"),
        'o' => format!("{magnitude:o}"),
        'b' => format!("{magnitude:b}"),
        _ => magnitude.to_string(),
    };
    let zeros = spec.precision.unwrap_or_default().saturating_sub(digits.len());
    let prefix = if spec.alternate && kind != 'd' { format!("0{kind}") } else { String::new() };
    with_sign(format!("{prefix}{}{digits}", "0".repeat(zeros)), value < 0, spec)
}

fn float_text(value: f64, kind: char, spec: &Spec) -> String {
    let precision = spec.precision.unwrap_or(6);
    let magnitude = value.abs();
    let text = if !value.is_finite() {
        if value.is_nan() { "nan".to_owned() } else { "inf".to_owned() }
    } else {
        match kind.to_ascii_lowercase() {
            'f' => format!("{magnitude:.precision$}"),
            'e' => exponential(&format!("{magnitude:.precision$e}")),
            _ => general(magnitude, precision.max(1), spec.alternate),
        }
    };
    let text = if kind.is_ascii_uppercase() { text.to_uppercase() } else { text };
    with_sign(text, value.is_sign_negative() && !value.is_nan(), spec)
}

/// Rust's `1.5e-7` as Python's `1.5e-07`.
fn exponential(text: &str) -> String {
    let (mantissa, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let (sign, digits) = exponent.strip_prefix('-').map_or(('+', exponent), |digits| ('-', digits));
    format!("{mantissa}e{sign}{digits:0>2}")
}

/// `%g`.
fn general(value: f64, precision: usize, keep_zeros: bool) -> String {
    let rounded = format!("{value:.*e}", precision - 1);
    let exponent = if value == 0.0 { 0 } else { shortest_digits(rounded.parse().unwrap_or(value)).1 };
    let without_zeros = |text: &str| match text.contains('.') && !keep_zeros {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text.to_owned(),
    };
    if exponent < -4 || exponent >= precision as i32 {
        let (mantissa, rest) = rounded.split_once('e').unwrap_or((&rounded, "0"));
        return exponential(&format!("{}e{rest}", without_zeros(mantissa)));
    }
    let decimals = usize::try_from(precision as i32 - 1 - exponent).unwrap_or_default();
    without_zeros(&format!("{value:.decimals$}"))
}

fn pad(text: &str, spec: &Spec, default_align: char) -> String {
    let missing = spec.width.saturating_sub(text.chars().count());
    let fill = spec.fill.unwrap_or(' ');
    let blanks = |count: usize| fill.to_string().repeat(count);
    match spec.align.unwrap_or(default_align) {
        '<' => format!("{text}{}", blanks(missing)),
        '^' => format!("{}{text}{}", blanks(missing / 2), blanks(missing - missing / 2)),
        '=' => {
            let signs = text.len() - text.trim_start_matches(['+', '-', ' ']).len();
            let (sign, digits) = text.split_at(signs);
            format!("{sign}{}{digits}", blanks(missing))
        }
        _ => format!("{}{text}", blanks(missing)),
    }
}

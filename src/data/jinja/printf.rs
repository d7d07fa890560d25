//! `'%s' % x`.

use super::error::{Result, invalid, unsupported};
use super::spec::{Field, Spec, checked_width, float_text, integer_text, pad};
use super::steps::{self, Length};
use super::value::Value;

/// `text % value`.
pub(super) fn printf(text: &str, value: &Value) -> Result<String> {
    let values = match value {
        Value::Tuple(items) => items.to_vec(),
        other => vec![other.clone()],
    };
    let mut operands = Operands { all: value, rest: values.into_iter(), used_mapping: false };
    let mut out = String::new();
    let (mut rest, mut length) = (text, Length::default());
    while let Some((before, field)) = rest.split_once('%') {
        out.push_str(before);
        let mut chars = Field(field);
        let key = chars.key()?;
        let spec = operands.spec(&mut chars)?;
        let Some(kind) = chars.next() else { return invalid("an incomplete format") };
        rest = chars.0;
        match kind {
            '%' => out.push('%'),
            kind => {
                steps::spend(1)?;
                let field = printf_field(kind, spec, &operands.value(key)?)?;
                length.add(field.len())?;
                out.push_str(&field);
            }
        }
    }
    out.push_str(rest);
    let Operands { all, rest: mut unused, used_mapping } = operands;
    if !used_mapping && unused.next().is_some() && !matches!(all, Value::Dict(_) | Value::List(_)) {
        return invalid("not all arguments were converted during string formatting");
    }
    Ok(out)
}

/// What stands after `%`.
struct Operands<'a> {
    all: &'a Value,
    /// Those without a key that are not used yet.
    rest: std::vec::IntoIter<Value>,
    /// Whether a field had a key.
    used_mapping: bool,
}

impl Operands<'_> {
    /// Flags, width, precision and length of a field.
    fn spec(&mut self, chars: &mut Field<'_>) -> Result<Spec> {
        let mut spec = Spec { align: Some('>'), ..Spec::default() };
        while let Some(flag) = chars.next_of("-+ #0") {
            match flag {
                '-' => spec.align = Some('<'),
                '#' => spec.alternate = true,
                '0' => spec.fill = Some('0'),
                sign => spec.sign = Some(if spec.sign == Some('+') { '+' } else { sign }),
            }
        }
        spec.width = match self.star(chars)? {
            Some(width) => {
                if width < 0 {
                    spec.align = Some('<');
                }
                checked_width(usize::try_from(width.unsigned_abs()).ok())?
            }
            None => chars.number()?.unwrap_or_default(),
        };
        if chars.next_of(".").is_some() {
            spec.precision = match self.star(chars)? {
                Some(precision) => Some(checked_width(usize::try_from(precision.max(0)).ok())?),
                None => Some(chars.number()?.unwrap_or_default()),
            };
        }
        while chars.next_of("hlL").is_some() {}
        Ok(spec)
    }

    /// The integer that `*` stands for.
    fn star(&mut self, chars: &mut Field<'_>) -> Result<Option<i128>> {
        match chars.next_of("*") {
            Some(_) => match self.rest.next().as_ref().and_then(Value::as_int) {
                Some(number) => Ok(Some(number)),
                None => invalid("* wants an integer"),
            },
            None => Ok(None),
        }
    }

    /// The value of a field.
    fn value(&mut self, key: Option<&str>) -> Result<Value> {
        let Some(key) = key else {
            return match self.rest.next() {
                Some(value) => Ok(value),
                None => invalid("not enough arguments for a format string"),
            };
        };
        self.used_mapping = true;
        match self.all.as_dict().map(|dict| dict.get_str(key)) {
            Some(Some(value)) => Ok(value.clone()),
            Some(None) => invalid(format!("the key {key:?} of a format is missing")),
            None => invalid("a format with keys requires a dict"),
        }
    }
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

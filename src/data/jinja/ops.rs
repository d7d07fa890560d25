//! Operators, attributes and items, as Python has them.

use std::cmp::Ordering;
use std::sync::Arc;

use super::ast::{Binary, Comparison};
use super::budget;
use super::error::{ErrorKind, Result, invalid, unsupported};
use super::names::method;
use super::printf::printf;
use super::steps::{self, checked_length};
use super::text::escape;
use super::value::{Value, range_length};

/// Items of a list that an operator makes, at most.
const MAX_ITEMS: usize = 1 << 20;

/// The error of a value that is not there.
pub(super) fn undefined(value: &Value) -> ErrorKind {
    match value {
        Value::Undefined(Some(reason)) => ErrorKind::Undefined(reason.to_string()),
        _ => ErrorKind::Undefined("the value is undefined".to_owned()),
    }
}

/// Fails where the value is not there.
pub(super) fn defined(value: &Value) -> Result<&Value> {
    if value.is_undefined() { Err(undefined(value)) } else { Ok(value) }
}

pub(super) fn binary(operator: Binary, left: &Value, right: &Value) -> Result<Value> {
    let (left, right) = (defined(left)?, defined(right)?);
    [left, right].into_iter().try_for_each(budget::spend_text)?;
    let result = match operator {
        Binary::Add => add(left, right)?,
        Binary::Mul => multiply(left, right)?,
        Binary::Mod => match left {
            Value::Str(text) => Some(Value::from(printf(text, right)?)),
            Value::Markup(_) => return unsupported("% of a string that is marked as safe"),
            _ => None,
        },
        _ => None,
    };
    if let Some(result) = &result {
        budget::spend_text(result)?;
        steps::spend_items(result.as_list().map_or(0, <[Value]>::len))?;
    }
    match result.map(Ok).or_else(|| arithmetic(operator, left, right)) {
        Some(result) => result,
        None => invalid(format!(
            "unsupported operand types for {}: {} and {}",
            operator.symbol(),
            left.type_name(),
            right.type_name()
        )),
    }
}

fn add(left: &Value, right: &Value) -> Result<Option<Value>> {
    Ok(Some(match (left, right) {
        (Value::Str(a), Value::Str(b)) => Value::from(joined(a, b)?),
        // What is added to a string that is marked as safe is escaped.
        (Value::Markup(a), Value::Markup(b)) => Value::Markup(joined(a, b)?.into()),
        (Value::Markup(a), Value::Str(b)) => Value::Markup(joined(a, &escape(b))?.into()),
        (Value::Str(a), Value::Markup(b)) => Value::Markup(joined(&escape(a), b)?.into()),
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) if a.len() + b.len() > MAX_ITEMS => {
            return Err(ErrorKind::Limit("makes a list that is too long"));
        }
        (Value::List(a), Value::List(b)) => Value::from([a.as_slice(), b].concat()),
        (Value::Tuple(a), Value::Tuple(b)) => Value::tuple([a.as_slice(), b].concat()),
        _ => return Ok(None),
    }))
}

fn joined(a: &str, b: &str) -> Result<String> {
    checked_length(a.len() + b.len())?;
    Ok([a, b].concat())
}

fn multiply(left: &Value, right: &Value) -> Result<Option<Value>> {
    let (repeated, count) = match (left.as_int(), right.as_int()) {
        (None, Some(count)) => (left, count),
        (Some(count), None) => (right, count),
        _ => return Ok(None),
    };
    let count = usize::try_from(count.max(0)).unwrap_or(usize::MAX);
    let fits = |length: usize| checked_length(length.saturating_mul(count)).is_ok();
    let fits_items = |length: usize| length.saturating_mul(count) <= MAX_ITEMS;
    let limit = Err(ErrorKind::Limit("repeats a value too often"));
    Ok(Some(match repeated {
        Value::Str(text) if fits(text.len()) => Value::from(text.repeat(count)),
        Value::Markup(text) if fits(text.len()) => Value::Markup(text.repeat(count).into()),
        Value::List(items) if fits_items(items.len()) => Value::from(vec![items.as_slice(); count].concat()),
        Value::Tuple(items) if fits_items(items.len()) => Value::tuple(vec![items.as_slice(); count].concat()),
        Value::Str(_) | Value::Markup(_) | Value::List(_) | Value::Tuple(_) => return limit,
        _ => return Ok(None),
    }))
}

/// Of two numbers; `None` for other values.
fn arithmetic(operator: Binary, left: &Value, right: &Value) -> Option<Result<Value>> {
    if let (Some(a), Some(b)) = (left.as_int(), right.as_int()) {
        return Some(of_integers(operator, a, b));
    }
    let (a, b) = (left.as_number()?, right.as_number()?);
    Some(of_floats(operator, a, b))
}

fn of_integers(operator: Binary, a: i128, b: i128) -> Result<Value> {
    let result = match operator {
        Binary::Add => a.checked_add(b),
        Binary::Sub => a.checked_sub(b),
        Binary::Mul => a.checked_mul(b),
        Binary::FloorDiv | Binary::Mod | Binary::Div if b == 0 => return invalid("division by zero"),
        Binary::Div => return Ok(Value::Float(a as f64 / b as f64)),
        Binary::FloorDiv => a.checked_div_euclid(b).map(|quotient| {
            // Python rounds down whatever the signs are.
            if b < 0 && a.rem_euclid(b) != 0 { quotient - 1 } else { quotient }
        }),
        Binary::Mod => {
            let rest = a.checked_rem_euclid(b);
            rest.map(|rest| if b < 0 && rest != 0 { rest + b } else { rest })
        }
        Binary::Pow if b < 0 => return of_floats(operator, a as f64, b as f64),
        Binary::Pow => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
    };
    result.map(Value::Int).ok_or_else(|| ErrorKind::Unsupported("integers of more than 127 bits".to_owned()))
}

fn of_floats(operator: Binary, a: f64, b: f64) -> Result<Value> {
    let zero = matches!(operator, Binary::Div | Binary::FloorDiv | Binary::Mod) && b == 0.0;
    if zero || (operator == Binary::Pow && a == 0.0 && b < 0.0) {
        return invalid("division by zero");
    }
    // Python's remainder has the sign of the divisor.
    let remainder = || {
        let rest = a % b;
        if rest != 0.0 && (rest < 0.0) != (b < 0.0) {
            rest + b
        } else if rest == 0.0 {
            0.0_f64.copysign(b)
        } else {
            rest
        }
    };
    Ok(Value::Float(match operator {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => a / b,
        Binary::FloorDiv => ((a - remainder()) / b).round(),
        Binary::Mod => remainder(),
        Binary::Pow if a < 0.0 && b.fract() != 0.0 => return unsupported("complex numbers"),
        Binary::Pow => a.powf(b),
    }))
}

pub(super) fn negative(value: &Value) -> Result<Value> {
    match defined(value)? {
        Value::Float(value) => Ok(Value::Float(-value)),
        other => match other.as_int().and_then(i128::checked_neg) {
            Some(value) => Ok(Value::Int(value)),
            None => invalid(format!("bad operand type for unary -: {}", other.type_name())),
        },
    }
}

pub(super) fn positive(value: &Value) -> Result<Value> {
    match defined(value)? {
        Value::Float(value) => Ok(Value::Float(*value)),
        other => match other.as_int() {
            Some(value) => Ok(Value::Int(value)),
            None => invalid(format!("bad operand type for unary +: {}", other.type_name())),
        },
    }
}

/// `==`, `<` and the like; `in` is [`contains`].
pub(super) fn compare(comparison: Comparison, left: &Value, right: &Value) -> Result<bool> {
    for value in [left, right] {
        budget::spend_walk(value)?;
    }
    let order = || order(left, right);
    Ok(match comparison {
        Comparison::Eq => left == right,
        Comparison::Ne => left != right,
        Comparison::Lt => order()? == Some(Ordering::Less),
        Comparison::Gt => order()? == Some(Ordering::Greater),
        Comparison::Le => matches!(order()?, Some(Ordering::Less | Ordering::Equal)),
        Comparison::Ge => matches!(order()?, Some(Ordering::Greater | Ordering::Equal)),
        Comparison::In => contains(right, left)?,
        Comparison::NotIn => !contains(right, left)?,
    })
}

/// The order of two values; `None` where one is NaN.
pub(super) fn order(left: &Value, right: &Value) -> Result<Option<Ordering>> {
    let (left, right) = (defined(left)?, defined(right)?);
    if let (Some(a), Some(b)) = (left.as_int(), right.as_int()) {
        return Ok(Some(a.cmp(&b)));
    }
    if let (Some(a), Some(b)) = (left.as_number(), right.as_number()) {
        return Ok(a.partial_cmp(&b));
    }
    match (left, right) {
        (Value::Str(a) | Value::Markup(a), Value::Str(b) | Value::Markup(b)) => Ok(Some(a.cmp(b))),
        (Value::List(a), Value::List(b)) | (Value::Tuple(a), Value::Tuple(b)) => {
            match a.iter().zip(b.iter()).find(|(a, b)| a != b) {
                Some((a, b)) => order(a, b),
                None => Ok(Some(a.len().cmp(&b.len()))),
            }
        }
        _ => invalid(format!("a {} and a {} have no order", left.type_name(), right.type_name())),
    }
}

/// Sorts as Python does: stable, and with an error where two values have no order.
pub(super) fn sort_by_key<T>(items: &mut Vec<T>, reverse: bool, key: impl Fn(&T) -> Result<Value>) -> Result<()> {
    let mut keyed =
        std::mem::take(items).into_iter().map(|item| Ok((key(&item)?, item))).collect::<Result<Vec<(Value, T)>>>()?;
    let mut steps = 0;
    for (key, _) in &keyed {
        steps += budget::spend_walk(key)?;
    }
    steps::spend(steps.saturating_mul(keyed.len().max(1).ilog2() as usize))?;
    let mut failed = None;
    keyed.sort_by(|(a, _), (b, _)| {
        let order = order(a, b).unwrap_or_else(|error| {
            failed.get_or_insert(error);
            None
        });
        let order = order.unwrap_or(Ordering::Equal);
        if reverse { order.reverse() } else { order }
    });
    items.extend(keyed.into_iter().map(|(_, item)| item));
    failed.map_or(Ok(()), Err)
}

/// `item in container`, except for objects of a rendering.
pub(super) fn contains(container: &Value, item: &Value) -> Result<bool> {
    [container, item].into_iter().try_for_each(budget::spend_text)?;
    if let Value::Dict(dict) = container {
        budget::spend_lookup(dict, item)?;
    } else if container.as_str().is_none() {
        steps::spend_items(container.len().unwrap_or_default())?;
        budget::spend_walk(container)?;
    }
    match container {
        Value::Str(text) | Value::Markup(text) => match item.as_str() {
            Some(item) => Ok(text.contains(item)),
            None => invalid(format!("'in <string>' requires a string, not a {}", item.type_name())),
        },
        Value::Dict(dict) if item.is_hashable() => Ok(dict.get(item).is_some()),
        Value::Dict(_) => invalid(format!("a {} cannot be a key", item.type_name())),
        other => match other.items() {
            Some(items) => Ok(items.contains(item)),
            None => invalid(format!("a {} cannot be searched", other.type_name())),
        },
    }
}

/// `value.name`: methods go before keys.
pub(super) fn attribute(value: &Value, name: &str) -> Result<Value> {
    defined(value)?;
    if let Some(method) = method(value, name) {
        return Ok(method.unwrap_or_else(|| hidden(value, name)));
    }
    if name.starts_with("__") {
        return Ok(hidden(value, name));
    }
    let found = match value {
        Value::Dict(dict) => dict.get_str(name).cloned(),
        // Such a pair may be one of `groupby`.
        Value::Tuple(pair) if pair.len() == 2 && ["grouper", "list"].contains(&name) => {
            return unsupported(format!("the attribute {name:?} of a pair"));
        }
        _ => None,
    };
    Ok(found.unwrap_or_else(|| no_attribute(value, name)))
}

/// What the sandbox of Jinja2 hides.
fn hidden(value: &Value, name: &str) -> Value {
    Value::undefined(format!("access to attribute {name:?} of a {} is unsafe", value.type_name()))
}

fn no_attribute(value: &Value, name: &str) -> Value {
    Value::undefined(format!("a {} has no attribute {name:?}", value.type_name()))
}

/// `value[key]`: items go before methods.
pub(super) fn item(value: &Value, key: &Value) -> Result<Value> {
    defined(value)?;
    budget::spend_text(value)?;
    if let Value::Dict(dict) = value {
        budget::spend_lookup(dict, key)?;
    }
    if let Some(found) = own_item(value, key) {
        return Ok(found);
    }
    match key.as_str() {
        Some(name) if !matches!(value, Value::Dict(_)) || method(value, name).is_some() => attribute(value, name),
        Some(name) => Ok(no_attribute(value, name)),
        None => Ok(Value::undefined(format!("a {} has no item {key}", value.type_name()))),
    }
}

fn own_item(value: &Value, key: &Value) -> Option<Value> {
    let index = |length: usize| {
        let index = key.as_int()?;
        usize::try_from(if index < 0 { index + length as i128 } else { index }).ok().filter(|index| *index < length)
    };
    match value {
        Value::Dict(dict) if key.is_hashable() => dict.get(key).cloned(),
        Value::List(items) | Value::Tuple(items) => items.get(index(items.len())?).cloned(),
        Value::Range(start, _, step) => Some(Value::Int(start + index(value.len()?)? as i128 * step)),
        Value::Str(text) => Some(Value::from(text.chars().nth(index(value.len()?)?)?.to_string())),
        Value::Markup(text) => {
            let c = text.chars().nth(index(value.len()?)?)?;
            Some(Value::Markup(c.to_string().into()))
        }
        _ => None,
    }
}

/// `value[start:stop:step]`.
pub(super) fn slice(value: &Value, bounds: &[Value; 3]) -> Result<Value> {
    defined(value)?;
    budget::spend_text(value)?;
    let cannot = || invalid(format!("a {} cannot be sliced so", value.type_name()));
    let Some(length) = value.len().filter(|_| !matches!(value, Value::Dict(_) | Value::View(..))) else { return cannot() };
    let mut parts = [None; 3];
    for (part, bound) in parts.iter_mut().zip(bounds) {
        *part = match bound {
            Value::None => None,
            bound => match bound.as_int() {
                Some(bound) => Some(bound),
                None => return cannot(),
            },
        };
    }
    let [start, stop, step] = parts;
    let step = step.unwrap_or(1);
    if step == 0 {
        return invalid("slice step cannot be zero");
    }
    let (start, stop) = slice_bounds(start, stop, step, length as i128);
    if let Value::Range(first, _, by) = value {
        return Ok(Value::Range(first + start * by, first + stop * by, by * step));
    }
    let count = range_length(start, stop, step);
    if value.as_str().is_none() {
        steps::spend_items(count)?;
    }
    let indices = (0..count).filter_map(|i| usize::try_from(start + i as i128 * step).ok());
    Ok(match value {
        Value::Str(text) | Value::Markup(text) => {
            let chars: Vec<char> = text.chars().collect();
            let part: Arc<str> = indices.filter_map(|i| chars.get(i)).collect::<String>().into();
            if matches!(value, Value::Markup(_)) { Value::Markup(part) } else { Value::Str(part) }
        }
        Value::Tuple(items) => Value::tuple(indices.filter_map(|i| items.get(i).cloned()).collect()),
        Value::List(items) => Value::from(indices.filter_map(|i| items.get(i).cloned()).collect::<Vec<_>>()),
        _ => return cannot(),
    })
}

fn slice_bounds(start: Option<i128>, stop: Option<i128>, step: i128, length: i128) -> (i128, i128) {
    let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let bound = |bound: Option<i128>, default: i128| match bound {
        None => default,
        Some(bound) if bound < 0 => bound.saturating_add(length).clamp(low, high),
        Some(bound) => bound.clamp(low, high),
    };
    if step > 0 { (bound(start, low), bound(stop, high)) } else { (bound(start, high), bound(stop, low)) }
}

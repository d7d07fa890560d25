//! Values of templates: those of Python that JSON and templates can make.

use std::collections::HashMap;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};

use super::error::ErrorKind;
use super::steps::{self, Writer};
use super::text::{float_repr, write_string_repr};

/// A value of a template, as Python has it.
#[derive(Debug, Clone)]
pub enum Value {
    /// What a name without a value gives, with what to say where it is used.
    Undefined(Option<Arc<str>>),
    /// `None`.
    None,
    /// `True` or `False`.
    Bool(bool),
    /// An integer; Python's have no bounds.
    Int(i128),
    /// A float.
    Float(f64),
    /// A string.
    Str(Arc<str>),
    /// A string that `safe` or `escape` made: what is added to it is escaped.
    Markup(Arc<str>),
    /// A list.
    List(Arc<Items>),
    /// A tuple.
    Tuple(Arc<Items>),
    /// A dict.
    Dict(Arc<Dict>),
    /// `range(start, stop, step)`.
    Range(i128, i128, i128),
    /// What `keys()`, `values()` and `items()` give.
    View(View, Arc<Dict>),
    /// A method of a value.
    Method(Arc<(Value, &'static str)>),
    /// A function that every template knows.
    Function(Function),
    /// What only lives while a template is rendered: its number there.
    Object(usize),
}

/// What a view of a dict shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// Its keys.
    Keys,
    /// Its values.
    Values,
    /// Both, as tuples.
    Items,
}

/// The functions that every template knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Function {
    /// `range`.
    Range,
    /// `dict`.
    Dict,
    /// `namespace`.
    Namespace,
    /// `cycler`.
    Cycler,
    /// `joiner`.
    Joiner,
    /// `lipsum`.
    Lipsum,
    /// `raise_exception`.
    RaiseException,
    /// `strftime_now`.
    StrftimeNow,
}

/// The items of a list or a tuple.
#[derive(Debug)]
pub struct Items {
    values: Vec<Value>,
    /// Levels of values within them.
    levels: usize,
}

impl From<Vec<Value>> for Items {
    fn from(values: Vec<Value>) -> Self {
        let levels = values.iter().map(Value::levels).max().unwrap_or_default();
        Self { values, levels }
    }
}

impl Deref for Items {
    type Target = Vec<Value>;

    fn deref(&self) -> &Vec<Value> {
        &self.values
    }
}

/// A dict: keys in the order in which they came.
#[derive(Debug, Clone, Default)]
pub struct Dict {
    entries: Vec<(Value, Value)>,
    /// Where keys that are strings are.
    places: HashMap<Arc<str>, usize>,
    /// Levels of values within it, at most.
    levels: usize,
}

impl Dict {
    /// The keys and values.
    pub fn entries(&self) -> &[(Value, Value)] {
        &self.entries
    }

    /// Without a key that is a string; what it meant.
    pub fn remove_str(&mut self, key: &str) -> Option<Value> {
        let place = self.places.remove(key)?;
        self.places.values_mut().filter(|later| **later > place).for_each(|later| *later -= 1);
        Some(self.entries.remove(place).1)
    }

    fn place(&self, key: &Value) -> Option<usize> {
        match key {
            Value::Str(key) | Value::Markup(key) => self.places.get(key.as_ref()).copied(),
            key => self.entries.iter().position(|(known, _)| known == key),
        }
    }

    /// The value of a key.
    pub fn get(&self, key: &Value) -> Option<&Value> {
        self.place(key).and_then(|place| self.entries.get(place)).map(|(_, value)| value)
    }

    /// The value of a key that is a string.
    pub fn get_str(&self, key: &str) -> Option<&Value> {
        self.places.get(key).and_then(|&place| self.entries.get(place)).map(|(_, value)| value)
    }

    /// Adds a key, or replaces its value.
    pub fn insert(&mut self, key: Value, value: Value) {
        self.levels = self.levels.max(key.levels()).max(value.levels());
        if let Some((_, old)) = self.place(&key).and_then(|place| self.entries.get_mut(place)) {
            *old = value;
            return;
        }
        if let Value::Str(key) | Value::Markup(key) = &key {
            self.places.insert(key.clone(), self.entries.len());
        }
        self.entries.push((key, value));
    }
}

impl FromIterator<(Value, Value)> for Dict {
    fn from_iter<T: IntoIterator<Item = (Value, Value)>>(pairs: T) -> Self {
        let mut dict = Self::default();
        pairs.into_iter().for_each(|(key, value)| dict.insert(key, value));
        dict
    }
}

impl Default for Value {
    fn default() -> Self {
        Self::Undefined(None)
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Str(text.into())
    }
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Str(text.into())
    }
}

impl From<&String> for Value {
    fn from(text: &String) -> Self {
        Self::Str(text.as_str().into())
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<usize> for Value {
    fn from(value: usize) -> Self {
        Self::Int(value as i128)
    }
}

impl From<i128> for Value {
    fn from(value: i128) -> Self {
        Self::Int(value)
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Float(value)
    }
}

impl From<Vec<Value>> for Value {
    fn from(items: Vec<Value>) -> Self {
        Self::List(Arc::new(items.into()))
    }
}

impl From<Dict> for Value {
    fn from(dict: Dict) -> Self {
        Self::Dict(Arc::new(dict))
    }
}

/// Equality of Python: `1 == 1.0 == True`, and a tuple is no list.
impl PartialEq for Value {
    fn eq(&self, other: &Self) -> bool {
        if let (Some(a), Some(b)) = (self.as_int(), other.as_int()) {
            return a == b;
        }
        if let (Some(a), Some(b)) = (self.as_number(), other.as_number()) {
            return a == b;
        }
        match (self, other) {
            (Self::Undefined(_), Self::Undefined(_)) | (Self::None, Self::None) => true,
            (Self::Str(a) | Self::Markup(a), Self::Str(b) | Self::Markup(b)) => a == b,
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => a.as_slice() == b.as_slice(),
            (Self::Dict(a), Self::Dict(b)) => {
                a.entries.len() == b.entries.len() && a.entries.iter().all(|(key, value)| b.get(key) == Some(value))
            }
            (Self::Range(..), Self::Range(..)) => self.items() == other.items(),
            (Self::Method(a), Self::Method(b)) => a.0 == b.0 && a.1 == b.1,
            (Self::Function(a), Self::Function(b)) => a == b,
            (Self::Object(a), Self::Object(b)) => a == b,
            _ => false,
        }
    }
}

impl Value {
    /// A dict.
    pub fn from_pairs<K: Into<Value>, V: Into<Value>>(pairs: impl IntoIterator<Item = (K, V)>) -> Self {
        Self::from(pairs.into_iter().map(|(key, value)| (key.into(), value.into())).collect::<Dict>())
    }

    /// An undefined value, and why it is.
    pub(super) fn undefined(reason: impl Into<Arc<str>>) -> Self {
        Self::Undefined(Some(reason.into()))
    }

    pub(super) fn tuple(items: Vec<Value>) -> Self {
        Self::Tuple(Arc::new(items.into()))
    }

    /// Whether there is no value.
    pub fn is_undefined(&self) -> bool {
        matches!(self, Self::Undefined(_))
    }

    /// Whether it is `None`.
    pub fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }

    /// The text of a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) | Self::Markup(text) => Some(text),
            _ => None,
        }
    }

    /// The items of a list.
    pub fn as_list(&self) -> Option<&[Value]> {
        if let Self::List(items) = self { Some(items) } else { None }
    }

    /// The dict that it is.
    pub fn as_dict(&self) -> Option<&Dict> {
        if let Self::Dict(dict) = self { Some(dict) } else { None }
    }

    /// Whether it is an integer or a float.
    pub fn is_number(&self) -> bool {
        matches!(self, Self::Int(_) | Self::Float(_))
    }

    /// What `True` and 1, or `False` and 0, say.
    pub fn as_flag(&self) -> Option<bool> {
        self.as_number().filter(|number| [0.0, 1.0].contains(number)).map(|number| number == 1.0)
    }

    /// The value of a key of a dict; undefined where there is none.
    pub fn get(&self, key: &str) -> Value {
        self.as_dict().and_then(|dict| dict.get_str(key)).cloned().unwrap_or_default()
    }

    /// The integer that it is; `True` is 1.
    pub(super) fn as_int(&self) -> Option<i128> {
        match self {
            Self::Bool(value) => Some(i128::from(*value)),
            Self::Int(value) => Some(*value),
            _ => None,
        }
    }

    /// The number that it is.
    pub(super) fn as_number(&self) -> Option<f64> {
        if let Self::Float(value) = self { Some(*value) } else { self.as_int().map(|value| value as f64) }
    }

    /// Python's `bool(x)`.
    pub fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(value) => *value,
            Self::Int(value) => *value != 0,
            Self::Float(value) => *value != 0.0,
            Self::Str(text) | Self::Markup(text) => !text.is_empty(),
            Self::List(items) | Self::Tuple(items) => !items.is_empty(),
            Self::Dict(dict) | Self::View(_, dict) => !dict.entries.is_empty(),
            Self::Range(..) => self.len() != Some(0),
            Self::Method(_) | Self::Function(_) | Self::Object(_) => true,
        }
    }

    /// Python's `len(x)`, where there is one.
    pub(super) fn len(&self) -> Option<usize> {
        match self {
            Self::Undefined(_) => Some(0),
            Self::Str(text) | Self::Markup(text) => Some(text.chars().count()),
            Self::List(items) | Self::Tuple(items) => Some(items.len()),
            Self::Dict(dict) | Self::View(_, dict) => Some(dict.entries.len()),
            Self::Range(start, stop, step) => Some(range_length(*start, *stop, *step)),
            _ => None,
        }
    }

    /// What a loop over it sees; `None` where Python has no iterator.
    pub(super) fn items(&self) -> Option<Vec<Value>> {
        Some(match self {
            Self::Undefined(_) => Vec::new(),
            Self::Str(text) | Self::Markup(text) => text.chars().map(|c| Self::from(c.to_string())).collect(),
            Self::List(items) | Self::Tuple(items) => items.to_vec(),
            Self::Dict(dict) => dict.entries.iter().map(|(key, _)| key.clone()).collect(),
            Self::View(view, dict) => dict.entries.iter().map(|entry| view.of(entry)).collect(),
            Self::Range(start, stop, step) => {
                (0..range_length(*start, *stop, *step)).map(|i| Self::Int(start + i as i128 * step)).collect()
            }
            _ => return None,
        })
    }

    /// Levels of lists, tuples and dicts that are nested in one another.
    pub(super) fn levels(&self) -> usize {
        match self {
            Self::List(items) | Self::Tuple(items) => 1 + items.levels,
            Self::Dict(dict) | Self::View(_, dict) => 1 + dict.levels,
            Self::Method(method) => 1 + method.0.levels(),
            _ => 0,
        }
    }

    /// Whether it has no more than `nodes` values in it, those that it has twice counted twice.
    /// What is larger would take forever to write.
    pub(super) fn is_within(&self, nodes: &mut usize) -> bool {
        let Some(left) = nodes.checked_sub(1) else { return false };
        *nodes = left;
        let mut inner = |value: &Self| value.is_within(nodes);
        match self {
            Self::List(items) | Self::Tuple(items) => items.iter().all(inner),
            Self::Dict(dict) | Self::View(_, dict) => dict.entries.iter().all(|(key, value)| inner(key) && inner(value)),
            Self::Method(method) => inner(&method.0),
            _ => true,
        }
    }

    /// The name of its type in Python.
    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) => "str",
            Self::Markup(_) => "Markup",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Dict(_) => "dict",
            Self::Range(..) => "range",
            Self::View(View::Keys, _) => "dict_keys",
            Self::View(View::Values, _) => "dict_values",
            Self::View(View::Items, _) => "dict_items",
            Self::Method(_) => "builtin_function_or_method",
            Self::Function(_) => "function",
            Self::Object(_) => "object",
        }
    }

    /// Whether it can be a key: lists and dicts cannot.
    pub(super) fn is_hashable(&self) -> bool {
        match self {
            Self::List(_) | Self::Dict(_) => false,
            Self::Tuple(items) => items.iter().all(Self::is_hashable),
            _ => true,
        }
    }

    /// Python's `str(x)`.
    pub(super) fn to_text(&self) -> Result<Arc<str>, ErrorKind> {
        Ok(match self {
            Self::Undefined(_) => "".into(),
            Self::Str(text) | Self::Markup(text) => text.clone(),
            other => other.repr()?.into(),
        })
    }

    /// Python's `repr(x)`.
    pub(super) fn repr(&self) -> Result<String, ErrorKind> {
        let mut out = Writer::default();
        self.write_repr(&mut out)?;
        Ok(out.finish())
    }

    fn write_repr(&self, out: &mut Writer) -> Result<(), ErrorKind> {
        steps::spend(1)?;
        match self {
            Self::Undefined(_) => out.push_str("Undefined"),
            Self::None => out.push_str("None"),
            Self::Bool(true) => out.push_str("True"),
            Self::Bool(false) => out.push_str("False"),
            Self::Int(value) => out.push_str(&value.to_string()),
            Self::Float(value) => out.push_str(&float_repr(*value)),
            Self::Str(text) => write_string_repr(text, out),
            Self::Markup(text) => {
                out.push_str("Markup(")?;
                write_string_repr(text, out)?;
                out.push(')')
            }
            Self::List(items) => write_reprs(["[", "]"], items, out),
            Self::Tuple(items) => write_reprs(["(", if items.len() == 1 { ",)" } else { ")" }], items, out),
            Self::Dict(dict) => {
                out.push('{')?;
                for (i, (key, value)) in dict.entries.iter().enumerate() {
                    out.push_str(if i > 0 { ", " } else { "" })?;
                    key.write_repr(out)?;
                    out.push_str(": ")?;
                    value.write_repr(out)?;
                }
                out.push('}')
            }
            Self::Range(start, stop, 1) => out.push_str(&format!("range({start}, {stop})")),
            Self::Range(start, stop, step) => out.push_str(&format!("range({start}, {stop}, {step})")),
            Self::View(_, _) => {
                out.push_str(self.type_name())?;
                write_reprs(["([", "])"], &self.items().unwrap_or_default(), out)
            }
            // Python prints an address.
            Self::Method(method) => Err(ErrorKind::Unsupported(format!("the text of the method {}", method.1))),
            Self::Function(_) | Self::Object(_) => {
                Err(ErrorKind::Unsupported(format!("the text of a {}", self.type_name())))
            }
        }
    }
}

/// Writes the `repr` of items between two marks.
fn write_reprs([open, close]: [&str; 2], items: &[Value], out: &mut Writer) -> Result<(), ErrorKind> {
    out.push_str(open)?;
    for (i, item) in items.iter().enumerate() {
        out.push_str(if i > 0 { ", " } else { "" })?;
        item.write_repr(out)?;
    }
    out.push_str(close)
}

impl View {
    fn of(self, (key, value): &(Value, Value)) -> Value {
        match self {
            Self::Keys => key.clone(),
            Self::Values => value.clone(),
            Self::Items => Value::tuple(vec![key.clone(), value.clone()]),
        }
    }
}

pub(super) fn range_length(start: i128, stop: i128, step: i128) -> usize {
    let distance = if step > 0 { stop.saturating_sub(start) } else { start.saturating_sub(stop) };
    let length = if distance <= 0 { 0 } else { (distance - 1) / step.saturating_abs() + 1 };
    usize::try_from(length).unwrap_or(usize::MAX)
}

/// As Python prints it; what Python prints with an address is shown by its type.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.to_text() {
            Ok(text) => f.write_str(&text),
            Err(_) => f.write_str(self.type_name()),
        }
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(JsonVisitor)
    }
}

struct JsonVisitor;

impl<'de> Visitor<'de> for JsonVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Int(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Int(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element()? {
            items.push(item);
        }
        Ok(items.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Value, A::Error> {
        let mut dict = Dict::default();
        while let Some((key, value)) = access.next_entry::<String, Value>()? {
            dict.insert(key.into(), value);
        }
        Ok(dict.into())
    }
}

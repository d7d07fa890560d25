//! Filters that map, choose and order, and the tests of Jinja2.

use super::args::{Args, flag_or, text_of};
use super::ast::{Binary, Comparison};
use super::budget;
use super::error::{ErrorKind, Result, invalid};
use super::eval::Interpreter;
use super::filters::FILTERS;
use super::objects::Object;
use super::ops;
use super::steps;
use super::value::Value;

pub(super) const TESTS: [&str; 39] = [
    "!=",
    "<",
    "<=",
    "==",
    ">",
    ">=",
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "eq",
    "equalto",
    "escaped",
    "even",
    "false",
    "filter",
    "float",
    "ge",
    "greaterthan",
    "gt",
    "in",
    "integer",
    "iterable",
    "le",
    "lessthan",
    "lower",
    "lt",
    "mapping",
    "ne",
    "none",
    "number",
    "odd",
    "sameas",
    "sequence",
    "string",
    "test",
    "true",
    "undefined",
    "upper",
];

impl Interpreter {
    /// What a path of names and numbers leads to: `a.b.0`.
    pub(super) fn path(&mut self, value: &Value, path: &Value) -> Result<Value> {
        let Some(path) = path.as_str() else { return self.item(value, path) };
        let mut value = value.clone();
        steps::spend(path.len())?;
        for step in path.split('.') {
            let key = step.parse::<usize>().map_or_else(|_| Value::from(step), Value::from);
            value = self.item(&value, &key)?;
        }
        Ok(value)
    }

    pub(super) fn map(&mut self, value: &Value, mut args: Args) -> Result<Value> {
        // What is false, None too, maps to nothing.
        let items = if value.is_true() { self.iterate(value)? } else { Vec::new() };
        let mut mapped = Vec::with_capacity(items.len());
        if args.positional.is_empty() && args.named.iter().any(|(name, _)| name == "attribute") {
            let [attribute, default] = args.bind("map", 0, ["attribute", "default"])?;
            let attribute = attribute.unwrap_or_default();
            for item in items {
                let found = self.path(&item, &attribute)?;
                let default = default.clone().filter(|default| found.is_undefined() && !default.is_none());
                mapped.push(default.unwrap_or(found));
            }
            return Ok(self.generator(mapped));
        }
        if args.positional.is_empty() {
            return invalid("map requires a filter argument");
        }
        let name = text_of("map", &args.positional.remove(0))?;
        for item in items {
            let args = Args { positional: args.positional.clone(), named: args.named.clone() };
            // The filter may be `map` again.
            mapped.push(self.deeper(|interpreter| interpreter.filter(&name, item, args))?);
        }
        Ok(self.generator(mapped))
    }

    pub(super) fn select(&mut self, filter: &str, value: &Value, mut args: Args) -> Result<Value> {
        let attribute = match (filter.ends_with("attr"), args.positional.is_empty()) {
            (true, true) => return invalid(format!("{filter} needs an attribute")),
            (true, false) => Some(args.positional.remove(0)),
            (false, _) => None,
        };
        let test = if args.positional.is_empty() { None } else { Some(text_of(filter, &args.positional.remove(0))?) };
        let keeps = filter.starts_with("select");
        let mut kept = Vec::new();
        let items = if value.is_true() { self.iterate(value)? } else { Vec::new() };
        for item in items {
            let tested = match &attribute {
                Some(attribute) => self.path(&item, attribute)?,
                None => item.clone(),
            };
            let holds = match &test {
                Some(test) => {
                    let args = Args { positional: args.positional.clone(), named: args.named.clone() };
                    self.test(test, &tested, args)?
                }
                None => tested.is_true(),
            };
            if holds == keeps {
                kept.push(item);
            }
        }
        Ok(self.generator(kept))
    }

    pub(super) fn ordered(&mut self, filter: &str, value: &Value, args: Args) -> Result<Value> {
        match filter {
            "sum" => self.sum(value, args),
            "dictsort" => dictsort(value, args),
            "sort" => {
                let [reverse, case_sensitive, attribute] =
                    args.bind(filter, 0, ["reverse", "case_sensitive", "attribute"])?;
                let mut keyed = self.keyed(value, case_sensitive.as_ref(), attribute.as_ref())?;
                ops::sort_by_key(&mut keyed, flag_or(reverse.as_ref(), false), |(key, _)| Ok(key.clone()))?;
                Ok(keyed.into_iter().map(|(_, item)| item).collect::<Vec<_>>().into())
            }
            "unique" => {
                let [case_sensitive, attribute] = args.bind(filter, 0, ["case_sensitive", "attribute"])?;
                let mut seen: Vec<Value> = Vec::new();
                let mut kept = Vec::new();
                for (key, item) in self.keyed_by_one(value, case_sensitive.as_ref(), attribute.as_ref())? {
                    self.burn(seen.len().saturating_mul(budget::spend_walk(&key)?))?;
                    if !key.is_hashable() {
                        return invalid(format!("a {} cannot be a key", key.type_name()));
                    }
                    if !seen.contains(&key) {
                        seen.push(key);
                        kept.push(item);
                    }
                }
                Ok(self.generator(kept))
            }
            _ => {
                let [case_sensitive, attribute] = args.bind(filter, 0, ["case_sensitive", "attribute"])?;
                let wanted = if filter == "min" { Comparison::Lt } else { Comparison::Gt };
                let mut keyed = self.keyed_by_one(value, case_sensitive.as_ref(), attribute.as_ref())?.into_iter();
                let Some(mut best) = keyed.next() else {
                    return Ok(Value::undefined("no aggregated item, sequence was empty"));
                };
                for next in keyed {
                    if ops::compare(wanted, &next.0, &best.0)? {
                        best = next;
                    }
                }
                Ok(best.1)
            }
        }
    }

    /// Items and the value of one attribute.
    fn keyed_by_one(
        &mut self,
        value: &Value,
        case_sensitive: Option<&Value>,
        attribute: Option<&Value>,
    ) -> Result<Vec<(Value, Value)>> {
        let ignores_case = !flag_or(case_sensitive, false);
        let path = attribute.filter(|attribute| !attribute.is_none());
        let mut keyed = Vec::new();
        for item in self.iterate(value)? {
            let key = match path {
                Some(path) => self.path(&item, path)?,
                None => item.clone(),
            };
            budget::spend_text(&key)?;
            keyed.push((folded(&key, ignores_case), item));
        }
        Ok(keyed)
    }

    /// Items and what they are sorted by: several attributes with commas between them.
    fn keyed(
        &mut self,
        value: &Value,
        case_sensitive: Option<&Value>,
        attribute: Option<&Value>,
    ) -> Result<Vec<(Value, Value)>> {
        let ignores_case = !flag_or(case_sensitive, false);
        let paths = attribute.filter(|attribute| !attribute.is_none()).map(|attribute| match attribute.as_str() {
            Some(paths) => paths.split(',').map(Value::from).collect(),
            None => vec![attribute.clone()],
        });
        let paths: Option<Vec<Value>> = paths;
        let items = self.iterate(value)?;
        let mut keyed = Vec::with_capacity(items.len());
        for item in items {
            let key = match &paths {
                None => {
                    budget::spend_text(&item)?;
                    folded(&item, ignores_case)
                }
                Some(paths) => {
                    let mut keys = Vec::new();
                    steps::spend(paths.len())?;
                    for path in paths {
                        keys.push(folded(&self.path(&item, path)?, ignores_case));
                    }
                    // Lists of keys are compared: two that are undefined are equal.
                    Value::from(keys)
                }
            };
            keyed.push((key, item));
        }
        Ok(keyed)
    }

    /// Jinja2's `groupby`: a list of pairs, each of a value and of the items that have it.
    pub(super) fn group(&mut self, value: &Value, args: Args) -> Result<Value> {
        let [attribute, default, case_sensitive] = args.bind("groupby", 1, ["attribute", "default", "case_sensitive"])?;
        let attribute = attribute.unwrap_or_default();
        let ignores_case = !flag_or(case_sensitive.as_ref(), false);
        let mut keyed = Vec::new();
        for item in self.iterate(value)? {
            let found = self.path(&item, &attribute)?;
            let default = default.clone().filter(|default| found.is_undefined() && !default.is_none());
            keyed.push((default.unwrap_or(found), item));
        }
        let key = |(key, _): &(Value, Value)| folded(key, ignores_case);
        ops::sort_by_key(&mut keyed, false, |pair| Ok(key(pair)))?;
        for (key, _) in &keyed {
            budget::spend_walk(key)?;
        }
        // Each group has the value of its first item.
        let groups = keyed.chunk_by(|a, b| key(a) == key(b)).map(|group| {
            let items: Vec<Value> = group.iter().map(|(_, item)| item.clone()).collect();
            Value::tuple(vec![group.first().map(|(key, _)| key.clone()).unwrap_or_default(), items.into()])
        });
        Ok(groups.collect::<Vec<_>>().into())
    }

    fn sum(&mut self, value: &Value, args: Args) -> Result<Value> {
        let [attribute, start] = args.bind("sum", 0, ["attribute", "start"])?;
        let mut sum = start.unwrap_or(Value::Int(0));
        if sum.as_str().is_some() {
            return invalid("sum cannot add strings");
        }
        for item in self.iterate(value)? {
            let item = match attribute.as_ref().filter(|attribute| !attribute.is_none()) {
                Some(attribute) => self.path(&item, attribute)?,
                None => item,
            };
            sum = ops::binary(Binary::Add, &sum, &item)?;
        }
        Ok(sum)
    }

    /// `value is name(args)`.
    pub(super) fn test(&mut self, name: &str, value: &Value, args: Args) -> Result<bool> {
        budget::spend_text(value)?;
        budget::spend_args(&args)?;
        let comparison = match name {
            "==" | "eq" | "equalto" => Some(Comparison::Eq),
            "!=" | "ne" => Some(Comparison::Ne),
            "<" | "lt" | "lessthan" => Some(Comparison::Lt),
            "<=" | "le" => Some(Comparison::Le),
            ">" | "gt" | "greaterthan" => Some(Comparison::Gt),
            ">=" | "ge" => Some(Comparison::Ge),
            _ => None,
        };
        if let Some(comparison) = comparison {
            let [other] = args.bind(name, 1, ["other"])?;
            return ops::compare(comparison, value, &other.unwrap_or_default());
        }
        match name {
            "in" => {
                let [container] = args.bind(name, 1, ["seq"])?;
                self.contains(&container.unwrap_or_default(), value)
            }
            "sameas" => {
                let [other] = args.bind(name, 1, ["other"])?;
                let other = other.unwrap_or_default();
                budget::spend_walk(&other)?;
                Ok(value.type_name() == other.type_name() && *value == other)
            }
            "divisibleby" => {
                let [number] = args.bind(name, 1, ["num"])?;
                Ok(!ops::binary(Binary::Mod, value, &number.unwrap_or_default())?.is_true())
            }
            "odd" | "even" => {
                let [] = args.bind(name, 0, [])?;
                let rest = ops::binary(Binary::Mod, value, &Value::Int(2))?;
                Ok(rest == Value::Int(i128::from(name == "odd")))
            }
            "filter" | "test" => {
                let [] = args.bind(name, 0, [])?;
                if !value.is_hashable() {
                    return invalid(format!("a {} cannot be a key", value.type_name()));
                }
                let known: &[&str] = if name == "filter" { &FILTERS } else { &TESTS };
                Ok(value.as_str().is_some_and(|value| known.contains(&value)))
            }
            name if TESTS.contains(&name) => {
                let [] = args.bind(name, 0, [])?;
                self.is(name, value)
            }
            name => Err(ErrorKind::Unknown { what: "test", name: name.to_owned() }),
        }
    }

    /// A test without arguments.
    fn is(&self, name: &str, value: &Value) -> Result<bool> {
        let object = if let Value::Object(id) = value { self.objects.get(*id) } else { None };
        Ok(match name {
            "defined" => !value.is_undefined(),
            "undefined" => value.is_undefined(),
            "none" => value.is_none(),
            "true" => matches!(value, Value::Bool(true)),
            "false" => matches!(value, Value::Bool(false)),
            "boolean" => matches!(value, Value::Bool(_)),
            "integer" => matches!(value, Value::Int(_)),
            "float" => matches!(value, Value::Float(_)),
            "number" => matches!(value, Value::Bool(_) | Value::Int(_) | Value::Float(_)),
            "string" => value.as_str().is_some(),
            "mapping" => matches!(value, Value::Dict(_)),
            "iterable" => value.items().is_some() || matches!(object, Some(Object::Generator(_) | Object::Loop(_))),
            // What has a length and items: a string and a dict, too, but no view of a dict.
            "sequence" => value.len().is_some() && !matches!(value, Value::View(..)),
            "callable" => {
                let called = matches!(object, Some(Object::Macro(..) | Object::Loop(_) | Object::Joiner(..)));
                called || matches!(value, Value::Undefined(_) | Value::Method(_) | Value::Function(_))
            }
            "escaped" => matches!(value, Value::Markup(_)),
            "lower" | "upper" => {
                let text = value.to_text()?;
                let [wrong, right]: [fn(char) -> bool; 2] = match name {
                    "lower" => [char::is_uppercase, char::is_lowercase],
                    _ => [char::is_lowercase, char::is_uppercase],
                };
                text.chars().any(right) && !text.chars().any(wrong)
            }
            name => return Err(ErrorKind::Unknown { what: "test", name: name.to_owned() }),
        })
    }
}

/// A string without its case, where that does not count.
fn folded(value: &Value, ignores_case: bool) -> Value {
    match value.as_str().filter(|_| ignores_case) {
        Some(text) => text.to_lowercase().into(),
        None => value.clone(),
    }
}

fn dictsort(value: &Value, args: Args) -> Result<Value> {
    let [case_sensitive, by, reverse] = args.bind("dictsort", 0, ["case_sensitive", "by", "reverse"])?;
    let ignores_case = !flag_or(case_sensitive.as_ref(), false);
    let by_value = match by.as_ref().map_or(Some("key"), Value::as_str) {
        Some("key") => false,
        Some("value") => true,
        _ => return invalid("dictsort sorts by \"key\" or \"value\""),
    };
    let Some(dict) = ops::defined(value)?.as_dict() else {
        return invalid(format!("dictsort wants a dict, not a {}", value.type_name()));
    };
    let mut entries = dict.entries().to_vec();
    let key = |(key, value): &(Value, Value)| Ok(folded(if by_value { value } else { key }, ignores_case));
    ops::sort_by_key(&mut entries, flag_or(reverse.as_ref(), false), key)?;
    Ok(entries.into_iter().map(|(key, value)| Value::tuple(vec![key, value])).collect::<Vec<_>>().into())
}

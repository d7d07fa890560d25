//! The items of loops, and the attributes and methods of what only lives while a template is
//! rendered.

use std::collections::VecDeque;
use std::sync::Arc;

use super::args::{Args, text_of};
use super::budget;
use super::error::{Result, invalid};
use super::eval::{Interpreter, KEPT};
use super::objects::{Loop, Object};
use super::steps;
use super::value::{Dict, Value};

impl Interpreter {
    /// Makes an object.
    pub(super) fn object(&mut self, object: Object) -> Value {
        steps::charge(KEPT);
        self.objects.push(object);
        Value::Object(self.objects.len() - 1)
    }

    /// What Python makes a generator or an iterator of.
    pub(super) fn generator(&mut self, items: Vec<Value>) -> Value {
        self.object(Object::Generator(items.into()))
    }

    pub(super) fn loop_state(&mut self, id: usize) -> Option<&mut Loop> {
        if let Some(Object::Loop(state)) = self.objects.get_mut(id) { Some(state) } else { None }
    }

    /// The next item of a loop that its condition allows.
    pub(super) fn next_item(&mut self, id: usize) -> Result<Option<Value>> {
        loop {
            let Some(state) = self.loop_state(id) else { return Ok(None) };
            if let Some(ready) = state.ready.pop_front() {
                return Ok(Some(ready));
            }
            let Some(item) = state.pending.pop_front() else { return Ok(None) };
            let (definition, scope) = (state.definition.clone(), state.scope);
            let Some(filter) = &definition.filter else { return Ok(Some(item)) };
            let allowed = self.within_scope(scope, |interpreter| {
                interpreter.assign(&definition.target, item.clone())?;
                interpreter.eval(filter)
            })?;
            if allowed.is_true() {
                return Ok(Some(item));
            }
        }
    }

    fn peek_item(&mut self, id: usize) -> Result<Option<Value>> {
        let next = self.next_item(id)?;
        if let (Some(state), Some(next)) = (self.loop_state(id), &next) {
            state.ready.push_front(next.clone());
        }
        Ok(next)
    }

    /// The number of items of a loop.
    fn loop_length(&mut self, id: usize) -> Result<usize> {
        let mut rest = VecDeque::new();
        while let Some(item) = self.next_item(id)? {
            rest.push_back(item);
        }
        let length = rest.len();
        Ok(self.loop_state(id).map_or(0, |state| {
            state.ready = rest;
            state.index0 + 1 + length
        }))
    }

    /// An attribute of an object.
    pub(super) fn object_attribute(&mut self, id: usize, name: &str) -> Result<Value> {
        let missing = || Value::undefined(format!("there is no attribute {name:?}"));
        let method = |name: &'static str| Value::Method(Arc::new((Value::Object(id), name)));
        Ok(match self.objects.get(id) {
            Some(Object::Namespace(names)) => names.get_str(name).cloned().unwrap_or_else(missing),
            Some(Object::Loop(_)) => return self.loop_attribute(id, name),
            Some(Object::Macro(definition, _)) => {
                let names = || definition.parameters.iter().map(|(name, _)| Value::from(name)).collect();
                match name {
                    "name" => Value::from(&definition.name),
                    "arguments" => Value::tuple(names()),
                    "catch_varargs" => Value::Bool(definition.uses[0]),
                    "catch_kwargs" => Value::Bool(definition.uses[1]),
                    "caller" => Value::Bool(definition.uses[2]),
                    _ => missing(),
                }
            }
            Some(Object::Cycler(items, at)) => match name {
                "current" => items.get(*at).cloned().unwrap_or_default(),
                "next" => method("next"),
                "reset" => method("reset"),
                _ => missing(),
            },
            Some(Object::Generator(_) | Object::Joiner(..)) | None => missing(),
        })
    }

    fn loop_attribute(&mut self, id: usize, name: &str) -> Result<Value> {
        let missing = || Value::undefined(format!("loop has no attribute {name:?}"));
        let method = |name: &'static str| Value::Method(Arc::new((Value::Object(id), name)));
        let Some(state) = self.loop_state(id) else { return Ok(missing()) };
        let index0 = state.index0;
        Ok(match name {
            "index" => Value::from(index0 + 1),
            "index0" => Value::from(index0),
            "first" => Value::Bool(index0 == 0),
            "depth" => Value::from(state.depth0 + 1),
            "depth0" => Value::from(state.depth0),
            "previtem" => state.before.clone().unwrap_or_else(|| Value::undefined("there is no previous item")),
            "nextitem" => self.peek_item(id)?.unwrap_or_else(|| Value::undefined("there is no next item")),
            "last" => Value::Bool(self.peek_item(id)?.is_none()),
            "length" => Value::from(self.loop_length(id)?),
            "revindex" => Value::from(self.loop_length(id)? - index0),
            "revindex0" => Value::from(self.loop_length(id)? - index0 - 1),
            "cycle" => method("cycle"),
            "changed" => method("changed"),
            _ => missing(),
        })
    }

    /// Calls a method of an object.
    pub(super) fn object_method(&mut self, id: usize, name: &str, args: Args) -> Result<Value> {
        match (self.objects.get_mut(id), name) {
            (Some(Object::Loop(state)), "cycle") => {
                let count = args.positional.len();
                match args.positional.get(state.index0 % count.max(1)) {
                    Some(item) => Ok(item.clone()),
                    None => invalid("no items for cycling given"),
                }
            }
            (Some(Object::Loop(state)), "changed") => {
                for value in args.positional.iter().chain(state.changed.iter().flatten()) {
                    budget::spend_walk(value)?;
                }
                let changed = state.changed.as_ref() != Some(&args.positional);
                state.changed = Some(args.positional);
                Ok(Value::Bool(changed))
            }
            (Some(Object::Cycler(items, at)), "next") => {
                let current = items.get(*at).cloned().unwrap_or_default();
                *at = (*at + 1) % items.len().max(1);
                Ok(current)
            }
            (Some(Object::Cycler(_, at)), "reset") => {
                *at = 0;
                Ok(Value::None)
            }
            _ => invalid(format!("there is no method {name:?}")),
        }
    }

    /// Sets an attribute of a namespace.
    pub(super) fn set_attribute(&mut self, namespace: &Value, name: &str, value: Value) -> Result<()> {
        if name.starts_with('_') {
            return invalid(format!("a namespace cannot have the attribute {name:?}"));
        }
        let object = if let Value::Object(id) = namespace { self.objects.get_mut(*id) } else { None };
        match object {
            Some(Object::Namespace(names)) => {
                names.insert(name.into(), value);
                Ok(())
            }
            _ => invalid("cannot assign an attribute on an object that is no namespace"),
        }
    }

    /// What `joiner` gives: nothing at first.
    pub(super) fn joiner_text(&mut self, id: usize) -> Result<Value> {
        match self.objects.get_mut(id) {
            Some(Object::Joiner(separator, used)) if *used => Ok(separator.clone()),
            Some(Object::Joiner(_, used)) => {
                *used = true;
                Ok("".into())
            }
            _ => invalid("there is no joiner"),
        }
    }

    /// The dict of `dict(..)` and `namespace(..)`.
    pub(super) fn dict_of(&mut self, args: Args) -> Result<Dict> {
        let mut dict = Dict::default();
        match args.positional.as_slice() {
            [] => {}
            [Value::Dict(first)] => {
                steps::spend_items(first.entries().len())?;
                dict = first.as_ref().clone();
            }
            [pairs] => {
                for pair in self.iterate(pairs)? {
                    match self.iterate(&pair)?.as_slice() {
                        [key, value] if key.is_hashable() => {
                            budget::spend_lookup(&dict, key)?;
                            dict.insert(key.clone(), value.clone());
                        }
                        _ => return invalid("dict wants pairs"),
                    }
                }
            }
            _ => return invalid("dict takes one argument without a name"),
        }
        args.named.into_iter().for_each(|(name, value)| dict.insert(name.into(), value));
        Ok(dict)
    }

    /// The names of a namespace that is made.
    pub(super) fn namespace(&mut self, args: Args) -> Result<Value> {
        let names = self.dict_of(args)?;
        if let Some((name, _)) =
            names.entries().iter().find(|(name, _)| text_of("namespace", name).is_ok_and(|n| n.starts_with('_')))
        {
            return invalid(format!("a namespace cannot have the attribute {name}"));
        }
        Ok(self.object(Object::Namespace(names)))
    }
}

//! Statements and expressions, evaluated.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use super::args::Args;
use super::ast::{Arguments, Body, Comparison, Expr, Filter, For, Statement, Target};
use super::budget;
use super::error::{ErrorKind, Result, TemplateError, invalid, unsupported};
use super::objects::{Loop, Object};
use super::ops;
use super::steps::{self, Length};
use super::value::{Dict, Function, Value};

/// Levels of statements, expressions, calls and filters of `map`, at most.
const MAX_DEPTH: u32 = 600;

/// What a template wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// The bytes of the text that `{% generation %}` wrote, in order.
    pub generations: Vec<Range<usize>>,
}

/// Steps for what is kept until the end of a rendering.
pub(super) const KEPT: usize = 10;
/// Levels of a value. Deeper ones would take too much of the stack to write, compare and drop.
const MAX_LEVELS: usize = 200;

/// How a statement ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Next,
    Break,
    Continue,
}

#[derive(Debug, Default)]
struct Scope {
    names: HashMap<String, Value>,
    parent: Option<usize>,
}

/// A rendering.
#[derive(Debug)]
pub(super) struct Interpreter {
    pub(super) now: i64,
    /// Never removed while a macro may know them.
    scopes: Vec<Scope>,
    scope: usize,
    macros: usize,
    pub(super) objects: Vec<Object>,
    out: String,
    /// Texts that are written for something else than the output.
    captures: u32,
    generations: Vec<Range<usize>>,
    depth: u32,
    /// The line of the innermost statement that failed.
    failed_line: Option<u32>,
}

impl Interpreter {
    pub(super) fn new<'v>(now: i64, variables: impl IntoIterator<Item = (&'v str, Value)>) -> Self {
        let functions = [
            ("range", Function::Range),
            ("dict", Function::Dict),
            ("namespace", Function::Namespace),
            ("cycler", Function::Cycler),
            ("joiner", Function::Joiner),
            ("lipsum", Function::Lipsum),
            ("raise_exception", Function::RaiseException),
            ("strftime_now", Function::StrftimeNow),
        ];
        let functions = functions.map(|(name, function)| (name.to_owned(), Value::Function(function)));
        let globals = Scope { names: functions.into(), parent: None };
        let names = variables.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Self {
            now,
            scopes: vec![globals, Scope { names, parent: Some(0) }],
            scope: 1,
            macros: 0,
            objects: Vec::new(),
            out: String::new(),
            captures: 0,
            generations: Vec::new(),
            depth: 0,
            failed_line: None,
        }
    }

    pub(super) fn run(mut self, body: &Body) -> std::result::Result<Rendered, TemplateError> {
        match self.body(body) {
            Ok(_) => Ok(Rendered { text: self.out, generations: self.generations }),
            Err(kind) => Err(kind.at(self.failed_line.unwrap_or(1))),
        }
    }

    /// Spends steps of the limit.
    pub(super) fn burn(&mut self, steps: usize) -> Result<()> {
        steps::spend(steps)
    }

    fn write(&mut self, text: &str) -> Result<()> {
        steps::spend_bytes(self.out.len(), text.len())?;
        self.out.push_str(text);
        Ok(())
    }

    pub(super) fn body(&mut self, body: &Body) -> Result<Flow> {
        self.deeper(|interpreter| interpreter.statements(body))
    }

    /// Works one level deeper.
    pub(super) fn deeper<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth >= MAX_DEPTH {
            return Err(ErrorKind::Limit("is nested too deep"));
        }
        self.depth += 1;
        let done = work(self);
        self.depth -= 1;
        done
    }

    fn statements(&mut self, body: &Body) -> Result<Flow> {
        for (line, statement) in body {
            let flow = self.burn(1).and_then(|()| self.statement(statement));
            if flow.is_err() {
                self.failed_line.get_or_insert(*line);
            }
            match flow? {
                Flow::Next => {}
                flow => return Ok(flow),
            }
        }
        Ok(Flow::Next)
    }

    /// What a body writes.
    pub(super) fn captured(&mut self, body: &Body) -> Result<String> {
        self.capture(|interpreter| interpreter.body(body).map(|_| ()))
    }

    fn capture(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<String> {
        let outer = std::mem::take(&mut self.out);
        self.captures += 1;
        let done = work(self);
        self.captures -= 1;
        let text = std::mem::replace(&mut self.out, outer);
        done.map(|()| text)
    }

    /// What a loop writes that is called from within itself, in the scope around it.
    pub(super) fn recursive_loop(
        &mut self,
        definition: &Arc<For>,
        items: &Value,
        depth0: usize,
        scope: usize,
    ) -> Result<String> {
        self.within_scope(scope, |interpreter| {
            interpreter.capture(|interpreter| interpreter.for_loop(definition, items, depth0))
        })
    }

    /// Works in a new scope within another one.
    pub(super) fn within_scope<T>(&mut self, parent: usize, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let (outer, macros, scopes) = (self.scope, self.macros, self.scopes.len());
        self.scopes.push(Scope { names: HashMap::new(), parent: Some(parent) });
        self.scope = scopes;
        let done = work(self);
        self.scope = outer;
        match self.macros == macros {
            true => self.scopes.truncate(scopes),
            false => steps::charge(KEPT),
        }
        done
    }

    fn inner<T>(&mut self, work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.within_scope(self.scope, work)
    }

    pub(super) fn set(&mut self, name: &str, value: Value) {
        if let Some(scope) = self.scopes.get_mut(self.scope) {
            scope.names.insert(name.to_owned(), value);
        }
    }

    fn name(&self, name: &str) -> Result<Value> {
        let mut scope = self.scopes.get(self.scope);
        while let Some(known) = scope {
            if let Some(value) = known.names.get(name) {
                return Ok(value.clone());
            }
            scope = known.parent.and_then(|parent| self.scopes.get(parent));
        }
        if name == "self" {
            return unsupported("\"self\"");
        }
        Ok(Value::undefined(format!("{name:?} is undefined")))
    }

    fn statement(&mut self, statement: &Statement) -> Result<Flow> {
        match statement {
            Statement::Text(text) => self.write(text)?,
            Statement::Print(expr) => {
                let text = self.eval(expr)?.to_text()?;
                self.write(&text)?;
            }
            Statement::If(branches) => return self.conditional(branches),
            Statement::For(definition) => {
                let items = self.eval(&definition.items)?;
                return self.for_loop(definition, &items, 0).map(|()| Flow::Next);
            }
            Statement::Set(target, expr) => {
                let value = self.eval(expr)?;
                self.assign(target, value)?;
            }
            Statement::SetBlock { target, filters, body } => {
                let text = self.inner(|interpreter| interpreter.captured(body))?;
                let value = self.filtered(text.into(), filters)?;
                self.assign(target, value)?;
            }
            Statement::With(values, body) => {
                let values =
                    values.iter().map(|(target, expr)| Ok((target, self.eval(expr)?))).collect::<Result<Vec<_>>>()?;
                return self.inner(|interpreter| {
                    values.into_iter().try_for_each(|(target, value)| interpreter.assign(target, value))?;
                    interpreter.body(body)
                });
            }
            Statement::Filter(filters, body) => {
                let text = self.inner(|interpreter| interpreter.captured(body))?;
                let text = self.filtered(text.into(), filters)?.to_text()?;
                self.write(&text)?;
            }
            Statement::Macro(definition) => {
                let value = self.macro_value(definition);
                self.set(&definition.name, value);
            }
            Statement::Call(call, caller) => {
                let caller = self.macro_value(caller);
                let text = self.call_with(call, Some(caller))?.to_text()?;
                self.write(&text)?;
            }
            Statement::Generation(body) => self.generation(body)?,
            Statement::Break => return Ok(Flow::Break),
            Statement::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    fn macro_value(&mut self, definition: &Arc<super::ast::Macro>) -> Value {
        self.macros += 1;
        let scope = self.scope;
        self.object(Object::Macro(definition.clone(), scope))
    }

    fn conditional(&mut self, branches: &[(Option<Expr>, Body)]) -> Result<Flow> {
        for (test, body) in branches {
            let taken = match test {
                Some(test) => self.eval(test)?.is_true(),
                None => true,
            };
            if taken {
                return self.body(body);
            }
        }
        Ok(Flow::Next)
    }

    fn generation(&mut self, body: &Body) -> Result<()> {
        let start = self.out.len();
        self.inner(|interpreter| interpreter.body(body))?;
        if self.captures == 0 {
            self.generations.push(start..self.out.len());
        }
        Ok(())
    }

    /// Runs a loop. `depth0` says how often it was called from within itself.
    pub(super) fn for_loop(&mut self, definition: &Arc<For>, items: &Value, depth0: usize) -> Result<()> {
        let pending = self.iterate(items)?.into();
        let state = Loop {
            definition: definition.clone(),
            scope: self.scope,
            pending,
            ready: Default::default(),
            before: None,
            current: None,
            index0: 0,
            depth0,
            changed: None,
        };
        let value = self.object(Object::Loop(state));
        let Value::Object(id) = value else { return Ok(()) };
        let mut ran = false;
        while let Some(item) = self.next_item(id)? {
            self.burn(1)?;
            if let Some(state) = self.loop_state(id) {
                state.index0 += usize::from(ran);
                state.before = state.current.replace(item.clone());
            }
            ran = true;
            let flow = self.inner(|interpreter| {
                interpreter.set("loop", value.clone());
                interpreter.assign(&definition.target, item)?;
                interpreter.body(&definition.body)
            })?;
            if flow == Flow::Break {
                break;
            }
        }
        if !ran {
            self.inner(|interpreter| interpreter.body(&definition.otherwise))?;
        }
        Ok(())
    }

    pub(super) fn assign(&mut self, target: &Target, value: Value) -> Result<()> {
        budget::spend_kept(&value)?;
        match target {
            Target::Name(name) => self.set(name, value),
            Target::Attribute(name, attribute) => {
                let namespace = self.name(name)?;
                self.set_attribute(&namespace, attribute, value)?;
            }
            Target::Tuple(targets) => {
                let values = self.iterate(&value)?;
                if values.len() != targets.len() {
                    return invalid(format!("{} values to unpack, expected {}", values.len(), targets.len()));
                }
                targets.iter().zip(values).try_for_each(|(target, value)| self.assign(target, value))?;
            }
        }
        Ok(())
    }

    /// What a loop over a value sees. A generator has nothing more afterwards.
    pub(super) fn iterate(&mut self, value: &Value) -> Result<Vec<Value>> {
        if !matches!(value, Value::Object(_)) {
            budget::spend_text(value)?;
            steps::spend_items(value.len().unwrap_or_default())?;
        }
        let items = match value {
            Value::Object(id) => match self.objects.get_mut(*id) {
                Some(Object::Generator(items)) => Some(std::mem::take(items).into()),
                _ => None,
            },
            value => value.items(),
        };
        let Some(items) = items else { return invalid(format!("a {} is not iterable", value.type_name())) };
        self.burn(items.len())?;
        Ok(items)
    }

    pub(super) fn filtered(&mut self, mut value: Value, filters: &[Filter]) -> Result<Value> {
        for filter in filters {
            let args = self.arguments(&filter.arguments)?;
            value = self.filter(&filter.name, value, args)?;
        }
        Ok(value)
    }

    pub(super) fn eval(&mut self, expr: &Expr) -> Result<Value> {
        self.burn(1)?;
        let value = self.deeper(|interpreter| interpreter.expression(expr))?;
        if value.levels() > MAX_LEVELS {
            return Err(ErrorKind::Limit("makes a value that is too large"));
        }
        Ok(value)
    }

    fn expression(&mut self, expr: &Expr) -> Result<Value> {
        match expr {
            Expr::Const(value) => Ok(value.clone()),
            Expr::Name(name) => self.name(name),
            Expr::List(items) => self.all(items).map(Value::from),
            Expr::Tuple(items) => self.all(items).map(Value::tuple),
            Expr::Dict(entries) => self.dict(entries),
            Expr::Attribute(of, name) => {
                let of = self.eval(of)?;
                self.attribute(&of, name)
            }
            Expr::Item(of, key) => {
                let (of, key) = (self.eval(of)?, self.eval(key)?);
                self.item(&of, &key)
            }
            Expr::Slice(of, bounds) => self.slice(of, bounds),
            Expr::Call(..) => self.call_with(expr, None),
            Expr::Filter(of, filter) => {
                let of = self.eval(of)?;
                self.filtered(of, std::slice::from_ref(filter))
            }
            Expr::Test { of, name, arguments } => {
                let of = self.eval(of)?;
                let args = self.arguments(arguments)?;
                self.test(name, &of, args).map(Value::Bool)
            }
            Expr::Not(of) => Ok(Value::Bool(!self.eval(of)?.is_true())),
            Expr::Negative(of) => ops::negative(&self.eval(of)?),
            Expr::Positive(of) => ops::positive(&self.eval(of)?),
            Expr::Binary(operator, left, right) => {
                let (left, right) = (self.eval(left)?, self.eval(right)?);
                ops::binary(*operator, &left, &right)
            }
            Expr::Compare(first, rest) => self.compare(first, rest),
            Expr::Concat(parts) => self.concat(parts),
            Expr::And(left, right) => {
                let left = self.eval(left)?;
                if left.is_true() { self.eval(right) } else { Ok(left) }
            }
            Expr::Or(left, right) => {
                let left = self.eval(left)?;
                if left.is_true() { Ok(left) } else { self.eval(right) }
            }
            Expr::Conditional { test, then, otherwise } => match (self.eval(test)?.is_true(), otherwise) {
                (true, _) => self.eval(then),
                (false, Some(otherwise)) => self.eval(otherwise),
                (false, None) => Ok(Value::undefined("an inline if without an else is undefined")),
            },
        }
    }

    fn all(&mut self, items: &[Expr]) -> Result<Vec<Value>> {
        items.iter().map(|item| self.eval(item)).collect()
    }

    fn dict(&mut self, entries: &[(Expr, Expr)]) -> Result<Value> {
        let mut dict = Dict::default();
        for (key, value) in entries {
            let (key, value) = (self.eval(key)?, self.eval(value)?);
            budget::spend_lookup(&dict, &key)?;
            if !key.is_hashable() {
                return invalid(format!("a {} cannot be a key", key.type_name()));
            }
            dict.insert(key, value);
        }
        Ok(dict.into())
    }

    pub(super) fn attribute(&mut self, of: &Value, name: &str) -> Result<Value> {
        match of {
            Value::Object(id) => self.object_attribute(*id, name),
            of => ops::attribute(of, name),
        }
    }

    pub(super) fn item(&mut self, of: &Value, key: &Value) -> Result<Value> {
        match (of, key.as_str()) {
            (Value::Object(id), Some(name)) => self.object_attribute(*id, name),
            (Value::Object(_), None) => Ok(Value::undefined(format!("there is no item {key}"))),
            (of, _) => ops::item(of, key),
        }
    }

    fn slice(&mut self, of: &Expr, bounds: &[Option<Box<Expr>>; 3]) -> Result<Value> {
        // Jinja2 evaluates constants when it compiles a template, and forgives more there.
        let is_constant = matches!(of, Expr::Const(_));
        let of = self.eval(of)?;
        if is_constant && of.len().is_none() {
            return Ok(Value::undefined(format!("a {} cannot be sliced", of.type_name())));
        }
        let mut values = [Value::None, Value::None, Value::None];
        for (value, bound) in values.iter_mut().zip(bounds) {
            if let Some(bound) = bound {
                *value = self.eval(bound)?;
            }
        }
        ops::slice(&of, &values)
    }

    fn compare(&mut self, first: &Expr, rest: &[(Comparison, Expr)]) -> Result<Value> {
        let mut left = self.eval(first)?;
        for (comparison, right) in rest {
            let right = self.eval(right)?;
            let holds = match comparison {
                Comparison::In => self.contains(&right, &left)?,
                Comparison::NotIn => !self.contains(&right, &left)?,
                comparison => ops::compare(*comparison, &left, &right)?,
            };
            if !holds {
                return Ok(Value::Bool(false));
            }
            left = right;
        }
        Ok(Value::Bool(true))
    }

    pub(super) fn contains(&mut self, container: &Value, item: &Value) -> Result<bool> {
        match container {
            Value::Object(_) => Ok(self.iterate(container)?.contains(item)),
            container => ops::contains(container, item),
        }
    }

    fn concat(&mut self, parts: &[Expr]) -> Result<Value> {
        let (mut text, mut length) = (String::new(), Length::default());
        for part in parts {
            let part = self.eval(part)?.to_text()?;
            length.add(part.len())?;
            text.push_str(&part);
        }
        Ok(text.into())
    }

    pub(super) fn arguments(&mut self, arguments: &Arguments) -> Result<Args> {
        let mut args = Args::of(self.all(&arguments.positional)?);
        if let Some(list) = &arguments.list {
            let list = self.eval(list)?;
            args.positional.extend(self.iterate(&list)?);
        }
        for (name, expr) in &arguments.named {
            let value = self.eval(expr)?;
            args.named.push((name.clone(), value));
        }
        if let Some(dict) = &arguments.dict {
            let dict = self.eval(dict)?;
            let Some(dict) = dict.as_dict() else { return invalid("an argument after ** is no dict") };
            for (key, value) in dict.entries() {
                args.named.push((super::args::text_of("**", key)?, value.clone()));
            }
        }
        Ok(args)
    }
}

//! Calls of functions, methods and macros.

use super::args::{Args, text_of};
use super::ast::{Expr, Macro};
use super::budget;
use super::error::{ErrorKind, Result, invalid, unsupported};
use super::eval::Interpreter;
use super::methods;
use super::objects::Object;
use super::ops;
use super::value::{Dict, Function, Value};

/// The most items of a `range`, as the sandbox of Jinja2 has it.
const MAX_RANGE: usize = 100_000;

impl Interpreter {
    /// Evaluates a call; a call block gives it a `caller`.
    pub(super) fn call_with(&mut self, call: &Expr, caller: Option<Value>) -> Result<Value> {
        let Expr::Call(callee, arguments) = call else { return self.eval(call) };
        let callee = self.eval(callee)?;
        let mut args = self.arguments(arguments)?;
        args.named.extend(caller.map(|caller| ("caller".to_owned(), caller)));
        self.call(&callee, args)
    }

    fn call(&mut self, callee: &Value, args: Args) -> Result<Value> {
        budget::spend_args(&args)?;
        match callee {
            Value::Undefined(_) => Err(ops::undefined(callee)),
            Value::Function(function) => self.function(*function, args),
            Value::Method(method) => match &method.0 {
                Value::Object(id) => self.object_method(*id, method.1, args),
                // What `join` goes through may be a generator.
                receiver if method.1 == "join" => {
                    let mut args = args;
                    for value in args.positional.iter_mut().filter(|value| matches!(value, Value::Object(_))) {
                        *value = Value::from(self.iterate(value)?);
                    }
                    methods::call(receiver, method.1, args)
                }
                receiver => methods::call(receiver, method.1, args),
            },
            Value::Object(id) => match self.objects.get(*id) {
                Some(Object::Macro(definition, scope)) => {
                    let (definition, scope) = (definition.clone(), *scope);
                    self.call_macro(&definition, scope, args)
                }
                Some(Object::Loop(_)) => self.call_loop(*id, args),
                Some(Object::Joiner(..)) => self.joiner_text(*id),
                _ => invalid("the object is not callable"),
            },
            other => invalid(format!("a {} is not callable", other.type_name())),
        }
    }

    fn function(&mut self, function: Function, args: Args) -> Result<Value> {
        match function {
            Function::Range => range(&args),
            Function::Dict => self.dict_of(args).map(Value::from),
            Function::Namespace => self.namespace(args),
            Function::Cycler if args.positional.is_empty() => invalid("cycler needs items"),
            Function::Cycler => Ok(self.object(Object::Cycler(args.positional, 0))),
            Function::Joiner => {
                let [separator] = args.bind("joiner", 0, ["sep"])?;
                Ok(self.object(Object::Joiner(separator.unwrap_or_else(|| ", ".into()), false)))
            }
            Function::Lipsum => unsupported("lipsum"),
            Function::RaiseException => {
                let [message] = args.bind("raise_exception", 1, ["message"])?;
                Err(ErrorKind::Raised(message.unwrap_or_default().to_text()?.to_string()))
            }
            Function::StrftimeNow => {
                let [format] = args.bind("strftime_now", 1, ["format"])?;
                strftime(self.now, &text_of("strftime_now", &format.unwrap_or_default())?)
            }
        }
    }

    fn call_macro(&mut self, definition: &Macro, scope: usize, args: Args) -> Result<Value> {
        self.within_scope(scope, |interpreter| {
            interpreter.bind_macro(definition, args)?;
            interpreter.captured(&definition.body).map(Value::from)
        })
    }

    /// Sets the parameters of a macro in the present scope.
    fn bind_macro(&mut self, definition: &Macro, args: Args) -> Result<()> {
        let [takes_varargs, takes_kwargs, takes_caller] = definition.uses;
        let Args { positional, mut named } = args;
        let mut take = |name: &str| named.iter().position(|(known, _)| known == name).map(|at| named.remove(at).1);
        let mut positional = positional.into_iter();
        let mut given = Vec::new();
        for (name, default) in &definition.parameters {
            let value = match (positional.next(), take(name)) {
                (Some(_), Some(_)) => return invalid(format!("the macro {:?} got {name:?} twice", definition.name)),
                (Some(value), None) | (None, Some(value)) => Some(value),
                (None, None) => None,
            };
            given.push((name, default, value));
        }
        let caller = take("caller");
        for (name, default, value) in given {
            let value = match (value, default) {
                (Some(value), _) => value,
                (None, Some(default)) => self.eval(default)?,
                (None, None) => Value::undefined(format!("the parameter {name:?} was not provided")),
            };
            self.set(name, value);
        }
        match caller {
            Some(caller) if takes_caller => self.set("caller", caller),
            Some(_) => return invalid(format!("the macro {:?} has no use for a caller", definition.name)),
            None if takes_caller => self.set("caller", Value::undefined("no caller is defined")),
            None => {}
        }
        let rest: Vec<Value> = positional.collect();
        if !takes_varargs && !rest.is_empty() {
            let count = definition.parameters.len();
            return invalid(format!("the macro {:?} takes no more than {count} arguments", definition.name));
        }
        if let Some((name, _)) = named.first().filter(|_| !takes_kwargs) {
            return invalid(format!("the macro {:?} has no parameter {name:?}", definition.name));
        }
        if takes_varargs {
            self.set("varargs", Value::tuple(rest));
        }
        if takes_kwargs {
            let kwargs: Dict = named.into_iter().map(|(name, value)| (Value::from(name), value)).collect();
            self.set("kwargs", kwargs.into());
        }
        Ok(())
    }

    /// `loop(items)` of a recursive loop.
    fn call_loop(&mut self, id: usize, args: Args) -> Result<Value> {
        let [items] = args.bind("loop", 1, ["iterable"])?;
        let state = self.loop_state(id).map(|state| (state.definition.clone(), state.depth0, state.scope));
        let Some((definition, depth0, scope)) = state else { return invalid("there is no loop") };
        if !definition.recursive {
            return invalid("the loop is not recursive");
        }
        self.recursive_loop(&definition, &items.unwrap_or_default(), depth0 + 1, scope).map(Value::from)
    }
}

fn range(args: &Args) -> Result<Value> {
    let numbers: Option<Vec<i128>> = args.positional.iter().map(Value::as_int).collect();
    let range = match numbers.as_deref() {
        Some([stop]) => Value::Range(0, *stop, 1),
        Some([start, stop]) => Value::Range(*start, *stop, 1),
        Some([start, stop, step]) if *step != 0 => Value::Range(*start, *stop, *step),
        _ => return invalid("range wants one to three integers"),
    };
    if range.len().is_none_or(|length| length > MAX_RANGE) {
        return invalid(format!("range is larger than {MAX_RANGE}"));
    }
    Ok(range)
}

/// The time in UTC by a format of C's `strftime`.
fn strftime(now: i64, format: &str) -> Result<Value> {
    let time = jiff::Timestamp::from_second(now).and_then(|time| jiff::fmt::strtime::format(format, time));
    match time {
        Ok(text) => Ok(text.into()),
        Err(error) => unsupported(format!("the date format {format:?} ({error})")),
    }
}

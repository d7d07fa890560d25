//! The arguments of a call.

use super::error::{Result, invalid};
use super::value::Value;

/// Evaluated arguments, in their order.
#[derive(Debug, Default)]
pub(super) struct Args {
    pub(super) positional: Vec<Value>,
    pub(super) named: Vec<(String, Value)>,
}

impl Args {
    pub(super) fn of(positional: Vec<Value>) -> Self {
        Self { positional, named: Vec::new() }
    }

    /// The values of parameters; an argument that is none of them is an error, and so is one of the
    /// first `required` that is not there.
    pub(super) fn bind<const N: usize>(
        self,
        function: &str,
        required: usize,
        names: [&str; N],
    ) -> Result<[Option<Value>; N]> {
        let mut bound = [const { None }; N];
        if self.positional.len() > N {
            return invalid(format!("{function} takes {N} arguments, not {}", self.positional.len()));
        }
        bound.iter_mut().zip(self.positional).for_each(|(place, value)| *place = Some(value));
        for (name, value) in self.named {
            let place = names.iter().position(|known| *known == name).and_then(|at| bound.get_mut(at));
            match place {
                Some(place) if place.is_none() => *place = Some(value),
                Some(_) => return invalid(format!("{function} got the argument {name:?} twice")),
                None => return invalid(format!("{function} has no argument {name:?}")),
            }
        }
        match bound.iter().take(required).position(Option::is_none) {
            Some(missing) => invalid(format!("{function} needs {}", names.get(missing).unwrap_or(&"an argument"))),
            None => Ok(bound),
        }
    }
}

/// The text of an argument.
pub(super) fn text_of(function: &str, value: &Value) -> Result<String> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => invalid(format!("{function} wants a string, not a {}", value.type_name())),
    }
}

/// The integer of an argument, or a default.
pub(super) fn integer_or(function: &str, value: Option<&Value>, default: i128) -> Result<i128> {
    match value.map(|value| (value, value.as_int())) {
        None => Ok(default),
        Some((_, Some(number))) => Ok(number),
        Some((value, None)) => invalid(format!("{function} wants an integer, not a {}", value.type_name())),
    }
}

/// Whether an argument is true, or a default.
pub(super) fn flag_or(value: Option<&Value>, default: bool) -> bool {
    value.map_or(default, Value::is_true)
}

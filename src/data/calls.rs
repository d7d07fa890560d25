//! The arguments of tool calls: an object, or the object as JSON in a string, as OpenAI's interface
//! has it.

use std::borrow::Cow;

use super::jinja::{Dict, Value, loads};
use super::template::ChatTemplate;

/// The messages of a conversation with arguments as the template takes them. Some templates write
/// the JSON of what they get, which would quote a string once more, or read the keys of an object.
/// Others join strings.
pub(super) fn for_template<'a>(messages: &'a [Value], tools: &Value, template: &ChatTemplate) -> Cow<'a, [Value]> {
    let Some(objects) = with_objects(messages) else { return Cow::Borrowed(messages) };
    match template.render(messages, tools, false) {
        Ok(text) if !quotes(&text, messages) => Cow::Borrowed(messages),
        _ => Cow::Owned(objects),
    }
}

/// The arguments of a function that are JSON in a string, and the object.
fn json_arguments(function: &Dict) -> Option<(&str, Value)> {
    let json = function.get_str("arguments")?.as_str()?;
    let object = loads(json.as_bytes()).ok()?;
    object.as_dict().is_some().then_some((json, object))
}

/// Whether a text has such a string as JSON.
fn quotes(text: &str, messages: &[Value]) -> bool {
    let calls = messages.iter().filter_map(|message| message.as_dict()?.get_str("tool_calls")?.as_list()).flatten();
    // A call is a function, or has one.
    let functions = calls.filter_map(Value::as_dict).flat_map(|call| [Some(call), function(call)]).flatten();
    let mut strings = functions.filter_map(json_arguments).filter_map(|(json, _)| serde_json::to_string(json).ok());
    strings.any(|quoted| text.contains(&quoted))
}

fn function(call: &Dict) -> Option<&Dict> {
    call.get_str("function")?.as_dict()
}

/// The messages with each such string as its object. `None` if there is none.
fn with_objects(messages: &[Value]) -> Option<Vec<Value>> {
    replaced(messages, |message| {
        let message = message.as_dict()?;
        let calls = replaced(message.get_str("tool_calls")?.as_list()?, with_object)?;
        Some(with(message, "tool_calls", calls))
    })
}

fn with_object(call: &Value) -> Option<Value> {
    let call = call.as_dict()?;
    let of = |function: &Dict| json_arguments(function).map(|(_, object)| with(function, "arguments", object));
    of(call).or_else(|| Some(with(call, "function", of(function(call)?)?)))
}

/// The values, some of them replaced. `None` if none is.
fn replaced(values: &[Value], replacement: impl Fn(&Value) -> Option<Value>) -> Option<Vec<Value>> {
    let found: Vec<Option<Value>> = values.iter().map(replacement).collect();
    let or_old = |(new, old): (Option<Value>, &Value)| new.unwrap_or_else(|| old.clone());
    found.iter().any(Option::is_some).then(|| found.into_iter().zip(values).map(or_old).collect())
}

/// A dict with another value of a key.
fn with(dict: &Dict, key: &str, value: impl Into<Value>) -> Value {
    let mut dict = dict.clone();
    dict.insert(key.into(), value.into());
    dict.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_an_object_in_a_string_becomes_one() {
        let messages = |arguments: &str| {
            let call = format!(r#"{{"type": "function", "function": {{"name": "f", "arguments": {arguments}}}}}"#);
            let json = format!(r#"[{{"role": "assistant", "tool_calls": [{call}, {{"arguments": {arguments}}}]}}]"#);
            loads(json.as_bytes()).unwrap().as_list().unwrap().to_vec()
        };
        let called = |arguments: &str| {
            format!(
                "{{'role': 'assistant', 'tool_calls': [{{'type': 'function', 'function': {{'name': 'f', 'arguments': \
                 {arguments}}}}}, {{'arguments': {arguments}}}]}}"
            )
        };
        let objects = with_objects(&messages(r#""{\"q\": \"sky\", \"n\": 2}""#)).unwrap();
        assert_eq!(objects[0].to_string(), called("{'q': 'sky', 'n': 2}"));
        for other in [r#"{"q": "sky"}"#, "\"3\"", "\"{q\"", "\"[1]\"", "\"\"", "null"] {
            assert!(with_objects(&messages(other)).is_none(), "{other}");
        }
    }
}

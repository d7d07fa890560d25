//! The messages of a conversation, as files have them and as templates read them.

use super::DataError;
use super::formats::{Record, given, role};
use super::jinja::{Dict, Value};

/// Whether what a message says is learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Learns {
    /// If it is the assistant's.
    Default,
    /// It stands in the text and is not learned.
    Not,
}

/// Roles of the chat templates of supported models.
const ROLES: [&str; 8] = ["system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"];
const ROLES_EXPECTED: &str = "one of system, developer, user, assistant, tool, function, ipython, observation";

/// Names under which files have what the assistant thought. Templates read the first one; gpt-oss
/// reads the second one.
const THOUGHTS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Keys that say whether a message is learned: OpenAI's, Axolotl's (two), ms-swift's.
const LEARNED: [&str; 4] = ["weight", "train", "training", "loss"];

/// Keys that change what a message means, and that nothing here can honour.
const MEANINGFUL: [(&str, &str); 9] = [
    ("function_call", "tool_calls, the newer name of function_call"),
    ("train_detail", "left out: a message is learned as a whole or not at all"),
    ("training_detail", "left out: a message is learned as a whole or not at all"),
    ("loss_scale", "left out: a message is learned (\"loss\": true) or not (false)"),
    ("refusal", "the content of the message"),
    ("prefix", "left out: the messages of a line are whole"),
    ("images", "left out: only text is learned"),
    ("audio", "left out: only text is learned"),
    ("videos", "left out: only text is learned"),
];

/// A message as templates read it: all that it has and that is not null, as transformers gives it
/// to them.
pub(super) fn message(record: &Record<'_>, message: &Value) -> Result<(Dict, Learns), DataError> {
    let Some(given_message) = message.as_dict() else { return Err(record.bad("messages", "a list of messages")) };
    let says = record.string(given_message, "role")?;
    // Templates render any role, and what a misspelt one says would be learned by nobody.
    if !ROLES.contains(&says.as_str()) {
        return Err(record.bad("role", ROLES_EXPECTED));
    }
    if given(given_message, "content").is_none() && given(given_message, "tool_calls").is_none() {
        return Err(record.bad("content", "what the message says"));
    }
    let present = given_message.entries().iter().filter(|(_, value)| !value.is_none()).cloned();
    finished(record, present.collect())
}

/// A message of ShareGPT's form.
pub(super) fn turn(record: &Record<'_>, turn: &Value) -> Result<(Dict, Learns), DataError> {
    let Some(given_turn) = turn.as_dict() else { return Err(record.bad("conversations", "a list of messages")) };
    if given(given_turn, "from").is_none() {
        return message(record, turn);
    }
    let from = record.string(given_turn, "from")?;
    let role = match from.as_str() {
        "human" | "user" => "user",
        "gpt" | "assistant" => "assistant",
        "system" => "system",
        "tool" | "observation" => "tool",
        _ => return Err(record.bad("from", "one of human, user, gpt, assistant, system, tool, observation")),
    };
    let content = record.string(given_turn, "value")?;
    let mut message: Dict = [("role", role.into()), ("content", Value::from(content))]
        .into_iter()
        .map(|(key, value)| (Value::from(key), value))
        .collect();
    let own = |key: &Value| key.as_str().is_some_and(|key| ["from", "value", "role", "content"].contains(&key));
    let rest = given_turn.entries().iter().filter(|(key, value)| !own(key) && !value.is_none());
    rest.for_each(|(key, value)| message.insert(key.clone(), value.clone()));
    finished(record, message)
}

/// Takes what is for the trainer out of a message, and gives its thoughts every name that templates
/// have for them.
fn finished(record: &Record<'_>, mut message: Dict) -> Result<(Dict, Learns), DataError> {
    let meaningful = MEANINGFUL.iter().find(|(key, _)| given(&message, key).is_some_and(Value::is_true));
    if let Some((key, expected)) = meaningful {
        return Err(record.bad(key, expected));
    }
    let learns = learned(record, &mut message)?;
    let thought = THOUGHTS.iter().find_map(|key| given(&message, key)).cloned();
    if let Some(thought) = thought {
        if given(&message, "thinking").is_none() {
            message.insert("thinking".into(), thought.clone());
        }
        message.insert("reasoning_content".into(), thought);
    }
    Ok((message, learns))
}

/// What the message itself says of whether it is learned.
fn learned(record: &Record<'_>, message: &mut Dict) -> Result<Learns, DataError> {
    let mut said = None;
    for key in LEARNED {
        let Some(value) = message.remove_str(key).filter(|value| !value.is_none()) else { continue };
        let learns = match (key, value.as_flag()) {
            (_, Some(learns)) => learns,
            ("weight", None) => return Err(record.bad(key, "0 or 1: a message is learned or not")),
            (_, None) => return Err(record.bad(key, "true or false: a message is learned or not")),
        };
        if learns && role(message) != Some("assistant") {
            return Err(record.bad(key, "left out or false: what the assistant says is learned (--train-on all learns all)"));
        }
        if said.is_some_and(|said| said != learns) {
            return Err(record.bad(key, "what the message's other keys say of whether it is learned"));
        }
        said = Some(learns);
    }
    Ok(if said == Some(false) { Learns::Not } else { Learns::Default })
}

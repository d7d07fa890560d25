//! The messages of a conversation, as files have them and as templates read them.

use super::error::DataError;
use super::jinja::{Dict, Value};
use super::record::{Record, given, role};

/// Whether what a message says is learned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Learns {
    /// If it is the assistant's.
    Default,
    /// It stands in the text and is not learned.
    Not,
}

/// A message.
#[derive(Debug)]
pub(super) struct Turn {
    /// As templates read it.
    pub(super) message: Dict,
    /// Whether it is learned.
    pub(super) learns: Learns,
    /// Keys of no known meaning, behind the key of their list. A template may read them.
    pub(super) unknown: Vec<String>,
}

/// Roles of the chat templates of supported models.
const ROLES: [&str; 8] = ["system", "developer", "user", "assistant", "tool", "function", "ipython", "observation"];
const ROLES_EXPECTED: &str = "one of system, developer, user, assistant, tool, function, ipython, observation";

/// Names under which files have what the assistant thought. Templates read the first one; gpt-oss
/// reads the second one.
const THOUGHTS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Keys of a message that a notice names if its rendering lacks them ([`LeftOut`]), except its
/// thoughts.
///
/// [`LeftOut`]: super::notice::LeftOut
const KNOWN: [&str; 4] = ["role", "content", "name", "tool_calls"];

/// Keys that say whether a message is learned: OpenAI's, Axolotl's (two), ms-swift's, and another
/// common one.
const LEARNED: [&str; 5] = ["weight", "train", "training", "loss", "trainable"];

/// Keys that say something about learning, and not the same thing in all programs.
const AMBIGUOUS: [&str; 6] = ["mask", "masked", "loss_mask", "loss_weight", "ignore", "ignored"];
const AMBIGUOUS_EXPECTED: &str = "\"train\": false or \"weight\": 0 for a message that is not learned";

/// Keys that change what a message means, and that have no place here.
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

/// Types of a part of `content` that is no text.
const MEDIA: [&str; 8] = ["image", "image_url", "input_image", "video", "video_url", "audio", "audio_url", "input_audio"];

/// A message as templates read it: all that it has and that is not null, as transformers gives it
/// to them. `list` is the key of its list.
pub(super) fn message(record: &Record<'_>, list: &'static str, message: &Value) -> Result<Turn, DataError> {
    let Some(given_message) = message.as_dict() else { return Err(record.bad(list, "a list of messages")) };
    let says = record.string(given_message, "role")?;
    // Templates render any role, and what a misspelt one says would be learned by nobody.
    if !ROLES.contains(&says.as_str()) {
        return Err(record.bad("role", ROLES_EXPECTED));
    }
    check_meaning(record, given_message)?;
    if given(given_message, "content").is_none() && given(given_message, "tool_calls").is_none() {
        return Err(record.bad("content", "what the message says"));
    }
    let present = given_message.entries().iter().filter(|(_, value)| !value.is_none()).cloned();
    finished(record, list, present.collect())
}

/// A message of ShareGPT's form.
pub(super) fn turn(record: &Record<'_>, list: &'static str, turn: &Value) -> Result<Turn, DataError> {
    let Some(given_turn) = turn.as_dict() else { return Err(record.bad(list, "a list of messages")) };
    if given(given_turn, "from").is_none() {
        return message(record, list, turn);
    }
    let from = record.string(given_turn, "from")?;
    let role = match from.as_str() {
        "human" | "user" => "user",
        "gpt" | "assistant" => "assistant",
        "system" => "system",
        "tool" | "observation" => "tool",
        _ => return Err(record.bad("from", "one of human, user, gpt, assistant, system, tool, observation")),
    };
    check_meaning(record, given_turn)?;
    let content = record.string(given_turn, "value")?;
    let mut message: Dict = [("role", role.into()), ("content", Value::from(content))]
        .into_iter()
        .map(|(key, value)| (Value::from(key), value))
        .collect();
    let own = |key: &Value| key.as_str().is_some_and(|key| ["from", "value", "role", "content"].contains(&key));
    let rest = given_turn.entries().iter().filter(|(key, value)| !own(key) && !value.is_none());
    rest.for_each(|(key, value)| message.insert(key.clone(), value.clone()));
    finished(record, list, message)
}

/// Fails for a key that changes what a message means, and that has no place here.
fn check_meaning(record: &Record<'_>, message: &Dict) -> Result<(), DataError> {
    let meaningful = MEANINGFUL.iter().find(|(key, _)| given(message, key).is_some_and(Value::is_true));
    if let Some((key, expected)) = meaningful {
        return Err(record.bad(key, expected));
    }
    let is_flag = |value: &Value| value.is_number() || value.as_flag().is_some();
    if let Some(key) = AMBIGUOUS.iter().find(|key| given(message, key).is_some_and(is_flag)) {
        return Err(record.bad(key, AMBIGUOUS_EXPECTED));
    }
    let parts = message.get_str("content").and_then(Value::as_list).unwrap_or_default();
    let is_media = |part: &Value| part.get("type").as_str().is_some_and(|kind| MEDIA.contains(&kind));
    if parts.iter().any(is_media) {
        return Err(record.bad("content", "text: images, videos and audio are not learned"));
    }
    Ok(())
}

/// Takes what is for the trainer out of a message, and gives its thoughts every name that templates
/// have for them.
fn finished(record: &Record<'_>, list: &'static str, mut message: Dict) -> Result<Turn, DataError> {
    let learns = learned(record, &mut message)?;
    let thought = THOUGHTS.iter().find_map(|key| given(&message, key)).cloned();
    let is_known = |key: &&str| KNOWN.contains(key) || THOUGHTS.contains(key);
    let says_something = |value: &Value| value.is_true() || value.is_number();
    let said = message.entries().iter().filter(|(_, value)| says_something(value));
    let unknown = said.filter_map(|(key, _)| key.as_str()).filter(|key| !is_known(key));
    let unknown = unknown.map(|key| format!("{list}[].{key}")).collect();
    if let Some(thought) = thought {
        if given(&message, "thinking").is_none() {
            message.insert("thinking".into(), thought.clone());
        }
        message.insert("reasoning_content".into(), thought);
    }
    Ok(Turn { message, learns, unknown })
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

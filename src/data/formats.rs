//! JSON Lines: what a line says, in one of the forms that people have.

use std::collections::BTreeSet;

use super::error::DataError;
use super::form::Form;
use super::jinja::{Dict, Value, loads};
use super::keys;
use super::lines::Line;
use super::messages::{Learns, Turn, message, turn};
use super::record::{Record, given, role};

/// What a record of a file says.
#[derive(Debug, Clone)]
pub(super) enum Content {
    /// Plain text, all of it to be learned.
    Text(String),
    /// What follows a prompt is to be learned.
    Completion { prompt: String, completion: String },
    /// The answers to instructions are to be learned.
    Instruction { system: Option<String>, turns: Vec<[String; 2]>, tools: Value, variables: Dict },
    /// What the assistant says is to be learned.
    Chat(Chat),
}

/// A conversation.
#[derive(Debug, Clone)]
pub(super) struct Chat {
    /// Maps with `role` and `content`, and what else a template may read.
    pub(super) messages: Vec<Value>,
    /// The tools that it may call, or `None`.
    pub(super) tools: Value,
    /// Further variables of the chat template.
    pub(super) variables: Dict,
    /// The messages before this index are a prompt, which is learned only if everything is.
    pub(super) prompt: usize,
    /// The messages of the assistant that are not to be learned, by their indices.
    pub(super) unlearned: Vec<usize>,
}

/// Keys that change what a line means, and what to say if a form has no place for one.
const MEANINGFUL: [(&str, &str); 28] = [
    ("system", NO_PLACE),
    ("system_prompt", NO_PLACE),
    ("tools", NO_PLACE),
    ("history", NO_PLACE),
    ("functions", "tools, the newer name of functions"),
    ("function_call", "tool_calls of a message, the newer name of function_call"),
    ("tool_calls", "a key of a message"),
    ("reasoning_content", "a key of a message"),
    ("documents", NO_PLACE),
    ("chat_template", NO_PLACE),
    (VARIABLES, NO_PLACE),
    ("chosen", PREFERENCES),
    ("rejected", PREFERENCES),
    ("kto_tag", PREFERENCES),
    ("weight", ONE_A_MESSAGE),
    ("weights", ONE_A_MESSAGE),
    ("sample_weight", ONE_A_MESSAGE),
    ("loss_weight", ONE_A_MESSAGE),
    ("train", ONE_A_MESSAGE),
    ("training", ONE_A_MESSAGE),
    ("loss_mask", ONE_A_MESSAGE),
    ("input_ids", TOKENS),
    ("image", MEDIA),
    ("images", MEDIA),
    ("video", MEDIA),
    ("videos", MEDIA),
    ("audio", MEDIA),
    ("audios", MEDIA),
];
const NO_PLACE: &str = "left out: this form has no place for it";
const PREFERENCES: &str = "left out: answers are learned, not compared";
const ONE_A_MESSAGE: &str = "a key of a message (\"weight\": 0, or \"train\": false); lines have no weights";
const TOKENS: &str = "left out: lines are text, not tokens";
const MEDIA: &str = "left out: only text is learned";

/// TRL's key for further variables of the chat template, such as `enable_thinking`.
const VARIABLES: &str = "chat_template_kwargs";
/// Variables that a conversation has without it.
const OWN_VARIABLES: [&str; 4] = ["messages", "tools", "documents", "add_generation_prompt"];

/// Keys that a prompt, a conversation and an instruction may have.
const OF_PROMPTS: [&str; 2] = ["system", "system_prompt"];
const OF_CHATS: [&str; 4] = ["system", "system_prompt", "tools", VARIABLES];
const OF_INSTRUCTIONS: [&str; 6] = ["input", "system", "system_prompt", "history", "tools", VARIABLES];

/// Messages of a conversation, at most.
pub(super) const MAX_MESSAGES: usize = 20_000;

/// What a line says, and its keys.
#[derive(Debug)]
pub(super) struct Parsed {
    pub(super) content: Content,
    /// Keys of no known meaning.
    pub(super) ignored: Vec<String>,
    /// The same of its messages. A chat template may read them.
    pub(super) ignored_of_messages: UnknownKeys,
}

/// The form of a file, by its first line.
///
/// # Errors
/// A [`DataError`] with the line; [`DataError::Array`].
pub(super) fn form_of(line: &Line) -> Result<Form, DataError> {
    if line.text.trim_ascii_start().starts_with(b"[") {
        return Err(DataError::Array);
    }
    let value = value_of(line)?;
    record_of(line, &value)?.form()
}

/// What a line of a file of this form says.
///
/// # Errors
/// A [`DataError`] with the line.
pub(super) fn parse(line: &Line, form: Form) -> Result<Parsed, DataError> {
    let value = value_of(line)?;
    let record = record_of(line, &value)?;
    if !record.has(form) {
        return Err(DataError::OtherForm { line: line.number, keys: form.keys() });
    }
    let (content, ignored_of_messages) = record.content(form)?;
    let ignored = record.ignored(form)?.into_iter().map(str::to_owned).collect();
    Ok(Parsed { content, ignored, ignored_of_messages })
}

fn value_of(line: &Line) -> Result<Value, DataError> {
    loads(&line.text).map_err(|source| DataError::Json { line: line.number, source })
}

fn record_of<'a>(line: &Line, value: &'a Value) -> Result<Record<'a>, DataError> {
    let dict = value.as_dict().ok_or(DataError::NotAnObject { line: line.number })?;
    Ok(Record { line: line.number, dict })
}

/// Keys of messages of no known meaning.
pub(super) type UnknownKeys = BTreeSet<String>;

impl Record<'_> {
    fn form(&self) -> Result<Form, DataError> {
        let form = Form::ALL.into_iter().find(|&form| self.has(form));
        form.ok_or_else(|| {
            let (found, others) = keys::first(self.dict.entries().iter().filter_map(|(key, _)| key.as_str()));
            DataError::UnknownForm { line: self.line, found, others }
        })
    }

    fn has(&self, form: Form) -> bool {
        form.keys().iter().all(|key| given(self.dict, key).is_some())
    }

    /// The keys that it may have besides those of its form.
    fn optional(&self, form: Form) -> &'static [&'static str] {
        match form {
            Form::Text => &[],
            Form::Completion if self.is_prompted_chat() => &OF_CHATS,
            Form::Completion => &OF_PROMPTS,
            Form::Messages | Form::ShareGpt => &OF_CHATS,
            Form::Instruction => &OF_INSTRUCTIONS,
        }
    }

    /// The keys of no known meaning.
    ///
    /// # Errors
    /// [`DataError::Value`] for a key that changes what the line means, and that the form has no
    /// place for.
    fn ignored(&self, form: Form) -> Result<Vec<&str>, DataError> {
        let mut ignored = Vec::new();
        let known = |key: &&str| form.keys().contains(key) || self.optional(form).contains(key);
        let keys = self.dict.entries().iter().filter_map(|(key, value)| Some((key.as_str()?, value)));
        for (key, value) in keys.filter(|(key, _)| !known(key)) {
            match MEANINGFUL.iter().find(|(meaningful, _)| *meaningful == key) {
                Some(&(_, expected)) if says_something(value, expected) => return Err(self.bad(key, expected)),
                _ => ignored.push(key),
            }
        }
        Ok(ignored)
    }

    /// What it says, and the keys of its messages of no known meaning.
    fn content(&self, form: Form) -> Result<(Content, UnknownKeys), DataError> {
        let content = match form {
            Form::Messages => return self.chat("messages", message),
            Form::ShareGpt => return self.chat("conversations", turn),
            Form::Completion if self.is_prompted_chat() => return self.prompted_chat(),
            Form::Text => Content::Text(self.string(self.dict, "text")?),
            Form::Completion => {
                let prompt = self.string(self.dict, "prompt")?;
                let prompt = match self.system()? {
                    Some(system) => format!("{system}\n\n{prompt}"),
                    None => prompt,
                };
                Content::Completion { prompt, completion: self.string(self.dict, "completion")? }
            }
            Form::Instruction => self.instruction()?,
        };
        Ok((content, UnknownKeys::new()))
    }

    /// Whether its prompt or its completion is a list of messages.
    fn is_prompted_chat(&self) -> bool {
        ["prompt", "completion"].into_iter().any(|key| self.dict.get_str(key).is_some_and(|value| value.as_list().is_some()))
    }

    fn instruction(&self) -> Result<Content, DataError> {
        let mut instruction = self.string(self.dict, "instruction")?;
        let input = self.optional_string("input")?;
        if let Some(input) = input.filter(|input| !input.is_empty()) {
            instruction = format!("{instruction}\n\n{input}");
        }
        let mut turns = self.history()?;
        turns.push([instruction, self.string(self.dict, "output")?]);
        Ok(Content::Instruction { system: self.system()?, turns, tools: self.tools()?, variables: self.variables()? })
    }

    /// The questions and answers before an instruction.
    fn history(&self) -> Result<Vec<[String; 2]>, DataError> {
        let bad = || self.bad("history", "a list of pairs of strings: [[question, answer], ..]");
        let Some(history) = given(self.dict, "history") else { return Ok(Vec::new()) };
        let pair = |pair: &Value| match pair.as_list() {
            Some([question, answer]) => Some([question.as_str()?.to_owned(), answer.as_str()?.to_owned()]),
            _ => None,
        };
        let history = history.as_list().ok_or_else(bad)?;
        if history.len() > MAX_MESSAGES / 2 {
            return Err(DataError::Messages { line: self.line, found: 2 * history.len(), limit: MAX_MESSAGES });
        }
        history.iter().map(|turn| pair(turn).ok_or_else(bad)).collect()
    }

    /// The messages of a key, and whether each is learned.
    fn turns(
        &self,
        key: &'static str,
        read: impl Fn(&Record<'_>, &'static str, &Value) -> Result<Turn, DataError>,
    ) -> Result<Vec<Turn>, DataError> {
        let list = self.dict.get_str(key).and_then(Value::as_list).filter(|list| !list.is_empty());
        let list = list.ok_or_else(|| self.bad(key, "a list of messages"))?;
        if list.len() > MAX_MESSAGES {
            return Err(DataError::Messages { line: self.line, found: list.len(), limit: MAX_MESSAGES });
        }
        list.iter().map(|message| read(self, key, message)).collect()
    }

    fn chat(
        &self,
        key: &'static str,
        read: impl Fn(&Record<'_>, &'static str, &Value) -> Result<Turn, DataError>,
    ) -> Result<(Content, UnknownKeys), DataError> {
        self.conversation(self.turns(key, read)?, 0)
    }

    /// TRL's conversational form: `prompt` and `completion` are lists of messages.
    fn prompted_chat(&self) -> Result<(Content, UnknownKeys), DataError> {
        let mut turns = self.turns("prompt", message)?;
        let prompt = turns.len();
        turns.extend(self.turns("completion", message)?);
        self.conversation(turns, prompt)
    }

    /// The conversation of some messages. The first `prompt` of them are a prompt.
    fn conversation(&self, turns: Vec<Turn>, prompt: usize) -> Result<(Content, UnknownKeys), DataError> {
        let first = turns.first().filter(|turn| role(&turn.message) == Some("system"));
        let own = first.map(|turn| turn.message.get_str("content").cloned().unwrap_or_default());
        let system = match (self.system()?, own) {
            (Some(system), Some(own)) if own != Value::from(&system) => {
                return Err(self.bad("system", "what the system message says, or left out"));
            }
            (system, None) => system,
            (_, Some(_)) => None,
        };
        let first = usize::from(system.is_some());
        let is_unlearned = |(at, turn): (usize, &Turn)| (turn.learns == Learns::Not).then_some(first + at);
        let unlearned = turns.iter().enumerate().filter_map(is_unlearned).collect();
        let unknown = turns.iter().flat_map(|turn| turn.unknown.iter().cloned()).collect();
        let system = system.map(|system| Value::from_pairs([("role", "system"), ("content", &system)]));
        let messages = system.into_iter().chain(turns.into_iter().map(|turn| turn.message.into())).collect();
        let (tools, variables) = (self.tools()?, self.variables()?);
        Ok((Content::Chat(Chat { messages, tools, variables, prompt: first + prompt, unlearned }), unknown))
    }

    /// Further variables of the chat template.
    fn variables(&self) -> Result<Dict, DataError> {
        let Some(given) = given(self.dict, VARIABLES) else { return Ok(Dict::default()) };
        let own = |dict: &Dict| OWN_VARIABLES.iter().any(|own| dict.get_str(own).is_some());
        match given.as_dict() {
            Some(dict) if !own(dict) => Ok(dict.clone()),
            _ => Err(self.bad(VARIABLES, "an object without messages, tools, documents and add_generation_prompt")),
        }
    }

    /// The system prompt of a conversation, an instruction or a prompt.
    fn system(&self) -> Result<Option<String>, DataError> {
        let system = self.optional_string("system")?.filter(|system| !system.is_empty());
        let prompt = self.optional_string("system_prompt")?.filter(|system| !system.is_empty());
        match (system, prompt) {
            (Some(system), Some(prompt)) if system != prompt => {
                Err(self.bad("system_prompt", "what \"system\" says, or left out"))
            }
            (system, prompt) => Ok(system.or(prompt)),
        }
    }

    /// The tools that a conversation may call: a list, or its JSON in a string, as tables have it;
    /// `None` if there are none.
    fn tools(&self) -> Result<Value, DataError> {
        let bad = || self.bad("tools", "a list of tools, or its JSON as a string");
        let Some(given) = given(self.dict, "tools") else { return Ok(Value::None) };
        let tools = match given.as_str().map(str::trim) {
            Some("") => Value::None,
            Some(json) => loads(json.as_bytes()).map_err(|_| bad())?,
            None => given.clone(),
        };
        if tools.is_none() || tools.as_list().is_some() { Ok(tools) } else { Err(bad()) }
    }
}

/// Whether a value changes what its line means. A table has every column in every line, so that
/// many values say nothing.
fn says_something(value: &Value, expected: &str) -> bool {
    let is_default = expected == ONE_A_MESSAGE && value.as_flag() == Some(true);
    let is_flag = expected == ONE_A_MESSAGE && value.as_flag().is_some();
    (value.is_number() || value.is_true() || is_flag) && !is_default
}

#[cfg(test)]
mod tests {
    use super::super::lines::{Lines, MAX_LINE};
    use super::super::survey::Survey;
    use super::*;

    /// Lines with their numbers, and what each says.
    type ParsedLines = Vec<(u64, Parsed)>;

    /// All lines of a file, and what each says.
    fn parse_all(bytes: &[u8]) -> Result<(Option<Form>, ParsedLines), DataError> {
        let (mut lines, mut form, mut all) = (Lines::new(bytes), None, Vec::new());
        while let Some(some) = lines.read(2)? {
            for line in some {
                let form = match form {
                    Some(form) => form,
                    None => *form.insert(form_of(&line)?),
                };
                all.push((line.number, parse(&line, form)?));
            }
        }
        Ok((form, all))
    }

    fn contents(text: &str) -> (Form, Vec<(u64, Content)>) {
        let (form, lines) = parse_all(text.as_bytes()).unwrap();
        (form.unwrap(), lines.into_iter().map(|(line, parsed)| (line, parsed.content)).collect())
    }

    fn conversation(content: &Content) -> &Chat {
        if let Content::Chat(chat) = content { chat } else { panic!("{content:?}") }
    }

    fn roles_and_contents(content: &Content) -> Vec<(String, String)> {
        conversation(content).messages.iter().map(|m| (m.get("role").to_string(), m.get("content").to_string())).collect()
    }

    #[test]
    fn every_form_is_detected() {
        let (form, records) = contents(r#"{"text": "a", "id": 3}"#);
        assert_eq!(form, Form::Text);
        assert!(matches!(&records[..], [(1, Content::Text(t))] if t == "a"));
        let (form, records) = contents(r#"{"prompt": "a", "completion": "b"}"#);
        assert_eq!(form, Form::Completion);
        assert!(matches!(&records[0].1, Content::Completion { prompt, completion } if prompt == "a" && completion == "b"));
        let (form, records) = contents(r#"{"instruction": "a", "input": "b", "output": "c", "text": "all of it"}"#);
        assert_eq!(form, Form::Instruction);
        assert!(
            matches!(&records[0].1, Content::Instruction { system: None, turns, .. } if *turns == [["a\n\nb".to_owned(), "c".to_owned()]])
        );
        let (form, records) = contents(r#"{"messages": [{"role": "user", "content": "a"}]}"#);
        assert_eq!(form, Form::Messages);
        assert_eq!(roles_and_contents(&records[0].1), [("user".to_owned(), "a".to_owned())]);
        let (form, records) =
            contents(r#"{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}"#);
        assert_eq!(form, Form::ShareGpt);
        let expected = [("user", "a"), ("assistant", "b")].map(|(r, c)| (r.to_owned(), c.to_owned()));
        assert_eq!(roles_and_contents(&records[0].1), expected);
    }

    #[test]
    fn a_null_is_as_good_as_no_key() {
        let (form, records) = contents(
            "{\"messages\": null, \"conversations\": null, \"text\": \"a\", \"prompt\": null, \"completion\": \"b\"}",
        );
        assert!(matches!((form, &records[0].1), (Form::Text, Content::Text(text)) if text == "a"));
        let turn = r#"{"from": null, "value": null, "role": "user", "content": "a"}"#;
        let (form, records) = contents(&format!(r#"{{"messages": null, "conversations": [{turn}]}}"#));
        assert_eq!(form, Form::ShareGpt);
        assert_eq!(roles_and_contents(&records[0].1), [("user".to_owned(), "a".to_owned())]);
        assert!(matches!(parse_all(br#"{"text": null}"#), Err(DataError::UnknownForm { line: 1, .. })));
        let later = parse_all(b"{\"text\": \"a\"}\n{\"text\": null, \"messages\": []}").err().unwrap();
        assert_eq!(later.to_string(), "line 2 has no text: every line has the form of the first one");
    }

    #[test]
    fn what_is_misspelt_is_named() {
        let error = |text: &str| parse_all(text.as_bytes()).err().unwrap().to_string();
        assert!(error(r#"{"Text": "a", "id": 1}"#).ends_with("; it has Text, id"));
        let messages = |message: &str| error(&format!("{{\"messages\": [{message}]}}"));
        assert!(
            messages(r#"{"role": "asistant", "content": "a"}"#).starts_with("line 1: \"role\" should be one of system, ")
        );
        assert_eq!(messages(r#"{"role": "user", "text": "a"}"#), "line 1: \"content\" should be what the message says");
        assert!(parse_all(br#"{"messages": [{"role": "assistant", "tool_calls": [], "content": null}]}"#).is_ok());
    }

    #[test]
    fn a_line_may_have_a_system_prompt_and_a_conversation() {
        let of = |line: &str| roles_and_contents(&contents(line).1[0].1);
        let says =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(r, c)| ((*r).to_owned(), (*c).to_owned())).collect::<Vec<_>>();
        let turns = r#""conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]"#;
        let with = |system: &str| of(&format!(r#"{{{turns}, "system": {system}}}"#));
        assert_eq!(with(r#""Be kind.""#), says(&[("system", "Be kind."), ("user", "a"), ("assistant", "b")]));
        for none in ["null", r#""""#] {
            assert_eq!(with(none), says(&[("user", "a"), ("assistant", "b")]), "{none}");
        }
        let own = |own: &str| {
            format!(
                r#"{{"conversations": [{{"from": "system", "value": "{own}"}}, {{"from": "gpt", "value": "b"}}], "system": "S"}}"#
            )
        };
        assert_eq!(of(&own("S")), says(&[("system", "S"), ("assistant", "b")]));
        let error = parse_all(own("own").as_bytes()).err().unwrap();
        assert!(matches!(&error, DataError::Value { line: 1, key, .. } if key == "system"), "{error}");
        let messages = of(r#"{"system": "S", "messages": [{"role": "user", "content": "a"}]}"#);
        assert_eq!(messages, says(&[("system", "S"), ("user", "a")]));
        let error = parse_all(format!(r#"{{{turns}, "system": ["S"]}}"#).as_bytes()).err().unwrap();
        assert!(matches!(&error, DataError::Value { line: 1, key, .. } if key == "system"), "{error}");
    }

    #[test]
    fn tools_may_be_json_in_a_string() {
        let line = |tools: &str| format!(r#"{{"conversations": [{{"from": "gpt", "value": "b"}}], "tools": {tools}}}"#);
        let tools = |json: &str| conversation(&contents(&line(json)).1[0].1).tools.clone();
        let list = r#"[{"name": "look", "at": "sky"}]"#;
        assert_eq!(tools(&format!("{list:?}")), tools(list));
        let in_order = "[{'name': 'look', 'at': 'sky'}]";
        assert_eq!(tools(&format!("{list:?}")).to_string(), in_order);
        for none in ["null", r#""""#, r#"" ""#, r#""null""#] {
            assert!(tools(none).is_none(), "{none}");
        }
        for bad in ["3", "{}", r#""look""#, r#""{}""#] {
            let error = parse_all(line(bad).as_bytes()).err().unwrap();
            assert!(matches!(&error, DataError::Value { line: 1, key, .. } if key == "tools"), "{bad}: {error}");
        }
    }

    #[test]
    fn messages_are_as_transformers_gives_them_to_templates() {
        let message = |message: &str| {
            let line = format!("{{\"messages\": [{message}]}}");
            conversation(&contents(&line).1[0].1).messages[0].to_string()
        };
        // What is null is not there, and thoughts have every name.
        let given =
            r#"{"role": "assistant", "content": null, "tool_calls": [{"a": null}], "name": null, "reasoning": "hm"}"#;
        let expected = "{'role': 'assistant', 'tool_calls': [{'a': None}], 'reasoning': 'hm', 'thinking': 'hm', 'reasoning_content': 'hm'}";
        assert_eq!(message(given), expected);
        assert_eq!(
            message(r#"{"role": "tool", "content": "3", "tool_call_id": "c", "weight": 0}"#),
            "{'role': 'tool', 'content': '3', 'tool_call_id': 'c'}"
        );
        let line = r#"{"conversations": [{"from": "gpt", "value": "a", "reasoning_content": "hm", "tool_calls": [], "name": null}]}"#;
        let turn = conversation(&contents(line).1[0].1).messages[0].to_string();
        assert_eq!(
            turn,
            "{'role': 'assistant', 'content': 'a', 'reasoning_content': 'hm', 'tool_calls': [], 'thinking': 'hm'}"
        );
    }

    #[test]
    fn keys_that_have_a_meaning_and_no_place_are_named() {
        let error = |line: &str| match parse_all(line.as_bytes()).err().unwrap() {
            DataError::Value { line: 1, key, .. } => key,
            other => panic!("{line}: {other}"),
        };
        let cases = [
            (r#"{"text": "a", "system": "S"}"#, "system"),
            (r#"{"text": "a", "tools": [{}]}"#, "tools"),
            (r#"{"text": "a", "weight": 0}"#, "weight"),
            (r#"{"text": "a", "images": ["a.png"]}"#, "images"),
            (r#"{"prompt": "a", "completion": "b", "history": [["q", "a"]]}"#, "history"),
            (r#"{"prompt": "a", "completion": "b", "tools": [{}]}"#, "tools"),
            (r#"{"instruction": "a", "output": "b", "history": ["q"]}"#, "history"),
            (r#"{"instruction": "a", "output": "b", "history": [["q"]]}"#, "history"),
            (r#"{"messages": [{"role": "user", "content": "a"}], "history": [["q", "a"]]}"#, "history"),
            (r#"{"messages": [{"role": "user", "content": "a"}], "functions": [{}]}"#, "functions"),
            (r#"{"messages": [{"role": "user", "content": "a"}], "rejected": {"role": "assistant"}}"#, "rejected"),
            (r#"{"messages": [{"role": "user", "content": "a", "weight": 1}]}"#, "weight"),
            (r#"{"messages": [{"role": "user", "content": "a", "train": true}]}"#, "train"),
            (r#"{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}"#, "weight"),
            (r#"{"messages": [{"role": "assistant", "content": "a", "train": "no"}]}"#, "train"),
            (r#"{"messages": [{"role": "assistant", "content": "a", "weight": 1, "train": false}]}"#, "train"),
            (r#"{"messages": [{"role": "assistant", "content": "a", "function_call": {"name": "f"}}]}"#, "function_call"),
            (r#"{"conversations": [{"from": "gpt", "value": "a", "weight": 2}]}"#, "weight"),
            (r#"{"messages": [{"role": "assistant", "content": null, "function_call": {"name": "f"}}]}"#, "function_call"),
            (r#"{"messages": [{"role": "assistant", "content": null, "refusal": "No."}]}"#, "refusal"),
            (r#"{"messages": [{"role": "assistant", "content": "a", "mask": true}]}"#, "mask"),
            (r#"{"messages": [{"role": "assistant", "content": "a", "ignore": false}]}"#, "ignore"),
            (
                r#"{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a"}]}]}"#,
                "content",
            ),
            (r#"{"messages": [{"role": "user", "content": "a"}], "train": false}"#, "train"),
            (
                r#"{"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"tools": []}}"#,
                "chat_template_kwargs",
            ),
            (r#"{"prompt": "a", "completion": "b", "chat_template_kwargs": {"x": 1}}"#, "chat_template_kwargs"),
            (r#"{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}"#, "completion"),
            (r#"{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}"#, "prompt"),
        ];
        for (line, key) in cases {
            assert_eq!(error(line), key, "{line}");
        }
        let trainable = r#"{"messages": [{"role": "assistant", "content": "a", "trainable": false}]}"#;
        assert_eq!(conversation(&contents(trainable).1[0].1).unlearned, [0]);
        parse_all(br#"{"messages": [{"role": "user", "content": "a"}], "weight": 1}"#).unwrap();
        // Columns of a table that say nothing.
        let line = r#"{"text": "a", "system": "", "tools": null, "history": [], "images": []}"#;
        assert_eq!(parse_all(line.as_bytes()).unwrap().1[0].1.ignored.len(), 4);
    }

    #[test]
    fn a_prompt_and_a_completion_may_be_lists_of_messages() {
        let line = r#"{"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}],
            "completion": [{"role": "assistant", "content": "d"}], "system": "S", "tools": [{}], "chat_template_kwargs": {"x": 1}}"#;
        let (form, records) = contents(&line.replace('\n', " "));
        assert_eq!(form, Form::Completion);
        let chat = conversation(&records[0].1);
        assert_eq!((chat.messages.len(), chat.prompt), (5, 4));
        assert_eq!((chat.tools.to_string(), chat.variables.entries().len()), ("[{}]".to_owned(), 1));
    }

    #[test]
    fn keys_of_messages_without_a_meaning_are_counted() {
        let line = r#"{"messages": [{"role": "user", "content": "a", "mood": "sad", "id": null, "notes": []}, {"role": "assistant", "content": "b", "mood": "glad"}]}"#;
        let text = format!("{line}\n{line}");
        let mut lines = Lines::new(text.as_bytes());
        let survey = Survey::of(&mut lines, |_| false, &mut |_, _| true).unwrap();
        assert_eq!((survey.form, survey.count), (Form::Messages, 2));
        let ignored: Vec<_> = survey.ignored.named.into_iter().collect();
        assert_eq!(ignored, [("messages[].mood".to_owned(), 2)]);
    }

    #[test]
    fn windows_line_ends_marks_blank_lines_and_unicode() {
        let (_, records) = contents("\u{feff}{\"text\": \"é\u{2028}漢\"}\r\n\r\n  \r\n{\"text\": \"\\ud83e\\udd80\"}");
        let texts: Vec<_> = records.iter().map(|(line, c)| (*line, format!("{c:?}"))).collect();
        assert_eq!(texts, [(1, "Text(\"é\\u{2028}漢\")".to_owned()), (4, "Text(\"🦀\")".to_owned())]);
    }

    #[test]
    fn broken_lines_are_named() {
        let error = |text: &[u8]| parse_all(text).err().unwrap();
        let good = r#"{"text": "a"}"#;
        let after = |line: &str| error(format!("{good}\n\n{line}\n{good}").as_bytes());
        assert!(matches!(after("{\"text\": \"a\""), DataError::Json { line: 3, .. }));
        assert!(matches!(after("3"), DataError::NotAnObject { line: 3 }));
        assert!(matches!(after("{\"texts\": \"a\"}"), DataError::OtherForm { line: 3, keys: ["text"] }));
        assert!(matches!(after("{\"text\": 1}"), DataError::Value { line: 3, .. }));
        assert!(matches!(error(b"{\"text\": \"\xff\"}"), DataError::Json { line: 1, .. }));
        assert!(matches!(error(b"{\"a\": 1}"), DataError::UnknownForm { line: 1, .. }));
        for empty in [b"".as_slice(), b"\r\n \n"] {
            assert!(matches!(Survey::of(&mut Lines::new(empty), |_| false, &mut |_, _| true), Err(DataError::Empty)));
        }
        assert!(matches!(error(b" [{\"text\": \"a\"}]"), DataError::Array));
        for bad in ["[]", "3", "[{\"content\": \"a\"}]", "[3]"] {
            assert!(
                matches!(error(format!("{{\"messages\": {bad}}}").as_bytes()), DataError::Value { line: 1, .. }),
                "{bad}"
            );
        }
        let turn = br#"{"conversations": [{"from": "alien", "value": "a"}]}"#;
        assert!(matches!(error(turn), DataError::Value { key, .. } if key == "from"));
    }

    #[test]
    fn lines_and_conversations_have_limits() {
        let line = |len: usize| format!("{{\"text\": \"{}\"}}", "a".repeat(len - 12));
        assert_eq!(contents(&line(MAX_LINE)).1.len(), 1);
        let error = parse_all(line(MAX_LINE + 1).as_bytes()).err().unwrap();
        assert!(matches!(error, DataError::LineBytes { line: 1, limit: MAX_LINE }), "{error}");
        let of = |count: usize| {
            let turn = r#"{"role": "user", "content": "a"}"#;
            format!("{{\"messages\": [{}]}}", vec![turn; count].join(", "))
        };
        assert_eq!(conversation(&contents(&of(MAX_MESSAGES)).1[0].1).messages.len(), MAX_MESSAGES);
        let error = parse_all(of(MAX_MESSAGES + 1).as_bytes()).err().unwrap();
        assert!(matches!(error, DataError::Messages { line: 1, found: 20_001, limit: MAX_MESSAGES }), "{error}");
        let history = vec![r#"["q", "a"]"#; MAX_MESSAGES / 2 + 1].join(", ");
        let line = format!(r#"{{"instruction": "a", "output": "b", "history": [{history}]}}"#);
        assert!(matches!(parse_all(line.as_bytes()).err().unwrap(), DataError::Messages { found: 20_002, .. }));
    }
}

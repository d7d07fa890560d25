//! JSON Lines: what a line says, in one of the forms that people have.

use std::collections::BTreeMap;

use super::DataError;
use super::jinja::{Dict, Value};
use super::messages::{Learns, message, turn};

/// What a record of a file says.
#[derive(Debug, Clone)]
pub(super) enum Content {
    /// Plain text, all of it to be learned.
    Text(String),
    /// What follows a prompt is to be learned.
    Completion { prompt: String, completion: String },
    /// The answers to instructions are to be learned.
    Instruction { system: Option<String>, turns: Vec<[String; 2]>, tools: Value },
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
    /// The messages of the assistant that are not to be learned, by their indices.
    pub(super) unlearned: Vec<usize>,
}

/// The records of a file.
#[derive(Debug)]
pub(super) struct Records {
    /// The form that all have.
    pub(super) form: Form,
    /// Each with its line, from 1.
    pub(super) records: Vec<(u64, Content)>,
    /// Keys of no known meaning, and how many lines have each.
    pub(super) ignored: BTreeMap<String, u64>,
}

/// The forms, by the keys that they have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// `text`.
    Text,
    /// `prompt`, `completion`, and perhaps `system`.
    Completion,
    /// `messages`, each with `role` and `content`, and perhaps `system`, `tools`.
    Messages,
    /// `instruction`, `output`, and perhaps `input`, `system`, `history`, `tools`.
    Instruction,
    /// `conversations`, each with `from` and `value`, and perhaps `system`, `tools`.
    ShareGpt,
}

/// Keys that change what a line means wherever they stand, and what to say where a form has no
/// place for one.
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
    ("chat_template_kwargs", NO_PLACE),
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

impl Form {
    const ALL: [Self; 5] = [Self::Messages, Self::ShareGpt, Self::Completion, Self::Instruction, Self::Text];

    /// The keys that a record of this form has at least.
    pub fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Text => &["text"],
            Self::Completion => &["prompt", "completion"],
            Self::Messages => &["messages"],
            Self::Instruction => &["instruction", "output"],
            Self::ShareGpt => &["conversations"],
        }
    }

    /// The keys that it may have, too.
    fn optional(self) -> &'static [&'static str] {
        match self {
            Self::Text => &[],
            Self::Completion => &["system", "system_prompt"],
            Self::Messages | Self::ShareGpt => &["system", "system_prompt", "tools"],
            Self::Instruction => &["input", "system", "system_prompt", "history", "tools"],
        }
    }
}

/// The bytes without the mark of UTF-8 that some programs of Windows put before a text.
pub(super) fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
}

/// The records of a file. The first record tells the form of all.
pub(super) fn parse(bytes: &[u8]) -> Result<Records, DataError> {
    let bytes = without_mark(bytes);
    if bytes.trim_ascii_start().starts_with(b"[") {
        return Err(DataError::Array);
    }
    let mut form = None;
    let (mut records, mut ignored) = (Vec::new(), BTreeMap::new());
    for (line, text) in (1..).zip(bytes.split(|&b| b == b'\n')) {
        if text.trim_ascii().is_empty() {
            continue;
        }
        let value: Value = serde_json::from_slice(text).map_err(|source| DataError::Json { line, source })?;
        let Some(dict) = value.as_dict() else { return Err(DataError::NotAnObject { line }) };
        let record = Record { line, dict };
        let form = match form {
            Some(form) if record.has(form) => form,
            Some(form) => return Err(DataError::OtherForm { line, form }),
            None => *form.insert(record.form()?),
        };
        records.push((line, record.content(form)?));
        for key in record.ignored(form)? {
            *ignored.entry(key.to_owned()).or_default() += 1;
        }
    }
    form.map(|form| Records { form, records, ignored }).ok_or(DataError::Empty)
}

/// A line.
#[derive(Debug, Clone, Copy)]
pub(super) struct Record<'a> {
    line: u64,
    dict: &'a Dict,
}

impl Record<'_> {
    fn form(&self) -> Result<Form, DataError> {
        let keys = || self.dict.entries().iter().map(|(key, _)| key.to_string()).collect();
        let form = Form::ALL.into_iter().find(|&form| self.has(form));
        form.ok_or_else(|| DataError::UnknownForm { line: self.line, found: keys() })
    }

    fn has(&self, form: Form) -> bool {
        form.keys().iter().all(|key| given(self.dict, key).is_some())
    }

    /// The keys that nothing is known of.
    ///
    /// # Errors
    /// [`DataError::Value`] for a key that changes what the line means, and that the form has no
    /// place for.
    fn ignored(&self, form: Form) -> Result<Vec<&str>, DataError> {
        let mut ignored = Vec::new();
        let known = |key: &&str| form.keys().contains(key) || form.optional().contains(key);
        let keys = self.dict.entries().iter().filter_map(|(key, value)| Some((key.as_str()?, value)));
        for (key, value) in keys.filter(|(key, _)| !known(key)) {
            // A table has every column in every line.
            let says_something = value.is_number() || value.is_true();
            match MEANINGFUL.iter().find(|(meaningful, _)| *meaningful == key).filter(|_| says_something) {
                Some((_, expected)) => return Err(self.bad(key, expected)),
                None => ignored.push(key),
            }
        }
        Ok(ignored)
    }

    fn content(&self, form: Form) -> Result<Content, DataError> {
        Ok(match form {
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
            Form::Messages => self.chat("messages", message)?,
            Form::ShareGpt => self.chat("conversations", turn)?,
        })
    }

    fn instruction(&self) -> Result<Content, DataError> {
        let mut instruction = self.string(self.dict, "instruction")?;
        let input = self.optional_string("input")?;
        if let Some(input) = input.filter(|input| !input.is_empty()) {
            instruction = format!("{instruction}\n\n{input}");
        }
        let mut turns = self.history()?;
        turns.push([instruction, self.string(self.dict, "output")?]);
        Ok(Content::Instruction { system: self.system()?, turns, tools: self.tools()? })
    }

    /// The questions and answers before an instruction.
    fn history(&self) -> Result<Vec<[String; 2]>, DataError> {
        let bad = || self.bad("history", "a list of pairs of strings: [[question, answer], ..]");
        let Some(history) = given(self.dict, "history") else { return Ok(Vec::new()) };
        let pair = |pair: &Value| match pair.as_list() {
            Some([question, answer]) => Some([question.as_str()?.to_owned(), answer.as_str()?.to_owned()]),
            _ => None,
        };
        history.as_list().ok_or_else(bad)?.iter().map(|turn| pair(turn).ok_or_else(bad)).collect()
    }

    /// The error of a value that is not what it should be.
    pub(super) fn bad(&self, key: &str, expected: &'static str) -> DataError {
        DataError::Value { line: self.line, key: key.to_owned(), expected }
    }

    pub(super) fn string(&self, of: &Dict, key: &str) -> Result<String, DataError> {
        of.get_str(key).and_then(Value::as_str).map(str::to_owned).ok_or_else(|| self.bad(key, "a string"))
    }

    fn optional_string(&self, key: &str) -> Result<Option<String>, DataError> {
        given(self.dict, key).map(|_| self.string(self.dict, key)).transpose()
    }

    fn chat(
        &self,
        key: &'static str,
        read: impl Fn(&Record<'_>, &Value) -> Result<(Dict, Learns), DataError>,
    ) -> Result<Content, DataError> {
        let list = self.dict.get_str(key).and_then(Value::as_list).filter(|list| !list.is_empty());
        let list = list.ok_or_else(|| self.bad(key, "a list of messages"))?;
        let read: Vec<(Dict, Learns)> = list.iter().map(|message| read(self, message)).collect::<Result<_, _>>()?;
        let has_system = read.first().is_some_and(|(first, _)| role(first) == Some("system"));
        let system = self.system()?.filter(|_| !has_system);
        let first = usize::from(system.is_some());
        let unlearned = (first..).zip(&read).filter(|(_, (_, learns))| *learns == Learns::Not).map(|(i, _)| i).collect();
        let system = system.map(|system| Value::from_pairs([("role", "system"), ("content", &system)]));
        let messages = system.into_iter().chain(read.into_iter().map(|(message, _)| message.into())).collect();
        Ok(Content::Chat(Chat { messages, tools: self.tools()?, unlearned }))
    }

    /// What stands next to a conversation, an instruction or a prompt, to be said before it.
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

    /// The tools that a conversation may call: a list or, where a table has no room for one, its
    /// JSON; `None` where there are none.
    fn tools(&self) -> Result<Value, DataError> {
        let bad = || self.bad("tools", "a list of tools, or its JSON as a string");
        let Some(given) = given(self.dict, "tools") else { return Ok(Value::None) };
        let tools = match given.as_str().map(str::trim) {
            Some("") => Value::None,
            Some(json) => serde_json::from_str(json).map_err(|_| bad())?,
            None => given.clone(),
        };
        if tools.is_none() || tools.as_list().is_some() { Ok(tools) } else { Err(bad()) }
    }
}

/// The role of a message.
pub(super) fn role(message: &Dict) -> Option<&str> {
    message.get_str("role").and_then(Value::as_str)
}

/// A key of a map that is there and not null: what writes tables as JSON has every column in every
/// line.
pub(super) fn given<'a>(dict: &'a Dict, key: &str) -> Option<&'a Value> {
    dict.get_str(key).filter(|value| !value.is_none())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(text: &str) -> (Form, Vec<(u64, Content)>) {
        let Records { form, records, .. } = parse(text.as_bytes()).unwrap();
        (form, records)
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
        assert!(matches!(parse(br#"{"text": null}"#), Err(DataError::UnknownForm { line: 1, .. })));
        let later = parse(b"{\"text\": \"a\"}\n{\"text\": null, \"messages\": []}").unwrap_err();
        assert_eq!(later.to_string(), "line 2 has no text: every line has the form of the first one");
    }

    #[test]
    fn what_is_misspelt_is_named() {
        let error = |text: &str| parse(text.as_bytes()).unwrap_err().to_string();
        assert!(error(r#"{"Text": "a", "id": 1}"#).ends_with("; it has Text, id"));
        let messages = |message: &str| error(&format!("{{\"messages\": [{message}]}}"));
        assert!(
            messages(r#"{"role": "asistant", "content": "a"}"#).starts_with("line 1: \"role\" should be one of system, ")
        );
        assert_eq!(messages(r#"{"role": "user", "text": "a"}"#), "line 1: \"content\" should be what the message says");
        assert!(parse(br#"{"messages": [{"role": "assistant", "tool_calls": [], "content": null}]}"#).is_ok());
    }

    #[test]
    fn a_system_prompt_may_stand_beside_a_conversation() {
        let of = |line: &str| roles_and_contents(&contents(line).1[0].1);
        let says =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(r, c)| ((*r).to_owned(), (*c).to_owned())).collect::<Vec<_>>();
        let turns = r#""conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]"#;
        let with = |system: &str| of(&format!(r#"{{{turns}, "system": {system}}}"#));
        assert_eq!(with(r#""Be kind.""#), says(&[("system", "Be kind."), ("user", "a"), ("assistant", "b")]));
        for none in ["null", r#""""#] {
            assert_eq!(with(none), says(&[("user", "a"), ("assistant", "b")]), "{none}");
        }
        let own =
            of(r#"{"conversations": [{"from": "system", "value": "own"}, {"from": "gpt", "value": "b"}], "system": "S"}"#);
        assert_eq!(own, says(&[("system", "own"), ("assistant", "b")]));
        let messages = of(r#"{"system": "S", "messages": [{"role": "user", "content": "a"}]}"#);
        assert_eq!(messages, says(&[("system", "S"), ("user", "a")]));
        let error = parse(format!(r#"{{{turns}, "system": ["S"]}}"#).as_bytes()).unwrap_err();
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
            let error = parse(line(bad).as_bytes()).unwrap_err();
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
        let error = |line: &str| match parse(line.as_bytes()).unwrap_err() {
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
        ];
        for (line, key) in cases {
            assert_eq!(error(line), key, "{line}");
        }
        // Columns of a table that say nothing.
        let line = r#"{"text": "a", "system": "", "tools": null, "history": [], "images": []}"#;
        assert_eq!(parse(line.as_bytes()).unwrap().ignored.len(), 4);
    }

    #[test]
    fn windows_line_ends_marks_blank_lines_and_unicode() {
        let (_, records) = contents("\u{feff}{\"text\": \"é\u{2028}漢\"}\r\n\r\n  \r\n{\"text\": \"\\ud83e\\udd80\"}");
        let texts: Vec<_> = records.iter().map(|(line, c)| (*line, format!("{c:?}"))).collect();
        assert_eq!(texts, [(1, "Text(\"é\\u{2028}漢\")".to_owned()), (4, "Text(\"🦀\")".to_owned())]);
    }

    #[test]
    fn broken_lines_are_named() {
        let error = |text: &[u8]| parse(text).unwrap_err();
        let good = r#"{"text": "a"}"#;
        let after = |line: &str| error(format!("{good}\n\n{line}\n{good}").as_bytes());
        assert!(matches!(after("{\"text\": \"a\""), DataError::Json { line: 3, .. }));
        assert!(matches!(after("3"), DataError::NotAnObject { line: 3 }));
        assert!(matches!(after("{\"texts\": \"a\"}"), DataError::OtherForm { line: 3, form: Form::Text }));
        assert!(matches!(after("{\"text\": 1}"), DataError::Value { line: 3, .. }));
        assert!(matches!(error(b"{\"text\": \"\xff\"}"), DataError::Json { line: 1, .. }));
        assert!(matches!(error(b"{\"a\": 1}"), DataError::UnknownForm { line: 1, .. }));
        assert!(matches!(error(b""), DataError::Empty));
        assert!(matches!(error(b"\r\n \n"), DataError::Empty));
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
}
